"""The training steps that are tried: every mechanism under every strategy, experts, mixtures of heads."""

from collections.abc import Iterator
from dataclasses import dataclass

from farspan.kernels.mechanism import MECHANISMS, Heads, Mechanism
from farspan.parallel.context_parallel.strategy import STRATEGIES
from farspan.trainer.toml_config import toml_value
from tests.support.pretend_cuda.step import DOCUMENTS

MESHES = ((1, 1), (2, 1), (4, 1), (4, 2))
"""Ranks of a sequence, and the inner ones of these; a strategy is tried on the first that it takes."""
HEADS = (Heads(query=4, kv=2), Heads(query=8, kv=2))
"""The first that a mechanism takes."""
EXPERTS = "model.experts={count=4, feed_forward=32"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """settings: besides `step.BASE`, without those of ranks and recomputation."""

    name: str
    strategy: str
    ranks: int
    settings: tuple[str, ...]
    inner: int = 1
    recompute: str = "none"

    @property
    def all_settings(self) -> tuple[str, ...]:
        return (
            f"parallel={{strategy={self.strategy!r}, context={self.ranks}, context_inner={self.inner}}}",
            *self.settings,
            f"train.recompute={self.recompute}",
        )

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.name, self.strategy, str(self.ranks), self.recompute

    def __str__(self) -> str:
        return ", ".join(self.key)


def cells() -> list[Cell]:
    found = [*_of_mechanisms(), *_of_models()]
    assert len({cell.key for cell in found}) == len(found)
    return found


def _of_mechanisms() -> Iterator[Cell]:
    """Every strategy that takes the mechanism, with and without recomputation by turns, on one rank both.

    Of the strategies of two levels but `hybrid`, whose parts are strategies of one, each mechanism has every other one.
    """
    for number, name in enumerate(MECHANISMS):
        mechanism = MECHANISMS.get(name).examples()[0]
        settings, heads = settings_of(name, mechanism)
        for turn, strategy in enumerate(STRATEGIES):
            taken = STRATEGIES.get(strategy).unsupported_reason
            meshes = [mesh for mesh in MESHES if taken(mechanism, heads, *mesh) is None and mesh[0] > 1]
            if strategy == "single":
                for recompute in ("none", "block"):
                    yield Cell(name=name, strategy=strategy, ranks=1, settings=settings, recompute=recompute)
            elif meshes and (meshes[0][0] == 2 or strategy == "hybrid" or (number + turn) % 2):
                ranks, inner = meshes[0]
                recompute = ("none", "block")[(number + turn) % 2]
                yield Cell(
                    name=name, strategy=strategy, ranks=ranks, inner=inner, settings=settings, recompute=recompute
                )


def settings_of(name: str, mechanism: Mechanism) -> tuple[tuple[str, ...], Heads]:
    heads = next(heads for heads in HEADS if mechanism.unsupported_reason(heads, max(DOCUMENTS)) is None)
    options = f"attention.options={toml_value(mechanism)}"
    return (f"attention.mechanism={name}", options, f"model.heads={heads.query}", f"model.kv_heads={heads.kv}"), heads


def _of_models() -> Iterator[Cell]:
    """Models beside the plain decoder, each with the mechanism that it is most at odds with."""
    moba = settings_of("moba", MECHANISMS.get("moba").examples()[0])[0]
    dense = ("attention.mechanism=dense",)
    models = {
        "experts, dropless": (dense, f"{EXPERTS}, balance_loss=0.01, bias_rate=0.01}}"),
        "experts, capacity": (dense, f"{EXPERTS}, capacity=1.0}}"),
        "experts that choose": (dense, f"{EXPERTS}, choice='experts', normalized=false}}"),
        "attention experts": (dense, "model.head_mixture={kind='experts', count=4, per_token=2, balance_loss=0.01}"),
        "mixture of heads": (dense, "model.head_mixture={kind='heads', shared=1, per_token=1}"),
        "key convolution": (moba, "model.key_convolution=3"),
    }
    for name, (attention, model) in models.items():
        for strategy, ranks, recompute in (("single", 1, "block"), ("ring", 2, "none")):
            yield Cell(name=name, strategy=strategy, ranks=ranks, settings=(*attention, model), recompute=recompute)
    for ranks in (2, 4):
        settings = (*dense, models["experts, dropless"][1], "parallel.expert=2")
        yield Cell(name="experts, expert degree 2", strategy="ring", ranks=ranks, settings=settings)
    for strategy in ("ring", "ship"):
        yield Cell(name="moba", strategy=strategy, ranks=4, settings=moba)
