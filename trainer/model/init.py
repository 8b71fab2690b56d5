"""Initial parameters: the same numbers whatever the mesh, since each is a function of (seed, name, row) alone.

embedding                       normal, std 1: the residual stream starts at the scale that norms keep
head, and a tied embedding      normal, std 0.02: predictions start near uniform
query, key, value, router       normal, std 1 / sqrt(fan in); up and gates too
out, down                       normal, std 1 / sqrt(fan in) / sqrt(2 layers): the residual stream keeps its scale
norms                           1
biases                          0
key_convolution                 0: keys start as they are projected
"""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from farspan.trainer.model.config import ModelConfig

HEAD_STD = 0.02
BLOCK_ROWS = 1024
"""Rows that share a random stream; a rank draws only the streams that its shard touches."""


@torch.no_grad()
def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter and buffer of a materialized model, sharded over its first dimensions or not at all."""
    for buffer in model.buffers():
        buffer.zero_()
    for name, parameter in model.named_parameters():
        draw(parameter, name, config, seed)


@torch.no_grad()
def draw(parameter: Tensor, name: str, config: ModelConfig, seed: int) -> None:
    """Fill one parameter, or a tensor in its place, sharded over its first dimensions or not at all."""
    local, first = _local_part(parameter)
    if parameter.dim() == 1 or name.endswith("key_convolution.weight"):
        local.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        return
    std = _std(name, parameter, config)
    # The matrices of experts are drawn as one matrix: [E, out, in] -> [E * out, in].
    stacked = torch.Size((parameter.shape[:-1].numel(), parameter.shape[-1]))
    for number, matrix in enumerate(local if local.dim() == 3 else [local]):
        first_row = (first[0] + number) * parameter.shape[1] + first[1] if local.dim() == 3 else first[0]
        for start, rows in _normal_rows(f"{seed}/{name}", stacked, first_row, matrix.shape[0]):
            matrix[start : start + len(rows)] = (rows * std).to(matrix)


def _std(name: str, parameter: Tensor, config: ModelConfig) -> float:
    layer = name.split(".")[-2]
    if layer == "embedding" and not config.tied_embeddings:
        return 1.0
    if layer in ("embedding", "head"):
        return HEAD_STD
    depth = (2 * config.layers) ** -0.5 if layer in ("out", "down") else 1.0
    # A token uses the heads of some attention experts, with weights that add up to 1: the fan-in is that of one expert.
    fan_in = config.heads * config.head_dim if layer == "out" else parameter.shape[-1]
    return fan_in**-0.5 * depth


def _local_part(parameter: Tensor) -> tuple[Tensor, list[int]]:
    """Return the local part of a parameter and its offset in the full one, in each dimension."""
    first = [0] * parameter.dim()
    if not isinstance(parameter, DTensor):
        return parameter, first
    for axis, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            assert placement.dim < max(parameter.dim() - 1, 1), f"initialization draws full rows, not {placement}"
            # DTensor shards as torch.chunk does: equal chunks, the last ones shorter or empty.
            chunk = -(-parameter.shape[placement.dim] // parameter.device_mesh.size(axis))
            first[placement.dim] = parameter.device_mesh.get_local_rank(axis) * chunk
    return parameter.to_local(), first


def _normal_rows(stream: str, shape: torch.Size, first_row: int, num_rows: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (start in the shard, standard normal rows) that fill rows [first_row, first_row + num_rows) of `shape`."""
    row, stop = first_row, first_row + num_rows
    while row < stop:
        block = row // BLOCK_ROWS
        block_start, block_stop = block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, shape[0])
        digest = hashlib.sha256(f"{stream}/{block}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
        # Always draw the full block: the first numbers of randn depend on how many are drawn.
        rows = torch.randn(block_stop - block_start, *shape[1:], generator=generator)
        until = min(block_stop, stop)
        yield row - first_row, rows[row - block_start : until - block_start]
        row = until
