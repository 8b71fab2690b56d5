"""From a resolved configuration to the parts of a run: model and batches."""

import torch

from farspan.kernels.mechanism import Heads
from farspan.parallel.comm import Traffic
from farspan.parallel.fsdp import shard_parameters
from farspan.parallel.mesh import Mesh
from farspan.parallel.strategy import STRATEGIES
from farspan.trainer.batch import BatchBuilder
from farspan.trainer.config import Config
from farspan.trainer.model.init import initialize
from farspan.trainer.model.transformer import Transformer


def build_model(config: Config, mesh: Mesh, device: torch.device) -> Transformer:
    """Return the model sharded over the mesh, only this rank's shards in memory, initialised."""
    model = build_on_meta(config, mesh)
    model.to_empty(device=device)
    initialize(model, config.model, config.run.seed)
    return model


def build_on_meta(config: Config, mesh: Mesh) -> Transformer:
    """Return the model sharded over the mesh, without memory for its parameters."""
    compute_dtype = config.train.torch_dtype
    with torch.device("meta"):
        mechanism, recompute = config.attention.build_mechanism(), config.train.recompute == "block"
        model = Transformer(config.model, mechanism, recompute=recompute)
    if compute_dtype == torch.float64:
        model = model.double()
    shard_parameters(model, model.blocks, mesh, compute_dtype)
    return model


def build_batches(config: Config, mesh: Mesh, device: torch.device, traffic: Traffic) -> BatchBuilder:
    """Return what turns sequences into this rank's micro-batches."""
    return BatchBuilder(
        strategy=STRATEGIES.get(config.parallel.strategy)(
            mesh.context_channel(traffic), rounded_gradients=config.parallel.rounded_gradients
        ),
        mechanism=config.attention.build_mechanism(),
        heads=Heads(query=config.model.heads, kv=config.model.kv_heads),
        layout=config.parallel.layout,
        backend=config.attention.backend,
        device=device,
        key_convolution=config.model.key_convolution,
    )
