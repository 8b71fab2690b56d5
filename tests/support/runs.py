"""Whole runs on the ranks of a pool, which are connected already: built, loaded, looped and closed as `train` does."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from farspan.parallel.ranks import Ranks
from farspan.trainer import train as module
from farspan.trainer.config import Config
from farspan.trainer.resilience.signals import StopSignal
from farspan.trainer.resilience.watchdog import Watchdog
from farspan.trainer.resolve import resolve
from farspan.trainer.train import _Run


@contextmanager
def built(config: Config, stop: StopSignal | None = None) -> Iterator[_Run]:
    """On a rank: the parts of a run, before anything is loaded."""
    rank, size = dist.get_rank(), dist.get_world_size()
    Path(config.run.folder).mkdir(exist_ok=True)
    resolved = resolve(config, Ranks(rank=rank, world_size=size, local_rank=rank))
    watchdog = Watchdog(config.watchdog, config.run.folder / "stacks", rank)
    with mock.patch.object(module, "peak_flops", return_value=1e10):
        run = _Run(resolved, stop or StopSignal(), watchdog)
    with run:
        yield run


def bits(run: _Run) -> dict[str, str]:
    """On a rank: the hash of every whole tensor that a checkpoint holds, by its name."""
    found = dict(run.model.named_buffers())
    for name, parameter in run.model.named_parameters():
        found |= {
            f"{name}.{key}": value for key, value in {"value": parameter, **run.optimizer.state[parameter]}.items()
        }
    return {name: digest(tensor) for name, tensor in found.items()}


def digest(tensor: torch.Tensor) -> str:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return hashlib.sha256(whole.detach().contiguous().numpy().tobytes()).hexdigest()[:12]


def train_all(config: Config) -> tuple[dict[str, str], dict[str, str]]:
    """On a rank: resume, go on to the last step; return the bits after the load and at the end."""
    with built(config) as run:
        run.load()
        loaded = bits(run)
        run.loop()
        return loaded, bits(run)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
