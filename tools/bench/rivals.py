"""Rivals: what torch itself offers, measured in the same run where it can compute the same function."""

from collections.abc import Callable
from functools import cache, partial
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from farspan.kernels.errors import ConfigError
from farspan.kernels.mechanism import Masked, Mechanism, Routed
from farspan.kernels.mechanisms.dense import Dense
from farspan.kernels.rows import Rows
from farspan.kernels.visibility import Visibility
from farspan.tools.bench.case import Attention, Contender, Shape


def rivals_on(device: torch.device) -> list[Contender]:
    """Return the rivals that run on a device."""
    if device.type == "cpu":
        return [Sdpa("torch_sdpa", "FLASH_ATTENTION")]
    return [
        Sdpa("torch_sdpa_flash", "FLASH_ATTENTION"),
        Sdpa("torch_sdpa_cudnn", "CUDNN_ATTENTION"),
        Flex(),
    ]


@final
class Sdpa(Contender):
    """torch's scaled_dot_product_attention by one of its kernels; dense causal attention over one document only.

    kernel: a name of SDPBackend, whose members cannot be sent to another process.
    """

    packed: ClassVar[bool] = False

    def __init__(self, name: str, kernel: str) -> None:
        self.name, self.kernel = name, kernel

    def plan(self, mechanism: Mechanism, rows: Rows, shape: Shape) -> Attention:
        if mechanism != Dense(causal=True) or not _is_one_document(rows):
            raise ConfigError(f"{self.name} computes dense causal attention over one document only.")
        return partial(_sdpa, kernel=self.kernel)


def _is_one_document(rows: Rows) -> bool:
    return bool((rows.document == 0).all()) and torch.equal(rows.position, torch.arange(len(rows)).int())


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, kernel: str) -> Tensor:
    with sdpa_kernel(getattr(SDPBackend, kernel)):
        query, key, value = _by_head(q, k, v)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)


@final
class Flex(Contender):
    """torch's FlexAttention, compiled: static visibility that is the same in all heads. Its mask is made beforehand."""

    name = "torch_flex"

    def plan(self, mechanism: Mechanism, rows: Rows, shape: Shape) -> Attention:
        if not isinstance(mechanism, Masked) or isinstance(mechanism, Routed):
            raise ConfigError(f"{self.name} is compared where what a query sees is static.")
        visibility = mechanism.visibility()
        if not visibility.is_uniform or visibility.neighbourhood is not None:
            raise ConfigError(f"{self.name} is compared where all heads see the same, and no grid.")
        return partial(_flex, mask=_block_mask(visibility, rows, shape.device))


def _block_mask(visibility: Visibility, rows: Rows, device: torch.device) -> BlockMask:
    position, document = rows.position.to(device), rows.document.to(device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visibility.shows(position[query], document[query], position[key], document[key])

    count = len(rows)
    return create_block_mask(sees, None, None, count, count, device=str(device), _compile=device.type == "cuda")


@cache
def _compiled() -> Callable[..., Tensor]:
    """Return FlexAttention compiled; not before it is wanted, as the compiler takes seconds to import."""
    return torch.compile(flex_attention, dynamic=False)  # pyright: ignore[reportReturnType]


def _flex(q: Tensor, k: Tensor, v: Tensor, *, mask: BlockMask) -> Tensor:
    query, key, value = _by_head(q, k, v)
    return _compiled()(query, key, value, block_mask=mask, enable_gqa=True).squeeze(0).transpose(0, 1)


def _by_head(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(0, 1).unsqueeze(0) for x in tensors]
