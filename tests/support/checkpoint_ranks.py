"""Steps of checkpoint tests on each rank: save and load a sharded model whose contents follow from a number."""

import logging
from collections.abc import Sequence
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from farspan.parallel.mesh import Mesh
from farspan.trainer.build import build_model
from farspan.trainer.checkpoint.checkpointer import Checkpointer
from farspan.trainer.checkpoint.identity import identity_defaults, resume_identity
from farspan.trainer.config import Config
from farspan.trainer.engines.fsdp2 import Fsdp2Engine
from farspan.trainer.optim import build_optimizer
from farspan.trainer.state import TrainState

Bits = dict[str, torch.Tensor]


class RankState:
    """One rank's model, optimizer and checkpointer."""

    def __init__(self, config: Config, fingerprint: str = "data") -> None:
        self.model = build_model(config, Mesh.build(config.parallel, "cpu"), torch.device("cpu"))
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.folder = config.run.folder / "checkpoints"
        self.checkpoints = Checkpointer(
            self.folder,
            Fsdp2Engine(self.model, self.optimizer),
            identity=resume_identity(config, fingerprint),
            defaults=identity_defaults(config),
            config=config.checkpoint,
        )

    def update(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number * 2 + dist.get_rank())
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
            local = parameter.grad.to_local()  # pyright: ignore[reportAttributeAccessIssue]
            local.copy_(torch.randn(local.shape, generator=generator, dtype=local.dtype))
        self.optimizer.step()

    def bits(self) -> Bits:
        """This rank's shards of everything in a checkpoint."""
        shards = {}
        for name, parameter in self.model.named_parameters():
            moments = self.optimizer.state[parameter]
            for key, value in {"value": parameter, **moments}.items():
                shards[f"{name}.{key}"] = (value.to_local() if isinstance(value, DTensor) else value).detach().clone()
        return shards


def state_of(step: int) -> TrainState:
    return TrainState(step=step, sequences=2 * step, tokens=100 * step)


def save(config: Config, steps: Sequence[int]) -> list[Bits]:
    """On a rank: save these steps; return the bits of each."""
    rank, saved = RankState(config), []
    for step in steps:
        rank.update(step)
        rank.checkpoints.save(state_of(step))
        saved.append(rank.bits())
    return saved


def load(config: Config, fingerprint: str = "data") -> tuple[str | None, TrainState, Bits, Any]:
    """On a rank: load into a model of other contents; return folder name, state, bits and weight decays."""
    rank, state = RankState(config, fingerprint), TrainState()
    rank.update(77)
    folder = rank.checkpoints.load_latest(state)
    return folder and folder.name, state, rank.bits(), [group["weight_decay"] for group in rank.optimizer.param_groups]


def walk_back(config: Config) -> tuple[str | None, Bits, list[str]]:
    """On a rank: load; return the folder's name, the bits and the log lines of skipped checkpoints."""
    log, records = logging.getLogger("farspan"), BufferingHandler(1000)
    level = log.level
    log.addHandler(records)
    log.setLevel(logging.INFO)
    try:
        folder, _, bits, _ = load(config)
    finally:
        log.removeHandler(records)
        log.setLevel(level)
    lines = [record.getMessage() for record in records.buffer]
    return folder, bits, [line for line in lines if line.startswith("skipped")]


def same_bits(one: Bits, other: Bits) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(path: Path, position: int) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
