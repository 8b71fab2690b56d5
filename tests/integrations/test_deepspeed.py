"""The DeepSpeed engine against the FSDP2 engine on the same ranks: steps, also skipped ones, and checkpoints."""

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from farspan.launch.env import set_deepspeed_defaults
from farspan.parallel.comm import Traffic
from farspan.parallel.mesh import Mesh, ParallelConfig
from farspan.parallel.ranks import Ranks
from farspan.trainer.build import build_batches
from farspan.trainer.config import CheckpointConfig, Config, DeepSpeedConfig, EvaluateConfig
from farspan.trainer.engines.choice import build_engine
from farspan.trainer.engines.engine import Engine
from farspan.trainer.optim import learning_rate, set_learning_rate
from farspan.trainer.step import train_step
from farspan.trainer.validate import validate
from farspan.trainer.weights.io import fill_with_weights
from tests.support import tiny
from tests.support.async_io import on_nvme, replace_async_io
from tests.support.deepspeed_bugs import planted
from tests.support.rank_pool import RankPool
from tests.support.runs import records, train_all
from tests.support.steps import sequences

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install 'farspan[deepspeed]'"
)

STEPS, REFUSED_STEP, SPOILT_STEP, SPOILT_RANK = 10, 0, 5, 1
# float32 sums in another order differ by some 1e-7; ten updates let that grow little.
TOLERANCE = 1e-6
# Of the largest number of a tensor. AdamW divides by roots of small numbers.
STATE_TOLERANCE = 1e-4
# Gradients of 8 bits, and parameters that are rounded to 8 bits after each update.
BFLOAT16_TOLERANCE, BFLOAT16_STATE_TOLERANCE = 2e-3, 5e-2
# Small, so that each has several of them; buckets are filled with NaN by every test.
BUCKETS = {
    "reduce_bucket_size": 1000, "allgather_bucket_size": 5000, "stage3_prefetch_bucket_size": 3000,
    "stage3_param_persistence_threshold": 0, "sub_group_size": 5000,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def pools() -> Iterator[Callable[[int], RankPool]]:
    """Ranks of their own: those of other tests never import DeepSpeed."""
    started: dict[int, RankPool] = {}
    yield lambda size: started.setdefault(size, RankPool(size))
    for pool in started.values():
        pool.stop()


@pytest.fixture(scope="module")
def zero(data: Path) -> Callable[..., Config]:
    """Return a function from a stage, None for FSDP2, to a run of two micro-batches under CP 2; zero: for its JSON."""

    def config(stage: int | None, parallel: ParallelConfig | None = None, *, steps: int = STEPS, **zero: Any) -> Config:
        base = tiny.config(data, data.parent / "run", parallel or ParallelConfig(context=2), steps=steps)
        base = replace(base, train=replace(base.train, compute_dtype="float32"))
        return base if stage is None else under_zero(base, stage, **zero)

    return config


def under_zero(config: Config, stage: int, **zero: Any) -> Config:
    content = json.dumps({"zero_optimization": BUCKETS | zero})
    path = config.data.folder.parent / f"{hashlib.sha256(content.encode()).hexdigest()}.json"
    path.write_text(content)
    return replace(
        config,
        train=replace(config.train, engine="deepspeed"),
        deepspeed=DeepSpeedConfig(zero_stage=stage, config=path),
    )


@dataclass(frozen=True)
class Course:
    """losses, norms: of each step. state: full tensors by name. computed_with: hashes of a rank's own parameters."""

    losses: list[float]
    norms: list[float]
    state: dict[str, torch.Tensor]
    computed_with: dict[str, str]


def modules_of_deepspeed() -> int:
    return sum(name.partition(".")[0] == "deepspeed" for name in sys.modules)


def prepare(config: Config) -> None:
    set_deepspeed_defaults(Ranks(local_rank=dist.get_rank()), "cpu")
    if config.train.engine == "deepspeed":
        replace_async_io()


def spoil(module: object, inputs: object, output: tuple[torch.Tensor, ...]) -> None:
    output[0].register_hook(lambda gradient: gradient * math.nan)


def train(config: Config, plant: str | None = None) -> Course:
    """On a rank: ten steps, of which one is refused and one has a NaN in a gradient of one rank."""
    prepare(config)
    with planted(plant):
        mesh, device = Mesh.build(config.parallel, "cpu"), torch.device("cpu")
        validate(config, mesh.degrees)
        engine = build_engine(config, mesh, device)
        batches, source = build_batches(config, mesh, device, Traffic()), sequences(config)
        course = Course([], [], {}, {})
        for step in range(config.train.steps):
            set_learning_rate(engine.optimizer, learning_rate(config.optimizer, step, config.train.steps))
            indexes = range(config.train.sequences_per_step * step, config.train.sequences_per_step * (step + 1))
            local = [batches.build(source.sequence(i)) for i in indexes[mesh.data_rank :: mesh.degrees.data]]
            spoils = step == SPOILT_STEP and dist.get_rank() == SPOILT_RANK
            with engine.model.blocks[0].register_forward_hook(spoil) if spoils else nullcontext():
                result = train_step(engine, local, context=batches.channel, reason_to_skip=reason_to_skip(step))
            course.losses.append(result.loss)
            course.norms.append(result.gradient_norm)
    if plant is not None:
        # DeepSpeed keeps a mesh for all engines of a process.
        from deepspeed.utils import groups

        groups.mesh_device = None
    course.state.update(full_state(engine))
    course.computed_with.update(own_parameters(engine))
    return course


def reason_to_skip(step: int) -> Callable[[float, float], str | None]:
    return lambda loss, norm: "refused" if step == REFUSED_STEP or not math.isfinite(norm) else None


def full_state(engine: Engine) -> dict[str, torch.Tensor]:
    state = engine.state()
    flat = dict(state["model"])
    flat |= {f"{name}.{key}": value for name, of in state["optimizer"].items() for key, value in of.items()}
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for name, t in flat.items()}


def own_parameters(engine: Engine) -> dict[str, str]:
    """The hash of what this rank computes with."""
    if engine.wrapped is engine.model:
        return {}
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with GatheredParameters(list(engine.model.parameters())):
        return {
            name: hashlib.sha256(p.detach().float().numpy().tobytes()).hexdigest()
            for name, p in engine.model.named_parameters()
        }


def differences(
    courses: list[Course], expected: Course, tolerance: float = TOLERANCE, state_tolerance: float = STATE_TOLERANCE
) -> list[str]:
    """Name what ranks have other than expected: of losses, norms, masters, moments; or other than each other."""
    found = []
    for course in courses:
        for name in ("losses", "norms"):
            numbers, wanted = getattr(course, name), getattr(expected, name)
            # A norm of NaN may be told as infinite.
            finite = [(a, b) for a, b in zip(numbers, wanted, strict=True) if math.isfinite(a) or math.isfinite(b)]
            assert len(finite) >= len(wanted) - 1
            found += [name] * any(a != pytest.approx(b, rel=tolerance) for a, b in finite)
        assert course.state.keys() == expected.state.keys()
        for name, tensor in course.state.items():
            assert tensor.dtype == expected.state[name].dtype, name
            kind, scale = name.rpartition(".")[2], expected.state[name].abs().max().item()
            # Moments are linear in the clipped gradient, or in its square: AdamW's updates would hide its scale.
            close = torch.allclose(tensor.double(), expected.state[name].double(), rtol=0, atol=state_tolerance * scale)
            found += [] if close else [kind if kind.startswith("exp") else "masters"]
        found += ["parameters of ranks"] * (course.computed_with != courses[0].computed_with)
    return sorted(set(found))


@pytest.fixture(scope="module")
def expected(pools: Callable[[int], RankPool], zero: Callable[..., Config]) -> Course:
    """Of FSDP2, which the tests of trainer/ compare with float64."""
    course = pools(2).run(train, zero(None))[0]
    assert pools(2).run(modules_of_deepspeed) == [0, 0]
    # Clipping is active in every step.
    assert min(norm for norm in course.norms if math.isfinite(norm)) > 1.5 > 2 * zero(None).optimizer.max_gradient_norm
    assert zero(None).optimizer.weight_decay > 0
    return course


@pytest.mark.parametrize("stage", range(4))
def test_steps_are_those_of_fsdp2(
    stage: int, pools: Callable[[int], RankPool], zero: Callable[..., Config], expected: Course
) -> None:
    courses = pools(2).run(train, zero(stage))
    assert differences(courses, expected) == []
    assert len(courses[0].computed_with) > 20


@pytest.mark.parametrize(
    ("bug", "stage", "seen"),
    [
        ("told of CP", 2, {"losses", "norms", "parameters of ranks"}),
        ("scaled by the degree", 3, {"norms"}),
        ("averaged", 0, {"norms"}),
        ("norm of a rank", 1, {"norms"}),
        ("not clipped", 2, {"exp_avg", "exp_avg_sq"}),
    ],
)
def test_planted_bugs_are_seen(
    bug: str,
    stage: int,
    seen: set[str],
    pools: Callable[[int], RankPool],
    zero: Callable[..., Config],
    expected: Course,
) -> None:
    assert seen <= set(differences(pools(2).run(train, zero(stage), bug), expected))


def test_a_model_of_all_parts_on_four_ranks(pools: Callable[[int], RankPool], zero: Callable[..., Config]) -> None:
    """Tied tables, experts balanced over the step, whose loads are counted ahead, and recomputation."""
    parallel = ParallelConfig(dp_shard=2, context=2)
    experts = replace(tiny.EXPERTS, balance_over="step")
    base = tiny.with_model(zero(None, parallel, steps=4), tied_embeddings=True, key_convolution=3, experts=experts)
    base = replace(base, train=replace(base.train, sequences_per_step=4, recompute="block"))
    (expected, *_), courses = pools(4).run(train, base), pools(4).run(train, under_zero(base, 3))
    assert differences(courses, expected) == []
    assert any("bias" in name for name in expected.state)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_has_masters_and_sums_in_float32(
    stage: int, pools: Callable[[int], RankPool], zero: Callable[..., Config]
) -> None:
    base = in_bfloat16(zero(None, steps=4))
    (expected, *_), courses = pools(2).run(train, base), pools(2).run(train, under_zero(base, stage))
    assert differences(courses, expected, BFLOAT16_TOLERANCE, BFLOAT16_STATE_TOLERANCE) == []
    for table in courses[0].state["embedding.weight"], expected.state["embedding.weight"]:
        assert table.dtype == torch.float32
        assert not torch.equal(table, table.bfloat16().float())


def in_bfloat16(config: Config) -> Config:
    return replace(config, train=replace(config.train, compute_dtype="bfloat16"))


@pytest.mark.parametrize(("stage", "part"), [(2, "offload_optimizer"), (3, "offload_param")])
def test_what_is_offloaded_does_the_same(
    stage: int, part: str, pools: Callable[[int], RankPool], zero: Callable[..., Config], expected: Course
) -> None:
    assert differences(pools(2).run(train, zero(stage, **{part: {"device": "cpu"}})), expected) == []


def test_what_is_on_nvme_does_the_same(
    pools: Callable[[int], RankPool], zero: Callable[..., Config], expected: Course, tmp_path: Path
) -> None:
    assert differences(pools(2).run(train, zero(3, **on_nvme(tmp_path))), expected) == []
    assert [kind for kind in ("exp_avg-", "gradient", "param.tensor") if not list(tmp_path.rglob(f"*{kind}*"))] == []


def whole_run(config: Config) -> dict[str, str]:
    """On a rank: a run to its last step; return the bits of its state."""
    prepare(config)
    return train_all(config)[1]


def course_of(run: Config) -> list[tuple[float, float]]:
    return [(record["loss"], record["grad_norm"]) for record in records(run.run.folder) if "loss" in record]


def evaluations_of(run: Config) -> list[float]:
    return [record["eval_loss"] for record in records(run.run.folder) if "eval_loss" in record]


@dataclass(frozen=True)
class Finished:
    """A run of 4 steps with checkpoints after 2 and 4, and the bits of its state at the end."""

    config: Config
    bits: dict[str, str]

    def begun(self, folder: Path) -> Config:
        """A copy of it that has only its first checkpoint."""
        shutil.copytree(self.config.run.folder, folder)
        shutil.rmtree(folder / "checkpoints" / "step_00000004")
        return replace(self.config, run=replace(self.config.run, folder=folder))


@pytest.fixture(scope="module")
def finished(
    pools: Callable[[int], RankPool], zero: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int | None], Finished]:
    known: dict[int | None, Finished] = {}

    def run(stage: int | None) -> Finished:
        if stage not in known:
            base = zero(stage, steps=4)
            config = replace(
                base,
                run=replace(base.run, folder=tmp_path_factory.mktemp(f"stage_{stage}") / "run"),
                checkpoint=CheckpointConfig(every_steps=2, keep=9),
                evaluate=EvaluateConfig(every_steps=2, sequences=1),
            )
            known[stage] = Finished(config, pools(2).run(whole_run, config)[0])
        return known[stage]

    return run


@pytest.mark.parametrize("stage", range(4))
def test_a_resumed_run_goes_on_to_the_bit(
    stage: int, pools: Callable[[int], RankPool], finished: Callable[[int | None], Finished], tmp_path: Path
) -> None:
    whole = finished(stage)
    resumed = whole.begun(tmp_path / "resumed")
    assert pools(2).run(whole_run, resumed) == [whole.bits, whole.bits]
    assert course_of(resumed) == course_of(whole.config)
    assert evaluations_of(resumed) == evaluations_of(whole.config)
    assert len(evaluations_of(resumed)) == 2


def test_a_run_on_nvme_goes_on_to_the_bit(
    pools: Callable[[int], RankPool], finished: Callable[[int | None], Finished], tmp_path: Path
) -> None:
    in_memory = finished(3)
    first = under_zero(in_memory.begun(tmp_path / "first"), 3, **on_nvme(tmp_path / "nvme"))
    bits = pools(2).run(whole_run, first)
    again = Finished(first, bits[0]).begun(tmp_path / "again")
    assert pools(2).run(whole_run, again) == bits
    # Norms of what is offloaded are summed in another order.
    for pair, wanted in zip(course_of(first), course_of(in_memory.config), strict=True):
        assert pair == pytest.approx(wanted, rel=TOLERANCE)


@pytest.mark.parametrize(("stage", "other", "num_ranks"), [(3, 1, 1), (1, 3, 4), (2, None, 2), (None, 0, 2)])
def test_a_run_goes_on_under_another_stage_engine_and_number_of_ranks(
    stage: int | None,
    other: int | None,
    num_ranks: int,
    pools: Callable[[int], RankPool],
    finished: Callable[[int | None], Finished],
    tmp_path: Path,
) -> None:
    whole = finished(stage)
    begun = whole.begun(tmp_path / "resumed")
    plain = replace(begun, train=replace(begun.train, engine="fsdp2"), deepspeed=DeepSpeedConfig())
    resumed = replace(plain if other is None else under_zero(plain, other), parallel=ParallelConfig(context=num_ranks))
    pools(num_ranks).run(whole_run, resumed)
    course = course_of(resumed)
    assert course[:2] == course_of(whole.config)[:2]
    for pair, wanted in zip(course, course_of(whole.config), strict=True):
        assert pair == pytest.approx(wanted, rel=TOLERANCE)


def read(config: Config, folder: Path) -> dict[str, torch.Tensor]:
    """On a rank: full parameters of a new model after it has taken over weights."""
    prepare(config)
    engine = build_engine(config, Mesh.build(config.parallel, "cpu"), torch.device("cpu"))
    tensors = engine.state()["model"]
    fill_with_weights(tensors, folder, tied=False)
    engine.load_state(tensors)
    return full_state(engine)


def test_weights_of_another_run_fill_a_model(
    pools: Callable[[int], RankPool], zero: Callable[..., Config], finished: Callable[[int | None], Finished]
) -> None:
    folder = finished(2).config.run.folder / "checkpoints" / "step_00000002"
    wanted = pools(2).run(read, zero(None), folder)[0]
    # Masters that were rounded to what is computed with would differ.
    found = pools(2).run(read, in_bfloat16(zero(3)), folder)[0]
    assert wanted.keys() == found.keys()
    assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []


def dtypes(config: Config) -> dict[str, torch.dtype]:
    prepare(config)
    engine = build_engine(config, Mesh.build(config.parallel, "cpu"), torch.device("cpu"))
    return {name: tensor.dtype for name, tensor in full_state(engine).items()}


def test_checkpoints_have_the_dtypes_of_fsdp2(pools: Callable[[int], RankPool], zero: Callable[..., Config]) -> None:
    base = tiny.with_model(in_bfloat16(zero(None)), experts=tiny.EXPERTS)
    found = pools(2).run(dtypes, under_zero(base, 3))[0]
    assert found == pools(2).run(dtypes, base)[0]
    assert found["blocks.0.feed_forward.bias"] == torch.float32
