"""Measure how much of other ranks' keys a trained model's choice of blocks needs: `... RUN_FOLDER --degrees 4,8`.

For each layer, the bytes that `fetch` moves forward, over those that it would move if all unmasked blocks were chosen,
and over those of a ring. Also for normal queries and keys, whose choice the cost model assumes.
"""

import sys
from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from farspan.errors import ConfigError
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Access, Mechanism
from farspan.kernels.planner import Routing, Sizes
from farspan.parallel.comm import Traffic, Unconnected
from farspan.parallel.context_parallel.strategy import STRATEGIES
from farspan.parallel.layout import LAYOUTS, Shards
from farspan.parallel.mesh import Mesh
from farspan.parallel.ranks import Ranks, connected
from farspan.tools.bench.report import markdown_table
from farspan.tools.command import parser_of, print_all, sizes
from farspan.trainer.build import build_batches, build_model
from farspan.trainer.checkpoint.verify import newest_complete
from farspan.trainer.config import Config
from farspan.trainer.data.validation import OWN_SET
from farspan.trainer.resolve import resolve
from farspan.trainer.toml_config import load_config
from farspan.trainer.weights.io import load_weights

COLUMNS = ("ranks", "layout", "layer", "of all unmasked", "normal q, k, of all unmasked", "of a ring")
ONE_PROCESS = ("parallel.context=1", "parallel.dp_shard=0", "parallel.strategy=single", "attention.backend=auto")


def chosen_by_layers(folder: Path) -> tuple[Config, Rows, list[Routing]]:
    """Return the configuration of a run, the rows of its first validation sequence, and each layer's routing there."""
    config = load_config(Config, folder / "config.toml", ONE_PROCESS)
    resolved = resolve(config, Ranks())
    config, device = resolved.config, resolved.device
    mesh = Mesh.build(config.parallel, device.type)
    model = build_model(config, mesh, device)
    load_weights(model, newest_complete(folder / "checkpoints"))
    data = resolved.validation_sets[OWN_SET].data
    batch = build_batches(config, mesh, device, Traffic()).build(data.sequence(0))
    inputs_of_layers: list[tuple[Tensor, ...]] = []

    def recorded(attend: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        inputs_of_layers.append(inputs)
        return attend(*inputs)

    context = copy(batch.context)
    context.attention = tuple(partial(recorded, attend) for attend in context.attention)  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad():
        model(batch.tokens, batch.labels, context)
    rows = context.rows.to(torch.device("cpu"))
    layers, heads_of = zip(config.mechanisms(), inputs_of_layers, strict=True), config.model.heads_of
    return config, rows, [m.route(rows, heads_of(m), q, k, *routing) for m, (q, k, _, *routing) in layers]


def moved(strategy: str, mechanism: Mechanism, shards: Shards, config: Config, routing: Routing) -> int:
    """Return the bytes that all ranks of a layer send forward."""
    sizes = Sizes.of(config.train.torch_dtype, config.model.head_dim, config.model.head_dim)
    heads, total = config.model.heads_of(mechanism), 0
    for rank in range(shards.degree):
        channel = Unconnected(rank, shards.degree)
        planned = STRATEGIES.get(strategy)(channel).prepare(mechanism, shards, heads, backend="reference")
        total += planned.volume(sizes, lambda: routing).forward
    return total


def table(folder: Path, degrees: Sequence[int]) -> str:
    """Return a Markdown table, a line for each degree, layout and layer."""
    config, rows, choices = chosen_by_layers(folder)
    routed = [
        (layer, mechanism, chosen)
        for layer, (mechanism, chosen) in enumerate(zip(config.mechanisms(), choices, strict=True))
        if Access.BLOCKS in mechanism.accesses
    ]
    if not routed:
        raise ConfigError(f"{folder} is a run without a routed mechanism: no layer chooses keys.")
    lines = []
    for degree, layout, (layer, mechanism, chosen) in product(degrees, LAYOUTS, routed):
        shards = Shards.build(rows, layout=layout, degree=degree, work=mechanism.keys_per_query)
        drawn = mechanism.sample_routing(rows, config.model.heads_of(mechanism))
        trained, normal, unmasked = (
            moved("fetch", mechanism, shards, config, routing) for routing in (chosen, drawn, Routing())
        )
        ring = moved("ring", mechanism, shards, config, Routing())
        shares = trained / unmasked, normal / unmasked, trained / ring
        lines.append([degree, layout, layer, *(f"{100 * share:.0f} %" for share in shares)])
    return markdown_table(COLUMNS, lines)


def main(arguments: Sequence[str]) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("folder", type=Path, help="of a run that has a checkpoint")
    parser.add_argument("--degrees", type=sizes, default="4,8", help="of context parallelism")
    options = parser.parse_args(arguments)
    with connected(Ranks(), torch.device("cpu")):
        return print_all(lambda: [table(options.folder, options.degrees)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
