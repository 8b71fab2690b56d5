"""How an engine shards what it keeps, for estimates."""

from dataclasses import dataclass

from farspan.kernels.merge import accumulation_dtype
from farspan.parallel.mesh import Degrees
from farspan.trainer.config import Config
from farspan.trainer.engines.deepspeed_settings import ZERO, offload_device, user_settings

REDUCE_BUCKET = 500_000_000
"""Elements of DeepSpeed's buffer for gradients on their way, unless zero_optimization.reduce_bucket_size is set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """Bytes of a rank: a parameter's, with gradient and optimizer state, and those that do not depend on the model.

    gathers: whether a block's parameters are gathered to be computed with, rather than there all the time.
    """

    by_parameter: float
    fixed: int
    gathers: bool


def kept(config: Config, degrees: Degrees) -> Kept:
    compute = config.train.torch_dtype
    master = accumulation_dtype(compute).itemsize
    if config.train.engine == "fsdp2":
        # Master, gradient and two moments.
        return Kept(by_parameter=4 * master / degrees.shard, fixed=0, gathers=True)
    stage, ranks, user = config.deepspeed.zero_stage, degrees.shard, user_settings(config.deepspeed)
    if stage == 0:
        return Kept(by_parameter=4 * master, fixed=0, gathers=False)
    copy = compute.itemsize / (ranks if stage == 3 else 1)
    gradient = master / (ranks if stage >= 2 else 1)
    states = 3 * master / ranks
    fixed = 0
    # On CPUs what is offloaded stays where it is, and memory that nothing was written to is not taken.
    if config.train.device == "cuda":
        copy *= offload_device(user, "offload_param") is None
        states *= offload_device(user, "offload_optimizer") is None
        fixed = int(user.get(ZERO, {}).get("reduce_bucket_size", REDUCE_BUCKET)) * master
    return Kept(by_parameter=copy + gradient + states, fixed=fixed, gathers=stage == 3)


def engine_label(config: Config) -> dict[str, str]:
    """Return a line of the summary about an engine that is not the usual one."""
    if config.train.engine == "fsdp2":
        return {}
    of_stage = ("nothing", "optimizer state", "optimizer state and gradients", "optimizer state, gradients, parameters")
    stage = config.deepspeed.zero_stage
    return {"engine": f"DeepSpeed, ZeRO stage {stage}: shards {of_stage[stage]}"}
