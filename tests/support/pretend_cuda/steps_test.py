"""The test of training steps on some ranks; see tests/pretend_cuda, whose files take about equal time."""

from collections.abc import Callable
from functools import partial

import pytest

from tests.support.pretend_cuda.cells import Cell, cells
from tests.support.pretend_cuda.counts import DEVICE_WORK, HOST_WAITS, Kind, Part
from tests.support.pretend_cuda.pool import PretendPools
from tests.support.pretend_cuda.record import costs_of_step, read
from tests.support.pretend_cuda.step import LAYERS, Stepped, take_step


def check_first_layer(of: Stepped, *, plans_layers: bool, recomputes: bool) -> None:
    """Check that a thread has planned the sequence, by copies alone, and that nothing is left for the first layer.

    plans_layers: whether layers are planned by what they choose, or the first one by what it exchanges with others.
    """
    assert of.planned.waiting(*Part) == []
    assert of.planned.number(Part.REST, *Kind) == of.planned.number(Part.REST, Kind.PINNED) > 0
    for part in (Part.FORWARD, Part.BACKWARD):
        assert of.counts.first_number(part, Kind.PINNED) <= of.counts.later_number(part, Kind.PINNED)
        if not plans_layers:
            assert of.counts.waiting(part) == []
            assert of.counts.number(part, Kind.PINNED) == 0
            # A second pass of the same layer chooses nothing again.
            if not recomputes:
                assert of.counts.first_number(part, *DEVICE_WORK) <= of.counts.later_number(part, *DEVICE_WORK)


def attention_launches(of: Stepped) -> int:
    kernels = {"forward_kernel", "gathered_forward_kernel"}
    return sum(n for e, n in of.counts.events.items() if e.part is Part.FORWARD and e.name in kernels)


def steps_test(ranks: int) -> Callable[..., None]:
    @pytest.mark.parametrize("cell", [cell for cell in cells() if cell.ranks == ranks], ids=str)
    def costs_no_more_than_recorded(pretend_ranks: PretendPools, cell: Cell) -> None:
        stepped = pretend_ranks(ranks).run(partial(take_step, cell.all_settings, on_device=True))
        recorded = read().get(cell.key)
        assert recorded is not None, f"{cell} is not in docs/device_costs.md: run `make device-costs`"
        assert costs_of_step(stepped).excess(recorded) == {}
        plans_layers = cell.strategy in ("fetch", "ship") or recorded.to_host > 0
        for of in stepped:
            check_first_layer(of, plans_layers=plans_layers, recomputes=cell.recompute != "none")
        if cell.strategy in ("fetch", "ship") or cell.name == "mosa":
            # A layer's choice tells the host how much is sent, once: recomputation and backward use what was planned.
            for of in stepped:
                assert of.counts.number(Part.FORWARD, *HOST_WAITS) <= LAYERS
                assert of.counts.waiting(Part.BACKWARD) == []
            if recorded.to_host and cell.name != "mosa":
                # Some ranks choose what others have: a layer attends to that besides its own keys.
                assert any(attention_launches(of) >= 2 * LAYERS for of in stepped)

    return costs_no_more_than_recorded
