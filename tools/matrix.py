"""Print which mechanism runs under which context-parallel strategy, from the registries.

`python -m farspan.tools.matrix` prints the table of the README.
`--costs CONFIG` prints what each strategy would cost a configuration, by the cost model.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from farspan.kernels.mechanism import MECHANISMS, Heads, Mechanism
from farspan.parallel.context_parallel.strategy import STRATEGIES, Strategy
from farspan.parallel.mesh import Degrees
from farspan.tools.bench.report import markdown_table
from farspan.tools.command import parser_of, print_all
from farspan.trainer.config import Config
from farspan.trainer.estimate.summary import format_layers
from farspan.trainer.resolve import machine_of, strategy_costs
from farspan.trainer.toml_config import load_config
from farspan.units import BYTES, FLOPS, SECONDS, readable

COLUMNS = (
    "strategy", "time", "compute", "transfers overlapped", "transfers exposed", "sent forward", "sent backward",
    "working memory", "FLOPs forward", "busiest over mean",
)  # fmt: skip
DEVICES = {"cpu": "two CPU cores", "cuda": "a GPU like H100"}
HEAD = """Attention of one sequence of {tokens:,} tokens in one document, forward and backward, in all {layers} layers
({mechanisms}; {dtype}), over {degree} ranks in {layout} layout. Each number is of the rank where it is largest.
Estimated, not measured, for {device}: {flops}/s of attention, links of {inner:g} GB/s among {node} ranks of a node
and {outer:g} GB/s between nodes (parallel.inner_gbytes_per_s and parallel.outer_gbytes_per_s set other speeds).
"""
GRIDS = ((4, 2), (4, 1), (1, 1))
"""Degree and inner axis with which a pair is tried, in this order: strategies of two levels need the first."""


def table() -> str:
    """Return a Markdown table of the registries, a mechanism per line."""
    strategies = STRATEGIES.load()
    lines = [f"| mechanism | {' | '.join(strategies)} |", "|---" + "|:-:" * len(strategies) + "|"]
    for name, cls in MECHANISMS.load().items():
        marks = ("✓" if supported(cls.examples()[0], strategy) else "-" for strategy in strategies.values())
        lines.append(f"| {name} | {' | '.join(marks)} |")
    return "\n".join(lines)


def supported(mechanism: Mechanism, strategy: type[Strategy]) -> bool:
    """Return whether a pair runs, at a degree and with heads that suit the strategy."""
    return any(strategy.unsupported_reason(mechanism, Heads(query=8, kv=8), *grid) is None for grid in GRIDS)


def cost_table(path: Path, overrides: Sequence[str], ranks: int) -> str:
    """Return what each strategy would cost the attention of a configuration, best first; and why others refuse.

    A text that says what was estimated, and a Markdown table, a strategy per line.
    """
    config = load_config(Config, path, overrides)
    parallel, device = config.parallel, "cpu" if config.train.device == "cpu" else "cuda"
    axes = parallel.context * parallel.dp_replicate * (parallel.dp_shard or 1)
    degrees, machine = Degrees.resolve(parallel, ranks or axes), machine_of(parallel, device)
    found, refusals = strategy_costs(config, degrees, device)
    head = HEAD.format(
        tokens=config.data.sequence_tokens,
        layers=config.model.layers,
        mechanisms=format_layers(config.mechanisms(), short=True),
        dtype=config.train.compute_dtype,
        degree=degrees.context,
        layout=parallel.layout,
        device=DEVICES[device],
        flops=readable(machine.flops_per_s, FLOPS),
        inner=machine.inner_bytes_per_s / 1e9,
        node=machine.node_ranks,
        outer=machine.outer_bytes_per_s / 1e9,
    )
    lines = []
    for name, cost in found.items():
        times = (cost.seconds, cost.compute_s, cost.overlapped_s, cost.exposed_s)
        sizes = (cost.volume.forward, cost.volume.backward, cost.working_bytes)
        numbers = [*(readable(time, SECONDS) for time in times), *(readable(size, BYTES) for size in sizes)]
        lines.append([name, *numbers, readable(cost.flops, FLOPS), f"{cost.balance:.3f}"])
    refused = "".join(f"- {name}: {reason}\n" for name, reason in refusals.items())
    return f"{head}\n{markdown_table(COLUMNS, lines)}{refused}".rstrip()


def main(arguments: Sequence[str]) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--costs", type=Path, metavar="CONFIG", help="print what each strategy would cost it, instead")
    parser.add_argument("--ranks", type=int, default=0, help="of the run, for --costs; by default those of its axes")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes of CONFIG")
    options = parser.parse_args(arguments)
    return print_all(
        lambda: [cost_table(options.costs, options.overrides, options.ranks) if options.costs else table()]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
