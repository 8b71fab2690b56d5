"""Expert parallelism: whichever rank has the experts, each token gets the weighted sum of their outputs; its memory."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker

from farspan.kernels.moe import grouped_loop
from farspan.kernels.moe.grouped_gemm import grouped_swiglu
from farspan.parallel.comm import Unconnected
from farspan.parallel.expert_parallel.capacity import ExpertCapacity
from farspan.parallel.expert_parallel.dispatch import Dispatch, send_to_experts
from tests.support.mechanisms import normal
from tests.support.oracle import relative_error
from tests.support.rank_pool import RankPool, world_channel
from tests.support.recording_channel import RecordingChannel

EXPERTS, PER_TOKEN, WIDTH, INNER = 8, 3, 6, 10


@dataclass(frozen=True)
class Case:
    """tokens: of each of 8 parts, which are split over the ranks in order. experts: those that tokens may choose."""

    tokens: tuple[int, ...]
    padding: tuple[int, ...] = (0,) * 8
    experts: tuple[int, ...] = tuple(range(EXPERTS))


CASES = {
    "even": Case((5,) * 8),
    "ragged": Case((1, 9, 0, 4, 7, 2, 3, 5), padding=(0, 2, 0, 1, 7, 0, 3, 1)),
    "ranks without tokens": Case((0, 0, 4, 0, 0, 0, 9, 0)),
    "all to three experts": Case((5,) * 8, experts=(5, 6, 7)),
    "only padding": Case((3,) * 8, padding=(3,) * 8),
}


def inputs(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """(x, weights, gate, up, down), chosen, real, dout of all parts end to end."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(case.tokens)
    shapes = ((tokens, WIDTH), (tokens, PER_TOKEN), *[(EXPERTS, INNER, WIDTH)] * 2, (EXPERTS, WIDTH, INNER))
    *leaves, dout = normal(*shapes, (tokens, WIDTH), dtype=dtype)
    order = torch.rand(tokens, len(case.experts), generator=generator).argsort(dim=1)[:, :PER_TOKEN]
    real = torch.cat([torch.arange(n) < n - pad for n, pad in zip(case.tokens, case.padding, strict=True)])
    return leaves, torch.tensor(case.experts)[order], real, dout


def on_rank(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, int], int]:
    """On a rank: its out and gradients, the bytes by kind, and the number of rows for other ranks."""
    channel = world_channel()
    (x, weights, *matrices), chosen, real, dout = inputs(case, dtype)
    parts = 8 // channel.size
    start, stop = (sum(case.tokens[: parts * rank]) for rank in (channel.rank, channel.rank + 1))
    experts = EXPERTS // channel.size
    local = [part[start:stop].clone().requires_grad_() for part in (x, weights)]
    # The contents of padding must not be read.
    local[0].data[~real[start:stop]] = torch.nan
    local += [m[channel.rank * experts : (channel.rank + 1) * experts].clone().requires_grad_() for m in matrices]
    selected = real[start:stop, None].expand(-1, PER_TOKEN)
    in_flight = send_to_experts(local[0], chosen[start:stop], local[1], selected, channel, EXPERTS)
    gate, up, down = local[2:]
    out = in_flight.combine(lambda rows, counts: grouped_swiglu(rows, gate, up, down, counts))
    # Nor may the gradient of its outputs.
    gradients = torch.autograd.grad(out, local, dout[start:stop].masked_fill(~real[start:stop, None], torch.nan))
    leaving = chosen[start:stop][real[start:stop]] // experts != channel.rank
    return [out.detach(), *gradients], dict(channel.traffic.sent), int(leaving.sum())


def expected_of(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Every expert on every token, in float64."""
    leaves, chosen, real, dout = inputs(case, dtype)
    x, weights, gate, up, down = exact = [leaf.double().requires_grad_() for leaf in leaves]
    inner = torch.nn.functional.silu(torch.einsum("tc,efc->tef", x, gate)) * torch.einsum("tc,efc->tef", x, up)
    made = torch.einsum("tef,ecf->tec", inner, down).gather(1, chosen.unsqueeze(-1).expand(-1, -1, WIDTH))
    out = (weights.unsqueeze(-1) * made).sum(1) * real.unsqueeze(-1)
    return [out.detach(), *torch.autograd.grad(out, exact, dout.double())]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 3e-2)], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("degree", [1, 2, 4, 8])
def test_equals_every_expert_on_every_token(
    ranks: Callable[[int], RankPool], degree: int, case: Case, dtype: torch.dtype, tolerance: float
) -> None:
    results = ranks(degree).run(on_rank, case, dtype)
    expected = expected_of(case, dtype)
    got = [torch.cat(parts) for parts in zip(*(tensors for tensors, *_ in results), strict=True)]
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().amax().item() <= tolerance * max(b.abs().amax().item(), 1e-300)
    for _, sent, leaving in results:
        row = WIDTH * dtype.itemsize
        assert sent.get("expert_rows", 0) == sent.get("expert_out_gradient", 0) == leaving * row
        assert sent.get("expert_counts", 0) == (degree - 1) * EXPERTS // degree * 8
    # Every row for another rank returns: as many rows of out, and of the gradient of rows.
    for returned, sent_out in (("expert_out", "expert_rows"), ("expert_rows_gradient", "expert_out_gradient")):
        totals = [sum(sent.get(kind, 0) for _, sent, _ in results) for kind in (returned, sent_out)]
        assert totals[0] == totals[1]


@pytest.mark.parametrize("capacity", [None, "weight", "position"])
def test_a_single_rank_waits_for_no_device(capacity: Any) -> None:
    """Tensors without numbers, of which asking for one is an error."""
    x, weights = (torch.empty(shape, device="meta", requires_grad=True) for shape in ((9, WIDTH), (9, PER_TOKEN)))
    chosen, dispatched = torch.empty(9, PER_TOKEN, dtype=torch.int64, device="meta"), weights > 0
    channel = Unconnected(0, 1)
    if capacity:
        sequence = ExpertCapacity(channel, chosen[:, 0])
        dispatched = sequence.within_capacity(chosen, weights, EXPERTS, 1.1, capacity)
    out = send_to_experts(x, chosen, weights, dispatched, channel, EXPERTS).combine(lambda rows, counts: rows * 2)
    assert [g.shape for g in torch.autograd.grad(out.sum(), (x, weights))] == [x.shape, weights.shape]


def test_rows_of_a_single_rank_are_those_of_its_dispatched_choices() -> None:
    """Where experts choose tokens, few of the choices that there is room for."""
    dispatched = torch.tensor([[True, False, False, False], [True, True, False, False], [False] * 4])
    chosen = torch.arange(4).expand(3, -1)
    found = Dispatch.plan(chosen, dispatched, RecordingChannel(0, 1), 4, ragged=True)  # pyright: ignore[reportArgumentType]
    assert (len(found.choice), found.row.tolist()) == (3, [[0, -1], [1, 2], [-1, -1]])


def test_gradients_of_weights_are_summed_in_float32() -> None:
    x, dout = normal((20, 256), (20, 256), dtype=torch.bfloat16)
    weights = torch.ones(20, 2, requires_grad=True)
    chosen, selected = torch.tensor([[0, 1]]).expand(20, -1), torch.ones(20, 2, dtype=torch.bool)
    in_flight = send_to_experts(x, chosen, weights, selected, RecordingChannel(0, 1), 2)  # pyright: ignore[reportArgumentType]
    (found,) = torch.autograd.grad(in_flight.combine(lambda rows, counts: rows), weights, dout)
    # Summed in bfloat16 they would be off by 2e-3.
    assert relative_error(found, (dout.double() * x.double()).sum(-1, keepdim=True).expand(-1, 2)) < 1e-5


def test_sums_over_the_experts_of_a_token_are_rounded_once() -> None:
    """Forward over their outputs, backward over the gradients of their rows: eight in bfloat16, with dropped ones."""
    (x,), per_token = normal((50, 64), dtype=torch.bfloat16), EXPERTS
    scale, weights = normal((EXPERTS, 1), (50, per_token))
    chosen = torch.rand(50, per_token, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    dispatched, x, scale = chosen != chosen[:, :1].roll(1, dims=0), x.requires_grad_(), scale.bfloat16()
    in_flight = send_to_experts(x, chosen, weights.float(), dispatched, RecordingChannel(0, 1), EXPERTS)  # pyright: ignore[reportArgumentType]
    number = torch.cat((torch.arange(EXPERTS).repeat_interleave(in_flight.dispatch.counts), torch.zeros(50).long()))
    out = in_flight.combine(lambda rows, _: rows * scale[number])
    (dout,) = normal((50, 64), dtype=torch.bfloat16)
    (dx,) = torch.autograd.grad(out, x, dout)
    # Each row is rounded as it travels; its sum with others is not before the end.
    factors, kept = weights.float().double(), dispatched.double()
    rows = (x.detach()[:, None] * scale[chosen]).double()  # [T, K, C]
    drows = ((factors[:, :, None] * dout[:, None].double()).bfloat16() * scale[chosen]).double()
    for found, exact in ((out, (factors * kept)[:, :, None] * rows), (dx, kept[:, :, None] * drows)):
        assert (found == exact.sum(dim=1).bfloat16()).double().mean() > 0.99


def test_what_is_not_finite_reaches_no_token_whose_choices_are_dropped() -> None:
    """Nor does a gradient that is not finite: both lie in row 0, that of token 1."""
    x, weights = torch.ones(3, 2, requires_grad=True), torch.ones(3, 2, requires_grad=True)
    dispatched = torch.tensor([[False, False], [True, True], [False, True]])
    channel: Any = RecordingChannel(0, 1)
    in_flight = send_to_experts(x, torch.tensor([[0, 1]] * 3), weights, dispatched, channel, 2)
    poison = torch.ones(6, 1).index_fill(0, torch.tensor([0]), torch.nan)
    out = in_flight.combine(lambda rows, counts: rows * poison)
    dx, dweights = torch.autograd.grad(out.sum(), (x, weights))
    for found in (out, dx):
        assert found.isnan().any(1).tolist() == [False, True, False]
    assert dweights.isnan().tolist() == [[False, False], [True, False], [False, False]]


class Noted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, events: list[str], name: str) -> Tensor:
        ctx.events, ctx.name = events, name
        events.append(name)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.events.append(f"{ctx.name} backward")
        return dout, None, None


def test_computation_between_send_and_combine_overlaps_in_both_passes() -> None:
    channel, x = RecordingChannel(0, 1), torch.ones(4, 2, requires_grad=True)
    chosen, selected = torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1, dtype=torch.bool)
    in_flight = send_to_experts(x, chosen, torch.ones(4, 1), selected, channel, 1)  # pyright: ignore[reportArgumentType]
    overlapped: Tensor = Noted.apply(x, channel.events, "overlapped")  # pyright: ignore[reportAssignmentType]
    out = in_flight.combine(lambda rows, _: Noted.apply(rows, channel.events, "experts"))  # pyright: ignore
    assert channel.events == [
        "send expert_rows", "overlapped", "wait expert_rows", "experts", "send expert_out", "wait expert_out",
    ]  # fmt: skip
    channel.events.clear()
    (out + overlapped).sum().backward()
    assert channel.events == [
        "send expert_out_gradient", "wait expert_out_gradient", "experts backward",
        "send expert_rows_gradient", "overlapped backward", "wait expert_rows_gradient",
    ]  # fmt: skip


TOKENS = 2048


def peak_bytes(tokens: int, hot: bool) -> int:
    """On a rank: the peak bytes of tensors in a forward and a backward pass, above its weights' gradients.

    Each token goes to one expert: to the last, or to each in turn. tokens: of all ranks together.
    """
    channel, width, inner = world_channel(), 16, 64
    experts, tokens_local = EXPERTS // channel.size, tokens // channel.size
    x = torch.randn(tokens_local, width, requires_grad=True)
    weights = torch.rand(tokens_local, 1, requires_grad=True)
    shapes = ((experts, inner, width), (experts, inner, width), (experts, width, inner))
    matrices = gate, up, down = [torch.randn(shape, requires_grad=True) for shape in shapes]
    chosen = torch.full((tokens_local, 1), EXPERTS - 1) if hot else torch.arange(tokens_local)[:, None] % EXPERTS
    selected, dout = torch.ones(tokens_local, 1, dtype=torch.bool), torch.randn(tokens_local, width)
    tracker = MemTracker()
    with mock.patch.object(grouped_loop, "CHUNK_ROWS", 64), tracker:
        in_flight = send_to_experts(x, chosen, weights, selected, channel, EXPERTS)
        out = in_flight.combine(lambda rows, counts: grouped_swiglu(rows, gate, up, down, counts))
        gradients = torch.autograd.grad(out, (x, weights, *matrices), dout)
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    return peak - sum(gradient.nbytes for gradient in gradients[2:])


def test_a_hot_expert_takes_no_more_than_even_ones(ranks: Callable[[int], RankPool]) -> None:
    pool = ranks(1)
    (hot,), (even,) = pool.run(peak_bytes, TOKENS, True), pool.run(peak_bytes, TOKENS, False)
    assert hot <= 1.01 * even


@pytest.mark.parametrize("degree", [1, 2])
def test_bytes_grow_with_tokens_of_a_hot_expert(ranks: Callable[[int], RankPool], degree: int) -> None:
    """On its rank, at most linearly."""
    pool = ranks(degree)
    once, twice, four = (pool.run(peak_bytes, factor * TOKENS, True) for factor in (1, 2, 4))
    for less, more in ((once, twice), (twice, four)):
        assert more[-1] <= 2.01 * less[-1]
    # The last rank receives all rows: at most `degree` times those of even loads.
    assert four[-1] <= degree * 1.01 * pool.run(peak_bytes, 4 * TOKENS, False)[-1]
