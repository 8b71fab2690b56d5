"""What DeepSpeed is given, what is refused, and what is said of a run under it; no ranks."""

import json
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from farspan.errors import ConfigError
from farspan.parallel.mesh import Degrees, ParallelConfig
from farspan.trainer.config import Config, DeepSpeedConfig
from farspan.trainer.engines import deepspeed_settings
from farspan.trainer.engines.sizes import kept
from farspan.trainer.resolve import dry_run
from farspan.trainer.validate import validate
from tests.support import tiny

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install 'farspan[deepspeed]'"
)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """ZeRO stage 2, without data; `under` changes the stage."""
    base = tiny.config(tmp_path / "data", tmp_path / "run", ParallelConfig(context=2))
    base = replace(base, train=replace(base.train, compute_dtype="float32", engine="deepspeed"))
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": BUCKET}}))
    return replace(base, deepspeed=DeepSpeedConfig(zero_stage=2, config=path))


def under(config: Config, stage: int) -> Config:
    return replace(config, deepspeed=replace(config.deepspeed, zero_stage=stage))


BUCKET = 1000
RUN = Degrees(dp_replicate=1, dp_shard=1, context=2)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"train": {"compile": True}}, ["train.compile=true", "set train.compile=false"]),
        ({"train": {"compute_dtype": "float64"}}, ["compute_dtype='float64'", "set float32 or bfloat16"]),
        ({"train": {"compute_dtype": "bfloat16"}, "deepspeed": {"zero_stage": 0}}, ["zero_stage=0", "zero_stage=1"]),
        ({"attention": {"mechanism": "nats"}}, ["a penalty on lifetimes (nats)", "set the option penalty=0"]),
        ({"run": {"replay": Path("failed")}}, ["run.replay='failed'", "set train.engine=fsdp2"]),
        ({"train": {"engine": "fsdp2"}}, ["[deepspeed]", "train.engine='fsdp2'", "remove the section"]),
    ],
)
def test_what_does_not_go_with_deepspeed_is_refused(
    config: Config, changes: dict[str, dict[str, Any]], parts: list[str]
) -> None:
    validate(config, RUN)
    for section, values in changes.items():
        config = replace(config, **{section: replace(getattr(config, section), **values)})
    with pytest.raises(ConfigError) as refused:
        validate(config, RUN)
    assert all(part in str(refused.value) for part in parts), refused.value


@pytest.mark.parametrize(
    ("degrees", "part"),
    [(replace(RUN, expert=2), "parallel.expert=2"), (replace(RUN, dp_replicate=2), "dp_replicate=2")],
)
def test_degrees_that_zero_does_not_have_are_refused(config: Config, degrees: Degrees, part: str) -> None:
    config = tiny.with_model(config, experts=tiny.EXPERTS)
    with pytest.raises(ConfigError, match=f"{part} does not go with train.engine='deepspeed'"):
        validate(config, degrees)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("[1]", ["must hold a JSON object"]),
        ("{", ["cannot be read", "name a JSON file"]),
        (None, ["cannot be read", "No such file", "name a JSON file"]),
        ({"train_batch_size": 8}, ["'train_batch_size'", "train.sequences_per_step sets"]),
        ({"gradient_clipping": 1.0}, ["'gradient_clipping'", "optimizer.max_gradient_norm sets"]),
        ({"optimizer": {"type": "Adam"}}, ["'optimizer'", "optimizer.* sets"]),
        ({"scheduler": {}}, ["'scheduler'", "optimizer.schedule sets"]),
        ({"bf16": {"enabled": True}}, ["'bf16'", "train.compute_dtype sets"]),
        ({"sequence_parallel_size": 2}, ["'sequence_parallel_size'", "parallel.* sets"]),
        ({"zero_optimization": {"stage": 1}}, ["'zero_optimization.stage'", "deepspeed.zero_stage sets"]),
        ({"zero_optimisation": {}}, ["'zero_optimisation'", "does not pass on", "Did you mean 'zero_optimization'?"]),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, ["ratio", "do not reach"]),
        ({"zero_optimization": {"offload_optimizer": {"pipeline_read": True}}}, ["pipeline_read", "do not reach"]),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, ["device='nvme'", "set zero_stage=3"]),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, ["offload_param", "set zero_stage=3 or more"]),
        ({"zero_optimization": {"bucket": 1}}, ["that DeepSpeed refuses", "bucket"]),
    ],
)
def test_a_json_that_clashes_is_refused(config: Config, tmp_path: Path, content: Any, parts: list[str]) -> None:
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ConfigError) as refused:
        validate(replace(config, deepspeed=DeepSpeedConfig(zero_stage=2, config=path)), RUN)
    assert str(refused.value).startswith(f"deepspeed.config={str(path)!r} ")
    assert all(part in str(refused.value) for part in parts), refused.value


def test_nvme_needs_a_path_and_libaio(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, nvme = tmp_path / "zero.json", {"device": "nvme"}
    config = replace(config, deepspeed=DeepSpeedConfig(zero_stage=3, config=path))
    path.write_text(json.dumps({"zero_optimization": {"offload_optimizer": nvme}}))
    with pytest.raises(ConfigError, match=r"set zero_optimization\.offload_optimizer\.nvme_path as well\.$"):
        validate(config, RUN)
    from deepspeed.ops.op_builder import AsyncIOBuilder  # pyright: ignore[reportAttributeAccessIssue]

    path.write_text(json.dumps({"zero_optimization": {"offload_optimizer": nvme | {"nvme_path": str(tmp_path)}}}))
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: True)
    validate(config, RUN)
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
    with pytest.raises(ConfigError, match=r"install libaio-dev \(libaio-devel\), or offload to 'cpu'\.$"):
        validate(config, RUN)


def test_a_missing_package_is_refused_with_the_command_that_installs_it(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deepspeed_settings, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"run `pip install 'farspan\[deepspeed\]'`, or set train.engine=fsdp2\.$"):
        validate(config, RUN)


@pytest.mark.parametrize(("stage", "numbers"), [(0, 16), (1, 4 + 4 + 6), (2, 4 + 2 + 6), (3, 2 + 2 + 6)])
def test_memory_is_that_of_the_stage(config: Config, stage: int, numbers: int) -> None:
    """Bytes of each parameter in float32 on 2 ranks: what is computed with, its gradient, master and two moments."""
    found = kept(under(config, stage), RUN)
    assert (found.by_parameter, found.fixed, found.gathers) == (numbers, 0, stage == 3)
    on_gpu = replace(under(config, stage), train=replace(config.train, device="cuda"))
    assert kept(on_gpu, RUN).fixed == (0 if stage == 0 else 4 * BUCKET)


def test_memory_of_a_gpu_leaves_out_what_is_offloaded(config: Config) -> None:
    assert config.deepspeed.config is not None
    offload = {"device": "cpu"}
    config.deepspeed.config.write_text(
        json.dumps({"zero_optimization": {"offload_param": offload, "offload_optimizer": offload}})
    )
    on_gpu = replace(under(config, 3), train=replace(config.train, device="cuda"))
    assert kept(on_gpu, RUN).by_parameter == 4 / 2
    assert kept(on_gpu, RUN).fixed == 4 * 500_000_000


def test_a_dry_run_tells_the_engine_and_what_a_rank_has(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="farspan")
    dry_run(under(config, 3), 2)
    assert "engine      DeepSpeed, ZeRO stage 3: shards optimizer state, gradients, parameters\n" in caplog.text
    dry_run(config, 2)
    of_sharded, of_full = re.findall(r"([\d,]+) parameters on rank 0 of 2", caplog.text)
    # Vectors with an odd number of elements are padded.
    assert 0 <= 2 * int(of_sharded.replace(",", "")) - int(of_full.replace(",", "")) < 20
