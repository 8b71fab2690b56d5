"""A mechanism that is nowhere but here: what a newcomer would add as a file of `kernels/mechanisms/`.

Importing this module registers it, and a process that is handed an instance imports it.
`pytest -p tests.support.toy_mechanism`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self, final

from farspan.kernels.kinds.masked import Masked
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.mechanism import MECHANISMS


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Toy(Masked):
    """reach: a token sees so many before it, and the first of its document."""

    reach: int = 5

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return (cls(reach=5),)

    @classmethod
    def benchmarks(cls) -> Mapping[str, Self]:
        return {"toy_5": cls(reach=5)}

    def attention_mask(self) -> AttentionMask:
        return AttentionMask(window=self.reach + 1, sinks=1)


MECHANISMS.add("toy", Toy)
