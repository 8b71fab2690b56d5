"""FSDP2: parameters, gradients and optimizer state sharded over the ranks of a data- and context-parallel group."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from farspan.kernels.merge import accumulation_dtype
from farspan.parallel.mesh import Mesh


def shard_parameters(model: nn.Module, units: Iterable[nn.Module], mesh: Mesh, compute_dtype: torch.dtype) -> None:
    """Shard each unit, then what is left of the model; each unit is gathered for its own forward and backward pass.

    Gradients are summed over all ranks in float32 (float64 for float64), not averaged: what a part adds to its gradient
    by itself counts the same on any number of ranks. Inputs are not cast: rotary tables stay float32.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=accumulation_dtype(compute_dtype), cast_forward_inputs=False
    )
    for part in (*units, model):
        sharded = fully_shard(part, mesh=mesh.fsdp, mp_policy=policy)
        sharded.set_gradient_divide_factor(1.0)
        # Without this, a factor is applied by an operation that only NCCL has.
        sharded.set_force_sum_reduction_for_comms(True)


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients so that their norm over the whole model is at most `max_norm`; return the norm before.

    The norm counts every element of every shard once, whatever mesh it is sharded over. A norm that is not finite
    leaves the gradients as they are.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    by_mesh: dict[object, list[Tensor]] = {}
    for gradient in gradients:
        by_mesh.setdefault(gradient.device_mesh if isinstance(gradient, DTensor) else None, []).append(gradient)
    squares = [_full(nn.utils.get_total_norm(group)).square() for group in by_mesh.values()]
    norm = torch.stack(squares).sum().sqrt()
    if torch.isfinite(norm):
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            (gradient.to_local() if isinstance(gradient, DTensor) else gradient).mul_(scale)
    return norm


def _full(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def sharding_bytes(model: nn.Module, units: Iterable[nn.Module], mesh: Mesh, compute_dtype: torch.dtype) -> int:
    """Return the bytes that a rank sends for one micro-batch's forward and backward pass.

    With S shards of N bytes in all, an all-gather and a reduce-scatter send (S-1)/S N each, and an all-reduce over R
    replicas 2 (R-1)/R of a shard. Units are gathered for each pass, what is left of the model once for both. Rows of
    a parameter are padded until they divide by S.
    """
    shards, replicas = mesh.degrees.shard, mesh.degrees.dp_replicate

    def padded(part: nn.Module) -> int:
        return sum(-(-p.shape[0] // shards) * shards * p.shape[1:].numel() for p in part.parameters())

    in_units, total = sum(padded(unit) for unit in units), padded(model)
    gathered = (total + in_units) * compute_dtype.itemsize * (shards - 1) // shards
    reduce_itemsize = accumulation_dtype(compute_dtype).itemsize
    scattered = total * reduce_itemsize * (shards - 1) // shards
    replicated = 2 * total * reduce_itemsize * (replicas - 1) // (replicas * shards)
    return gathered + scattered + replicated
