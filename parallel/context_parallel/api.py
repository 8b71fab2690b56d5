"""Attention for models that are not farspan's own: on one device, or over the ranks of a group.

Eight tokens on two ranks, in the layout `zigzag`:

    cp = ContextParallel(group, "ring")
    cp.shard(tokens)                                    rank 0: 0 1 6 7     rank 1: 2 3 4 5
    out = cp.attention(q, k, v, mechanism="moba")       of these rows, over the keys of all eight
    cp.unshard(out)                                     0 1 2 3 4 5 6 7 on both
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from itertools import chain, islice
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from farspan.errors import ConfigError
from farspan.kernels.backend import KernelRequest, choose_backend
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import MECHANISMS, Mechanism
from farspan.kernels.planner import Heads, SequenceAttention, Sizes
from farspan.kernels.sequence_attention import plan_last_queries
from farspan.parallel.comm import Channel, Traffic, Unconnected
from farspan.parallel.context_parallel.cost_model import MACHINES, Job, compare, strategy_for
from farspan.parallel.context_parallel.eager import eager
from farspan.parallel.context_parallel.strategy import STRATEGIES, DistributedAttention, Strategy, differentiable
from farspan.parallel.layout import Shards, check_layout

Documents = Sequence[int] | Sequence[Sequence[int]] | Tensor
"""Lengths of the documents of a sequence, in their order; of each sequence of a batch, if they differ."""
log = logging.getLogger("farspan")
PLANS = 16
"""Shapes and documents whose plans are kept; the plan of a million tokens holds some 100 MB."""
PLANS_OF_LAST_TOKENS = 4
"""Plans for a KV cache: each step has another length, so that only the layers of one step share them."""


def mechanism(name: str, **options: Any) -> Mechanism:
    """Return an attention mechanism by its name, such as `mechanism("moba", block=512, top_k=8)`.

    docs/mechanisms.md lists names and options. Raises ConfigError for another name, option or value.
    """
    cls = MECHANISMS.get(name)
    try:
        built = cls(**options)
        _ = built.static_mask  # masks check options too
    except (TypeError, ValueError) as error:
        raise ConfigError(f"mechanism {name!r} does not take {options}: {error}") from error
    return built


M = TypeVar("M", bound=type[Mechanism])


def register_mechanism(name: str) -> Callable[[M], M]:
    """Decorate a class of mechanisms to be known by `name` in this process.

    Programs that do not import its module, such as the command line, find it by an entry point instead, see
    farspan/registry.py. Raises ValueError if the name is taken.
    """
    return lambda cls: cast(M, MECHANISMS.add(name, cls))


class ContextParallel:
    """How the ranks of a group share sequences; serves all layers, and keeps their plans by shape and documents.

    Every rank has to make the same calls in the same order, and to sum the gradients of parameters over the ranks:
    each has those of its own tokens.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        strategy: str = "auto",
        layout: str = "zigzag",
        *,
        node_ranks: int = 1,
        backend: str = "auto",
    ) -> None:
        """group: the ranks that share a sequence; without one, this rank has whole sequences.

        strategy: see docs/strategies.md; `auto` takes the fastest by the cost model, for each mechanism and shape.
        layout: which rank holds which tokens: contiguous, zigzag, striped, or balanced. node_ranks: neighbors of the
        group with fast links between them, for strategies of two levels; every rank of the group has to come here then.
        Raises ConfigError for names that do not exist, and where `node_ranks` does not divide the group.
        """
        # Shapes whose choice by `auto` has been said.
        self._logged: set[Any] = set()
        self.traffic = Traffic()
        """Bytes that this rank has sent and received, by kind."""
        self.channel = Unconnected(0, 1) if group is None else _channel(group, node_ranks, self.traffic)
        self.strategy, self.backend = strategy, backend
        check_layout(layout)
        if strategy != "auto":
            STRATEGIES.get(strategy)
        # One rank has all tokens in order; other layouts would pad them.
        self.layout = layout if self.channel.size > 1 else "contiguous"
        # Methods are not cached themselves, as that would keep every instance alive.
        self._planned = lru_cache(PLANS)(self._plan)
        self._planned_last = lru_cache(PLANS_OF_LAST_TOKENS)(self._plan_last)
        self._sharded = lru_cache(PLANS)(self._shard_rows)
        self._strategy = cache(lambda name: STRATEGIES.get(name)(self.channel))

    @eager
    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mechanism: str | Mechanism = "dense",
        documents: Documents | Shards | None = None,
        routing: Tensor | None = None,
    ) -> Tensor:
        """Attend the local rows of q to the keys of the whole sequence; differentiable in all tensors.

        q: `[tokens_local, heads, head_dim]` or `[batch, tokens_local, heads, head_dim]`, in any floating-point dtype. k
        and v: alike, of KV heads, which divide the heads; v may have another width. Scores are scaled by head_dim **
        -0.5. documents: of the sequence before it was sharded; without them it is one document, and shards have no
        padding. Shards instead are those of another layout, a batch's set end to end; plans are kept by their identity.
        routing: `[..., kv_heads, routing_width]` in float32, or float64 for float64, if the mechanism has a
        router. Returns the shape of q, with the width of v.

        Without a group, q may have fewer tokens than k and v: they are the last of each sequence, as after a KV cache.

        Raises ValueError for shapes that do not fit each other or the documents, ConfigError for what the strategy or
        the backend cannot run, and for mechanisms that need all queries where only the last ones are given.
        """
        q, k, v = _autocast(q, k, v)
        batched = q.dim() == 4
        inputs = (q, k, v) if routing is None else (q, k, v, routing)
        # A KV cache has the other tokens.
        only_last = self.channel.size == 1 and routing is None and q.dim() == k.dim() >= 3
        only_last = only_last and 0 < q.shape[-3] < k.shape[-3] and not isinstance(documents, Shards)
        leading = (*q.shape[:-3], k.shape[-3]) if only_last else q.shape[: q.dim() - 2]
        if q.dim() < 3 or any(x.dim() != q.dim() or x.shape[: q.dim() - 2] != leading for x in inputs[1:]):
            raise ValueError(
                "attention takes tensors [tokens, heads, head_dim], or [batch, tokens, heads, head_dim], of the same "
                f"tokens; got {', '.join(str(list(x.shape)) for x in inputs)}"
            )
        # Sequences of a batch are as many documents more of one sequence: [B, T, H, D] -> [B * T, H, D]
        rows = tuple(x.flatten(0, 1) for x in inputs) if batched else inputs
        batch, tokens_local = (q.shape[0] if batched else 1), q.shape[-3]
        arguments = (
            _mechanism(mechanism),
            documents if isinstance(documents, Shards) else self._documents(documents, batch, k.shape[-3]),
            batch * tokens_local,
            Heads(query=q.shape[-2], kv=k.shape[-2]),
            (q.shape[-1], v.shape[-1]),
            q.dtype,
            q.device,
        )
        out = differentiable(self._planned_last(*arguments), *rows) if only_last else self._planned(*arguments)(*rows)
        return out.unflatten(0, (batch, tokens_local)) if batched else out

    def shard(
        self, x: Tensor, *, documents: Sequence[int] | None = None, dim: int = 0, fill: int | float = 0
    ) -> Tensor:
        """Return the local part of a tensor with all tokens of a sequence along `dim`, in the order of the layout.

        documents: needed by the layout `balanced`, and where tokens have to be padded, by `fill`, to be shared evenly.
        Raises ValueError where these do not have as many tokens as x.
        """
        shards = self._shards_of(x.shape[dim], documents)
        return shards.shard(x.movedim(dim, 0), self.channel.rank, fill=fill).movedim(0, dim)

    def unshard(self, x: Tensor, *, documents: Sequence[int] | None = None, dim: int = 0) -> Tensor:
        """Return the tensor of all tokens along `dim`, in order and without padding, on every rank.

        Gradients do not come back through it: raises ValueError where x has one.
        """
        if x.requires_grad:
            raise ValueError("unshard passes no gradient on: detach the tensor, or compute the loss of local tokens")
        parts = torch.stack(self.channel.all_gather(x.movedim(dim, 0), kind="unshard"))  # [P, tokens_local, ...]
        shards = self._sharded(self._documents(documents, 1, x.shape[dim]))
        _check_tokens(shards, x.shape[dim])
        return shards.unshard(parts).movedim(0, dim)

    def position_ids(self, tokens: int, *, documents: Sequence[int] | None = None) -> Tensor:
        """Return the position of each local row in its document, int64 `[tokens_local]` on the CPU; 0 for padding."""
        return self._shards_of(tokens, documents).rows_of(self.channel.rank).position.long()

    def _shards_of(self, tokens: int, documents: Sequence[int] | None) -> Shards:
        lengths = (tokens,) if documents is None else _lengths(documents)
        if sum(lengths) != tokens:
            raise ValueError(f"documents have {sum(lengths)} tokens together, the sequence has {tokens}")
        shards = self._sharded((lengths,))
        if documents is None and shards.tokens_local * shards.degree != tokens:
            raise ValueError(
                f"{shards.degree} ranks cannot share {tokens} tokens evenly in layout {self.layout!r}: pad them, or "
                f"say documents=[{tokens}] here and to attention"
            )
        return shards

    def _documents(self, documents: Documents | None, batch: int, tokens_local: int) -> tuple[tuple[int, ...], ...]:
        """Return the lengths of the documents of each sequence."""
        if documents is None:
            return ((tokens_local * self.channel.size,),) * batch
        documents = documents.tolist() if isinstance(documents, Tensor) else documents
        if not any(isinstance(lengths, Sequence) for lengths in documents):
            return (_lengths(documents),) * batch
        nested = tuple(map(_lengths, documents))
        if len(nested) != batch or len({sum(lengths) for lengths in nested}) > 1:
            raise ValueError(
                f"documents are lengths, or lengths of equal sums for each of {batch} sequences; got {documents}"
            )
        return nested

    def _shard_rows(self, documents: tuple[tuple[int, ...], ...]) -> Shards:
        """Shard each sequence, and set them end to end on every rank."""
        sharded = {
            lengths: Shards.build(Rows.packed(lengths), layout=self.layout, degree=self.channel.size)
            for lengths in dict.fromkeys(documents)
        }
        rows, index, tokens = Rows.packed(tuple(chain(*documents))), [], 0
        for lengths in documents:
            of_one = sharded[lengths].index  # [P, T]
            index.append((of_one + tokens).masked_fill(of_one < 0, -1))
            tokens += sum(lengths)
        return Shards(rows=rows, index=torch.cat(index, dim=1))  # B x [P, T] -> [P, B * T]

    def _plan(
        self,
        mechanism: Mechanism,
        documents: tuple[tuple[int, ...], ...] | Shards,
        tokens_local: int,
        heads: Heads,
        widths: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> DistributedAttention:
        shards = documents if isinstance(documents, Shards) else self._sharded(documents)
        _check_tokens(shards, tokens_local)
        job = Job(
            mechanism=mechanism,
            shards=shards,
            heads=heads,
            sizes=Sizes.of(dtype, *widths),
            inner_size=self.channel.inner_size,
        )
        backend = choose_backend(self.backend, device, KernelRequest.of(mechanism, dtype, *widths))
        return self.strategy_of(job, device).prepare(mechanism, shards, heads, backend=backend)

    def _plan_last(
        self,
        mechanism: Mechanism,
        documents: tuple[tuple[int, ...], ...],
        rows: int,
        heads: Heads,
        widths: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> SequenceAttention:
        """Plan attention of the last tokens of each sequence, `rows` together, to all of it."""
        sequences, keys = len(documents), sum(documents[0])
        queries = rows // sequences
        stops = torch.arange(1, sequences + 1) * keys
        # [sequences, 1] and [queries] -> [sequences, queries] -> [sequences * queries]
        last = (stops[:, None] + torch.arange(-queries, 0)).flatten()
        backend = choose_backend(self.backend, device, KernelRequest.of(mechanism, dtype, *widths))
        return plan_last_queries(mechanism, Rows.packed(tuple(chain(*documents))), last, heads, backend=backend)

    def strategy_of(self, job: Job, device: torch.device) -> Strategy:
        """Return the strategy that a layer takes for a sequence; one instance of each.

        Raises ConfigError where `auto` finds none.
        """
        return self._strategy(self._name_of(job, device))

    def _name_of(self, job: Job, device: torch.device) -> str:
        if self.channel.size == 1:
            return "single"
        if self.strategy != "auto":
            return strategy_for(self.strategy, job.mechanism, job.heads, job.shards.degree, job.inner_size)
        costs, reasons = compare([(job, 1)], MACHINES[device.type])
        if not costs:
            raise ConfigError("strategy='auto' finds none: " + " ".join(sorted(set(reasons.values()))))
        shape = job.mechanism, job.shards.tokens_local, job.heads, job.sizes
        if shape not in self._logged and dist.get_rank() == 0:
            first = "; then ".join(f"{name}: {cost}" for name, cost in islice(costs.items(), 2))
            degree, tokens_local = job.shards.degree, job.shards.tokens_local
            log.info("strategy='auto' takes %s, for %s over %d x %d tokens", first, job.mechanism, degree, tokens_local)
        self._logged.add(shape)
        return next(iter(costs))


@eager
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mechanism: str | Mechanism = "dense",
    documents: Documents | None = None,
    group: dist.ProcessGroup | None = None,
    strategy: str = "auto",
    layout: str = "zigzag",
    routing: Tensor | None = None,
) -> Tensor:
    """Attend by any mechanism, on one device or, with a group, over its ranks: `ContextParallel.attention`."""
    shared = _context_parallel(group, strategy, layout)
    return shared.attention(q, k, v, mechanism=mechanism, documents=documents, routing=routing)


def shard(
    x: Tensor,
    *,
    group: dist.ProcessGroup,
    layout: str = "zigzag",
    documents: Sequence[int] | None = None,
    dim: int = 0,
    fill: int | float = 0,
) -> Tensor:
    """Return this rank's part of a tensor that has all tokens along `dim`: `ContextParallel.shard`."""
    return _context_parallel(group, "auto", layout).shard(x, documents=documents, dim=dim, fill=fill)


def unshard(
    x: Tensor,
    *,
    group: dist.ProcessGroup,
    layout: str = "zigzag",
    documents: Sequence[int] | None = None,
    dim: int = 0,
) -> Tensor:
    """Return the tensor of all tokens from the parts of all ranks: `ContextParallel.unshard`."""
    return _context_parallel(group, "auto", layout).unshard(x, documents=documents, dim=dim)


@lru_cache(PLANS)
def _context_parallel(group: dist.ProcessGroup | None, strategy: str, layout: str) -> ContextParallel:
    return ContextParallel(group, strategy, layout)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors in the dtype of torch.autocast, if it is on: as of torch's own attention, all but float64."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _mechanism(mechanism_or_name: str | Mechanism) -> Mechanism:
    return mechanism(mechanism_or_name) if isinstance(mechanism_or_name, str) else mechanism_or_name


def _lengths(of_documents: Any) -> tuple[int, ...]:
    lengths = tuple(map(int, of_documents))
    if min(lengths, default=0) < 1:
        raise ValueError(f"documents have at least one token each; got lengths {lengths}")
    return lengths


def _check_tokens(shards: Shards, tokens_local: int) -> None:
    if shards.tokens_local != tokens_local:
        raise ValueError(
            f"documents of {len(shards.rows)} tokens leave {shards.tokens_local} rows to each of {shards.degree} "
            f"ranks; got {tokens_local}"
        )


def _channel(group: dist.ProcessGroup, node_ranks: int, traffic: Traffic) -> Channel:
    """Return the channel of a group; where it has several nodes, with channels of both axes."""
    ranks = dist.get_process_group_ranks(group)
    if len(ranks) % node_ranks:
        raise ConfigError(f"node_ranks={node_ranks} must divide the {len(ranks)} ranks of the group.")
    if not 1 < node_ranks < len(ranks):
        return Channel(group, traffic)
    own = ranks.index(dist.get_rank())
    node, column = own // node_ranks, own % node_ranks
    # Only the ranks of a new group have to come; keys and their gradients must not wait for each other.
    axes = ranks[node * node_ranks : (node + 1) * node_ranks], ranks[column::node_ranks], ranks
    groups = [dist.new_group(axis, use_local_synchronization=True) for axis in axes]
    inner, outer, gradients = (Channel(cast(dist.ProcessGroup, axis), traffic) for axis in groups)
    return Channel(group, traffic, inner=inner, outer=outer, gradients=gradients)
