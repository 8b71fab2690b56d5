import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from farspan.errors import ConfigError, DataError
from farspan.parallel.context_parallel.strategy import STRATEGIES
from farspan.parallel.mesh import Degrees, ParallelConfig
from farspan.parallel.ranks import Ranks
from farspan.trainer.config import AttentionConfig, Config
from farspan.trainer.data.source import TokenSource
from farspan.trainer.data.tokenizer import load_tokenizer
from farspan.trainer.estimate.summary import attention_bytes
from farspan.trainer.resolve import choose_device, choose_strategy, machine_of, resolve, strategy_costs
from farspan.trainer.toml_config import load_config, to_toml
from farspan.trainer.validate import validate
from tests.support import tiny


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return tiny.config(tiny.make_data(tmp_path), tmp_path / "run", ParallelConfig(context=2))


def test_everything_derived_is_written_out(config: Config) -> None:
    open_ended = replace(
        tiny.with_model(config, vocabulary_size=0),
        attention=replace(config.attention, backend="auto"),
        train=replace(config.train, sequences_per_step=3, device="auto"),
    )
    resolved = resolve(open_ended, Ranks(world_size=6)).config
    # 256 bytes and the end token, rounded up to a multiple of 64.
    assert load_tokenizer("bytes").vocabulary_size == 257
    assert resolved.model.vocabulary_size == 320
    assert resolved.parallel.dp_shard == 3
    if not torch.cuda.is_available():
        assert (resolved.train.device, resolved.attention.backend) == ("cpu", "cpu")


def test_a_resolved_configuration_resolves_to_itself(config: Config, tmp_path: Path) -> None:
    resolved = resolve(config, Ranks(world_size=4)).config
    (tmp_path / "config.toml").write_text(to_toml(resolved))
    again = load_config(Config, tmp_path / "config.toml")
    assert again == resolved
    assert resolve(again, Ranks(world_size=4)).config == resolved


@pytest.mark.parametrize(
    ("asked", "num_gpus", "local_rank", "expected"),
    [
        ("cpu", 8, 0, "cpu"),
        ("auto", 0, 5, "cpu"),
        ("auto", 2, 1, "cuda:1"),
        ("cuda", 8, 7, "cuda:7"),
        ("cuda", 0, 0, "train.device='cuda' but torch sees no GPU"),
        ("cuda", 2, 2, "rank 2 of this machine has no GPU, torch sees 2"),
        ("auto", 2, 3, "rank 3 of this machine has no GPU, torch sees 2"),
    ],
)
def test_device(
    config: Config, monkeypatch: pytest.MonkeyPatch, asked, num_gpus: int, local_rank: int, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    asking = replace(config, train=replace(config.train, device=asked))
    if " " in expected:
        with pytest.raises(ConfigError, match=expected):
            choose_device(asking, local_rank)
    else:
        assert str(choose_device(asking, local_rank)) == expected


def test_a_vocabulary_that_is_too_small(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"model\.vocabulary_size=256 .* 257 tokens of data\.folder="):
        resolve(tiny.with_model(config, vocabulary_size=256), Ranks(world_size=2))
    resolve(tiny.with_model(config, vocabulary_size=257), Ranks(world_size=2))


def test_a_backend_that_does_not_run_on_the_device(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    gpu = replace(config, train=replace(config.train, device="cuda"))
    with pytest.raises(ConfigError, match=r"attention\.backend='cpu' cannot run on cuda"):
        resolve(gpu, Ranks(world_size=2))


def test_compiling_without_a_compiler_is_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = replace(config, train=replace(config.train, compile=True))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
    with pytest.raises(ConfigError, match=r"train\.compile=true needs a C\+\+ compiler"):
        resolve(compiled, Ranks(world_size=2))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_data_that_is_not_there(config: Config, split: str) -> None:
    shutil.rmtree(config.data.folder / split)
    with pytest.raises(DataError, match=rf"data\.folder='{config.data.folder}' has no {split}/meta\.json"):
        resolve(config, Ranks(world_size=2))
    shutil.rmtree(config.data.folder)
    with pytest.raises(DataError, match=r"data\.folder='.*tokens' does not exist: .*`farspan data prepare`"):
        resolve(config, Ranks(world_size=2))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_split_given_for_the_folder(config: Config, split: str) -> None:
    folder = config.data.folder
    with pytest.raises(DataError, match=rf"data\.folder='{folder / split}' is one split .* data\.folder={folder}\."):
        resolve(replace(config, data=replace(config.data, folder=folder / split)), Ranks(world_size=2))


def test_data_of_an_earlier_version_has_a_folder_to_rename(config: Config) -> None:
    folder = config.data.folder
    (folder / "validation").rename(folder / "held_out")
    with pytest.raises(DataError, match=rf"data\.folder='{folder}' .*`mv {folder}/held_out {folder}/validation`\.$"):
        resolve(config, Ranks(world_size=2))


def test_rules_and_degrees_come_before_the_data(config: Config) -> None:
    shutil.rmtree(config.data.folder)
    with pytest.raises(ConfigError, match=r"must divide the number of ranks, 3"):
        resolve(config, Ranks(world_size=3))
    with pytest.raises(ConfigError, match=r"model\.head_dim=7 must be even"):
        resolve(tiny.with_model(config, head_dim=7), Ranks(world_size=2))


def config_of(parallel: ParallelConfig, mechanism: str = "dense", **options: object) -> Config:
    attention = AttentionConfig(mechanism=mechanism, options=options, backend="cpu")
    return replace(tiny.config(Path("data"), Path("run"), parallel), attention=attention)


def chosen(run: Config, ranks: int) -> tuple[str, list[str]]:
    degrees = Degrees.resolve(run.parallel, ranks)
    validate(run, degrees)
    resolved, reasons = choose_strategy(run, degrees, "cpu")
    return resolved.parallel.strategy, reasons


def test_one_rank_moves_nothing() -> None:
    name, reasons = chosen(config_of(ParallelConfig(strategy="auto")), 1)
    assert name == "single"
    assert reasons[0].startswith("auto        single: ")


def test_the_choice_is_the_first_of_its_reasons_and_takes_the_run() -> None:
    for mechanism in ("dense", "lightning", "lightning, dense", "mosa"):
        run = config_of(ParallelConfig(strategy="auto", context=4, context_inner=2), mechanism)
        name, reasons = chosen(run, 4)
        assert reasons[0].startswith(f"auto        {name}: ")
        costs, refusals = strategy_costs(run, Degrees.resolve(run.parallel, 4), "cpu")
        assert len(reasons) == len(costs)
        assert costs.keys() | refusals.keys() == set(STRATEGIES)
        named = replace(run, parallel=replace(run.parallel, strategy=name))
        validate(named, Degrees.resolve(named.parallel, 4))


def test_a_strategy_that_is_named_is_kept() -> None:
    assert chosen(config_of(ParallelConfig(strategy="ulysses", context=2)), 2) == ("ulysses", [])


@pytest.mark.parametrize("strategy", ["ring", "double_ring", "gather", "ulysses", "hybrid"])
def test_auto_and_the_summary_count_the_same_bytes(strategy: str) -> None:
    """Of strategies under which all ranks send as much, whatever dtype gradients travel in."""
    volumes = []
    for grad_comm_dtype in ("accumulation", "compute"):
        parallel = ParallelConfig(context=8, context_inner=4, strategy=strategy, grad_comm_dtype=grad_comm_dtype)
        run = tiny.with_model(config_of(parallel), heads=8)
        run, degrees = replace(run, train=replace(run.train, compute_dtype="bfloat16")), Degrees.resolve(parallel, 8)
        volumes.append(strategy_costs(run, degrees, "cpu")[0][strategy].volume)
        assert attention_bytes(run, degrees) == volumes[-1].forward + volumes[-1].backward
    wide, rounded = volumes
    assert wide.forward == rounded.forward
    assert wide.backward > rounded.backward
    if strategy == "ring":
        # Seven hops of keys and values; of gradients eight of a sum, twice as wide, or seven of its parts.
        assert wide.backward * (7 + 7) == rounded.backward * (7 + 2 * 8)


def test_links_come_from_the_configuration() -> None:
    machine = machine_of(ParallelConfig(context=4, context_inner=2, inner_gbytes_per_s=3, outer_gbytes_per_s=2), "cuda")
    assert (machine.node_ranks, machine.inner_bytes_per_s, machine.outer_bytes_per_s) == (2, 3e9, 2e9)
    assert machine_of(ParallelConfig(), "cuda").outer_bytes_per_s > 1e9


def test_a_run_that_no_strategy_takes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    only = {name: STRATEGIES.get(name) for name in ("single", "ship")}
    monkeypatch.setattr(STRATEGIES, "load", lambda: only)
    with pytest.raises(ConfigError, match=r"parallel\.strategy='auto' finds none: .*set parallel\.context=1"):
        chosen(config_of(ParallelConfig(strategy="auto", context=2)), 2)


def test_data_of_fewer_tokens_than_a_sequence_are_refused(config: Config) -> None:
    tokens = TokenSource(Path(config.data.folder) / "train").num_tokens
    for length, fits in ((tokens, True), (tokens + 1, False)):
        changed = replace(config, data=replace(config.data, sequence_tokens=length))
        if fits:
            resolve(changed, Ranks(world_size=2))
            continue
        with pytest.raises(ConfigError, match=rf"data\.sequence_tokens={length} is more than the {tokens} tokens"):
            resolve(changed, Ranks(world_size=2))


def test_a_run_beyond_the_memory_of_the_machine_is_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 1 << 20}.__getitem__)
    with pytest.raises(ConfigError, match=r"this machine has 1 MiB for each"):
        resolve(config, Ranks(world_size=2))
