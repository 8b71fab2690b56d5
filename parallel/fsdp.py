"""FSDP2: parameters, gradients and optimizer state sharded over dp_shard x context."""

import math
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.utils import get_total_norm

from farspan.errors import ConfigError
from farspan.kernels.merge import accumulation_dtype
from farspan.parallel.mesh import Mesh


def shard_parameters(model: nn.Module, blocks: Iterable[nn.Module], mesh: Mesh, compute_dtype: torch.dtype) -> None:
    """Shard each block, then the rest of the model; a block is gathered while the one before it computes.

    Gradients are summed over all ranks in float32 (float64 for float64), not averaged: whatever a rank adds to its
    gradient counts the same on any number of ranks. Inputs are not cast: rotary tables stay float32.
    """
    blocks = list(blocks)
    for module in (*blocks, model):
        _sum_gradients(fully_shard(module, mesh=mesh.fsdp, mp_policy=_policy(compute_dtype)))
    _gather_ahead(model, blocks)


def _gather_ahead(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Gather each block and its experts when the block before it begins, forward and backward; of the block that is
    last, and so first backward, the experts come when they are called.

    By itself FSDP gathers a block forward when the host gets to it, too late where the host waits for the device inside
    a block, and experts only once they are called.
    """
    # Each block first, then its experts.
    sharded: list[list[FSDPModule]] = [[m for m in block.modules() if isinstance(m, FSDPModule)] for block in blocks]
    assert isinstance(model, FSDPModule)
    # The model's own parameters are used before the first block and after the last. Backward, FSDP gathers the last
    # block with them, once. What is named here is gathered anew for each output that has a gradient, also when the
    # backward pass of what is named is over: a block may name those before it, not its own experts.
    model.set_modules_to_forward_prefetch(sharded[0])
    for earlier, later in pairwise([[], *sharded]):
        block, *experts = later
        if earlier:
            earlier[0].set_modules_to_forward_prefetch(later)
        block.set_modules_to_backward_prefetch(earlier or [block])
        # Left alone, experts gather what ran before them, which may be over: their own block is there already.
        for module in experts:
            module.set_modules_to_backward_prefetch([block])


def shard_experts(layers: Iterable[nn.Module], mesh: Mesh, compute_dtype: torch.dtype) -> None:
    """Split the experts of each layer, the first dimension of its parameters; shard the second over their replicas.

    The layers are on the meta device; parameters are DTensors of all experts afterwards. Gradients are sums over all
    tokens of all ranks, as for any parameter. Call it before `shard_parameters`. Raises ConfigError where the
    dimensions do not divide.
    """
    expert_ranks = mesh.degrees.expert
    shards = mesh.degrees.shard // expert_ranks
    for layer in layers:
        for module in layer.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.shape[0] % expert_ranks or parameter.shape[1] % shards:
                    raise ConfigError(
                        f"matrices of {parameter.shape[0]} experts with {parameter.shape[1]} rows cannot be split over "
                        f"parallel.expert={expert_ranks} ranks and sharded over the {shards} that hold the same "
                        "experts: change parallel.expert or the model's sizes."
                    )
                local = torch.empty(parameter.shape[0] // expert_ranks, *parameter.shape[1:], device="meta")
                split = DTensor.from_local(
                    local.to(parameter.dtype), mesh.experts["expert"], [Shard(0)], run_check=False
                )  # [E/P, out, in] -> [E, out, in]
                module.register_parameter(name, nn.Parameter(split))
        axes = mesh.experts[tuple(name for name in mesh.experts.mesh_dim_names or () if name != "expert")]
        policy = _policy(compute_dtype)
        _sum_gradients(fully_shard(layer, mesh=axes, mp_policy=policy, shard_placement_fn=lambda _: Shard(1)))


def _policy(compute_dtype: torch.dtype) -> MixedPrecisionPolicy:
    return MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=accumulation_dtype(compute_dtype), cast_forward_inputs=False
    )


def _sum_gradients(module: FSDPModule) -> None:
    """Make FSDP sum gradients instead of averaging them."""
    module.set_gradient_divide_factor(1.0)
    # Without this, FSDP applies the factor by PREMUL_SUM, which only NCCL has.
    module.set_force_sum_reduction_for_comms(True)


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients so that their norm over the model is at most `max_norm`; return the norm before.

    The norm counts every element of every shard once, whatever its mesh. Gradients of a norm that is not finite are
    left unchanged.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    unsharded = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    # All gradients together, in a few operations; the host waits for none of them.
    by_replicas: dict[int, list[Tensor]] = {}
    for gradient in gradients:
        if isinstance(gradient, DTensor):
            by_replicas.setdefault(_num_replicas(gradient), []).append(gradient.to_local())
    # Every rank adds its local part of an element that `_num_replicas` ranks hold.
    parts = [get_total_norm(of_some).square() / replicas for replicas, of_some in by_replicas.items()]
    total = torch.stack(parts or [torch.zeros(())]).sum()
    dist.all_reduce(total)
    norm = torch.stack([total, *([get_total_norm(unsharded).square()] if unsharded else [])]).sum().sqrt()
    if gradients:
        scale = torch.where(norm.isfinite(), (max_norm / (norm + 1e-6)).clamp(max=1.0), 1.0)
        torch._foreach_mul_([*chain(*by_replicas.values()), *unsharded], scale)  # pyright: ignore[reportPrivateImportUsage]
    return norm


def _num_replicas(gradient: DTensor) -> int:
    """Return how many ranks hold each element; meshes contain all ranks."""
    sizes = zip(gradient.device_mesh.shape, gradient.placements, strict=True)
    return math.prod(size for size, placement in sizes if placement.is_replicate())


def sharding_bytes(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: Mesh,
    compute_dtype: torch.dtype,
    *,
    micro_batches: int,
    passes_ahead: int = 0,
) -> int:
    """Return the bytes that a rank sends for the forward and backward passes of some micro-batches.

    S shards of N bytes in all: an all-gather and a reduce-scatter send (S-1)/S N each, an all-reduce over R replicas
    2 (R-1)/R of a shard. Experts are sharded over the ranks that hold the same ones only. passes_ahead: forward passes
    without gradients before the first micro-batch.
    """
    replicas, reduce_itemsize = mesh.degrees.dp_replicate, accumulation_dtype(compute_dtype).itemsize

    def sent(parameters: list[nn.Parameter], gathers: int) -> int:
        total = 0
        for p in parameters:
            expert_ranks = mesh.degrees.expert if _is_of_experts(p) else 1
            shards, rows = mesh.degrees.shard // expert_ranks, p.shape[1] if _is_of_experts(p) else p.shape[0]
            # FSDP pads rows until they divide by the shards.
            padded = p.numel() // expert_ranks // rows * (-(-rows // shards) * shards)
            element_bytes = gathers * compute_dtype.itemsize + micro_batches * reduce_itemsize
            total += element_bytes * padded * (shards - 1) // shards
            total += micro_batches * (2 * padded * reduce_itemsize * (replicas - 1) // (replicas * shards))
        return total

    # Blocks are gathered once per pass. The rest of the model stays gathered until a backward pass.
    in_blocks = {p for block in blocks for p in block.parameters()}
    others = [p for p in model.parameters() if p not in in_blocks]
    return sent(list(in_blocks), 2 * micro_batches + passes_ahead) + sent(others, micro_batches)


def _is_of_experts(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, DTensor) and "expert" in (parameter.device_mesh.mesh_dim_names or ())
