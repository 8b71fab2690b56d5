"""Attention mechanisms under every strategy, against one process in float64: those of farspan, and your own.

    def test_near():
        farspan.testing.check_mechanism(Near)

Ranks are processes that talk through gloo. What they put together, out, log-sum-exp and the gradients of all inputs,
equals the reference backend's on the full sequence; and the counted bytes equal the strategy's own formula.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Mechanism
from farspan.kernels.mechanisms.dense import Dense
from farspan.kernels.merge import accumulation_dtype
from farspan.kernels.planner import Heads, Sizes
from farspan.kernels.sequence_attention import plan_sequence_attention
from farspan.parallel.comm import Channel, GradCommDtype, Traffic
from farspan.parallel.context_parallel.strategy import STRATEGIES
from farspan.parallel.layout import LAYOUTS, Shards
from farspan.parallel.ranks import Ranks
from farspan.tools.rank_pool import RankPool, grid_groups

# Sums of a few hundred float64 terms in another order: errors stay some ten times 1e-16 times the values.
FLOAT64_TOLERANCE = 1e-10
COLLECTIVE_TIMEOUT_S = 120
CALL_TIMEOUT_S = 300
"""Only what hangs comes near them, however slow the machine is."""
HEADS = [Heads(query=8, kv=8), Heads(query=8, kv=2), Heads(query=8, kv=1)]
HEAD_DIM, VALUE_DIM = 16, 8
DOCUMENTS = {
    "one": Rows.packed([321]),
    "ragged": Rows.packed([1, 130, 3, 77, 40, 2, 90]),
    # Under the contiguous layout of 8 ranks the last three hold nothing but padding.
    "padded_ranks": Rows.packed([150, 37, 3], padding=130),
}
TINY = {
    "nothing": Rows.packed([]),
    "no_documents": Rows.packed([0, 0]),
    "a_token": Rows.packed([1]),
    "empty_and_tiny": Rows.packed([0, 1, 0, 1, 0, 3]),
}
"""Ranks without tokens, and documents of 0 and 1."""
Reference = Callable[..., Tensor]
"""From q `[tokens, heads, head_dim]`, k and v of KV heads, the numbers of a router if there is one, and the lengths of
the documents to out `[tokens, heads, value_dim]`."""


@dataclass(frozen=True)
class Case:
    mechanism: Mechanism
    strategy: str
    layout: str
    documents: str
    heads: Heads
    inner_size: int = 1
    dtype: torch.dtype = torch.float64
    grad_comm_dtype: GradCommDtype = "accumulation"

    @property
    def rows(self) -> Rows:
        return {**DOCUMENTS, **TINY}[self.documents]

    def inputs(self) -> list[Tensor]:
        """q, k, v, routing and the gradient of out of the full sequence; the same on every rank."""
        return inputs_of(self.mechanism, len(self.rows), self.heads, (HEAD_DIM, VALUE_DIM), self.dtype, seed=1)

    def shards(self, degree: int) -> Shards:
        return Shards.build(self.rows, layout=self.layout, degree=degree, work=self.mechanism.keys_per_query)


@dataclass(frozen=True)
class Sent:
    """What a rank sent in one pass, as counted and as its strategy's formula says."""

    counted: Traffic
    stated: int


Result = tuple[list[Tensor], list[Sent]]
"""Of a rank: its out, lse, dq, dk, dv and gradient of routing, and what it sent forward and backward."""


def check_mechanism(
    mechanism: Mechanism | type[Mechanism],
    reference: Reference | None = None,
    *,
    ranks: Sequence[int] = (1, 2, 4),
) -> list[str]:
    """Check a mechanism, or each of a class's `examples()`, on so many ranks; return a line for each case.

    Under every strategy that serves it; layouts, packed documents, padding, ranks without tokens, and 8 query heads on
    8, 2 and 1 KV heads take turns. reference: a second implementation, differentiable by autograd, to
    compare out and the gradients in one process with; the ranks are compared with that process in any case.
    Raises AssertionError, which names cases and their largest differences, and RankError, a FarspanError with the
    traceback and the case, where a rank fails. The class has to be in a module that can be imported, or in a script
    below `if __name__ == "__main__":`, as the ranks import it.
    """
    examples = mechanism.examples() if isinstance(mechanism, type) else (mechanism,)
    checked = [line for example in examples if reference for line in _check_in_one_process(example, reference)]
    for number, degree in enumerate(ranks):
        turns = range(number % 2, len(LAYOUTS), 2)
        with RankPool(degree, join, preload=__name__, timeout_s=CALL_TIMEOUT_S) as pool:
            for strategy in STRATEGIES.load():
                cases = [case for example in examples for case in _user_cases(example, strategy, degree, turns)]
                # Strategy by strategy: what has been sent wrongly may leave the ranks of another waiting.
                if wrong := differences(cases, pool.run(run_cases, cases)):
                    raise AssertionError(_message(wrong, len(cases), degree))
                checked += [f"{label(case)} on {degree} ranks" for case in cases]
    if not checked:
        raise AssertionError(f"{mechanism} runs under no strategy on {list(ranks)} ranks, with none of {HEADS}")
    return checked


def _message(wrong: list[str], cases: int, degree: int) -> str:
    return f"of {cases} cases on {degree} ranks these differ from one process or their formula:\n" + "\n".join(wrong)


def _check_in_one_process(mechanism: Mechanism, reference: Reference) -> Iterator[str]:
    for heads, (name, rows) in zip(HEADS, DOCUMENTS.items(), strict=True):
        if mechanism.unsupported_reason(heads, longest(rows)) is not None:
            continue
        case = Case(mechanism, "single", "contiguous", name, heads)
        found = one_process(mechanism, name, heads)
        real = rows.document >= 0
        *leaves, dout = (x[real] for x in case.inputs())
        leaves = [x.requires_grad_() for x in leaves]
        out = reference(*leaves, rows.document[real].bincount().tolist())
        gradients = torch.autograd.grad(out, leaves, dout, allow_unused=True, materialize_grads=True)
        # There may be an lse in between.
        got = [found[0], *found[-len(leaves) :]]
        error = max(relative_error(a[real], b) for a, b in zip(got, (out.detach(), *gradients), strict=True))
        if not error <= FLOAT64_TOLERANCE:
            raise AssertionError(f"{label(case)}: differs from the reference by {error:.1e} in one process")
        yield f"{label(case)} and the reference"


def _user_cases(mechanism: Mechanism, strategy: str, degree: int, turns: Sequence[int]) -> list[Case]:
    cases = cases_of(mechanism, strategy, degree, turns)
    # The last one again, with next to no tokens.
    name = list(TINY)[(list(STRATEGIES).index(strategy) + degree) % len(TINY)]
    cases += [replace(case, documents=name) for case in cases[-1:]]
    return [case for case in cases if mechanism.unsupported_reason(case.heads, longest(case.rows)) is None]


def label(case: Case) -> str:
    heads = f"{case.heads.query}:{case.heads.kv}"
    return f"{case.mechanism}-{case.strategy}-{case.layout}-{case.documents}-{heads}"


def longest(rows: Rows) -> int:
    """Return the tokens of the longest document."""
    return int(rows.position.max()) + 1 if len(rows) else 0


def cases_of(
    mechanism: Mechanism, strategy: str, degree: int, turns: Iterable[int], *, number: int = 0, shift: int = 0
) -> list[Case]:
    """Return a case for each turn that the strategy admits; layouts, documents and heads change, so that all are tried.

    number, shift: of mechanisms that are tried together, begin elsewhere.
    """
    place, found = list(STRATEGIES).index(strategy), []
    for turn in turns:
        a = (place + number + shift + turn) % len(LAYOUTS)
        b = (a + number + place) % len(DOCUMENTS)
        heads = HEADS[(degree.bit_length() - 1 - a - b) % len(HEADS)]
        inner_size = inner_size_for(strategy, degree, turn=a)
        if STRATEGIES.get(strategy).unsupported_reason(mechanism, heads, degree, inner_size) is None:
            found.append(Case(mechanism, strategy, list(LAYOUTS)[a], list(DOCUMENTS)[b], heads, inner_size))
    return found


def inner_size_for(strategy: str, degree: int, turn: int) -> int:
    """Return the inner axis of a strategy that needs a grid: of eight ranks two or four, in turn."""
    reason = STRATEGIES.get(strategy).unsupported_reason
    if degree < 4 or reason(Dense(), HEADS[0], degree, 2) == reason(Dense(), HEADS[0], degree, 1):
        return 1
    return 4 if degree == 8 and turn % 2 else 2


def run_cases(cases: list[Case]) -> list[Result]:
    """On each rank: run every case; errors name theirs."""
    return [_run_named(case) for case in cases]


def _run_named(case: Case) -> Result:
    try:
        return run_case(case)
    except Exception as error:
        error.add_note(f"in {label(case)}")
        raise


def run_case(case: Case) -> Result:
    channel = world_channel(case.inner_size)
    shards = case.shards(channel.size)
    strategy = STRATEGIES.get(case.strategy)(channel, grad_comm_dtype=case.grad_comm_dtype)
    planned = strategy.prepare(case.mechanism, shards, case.heads, backend="cpu")
    q, k, _, *routing, _ = global_inputs = case.inputs()
    *inputs, dout = (shards.shard(x, channel.rank) for x in global_inputs)
    with torch.no_grad():
        out, saved = planned.forward(*inputs)
        forward_traffic = channel.traffic.take()
        gradients = [x.to(of.dtype) for x, of in zip(planned.backward(dout, saved), inputs, strict=True)]
        backward_traffic = channel.traffic.take()
        lse = planned.lse(saved)
        source = functools.partial(case.mechanism.route, case.rows, case.heads, q, k, *routing)
    stated = planned.volume(Sizes.of(case.dtype, HEAD_DIM, VALUE_DIM), source)
    sent = [Sent(forward_traffic, stated.forward), Sent(backward_traffic, stated.backward)]
    return [out, *([] if lse is None else [lse]), *gradients], sent


@functools.cache
def one_process(mechanism: Mechanism, documents: str, heads: Heads, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """One process, the reference backend, float64, of inputs rounded to `dtype`."""
    case = Case(mechanism, "single", "contiguous", documents, heads, dtype=dtype)
    return attend(mechanism, case.rows, heads, [x.double() for x in case.inputs()])


def differences(cases: list[Case], results: list[list[Result]]) -> list[str]:
    """Return a line for each case whose tensors are not those of one process, or whose bytes are not as stated.

    results: of `run_cases`, of each rank.
    """
    wrong = []
    for number, case in enumerate(cases):
        found = unshard(case, [of_rank[number][0] for of_rank in results])
        expected = one_process(case.mechanism, case.documents, case.heads)
        error = max(relative_error(a, b) for a, b in zip(found, expected, strict=True))
        if not error <= FLOAT64_TOLERANCE:
            wrong.append(f"{label(case)}: {error:.1e}")
        wrong += differing_bytes(case, [of_rank[number][1] for of_rank in results])
    return wrong


def unshard(case: Case, parts: list[list[Tensor]]) -> list[Tensor]:
    """Return the full sequence's tensors from every rank's list of them."""
    shards = case.shards(len(parts))
    return [shards.unshard(torch.stack(part)) for part in zip(*parts, strict=True)]


def differing_bytes(case: Case, sent: list[list[Sent]]) -> list[str]:
    """Return a line for each pass of each rank whose bytes are not those of the formula, or were not received."""
    wrong = []
    for number, direction in enumerate(("forward", "backward")):
        passes = [of_rank[number] for of_rank in sent]
        wrong += [
            f"{label(case)}: rank {rank} sent {dict(one.counted.sent)} {direction}, not {one.stated}"
            for rank, one in enumerate(passes)
            if one.counted.sent.total() != one.stated
        ]
        if sum(one.counted.received.total() for one in passes) != sum(one.stated for one in passes):
            wrong.append(f"{label(case)}: ranks received less {direction} than was sent")
    return wrong


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value or 1; NaN, or -inf in other places, counts as infinite.

    Not below 1: a gradient whose true value is 0 is all rounding error of the O(1) terms that cancel in it.
    """
    got, expected = got.double(), expected.double()
    if got.shape != expected.shape or got.isnan().any() or not torch.equal(got.isneginf(), expected.isneginf()):
        return math.inf
    if not got.numel():
        return 0.0
    finite = expected.masked_fill(expected.isneginf(), 0.0)
    difference = (got.masked_fill(got.isneginf(), 0.0) - finite).abs().max().item()
    return difference / max(finite.abs().max().item(), 1.0)


def normal(*shapes: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Normal numbers, drawn in float64 one tensor after another: the same in every dtype but for their rounding."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def inputs_of(
    mechanism: Mechanism,
    tokens: int,
    heads: Heads,
    dims: tuple[int, int] = (16, 8),
    dtype: torch.dtype = torch.float64,
    seed: int = 3,
) -> list[Tensor]:
    """q, k, v, routing if there is a router, and the gradient of out; dims: of q and k, and of v."""
    query, kv = (tokens, heads.query), (tokens, heads.kv)
    shapes = (*query, dims[0]), (*kv, dims[0]), (*kv, dims[1]), (*query, dims[1]), (*kv, mechanism.routing_width)
    q, k, v, dout, routing = normal(*shapes, seed=seed, dtype=dtype)
    return [q, k, v, *([routing.to(accumulation_dtype(dtype))] if mechanism.routing_width else []), dout]


def attend(
    mechanism: Mechanism,
    rows: Rows,
    heads: Heads,
    inputs: Sequence[Tensor],
    *,
    backend: str = "reference",
    head_range: range | None = None,
) -> list[Tensor]:
    """out, lse if there is one softmax, and the gradients of q, k, v and routing, of all heads or of a range.

    inputs: as of `inputs_of`, of these heads.
    """
    *inputs, dout = inputs
    planned = plan_sequence_attention(mechanism, rows, heads, head_range or range(heads.query), backend=backend)
    out, saved = planned.forward(*inputs)
    assert out.dtype == inputs[0].dtype
    lse = planned.lse(saved)
    return [out, *([] if lse is None else [lse]), *planned.backward(dout, saved)]


@contextmanager
def join(ranks: Ranks, store: dist.Store) -> Iterator[tuple[()]]:  # pyright: ignore[reportPrivateImportUsage]
    """On a rank of a pool: be in its world, with one thread and fresh memory full of NaN."""
    torch.set_num_threads(1)
    # In deterministic mode torch fills fresh memory with NaN.
    torch.use_deterministic_algorithms(True)
    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    dist.init_process_group("gloo", store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=timeout)
    yield ()
    dist.destroy_process_group()


def world_channel(width: int = 1) -> Channel:
    """On a rank: return the channel of all ranks, a grid if `width`, the size of its inner axis, is more than 1."""
    traffic = Traffic()
    group = dist.group.WORLD
    assert group is not None
    if width == 1:
        return Channel(group, traffic)
    inner, outer = (Channel(axis, traffic) for axis in grid_groups(width))
    return Channel(group, traffic, inner=inner, outer=outer)
