"""Measure what saving costs the steps of a run, in the background and not, and what verification adds to loading.

Writes JSON and Markdown: `python -m farspan.tools.bench_checkpoint --device cpu`. Ratios are of rounds in one process;
the device keeps the parameters, and a core of the CPU is left to the saving.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from farspan.parallel.mesh import Mesh, ParallelConfig
from farspan.parallel.ranks import Ranks, connected
from farspan.tools.bench import machine
from farspan.tools.bench.files import table_line, write_files
from farspan.tools.bench_attention import device_of
from farspan.tools.command import print_all
from farspan.trainer.build import build_model
from farspan.trainer.checkpoint.checkpointer import Checkpointer
from farspan.trainer.checkpoint.manifest import Manifest
from farspan.trainer.config import CheckpointConfig, Config, DataConfig, RunConfig, TrainConfig
from farspan.trainer.model.config import ModelConfig
from farspan.trainer.optim import OptimizerConfig, build_optimizer
from farspan.trainer.state import TrainState

MATRIX = {"cpu": 512, "cuda": 4096}
"""A step of the run is one product of such matrices, again and again for so many seconds:"""
STEP_S = 0.05
HOW = """{megabytes:,.0f} MB of parameters and optimizer state of one rank, float32, {layers} layers of width {width}.
A round runs the same steps (products of matrices, {steps} of them) without a save, with one that they wait for, and
with one in the background which they begin with; then it reads without verification and loads with it, `stored`: after
the system was told to drop the files from memory, and `cached`; which of both comes first takes turns. Seconds are
medians of {rounds} rounds; `begun`: how long the steps stood still for the background's save. `of all saving`: what the
background's save cost the steps, over what the other cost. `verified`: what verification adds. These are medians of the
rounds' ratios.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """Seconds: of the steps alone, with a save that they wait for, with one in the background and of its beginning; of
    reading without verification, and of loading, which is with it, from the disk and from memory.
    """

    alone: float
    waiting: float
    background: float
    begun: float
    reading_stored: float
    loading_stored: float
    reading_cached: float
    loading_cached: float

    @property
    def of_all_saving(self) -> float:
        """What a save in the background costs the steps, over what one costs that they wait for."""
        return (self.background - self.alone) / (self.waiting - self.alone)

    @property
    def verified_stored(self) -> float:
        """What verification adds to loading from the disk."""
        return self.loading_stored / self.reading_stored - 1

    @property
    def verified_cached(self) -> float:
        """What verification adds to loading from memory."""
        return self.loading_cached / self.reading_cached - 1


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Bench:
    """A model with optimizer state, and steps that use neither."""

    def __init__(self, layers: int, width: int, device: torch.device, folder: Path) -> None:
        heads = width // 64
        model = ModelConfig(
            layers=layers,
            width=width,
            heads=heads,
            kv_heads=heads,
            head_dim=64,
            feed_forward=4 * width,
            vocabulary_size=1024,
        )
        config = Config(
            run=RunConfig(folder=folder),
            model=model,
            data=DataConfig(folder=folder, sequence_tokens=2),
            train=TrainConfig(steps=1, compute_dtype="float32"),
            optimizer=OptimizerConfig(),
            parallel=ParallelConfig(),
        )
        self.model = build_model(config, Mesh.build(config.parallel, device.type), device)
        optimizer = build_optimizer(self.model, config.optimizer)
        self.folder = folder / "checkpoints"
        self.checkpoints = Checkpointer(
            self.folder, self.model, optimizer, identity={}, config=CheckpointConfig(keep=1)
        )
        self.step_number = 0
        self._matrix = torch.randn(MATRIX[device.type], MATRIX[device.type], device=device)
        self._products = 1
        while (once := seconds(self.step)) < STEP_S:
            self._products = max(self._products + 1, round(self._products * min(STEP_S / once, 10)))
        self.save()
        self.steps = max(round(2 * seconds(self.save) / STEP_S), 4)

    def step(self) -> None:
        for _ in range(self._products):
            torch.mm(self._matrix, self._matrix)
        if self._matrix.is_cuda:
            torch.cuda.synchronize()

    def run_steps(self) -> None:
        for _ in range(self.steps):
            self.step()

    def next_state(self) -> TrainState:
        self.step_number += 1
        return TrainState(step=self.step_number)

    def save(self) -> None:
        self.checkpoints.save(self.next_state())

    def round(self) -> Round:
        begun = 0.0

        def in_background() -> None:
            nonlocal begun
            begun = seconds(lambda: self.checkpoints.start_saving(self.next_state()))
            self.run_steps()
            self.checkpoints.finish_saving()

        def waiting() -> None:
            self.save()
            self.run_steps()

        found = {"alone": seconds(self.run_steps), "waiting": seconds(waiting), "background": seconds(in_background)}
        (newest,) = self.folder.glob("step_*")
        kinds = [("reading", self.read), ("loading", self.load)]
        for where in ("stored", "cached"):
            # Each round has two saves. Something outside of this system may keep what was read last.
            for name, work in kinds if self.step_number // 2 % 2 else reversed(kinds):
                found[f"{name}_{where}"] = work(newest, where)
        return Round(**found, begun=begun)

    def read(self, folder: Path, where: str) -> float:
        self._forget(folder, where)
        return seconds(lambda: self.checkpoints.read(folder))

    def load(self, folder: Path, where: str) -> float:
        self._forget(folder, where)
        return seconds(lambda: self.checkpoints.load_latest(TrainState()))

    def _forget(self, folder: Path, where: str) -> None:
        """Have the system drop what it keeps of files in memory, unless that is where they are to be read from."""
        for path in folder.iterdir() if where == "stored" else ():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    @property
    def megabytes(self) -> float:
        (newest,) = self.folder.glob("step_*")
        return Manifest.read(newest).total_bytes / 1e6


def bench(options: argparse.Namespace, command: Sequence[str]) -> Iterable[object]:
    """Measure and write the files; yield lines and paths. Raises ConfigError for options that cannot work."""
    device = device_of(options.device)
    torch.set_num_threads(max((os.cpu_count() or 2) - 1, 1))
    facts = machine.facts(device, command, tool="bench_checkpoint")
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch, connected(Ranks(), device):
        run = Bench(options.layers, options.width, device, Path(scratch))
        run.round()
        rounds = [run.round() for _ in range(options.rounds)]
        how = HOW.format(
            megabytes=run.megabytes, layers=options.layers, width=options.width, steps=run.steps, rounds=options.rounds
        )
    yield from table(rounds)
    out = options.out or machine.default_out(device, "checkpoint")
    texts = {
        f"{out.name}.json": json.dumps([asdict(one) for one in rounds], indent=1) + "\n",
        f"{out.name}.md": markdown(rounds, facts, how),
    }
    yield from write_files(out.parent, texts)


def table(rounds: Sequence[Round]) -> list[str]:
    """Return a line for each quantity: the median, the lowest and the highest of the rounds."""
    lines = [table_line(["", "median", "lowest", "highest"]), table_line(["---"] * 4)]
    names = [*Round.__dataclass_fields__, "of_all_saving", "verified_stored", "verified_cached"]
    for name in names:
        values = [getattr(one, name) for one in rounds]
        shown = (f"{x:.3g}" for x in (statistics.median(values), min(values), max(values)))
        lines.append(table_line([name.replace("_", " "), *shown]))
    return lines


def markdown(rounds: Sequence[Round], facts: Mapping[str, str], how: str) -> str:
    """Return the report as Markdown."""
    head = [f"# Saving beside the steps, and verified loading: {facts.get('gpu') or facts['cpu']}", ""]
    return "\n".join([*head, *(f"- {name}: {value}" for name, value in facts.items()), "", how, *table(rounds), ""])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench_checkpoint", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu", choices=list(MATRIX))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--scratch", type=Path, help="a folder for the checkpoints; that of temporary files, if left out"
    )
    parser.add_argument("--out", type=Path, help="where to write, without suffix; docs/benchmarks/..., if left out")
    command = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(command)
    return print_all(lambda: bench(options, command))


if __name__ == "__main__":
    sys.exit(main())
