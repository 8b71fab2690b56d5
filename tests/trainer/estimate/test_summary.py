"""The printed summary: one golden text, and its numbers worked out by hand."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from farspan.kernels.backend import BACKENDS
from farspan.kernels.kinds.masked import Masked
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanisms.dense import Dense
from farspan.kernels.mechanisms.mosa import MoSA
from farspan.kernels.planner import Heads
from farspan.parallel.context_parallel.key_convolution import mean_rows_sent
from farspan.parallel.layout import LAYOUTS, Shards
from farspan.parallel.mesh import Degrees, ParallelConfig
from farspan.trainer.config import AttentionConfig, Config, DataConfig, RunConfig, TrainConfig
from farspan.trainer.data.source import SplitWriter, TokenSource
from farspan.trainer.data.tokenizer import load_tokenizer
from farspan.trainer.estimate.summary import (
    attention_bytes,
    convolution_bytes,
    describe,
    describe_data,
    format_layers,
)
from farspan.trainer.model.config import ExpertsConfig, HeadMixtureConfig, ModelConfig
from farspan.trainer.resolve import fill_in
from tests.support import tiny

GOLDEN = Path(__file__).parent / "golden" / "describe.txt"
FOLDER = Path("none")
CONFIG = Config(
    run=RunConfig(folder=FOLDER),
    model=ModelConfig(layers=4, width=256, heads=8, kv_heads=2, head_dim=32, feed_forward=768, qk_norm=True),
    data=DataConfig(folder=FOLDER, sequence_tokens=4096),
    train=TrainConfig(steps=100, sequences_per_step=6, compute_dtype="float32", device="cpu"),
    attention=AttentionConfig(backend="cpu"),
    parallel=ParallelConfig(context=2),
)
HYBRID = replace(CONFIG, attention=AttentionConfig(mechanism="lightning*2, dense, dense", backend="cpu"))
EXPERTS = ExpertsConfig(count=8, per_token=2, feed_forward=64, shared=192, layers="dense, experts")
HEADS = HeadMixtureConfig(kind="experts", count=5, per_token=2)
CASES = {
    "dense": CONFIG,
    "experts, attention experts, key convolution": tiny.with_model(
        CONFIG, experts=EXPERTS, head_mixture=HEADS, key_convolution=3
    ),
    "gated recurrences": tiny.with_model(HYBRID, recurrent_layer="gated"),
    "for checks only": replace(CONFIG, attention=AttentionConfig(backend="reference")),
}


def summarize(config: Config, ranks: int = 4) -> str:
    degrees = Degrees.resolve(config.parallel, ranks)
    return describe(fill_in(config, degrees, torch.device("cpu"), 257), degrees)


def labels(text: str) -> dict[str, str]:
    return {line[:12].rstrip(): line[12:] for line in text.splitlines()}


def test_the_golden_text() -> None:
    """Write it again with `python -m tests.trainer.estimate.test_summary`, and look at the difference."""
    assert GOLDEN.read_text() == golden()


def golden() -> str:
    return "\n".join(f"# {name}\n{summarize(config)}\n" for name, config in CASES.items())


def test_numbers() -> None:
    # A layer has (2 + 2 / 4) 256^2 + 3 * 256 * 768 parameters in matrices and 2 * 256 + 2 * 32 in norms; 256 more in
    # the last norm, and two tables of 320 * 256: 3,181,056. All but norms and one table, 3,096,576, are multiplied.
    # 6 * 3,096,576 FLOPs a token, and 12 * 4 layers * 256 features for each of 4097 / 2 visible keys: 43.75 million.
    # Ring of 2: keys and values of 2048 tokens, 2 * 2 * 32 features, 4 bytes; once forward, three times backward.
    found = labels(summarize(CONFIG))
    assert found["ranks"] == "4 = dp_replicate 1 x dp_shard 2 x context 2"
    assert found["step"].startswith("24,576 tokens")
    assert found["micro-batch"] == "2,048 tokens per rank, 3 per step"
    assert found["model"] == "3,181,056 parameters"
    assert found["compute"].startswith("43.8 MFLOP")
    assert found["traffic"].startswith("16 MiB")


STEP = {"balance_loss": 0.01, "balance_over": "step"}


@pytest.mark.parametrize(
    ("model", "sequences", "expected"),
    [
        ({"experts": replace(EXPERTS, **STEP)}, 6, "over the step: 2 of 3 micro-batches run forward twice, "),
        ({"head_mixture": replace(HEADS, **STEP)}, 4, "over the step: 1 of 2 micro-batches run forward twice, "),
        ({"experts": replace(EXPERTS, **STEP)}, 2, None),
        ({"experts": replace(EXPERTS, **STEP, count=0)}, 6, None),
        ({"experts": replace(EXPERTS, **(STEP | {"balance_loss": 0.0}))}, 6, None),
        ({"experts": replace(EXPERTS, balance_loss=0.01), "head_mixture": HEADS}, 6, None),
    ],
)
def test_another_forward_pass_for_a_balance_is_said(
    model: dict[str, object], sequences: int, expected: str | None
) -> None:
    config = replace(CONFIG, train=replace(CONFIG.train, sequences_per_step=sequences))
    found = labels(summarize(tiny.with_model(config, **model))).get("balance")
    assert found == (expected and f"{expected}the first time to count loads")


def test_traffic_of_token_choice() -> None:
    mosa = AttentionConfig(mechanism="mosa", options={"sparsity": 16}, backend="cpu")
    config = tiny.with_model(replace(CONFIG, attention=mosa), qk_norm=False)
    found = labels(summarize(config, ranks=2))
    # 4096 / 16 tokens for each of 2 KV heads, 128 of each on each of 2 ranks; keys, values of 32 features in 4 bytes,
    # 64 KiB, once forward and three times backward; 4096 x 2 numbers of routing in 4 bytes, summed over both, 32 KiB.
    # A row lies where an even choice would put it. Where the token is on the other rank, q of 4 heads, k, v and routing
    # go there and out returns; backward its gradient goes and theirs return. All in each of 4 layers.
    routing = MoSA(sparsity=16).sample_routing(Rows.packed([4096]), Heads(query=8, kv=2))
    row, token = torch.arange(256).repeat(2), routing.chosen.t().nonzero()[:, 1]
    is_inner = [(x // 1024 == 1) | (x // 1024 == 2) for x in (16 * row + 8, token)]
    moved = int((is_inner[0] != is_inner[1]).sum())
    assert moved > 0
    sent = 4 * (4 * 65536 + 32768 + moved * (2 * 4 * 32 + 2 * 32 + 1) * 4)
    assert attention_bytes(config, Degrees.resolve(config.parallel, 2)) == sent
    assert found["traffic"].startswith(f"{sent / 2**20:.3g} MiB")
    # As many parameters as without a router, and 2 x 256 in each layer.
    assert found["model"] == f"{3_181_056 - 4 * 2 * 32 + 4 * 2 * 256:,} parameters"
    # Ulysses moves half of all tokens' q, k, v, out and routing, forward and backward.
    ulysses = replace(config, parallel=ParallelConfig(context=2, strategy="ulysses"))
    degrees = Degrees.resolve(ulysses.parallel, 2)
    assert attention_bytes(ulysses, degrees) == 4 * 2 * (2048 * (2 * 8 + 2 * 2) * 32 * 4 + 2048 * 2 * 4) // 2


def test_traffic_of_a_convolution_on_keys() -> None:
    config = tiny.config(FOLDER, FOLDER, ParallelConfig(context=2, layout="striped"))
    config = tiny.with_model(replace(config, train=replace(config.train, compute_dtype="float32")), key_convolution=3)
    without, degrees = tiny.with_model(config, key_convolution=0), Degrees.resolve(config.parallel, 2)
    assert convolution_bytes(without, degrees) == 0
    # Each of 101 rows but the last is read by the next one's rank: 50 a rank, of 2 x 8 numbers in 4 bytes, both ways
    # and in two layers.
    assert convolution_bytes(config, degrees) == 2 * 50 * 16 * (4 + 4)
    long = replace(config, data=replace(config.data, sequence_tokens=1 << 16))
    sent = attention_bytes(long, degrees) + 2 * (1 << 15) * 16 * (4 + 4)
    assert labels(describe(long, degrees))["traffic"].startswith(f"{sent / 2**20:.3g} MiB")


def test_traffic_of_a_convolution_is_that_of_layers_that_have_one() -> None:
    """Gated recurrences have none: of four layers two are left."""
    degrees = Degrees.resolve(HYBRID.parallel, 2)
    plain, gated = (
        convolution_bytes(tiny.with_model(HYBRID, recurrent_layer=kind, key_convolution=3), degrees)
        for kind in ("plain", "gated")
    )
    assert plain == 2 * gated > 0


def test_traffic_of_a_convolution_follows_the_chunks_of_the_run() -> None:
    """Under `balanced` they depend on the work of the mechanism."""
    window = AttentionConfig(mechanism="window", options={"window": 64}, backend="cpu")
    parallel, degrees = ParallelConfig(context=3, layout="balanced"), Degrees(dp_replicate=1, dp_shard=1, context=3)
    config = tiny.with_model(replace(CONFIG, attention=window, parallel=parallel), key_convolution=3)
    sent = {
        mechanism: mean_rows_sent(
            Shards.build(Rows.packed([4096]), layout="balanced", degree=3, work=mechanism.keys_per_query), 2
        )
        for mechanism in (Dense(), *config.mechanisms())
    }
    assert len(set(sent.values())) == 2
    assert convolution_bytes(config, degrees) == 4 * sent[config.mechanisms()[0]] * 2 * 32 * (4 + 4)


@pytest.mark.parametrize(
    ("mechanism", "options", "longest"),
    [
        ("window", {"window": 40}, 40),
        ("window", {"window": 30, "sinks": 10}, 40),
        ("spans", {"alpha": [64.0, 128.0], "beta": [0.0, 0.0], "length": 64, "sinks": 0}, 64),
        ("neighborhood", {"grid": [8, 5], "window": [8, 5]}, 40),
        ("moba", {"block": 64}, 3 * 64),
        ("moba", {"block": 64, "top_k": 1}, 64),
        ("vmoba", {"brick": [32]}, 32),
        ("vmoba", {"brick": [32], "rule": "top_k", "top_k": 4}, 128),
        ("block_sparse", {"block": 16}, 16),
        ("block_sparse", {"block": 16, "density": 0.7}, 16),
        ("block_sparse", {"block": 16, "mask": ["1", "11", "101"]}, 32),
        ("block_sparse", {"block": 16, "mask": ["1", "11", "101"], "causal": False}, 16),
        ("sparge", {"block": 32}, 32),
        ("vggt", {"block": 32}, 32),
        ("mosa", {}, 0),
        ("nats", {"window": 64}, 0),
        ("lightning", {}, 0),
        ("dense", {}, 0),
    ],
)
def test_attention_that_hides_nothing_is_noted(mechanism: str, options: dict[str, object], longest: int) -> None:
    (built,) = AttentionConfig(mechanism=mechanism, options=options).build_mechanisms(1)
    lengths = [n for n in (1, 16, 32, 40, 64, 128, 192) if n <= longest]
    assert all(built.is_dense_up_to(n) for n in lengths)
    assert not built.is_dense_up_to(longest + 1)
    # What the choice of blocks comes to for normal queries and keys.
    for length in lengths:
        rows = Rows.packed([length])
        assert isinstance(built, Masked)
        assert built.unmasked_pairs(rows) == Dense(causal=built.attention_mask().causal).unmasked_pairs(rows)


def test_the_note_is_in_the_summary() -> None:
    attention = AttentionConfig(mechanism="moba, window, dense", options={"moba": {"block": 2048, "top_k": 2}})
    config = replace(CONFIG, attention=attention)
    found = labels(summarize(config, ranks=2))
    assert found["note"] == "MoBA(block=2048, top_k=2) hides no key of 4,096 tokens: this is dense attention"
    assert "note" not in labels(summarize(CONFIG))


def test_the_backend_of_each_kind_of_layer_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's, as a dry run on a machine without one says it."""
    monkeypatch.setattr(type(BACKENDS.get("triton")), "unavailable_reason", lambda self, device: None)
    mechanism = "moba, window, dense, dense"
    attention = AttentionConfig(mechanism=mechanism, options={"moba": {"block": 64}}, backend="auto")
    train = replace(CONFIG.train, device="cuda", compute_dtype="bfloat16")
    config = tiny.with_model(replace(CONFIG, attention=attention, train=train), layers=4)
    dense = "Dense: cuda (one call of FlashAttention for packed documents, cuDNN for long or repeated ones)"
    assert labels(describe(config, Degrees.resolve(config.parallel, 2)))["backend"] == (
        "MoBA: triton (not cuda: it cannot attend to keys that are selected by content); "
        f"Window: triton (not cuda: it takes a call for each part of a window); {dense}"
    )
    monkeypatch.setattr(type(BACKENDS.get("cuda")), "calls", lambda self: "cuDNN, torch's FlashAttention")
    config = replace(config, attention=replace(attention, mechanism="dense", options={}))
    assert labels(describe(config, Degrees.resolve(config.parallel, 2)))["backend"] == dense.removeprefix(
        "Dense: "
    ).replace("(", "(cuDNN, torch's FlashAttention; ")


def test_layers_are_counted() -> None:
    assert format_layers(HYBRID.mechanisms()) == (
        "Lightning(layer=0, layers=4), Lightning(layer=1, layers=4), 2 x Dense(causal=True)"
    )
    assert format_layers(CONFIG.mechanisms()) == "Dense(causal=True)"
    assert re.match("2 x Lightning, 2 x Dense", labels(summarize(HYBRID))["attention"])


def source_of(folder: Path, lengths: list[int]) -> TokenSource:
    """Documents of these lengths, with their end tokens."""
    with SplitWriter(folder, tokenizer=load_tokenizer("bytes")) as writer:
        for length in lengths:
            writer.add(np.zeros(length - 1), num_bytes=length)
        writer.finish()
    return TokenSource(folder)


def test_the_documents_of_a_run(tmp_path: Path) -> None:
    # 100 steps of 6 sequences of 4,096 tokens.
    source = source_of(tmp_path / "long", [100, 200, 300, 4096, 5304])
    assert labels(describe_data(CONFIG, source)) == {
        "documents": "5, median 300, longest 5,304 tokens; 94.0% of tokens in documents of at least 4,096",
        "epochs": "246 = 2,457,600 of 10,000 tokens, 2.4 sequences",
    }
    short = labels(describe_data(CONFIG, source_of(tmp_path / "short", [4095, 4095])))
    assert short["documents"].endswith("0.0% of tokens in documents of at least 4,096")
    assert "attention reaches 4,095 tokens at most, of data.sequence_tokens=4096" in short["warning"]


def test_padding_of_the_layout_is_told() -> None:
    assert labels(summarize(CONFIG))["micro-batch"] == "2,048 tokens per rank, 3 per step"
    odd = replace(CONFIG, data=replace(CONFIG.data, sequence_tokens=101))
    # Two chunks a rank of 26 each, where one of 51 would do.
    told = {"contiguous": "51", "striped": "51", "zigzag": "52", "balanced": "52"}
    assert told.keys() == LAYOUTS.keys()
    for layout, local in told.items():
        found = labels(summarize(replace(odd, parallel=replace(odd.parallel, layout=layout))))["micro-batch"]
        assert found == f"{local} tokens per rank ({1 - 101 / (2 * int(local)):.1%} padding), 3 per step"


if __name__ == "__main__":
    GOLDEN.write_text(golden())
