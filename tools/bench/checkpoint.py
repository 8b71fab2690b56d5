"""The benchmark of checkpoints: what saving costs the steps of a run, and what verification adds to loading."""

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from farspan.parallel.mesh import Mesh, ParallelConfig
from farspan.tools.bench.report import Report, Table
from farspan.tools.bench.run import Record
from farspan.trainer.build import build_model
from farspan.trainer.checkpoint.checkpointer import Checkpointer
from farspan.trainer.checkpoint.manifest import Manifest
from farspan.trainer.config import CheckpointConfig, Config, DataConfig, RunConfig, TrainConfig
from farspan.trainer.model.config import ModelConfig
from farspan.trainer.optim import OptimizerConfig, build_optimizer
from farspan.trainer.state import TrainState

MATRIX = {"cpu": 512, "cuda": 4096}
"""A step of the run multiplies such matrices again and again for STEP_S."""
STEP_S = 0.05
NOTES = """{megabytes:,.0f} MB of parameters and optimizer state of one rank, float32, {layers} layers of width {width}.
A round runs the same steps, {steps} of them, each products of matrices: `alone`, without a save; `waiting`, after a
save that they wait for; `background`, beside a save that starts with them; `begun` is how long they stood still until
it had started. Then it reads without verification and loads with it: `stored` after the system dropped the
files from memory, and `cached`; the two take turns in going first. Seconds are medians of {rounds} rounds.
`of all saving`: the cost of the background's save to the steps over that of the save they wait for. `verified`: what
verification adds. These are medians of the rounds' ratios.
"""

Round = dict[str, float]
"""Seconds, by the names in NOTES."""


def ratios(one: Round) -> Round:
    """Return the ratios of a round's seconds."""
    return {
        "of_all_saving": (one["background"] - one["alone"]) / (one["waiting"] - one["alone"]),
        "verified_stored": one["loading_stored"] / one["reading_stored"] - 1,
        "verified_cached": one["loading_cached"] / one["reading_cached"] - 1,
    }


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class CheckpointBench:
    """A model with optimizer state, and steps that use neither: the device keeps the parameters."""

    def __init__(self, layers: int, width: int, device: torch.device, folder: Path) -> None:
        heads = width // 64
        model = ModelConfig(
            layers=layers, width=width, heads=heads, kv_heads=heads, head_dim=64, feed_forward=4 * width,
            vocabulary_size=1024,
        )  # fmt: skip
        config = Config(
            run=RunConfig(folder=folder),
            model=model,
            data=DataConfig(folder=folder, sequence_tokens=2),
            train=TrainConfig(steps=1, compute_dtype="float32"),
            optimizer=OptimizerConfig(),
            parallel=ParallelConfig(),
        )
        self.layers, self.width = layers, width
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
        found["begun"] = begun
        (newest,) = self.folder.glob("step_*")
        kinds = {
            "reading": lambda: self.checkpoints.read(newest),
            "loading": lambda: self.checkpoints.load_latest(TrainState()),
        }
        for source in ("stored", "cached"):
            found |= {f"{kind}_{source}": 0.0 for kind in kinds}  # the order of the records
            # Each round has two saves. Something outside of this system may keep what was read last.
            for kind in kinds if self.step_number // 2 % 2 else reversed(kinds):
                if source == "stored":
                    drop_from_memory(newest)
                found[f"{kind}_{source}"] = seconds(kinds[kind])
        return found

    @property
    def megabytes(self) -> float:
        (newest,) = self.folder.glob("step_*")
        return Manifest.read(newest).total_bytes / 1e6

    def report(self, rounds: Sequence[Round], machine: Mapping[str, str]) -> Report:
        sizes = {"megabytes": self.megabytes, "layers": self.layers, "width": self.width, "steps": self.steps}
        records: list[Record] = [dict(one) for one in rounds]
        return Report(
            title=f"Saving beside the steps, and verified loading: {machine.get('gpu') or machine['cpu']}",
            machine=machine,
            notes=NOTES.format(**sizes, rounds=len(rounds)),
            tables=[table(rounds)],
            records=records,
        )


def drop_from_memory(folder: Path) -> None:
    """Tell the system to drop the cached contents of a folder's files."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def table(rounds: Sequence[Round]) -> Table:
    """Return a line for each quantity: the median, the lowest and the highest of the rounds."""
    all_rounds = [one | ratios(one) for one in rounds]
    lines = []
    for name in all_rounds[0]:
        values = [one[name] for one in all_rounds]
        lines.append([name.replace("_", " "), statistics.median(values), min(values), max(values)])
    return Table(columns=["", "median", "lowest", "highest"], lines=lines)
