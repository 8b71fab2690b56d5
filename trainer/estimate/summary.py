"""What follows from a configuration and a number of ranks, in words: printed at every start and by a dry run."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch

from farspan.kernels.backend import BACKENDS
from farspan.kernels.layers.cross_entropy import chunk_tokens
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Mechanism, TokenChoice
from farspan.kernels.merge import accumulation_dtype
from farspan.parallel.comm import Unconnected
from farspan.parallel.context_parallel.cost_model import SAMPLED
from farspan.parallel.context_parallel.halo import mean_rows_sent
from farspan.parallel.context_parallel.routing import typical_choice
from farspan.parallel.context_parallel.strategy import Sizes
from farspan.parallel.layout import Shards
from farspan.parallel.mesh import Degrees
from farspan.trainer.batch import work_of_layers
from farspan.trainer.build import backends_of_layers, build_strategies, strategies_of_layers
from farspan.trainer.config import Config
from farspan.trainer.model.flops import attention_flops, matrix_parameters, total_parameters, training_flops

GIB = 2**30


def describe(config: Config, degrees: Degrees) -> str:
    """Return everything that follows from a resolved configuration."""
    model, parallel, tokens = config.model, config.parallel, config.data.sequence_tokens
    sequences = config.train.sequences_per_step
    one_document = Rows.packed([tokens])
    mechanisms = config.mechanisms()
    flops = training_flops(model, mechanisms, tokens, attention_flops(model, mechanisms, one_document)) / tokens
    sent = attention_bytes(config, degrees) + convolution_bytes(config, degrees)
    memory = estimate_memory(config, degrees)
    strategies = dict.fromkeys(strategies_of_layers(config, degrees))
    lines = {
        "ranks": f"{degrees.data * degrees.context} = dp_replicate {degrees.dp_replicate} x dp_shard "
        f"{degrees.dp_shard} x context {degrees.context}",
        "step": f"{sequences * tokens:,} tokens = {sequences} x {tokens:,}; each rank holds "
        f"{tokens_local(config, degrees):,} at a time and accumulates {sequences // degrees.data}",
        "model": f"{total_parameters(model, mechanisms):,} parameters; {model.layers} layers, width {model.width}, "
        f"{model.heads}:{model.kv_heads} heads of {model.head_dim}, vocabulary {model.vocabulary_size:,}",
        **_experts(config, degrees),
        **_head_mixture(config),
        "compute": f"{flops / 1e9:.3g} GFLOP per token, a document filling the sequence; "
        f"{config.train.compute_dtype} on {config.train.device}",
        "attention": f"{_in_short(mechanisms)}{_convolved(model.key_convolution)}"
        f"{', recurrences gated' if model.recurrent_layer == 'gated' else ''}, computed by {_backends(config)}",
        "context": f"{' and '.join(strategies)}, {parallel.layout}; each rank sends {sent / 2**20:,.1f} MiB per "
        "sequence",
        "memory": f"{memory.total / GIB:.2f} GiB per rank (estimate): {memory}",
    }
    return "\n".join(f"{name:<12}{text}" for name, text in lines.items())


def _experts(config: Config, degrees: Degrees) -> dict[str, str]:
    """Return the line about experts, of a model that has them."""
    experts, layers = config.model.experts, sum(config.model.expert_layers)
    if not layers:
        return {}
    active = matrix_parameters(config.model, config.mechanisms())
    return {
        "experts": f"{experts.per_token} of {experts.count} of size {experts.feed_forward}"
        f"{f', {experts.shared} shared,' if experts.shared else ''} in {layers} layers, dealt to {degrees.expert} "
        f"ranks; {active:,} parameters multiply a token"
    }


def _head_mixture(config: Config) -> dict[str, str]:
    """Return the line about heads that tokens choose, of a model that has them."""
    model, mixture = config.model, config.model.head_mixture
    mixing = [mechanism for mechanism in config.mechanisms() if model.mixes_heads(mechanism)]
    if not mixing:
        return {}
    attended, projected = model.heads_of(mixing[0]), model.projected_heads_of(mixing[0])
    experts = f"{mixture.per_token} of {mixture.count} experts of {model.heads}, " if mixture.kind == "experts" else ""
    return {
        "heads": f"{experts}{attended.query} of {projected.query} query heads for each token, {projected.kv} KV heads, "
        f"in {len(mixing)} layers"
    }


def format_layers(mechanisms: Sequence[Mechanism]) -> str:
    """Return the mechanisms of the layers in words, layers in a row together."""
    runs = [(mechanism, len(list(run))) for mechanism, run in groupby(mechanisms)]
    if len(runs) == 1:
        return str(mechanisms[0])
    return ", ".join(f"{count} x {mechanism}" if count > 1 else str(mechanism) for mechanism, count in runs)


def _in_short(mechanisms: Sequence[Mechanism]) -> str:
    """Return the same with the names alone of mechanisms that differ in their layer only."""
    runs = [(kind, list(run)) for kind, run in groupby(mechanisms, type)]
    names = [(str(run[0]) if len(set(run)) == 1 else kind.__name__, len(run)) for kind, run in runs]
    if len(names) == 1:
        return names[0][0]
    return ", ".join(f"{count} x {name}" if count > 1 else name for name, count in names)


def _convolved(width: int) -> str:
    return f" of keys convolved over {width}" if width else ""


def _backends(config: Config) -> str:
    """Return what computes attention; layers choose their own where they need different ones."""
    backend = config.attention.backend
    names = backends_of_layers(config, torch.device(config.train.device)) if backend == "auto" else [backend]
    return " and ".join(f"{_with_libraries(name)}{_warning(name)}" for name in dict.fromkeys(names))


def _with_libraries(backend: str) -> str:
    libraries = BACKENDS.get(backend).calls()
    return f"{backend} ({libraries})" if libraries else backend


def _warning(backend: str) -> str:
    if backend != "reference":
        return ""
    return ": for checks only, as it holds all scores, which the memory below leaves out"


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Estimated bytes on one rank."""

    states: int
    gathered: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        return self.states + self.gathered + self.activations + self.working

    def __str__(self) -> str:
        parts = {
            "parameters, gradients, optimizer": self.states,
            "gathered": self.gathered,
            "activations": self.activations,
            "working": self.working,
        }
        return ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())


def estimate_memory(config: Config, degrees: Degrees) -> Memory:
    """Return what one rank holds at the peak of a step: tensors, not what torch and its allocator take besides.

    states: master parameters, gradients and AdamW's two moments, sharded.
    gathered: whole parameters outside the blocks and of two blocks (one computed on, the next on its way), of experts
    this rank's; gradients of the head and of one block, and the latter's copy in the dtype of the reduction.
    activations: see `block_activations`; with recompute the blocks' inputs instead, and one block's activations.
    working: the larger of two things that are not held together. Loss: a chunk of logits, the hidden states' gradient
    and, for a 16-bit head, its float32 gradient. Backward of a block: gradients inside SwiGLU (three of the inner
    size, one of the width) or of attention (out, q, k, v, accumulated).
    """
    model, compute = config.model, config.train.torch_dtype
    item, master = compute.itemsize, accumulation_dtype(compute).itemsize
    parameters, head = total_parameters(model, config.mechanisms()), model.width * model.vocabulary_size
    outside = head * (1 if model.tied_embeddings else 2)
    experts = 3 * model.width * model.experts.count * model.experts.feed_forward if any(model.expert_layers) else 0
    # Of layers with and without experts the former, whose parameters are more.
    block = (parameters - outside - sum(model.expert_layers) * experts) // model.layers + experts // degrees.expert
    tokens, heads = tokens_local(config, degrees), [model.heads_of(mechanism) for mechanism in config.mechanisms()]
    query, kv = (max(numbers) * model.head_dim for numbers in zip(*((h.query, h.kv) for h in heads), strict=True))
    layers = zip(config.mechanisms(), model.expert_layers, strict=True)
    in_blocks = [block_activations(config, *layer, tokens=tokens) for layer in layers]
    inputs = tokens * model.width * item
    kept = model.layers * inputs + max(in_blocks) if config.train.recompute == "block" else sum(in_blocks)
    logits = min(chunk_tokens(model.vocabulary_size, compute), tokens) * model.vocabulary_size * master
    loss = logits + inputs + (head * master if item < master else 0)
    inner = max(model.feed_forward, model.experts.per_token * model.experts.feed_forward if experts else 0)
    swiglu = tokens * (3 * inner + model.width) * item
    attention = tokens * (2 * query * item + (query + 2 * kv) * master)
    return Memory(
        states=4 * master * parameters // degrees.shard,
        gathered=(outside + 2 * block + head + block) * item + block * master,
        # Outside the blocks: the last residual stream and its norm.
        activations=kept + 2 * inputs,
        working=max(loss, swiglu, attention),
    )


def block_activations(config: Config, mechanism: Mechanism, has_experts: bool, *, tokens: int) -> int:
    """Return the bytes that a block with this mechanism keeps for its backward pass, for `tokens` tokens of this rank.

    Per token: the residual stream before both norms and the norms' results; rotated q and k, v, out and a float32 lse;
    gate, silu(gate), up and their product; with qk_norm q and k before it. CPU norms keep the normalized input too.
    Where heads gather tokens: out of all tokens; q, k, v, out, lse and routing of the gathered ones. With a convolution
    on keys, what it reads. What a routed mechanism chose is left out. In a gated recurrence: q, k, v before and after
    SiLU, out, its norm, the gate, and the product of these two. With experts: the rows sent to them and those that came
    back, evenly chosen, scores of all experts, and the inside of the shared one. With heads that tokens choose, weighed
    out as well.
    """
    model, compute, gated = config.model, config.train.torch_dtype, config.model.is_gated(mechanism)
    heads, wide, norms = model.heads_of(mechanism), accumulation_dtype(compute), 1 if model.parallel_blocks else 2
    query, kv = heads.query * model.head_dim, heads.kv * model.head_dim
    normed = norms * model.width
    if gated or model.qk_norm:
        normed += query if gated else query + kv
    inside = 4 * model.feed_forward
    if has_experts:
        inside = 4 * model.experts.shared + 2 * model.experts.per_token * model.width
        inside += 3 * model.experts.count * wide.itemsize // compute.itemsize
    kept = norms * model.width + normed + inside
    kept += query if model.mixes_heads(mechanism) else 0
    if config.train.device == "cpu":
        kept += normed
    if model.key_convolution and not gated:
        kept += kv
    attention = (2 * query + 2 * kv) * compute.itemsize + heads.query * wide.itemsize
    if gated:
        attention = (2 * 3 + 3) * query * compute.itemsize
    if isinstance(mechanism, TokenChoice):
        length = config.data.sequence_tokens
        gathered = attention + heads.kv * wide.itemsize
        attention = query * compute.itemsize + gathered * len(mechanism.typical(Rows.packed([length]))) // length
    return tokens * (kept * compute.itemsize + attention)


def tokens_local(config: Config, degrees: Degrees) -> int:
    """Return how many tokens of a sequence a rank holds, padding included."""
    return -(-config.data.sequence_tokens // degrees.context)


def attention_bytes(config: Config, degrees: Degrees) -> int:
    """Return the bytes that the first rank sends in the attention of all layers, a document filling the sequence."""
    parallel, mechanisms, rows = config.parallel, config.mechanisms(), Rows.packed([config.data.sequence_tokens])
    shards = Shards.build(
        rows, layout=parallel.layout, degree=degrees.context, work=partial(work_of_layers, mechanisms)
    )
    channel = Unconnected(0, degrees.context, inner_size=parallel.context_inner)
    sizes = Sizes.of(config.train.torch_dtype, config.model.head_dim, config.model.head_dim)
    names = strategies_of_layers(config, degrees)
    strategies = build_strategies(names, channel, parallel)
    sent, layers = 0, Counter(zip(mechanisms, names, strict=True))
    for (mechanism, name), count in layers.items():
        strategy = strategies[name]
        heads = config.model.heads_of(mechanism)
        chosen = typical_choice(mechanism, rows, heads, most=SAMPLED) if strategy.moves_chosen(mechanism) else None
        volume = strategy.prepare(mechanism, shards, heads, backend="reference").volume(sizes, chosen)
        sent += count * (volume.forward + volume.backward)
    return sent


def convolution_bytes(config: Config, degrees: Degrees) -> int:
    """Return the bytes that a rank, the mean over ranks, sends in the convolutions on keys of all layers, both ways."""
    model, compute = config.model, config.train.torch_dtype
    if not model.key_convolution:
        return 0
    rows = Rows.packed([config.data.sequence_tokens])
    shards = Shards.build(rows, layout=config.parallel.layout, degree=degrees.context)
    heads = sum(model.projected_heads_of(m).kv for m in config.mechanisms() if not model.is_gated(m))
    sent = mean_rows_sent(shards, model.key_convolution - 1) * heads * model.head_dim
    return sent * (compute.itemsize + accumulation_dtype(compute).itemsize)
