"""The cost model: what it says of cases that are known, and that `auto` follows it."""

import pytest
import torch

from farspan.kernels.mechanism import Heads, Mechanism
from farspan.kernels.mechanisms.dense import Dense
from farspan.kernels.mechanisms.lightning import Lightning
from farspan.kernels.mechanisms.moba import MoBA
from farspan.kernels.mechanisms.window import Window
from farspan.kernels.rows import Rows
from farspan.kernels.selection import Selection
from farspan.parallel.choice import typical_choice
from farspan.parallel.cost import BACKWARD_FLOPS, SAMPLED, Job, Machine, compare, predict, strategy_for
from farspan.parallel.layout import Shards
from farspan.parallel.simulation import Unconnected
from farspan.parallel.strategy import STRATEGIES, Sample, Sizes

FAST = Machine(flops_per_s=1e14, inner_bytes_per_s=2e11, outer_bytes_per_s=2e10, node_ranks=8)


def job(
    mechanism: Mechanism, degree: int, *, heads: Heads | None = None, layout: str = "zigzag", width: int = 1
) -> Job:
    rows = Rows.packed([1 << 16])
    return Job(
        mechanism=mechanism,
        shards=Shards.deal(rows, layout=layout, degree=degree, work=mechanism.visible_keys),
        heads=heads or Heads(query=32, kv=8),
        sizes=Sizes.of(torch.bfloat16, 128, 128),
        width=width,
    )


def test_computing_is_the_visible_pairs_of_the_busiest_rank() -> None:
    """Dense causal, 8 ranks: zigzag has an eighth each; of contiguous ranks the last has (2 - 1/8) of that."""
    pairs = (1 << 16) * ((1 << 16) + 1) / 2
    even = predict("ring", job(Dense(), 8), FAST)
    assert even.flops == pytest.approx(2 * (128 + 128) * pairs * 32 / 8, rel=1e-6)
    assert even.compute_s == pytest.approx(even.flops * (1 + BACKWARD_FLOPS) / FAST.flops_per_s)
    assert even.balance == pytest.approx(1, abs=1e-3)
    assert predict("ring", job(Dense(), 8, layout="contiguous"), FAST).balance == pytest.approx(2 - 1 / 8, abs=1e-3)
    assert predict("ulysses", job(Dense(), 8, layout="contiguous"), FAST).balance == pytest.approx(1)


def test_time_is_the_longer_of_computing_and_what_is_hidden_and_all_that_is_not() -> None:
    ring, ulysses = (predict(name, job(Dense(), 8), FAST) for name in ("ring", "ulysses"))
    assert (ring.exposed_s, ulysses.hidden_s) == (0, 0)
    assert ring.seconds == pytest.approx(ring.compute_s)
    assert ulysses.seconds == pytest.approx(ulysses.compute_s + ulysses.exposed_s)
    sent = ring.volume.forward + ring.volume.backward
    assert ring.hidden_s == pytest.approx(sent / FAST.inner_bytes_per_s)
    # Sixteen ranks span two nodes, and links between these are slow.
    far = predict("ring", job(Dense(), 16), FAST)
    assert far.hidden_s == pytest.approx((far.volume.forward + far.volume.backward) / FAST.outer_bytes_per_s)
    # Two rings send one chunk in eight between nodes.
    double = predict("double_ring", job(Dense(), 16, width=8), FAST)
    assert double.volume == far.volume
    assert double.hidden_s < far.hidden_s / 3


@pytest.mark.parametrize(
    ("mechanism", "degree", "layout", "best"),
    [
        (Window(window=1024), 8, "contiguous", "fetch"),
        (Lightning(), 8, "contiguous", "state"),
        (Dense(), 1, "contiguous", "single"),
    ],
)
def test_the_best_is_the_expected(mechanism: Mechanism, degree: int, layout: str, best: str) -> None:
    slow = Machine(flops_per_s=1e14, inner_bytes_per_s=1e9, outer_bytes_per_s=1e9, node_ranks=8)
    costs, refusals = compare([(job(mechanism, degree, layout=layout), 4)], slow)
    assert next(iter(costs)) == best
    assert costs.keys() | refusals.keys() == set(STRATEGIES)
    assert costs[best].seconds == min(cost.seconds for cost in costs.values()) or degree == 1


def test_layers_add_up() -> None:
    """Seven layers of a recurrence beside one that moves keys: each under the strategy that serves it."""
    layers = [(job(Lightning(layer=1, layers=8), 8), 7), (job(Dense(), 8), 1)]
    costs, _ = compare(layers, FAST)
    alone = predict("state", layers[0][0], FAST).seconds * 7 + predict("ring", layers[1][0], FAST).seconds
    assert costs["ring"].seconds == pytest.approx(alone)
    assert costs["ring"].volume.forward == (
        7 * predict("state", layers[0][0], FAST).volume.forward + predict("ring", layers[1][0], FAST).volume.forward
    )


def test_recurrences_have_a_strategy_of_their_own_where_keys_travel() -> None:
    heads = Heads(query=8, kv=8)
    assert strategy_for("ring", Lightning(), heads, 4, 1) == "state"
    assert strategy_for("ulysses", Lightning(), heads, 4, 1) == "ulysses"
    assert strategy_for("ring", Dense(), heads, 4, 1) == "ring"
    assert strategy_for("state", Dense(), heads, 4, 1) == "state"
    assert strategy_for("single", Lightning(), heads, 4, 1) == "single"


def test_what_is_chosen_of_a_long_sequence_is_drawn_for_some_queries() -> None:
    """What `ship` moves is what all would, to a few per cent; `fetch` is taken to need all that may be chosen."""
    mechanism, heads, rows = MoBA(block=128, top_k=3), Heads(query=2, kv=2), Rows.packed([1 << 14])
    shards = Shards.deal(rows, layout="contiguous", degree=4)
    sizes, sample = Sizes.of(torch.bfloat16, 64, 64), typical_choice(mechanism, rows, heads, most=SAMPLED)
    every = typical_choice(mechanism, rows, heads)
    assert isinstance(sample, Sample)
    assert sample.one_in == 8
    assert isinstance(every, Selection)
    for strategy, chosen, bound in (("ship", every, 0.05), ("fetch", None, 0.0)):
        planned = STRATEGIES.get(strategy)(Unconnected(3, 4)).prepare(mechanism, shards, heads, backend="cpu")
        expected = planned.volume(sizes, chosen).forward
        assert planned.volume(sizes, sample).forward == pytest.approx(expected, rel=bound)
