"""FlexAttention of torch as a baseline: static masks, and block-sparse patterns, as its block masks."""

from collections.abc import Callable
from functools import cache, partial
from typing import final

import torch
import torch._dynamo.config
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from farspan.errors import ConfigError
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Heads, Mechanism
from farspan.kernels.mechanisms.block_sparse import BlockSparse
from farspan.tools.bench.case import Attention, Shape
from farspan.tools.bench.contenders import Contender

RECOMPILATIONS = 1 << 16
"""Masks and sizes that FlexAttention may be compiled for; beyond torch's own limit of 8 it would go on uncompiled."""
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Whether a query and a key, in a head of a sequence, are a pair; all four are numbers."""


@final
class Flex(Contender):
    """torch's FlexAttention, compiled, for masks that do not depend on content; they are built in advance."""

    name = "torch_flex"

    def plan(self, mechanism: Mechanism, rows: Rows, shape: Shape) -> Attention:
        if isinstance(mechanism, BlockSparse):
            return partial(_flex, mask=pattern_mask(mechanism, rows, shape.heads, shape.device))
        attention_mask = mechanism.static_mask
        if attention_mask is None:
            raise ConfigError(f"{self.name} is compared where the mask is static.")
        if not attention_mask.is_uniform or attention_mask.neighborhood is not None:
            raise ConfigError(f"{self.name} is compared where all heads share a mask, and no grid.")
        mask_mod = of_positions(attention_mask, rows, shape.device)
        return partial(_flex, mask=block_mask(mask_mod, None, rows, shape.device))


def block_mask(mask_mod: MaskMod, heads: int | None, rows: Rows, device: torch.device) -> BlockMask:
    """Return the mask of rows in so many heads, or the same in all."""
    count = len(rows)
    return create_block_mask(mask_mod, None, heads, count, count, device=str(device), _compile=device.type == "cuda")


def of_positions(attention_mask: AttentionMask, rows: Rows, device: torch.device) -> MaskMod:
    position, document = rows.position.to(device), rows.document.to(device)

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return attention_mask.mask_mod(position[query], document[query], position[key], document[key])

    return mask_mod


def pattern_mask(mechanism: BlockSparse, rows: Rows, heads: Heads, device: torch.device) -> BlockMask:
    """Return the mask of a pattern in each query head."""
    # The pattern does not depend on their values.
    q, k = (torch.zeros(len(rows), number, 1) for number in (heads.query, heads.kv))
    selection = mechanism.route(rows, heads, q, k).selection
    table = selection.table().to(device)
    # Of each token, in the selection's table.
    query_block = (selection.query_block % (selection.num_query_blocks + 1)).to(device)
    key_block = (selection.blocks.of(rows) % (selection.blocks.count + 1)).to(device)
    unmasked, group = of_positions(mechanism.attention_mask(), rows, device), heads.query // heads.kv

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return unmasked(batch, head, query, key) & table[head // group, query_block[query], key_block[key]]

    return block_mask(mask_mod, heads.query, rows, device)


@cache
def _compiled() -> Callable[..., Tensor]:
    """Compile FlexAttention at the first call: the compiler takes seconds to import."""
    return torch.compile(flex_attention, dynamic=False)  # pyright: ignore[reportReturnType]


def _flex(q: Tensor, k: Tensor, v: Tensor, *, mask: BlockMask) -> Tensor:
    # [T, H, D] -> [1, H, T, D]
    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    with torch._dynamo.config.patch(
        recompile_limit=RECOMPILATIONS,
        accumulated_recompile_limit=RECOMPILATIONS,
        fail_on_recompile_limit_hit=True,
    ):
        return _compiled()(query, key, value, block_mask=mask, enable_gqa=True).squeeze(0).transpose(0, 1)
