"""Write a report of one or several runs, with plots, from their folders: `... RUN_FOLDER [RUN_FOLDER ...] --out NAME`.

Loss over steps, validation bits per byte, and for mixtures of experts how even loads are. A run may be in progress.
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
from farspan.trainer.config import Config
from farspan.trainer.model.flops import matrix_parameters, total_parameters
from farspan.trainer.monitoring.writers import EVALUATION_KEY
from farspan.trainer.state import records
from farspan.trainer.toml_config import load_config

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
NOTES = """Validation bits per byte: of the last evaluation, beside those that the frequencies of tokens alone reach on
its data. Parameters per token: matrices that multiply a token, routers and the output included, and only the experts
that it chooses. Busiest expert: its tokens over the mean of all, averaged over the last {last} steps, in the layer
where that is highest. tokens/s: median of the steps, padding included; minutes: of all steps, without evaluations.
Lines of more than {most} steps are drawn as means of equally many consecutive steps.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """The configuration of a run, and its records of updates and of evaluations, by step."""

    name: str
    config: Config
    updates: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]

    @staticmethod
    def read(folder: Path, name: str) -> "Run":
        """Raise ConfigError where there is no run in the folder, or none that has made a step."""
        path = folder / "metrics.jsonl"
        if not path.is_file():
            raise ConfigError(f"{path} does not exist: name the folder of a run, its run.folder.")
        found = [record for record, _ in records(path)]
        updates = [record for record in found if record.get("loss") is not None]
        if not updates:
            raise ConfigError(f"{path} has no step yet: wait for the first, or name another run.")
        evaluations = [record for record in found if EVALUATION_KEY in record]
        config = load_config(Config, folder / "config.toml")
        return Run(name=name, config=config, updates=updates, evaluations=evaluations)

    @property
    def layers(self) -> list[str]:
        """Layers with experts, as metrics number them."""
        return list(self.updates[-1].get("expert_load", ()))

    def over_steps(self, key: str, layer: str | None = None) -> list[tuple[float, float]]:
        """Return (step, value) of the updates, `layer`'s where there is one for each, as points of a plot."""
        values = [record[key] if layer is None else record[key][layer] for record in self.updates]
        steps = [record["step"] for record in self.updates]
        size = -(-len(values) // MAX_POINTS)
        groups = [slice(first, first + size) for first in range(0, len(values), size)]
        return [(statistics.fmean(steps[group]), statistics.fmean(values[group])) for group in groups]

    def last(self, key: str, layer: str) -> list[float]:
        return [record[key][layer] for record in self.updates[-LAST_STEPS:]]


def report(folders: Sequence[Path], out: Path, facts: Mapping[str, str]) -> list[Path]:
    """Write `out`.md and the plots `out`_KEY.svg; return their paths."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    runs = [Run.read(folder, name) for folder, name in zip(folders, names, strict=True)]
    tables = [_table([_line(run) for run in runs])]
    for run in runs:
        if run.layers:
            table = _table([_expert_line(run, layer) for layer in run.layers])
            tables.append(f"## Experts of {run.name}, last {LAST_STEPS} steps\n\n{table}")
    return write_report(
        out,
        title=" and ".join(run.name for run in runs),
        machine=facts,
        notes=NOTES.format(last=LAST_STEPS, most=MAX_POINTS),
        tables=tables,
        plots={f"_{key}": plot for key, plot in plots_of(runs).items()},
    )


def plots_of(runs: Sequence[Run]) -> dict[str, Plot]:
    """Return the plots, without those that no run has values for, or only 0."""
    evaluated = {run.name: [(record["step"], record["bits_per_byte"]) for record in run.evaluations] for run in runs}
    lines = {
        "loss": ("training loss, nats per token", {run.name: run.over_steps("loss") for run in runs}),
        "validation": ("validation bits per byte", evaluated),
    }
    for key, title in EXPERT_PLOTS.items():
        by_layer = {f"{run.name}, layer {layer}": run.over_steps(key, layer) for run in runs for layer in run.layers}
        lines[key] = (title, by_layer)
    return {
        key: Plot(title=title, series=series, x="step", y=title)
        for key, (title, series) in lines.items()
        if any(y for points in series.values() for _, y in points)
    }


def _table(lines: Sequence[Mapping[str, object]]) -> str:
    return markdown_table(list(lines[0]), [list(line.values()) for line in lines])


def _line(run: Run) -> Mapping[str, object]:
    config, last = run.config, run.updates[-1]
    mechanisms, steps = config.mechanisms(), config.train.steps
    evaluated = "not yet"
    for record in run.evaluations[-1:]:
        unigram = record["unigram_bits_per_byte"]
        evaluated = f"{record['bits_per_byte']:.3f} at step {record['step']:,} (frequencies: {unigram:.3f})"
    loads = [statistics.fmean(run.last("expert_load", layer)) for layer in run.layers]
    return {
        "run": run.name,
        "steps": f"{last['step']:,}{'' if last['step'] >= steps else f' of {steps:,}'}",
        "tokens": last["tokens"],
        "parameters": total_parameters(config.model, mechanisms),
        "parameters per token": matrix_parameters(config.model, mechanisms),
        "validation bits per byte": evaluated,
        "busiest expert": f"{max(loads):.2f}" if loads else "",
        "tokens/s": f"{statistics.median(record['tokens_per_s'] for record in run.updates):,.0f}",
        "minutes": f"{sum(record['step_s'] for record in run.updates) / 60:.1f}",
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
