"""docs/device_costs.md: what a layer asks of the host and of the device, as tables that tests compare with."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from tests.support.pretend_cuda.cells import Cell
from tests.support.pretend_cuda.counts import DEVICE_WORK, Counts, Kind, Part
from tests.support.pretend_cuda.long import Layers
from tests.support.pretend_cuda.step import Stepped
from tests.support.sources import ROOT

RECORD = ROOT / "docs" / "device_costs.md"
PASSES = (Part.FORWARD, Part.BACKWARD)
INTRODUCTION = """\
# What a layer costs the host and the device

Counted without a GPU, on tensors that say `cuda:0` and compute on a CPU (`tests/support/pretend_cuda/`). Tests fail
where a count exceeds this record; `make device-costs` writes it. *Waits* are synchronizations: the host stops until the
device has done all that it was given. Copies to the host, and from pageable memory, make it wait too. *Forward* and
*backward* are operations: kernels, copies and fills, whatever their size. Times are those of Python and NumPy between
operations, in milliseconds of one core; launching the operations comes on top. Each number is of a layer after the
first one of a sequence, which asks for no more: what a sequence needs once, its plans and their tables, a thread makes
and copies ahead, on a stream of its own, and computes nothing on the device. Tests hold that, too.
"""
LONG_INTRODUCTION = """\
## One layer of attention over 131,072 tokens

bfloat16, one rank, 32:8 heads of 128; one document, but 125 for `dense_packed` and 16 for neighborhoods. The last four
are documents of 8,192 blocks, the first of them of 1,048,576 tokens, and of 4,224 blocks in 67,584 tokens.
"""
STEPS_INTRODUCTION = """
## A training step of every mechanism and strategy

Two layers, two documents and some padding, FSDP2. *All else* is the rest of a step of both layers: their other parts,
the loss, clipping, AdamW.
"""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """The columns of a row; times are not compared."""

    waits: int
    to_host: int
    pageable: int
    forward: int
    backward: int
    forward_ms: float
    backward_ms: float
    else_waits: int = 0
    else_copies: int = 0
    else_operations: int = 0

    def excess(self, limit: "Costs") -> dict[str, str]:
        """Return what counts more than in `limit`."""
        names = [field.name for field in fields(self) if not field.name.endswith("_ms")]
        pairs = {name: (getattr(self, name), getattr(limit, name)) for name in names}
        return {name: f"{value} > {most}" for name, (value, most) in pairs.items() if value > most}

    @staticmethod
    def most(costs: "Sequence[Costs]") -> "Costs":
        return Costs(**{field.name: max(getattr(one, field.name) for one in costs) for field in fields(Costs)})


def costs_of_step(ranks: Sequence[Stepped]) -> Costs:
    """Return the most of any rank."""
    return Costs.most([_costs(of.counts, of.counts.later_number) for of in ranks])


def costs_of_layer(layers: Layers) -> Costs | None:
    """Return None for a layer that waits for values, and cannot be counted to its end."""
    return _costs(layers.second, layers.second.number) if layers.waits is None else None


def _costs(counts: Counts, number: Callable[..., int]) -> Costs:
    times = {part: 1000 * min(counts.host_s[part]) for part in PASSES}
    return Costs(
        waits=sum(number(part, Kind.SYNC) for part in PASSES),
        to_host=sum(number(part, Kind.TO_HOST) for part in PASSES),
        pageable=sum(number(part, Kind.PAGEABLE) for part in PASSES),
        forward=number(Part.FORWARD, *DEVICE_WORK),
        backward=number(Part.BACKWARD, *DEVICE_WORK),
        forward_ms=round(times[Part.FORWARD], 1),
        backward_ms=round(times[Part.BACKWARD], 1),
        else_waits=counts.number(Part.REST, Kind.SYNC),
        else_copies=counts.number(Part.REST, Kind.TO_HOST, Kind.PAGEABLE),
        else_operations=counts.number(Part.REST, *DEVICE_WORK),
    )


Row = tuple[str, ...]
"""Cells of a table that say what was counted, and at which backend."""
WAITED = "(waits for values)"
HEAD = "waits | to the host | pageable | forward | backward | forward ms | backward ms"


def write(path: Path, layers: Mapping[str, Layers], steps: Mapping[Cell, Sequence[Stepped]]) -> None:
    lines = [INTRODUCTION, LONG_INTRODUCTION, f"| mechanism | backend | {HEAD} |", "|---|---|" + "--:|" * 7]
    for name, of in layers.items():
        lines.append(_line((name, of.backend), costs_of_layer(of), 7))
    lines += [
        STEPS_INTRODUCTION,
        f"| model | strategy | ranks | recompute | backend | {HEAD} | all else: waits | copies | operations |",
        "|---|---|--:|---|---|" + "--:|" * 10,
    ]
    for cell, ranks in steps.items():
        lines.append(_line((*cell.key, ranks[0].backend), costs_of_step(ranks), 10))
    path.write_text("\n".join(lines) + "\n")


def _line(row: Row, costs: Costs | None, width: int) -> str:
    values = [WAITED] + [""] * (width - 1) if costs is None else [f"{value:,}" for value in astuple(costs)[:width]]
    return f"| {' | '.join((*row, *values))} |"


def read(path: Path = RECORD) -> dict[Row, Costs | None]:
    """Return the costs of each row, by its names without the backend; None for a layer that waits for values."""
    found: dict[Row, Costs | None] = {}
    for line in path.read_text().splitlines():
        parts = [part.strip() for part in line.strip("|").split("|")]
        names = len(parts) - (10 if len(parts) > 10 else 7)
        if line.startswith("| ") and parts[0] not in ("mechanism", "model"):
            values = [float(part.replace(",", "")) for part in parts[names:] if part not in ("", WAITED)]
            found[tuple(parts[: names - 1])] = _from(values) if values else None
    return found


def _from(values: Sequence[float]) -> Costs:
    of: dict[str, Any] = dict(zip((field.name for field in fields(Costs)), values, strict=False))
    return Costs(**{name: value if name.endswith("_ms") else int(value) for name, value in of.items()})
