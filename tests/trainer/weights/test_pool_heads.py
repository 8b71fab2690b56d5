"""Pooling of KV heads: equal heads compute the same, different heads become their mean."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from farspan.errors import ConfigError
from farspan.parallel.ranks import Ranks, connected
from farspan.trainer.config import AttentionConfig
from farspan.trainer.model.config import HeadMixtureConfig
from farspan.trainer.model.transformer import Transformer
from farspan.trainer.weights.io import Decoder, StoredWeights, find_trained_model
from farspan.trainer.weights.pool_heads import pool_heads, pool_rows
from tests.support import hugging_face_models as ours

pytestmark = pytest.mark.filterwarnings("ignore")

MHA = replace(ours.MODEL, kv_heads=4)


def with_equal_heads(decoder: Decoder, kv_heads: int) -> Transformer:
    """A model whose KV heads are the same within each of `kv_heads` groups."""
    model = ours.random_model(decoder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.split(".")[-2] in ("key", "value", "key_convolution"):
                groups = parameter.unflatten(0, (kv_heads, -1, decoder.model.head_dim))
                groups.copy_(groups[:, :1].clone().expand_as(groups))
    return model


@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": True, "key_convolution": 3},
        {"qkv_bias": True},
        {"head_mixture": HeadMixtureConfig(kind="experts", count=2, per_token=2, own_keys=True)},
    ],
    ids=["plain", "norms and convolution", "biases", "experts with keys of their own"],
)
def test_equal_heads_compute_the_same(changes: dict[str, Any], kv_heads: int, tmp_path: Path) -> None:
    decoder = Decoder(model=replace(MHA, **changes))
    copies = 2 if "head_mixture" in changes else 1
    run = ours.save_run(with_equal_heads(decoder, copies * kv_heads), decoder, tmp_path / "run")
    fewer = pool_heads(run, kv_heads, tmp_path / "weights")
    assert fewer == Decoder(model=replace(decoder.model, kv_heads=kv_heads))
    assert find_trained_model(tmp_path / "weights").decoder == fewer
    before = ours.logits(decoder, run / "checkpoints" / "step_00000001")
    assert before.std() > 0.1
    assert (ours.logits(fewer, tmp_path / "weights") - before).abs().max() <= 2e-6


def test_different_heads_become_their_mean() -> None:
    heads = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 8.0], [7.0, 0.0]]).repeat_interleave(3, dim=0)  # 4 heads of 3
    two, one = pool_rows(heads, group=2, head_dim=3), pool_rows(heads, group=4, head_dim=3)
    assert two.tolist() == [[2.0, 3.0]] * 3 + [[6.0, 4.0]] * 3
    assert one.tolist() == [[4.0, 3.5]] * 3
    assert pool_rows(heads.bfloat16(), group=2, head_dim=3).dtype == torch.bfloat16


def test_all_else_is_kept(tmp_path: Path) -> None:
    decoder = Decoder(
        model=replace(MHA, recurrent_layer="gated"), attention=AttentionConfig(mechanism="lightning, dense")
    )
    run = ours.save_run(ours.random_model(decoder), decoder, tmp_path / "run")
    fewer = pool_heads(run / "checkpoints" / "step_00000001", 2, tmp_path / "weights")
    assert fewer.attention.mechanism == "lightning, dense"
    with connected(Ranks(), ours.CPU):
        before = StoredWeights(run / "checkpoints" / "step_00000001").read(decoder.shapes())
        after = StoredWeights(tmp_path / "weights").read(fewer.shapes())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"blocks.1.attention.key.weight", "blocks.1.attention.value.weight"}
    assert torch.equal(
        after["blocks.1.attention.key.weight"], pool_rows(before["blocks.1.attention.key.weight"], 2, 16)
    )


def test_heads_that_do_not_divide_or_have_a_router_are_refused(tmp_path: Path) -> None:
    def refused(kv_heads: int, decoder: Decoder) -> str:
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        run = ours.save_run(ours.random_model(decoder), decoder, folder)
        with pytest.raises(ConfigError) as error:
            pool_heads(run, kv_heads, tmp_path / "weights")
        assert not (tmp_path / "weights").exists()
        return str(error.value)

    for kv_heads in (3, 4, 0, 8):
        message = refused(kv_heads, Decoder(model=replace(MHA, layers=1)))
        assert f"--kv-heads {kv_heads} " in message
        assert "model.kv_heads=4 of this model: take 1, 2." in message
    assert "single KV head" in refused(1, Decoder(model=replace(MHA, layers=1, kv_heads=1)))
    heads = HeadMixtureConfig(kind="heads", per_token=1)
    assert "model.head_mixture.kind='heads'" in refused(1, Decoder(model=replace(ours.MODEL, head_mixture=heads)))
    mosa = Decoder(model=ours.MODEL, attention=AttentionConfig(mechanism="mosa"))
    assert "attention.mechanism has MoSA(" in refused(1, mosa)
