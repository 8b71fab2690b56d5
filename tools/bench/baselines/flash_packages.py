"""flash-attn's own functions as baselines, of the installed versions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from farspan.errors import ConfigError
from farspan.kernels.cuda import packages as flash_attn
from farspan.kernels.cuda.operators import DTYPES
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Mechanism
from farspan.tools.bench.case import Attention, Shape
from farspan.tools.bench.contenders import Contender

MODULES = {
    "flash_attn_2": "flash_attn.flash_attn_interface",
    "flash_attn_3": "flash_attn_interface",
    "flash_attn_4": "flash_attn.cute.interface",
}


def installed_flash_attn() -> list[Contender]:
    return [FlashAttn(name) for name in MODULES if public_function(name) is not None]


def public_function(name: str) -> Callable[..., Any] | None:
    """Return flash_attn_varlen_func of a version, None where it is not installed."""
    return getattr(flash_attn.module(MODULES[name]), "flash_attn_varlen_func", None)


@final
@dataclass(frozen=True, slots=True)
class FlashAttn(Contender):
    """flash_attn_varlen_func of a version: dense attention or a sliding window over documents."""

    name: str

    def plan(self, mechanism: Mechanism, rows: Rows, shape: Shape) -> Attention:
        attention_mask = mechanism.static_mask
        if attention_mask is None:
            raise ConfigError(f"{self.name} is compared where the mask is static.")
        if not attention_mask.is_uniform or attention_mask.sinks or attention_mask.neighborhood is not None:
            raise ConfigError(f"{self.name} computes dense attention and one sliding window, without sinks.")
        check_dtype(self.name, shape)
        lengths = packed_lengths(self.name, rows)
        starts = cu_seqlens(lengths, shape.device)
        options: dict[str, Any] = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "causal": attention_mask.causal}
        options |= {"max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths)}
        if attention_mask.window is not None:
            assert isinstance(attention_mask.window, int)
            # The number of unmasked keys before and after a query's own.
            before = attention_mask.window - 1
            options["window_size"] = (before, 0 if attention_mask.causal else before)
        function, tokens = public_function(self.name), sum(lengths)
        assert function is not None

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            found = function(q[:tokens], k[:tokens], v[:tokens], **options)
            # Version 4 returns the lse, or None, besides.
            return with_padding(found[0] if isinstance(found, tuple) else found, len(q))

        return attend


def check_dtype(name: str, shape: Shape) -> None:
    """Raise ConfigError where flash-attn does not compute in a shape's dtype."""
    if shape.dtype not in DTYPES:
        raise ConfigError(f"{name} computes in bfloat16 and float16 only.")


def packed_lengths(name: str, rows: Rows) -> list[int]:
    """Return the lengths of packed documents, padding last; raises ConfigError for other rows."""
    lengths = rows.document[rows.document >= 0].unique_consecutive(return_counts=True)[1].tolist()
    packed = Rows.packed(lengths, padding=len(rows) - sum(lengths))
    if not lengths or not torch.equal(packed.ordinal(), rows.ordinal()):
        raise ConfigError(f"{name} is compared where complete documents follow one another.")
    return lengths


def cu_seqlens(lengths: list[int], device: torch.device) -> Tensor:
    """Return the starts of sequences of these lengths and the end of the last one, int32."""
    return torch.tensor([0, *lengths]).cumsum(0).int().to(device)


def with_padding(out: Tensor, rows: int) -> Tensor:
    """Return out `[tokens, Hq, Dv]` with zeros up to as many rows."""
    return out if len(out) == rows else F.pad(out, (0, 0, 0, 0, 0, rows - len(out)))
