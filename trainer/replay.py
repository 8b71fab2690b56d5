"""The batch of the step at which a run gave up: written to a folder, and computed again from there."""

import logging
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn
from zipfile import BadZipFile

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from farspan.errors import ConfigError, TrainingError
from farspan.parallel.mesh import Mesh
from farspan.trainer.batch import BatchBuilder, DataLoader
from farspan.trainer.checkpoint.checkpointer import Checkpointer
from farspan.trainer.config import Config
from farspan.trainer.data.packing import PackedSequence
from farspan.trainer.engines.fsdp2 import Fsdp2Engine
from farspan.trainer.model.transformer import Transformer
from farspan.trainer.resilience.agreement import on_first_rank, raise_on_all_ranks
from farspan.trainer.state import TrainState
from farspan.trainer.step import train_step

BATCH_FILE = "batch.npz"
PARTS = ("tokens", "labels", "position", "document")
MAX_SHOWN = 4

log = logging.getLogger("farspan")


def give_up(config: Config, data: DataLoader, checkpoints: Checkpointer, state: TrainState, reason: str) -> NoReturn:
    """Write the batch of the last step, which was skipped for `reason`, and a checkpoint; raise TrainingError."""
    folder = Path(config.run.folder) / "failed_batch" / f"step_{state.step:08d}"
    on_first_rank(lambda: write_batch(folder, data.sequences(state.sequences - config.train.sequences_per_step)))
    checkpoints.save(state)
    setting = shlex.quote(f"run.replay={folder}")
    raise TrainingError(
        f"{state.skipped_in_a_row} steps in a row had to be skipped, the last, {state.step}, because {reason}: compute "
        f"its batch again with {setting}, lower optimizer.learning_rate, or look at the data; the same "
        "command goes on with the next batch."
    )


def write_batch(folder: Path, sequences: Mapping[int, PackedSequence]) -> None:
    """Write sequences by their index into `batch.npz`: `index` `[S]`, all else `[S, tokens]`.

    Raises TrainingError where that is not possible.
    """
    parts: dict[str, Any] = {
        name: np.stack([getattr(sequence, name) for sequence in sequences.values()]) for name in PARTS
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / BATCH_FILE, index=np.array(list(sequences)), **parts)
    except OSError as error:
        raise TrainingError(
            f"the step was skipped like those before it, and its batch cannot be written to {folder} "
            f"({error.strerror or error}): make room, and look at the data."
        ) from None


def read_batch(folder: Path) -> dict[int, PackedSequence]:
    """Return the sequences that `write_batch` has written, by index; raises ConfigError where there are none."""
    try:
        with (folder / BATCH_FILE).open("rb") as file, np.load(file) as arrays:
            parts = {name: arrays[name] for name in (*PARTS, "index")}
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise ConfigError(
            f"run.replay={str(folder)!r} holds no {BATCH_FILE} that can be read ({error}): name a folder below "
            "failed_batch/ of a run."
        ) from None
    return {
        int(index): PackedSequence(**{name: parts[name][place] for name in PARTS})
        for place, index in enumerate(parts["index"])
    }


def replay(model: Transformer, batches: BatchBuilder, folder: Path, mesh: Mesh) -> None:
    """Compute loss and gradients of a written batch, change nothing, and log what is not finite.

    Raises ConfigError where the data-parallel groups cannot share the batch.
    """
    groups = mesh.degrees.data

    def read() -> dict[int, PackedSequence]:
        found = read_batch(folder)
        if len(found) % groups:
            raise ConfigError(
                f"run.replay={str(folder)!r} has {len(found)} sequences, which {groups} data-parallel groups cannot "
                "share: start as many as divide them."
            )
        return found

    sequences = raise_on_all_ranks(read)
    local = {place: batches.build(sequences[index], index) for place, index in enumerate(sequences)
             if place % groups == mesh.data_rank}  # fmt: skip
    losses = torch.zeros(len(sequences), dtype=torch.float64, device=batches.device)
    with torch.no_grad():
        for place, batch in local.items():
            losses[place] = model(batch.tokens, batch.labels, batch.context).losses.sum(dtype=torch.float64)
    dist.all_reduce(losses)
    result = train_step(
        Fsdp2Engine(model, torch.optim.SGD(model.parameters())),
        list(local.values()),
        context=batches.channel,
        reason_to_skip=lambda loss, gradient_norm: "replayed",
    )
    log.info("replayed    %s: loss %r, gradient norm %r", folder, result.loss, result.gradient_norm)
    bad = [index for index, loss in zip(sequences, losses.tolist(), strict=True) if not np.isfinite(loss)]
    parameters = dict(model.named_parameters())
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    for what, found in (
        ("losses of sequences", [str(index) for index in bad]),
        ("parameters", _not_finite(parameters)),
        ("gradients", _not_finite(gradients)),
    ):
        shown = ", ".join(found[:MAX_SHOWN]) + (f" and {len(found) - MAX_SHOWN} more" if found[MAX_SHOWN:] else "")
        log.info("            not finite: %s %s", what, shown or "none")


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of those that have a number on some rank that is not finite; the same on every rank."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors.values()]
    flags = torch.stack([~torch.isfinite(part).all() for part in local]).int()
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return [name for name, flag in zip(tensors, flags.tolist(), strict=True) if flag]
