"""Measure what saving costs the steps of a run, in the background and not, and what verification adds to loading.

Writes JSON and Markdown: `python -m farspan.tools.bench_checkpoint --device cpu`. Ratios are of rounds in one process;
the device keeps the parameters, and a core of the CPU is left to the saving.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from farspan.parallel.mesh import Mesh, ParallelConfig
from farspan.parallel.ranks import Ranks, connected
from farspan.tools.bench.report import default_out, machine_facts, markdown_table, processor, write_report
from farspan.tools.command import benchmark_parser, device_of, print_all
from farspan.trainer.build import build_model
from farspan.trainer.checkpoint.checkpointer import Checkpointer
from farspan.trainer.checkpoint.manifest import Manifest
from farspan.trainer.config import CheckpointConfig, Config, DataConfig, RunConfig, TrainConfig
from farspan.trainer.engines.fsdp2 import Fsdp2Engine
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
        config = Config(
            run=RunConfig(folder=folder),
            model=ModelConfig(
                layers=layers, width=width, heads=heads, kv_heads=heads, head_dim=64, feed_forward=4 * width,
                vocabulary_size=1024,
            ),
            data=DataConfig(folder=folder, sequence_tokens=2),
            train=TrainConfig(steps=1, compute_dtype="float32"),
            optimizer=OptimizerConfig(),
            parallel=ParallelConfig(),
        )  # fmt: skip
        self.model = build_model(config, Mesh.build(config.parallel, device.type), device)
        engine = Fsdp2Engine(self.model, build_optimizer(self.model, config.optimizer))
        self.folder = folder / "checkpoints"
        keep = CheckpointConfig(keep=1)
        self.checkpoints = Checkpointer(self.folder, engine, identity={}, defaults={}, config=keep)
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

    def newest(self) -> Path:
        (newest,) = self.folder.glob("step_*")
        return newest

    def round(self) -> Round:
        found = {"alone": seconds(self.run_steps), "waiting": seconds(self.save) + seconds(self.run_steps)}
        state = self.next_state()
        begun = seconds(lambda: self.checkpoints.start_saving(state))
        found["background"] = begun + seconds(self.run_steps) + seconds(self.checkpoints.finish_saving)
        found["begun"] = begun
        newest = self.newest()
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


def drop_from_memory(folder: Path) -> None:
    """Tell the system to drop the cached contents of a folder's files."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def table(rounds: Sequence[Round]) -> str:
    """Return a line for each quantity: the median, the lowest and the highest of the rounds."""
    all_rounds = [one | ratios(one) for one in rounds]
    lines = []
    for name in all_rounds[0]:
        values = [one[name] for one in all_rounds]
        lines.append([name.replace("_", " "), statistics.median(values), min(values), max(values)])
    return markdown_table(["", "median", "lowest", "highest"], lines)


def bench(options: argparse.Namespace, arguments: Sequence[str]) -> Iterator[object]:
    """Measure and write the files; yield lines and paths. Raises ConfigError for options that cannot work."""
    device = device_of(options.device)
    torch.set_num_threads(max((os.cpu_count() or 2) - 1, 1))
    facts = machine_facts(device, "bench_checkpoint", arguments)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch, connected(Ranks(), device):
        run = CheckpointBench(options.layers, options.width, device, Path(scratch))
        run.round()
        rounds = [run.round() for _ in range(options.rounds)]
        megabytes = Manifest.read(run.newest()).total_bytes / 1e6
    sizes = {"megabytes": megabytes, "layers": options.layers, "width": options.width, "steps": run.steps}
    yield table(rounds)
    yield from write_report(
        options.out or default_out(facts, "checkpoint"),
        title=f"Saving beside the steps, and verified loading: {processor(facts)}",
        machine=facts,
        notes=NOTES.format(**sizes, rounds=len(rounds)),
        tables=[table(rounds)],
        records=rounds,
    )


def main(arguments: Sequence[str]) -> int:
    parser = benchmark_parser(__doc__)
    parser.set_defaults(rounds=7)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--scratch", type=Path, help="a folder for the checkpoints; that of temporary files by default")
    return print_all(lambda: bench(parser.parse_args(arguments), arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
