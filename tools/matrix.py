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
from farspan.tools.command import parser_of, print_all
from farspan.trainer.config import Config
from farspan.trainer.resolve import strategy_costs
from farspan.trainer.toml_config import load_config

COLUMNS = (
    "strategy", "ms", "compute ms", "overlapped ms", "exposed ms", "MiB sent forward", "MiB sent backward",
    "working MiB", "TFLOP forward", "balance",
)  # fmt: skip
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

    A Markdown table, a strategy per line, of one sequence in all layers.
    """
    config = load_config(Config, path, overrides)
    parallel = config.parallel
    axes = parallel.context * parallel.dp_replicate * (parallel.dp_shard or 1)
    degrees = Degrees.resolve(parallel, ranks or axes)
    found, refusals = strategy_costs(config, degrees, "cpu" if config.train.device == "cpu" else "cuda")
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" + "|--:" * (len(COLUMNS) - 1) + "|"]
    for name, cost in found.items():
        times = (1e3 * seconds for seconds in (cost.seconds, cost.compute_s, cost.overlapped_s, cost.exposed_s))
        sizes = (size / 2**20 for size in (cost.volume.forward, cost.volume.backward, cost.working_bytes))
        numbers = [*(f"{time:,.3g}" for time in times), *(f"{size:,.1f}" for size in sizes)]
        lines.append(f"| {name} | {' | '.join(numbers)} | {cost.flops / 1e12:,.3g} | {cost.balance:.3f} |")
    return "\n".join([*lines, *(f"- {name}: {reason}" for name, reason in refusals.items())])


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
