"""Contract of recurrences on every backend, in every dtype, against the sum written pair by pair in float64."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from farspan.kernels.linear_attention.state import NO_POSITION, Segment, SequencePosition, State
from farspan.kernels.masks.rows import Rows
from farspan.kernels.merge import accumulation_dtype
from farspan.kernels.recurrent_attention import recurrent_attention_backward, recurrent_attention_forward
from tests.support.mechanisms import normal
from tests.support.oracle import RELATIVE_TOLERANCE, assert_close, relative_error, rms_error

NAMES = ("out", "state", "dq", "dk", "dv", "dstate")


def later_rows(lengths: list[int], first_position: int, padding: int = 0) -> Rows:
    """Documents of which the first has begun before."""
    rows = Rows.packed(lengths, padding=padding)
    return Rows(position=rows.position + first_position * (rows.document == 0).int(), document=rows.document)


ROWS = {
    "one": Rows.packed([333]),
    "one_token": Rows.packed([1]),
    "ragged": Rows.packed([1, 130, 3, 64, 77, 2, 90], padding=5),
    "full_chunks": Rows.packed([256]),
    "tiny_documents": Rows.packed([1 + i % 3 for i in range(200)]),
    "begun_before": later_rows([70, 100], 1000, padding=3),
    "gaps": Rows.packed([160, 700]).take(torch.arange(1, 860, 3)),
    "padding_only": Rows.packed([], padding=9),
    "nothing": Rows.packed([]),
}
HEADS = [(8, 8), (8, 2), (8, 1)]


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
        last: SequencePosition | None = None,
    ) -> "Case":
        """Rates from 0 to such that the next token has forgotten, and a state of the first document at `last`."""
        (query_heads, kv_heads), tokens = heads, len(rows)
        query, kv, state = (tokens, query_heads), (tokens, kv_heads), (query_heads, *dims)
        q, k, v, dout = normal((*query, dims[0]), (*kv, dims[0]), (*kv, dims[1]), (*query, dims[1]), dtype=dtype)
        value, dstate = normal(state, state, seed=1, dtype=accumulation_dtype(dtype))
        rates = torch.tensor([0.0, 1e-3, 0.02, 0.1, 0.5, 2.0, 60.0, 1e6], dtype=torch.float64)[:query_heads]
        segment = Segment.of(rows)
        first = segment.first if segment.tokens else SequencePosition(0, 5)
        before = State(value, last or SequencePosition(first.document, first.position - 2))
        return Case(segment, rates if decay is None else decay, q, k, v, dout, dstate, before)

    def run(self, backend: str) -> list[Tensor]:
        tensors = self.q, self.k, self.v, self.segment, self.decay, self.state
        out, after = recurrent_attention_forward(*tensors, backend=backend)
        assert after.last == (self.segment.last if self.segment.tokens else self.state.last)
        assert after.value.dtype == accumulation_dtype(self.q.dtype)
        return [out, after.value, *recurrent_attention_backward(self.dout, self.dstate, *tensors, backend=backend)]

    def expect(self) -> list[Tensor]:
        leaves = [x.double().requires_grad_() for x in (self.q, self.k, self.v, self.state.value)]
        out, after = formula(*leaves, case=self)
        upstream = self.dout.double(), self.dstate.double()
        gradients = torch.autograd.grad((out, after), leaves, upstream, allow_unused=True, materialize_grads=True)
        return [out.detach(), after.detach(), *gradients]


def formula(q: Tensor, k: Tensor, v: Tensor, before: Tensor, *, case: Case) -> tuple[Tensor, Tensor]:
    """Head by head with a mask of row pairs; the state is a last key that is no row, the state after a last query."""
    last, rows, group = case.state.last, case.segment.rows, q.shape[1] // k.shape[1]
    end = case.segment.last if case.segment.tokens else last
    (document, to), (key_document, of) = with_token(rows, end), with_token(rows, last)
    distance = to[:, None] - of
    mask = (document[:, None] == key_document) & (document >= 0)[:, None] & (distance >= 0)
    outs, afters = [], []
    for head in range(q.shape[1]):
        weight = torch.where(mask, torch.exp(-case.decay[head].double() * distance.clamp(min=0)), 0.0)
        keys, values = k[:, head // group], v[:, head // group]
        of_rows = (weight[:-1, :-1] * (q[:, head] @ keys.t())) @ values
        outs.append(of_rows + weight[:-1, -1:] * (q[:, head] @ before[head]))
        afters.append((keys * weight[-1, :-1, None]).t() @ values + weight[-1, -1] * before[head])
    return torch.stack(outs, dim=1), torch.stack(afters)


def with_token(rows: Rows, token: SequencePosition) -> tuple[Tensor, Tensor]:
    """Documents and positions, with those of one more token."""
    document, position = torch.tensor([token.document]), torch.tensor([token.position])
    return torch.cat((rows.document, document)), torch.cat((rows.position.long(), position))


def check(case: Case, backend: str) -> None:
    assert_close(case.run(backend), case.expect(), RELATIVE_TOLERANCE[case.q.dtype])


class RecurrenceContract:
    """The tests of one backend: each has a file of its own, so that they spread over workers."""

    backend: str

    @pytest.mark.parametrize("dtype", list(RELATIVE_TOLERANCE), ids=str)
    @pytest.mark.parametrize("rows", ROWS)
    def test_equals_the_formula(self, rows: str, dtype: torch.dtype) -> None:
        """The dtypes take turns: together, they meet all rows with each number of heads."""
        turn = list(ROWS).index(rows) + list(RELATIVE_TOLERANCE).index(dtype)
        check(Case.random(ROWS[rows], HEADS[turn % len(HEADS)], dtype=dtype), self.backend)

    @pytest.mark.parametrize(
        "last", [NO_POSITION, SequencePosition(99, 5), SequencePosition(0, 3), SequencePosition(0, 999)]
    )
    def test_a_state_enters_its_own_document_only(self, last: SequencePosition) -> None:
        case = Case.random(ROWS["begun_before"], last=last)
        check(case, self.backend)
        without = Case.random(ROWS["begun_before"], last=NO_POSITION)
        without.state.value.zero_()
        same = relative_error(case.run(self.backend)[0], without.run(self.backend)[0]) == 0
        assert same == (last.document != 0)

    def test_states_that_are_not_finite_stay_in_their_document(self) -> None:
        """The state before enters the first document, the gradient of the state after the last one."""
        case = Case.random(later_rows([20, 70, 23], 50, padding=2), (4, 2), last=SequencePosition(0, 3))
        document = case.segment.rows.document
        out, after, *_, dbefore = case.run(self.backend)
        bad = replace(case, state=State(torch.full_like(case.state.value, torch.nan), case.state.last))
        found = bad.run(self.backend)
        assert torch.equal(found[0][document != 0], out[document != 0])
        assert torch.equal(found[1], after)
        assert found[0][document == 0].isnan().all()
        _, _, dq, dk, dv, _ = case.run(self.backend)
        bad = replace(case, dstate=torch.full_like(case.dstate, torch.nan))
        found = bad.run(self.backend)[2:]
        for got, expected in zip(found[:3], (dq, dk, dv), strict=True):
            assert torch.equal(got[document != 2], expected[document != 2])
        assert found[1][document == 2].isnan().all()
        assert torch.equal(found[3], dbefore)

    @pytest.mark.parametrize("dims", [(16, 16), (40, 24), (64, 64), (96, 128)])
    def test_head_sizes(self, dims: tuple[int, int]) -> None:
        check(Case.random(ROWS["ragged"], (4, 2), dims), self.backend)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize("rate", [0.0, 1e-6, 30.0, 1e3, 1e30])
    def test_any_rate_over_any_distance(self, rate: float, dtype: torch.dtype) -> None:
        """Positions two billion apart: weights are 0 or 1 or between, never infinity times 0."""
        far = Rows(
            position=torch.tensor([0, 1, 2, 10**6, 10**6 + 1, 2 * 10**9], dtype=torch.int32),
            document=torch.zeros(6, dtype=torch.int32),
        )
        decay = torch.tensor([rate], dtype=dtype)
        check(Case.random(far, (1, 1), decay=decay, dtype=dtype, last=NO_POSITION), self.backend)

    @pytest.mark.parametrize("cut", [0, 1, 64, 131, 132, 150, 362, 367])
    def test_two_segments_are_one_with_the_state_passed(self, cut: int) -> None:
        full = Case.random(ROWS["ragged"])
        parts = [slice(0, cut), slice(cut, len(full.segment))]
        segments = [Segment.of(full.segment.rows.slice(part)) for part in parts]
        tensors = [(full.q[part], full.k[part], full.v[part]) for part in parts]
        states, outs = [full.state], []
        for segment, of_part in zip(segments, tensors, strict=True):
            out, after = recurrent_attention_forward(*of_part, segment, full.decay, states[-1], backend=self.backend)
            outs.append(out)
            states.append(after)
        gradients, dstate = [], full.dstate
        for i in (1, 0):
            inputs = *tensors[i], segments[i], full.decay, states[i]
            *gradient, dstate = recurrent_attention_backward(full.dout[parts[i]], dstate, *inputs, backend=self.backend)
            gradients.append(gradient)
        joined = [torch.cat(of_parts[::-1]) for of_parts in zip(*gradients, strict=True)]
        assert_close([torch.cat(outs), states[-1].value, *joined, dstate], full.run(self.backend))

    def test_nothing_leaks_from_later_tokens_or_other_documents(self) -> None:
        rows = Rows.packed([20, 70, 23], padding=2)
        case = Case.random(rows, (4, 2), decay=torch.zeros(4, dtype=torch.float64), last=NO_POSITION)
        out = case.run(self.backend)[0]
        for t in (0, 19, 20, 63, 64, 89, 90, 112, 113):
            i = (rows.document[t], rows.position[t])
            hidden = (rows.document != i[0]) | (rows.position > i[1]) | (rows.document < 0)
            k, v = case.k.clone(), case.v.clone()
            k[hidden] *= 1e6
            v[hidden] -= 50.0
            changed, _ = recurrent_attention_forward(case.q, k, v, case.segment, case.decay, backend=self.backend)
            assert torch.equal(changed[t], out[t])
            only_t = torch.zeros_like(case.dout)
            only_t[t] = case.dout[t]
            _, dk, dv, _ = recurrent_attention_backward(
                only_t, None, case.q, case.k, case.v, case.segment, case.decay, backend=self.backend
            )
            assert not dk[hidden].any()
            assert not dv[hidden].any()
            assert t == 113 or (dk[t].any() and dv[t].any())

    @pytest.mark.parametrize("heads", [(4, 4), (4, 1)])
    def test_half_precision_is_as_exact_as_its_roundings(self, heads: tuple[int, int]) -> None:
        """bfloat16 rounds to 2^-9; sums over 1,500 tokens are float32, so only the rounding of the results is left."""
        case = Case.random(later_rows([1500], 10), heads, dtype=torch.bfloat16)
        exact = {name: x.double() for name, x in vars(case).items() if isinstance(x, Tensor)}
        wide = replace(case, state=State(case.state.value.double(), case.state.last), **exact)
        for name, got, expected in zip(NAMES, case.run(self.backend), wide.run(self.backend), strict=True):
            assert rms_error(got, expected) < 2.0**-9, name

    def test_inputs_need_not_be_contiguous(self) -> None:
        plain = Case.random(ROWS["ragged"])
        turned = {
            name: x.transpose(0, 2).contiguous().transpose(0, 2)
            for name, x in vars(plain).items()
            if isinstance(x, Tensor) and x.dim() == 3
        }
        assert_close(replace(plain, **turned).run(self.backend), plain.run(self.backend))

    def test_inputs_stay_as_they_are_and_autograd_does_not_look_in(self) -> None:
        case = Case.random(ROWS["ragged"])
        tensors = [case.q, case.k, case.v, case.dout, case.dstate, case.state.value, case.decay]
        copies = [x.clone() for x in tensors]
        case.q.requires_grad_()
        assert not any(x.requires_grad for x in case.run(self.backend))
        assert all(torch.equal(x, copy) for x, copy in zip(tensors, copies, strict=True))
