"""FlexAttention of torch as a baseline: static masks, and block-sparse patterns, as its block masks."""

from collections.abc import Callable
from functools import cache, partial
from typing import final

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from farspan.errors import ConfigError
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockSelection
from farspan.kernels.mechanism import Heads, Mechanism
from farspan.kernels.mechanisms.block_sparse import BlockSparse
from farspan.tools.bench.case import Attention, Shape
from farspan.tools.bench.contenders import Contender

BLOCK = 128
"""Queries and keys of a block of its masks: its default."""


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
        return partial(_flex, mask=attention_block_mask(attention_mask, rows, shape.device))


def attention_block_mask(attention_mask: AttentionMask, rows: Rows, device: torch.device) -> BlockMask:
    """Return the block mask of rows in all heads."""
    position, document = rows.position.to(device), rows.document.to(device)

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return attention_mask.mask_mod(position[query], document[query], position[key], document[key])

    count = len(rows)
    return create_block_mask(mask_mod, None, None, count, count, device=str(device), _compile=device.type == "cuda")


def pattern_mask(mechanism: BlockSparse, rows: Rows, heads: Heads, device: torch.device) -> BlockMask:
    """Return the block mask of a pattern in each query head; built from blocks, without a look at pairs."""
    # The pattern does not depend on their values.
    q, k = (torch.zeros(len(rows), number, 1) for number in (heads.query, heads.kv))
    selection = mechanism.route(rows, heads, q, k).selection
    partial_blocks, full_blocks = _blocks(selection, rows, mechanism.causal, device)
    group = heads.query // heads.kv
    return BlockMask.from_kv_blocks(
        *_lists(partial_blocks, group),
        *_lists(full_blocks, group),
        BLOCK_SIZE=BLOCK,
        mask_mod=_pattern(selection, mechanism.attention_mask(), rows, group, device),
        seq_lengths=(len(rows), len(rows)),
    )


def _pattern(
    selection: BlockSelection, attention_mask: AttentionMask, rows: Rows, group: int, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return the function of a query and a key that masks partial blocks."""
    table, position, document = selection.table().to(device), rows.position.to(device), rows.document.to(device)
    query_block, key_block = _pattern_blocks(selection, rows, device)

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        unmasked = attention_mask.mask_mod(position[query], document[query], position[key], document[key])
        return unmasked & table[head // group, query_block[query], key_block[key]]

    return mask_mod


def _pattern_blocks(selection: BlockSelection, rows: Rows, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the query block and the key block of each token in the selection's table."""
    return (
        (selection.query_block % (selection.num_query_blocks + 1)).to(device),
        (selection.blocks.of(rows) % (selection.blocks.count + 1)).to(device),
    )


def _blocks(selection: BlockSelection, rows: Rows, causal: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the partial and the full blocks of FlexAttention, bool `[Hk, blocks, blocks]` each.

    Its blocks are BLOCK tokens of the sequence, the pattern's are of a document: they need not coincide.
    """
    table, (query_block, key_block) = selection.table().to(device), _pattern_blocks(selection, rows, device)
    queries, keys = _members(query_block, table.shape[1]), _members(key_block, table.shape[2])
    # [blocks, query blocks] @ [query blocks, key blocks] @ [key blocks, blocks] -> [Hk, blocks, blocks]
    pairs = torch.stack([queries @ of_head.float() @ keys.T for of_head in table])
    # The pattern stays inside documents, so the mask adds causal order only.
    earliest, latest = _ends(rows.ordinal().to(device))
    active, full = pairs > 0, pairs == BLOCK * BLOCK
    if causal:
        active, full = active & (earliest <= latest[:, None]), full & (latest <= earliest[:, None])
    return active & ~full, full


def _members(index: Tensor, count: int) -> Tensor:
    """Return how many tokens of each block of FlexAttention each of `count` blocks has, float32 `[blocks, count]`."""
    number, one = _numbers(index), torch.ones((), device=index.device)
    members = torch.zeros(int(number[-1]) + 1, count, device=index.device)
    return members.index_put_((number, index), one, accumulate=True)


def _ends(ordinal: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least and the greatest ordinal in each block of FlexAttention; padding, below 0, is neither."""
    number = _numbers(ordinal)
    none = ordinal.new_full((int(number[-1]) + 1,), -1)
    greatest = none.scatter_reduce(0, number, ordinal, "amax")
    least = greatest.scatter_reduce(0, number, ordinal.where(ordinal >= 0, greatest[number]), "amin")
    return least, greatest


def _numbers(rows: Tensor) -> Tensor:
    """Return the block of FlexAttention of each token."""
    return torch.arange(len(rows), device=rows.device) // BLOCK


def _lists(blocks: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Return counts and indices of blocks, the set ones first, int32 `[1, Hq, blocks, ..]`, from bool `[Hk, ...]`."""
    order = (~blocks).to(torch.uint8).argsort(dim=2, stable=True).int()
    count = blocks.sum(dim=2).int()
    return count.repeat_interleave(group, dim=0).unsqueeze(0), order.repeat_interleave(group, dim=0).unsqueeze(0)


@cache
def _compiled() -> Callable[..., Tensor]:
    """Compile FlexAttention at the first call: the compiler takes seconds to import."""
    return torch.compile(flex_attention, dynamic=False)  # pyright: ignore[reportReturnType]


def _flex(q: Tensor, k: Tensor, v: Tensor, *, mask: BlockMask) -> Tensor:
    # [T, H, D] -> [1, H, T, D]
    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return _compiled()(query, key, value, block_mask=mask, enable_gqa=True).squeeze(0).transpose(0, 1)
