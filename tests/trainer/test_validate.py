"""Each rule between fields: the keys and values that its error names, and the nearest settings that it accepts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from farspan.errors import ConfigError
from farspan.parallel.mesh import Degrees, ParallelConfig
from farspan.trainer import validate as module
from farspan.trainer.config import Config
from farspan.trainer.model.config import ExpertsConfig, HeadMixtureConfig
from farspan.trainer.toml_config import load_config, to_toml
from farspan.trainer.validate import routers_learn, validate
from tests.support import tiny

EXPERTS = "model.experts.count=4; model.experts.feed_forward=16; model.experts"
HEADS = "model.head_mixture.kind=experts; model.head_mixture.count=3; model.head_mixture"
GATED = "model.recurrent_layer=gated; attention.mechanism"
SPANS = "attention.mechanism=spans; attention.options.length=512; attention.options"
TILES = 'attention.mechanism=block_sparse; attention.options.mask=["1", "11", "101"]; attention.options'
WSD = "optimizer.schedule=wsd; optimizer.warmup_steps"
LLAMA3 = "model.rope.scaling=llama3; model.rope"
YARN = "model.rope.scaling=yarn; model.rope"

# Wrong settings, parts of the error, and right settings; in each, several are separated by semicolons.
CASES = [
    ("model.heads=12; model.kv_heads=5", "model.kv_heads=5; model.heads=12; 1, 2, 3, 4, 6, 12 do",
     "model.heads=12; model.kv_heads=4"),
    ("model.head_dim=7", "model.head_dim=7; even", "model.head_dim=6"),
    ("model.rope.rotated=5", "model.rope.rotated=5; even", "model.rope.rotated=6"),
    ("model.rope.rotated=10", "model.rope.rotated=10; at most model.head_dim=8", "model.rope.rotated=8"),
    ("model.rope.factor=4", "model.rope.factor=4.0; model.rope.scaling", f"{YARN}.factor=4"),
    (f"{LLAMA3}.factor=1", "model.rope.scaling='llama3'; model.rope.factor=1.0", f"{LLAMA3}.factor=1.5"),
    (f"{YARN}.factor=1", "model.rope.scaling='yarn'; model.rope.factor=1.0", f"{YARN}.factor=1.5"),
    (f"{LLAMA3}.factor=2; model.rope.low_frequency_factor=4",
     "model.rope.low_frequency_factor=4.0; model.rope.high_frequency_factor=4.0",
     f"{LLAMA3}.factor=2; model.rope.low_frequency_factor=3.9"),
    (f"{YARN}.factor=2; model.rope.beta_slow=32", "model.rope.beta_slow=32.0; model.rope.beta_fast=32.0",
     f"{YARN}.factor=2; model.rope.beta_slow=31"),
    (f"{GATED}=dense, window", "model.recurrent_layer='gated'; attention.mechanism='dense, window'",
     f"{GATED}=dense, lightning"),
    (f"{SPANS}.alpha=[64, 64]; attention.options.beta=[0, 0]",
     "attention.mechanism='spans'; 2 windows for 4 query heads",
     f"{SPANS}.alpha=[64, 64, 64, 64]; attention.options.beta=[0, 0, 0, 0]"),
    (f"{TILES}.block=26", "attention.mechanism='block_sparse'; mask has 3; has 4", f"{TILES}.block=34"),
    ("parallel.expert=2", "parallel.expert=2; model.experts.count=0", f"parallel.expert=2; {EXPERTS}.shared=0"),
    (f"{EXPERTS}.layers=dense*2, experts", "model.experts.count=4; model.experts.layers='dense*2, experts'",
     f"{EXPERTS}.layers=dense, experts"),
    (f"{EXPERTS}.layers=dense, expert", "model.experts.layers='dense, expert'; has 'expert'",
     f"{EXPERTS}.layers=experts"),
    (f"{EXPERTS}.feed_forward=0", "model.experts.feed_forward=0", f"{EXPERTS}.feed_forward=16"),
    (f"{EXPERTS}.per_token=5", "model.experts does; per_token=5; experts=4", f"{EXPERTS}.per_token=4"),
    (f"{EXPERTS}.per_token=1", "model.experts.normalized=true; model.experts.per_token=1; set normalized=false",
     f"{EXPERTS}.per_token=1; model.experts.normalized=false"),
    (f"{EXPERTS}.per_token=1; model.experts.score=sigmoid; model.experts.groups=4", "model.experts.normalized=true",
     f"{EXPERTS}.per_token=2; model.experts.score=sigmoid; model.experts.groups=2"),
    (f"{EXPERTS}.count=1; model.experts.per_token=1; model.experts.normalized=false",
     "model.experts.count=1; score='softmax'; count=2 or more",
     f"{EXPERTS}.count=1; model.experts.per_token=1; model.experts.normalized=false; model.experts.score=sigmoid"),
    (f"{HEADS}.count=1", "model.head_mixture.count=1; count=2 or more", f"{HEADS}.count=2"),
    ("model.head_mixture.kind=heads; model.kv_heads=1; model.head_mixture.shared=1",
     "model.head_mixture.per_token=1; model.kv_heads=1; set per_token=2 or more",
     "model.head_mixture.kind=heads; model.kv_heads=1; model.head_mixture.per_token=2"),
    (f"{EXPERTS}.count=6; parallel.expert=4", "parallel.expert=4; model.experts.count=6",
     f"{EXPERTS}.count=6; parallel.expert=2"),
    (f"{EXPERTS}.choice=experts; model.experts.normalized=false; model.experts.capacity=1.5",
     "model.experts.capacity=1.5; model.experts.choice='experts'; set it to 0.0",
     f"{EXPERTS}.choice=experts; model.experts.normalized=false"),
    (f"{EXPERTS}.choice=experts; model.experts.normalized=false; model.experts.group_score_top_k=2",
     "model.experts.group_score_top_k=2; model.experts.choice='experts'; set it to 0",
     f"{EXPERTS}.group_score_top_k=2"),
    (f"{EXPERTS}.choice=experts; model.experts.normalized=false; model.experts.balance_loss=0.1",
     "model.experts.balance_loss=0.1; model.experts.choice='experts'; set it to 0.0",
     f"{EXPERTS}.choice=experts; model.experts.normalized=false; model.experts.z_loss=0.1"),
    (f"{EXPERTS}.per_token=4; model.experts.balance_loss=0.1",
     "model.experts.balance_loss=0.1; model.experts.per_token=4; set it to 0; lower per_token",
     f"{EXPERTS}.per_token=4; model.experts.z_loss=0.1"),
    (f"{EXPERTS}.per_token=4; model.experts.bias_rate=0.1", "model.experts.bias_rate=0.1; model.experts.per_token=4",
     f"{EXPERTS}.per_token=3; model.experts.bias_rate=0.1"),
    (f"{HEADS}.per_token=3; model.head_mixture.balance_loss=0.1",
     "model.head_mixture.balance_loss=0.1; model.head_mixture.per_token=3",
     f"{HEADS}.per_token=2; model.head_mixture.balance_loss=0.1"),
    ("model.head_mixture.kind=heads; model.head_mixture.shared=1; model.head_mixture.bias_rate=0.1",
     "model.head_mixture.bias_rate=0.1; model.head_mixture.per_token=1",
     "model.head_mixture.kind=heads; model.head_mixture.bias_rate=0.1"),
    (f"{EXPERTS}.groups=2; model.experts.group_score_top_k=3", "model.experts does; group_score_top_k=3; from 0 to 2",
     f"{EXPERTS}.groups=2; model.experts.group_score_top_k=2"),
    (f"{EXPERTS}.feed_forward=15; parallel.expert=2", "model.experts.feed_forward=15; a multiple of the 2 ranks",
     f"{EXPERTS}.feed_forward=15; parallel.expert=4"),
    (f"{HEADS}.per_token=3; model.qkv_bias=true", "model.qkv_bias=true; model.head_mixture.kind='none'; 'experts'",
     f"{HEADS}.per_token=3"),
    (f"{HEADS}.per_token=4", "model.head_mixture does; per_token=4; count=3", f"{HEADS}.per_token=3"),
    (f"{HEADS}.own_keys=true; model.head_mixture.per_token=2", "model.head_mixture.own_keys=true; per_token=3",
     f"{HEADS}.own_keys=true; model.head_mixture.per_token=3"),
    ("model.head_mixture.kind=heads; model.head_mixture.count=1",
     "model.head_mixture.count=1; model.head_mixture.kind='heads'; set it to 0", "model.head_mixture.kind=heads"),
    ("model.head_mixture.kind=heads; model.head_mixture.normalized=false",
     "model.head_mixture.normalized=false; model.head_mixture.kind='heads'; set it to true",
     f"{HEADS}.normalized=false"),
    (f"{HEADS}.shared=1", "model.head_mixture.shared=1; model.head_mixture.kind='experts'; set it to 0",
     "model.head_mixture.kind=heads; model.head_mixture.shared=1"),
    (f"{HEADS}.per_token=1; {GATED}=lightning",
     "model.head_mixture.kind='experts'; attention.mechanism='lightning'; model.recurrent_layer='gated'",
     f"{HEADS}.per_token=1; {GATED}=lightning, dense"),
    (f"{HEADS}.per_token=2; attention.mechanism=lightning",
     "attention.mechanism='lightning'; by their number; model.head_mixture.kind='none'",
     f"{HEADS}.per_token=3; attention.mechanism=lightning"),
    ("optimizer.warmup_steps=11", "optimizer.warmup_steps=11; train.steps=10; optimizer.warmup_steps=10 or less",
     "optimizer.warmup_steps=10"),
    (f"{WSD}=11; optimizer.decay_fraction=0.4",
     "optimizer.warmup_steps=11; train.steps=10; optimizer.warmup_steps=6 or less",
     f"{WSD}=6; optimizer.decay_fraction=0.4"),
    (f"{WSD}=11; optimizer.decay_fraction=1",
     "optimizer.warmup_steps=11; train.steps=10; set optimizer.warmup_steps=0.",
     f"{WSD}=0; optimizer.decay_fraction=1"),
    (f"{WSD}=7; optimizer.decay_fraction=0.4",
     "optimizer.warmup_steps=7; last 4 steps; optimizer.decay_fraction=0.4; optimizer.warmup_steps=6 or less",
     f"{WSD}=6; optimizer.decay_fraction=0.4"),
    ("train.sequences_per_step=3", "train.sequences_per_step=3; the 2 data-parallel groups; 4 is",
     "train.sequences_per_step=4"),
    ("parallel.layout=zigzak", "parallel.layout='zigzak'; balanced, contiguous, striped, zigzag; 'zigzag'?",
     "parallel.layout=striped"),
    ('checkpoint.accept_changed=["model.wdth"]', "checkpoint.accept_changed='model.wdth'; 'model.width'?",
     'checkpoint.accept_changed=["model.width", "data.folder"]'),
    ("profile.steps=[3, 11]", "profile.steps; 11; train.steps=10", "profile.steps=[3, 10]"),
    ("profile.steps=[3]; profile.ranks=[0, 4]", "profile.ranks; has 4; 0 to 3",
     "profile.steps=[3]; profile.ranks=[0, 3]"),
    ("profile.steps=[3]; profile.ranks=[]", "profile.ranks=[]; profile.steps=[]", "profile.steps=[3]"),
    ("profile.memory=true", "profile.memory=true; profile.steps=[]", "profile.memory=true; profile.steps=[3]"),
    ("parallel.strategy=rings", "strategy 'rings'; 'ring'?", "parallel.strategy=ring"),
    ("attention.options.casual=true", "attention.options.casual=true; 'causal'?", "attention.options.causal=true"),
    ("parallel.strategy=single", "parallel.strategy='single'; set parallel.context=1 instead of 2",
     "parallel.strategy=single; parallel.context=1; train.sequences_per_step=4"),
]  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("validate") / "config.toml"
    path.write_text(to_toml(tiny.config(Path("data"), Path("run"), ParallelConfig(context=2)), brief=True))
    return path


def check(path: Path, settings: str) -> None:
    config = load_config(Config, path, settings.split("; "))
    validate(config, Degrees.resolve(config.parallel, 4))


@pytest.mark.parametrize(("wrong", "parts", "right"), CASES, ids=[wrong for wrong, _, _ in CASES])
def test_rule(path: Path, wrong: str, parts: str, right: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check(path, wrong)
    assert [part for part in parts.split("; ") if part not in str(refused.value)] == []
    check(path, right)


def learns(config: Config) -> bool:
    try:
        routers_learn(config)
    except ConfigError:
        return False
    return True


def moves(weights: Tensor, logits: Tensor) -> bool:
    """Whether a loss of the weights has a gradient for the logits, beyond rounding."""
    factors = torch.randn(weights.shape, dtype=torch.float64)
    return torch.autograd.grad((factors * weights).sum(), logits)[0].abs().max().item() > 1e-9


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize(("count", "per_token"), [(1, 1), (4, 1), (4, 2), (4, 4), (8, 3)])
@pytest.mark.parametrize("groups", [1, 4])
def test_all_routers_of_experts_that_do_not_learn_are_refused(
    path: Path, score: Any, normalized: bool, count: int, per_token: int, groups: int
) -> None:
    experts = ExpertsConfig(count=count, per_token=per_token, score=score, normalized=normalized, scale=3.0)
    if count % groups == 0:
        experts = replace(experts, groups=groups, groups_per_token=min(per_token, groups))
    router, logits = experts.build_router(), torch.randn(9, count, dtype=torch.float64, requires_grad=True)
    scores = router.scores(logits)
    weights = router.weights(scores, router.choose(scores, torch.zeros(count)))
    assert learns(tiny.with_model(load_config(Config, path), experts=experts)) == moves(weights, logits)


@pytest.mark.parametrize(
    "mixture",
    [
        *({"kind": "experts", "count": n, "per_token": k, "normalized": of_one}
          for n, k in ((1, 1), (3, 1), (3, 2), (3, 3)) for of_one in (True, False)),
        *({"kind": "heads", "shared": shared, "per_token": k} for shared in (0, 1) for k in (1, 2)),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_all_routers_of_heads_that_do_not_learn_are_refused(path: Path, mixture: dict[str, Any], kv_heads: int) -> None:
    heads = HeadMixtureConfig(**mixture)
    config = tiny.with_model(load_config(Config, path), head_mixture=heads, heads=4 * kv_heads, kv_heads=kv_heads)
    router = config.model.build_head_router()
    assert router is not None
    logits = torch.randn(9, router.choices, dtype=torch.float64, requires_grad=True)
    # Those of shared heads learn anyway.
    others = torch.randn(9, router.logits - router.choices, dtype=torch.float64)
    found = router.choose(torch.cat((logits, others), dim=1), torch.zeros(router.choices))
    assert learns(config) == moves(found.gates, logits)


def test_a_missing_wandb_is_refused_with_the_command_that_installs_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(path, "metrics.wandb_project=none")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    check(path, "metrics.wandb_project=none")
    with pytest.raises(ConfigError) as refused:
        check(path, "metrics.wandb_project=long")
    parts = ["metrics.wandb_project='long'", "pip install 'farspan[wandb]'", "metrics.wandb_project=none"]
    assert [part for part in parts if part not in str(refused.value)] == []
