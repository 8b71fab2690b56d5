"""What follows from a configuration and a number of ranks, in words: printed at every start and by a dry run."""

from dataclasses import dataclass

import torch

from farspan.kernels.backend import choose_backend
from farspan.kernels.cross_entropy import DEFAULT_CHUNK_BYTES
from farspan.kernels.merge import accumulation_dtype
from farspan.parallel.mesh import Degrees
from farspan.parallel.strategy import STRATEGIES, AttentionShape, Heads
from farspan.trainer.config import Config
from farspan.trainer.flops import total_parameters, training_flops

GIB = 2**30


def describe(config: Config, degrees: Degrees, device: torch.device) -> str:
    """Return everything that is derived; raises ConfigError for a backend that cannot run on `device`."""
    model, tokens = config.model, config.data.sequence_tokens
    sequences = config.train.sequences_per_step
    num_ranks = degrees.data * degrees.context
    memory = estimate_memory(config, degrees)
    pairs = tokens * (tokens + 1) // 2
    per_token = training_flops(model, tokens, pairs) / tokens
    volume = STRATEGIES.get(config.parallel.strategy).volume(attention_shape(config, degrees), degrees.context)
    sent = model.layers * (volume.forward + volume.backward)
    backend = config.attention.backend
    chosen = choose_backend(backend, device)
    because = f" (the fastest on {device.type})" if backend == "auto" else ""
    return "\n".join(
        f"{name:<12} {text}"
        for name, text in (
            ("ranks", f"{num_ranks} = dp_replicate {degrees.dp_replicate} × dp_shard {degrees.dp_shard} × context {degrees.context}"),
            ("step", f"{sequences * tokens:,} tokens = {sequences} sequences of {tokens:,}; "
                     f"{sequences // degrees.data} accumulated per rank, {tokens // degrees.context:,} tokens each"),
            ("model", f"{total_parameters(model):,} parameters; {model.layers} layers, width {model.width}, "
                      f"{model.heads}:{model.kv_heads} heads of {model.head_dim}, vocabulary {model.vocabulary_size:,}"),
            ("compute", f"{per_token / 1e9:.3g} GFLOP per token, a document filling the sequence; "
                        f"{config.train.compute_dtype} on {device.type}"),
            ("attention", f"{config.attention.build_mechanism()} by {chosen}{because}"),
            ("context", f"{config.parallel.strategy}, {config.parallel.layout}; each rank sends {sent / 2**20:,.1f} MiB per sequence"),
            ("memory", f"{memory.total / GIB:.2f} GiB per rank (estimate): {memory}"),
        )
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Estimated bytes on one rank."""

    states: int
    gathered: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        return self.states + self.gathered + self.activations + self.loss

    def __str__(self) -> str:
        parts = (
            ("parameters, gradients, optimizer", self.states),
            ("gathered parameters", self.gathered),
            ("activations", self.activations),
            ("loss", self.loss),
        )
        return ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts)


def estimate_memory(config: Config, degrees: Degrees) -> Memory:
    """Return what one rank holds at the peak of a step, without what torch itself and the allocator take."""
    model = config.model
    compute = getattr(torch, config.train.compute_dtype)
    master = accumulation_dtype(compute).itemsize
    parameters = total_parameters(model)
    outside_blocks = model.width * model.vocabulary_size * (1 if model.tied_embeddings else 2)
    block = (parameters - outside_blocks) // model.layers
    tokens = config.data.sequence_tokens // degrees.context
    query, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    # Residual stream and norm outputs twice, q, k, v and attention's out, and four tensors inside SwiGLU.
    kept = 4 * model.width + 2 * query + 2 * kv + 4 * model.feed_forward
    layers_kept, each = (1, model.layers * model.width) if config.train.recompute == "block" else (model.layers, 0)
    return Memory(
        # A parameter, its gradient and two moments of AdamW.
        states=4 * master * parameters // degrees.shard,
        # What is outside the blocks stays gathered; of the blocks this one and the next, and one gradient.
        gathered=(outside_blocks + 2 * block) * compute.itemsize + (outside_blocks + block) * compute.itemsize,
        activations=tokens * (layers_kept * kept + each) * compute.itemsize,
        loss=2 * DEFAULT_CHUNK_BYTES + outside_blocks * master,
    )


def attention_shape(config: Config, degrees: Degrees) -> AttentionShape:
    """Return the shape of one rank's attention inputs in one layer."""
    compute = getattr(torch, config.train.compute_dtype)
    return AttentionShape(
        tokens_local=-(-config.data.sequence_tokens // degrees.context),
        heads=Heads(query=config.model.heads, kv=config.model.kv_heads),
        head_dim=config.model.head_dim,
        value_dim=config.model.head_dim,
        element_bytes=compute.itemsize,
        accumulation_bytes=accumulation_dtype(compute).itemsize,
    )
