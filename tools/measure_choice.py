"""Measure how much of other ranks' keys a trained model's choice of blocks needs: `... RUN_FOLDER --degrees 4,8`.

Of each layer and rank, the union over its queries: what `fetch` moves forward, beside what it would move if all that is
visible were chosen, and beside a ring. Also for normal queries and keys, which the cost model takes a choice of.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from farspan.errors import ConfigError
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Mechanism, Routed
from farspan.parallel.comm import Traffic, Unconnected
from farspan.parallel.context_parallel.routing import choose_alone, typical_choice
from farspan.parallel.context_parallel.strategy import STRATEGIES, Chosen, Sizes
from farspan.parallel.layout import LAYOUTS, Shards
from farspan.parallel.mesh import Mesh
from farspan.parallel.ranks import Ranks, connected
from farspan.tools.command import print_all
from farspan.trainer.build import build_batches, build_model
from farspan.trainer.checkpoint.verify import newest_whole
from farspan.trainer.config import Config
from farspan.trainer.data.packing import PackedSequences
from farspan.trainer.resolve import resolve
from farspan.trainer.toml_config import load_config
from farspan.trainer.weights.io import load_weights

ONE_PROCESS = ("parallel.context=1", "parallel.dp_shard=0", "parallel.strategy=single", "attention.backend=auto")


def chosen_by_layers(folder: Path) -> tuple[Config, Rows, list[Chosen]]:
    """Return the configuration of a run, the rows of its first held-out sequence, and what each layer chooses there."""
    config = load_config(Config, folder / "config.toml", ONE_PROCESS)
    resolved = resolve(config, Ranks())
    config, device = resolved.config, resolved.device
    mesh = Mesh.build(config.parallel, device.type)
    model = build_model(config, mesh, device)
    load_weights(model, newest_whole(folder / "checkpoints"))
    data = PackedSequences(
        resolved.validation_source, sequence_tokens=config.data.sequence_tokens, seed=0, shuffle=False, repeat=False
    )
    batch = build_batches(config, mesh, device, Traffic()).build(data.sequence(0))
    seen: list[tuple[Tensor, ...]] = []
    attends = tuple(_watched(attend, seen) for attend in batch.context.attends)
    with torch.no_grad():
        model(batch.tokens, batch.labels, replace(batch.context, attends=attends))  # pyright: ignore[reportArgumentType]
    rows = batch.context.rows.to("cpu")
    inputs, heads_of = zip(config.mechanisms(), seen, strict=True), config.model.heads_of
    return config, rows, [choose_alone(mechanism, rows, heads_of(mechanism), q, k) for mechanism, (q, k, *_) in inputs]


def _watched(attend: Callable[..., Tensor], seen: list[tuple[Tensor, ...]]) -> Callable[..., Tensor]:
    def call(*inputs: Tensor) -> Tensor:
        seen.append(inputs)
        return attend(*inputs)

    return call


def moved(strategy: str, mechanism: Mechanism, shards: Shards, config: Config, chosen: Chosen) -> int:
    """Return the bytes that all ranks of a layer send forward."""
    sizes = Sizes.of(config.train.torch_dtype, config.model.head_dim, config.model.head_dim)
    heads, total = config.model.heads_of(mechanism), 0
    for rank in range(shards.degree):
        channel = Unconnected(rank, shards.degree)
        planned = STRATEGIES.get(strategy)(channel).prepare(mechanism, shards, heads, backend="reference")
        total += planned.volume(sizes, chosen).forward
    return total


def lines(folder: Path, degrees: Sequence[int]) -> list[str]:
    """Return a Markdown table, a line for each degree, layout and layer."""
    config, rows, choices = chosen_by_layers(folder)
    mechanisms = config.mechanisms()
    if not any(isinstance(mechanism, Routed) for mechanism in mechanisms):
        raise ConfigError(f"{folder} is a run without a routed mechanism: nothing is chosen there.")
    found = ["| ranks | layout | layer | of what is visible | normal q, k | of a ring |", "|--:|---|--:|--:|--:|--:|"]
    for degree in degrees:
        for layout in LAYOUTS:
            for layer, (mechanism, chosen) in enumerate(zip(mechanisms, choices, strict=True)):
                if not isinstance(mechanism, Routed):
                    continue
                shards = Shards.build(rows, layout=layout, degree=degree, work=mechanism.keys_per_query)
                drawn = typical_choice(mechanism, rows, config.model.heads_of(mechanism))
                trained, normal, visible = (moved("fetch", mechanism, shards, config, x) for x in (chosen, drawn, None))
                ring = moved("ring", mechanism, shards, config, None)
                shares = " | ".join(f"{100 * x:.0f} %" for x in (trained / visible, normal / visible, trained / ring))
                found.append(f"| {degree} | {layout} | {layer} | {shares} |")
    return found


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="of a run that has a checkpoint")
    parser.add_argument("--degrees", default="4,8", help="of context parallelism")
    options = parser.parse_args(arguments)
    with connected(Ranks(), torch.device("cpu")):
        return print_all(lambda: lines(options.folder, [int(degree) for degree in options.degrees.split(",")]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
