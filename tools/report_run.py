"""Write a report of one or several runs, with plots, from their folders: `... RUN_FOLDER [RUN_FOLDER ...] --out NAME`.

Loss over steps, held-out bits per byte, and for mixtures of experts how even loads are. A run may still be in progress.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from farspan.errors import ConfigError
from farspan.tools.bench import machine
from farspan.tools.bench.files import table_line, write_files
from farspan.tools.bench.plot import linear
from farspan.tools.command import print_all
from farspan.trainer.config import Config
from farspan.trainer.metrics import EVALUATION_KEY
from farspan.trainer.model.flops import matrix_parameters, total_parameters
from farspan.trainer.state import records
from farspan.trainer.toml_config import load_config

MOST_POINTS = 300
"""Of a line in a plot: of longer runs each point is the mean over a stretch of steps."""
LAST_STEPS = 50
"""What is said of the end of a run is over so many steps, since each step has other documents."""
EXPERT_PLOTS = {
    "expert_load": "tokens of the busiest expert over the mean",
    "expert_entropy": "entropy of the loads, 1 if even",
    "expert_dropped": "part of the choices that was dropped",
    "expert_bias": "range of the biases",
}
COLUMNS = (
    "run", "steps", "tokens", "parameters", "of these for each token", "held-out bits per byte", "busiest expert",
    "tokens/s", "minutes",
)  # fmt: skip
EXPERT_COLUMNS = ("layer", "load, mean", "load, worst", "entropy", "dropped", "range of biases")
HOW = """Held-out bits per byte: of the last evaluation, and of its data what the frequencies of tokens alone reach.
Parameters for each token: matrices that multiply it, routers and the output included, of experts those that it chooses.
Busiest expert: its tokens over the mean of all, mean over the last {last} steps, of the layer where that is highest.
tokens/s: median of the steps, padding included; minutes: of all steps, evaluations left out.
Lines of more than {most} steps are drawn as means over stretches of equally many.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What a folder tells of a run: its configuration, and records of updates and of evaluations, by step."""

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
        return Run(
            name=name,
            config=load_config(Config, folder / "config.toml"),
            updates=updates,
            evaluations=evaluations,
        )

    @property
    def layers(self) -> list[str]:
        """Layers with experts, as metrics number them."""
        return list(self.updates[-1].get("expert_load", ()))

    def over_steps(self, key: str, layer: str | None = None) -> list[tuple[float, float]]:
        """Return (step, value) of the updates, `layer`'s where there is one for each, as points of a plot."""
        values = [record[key] if layer is None else record[key][layer] for record in self.updates]
        steps = [record["step"] for record in self.updates]
        size = -(-len(values) // MOST_POINTS)
        stretches = [slice(first, first + size) for first in range(0, len(values), size)]
        return [(statistics.fmean(steps[part]), statistics.fmean(values[part])) for part in stretches]

    def last(self, key: str, layer: str) -> list[float]:
        """Return what a layer had in the last steps."""
        return [record[key][layer] for record in self.updates[-LAST_STEPS:]]


def report(folders: Sequence[Path], out: Path, facts: Mapping[str, str]) -> list[Path]:
    """Write `out`.md and the plots `out`_WHAT.svg; return their paths."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    runs = [Run.read(folder, name) for folder, name in zip(folders, names, strict=True)]
    plots = {f"{out.name}_{what}.svg": (title, text) for what, (title, text) in plots_of(runs).items()}
    images = {name: title for name, (title, _) in plots.items()}
    texts = {f"{out.name}.md": markdown(runs, images, facts)} | {name: text for name, (_, text) in plots.items()}
    return write_files(out.parent, texts)


def plots_of(runs: Sequence[Run]) -> dict[str, tuple[str, str]]:
    """Return the title and the SVG text of each plot; none of what no run has, or what is 0 in all."""
    lines = {"loss": ("training loss, nats per token", {run.name: run.over_steps("loss") for run in runs})}
    evaluated = {run.name: [(record["step"], record["bits_per_byte"]) for record in run.evaluations] for run in runs}
    lines["validation"] = ("held-out bits per byte", evaluated)
    for key, title in EXPERT_PLOTS.items():
        by_layer = {f"{run.name}, layer {layer}": run.over_steps(key, layer) for run in runs for layer in run.layers}
        lines[key] = (title, by_layer)
    return {
        what: (title, linear(series, title, x_label="step", y_label=title))
        for what, (title, series) in lines.items()
        if any(y for points in series.values() for _, y in points)
    }


def markdown(runs: Sequence[Run], images: Mapping[str, str], facts: Mapping[str, str]) -> str:
    """Return the report; images: the titles of plots beside it, by file name."""
    lines = [f"# {' and '.join(run.name for run in runs)}", "", *(f"- {name}: {said}" for name, said in facts.items())]
    lines += ["", *_table(COLUMNS, map(_row, runs)), "", HOW.format(last=LAST_STEPS, most=MOST_POINTS)]
    for run in runs:
        if run.layers:
            lines += [f"## Experts of {run.name}, last {LAST_STEPS} steps", ""]
            lines += [*_table(EXPERT_COLUMNS, (_expert_row(run, layer) for layer in run.layers)), ""]
    lines += ["## Over steps", "", *(f"![{title}]({name})\n" for name, title in images.items())]
    return "\n".join(lines)


def _row(run: Run) -> Sequence[str]:
    config, last = run.config, run.updates[-1]
    mechanisms, steps = config.mechanisms(), config.train.steps
    evaluated = [
        f"{record['bits_per_byte']:.3f} at step {record['step']:,} (frequencies: {record['unigram_bits_per_byte']:.3f})"
        for record in run.evaluations[-1:]
    ]
    loads = [statistics.fmean(run.last("expert_load", layer)) for layer in run.layers]
    return (
        run.name,
        f"{last['step']:,}{'' if last['step'] >= steps else f' of {steps:,}'}",
        f"{last['tokens']:,}",
        f"{total_parameters(config.model, mechanisms):,}",
        f"{matrix_parameters(config.model, mechanisms):,}",
        *(evaluated or ["not yet"]),
        f"{max(loads):.2f}" if loads else "",
        f"{statistics.median(record['tokens_per_s'] for record in run.updates):,.0f}",
        f"{sum(record['step_s'] for record in run.updates) / 60:.1f}",
    )


def _expert_row(run: Run, layer: str) -> Sequence[str]:
    loads = run.last("expert_load", layer)
    entropy, dropped, bias = (
        statistics.fmean(run.last(key, layer)) for key in ("expert_entropy", "expert_dropped", "expert_bias")
    )
    return (
        layer,
        f"{statistics.fmean(loads):.2f}",
        f"{max(loads):.2f}",
        f"{entropy:.3f}",
        f"{dropped:.1%}",
        f"{bias:.2f}",
    )


def _table(columns: Sequence[str], rows: Iterator[Sequence[str]]) -> Iterator[str]:
    return map(table_line, (columns, ["---"] * len(columns), *rows))


def facts_of(arguments: Sequence[str]) -> dict[str, str]:
    """Return where and how the report was made: runs do not record their machine."""
    found = machine.facts(torch.device("cpu"), arguments, tool="report_run")
    return {name: found[name] for name in ("date", "commit", "command", "cpu", "torch")}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN_FOLDER", help="has metrics.jsonl and config.toml")
    parser.add_argument("--out", type=Path, help="path and beginning of the files' names; report in the first folder")
    options = parser.parse_args(arguments)
    out = options.out or options.folders[0] / "report"
    return print_all(lambda: report(options.folders, out, facts_of(arguments)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
