"""The summary of a run that is printed at every start and by a dry run: sizes, FLOPs, traffic and memory."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import groupby

import numpy as np
import torch

from farspan.kernels.backend import BACKENDS, why_not_before
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import SAMPLED, Mechanism
from farspan.kernels.merge import accumulation_dtype
from farspan.kernels.planner import Sizes
from farspan.parallel.comm import Unconnected
from farspan.parallel.context_parallel.key_convolution import mean_rows_sent
from farspan.parallel.mesh import Degrees
from farspan.trainer.batch import shards_of_one_document
from farspan.trainer.build import backends_of_layers, build_strategies, kernel_requests, strategies_of_layers
from farspan.trainer.config import Config
from farspan.trainer.data.source import TokenSource, share_of_tokens
from farspan.trainer.engines.sizes import engine_label
from farspan.trainer.estimate.memory import estimate_memory
from farspan.trainer.load_balance import passes_ahead
from farspan.trainer.model.flops import attention_flops, matrix_parameters, total_parameters, training_flops
from farspan.trainer.state import TrainState
from farspan.units import BYTES, FLOPS, readable


def describe(config: Config, degrees: Degrees) -> str:
    """Return everything that follows from a resolved configuration, as a table of labels and values."""
    labels = _sizes(config, degrees) | engine_label(config) | _attention(config, degrees)
    memory = estimate_memory(config, degrees)
    labels["memory"] = f"{readable(memory.total, BYTES)} per rank (estimate) = {memory}"
    return _table(labels)


def describe_data(config: Config, source: TokenSource) -> str:
    """Return what the training documents are and how often a run reads them, as `describe` does."""
    lengths, tokens = source.document_lengths(), config.data.sequence_tokens
    labels = {
        "documents": f"{source.num_documents:,}, median {int(np.median(lengths)):,}, longest {lengths.max():,} tokens; "
        f"{share_of_tokens(lengths, tokens):.1%} of tokens in documents of at least {tokens:,}",
        "epochs": _epochs(config, source, config.train.steps * config.train.sequences_per_step),
    }
    if lengths.max() < tokens:
        labels["warning"] = (
            f"no document fills a sequence: attention reaches {lengths.max():,} tokens at most, of "
            f"data.sequence_tokens={tokens}"
        )
    return _table(labels)


def describe_rest(config: Config, source: TokenSource, state: TrainState) -> str | None:
    """Return how often a resumed run reads its data; None where `describe_data` says so.

    It differs after other batches, or where the data began anew.
    """
    num_sequences = state.sequences + max(config.train.steps - state.step, 0) * config.train.sequences_per_step
    if state.sequences == state.step * config.train.sequences_per_step:
        return None
    return _table({"epochs": f"{_epochs(config, source, num_sequences)}; {state.sequences:,} are read"})


def _epochs(config: Config, source: TokenSource, num_sequences: int) -> str:
    tokens = config.data.sequence_tokens
    num_read = num_sequences * tokens
    return (
        f"{num_read / source.num_tokens:.3g} = {num_read:,} of {source.num_tokens:,} tokens, "
        f"{source.num_tokens / tokens:,.1f} sequences"
    )


def _table(labels: dict[str, str]) -> str:
    return "\n".join(f"{label:<12}{value}" for label, value in labels.items())


def _sizes(config: Config, degrees: Degrees) -> dict[str, str]:
    model, mechanisms = config.model, config.mechanisms()
    tokens, sequences = config.data.sequence_tokens, config.train.sequences_per_step
    local, micro_batches = shards_of_one_document(config, degrees).tokens_local, sequences // degrees.data
    padding = f" ({1 - tokens / (local * degrees.context):.1%} padding)" if local * degrees.context > tokens else ""
    one_document = Rows.packed([tokens])
    flops = training_flops(model, mechanisms, tokens, attention_flops(model, mechanisms, one_document)) / tokens
    parameters, active = total_parameters(model, mechanisms), matrix_parameters(model, mechanisms)
    mixing = [mechanism for mechanism in mechanisms if model.mixes_heads(mechanism)]
    some_idle = any(model.expert_layers) or mixing
    labels = {
        "ranks": f"{degrees.data * degrees.context} = dp_replicate {degrees.dp_replicate} x dp_shard "
        f"{degrees.dp_shard} x context {degrees.context}",
        "step": f"{sequences * tokens:,} tokens = {sequences} sequences x {tokens:,}",
        "micro-batch": f"{local:,} tokens per rank{padding}, {micro_batches} per step",
        "model": f"{parameters:,} parameters{f', {active:,} active per token' if some_idle else ''}",
        "layers": f"{model.layers} of width {model.width}, {model.heads} query heads, {model.kv_heads} KV heads, "
        f"head_dim {model.head_dim}, vocabulary {model.vocabulary_size:,}",
    }
    if any(model.expert_layers):
        experts = model.experts
        shared = f", shared expert of {experts.shared}" if experts.shared else ""
        labels["experts"] = (
            f"{experts.per_token} of {experts.count} per token, feed_forward {experts.feed_forward}{shared}, in "
            f"{sum(model.expert_layers)} layers, expert-parallel degree {degrees.expert}"
        )
    if mixing:
        mixture, heads, projected = model.head_mixture, model.heads_of(mixing[0]), model.projected_heads_of(mixing[0])
        of_experts = f"{mixture.per_token} of {mixture.count} experts, " if mixture.kind == "experts" else ""
        labels["heads"] = (
            f"{of_experts}{heads.query} of {projected.query} query heads per token, {projected.kv} KV heads, in "
            f"{len(mixing)} layers"
        )
    ahead = passes_ahead(model, mechanisms, micro_batches)
    if ahead:
        labels["balance"] = (
            f"over the step: {ahead} of {micro_batches} micro-batches run forward twice, the first time to count loads"
        )
    labels["compute"] = (
        f"{readable(flops, [(1e3, 'kFLOP'), (1e6, 'MFLOP'), *FLOPS])} per token in one document of {tokens:,}, "
        f"{config.train.compute_dtype} on {config.train.device}"
    )
    return labels


def _attention(config: Config, degrees: Degrees) -> dict[str, str]:
    model, sent = config.model, attention_bytes(config, degrees) + convolution_bytes(config, degrees)
    labels = {"attention": format_layers(config.mechanisms(), short=True)}
    if model.key_convolution:
        labels["convolution"] = f"over {model.key_convolution} keys"
    if any(map(model.is_gated, config.mechanisms())):
        labels["recurrences"] = "in gated layers"
    tokens = config.data.sequence_tokens
    dense = [str(mechanism) for mechanism in dict.fromkeys(config.mechanisms()) if mechanism.is_dense_up_to(tokens)]
    if dense:
        labels["note"] = f"{', '.join(dense)} hides no key of {tokens:,} tokens: this is dense attention"
    strategies = dict.fromkeys(strategies_of_layers(config, degrees))
    return labels | {
        "backend": _backends(config),
        "strategy": f"{' and '.join(strategies)}, {config.parallel.layout} layout",
        "traffic": f"{readable(sent, BYTES)} sent per rank and sequence",
    }


def format_layers(mechanisms: Sequence[Mechanism], *, short: bool = False) -> str:
    """Return the mechanisms of the layers; runs of equal layers are counted.

    short: of mechanisms that differ by layer only the names.
    """
    runs = [list(run) for _, run in groupby(mechanisms, type if short else str)]
    names = [type(run[0]).__name__ if short and len(set(run)) > 1 else str(run[0]) for run in runs]
    if len(runs) == 1:
        return names[0]
    return ", ".join(f"{len(run)} x {name}" if len(run) > 1 else name for run, name in zip(runs, names, strict=True))


def _backends(config: Config) -> str:
    backend, device = config.attention.backend, torch.device(config.train.device)
    if backend != "auto":
        return _backend(backend, {})
    # Layers that need different backends choose their own: the layers' names by the backend and why it is taken.
    kinds: dict[str, dict[str, None]] = {}
    names, requests = backends_of_layers(config, device), kernel_requests(config)
    for mechanism, name, request in zip(config.mechanisms(), names, requests, strict=True):
        kinds.setdefault(_backend(name, why_not_before(name, device, request)), {})[type(mechanism).__name__] = None
    if len(kinds) == 1:
        return next(iter(kinds))
    return "; ".join(f"{' and '.join(layers)}: {backend}" for backend, layers in kinds.items())


def _backend(name: str, others: dict[str, str]) -> str:
    """others: the backends that were passed over, and why."""
    if name == "reference":
        notes = ["for checks only: stores all scores, which the memory below leaves out"]
    else:
        notes = [note for note in (BACKENDS.get(name).calls(), BACKENDS.get(name).note) if note]
    notes += (f"not {other}: {reason}" for other, reason in others.items())
    return f"{name} ({'; '.join(notes)})" if notes else name


def attention_bytes(config: Config, degrees: Degrees) -> int:
    """Return the bytes that rank 0 sends for the attention of all layers, for a sequence of one document."""
    parallel, mechanisms, shards = config.parallel, config.mechanisms(), shards_of_one_document(config, degrees)
    channel = Unconnected(0, degrees.context, inner_size=parallel.context_inner)
    sizes = Sizes.of(config.train.torch_dtype, config.model.head_dim, config.model.head_dim)
    names = strategies_of_layers(config, degrees)
    strategies = build_strategies(names, channel, parallel)
    sent, layers = 0, Counter(zip(mechanisms, names, strict=True))
    for (mechanism, name), count in layers.items():
        strategy = strategies[name]
        heads = config.model.heads_of(mechanism)
        routing = partial(mechanism.sample_routing, shards.rows, heads, max_queries=SAMPLED)
        volume = strategy.prepare(mechanism, shards, heads, backend="reference").volume(sizes, routing)
        sent += count * (volume.forward + volume.backward)
    return sent


def convolution_bytes(config: Config, degrees: Degrees) -> int:
    """Return the bytes that a rank sends for the key convolutions of all layers, both passes, as a mean over ranks."""
    model, compute = config.model, config.train.torch_dtype
    if not model.key_convolution:
        return 0
    heads = sum(model.projected_heads_of(m).kv for m in config.mechanisms() if not model.is_gated(m))
    sent = mean_rows_sent(shards_of_one_document(config, degrees), model.key_convolution - 1) * heads * model.head_dim
    return sent * (compute.itemsize + accumulation_dtype(compute).itemsize)
