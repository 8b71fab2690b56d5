"""Print which mechanism runs under which context-parallel strategy, from the registries.

`python -m farspan.tools.matrix` prints the table of the README.
`--costs CONFIG` adds what each strategy would cost a configuration, by the cost model; `--json` prints records.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from farspan.kernels.errors import FarspanError
from farspan.kernels.mechanism import MECHANISMS, Heads
from farspan.parallel.strategy import STRATEGIES

GRIDS = ((4, 2), (4, 1), (1, 1))
"""Degree and inner axis with which a pair is asked for, in this order: strategies of two levels need the first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """reason: why it is not supported; empty if it is."""

    mechanism: str
    strategy: str
    supported: bool
    reason: str


def pairs() -> list[Pair]:
    """Return all pairs of the registries; supported: at a degree and with heads that suit the strategy."""
    return [_pair(mechanism, strategy) for mechanism in MECHANISMS for strategy in STRATEGIES]


def _pair(mechanism: str, strategy: str) -> Pair:
    example, heads = MECHANISMS.get(mechanism).examples()[0], Heads(query=8, kv=8)
    reasons = [STRATEGIES.get(strategy).refusal(example, heads, *grid) for grid in GRIDS]
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


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print records instead of a table")
    options = parser.parse_args(arguments)
    try:
        found = pairs()
    except FarspanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps([asdict(pair) for pair in found], indent=1) if options.json else table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
