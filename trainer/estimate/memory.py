"""Memory of one rank at the peak of a step, estimated before anything is allocated.

Counts tensors, not what torch and its allocator take besides.
"""

import os
from collections import Counter
from dataclasses import dataclass

import torch

from farspan.errors import ConfigError
from farspan.kernels.layers.cross_entropy import CHUNK_BYTES, chunk_tokens
from farspan.kernels.layers.fused import DTYPES
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Mechanism
from farspan.kernels.merge import accumulation_dtype
from farspan.kernels.planner import Sizes
from farspan.parallel.mesh import Degrees
from farspan.trainer.batch import shards_of_one_document
from farspan.trainer.config import Config
from farspan.trainer.engines.sizes import kept
from farspan.trainer.model.flops import total_parameters
from farspan.units import BYTES, readable


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Estimated bytes on one rank."""

    states: int
    """Master parameters, gradients and the two moments of AdamW, as the engine shards them; under ZeRO also parameters
    in the dtype of the computation, and its buffer for gradients."""
    gathered: int
    """Where parameters are sharded: full ones outside the blocks and of two blocks, one in use and one prefetched, with
    only the local experts. Gradients of the head and of one block, and a copy of the latter in the dtype of the
    reduction."""
    activations: int
    """All blocks', see `block_activations`; with recompute: the inputs of all blocks, and one block's activations. And
    what all of them keep of their choices by content."""
    working: int
    """The larger of two that are not in memory together. Loss: a chunk of logits, on a GPU also in 16 bits, the
    gradient of the hidden states and, for a 16-bit head, its float32 gradient. Backward of a block: gradients inside
    SwiGLU (three of the inner size, one of the width) or of attention (out, q, k, v, accumulated)."""

    @property
    def total(self) -> int:
        return self.states + self.gathered + self.activations + self.working

    def __str__(self) -> str:
        parts = {
            "parameters, gradients and optimizer": self.states,
            "gathered": self.gathered,
            "activations": self.activations,
            "working": self.working,
        }
        return " + ".join(f"{name} {readable(size, BYTES)}" for name, size in parts.items())


def estimate_memory(config: Config, degrees: Degrees) -> Memory:
    model, compute = config.model, config.train.torch_dtype
    item, master = compute.itemsize, accumulation_dtype(compute).itemsize
    parameters, head = total_parameters(model, config.mechanisms()), model.width * model.vocabulary_size
    outside = head * (1 if model.tied_embeddings else 2)
    experts = 3 * model.width * model.experts.count * model.experts.feed_forward if any(model.expert_layers) else 0
    # The largest kind of block: one with experts, if there is any.
    block = (parameters - outside - sum(model.expert_layers) * experts) // model.layers + experts // degrees.expert
    tokens = shards_of_one_document(config, degrees).tokens_local
    heads = [model.heads_of(mechanism) for mechanism in config.mechanisms()]
    query, kv = (max(numbers) * model.head_dim for numbers in zip(*((h.query, h.kv) for h in heads), strict=True))
    layers = zip(config.mechanisms(), model.expert_layers, strict=True)
    by_block = [block_activations(config, *layer, tokens=tokens) for layer in layers]
    inputs = tokens * model.width * item
    saved = model.layers * inputs + max(by_block) if config.train.recompute == "block" else sum(by_block)
    on_cpu = config.train.device == "cpu"
    one_document, choices = Rows.packed([config.data.sequence_tokens]), Counter(config.mechanisms())
    saved += sum(
        layers * mechanism.kept_bytes(model.heads_of(mechanism), one_document, tokens=tokens, packed=not on_cpu)
        for mechanism, layers in choices.items()
    )
    chunk = chunk_tokens(model.vocabulary_size, compute, CHUNK_BYTES["cpu" if on_cpu else "cuda"])
    logit = master if on_cpu or item == master else master + item
    loss = min(chunk, tokens) * model.vocabulary_size * logit + inputs + (head * master if item < master else 0)
    of_engine = kept(config, degrees)
    inner = max(model.feed_forward, model.experts.per_token * model.experts.feed_forward if experts else 0)
    swiglu = tokens * (3 * inner + model.width) * item
    attention = tokens * (2 * query * item + (query + 2 * kv) * master)
    return Memory(
        states=int(of_engine.by_parameter * parameters) + of_engine.fixed,
        gathered=((outside + 2 * block) * of_engine.gathers + head + block) * item + block * master,
        # Outside the blocks: the last residual stream and its norm.
        activations=saved + 2 * inputs,
        working=max(loss, swiglu, attention),
    )


def check_memory(config: Config, degrees: Degrees, device: torch.device, local_rank: int) -> None:
    """Raise ConfigError where the estimate alone is more than a rank's device has.

    On CPU ranks share the machine's memory: the last of them sees how many they are.
    """
    needed = estimate_memory(config, degrees)
    if device.type == "cuda":
        owner, available = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
    else:
        owner, available = "this machine", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (local_rank + 1)
    if needed.total > available:
        raise ConfigError(
            f"data.sequence_tokens={config.data.sequence_tokens} takes {readable(needed.total, BYTES)} a rank "
            f"({needed}), and {owner} has {readable(available, BYTES)} for each: lower it, raise parallel.context or "
            "parallel.dp_shard, set train.recompute=block or take a smaller model."
        )


def block_activations(config: Config, mechanism: Mechanism, has_experts: bool, *, tokens: int) -> int:
    """Return the bytes that a block with this mechanism saves for its backward pass, for `tokens` local tokens.

    Per token: the residual stream before both norms, and the norms of it (on CPU also the normalized input of each);
    rotated q and k, v, out and a float32 lse, with qk_norm also q and k before it; gate, up, the product of SwiGLU and,
    where it is not fused, silu(gate).
    Token choice: out of all tokens; q, k, v, out, lse and routing logits of the chosen tokens.
    Key convolution: its input.
    Gated recurrence: q, k, v before and after SiLU, out, its norm, the gate, the product of these two.
    Experts: rows sent and received, at even loads, scores of all experts, the inside of the shared one.
    Head mixture: gated out as well.
    """
    model, compute, gated = config.model, config.train.torch_dtype, config.model.is_gated(mechanism)
    heads, wide, norms = model.heads_of(mechanism), accumulation_dtype(compute), 1 if model.parallel_blocks else 2
    query, kv = heads.query * model.head_dim, heads.kv * model.head_dim
    normed = norms * model.width
    if gated or model.qk_norm:
        normed += query if gated else query + kv
    inner = 3 if config.train.device != "cpu" and compute in DTYPES else 4
    feed_forward = inner * model.feed_forward
    if has_experts:
        feed_forward = inner * model.experts.shared + 2 * model.experts.per_token * model.width
        feed_forward += 3 * model.experts.count * wide.itemsize // compute.itemsize
    elements = norms * model.width + normed + feed_forward
    elements += query if model.mixes_heads(mechanism) else 0
    if config.train.device == "cpu":
        elements += normed
    if model.key_convolution and not gated:
        elements += kv
    if gated:
        attention = (2 * 3 + 3) * query * compute.itemsize
    else:
        sizes, rows = Sizes.of(compute, model.head_dim, model.head_dim), Rows.packed([config.data.sequence_tokens])
        attention = mechanism.saved_bytes(heads, sizes, rows)
    return tokens * (elements * compute.itemsize + attention)
