"""FSDP2: parameters, gradients and optimizer state sharded over the ranks of a data- and context-parallel group."""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from farspan.errors import ConfigError
from farspan.kernels.merge import accumulation_dtype
from farspan.parallel.mesh import Mesh


def shard_parameters(model: nn.Module, units: Iterable[nn.Module], mesh: Mesh, compute_dtype: torch.dtype) -> None:
    """Shard each unit, then what is left of the model; each unit is gathered for its own forward and backward pass.

    Gradients are summed over all ranks in float32 (float64 for float64), not averaged: what a part adds to its gradient
    by itself counts the same on any number of ranks. Inputs are not cast: rotary tables stay float32.
    """
    for part in (*units, model):
        _summing(fully_shard(part, mesh=mesh.fsdp, mp_policy=_policy(compute_dtype)))


def shard_experts(units: Iterable[nn.Module], mesh: Mesh, compute_dtype: torch.dtype) -> None:
    """Deal the experts of each unit, the first dimension of its parameters, and shard the second over their replicas.

    The units are on the meta device; parameters are DTensors of all experts afterwards. Gradients are sums over all
    tokens of all ranks, as those of any parameter. Call it before `shard_parameters`. Raises ConfigError where the
    dimensions do not divide.
    """
    dealers, shards = mesh.degrees.expert, mesh.degrees.shard // mesh.degrees.expert
    for unit in units:
        for module in unit.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.shape[0] % dealers or parameter.shape[1] % shards:
                    raise ConfigError(
                        f"matrices of {parameter.shape[0]} experts with {parameter.shape[1]} rows cannot be dealt to "
                        f"parallel.expert={dealers} ranks and sharded over the {shards} that hold the same experts: "
                        "change parallel.expert or the model's sizes."
                    )
                mine = torch.empty(parameter.shape[0] // dealers, *parameter.shape[1:], device="meta")
                dealt = DTensor.from_local(
                    mine.to(parameter.dtype), mesh.experts["expert"], [Shard(0)], run_check=False
                )
                module.register_parameter(name, nn.Parameter(dealt))
        axes = mesh.experts[tuple(name for name in mesh.experts.mesh_dim_names or () if name != "expert")]
        _summing(fully_shard(unit, mesh=axes, mp_policy=_policy(compute_dtype), shard_placement_fn=lambda _: Shard(1)))


def _policy(compute_dtype: torch.dtype) -> MixedPrecisionPolicy:
    return MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=accumulation_dtype(compute_dtype), cast_forward_inputs=False
    )


def _summing(sharded: FSDPModule) -> None:
    """Let gradients be summed, not averaged."""
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
    dealt = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    total = torch.stack([g.to_local().norm().square() / _holders(g) for g in dealt] or [torch.zeros(())]).sum()
    dist.all_reduce(total)
    whole = [g.norm().square() for g in gradients if not isinstance(g, DTensor)]
    norm = torch.stack([total, *whole]).sum().sqrt()
    if torch.isfinite(norm):
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            (gradient.to_local() if isinstance(gradient, DTensor) else gradient).mul_(scale)
    return norm


def _holders(gradient: DTensor) -> int:
    """Return how many ranks hold each element; meshes are of all ranks."""
    sizes = zip(gradient.device_mesh.shape, gradient.placements, strict=True)
    return math.prod(size for size, placement in sizes if placement.is_replicate())


def sharding_bytes(model: nn.Module, units: Iterable[nn.Module], mesh: Mesh, compute_dtype: torch.dtype) -> int:
    """Return the bytes that a rank sends for one micro-batch's forward and backward pass.

    With S shards of N bytes in all, an all-gather and a reduce-scatter send (S-1)/S N each, and an all-reduce over R
    replicas 2 (R-1)/R of a shard. Units are gathered for each pass, what is left of the model once for both. Rows of
    a parameter are padded until they divide by S. Of experts, S is the number of ranks that hold the same ones.
    """
    replicas, reduce_itemsize = mesh.degrees.dp_replicate, accumulation_dtype(compute_dtype).itemsize

    def sent(parameters: list[nn.Parameter], gathers: int) -> int:
        total = 0
        for p in parameters:
            dealers = mesh.degrees.expert if _is_of_experts(p) else 1
            shards, rows = mesh.degrees.shard // dealers, p.shape[1] if _is_of_experts(p) else p.shape[0]
            padded = p.numel() // dealers // rows * (-(-rows // shards) * shards)
            total += (gathers * compute_dtype.itemsize + reduce_itemsize) * padded * (shards - 1) // shards
            total += 2 * padded * reduce_itemsize * (replicas - 1) // (replicas * shards)
        return total

    in_units = {p for unit in units for p in unit.parameters()}
    return sent(list(in_units), 2) + sent([p for p in model.parameters() if p not in in_units], 1)


def _is_of_experts(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, DTensor) and "expert" in (parameter.device_mesh.mesh_dim_names or ())
