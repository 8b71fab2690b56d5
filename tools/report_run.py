"""Write a report of one or several runs, with plots, from their folders: `... RUN_FOLDER [RUN_FOLDER ...] --out NAME`.

What differs between their configurations; loss over steps, tokens and time; validation loss, also by position in the
document; for mixtures of experts how even loads are. A run may be in progress.
"""

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from farspan.errors import ConfigError
from farspan.tools.bench.report import Plot, machine_facts, markdown_table, write_report
from farspan.tools.command import parser_of, print_all
from farspan.trainer.config import Config, flat
from farspan.trainer.model.flops import matrix_parameters, total_parameters
from farspan.trainer.monitoring.tags import EVALUATION_KEY
from farspan.trainer.state import records
from farspan.trainer.toml_config import load_config, toml_value

AXES = {"step": "step", "tokens": "labeled tokens", "minutes": "minutes of steps"}
"""What runs are compared over, as records name it, and the label of the axis."""
MAX_POINTS = 300
"""Of a line in a plot: in longer runs each point is the mean of consecutive steps."""
LAST_STEPS = 50
"""The end of a run is described by so many steps, since each step has other documents."""
EXPERT_PLOTS = {
    "expert_load": "tokens of the busiest expert over the mean",
    "expert_entropy": "entropy of the loads, 1 if even",
    "expert_dropped": "share of the choices that was dropped",
    "expert_bias": "range of the biases",
}
NOTES = """Validation loss: nats per token, of the last evaluation. Bits per byte: the same, beside those that the
frequencies of tokens alone reach on its data. Parameters per token: matrices that multiply a token, routers and the
output included, and only the experts that it chooses. Busiest expert: its tokens over the mean of all, averaged over
the last {last} steps, in the layer where that is highest. tokens/s: median of the steps, padding included; minutes: of
all steps, without evaluations and saves. Lines of more than {most} steps are drawn as means of equally many consecutive
steps.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """The configuration of a run, and its records of updates and of evaluations, each with a number for every axis."""

    name: str
    config: Config
    updates: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    earlier: Sequence[Path] = ()
    """Files with the configurations that it had before, each until the step in its name."""

    @staticmethod
    def read(folder: Path, name: str) -> "Run":
        """Raise ConfigError where there is no run in the folder, or none that has made a step."""
        path = folder / "metrics.jsonl"
        if not path.is_file():
            raise ConfigError(f"{path} does not exist: name the folder of a run, its run.folder.")
        updates, evaluations = [], []
        tokens, seconds = 0, 0.0
        for record, _ in records(path):
            tokens, seconds = record.get("tokens", tokens), seconds + record.get("step_s", 0.0)
            placed = record | {"tokens": tokens, "minutes": seconds / 60}
            if record.get("loss") is not None:
                updates.append(placed)
            elif record.get(EVALUATION_KEY) is not None:
                evaluations.append(placed)
        if not updates:
            raise ConfigError(f"{path} has no step yet: wait for the first, or name another run.")
        config, earlier = load_config(Config, folder / "config.toml"), sorted(folder.glob("config_until_step_*.toml"))
        return Run(name=name, config=config, updates=updates, evaluations=evaluations, earlier=earlier)

    @property
    def layers(self) -> list[str]:
        """Layers with experts, as metrics number them."""
        return list(self.updates[-1].get("expert_load", ()))

    def line(self, key: str, layer: str | None = None, *, over: str = "step") -> list[tuple[float, float]]:
        """Return (axis, value) of the updates, `layer`'s where there is one for each, as points of a plot."""
        values = [record[key] if layer is None else record[key][layer] for record in self.updates]
        places = [record[over] for record in self.updates]
        size = -(-len(values) // MAX_POINTS)
        groups = [slice(first, first + size) for first in range(0, len(values), size)]
        return [(statistics.fmean(places[group]), statistics.fmean(values[group])) for group in groups]

    @property
    def sets(self) -> dict[str, str]:
        """How keys of each validation set begin, by the name of its line: those of the data's own have no prefix."""
        keys = self.evaluations[-1] if self.evaluations else {}
        named = [key.removesuffix("_loss_by_position") for key in keys if key.endswith("_loss_by_position")]
        return {self.name: ""} | {f"{self.name}, {name}": f"{name}_" for name in named}

    def evaluated(self, key: str, *, over: str = "step") -> list[tuple[float, float]]:
        """Return (axis, value) of the evaluations that have it."""
        return [(record[over], record[key]) for record in self.evaluations if record.get(key) is not None]

    def last(self, key: str, layer: str) -> list[float]:
        return [record[key][layer] for record in self.updates[-LAST_STEPS:]]


def report(folders: Sequence[Path], out: Path, facts: Mapping[str, str]) -> list[Path]:
    """Write `out`.md and the plots `out`_KEY.svg; return their paths."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    runs = [Run.read(folder, name) for folder, name in zip(folders, names, strict=True)]
    tables = [_table([_line(run) for run in runs])]
    if len(runs) > 1:
        tables.append(f"## What differs between the configurations\n\n{differences(runs)}")
    if positions := _by_position(runs):
        tables.append(f"## Validation loss by position in the document, last evaluation\n\n{positions}")
    for run in runs:
        if run.layers:
            table = _table([_expert_line(run, layer) for layer in run.layers])
            tables.append(f"## Experts of {run.name}, last {LAST_STEPS} steps\n\n{table}")
    changed = {run.name: ", ".join(map(str, run.earlier)) for run in runs if run.earlier}
    return write_report(
        out,
        title=" and ".join(run.name for run in runs),
        machine=facts,
        notes=NOTES.format(last=LAST_STEPS, most=MAX_POINTS),
        tables=tables,
        sections={"Earlier configurations of runs that went on with another": changed},
        plots={f"_{key}": plot for key, plot in plots_of(runs).items()},
    )


def differences(runs: Sequence[Run]) -> str:
    """Return the settings that are not equal in all runs as a table, but for run.folder."""
    settings = [flat(run.config) for run in runs]
    names = dict.fromkeys(name for found in settings for name in found if name != "run.folder")
    rows = [
        [name, *(toml_value(found[name]) if name in found else "" for found in settings)]
        for name in names
        if any(found.get(name) != settings[0].get(name) for found in settings)
    ]
    return markdown_table(["setting", *(run.name for run in runs)], rows) if rows else "Nothing but the folder.\n"


def plots_of(runs: Sequence[Run]) -> dict[str, Plot]:
    """Return the plots, without those that no run has values for, or only 0."""
    plots, sets = {}, [(name, run, prefix) for run in runs for name, prefix in run.sets.items()]
    for axis, label in AXES.items():
        suffix = "" if axis == "step" else f"_by_{axis}"
        losses = {
            name: run.evaluated(f"{prefix}loss" if prefix else EVALUATION_KEY, over=axis) for name, run, prefix in sets
        }
        bits = {name: run.evaluated(f"{prefix}bits_per_byte", over=axis) for name, run, prefix in sets}
        lines = {
            "loss": ("training loss, nats per token", {run.name: run.line("loss", over=axis) for run in runs}),
            "validation_loss": ("validation loss, nats per token", losses),
            "validation": ("validation bits per byte", bits),
        }
        plots |= {f"{key}{suffix}": Plot(title=y, series=found, x=label, y=y) for key, (y, found) in lines.items()}
    # A position's bin is drawn at its end: the most context that a token in it has.
    by_position = {
        name: [(int(where.partition("-")[2]) + 1, loss) for where, loss in found.items()]
        for name, found in losses_by_position(runs).items()
    }
    title = "validation loss by position, last evaluation, nats per token"
    plots["positions"] = Plot(title=title, series=by_position, x="position in the document, up to", y=title, log="x")
    for key, title in EXPERT_PLOTS.items():
        by_layer = {f"{run.name}, layer {layer}": run.line(key, layer) for run in runs for layer in run.layers}
        plots[key] = Plot(title=title, series=by_layer, x=AXES["step"], y=title)
    return {key: plot for key, plot in plots.items() if any(y for points in plot.series.values() for _, y in points)}


def losses_by_position(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Return the last evaluations' losses of the positions "first-last" in a document, by run and validation set."""
    return {
        name: run.evaluations[-1].get(f"{prefix}loss_by_position", {})
        for run in runs
        if run.evaluations
        for name, prefix in run.sets.items()
    }


def _by_position(runs: Sequence[Run]) -> str:
    """Return a table of loss by position, a column for each run and set; empty without an evaluation."""
    found = losses_by_position(runs)
    where = {name: int(name.partition("-")[2]) for losses in found.values() for name in losses}
    rows = [
        [name, *(f"{losses[name]:.4f}" if name in losses else "" for losses in found.values())]
        for name in sorted(where, key=lambda name: where[name])
    ]
    return markdown_table(["positions", *found], rows) if rows else ""


def _table(lines: Sequence[Mapping[str, object]]) -> str:
    return markdown_table(list(lines[0]), [list(line.values()) for line in lines])


def _line(run: Run) -> Mapping[str, object]:
    config, last = run.config, run.updates[-1]
    mechanisms, steps = config.mechanisms(), config.train.steps
    loss, bits = "not yet", ""
    for record in run.evaluations[-1:]:
        loss = f"{record[EVALUATION_KEY]:.4f} at step {record['step']:,}"
        bits = "unknown"
        if record.get("bits_per_byte") is not None:
            bits = f"{record['bits_per_byte']:.3f} (frequencies: {record['unigram_bits_per_byte']:.3f})"
    loads = [statistics.fmean(run.last("expert_load", layer)) for layer in run.layers]
    return {
        "run": run.name,
        "steps": f"{last['step']:,}{'' if last['step'] >= steps else f' of {steps:,}'}",
        "tokens": last["tokens"],
        "parameters": total_parameters(config.model, mechanisms),
        "parameters per token": matrix_parameters(config.model, mechanisms),
        "validation loss": loss,
        "bits per byte": bits,
        "busiest expert": f"{max(loads):.2f}" if loads else "",
        "tokens/s": f"{statistics.median(record['tokens_per_s'] for record in run.updates):,.0f}",
        "minutes": f"{last['minutes']:.1f}",
    }


def _expert_line(run: Run, layer: str) -> Mapping[str, str]:
    keys = ("expert_load", "expert_entropy", "expert_dropped", "expert_bias")
    load, entropy, dropped, bias = (statistics.fmean(run.last(key, layer)) for key in keys)
    return {
        "layer": layer,
        "load, mean": f"{load:.2f}",
        "load, worst": f"{max(run.last('expert_load', layer)):.2f}",
        "entropy": f"{entropy:.3f}",
        "dropped": f"{dropped:.1%}",
        "range of biases": f"{bias:.2f}",
    }


def main(arguments: Sequence[str]) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN_FOLDER", help="has metrics.jsonl and config.toml")
    parser.add_argument("--out", type=Path, help="path and beginning of the files' names; report in the first folder")
    options = parser.parse_args(arguments)
    # Where and how the report was made: runs do not record their machine.
    facts = machine_facts(torch.device("cpu"), "report_run", arguments)
    facts = {name: facts[name] for name in ("date", "commit", "command", "cpu", "torch")}
    return print_all(lambda: report(options.folders, options.out or options.folders[0] / "report", facts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
