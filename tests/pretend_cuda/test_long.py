"""Layers of attention over 131,072 tokens on a device without memory."""

import pytest

from tests.support.pretend_cuda.counts import Kind, Part
from tests.support.pretend_cuda.long import Layers, long_cases, long_layers, target_of
from tests.support.pretend_cuda.pool import PretendPools
from tests.support.pretend_cuda.record import costs_of_layer, read

WAITING: set[str] = set()
"""Layers that look at values that only the device has."""
FAR: set[str] = set()
"""Cases that miss their target."""


@pytest.fixture(scope="module")
def layers(pretend_ranks: PretendPools) -> dict[str, Layers]:
    return pretend_ranks(1).run(long_layers)[0]


def test_layers_cost_no_more_than_recorded(layers: dict[str, Layers]) -> None:
    recorded, found = read(), {name: costs_of_layer(of) for name, of in layers.items()}
    assert found.keys() <= {name for name, *_ in recorded}, "run `make device-costs`"
    assert {name for name, costs in found.items() if costs is None} == WAITING
    limits = {name: recorded[name,] for name in found}
    excess = {
        name: costs.excess(limit) for name, costs in found.items() if costs and (limit := limits[name]) is not None
    }
    assert not any(excess.values()), {name: of for name, of in excess.items() if of}


def test_a_sequence_is_planned_ahead_of_its_first_layer(layers: dict[str, Layers]) -> None:
    """By copies alone: the first layer asks the device for no more than the second."""
    for name, of in layers.items():
        assert of.planned.number(Part.REST, *Kind) == of.planned.number(Part.REST, Kind.PINNED) > 0, name
        assert +of.first.events == +of.second.events, name


def test_layers_reach_their_target(layers: dict[str, Layers]) -> None:
    """No wait, no copy to the host or from pageable memory, and few operations; cases that do are in no list above."""
    missed = set()
    for name, case in long_cases().items():
        costs, (forward, backward) = costs_of_layer(layers[name]) if name in layers else None, target_of(case)
        if (
            costs is None
            or costs.waits + costs.to_host + costs.pageable
            or costs.forward > forward
            or costs.backward > backward
        ):
            missed.add(name)
    assert missed == FAR
