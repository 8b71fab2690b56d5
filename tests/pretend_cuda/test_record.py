"""The record of costs is complete, and its cells are runs that farspan would start."""

from pathlib import Path

from farspan.parallel.mesh import Degrees
from farspan.trainer.validate import validate
from tests.support.pretend_cuda.cells import cells
from tests.support.pretend_cuda.counts import Counts, Kind, Part
from tests.support.pretend_cuda.long import Layers, long_cases
from tests.support.pretend_cuda.record import RECORD, Costs, read, write
from tests.support.pretend_cuda.step import Stepped, config_of


def test_every_cell_is_recorded() -> None:
    recorded = set(read(RECORD))
    assert {names for names in recorded if len(names) > 1} == {cell.key for cell in cells()}
    assert {name for name, *rest in recorded if not rest} <= long_cases().keys()


def test_experts_wait_once_a_layer_at_most() -> None:
    """Recomputation included: a step copies its loss and the loads of experts to the host, two layers a size each."""
    waits = {
        names: costs.else_waits + costs.else_copies
        for names, costs in read(RECORD).items()
        if costs is not None and names[0].startswith("experts")
    }
    assert len(waits) == 8
    assert {names: count for names, count in waits.items() if count > 2 + 2} == {}


def test_cells_are_valid() -> None:
    for cell in cells():
        config = config_of(*cell.all_settings)
        validate(config, Degrees.resolve(config.parallel, cell.ranks))


def counts(layers: int) -> Counts:
    """Each forward pass waits once, each backward pass copies; the first of each does so twice. All else waits once."""
    made = Counts()
    made.add(Kind.SYNC, "item")
    for part, kind in ((Part.FORWARD, Kind.SYNC), (Part.BACKWARD, Kind.PAGEABLE)):
        for layer in range(layers):
            with made.in_part(part):
                for _ in range(1 if layer else 2):
                    made.add(kind, "some")
        made.host_s[part] = [0.0005] * layers
    return made


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path, cell = tmp_path / "costs.md", cells()[0]
    stepped = Stepped(loss=0.0, gradients={}, backend="cuda", planned=Counts(), counts=counts(layers=3))
    layers = Layers(backend="triton", planned=Counts(), first=Counts(), second=counts(layers=1), waits=None)
    waiting = Layers(backend="triton", planned=Counts(), first=Counts(), second=Counts(), waits="waits for it")
    write(path, {"dense": layers, "moba": waiting}, {cell: [stepped]})
    of_layer = Costs(waits=2, to_host=0, pageable=2, forward=0, backward=2, forward_ms=0.5, backward_ms=0.5)
    of_step = Costs(
        waits=1, to_host=0, pageable=1, forward=0, backward=1, forward_ms=0.5, backward_ms=0.5, else_waits=1
    )
    assert read(path) == {("dense",): of_layer, ("moba",): None, cell.key: of_step}
    assert of_layer.excess(of_step) == {"waits": "2 > 1", "pageable": "2 > 1", "backward": "2 > 1"}
