"""One whole training step on a pretend device, by configuration: what it counts, its loss and its gradients.

    python -m tests.support.pretend_cuda.step --ranks 2 attention.mechanism=moba attention.options.block=32 \\
        parallel.strategy=ring train.recompute=block

prints what each source line asks of the device. Settings are those of `farspan train`; see `BASE` for the others.
"""

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from farspan.parallel.comm import Traffic
from farspan.parallel.mesh import Mesh
from farspan.trainer.batch import BatchThread
from farspan.trainer.build import build_batches, build_model
from farspan.trainer.config import Config
from farspan.trainer.data.packing import IGNORED, PADDING, PackedSequence
from farspan.trainer.engines.fsdp2 import Fsdp2Engine
from farspan.trainer.optim import build_optimizer
from farspan.trainer.step import train_step
from farspan.trainer.toml_config import load_config
from tests.support.pretend_cuda.counts import Counts
from tests.support.pretend_cuda.pool import PretendPools
from tests.support.pretend_cuda.tensor import PretendDevice, PretendTensor
from tests.support.pretend_cuda.watch import watch

DOCUMENTS, PADDED = (113, 70), 9
LAYERS = 2
BASE = (
    f"run.folder={tempfile.gettempdir()}/none",
    "data.folder=none",
    f"data.sequence_tokens={sum(DOCUMENTS) + PADDED}",
    f"model={{layers={LAYERS}, width=64, heads=4, kv_heads=2, head_dim=16, feed_forward=128, vocabulary_size=256}}",
    "train.steps=1",
    "train.compute_dtype=bfloat16",
    "optimizer.warmup_steps=0",
)


@dataclass(frozen=True, kw_only=True)
class Stepped:
    """A step on one rank. gradients: of its shards. planned, counts: of the sequence's plan, and of the step."""

    loss: float
    gradients: dict[str, Tensor]
    backend: str
    planned: Counts
    counts: Counts


def config_of(*settings: str) -> Config:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.toml"
        path.touch()
        return load_config(Config, path, (*BASE, *settings))


def sequence(vocabulary_size: int) -> PackedSequence:
    """Two documents and some padding."""
    parts = [np.arange(length) for length in (*DOCUMENTS, PADDED)]
    position = np.concatenate(parts)
    document = np.concatenate([np.full(len(part), number) for number, part in enumerate(parts)])
    tokens = np.random.default_rng(0).integers(0, vocabulary_size, len(position))
    labels = np.where(np.append(position[1:], 0) == 0, IGNORED, np.roll(tokens, -1))
    padding = document == len(DOCUMENTS)
    return PackedSequence(
        tokens=tokens,
        labels=np.where(padding, IGNORED, labels),
        position=np.where(padding, 0, position).astype(np.int32),
        document=np.where(padding, PADDING, document).astype(np.int32),
    )


def take_step(settings: Sequence[str], *, on_device: bool, runs_kernels: bool = False) -> Stepped:
    """On each rank: take a step on a pretend device, or on the CPU."""
    device = torch.device("cuda", 0) if on_device else torch.device("cpu")
    config = config_of(*settings, f"train.device={device.type}")
    by_choice = config.parallel.strategy in ("fetch", "ship")
    mode = PretendDevice(runs_kernels=runs_kernels, runs_choices=by_choice) if on_device else None
    with mode or nullcontext():
        mesh = Mesh.build(config.parallel, device.type)
        model = build_model(config, mesh, device)
        optimizer = build_optimizer(model, config.optimizer)
        batches = build_batches(config, mesh, device, Traffic())
        if mode:
            # Frequencies are copied once for a process: no count depends on which step is its first.
            model._rotation(torch.zeros(1, dtype=torch.int32, device=device), torch.bfloat16)
            mode.take_counts()
        # As in a run: planned in a thread, which copies on a stream of its own.
        with closing(BatchThread(device)) as thread:
            build = partial(batches.build, sequence(config.model.vocabulary_size))
            (batch,) = thread.take([thread.start("the sequence", build)])
        planned = mode.take_counts() if mode else Counts()
        if mode:
            watch(batch.context.attention, mode)
        engine = Fsdp2Engine(model, optimizer, config.optimizer.max_gradient_norm)
        done = train_step(engine, [batch], context=batches.channel)
        counts = mode.take_counts() if mode else Counts()
    assert done.skipped is None, done.skipped
    return Stepped(
        loss=done.loss,
        gradients={name: _on_cpu(p.grad) for name, p in model.named_parameters() if p.grad is not None},
        backend=batches.layers[0].backend,
        planned=planned,
        counts=counts,
    )


def _on_cpu(gradient: Tensor) -> Tensor:
    local = gradient._local_tensor if isinstance(gradient, DTensor) else gradient
    return local.value if isinstance(local, PretendTensor) else local


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1, help="ranks that share the sequence (default 1)")
    parser.add_argument("--run-kernels", action="store_true", help="compute Triton's launches by its interpreter: slow")
    parser.add_argument("--most", type=int, default=30, help="source lines to print of each kind")
    parser.add_argument("settings", nargs="*", help="settings as of farspan train")
    options = parser.parse_args()
    settings = (f"parallel.context={options.ranks}", *options.settings)
    with PretendPools() as pools:
        step = partial(take_step, settings, on_device=True, runs_kernels=options.run_kernels)
        done: Stepped = pools(options.ranks).run(step)[0]
    print(f"rank 0 of {options.ranks}, backend {done.backend}, loss {done.loss:.4f}")
    for title, counts in (("The plan of the sequence", done.planned), ("The step", done.counts)):
        print("\n".join((title, *counts.lines(options.most))))


if __name__ == "__main__":
    main()
