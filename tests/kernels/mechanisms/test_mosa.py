"""MoSA's choice against the published description, one document and head at a time."""

import pytest
import torch
from torch import Tensor

from farspan.kernels.kinds.token_choice import Candidates, ChosenTokens, TokenRouting
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanisms.mosa import MoSA
from farspan.kernels.planner import Heads, Sizes
from farspan.kernels.routing.ranking import best_in_groups
from farspan.kernels.sequence_attention import plan_sequence_attention
from tests.support.lifetimes import documents

LENGTHS = [1, 40, 2, 7, 90, 64]


def expected(logits: Tensor, rows: Rows, mosa: MoSA) -> Tensor:
    chosen = torch.zeros(logits.shape, dtype=torch.bool)
    for members in documents(rows):
        for head in range(logits.shape[1]):
            scores = logits[members, head].tolist()
            if mosa.include_first:
                scores[0] = float("inf")
            if mosa.causal_choice:
                for t, row in enumerate(members):
                    better = sum(score >= scores[t] for score in scores[:t])
                    chosen[row, head] = better < max((t + 1) // mosa.sparsity, 1)
            else:
                count = min(max(len(members) // mosa.sparsity, 2), len(members))
                best = sorted(range(len(members)), key=lambda t: (-scores[t], t))[:count]
                chosen[[members[t] for t in best], head] = True
    return chosen


@pytest.mark.parametrize("sparsity", [1, 3, 16])
@pytest.mark.parametrize("include_first", [True, False])
@pytest.mark.parametrize("causal_choice", [True, False])
def test_the_best_tokens_of_each_document_are_chosen(sparsity: int, include_first: bool, causal_choice: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    packed = Rows.packed(LENGTHS, padding=6)
    mosa = MoSA(sparsity=sparsity, include_first=include_first, causal_choice=causal_choice)
    for rows in (packed, packed.take(torch.randperm(len(packed), generator=generator))):
        logits = torch.randn(len(rows), 3, generator=generator)
        logits[:, 2] = logits[:, 2].round()  # ties
        candidates, wanted = Candidates.of(rows), expected(logits, rows, mosa)
        assert torch.equal(mosa.choose(logits, candidates), wanted)
        if mosa.counts_are_known:
            ranks = mosa.choose(torch.zeros(len(rows), 1), candidates)[candidates.index, 0].nonzero().squeeze(1)
            best = best_in_groups(mosa.scores(logits, candidates).t(), candidates.first, ranks)
            assert [candidates.index[places].tolist() for places in best] == [
                [token for token in candidates.index.tolist() if wanted[token, head]] for head in range(3)
            ]


def test_a_causal_choice_takes_about_as_many() -> None:
    rows, logits = Rows.packed([20_000]), torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0))
    counts = MoSA(sparsity=16, causal_choice=True).choose(logits, Candidates.of(rows)).sum(dim=0)
    assert (counts - 1250).abs().max() < 150


def test_a_sparsity_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="sparsity=0 must be at least 1"):
        MoSA(sparsity=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_what_is_collected_counts_as_work(dtype: torch.dtype) -> None:
    """q, k, v and out of the tokens that heads choose, for the estimate of memory: 10 of 40 in each of 2 KV heads."""
    rows, heads, mosa = Rows.packed([40]), Heads(query=6, kv=2), MoSA(sparsity=4)
    planned = plan_sequence_attention(mosa, rows, heads, range(6), backend="cpu")
    routing = mosa.sample_routing(rows, heads)
    assert isinstance(routing, TokenRouting)
    found = planned.composition(Sizes.of(dtype, 16, 8), lambda: routing)
    collected = [torch.empty(10, n, width, dtype=dtype) for n, width in ((6, 16), (2, 16), (2, 8), (6, 8))]
    assert len(ChosenTokens.of(routing.chosen, rows).rows) == 2 * 10
    assert found.working_bytes == sum(x.nbytes for x in collected)
