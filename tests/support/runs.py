"""Whole runs on the ranks of a pool, which are connected already."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from farspan.parallel.ranks import Ranks
from farspan.trainer import metrics
from farspan.trainer import train as module
from farspan.trainer.checkpoint.checkpointer import Checkpointer
from farspan.trainer.config import Config
from farspan.trainer.engines.engine import Engine
from farspan.trainer.model.transformer import Transformer
from farspan.trainer.resilience.signals import StopSignal
from farspan.trainer.resolve import Resolved
from farspan.trainer.state import TrainState


@dataclass
class Parts:
    """What `train` keeps to itself; asks_requeue: what it returns."""

    engine: Engine = field(init=False)
    state: TrainState = field(init=False)
    asks_requeue: bool = False

    @property
    def model(self) -> Transformer:
        return self.engine.model

    def bits(self) -> dict[str, str]:
        """The hash of every full tensor that a checkpoint has, by its name; a collective call."""
        state = self.engine.state()
        tensors = {f"{name}.value": tensor for name, tensor in state["model"].items()}
        for name, moments in state["optimizer"].items():
            tensors |= {f"{name}.{key}": value for key, value in moments.items()}
        return {name: digest(tensor) for name, tensor in tensors.items()}


def run(
    config: Config, *, stop: StopSignal | None = None, after_load: Callable[[Parts], object] = lambda parts: None
) -> Parts:
    """On a rank: `train` as under torchrun; `after_load` is called before the first step."""
    parts, build, load = Parts(), module.build_checkpointer, module.load
    rank, size = dist.get_rank(), dist.get_world_size()

    def keep_and_build(resolved: Resolved, engine: Engine) -> Checkpointer:
        parts.engine = engine
        return build(resolved, engine)

    def keep_and_load(config: Config, engine: Engine, checkpoints: Checkpointer, state: TrainState) -> None:
        load(config, engine, checkpoints, state)
        parts.state = state
        after_load(parts)

    with (
        mock.patch.object(module, "connected"),
        mock.patch.object(metrics, "peak_flops", return_value=1e10),
        mock.patch.object(module, "build_checkpointer", keep_and_build),
        mock.patch.object(module, "load", keep_and_load),
    ):
        ranks = Ranks(rank=rank, world_size=size, local_rank=rank)
        parts.asks_requeue = module.train(config, ranks, stop or StopSignal())
    return parts


def digest(tensor: torch.Tensor) -> str:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return hashlib.sha256(full.detach().contiguous().numpy().tobytes()).hexdigest()[:12]


def train_all(config: Config) -> tuple[dict[str, str], dict[str, str]]:
    """On a rank: resume, go on to the last step; return the bits after the load and at the end."""
    loaded: dict[str, str] = {}
    parts = run(config, after_load=lambda parts: loaded.update(parts.bits()))
    return loaded, parts.bits()


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps(folder: Path, kind: str) -> list[int]:
    """The steps of the records that have a key `kind`."""
    return [record["step"] for record in records(folder) if kind in record]


class AskedWhen(StopSignal):
    """A stop request that comes when a condition holds."""

    def __init__(self, condition: Callable[[], bool], *, is_preempted: bool = False) -> None:
        super().__init__()
        self.condition, self._preemption_warning = condition, is_preempted

    @property
    def requested(self) -> bool:
        return self.condition()


def asked_at_poll(number: int, *, is_preempted: bool = False) -> AskedWhen:
    """The first polls are after connecting, building and loading."""
    polls = count(1)
    return AskedWhen(lambda: next(polls) >= number, is_preempted=is_preempted)


def run_alone(config: Config, stop: StopSignal | None = None) -> bool:
    """A run in this process, as without torchrun; return what `train` returns."""
    torch.manual_seed(0)
    asks_requeue = module.train(config, Ranks(), stop or StopSignal())
    assert not dist.is_initialized()
    return asks_requeue
