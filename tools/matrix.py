"""Print which mechanism runs under which context-parallel strategy, from the registries.

`python -m farspan.tools.matrix` prints the table of the README.
`--costs CONFIG` prints what each strategy would cost a configuration, by the cost model; `--json` prints records.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from farspan.kernels.mechanism import MECHANISMS, Heads
from farspan.parallel.context_parallel.cost_model import Cost
from farspan.parallel.context_parallel.strategy import STRATEGIES
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A mechanism under a strategy. reason: why it is not supported; empty if it is."""

    mechanism: str
    strategy: str
    supported: bool
    reason: str


def pairs() -> list[Pair]:
    """Return all pairs of the registries; supported: at a degree and with heads that suit the strategy."""
    return [_pair(mechanism, strategy) for mechanism in MECHANISMS for strategy in STRATEGIES]


def _pair(mechanism: str, strategy: str) -> Pair:
    example, heads = MECHANISMS.get(mechanism).examples()[0], Heads(query=8, kv=8)
    reasons = [STRATEGIES.get(strategy).unsupported_reason(example, heads, *grid) for grid in GRIDS]
    reason = "" if None in reasons else str(reasons[0])
    return Pair(mechanism=mechanism, strategy=strategy, supported=not reason, reason=reason)


def table(found: Sequence[Pair]) -> str:
    """Return a Markdown table, a mechanism per line."""
    strategies = list(dict.fromkeys(pair.strategy for pair in found))
    supported = {(pair.mechanism, pair.strategy): pair.supported for pair in found}
    lines = [f"| mechanism | {' | '.join(strategies)} |", "|---" + "|:-:" * len(strategies) + "|"]
    for mechanism in dict.fromkeys(pair.mechanism for pair in found):
        marks = ["✓" if supported[mechanism, strategy] else "-" for strategy in strategies]
        lines.append(f"| {mechanism} | {' | '.join(marks)} |")
    return "\n".join(lines)


def costs(path: Path, overrides: Sequence[str], ranks: int) -> tuple[dict[str, Cost], dict[str, str]]:
    """Return what each strategy would cost the attention of a configuration, best first; and why others refuse."""
    config = load_config(Config, path, overrides)
    parallel = config.parallel
    axes = parallel.context * parallel.dp_replicate * (parallel.dp_shard or 1)
    degrees = Degrees.resolve(parallel, ranks or axes)
    return strategy_costs(config, degrees, "cpu" if config.train.device == "cpu" else "cuda")


def cost_table(found: dict[str, Cost], refusals: dict[str, str]) -> str:
    """Return a Markdown table, a strategy per line, of one sequence in all layers, and the refusals."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" + "|--:" * (len(COLUMNS) - 1) + "|"]
    for name, cost in found.items():
        times = (1e3 * seconds for seconds in (cost.seconds, cost.compute_s, cost.hidden_s, cost.exposed_s))
        sizes = (size / 2**20 for size in (cost.volume.forward, cost.volume.backward, cost.working_bytes))
        numbers = [*(f"{time:,.3g}" for time in times), *(f"{size:,.1f}" for size in sizes)]
        lines.append(f"| {name} | {' | '.join(numbers)} | {cost.flops / 1e12:,.3g} | {cost.balance:.3f} |")
    return "\n".join([*lines, *(f"- {name}: {reason}" for name, reason in refusals.items())])


def main(arguments: Sequence[str]) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--json", action="store_true", help="print records instead of a table")
    parser.add_argument("--costs", type=Path, metavar="CONFIG", help="print what each strategy would cost it, instead")
    parser.add_argument("--ranks", type=int, default=0, help="of the run, for --costs; by default those of its axes")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes of CONFIG")
    options = parser.parse_args(arguments)

    def found() -> Iterator[str]:
        if options.costs is None:
            all_pairs = pairs()
            records, text = [asdict(pair) for pair in all_pairs], table(all_pairs)
        else:
            by_strategy, refusals = costs(options.costs, options.overrides, options.ranks)
            records = [{"strategy": name, **asdict(cost)} for name, cost in by_strategy.items()]
            text = cost_table(by_strategy, refusals)
        yield json.dumps(records, indent=1) if options.json else text

    return print_all(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
