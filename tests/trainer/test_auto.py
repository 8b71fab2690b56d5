"""parallel.strategy='auto': what is chosen, and why."""

from dataclasses import replace
from pathlib import Path

import pytest

from farspan.errors import ConfigError
from farspan.parallel.context_parallel.strategy import STRATEGIES
from farspan.parallel.mesh import Degrees, ParallelConfig
from farspan.trainer.config import AttentionConfig, Config
from farspan.trainer.resolve import choose_strategy, machine_of, strategy_costs
from farspan.trainer.validate import validate
from tests.support import tiny


def config(parallel: ParallelConfig, mechanism: str = "dense", **options: object) -> Config:
    attention = AttentionConfig(mechanism=mechanism, options=options, backend="cpu")
    return replace(tiny.config(Path("data"), Path("run"), parallel), attention=attention)


def chosen(run: Config, ranks: int) -> tuple[str, list[str]]:
    degrees = Degrees.resolve(run.parallel, ranks)
    validate(run, degrees)
    resolved, why = choose_strategy(run, degrees, "cpu")
    return resolved.parallel.strategy, why


def test_one_rank_moves_nothing() -> None:
    name, why = chosen(config(ParallelConfig(strategy="auto")), 1)
    assert name == "single"
    assert why[0].startswith("auto        single: ")


def test_the_choice_is_the_first_of_its_reasons_and_takes_the_run() -> None:
    for mechanism in ("dense", "lightning", "lightning, dense", "mosa"):
        run = config(ParallelConfig(strategy="auto", context=4, context_inner=2), mechanism)
        name, why = chosen(run, 4)
        assert why[0].startswith(f"auto        {name}: ")
        costs, refusals = strategy_costs(run, Degrees.resolve(run.parallel, 4), "cpu")
        assert len(why) == len(costs)
        assert costs.keys() | refusals.keys() == set(STRATEGIES)
        named = replace(run, parallel=replace(run.parallel, strategy=name))
        validate(named, Degrees.resolve(named.parallel, 4))


def test_a_strategy_that_is_named_is_kept() -> None:
    assert chosen(config(ParallelConfig(strategy="ulysses", context=2)), 2) == ("ulysses", [])


def test_links_come_from_the_configuration() -> None:
    machine = machine_of(ParallelConfig(context=4, context_inner=2, inner_gbytes_per_s=3, outer_gbytes_per_s=2), "cuda")
    assert (machine.node_ranks, machine.inner_bytes_per_s, machine.outer_bytes_per_s) == (2, 3e9, 2e9)
    assert machine_of(ParallelConfig(), "cuda").outer_bytes_per_s > 1e9


def test_a_run_that_no_strategy_takes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    only = {name: STRATEGIES.get(name) for name in ("single", "ship")}
    monkeypatch.setattr(STRATEGIES, "load", lambda: only)
    with pytest.raises(ConfigError, match=r"parallel\.strategy='auto' finds none: .*set parallel\.context=1"):
        chosen(config(ParallelConfig(strategy="auto", context=2)), 2)
