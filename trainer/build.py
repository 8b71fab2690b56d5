"""From a resolved configuration to the model and the batch builder of a run."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from farspan.kernels.backend import KernelRequest, choose_backend
from farspan.parallel.comm import Channel, Traffic
from farspan.parallel.context_parallel.cost_model import strategy_for
from farspan.parallel.context_parallel.strategy import STRATEGIES, Strategy
from farspan.parallel.fsdp import shard_experts, shard_parameters
from farspan.parallel.mesh import Degrees, Mesh, ParallelConfig
from farspan.trainer.batch import BatchBuilder, LayerAttention
from farspan.trainer.config import Config
from farspan.trainer.model.experts import Experts
from farspan.trainer.model.init import initialize
from farspan.trainer.model.transformer import Transformer


def build_model(config: Config, mesh: Mesh, device: torch.device) -> Transformer:
    """Return the model sharded over the mesh, only this rank's shards in memory, initialized."""
    model = build_on_meta(config, mesh)
    model.to_empty(device=device)
    initialize(model, config.model, config.run.seed)
    return model


def build_on_meta(config: Config, mesh: Mesh) -> Transformer:
    """Return the model sharded over the mesh, without memory for its parameters."""
    with torch.device("meta"):
        model = unsharded(config)
    _shard(model, mesh, config.train.torch_dtype)
    return model


def parameters_held(config: Config, mesh: Mesh) -> int:
    """Return how many parameters this rank has."""
    with torch.device("meta"):
        model = unsharded(config)
    if config.train.engine == "deepspeed":
        ranks = mesh.degrees.shard if config.deepspeed.zero_stage == 3 else 1
        return sum(-(-parameter.numel() // ranks) for parameter in model.parameters())
    # Sharding a block takes a while: only the first block of each shape is sharded.
    by_shape: dict[tuple[object, ...], list[nn.Module]] = {}
    for block in model.blocks:
        by_shape.setdefault(tuple((name, p.shape) for name, p in block.named_parameters()), []).append(block)
    model.blocks = nn.ModuleList(blocks[0] for blocks in by_shape.values())
    _shard(model, mesh, config.train.torch_dtype)
    others = zip(model.blocks, by_shape.values(), strict=True)
    return _num_local(model) + sum((len(blocks) - 1) * _num_local(block) for block, blocks in others)


def unsharded(config: Config) -> Transformer:
    """Return the full model on torch's default device, not yet initialized."""
    model = Transformer(
        config.model, config.mechanisms(), recompute=config.train.recompute == "block", compiled=config.train.compile
    )
    return model.double() if config.train.torch_dtype == torch.float64 else model


def _shard(model: Transformer, mesh: Mesh, compute_dtype: torch.dtype) -> None:
    shard_experts([module for module in model.modules() if isinstance(module, Experts)], mesh, compute_dtype)
    shard_parameters(model, model.blocks, mesh, compute_dtype)


def _num_local(module: nn.Module) -> int:
    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in module.parameters())


def build_batches(config: Config, mesh: Mesh, device: torch.device, traffic: Traffic) -> BatchBuilder:
    channel, parallel = mesh.context_channel(traffic), config.parallel
    names = strategies_of_layers(config, mesh.degrees)
    strategies = build_strategies(names, channel, parallel)
    layers = zip(config.mechanisms(), names, backends_of_layers(config, device), strict=True)
    return BatchBuilder(
        model=config.model,
        layers=tuple(
            LayerAttention(mechanism=mechanism, strategy=strategies[strategy], backend=backend)
            for mechanism, strategy, backend in layers
        ),
        layout=parallel.layout,
        device=device,
        dtype=config.train.torch_dtype,
        seed=config.run.seed,
        expert_channel=Channel(mesh.expert, traffic) if any(config.model.expert_layers) else None,
    )


def build_strategies(names: Sequence[str], channel: Channel, parallel: ParallelConfig) -> dict[str, Strategy]:
    """Return one strategy for each name, shared by its layers."""
    return {
        name: STRATEGIES.get(name)(channel, grad_comm_dtype=parallel.grad_comm_dtype) for name in dict.fromkeys(names)
    }


def strategies_of_layers(config: Config, degrees: Degrees) -> list[str]:
    """Return the strategy of each layer: the configured one or, for recurrences that it does not support, their own."""
    name, inner = config.parallel.strategy, config.parallel.context_inner
    return [strategy_for(name, m, config.model.heads_of(m), degrees.context, inner) for m in config.mechanisms()]


def backends_of_layers(config: Config, device: torch.device) -> list[str]:
    """Return the backend of each layer; raises ConfigError where one cannot compute its mechanism on the device."""
    return [choose_backend(config.attention.backend, device, request) for request in kernel_requests(config)]


def kernel_requests(config: Config) -> list[KernelRequest]:
    """Return what each layer asks of its backend."""
    head_dim, dtype = config.model.head_dim, config.train.torch_dtype
    return [KernelRequest.of(mechanism, dtype, head_dim, head_dim) for mechanism in config.mechanisms()]
