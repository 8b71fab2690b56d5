"""What a scan owes on every backend and in every dtype, against the sum written out pair by pair in float64."""

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from farspan.errors import ConfigError
from farspan.kernels.backend import BACKENDS, Backend
from farspan.kernels.linear_attention.segment import NOWHERE, Segment, SequencePosition
from farspan.kernels.linear_attention.state import State, empty_state, merge_states
from farspan.kernels.masks.rows import Rows
from farspan.kernels.merge import accumulation_dtype
from farspan.kernels.planning.plan import Plan
from farspan.kernels.recurrent_attention import recurrent_attention_backward, recurrent_attention_forward
from tests.support.oracle import RELATIVE_TOLERANCE, relative_error, rms_error

CPU = torch.device("cpu")
DTYPES = list(RELATIVE_TOLERANCE)
ABLE = [
    n
    for n in BACKENDS
    if BACKENDS.get(n).unsupported_reason(CPU) is None and BACKENDS.get(n).scan_unsupported_reason() is None
]
HEADS = [(8, 8), (8, 2), (8, 1)]
NAMES = ("out", "state", "dq", "dk", "dv", "dstate")


def later_rows(lengths: list[int], first_position: int, padding: int = 0) -> Rows:
    """Documents of which the first has begun before."""
    rows = Rows.packed(lengths, padding=padding)
    return Rows(position=rows.position + first_position * (rows.document == 0).int(), document=rows.document)


ROWS = {
    "one": Rows.packed([333]),
    "one_token": Rows.packed([1]),
    "ragged": Rows.packed([1, 130, 3, 64, 77, 2, 90], padding=5),
    "whole_chunks": Rows.packed([256]),
    "tiny_documents": Rows.packed([1 + i % 3 for i in range(200)]),
    "begun_before": later_rows([70, 100], 1000, padding=3),
    "gaps": Rows.packed([160, 700]).take(torch.arange(1, 860, 3)),
    "padding_only": Rows.packed([], padding=9),
    "nothing": Rows.packed([]),
}


@dataclass(frozen=True)
class Case:
    segment: Segment
    decay: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dstate: Tensor
    state: State

    @staticmethod
    def random(
        rows: Rows,
        heads: tuple[int, int] = (8, 2),
        dims: tuple[int, int] = (16, 8),
        dtype: torch.dtype = torch.float64,
        decay: Tensor | None = None,
        place: SequencePosition | None = None,
    ) -> "Case":
        """Rates from 0 to such that the next token has forgotten, and a state of the first document at `place`."""
        generator, tokens = torch.Generator().manual_seed(3), len(rows)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        rates = torch.tensor([0.0, 1e-3, 0.02, 0.1, 0.5, 2.0, 60.0, 1e6], dtype=torch.float64)[: heads[0]]
        value, dstate = (draw(heads[0], *dims).to(accumulation_dtype(dtype)) for _ in range(2))
        segment = Segment.of(rows)
        first = segment.first if segment.tokens else SequencePosition(0, 5)
        return Case(
            segment=segment,
            decay=rates if decay is None else decay,
            q=draw(tokens, heads[0], dims[0]).to(dtype),
            k=draw(tokens, heads[1], dims[0]).to(dtype),
            v=draw(tokens, heads[1], dims[1]).to(dtype),
            dout=draw(tokens, heads[0], dims[1]).to(dtype),
            dstate=dstate,
            state=State(value, place or SequencePosition(first.document, first.position - 2)),
        )

    def run(self, backend: str) -> list[Tensor]:
        tensors = self.q, self.k, self.v, self.segment, self.decay, self.state
        out, left = recurrent_attention_forward(*tensors, backend=backend)
        assert left.place == (self.segment.last if self.segment.tokens else self.state.place)
        assert left.value.dtype == accumulation_dtype(self.q.dtype)
        return [out, left.value, *recurrent_attention_backward(self.dout, self.dstate, *tensors, backend=backend)]

    def expect(self) -> list[Tensor]:
        leaves = [x.double().requires_grad_() for x in (self.q, self.k, self.v, self.state.value)]
        out, left = formula(leaves[0], leaves[1], leaves[2], leaves[3], self)
        gradients = torch.autograd.grad(
            (out, left),
            leaves,
            (self.dout.double(), self.dstate.double()),
            allow_unused=True,
            materialize_grads=True,
        )
        return [out.detach(), left.detach(), *gradients]


def formula(q: Tensor, k: Tensor, v: Tensor, before: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """Head by head with a mask of row pairs; the state is a last key that is no row, the state left a last query."""
    place, rows, group = case.state.place, case.segment.rows, q.shape[1] // k.shape[1]
    end = case.segment.last if case.segment.tokens else place
    to = [*zip(rows.document.tolist(), rows.position.tolist(), strict=True), tuple(end)]
    of = [*zip(rows.document.tolist(), rows.position.tolist(), strict=True), tuple(place)]
    distance = torch.tensor([i[1] for i in to]).double()[:, None] - torch.tensor([j[1] for j in of])
    sees = torch.tensor([[i[0] == j[0] >= 0 and i[1] >= j[1] for j in of] for i in to])
    outs, lefts = [], []
    for head in range(q.shape[1]):
        weight = torch.where(sees, torch.exp(-case.decay[head] * distance.clamp(min=0)), 0.0)
        keys, values = k[:, head // group], v[:, head // group]
        of_rows = (weight[:-1, :-1] * (q[:, head] @ keys.t())) @ values
        outs.append(of_rows + weight[:-1, -1:] * (q[:, head] @ before[head]))
        lefts.append((keys * weight[-1, :-1, None]).t() @ values + weight[-1, -1] * before[head])
    return torch.stack(outs, dim=1), torch.stack(lefts)


def check(case: Case, backend: str) -> None:
    tolerance = RELATIVE_TOLERANCE[case.q.dtype]
    errors = {name: relative_error(a, b) for name, a, b in zip(NAMES, case.run(backend), case.expect(), strict=True)}
    assert max(errors.values()) <= tolerance, errors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("backend", ABLE)
def test_equals_the_formula(backend: str, rows: str, heads: tuple[int, int], dtype: torch.dtype) -> None:
    check(Case.random(ROWS[rows], heads, dtype=dtype), backend)


@pytest.mark.parametrize("place", [NOWHERE, SequencePosition(99, 5), SequencePosition(0, 3), SequencePosition(0, 999)])
@pytest.mark.parametrize("backend", ABLE)
def test_a_state_enters_its_own_document_only(backend: str, place: SequencePosition) -> None:
    case = Case.random(ROWS["begun_before"], place=place)
    check(case, backend)
    without = Case.random(ROWS["begun_before"], place=NOWHERE)
    without.state.value.zero_()
    same = relative_error(case.run(backend)[0], without.run(backend)[0]) == 0
    assert same == (place.document != 0)


@pytest.mark.parametrize("dims", [(16, 16), (40, 24), (64, 64), (96, 128)])
@pytest.mark.parametrize("backend", ABLE)
def test_head_sizes(backend: str, dims: tuple[int, int]) -> None:
    check(Case.random(ROWS["ragged"], (4, 2), dims), backend)


@pytest.mark.parametrize("tokens", [63, 64, 65, 2047, 2048, 2049, 2112, 2113])
def test_lengths_around_chunks_and_blocks(tokens: int) -> None:
    case = Case.random(Rows.packed([tokens // 3, tokens - tokens // 3]), (2, 1), (8, 4), decay=torch.tensor([0.0, 0.1]))
    for name, got, expected in zip(NAMES, case.run("cpu"), case.run("reference"), strict=True):
        assert relative_error(got, expected) <= 1e-12, name


def test_thousands_of_tiny_documents() -> None:
    """5,000 documents, written out one by one; rates of 0 let anything that leaks through."""
    lengths = [1 + i % 4 for i in range(5_000)]
    rows = Rows.packed(lengths)
    case = Case.random(rows, (2, 1), (8, 4), decay=torch.zeros(2, dtype=torch.float64), place=NOWHERE)
    out = case.run("cpu")[0]
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    for document in (0, 1, 31, 32, 2_499, 4_998, 4_999):
        of = slice(starts[document], starts[document + 1])
        mine = case.q[of].transpose(0, 1) @ case.k[of].expand(-1, 2, -1).permute(1, 2, 0)
        expected = mine.tril() @ case.v[of].expand(-1, 2, -1).transpose(0, 1)
        assert relative_error(out[of].transpose(0, 1), expected) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rate", [0.0, 1e-6, 30.0, 1e3, 1e30])
@pytest.mark.parametrize("backend", ABLE)
def test_any_rate_over_any_distance(backend: str, rate: float, dtype: torch.dtype) -> None:
    """Positions two billion apart: weights are 0 or 1 or between, never infinity times 0."""
    far = Rows(
        position=torch.tensor([0, 1, 2, 10**6, 10**6 + 1, 2 * 10**9], dtype=torch.int32),
        document=torch.zeros(6, dtype=torch.int32),
    )
    check(Case.random(far, (1, 1), decay=torch.tensor([rate], dtype=dtype), dtype=dtype, place=NOWHERE), backend)


@pytest.mark.parametrize("cut", [0, 1, 64, 131, 132, 150, 362, 367])
@pytest.mark.parametrize("backend", ABLE)
def test_two_stretches_are_one_with_the_state_passed(backend: str, cut: int) -> None:
    whole = Case.random(ROWS["ragged"])
    out, state, dq, dk, dv, dbefore = whole.run(backend)
    parts = [slice(0, cut), slice(cut, len(whole.segment))]
    stretches = [Segment.of(whole.segment.rows.slice(part)) for part in parts]
    tensors = [(whole.q[part], whole.k[part], whole.v[part]) for part in parts]
    states, outs = [whole.state], []
    for segment, of_part in zip(stretches, tensors, strict=True):
        part_out, left = recurrent_attention_forward(*of_part, segment, whole.decay, states[-1], backend=backend)
        outs.append(part_out)
        states.append(left)
    gradients, dstate = [], whole.dstate
    for number in (1, 0):
        *gradient, dstate = recurrent_attention_backward(
            whole.dout[parts[number]],
            dstate,
            *tensors[number],
            stretches[number],
            whole.decay,
            states[number],
            backend=backend,
        )
        gradients.append(gradient)
    got = [torch.cat(outs), states[-1].value]
    got += [torch.cat(of_parts[::-1]) for of_parts in zip(*gradients, strict=True)] + [dstate]
    for name, a, b in zip(NAMES, got, (out, state, dq, dk, dv, dbefore), strict=True):
        assert relative_error(a, b) <= RELATIVE_TOLERANCE[torch.float64], name


@pytest.mark.parametrize("backend", ABLE)
def test_merged_states_are_the_state_of_one_scan(backend: str) -> None:
    """What context parallelism stands on: stretches on their own, also empty ones, then their states merged."""
    case = Case.random(ROWS["ragged"], place=NOWHERE)
    state = empty_state(8, 16, 8, like=case.q)
    cuts = [0, 40, 40, 131, 140, 200, 360, 366, 369, 372]
    for start, stop in pairwise(cuts):
        part = slice(start, stop)
        segment = Segment.of(case.segment.rows.slice(part))
        _, left = recurrent_attention_forward(
            case.q[part], case.k[part], case.v[part], segment, case.decay, backend=backend
        )
        state = merge_states(state, left, case.decay)
        tokens = min(stop, case.segment.tokens)
        so_far = Segment.of(case.segment.rows.slice(slice(0, tokens)))
        _, expected = recurrent_attention_forward(
            case.q[:tokens], case.k[:tokens], case.v[:tokens], so_far, case.decay, backend=backend
        )
        assert state.place == expected.place
        assert relative_error(state.value, expected.value) <= RELATIVE_TOLERANCE[torch.float64]


@pytest.mark.parametrize("backend", ABLE)
def test_nothing_leaks_from_later_tokens_or_other_documents(backend: str) -> None:
    rows = Rows.packed([20, 70, 23], padding=2)
    case = Case.random(rows, (4, 2), decay=torch.zeros(4, dtype=torch.float64), place=NOWHERE)
    out = case.run(backend)[0]
    for t in (0, 19, 20, 63, 64, 89, 90, 112, 113):
        i = (rows.document[t], rows.position[t])
        hidden = (rows.document != i[0]) | (rows.position > i[1]) | (rows.document < 0)
        k, v = case.k.clone(), case.v.clone()
        k[hidden] *= 1e6
        v[hidden] -= 50.0
        changed, _ = recurrent_attention_forward(case.q, k, v, case.segment, case.decay, backend=backend)
        assert torch.equal(changed[t], out[t])
        only_t = torch.zeros_like(case.dout)
        only_t[t] = case.dout[t]
        _, dk, dv, _ = recurrent_attention_backward(
            only_t, None, case.q, case.k, case.v, case.segment, case.decay, backend=backend
        )
        assert not dk[hidden].any()
        assert not dv[hidden].any()
        assert t == 113 or (dk[t].any() and dv[t].any())


@pytest.mark.parametrize("heads", [(4, 4), (4, 1)])
@pytest.mark.parametrize("backend", ABLE)
def test_half_precision_is_as_exact_as_its_roundings(backend: str, heads: tuple[int, int]) -> None:
    """bfloat16 rounds to 2^-9; sums over 1,500 tokens are float32, so only the rounding of the results is left."""
    case = Case.random(later_rows([1500], 10), heads, dtype=torch.bfloat16)
    exact = {name: x.double() for name, x in vars(case).items() if isinstance(x, Tensor)}
    state = State(case.state.value.double(), case.state.place)
    wide = Case(segment=case.segment, state=state, **exact)
    for name, got, expected in zip(NAMES, case.run(backend), wide.run(backend), strict=True):
        assert rms_error(got, expected) < 2.0**-9, name


@pytest.mark.parametrize("backend", ABLE)
def test_inputs_need_not_be_contiguous(backend: str) -> None:
    plain = Case.random(ROWS["ragged"])
    turned = {
        name: x.transpose(0, 2).contiguous().transpose(0, 2)
        for name, x in vars(plain).items()
        if isinstance(x, Tensor) and x.dim() == 3
    }
    for a, b in zip(plain.run(backend), Case(**{**vars(plain), **turned}).run(backend), strict=True):
        assert relative_error(b, a) <= RELATIVE_TOLERANCE[torch.float64]


@pytest.mark.parametrize("backend", ABLE)
def test_inputs_stay_as_they_are_and_autograd_does_not_look_in(backend: str) -> None:
    case = Case.random(ROWS["ragged"])
    tensors = [case.q, case.k, case.v, case.dout, case.dstate, case.state.value, case.decay]
    copies = [x.clone() for x in tensors]
    case.q.requires_grad_()
    assert not any(x.requires_grad for x in case.run(backend))
    assert all(torch.equal(x, copy) for x, copy in zip(tensors, copies, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(5, 4, 8), "k": torch.zeros(5, 3, 8), "v": torch.zeros(5, 3, 8)}, "4 query heads cannot"),
        ({"k": torch.zeros(5, 2, 4)}, "a scan wants q"),
        ({"v": torch.zeros(4, 2, 8)}, "the stretch has 5 rows|a scan wants q"),
        ({"segment": Segment.of(Rows.packed([6]))}, "the stretch has 6 rows"),
        ({"q": torch.zeros(5, 4, 8).double()}, "one dtype"),
        ({"decay": torch.zeros(3)}, "for each of 4 query heads"),
        ({"decay": torch.tensor([1.0, 1.0, -0.1, 1.0])}, "a finite rate of decay, 0 or more"),
        ({"decay": torch.tensor([1.0, 1.0, math.nan, 1.0])}, "a finite rate of decay, 0 or more"),
        ({"decay": torch.tensor([1.0, 1.0, math.inf, 1.0])}, "a finite rate of decay, 0 or more"),
        ({"state": State(torch.zeros(4, 8, 7), NOWHERE)}, "a state of"),
        ({"state": State(torch.zeros(4, 8, 8).double(), NOWHERE)}, "a state of"),
        ({"state": State(torch.zeros(4, 8, 8), SequencePosition(0, 0))}, "not before the stretch"),
        ({"dout": torch.zeros(5, 4, 7)}, "dout"),
        ({"dstate": torch.zeros(4, 8, 7)}, "dstate"),
    ],
)
def test_bad_inputs_are_refused(change: dict, message: str) -> None:
    given = {
        "dout": torch.zeros(5, 4, 8),
        "dstate": None,
        "q": torch.zeros(5, 4, 8),
        "k": torch.zeros(5, 2, 8),
        "v": torch.zeros(5, 2, 8),
        "segment": Segment.of(Rows.packed([5])),
        "decay": torch.ones(4),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        recurrent_attention_backward(**given, backend="reference")


class SoftmaxOnly(Backend):
    rank = 50

    def unsupported_reason(self, device: torch.device) -> str | None:
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        raise AssertionError

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        raise AssertionError


def test_a_backend_that_cannot_scan_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS._parts, "softmax_only", SoftmaxOnly())
    case = Case.random(ROWS["one"])
    with pytest.raises(ConfigError, match=r"attention\.backend='softmax_only' cannot run a recurrent mechanism: it "):
        recurrent_attention_forward(case.q, case.k, case.v, case.segment, case.decay, backend="softmax_only")
