"""The test of training steps on some ranks; see tests/pretend_cuda, whose files take about equal time."""

from collections.abc import Callable
from functools import partial

import pytest

from tests.support.pretend_cuda.cells import Cell, cells
from tests.support.pretend_cuda.counts import HOST_WAITS, Part
from tests.support.pretend_cuda.pool import PretendPools
from tests.support.pretend_cuda.record import costs_of_step, read
from tests.support.pretend_cuda.step import LAYERS, take_step


def steps_test(ranks: int) -> Callable[..., None]:
    @pytest.mark.parametrize("cell", [cell for cell in cells() if cell.ranks == ranks], ids=str)
    def costs_no_more_than_recorded(pretend_ranks: PretendPools, cell: Cell) -> None:
        stepped = pretend_ranks(ranks).run(partial(take_step, cell.all_settings, on_device=True))
        recorded = read().get(cell.key)
        assert recorded is not None, f"{cell} is not in docs/device_costs.md: run `make device-costs`"
        assert costs_of_step(stepped).excess(recorded) == {}
        if ranks == 1:
            # The record is of later layers: neither the plan of a sequence nor its first layer waits.
            (of,) = stepped
            assert of.planned.waiting(*Part) + of.counts.waiting(Part.FORWARD, Part.BACKWARD) == []
        if cell.strategy in ("fetch", "ship") and cell.name != "mosa":
            # A layer's choice tells the host how much is sent, once: recomputation and backward use what was planned.
            for of in stepped:
                assert of.counts.number(Part.FORWARD, *HOST_WAITS) <= LAYERS
                assert of.counts.waiting(Part.BACKWARD) == []

    return costs_no_more_than_recorded
