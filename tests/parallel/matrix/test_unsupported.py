"""Which kinds of mechanism each strategy refuses, so that no pair of the matrix is empty by accident."""

from farspan.kernels.mechanism import MECHANISMS, KVLifetime, Masked, Mechanism, Recurrent, Routed, TokenChoice
from farspan.parallel.context_parallel.strategy import STRATEGIES
from tests.support.matrix import DEGREES, is_refused_whatever_the_heads


def test_the_base_class_decides_what_a_strategy_takes() -> None:
    """Which kinds of mechanism each strategy refuses at a degree that suits it; a new refusal has to be put here."""
    refused = {
        (strategy, kind.__name__)
        for strategy in STRATEGIES
        for name in MECHANISMS
        for kind in [kind_of(MECHANISMS.get(name))]
        if all(is_refused_whatever_the_heads(strategy, degree, name) for degree in DEGREES)
    }
    move_keys, softmax = ("ring", "double_ring", "gather", "fetch"), ("Masked", "Routed", "KVLifetime", "TokenChoice")
    expected = {(name, "Recurrent") for name in move_keys} | {("state", kind) for kind in softmax}
    assert refused == expected | {("ship", kind) for kind in ("Masked", "KVLifetime", "TokenChoice", "Recurrent")}


def kind_of(mechanism: type[Mechanism]) -> type[Mechanism]:
    kinds = [kind for kind in (Recurrent, TokenChoice, Routed, KVLifetime, Masked) if issubclass(mechanism, kind)]
    return kinds[0]
