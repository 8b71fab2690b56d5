"""What DeepSpeed is given: farspan's settings in its terms, joined with the user's JSON; and what is refused."""

import json
import math
import warnings
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from farspan.errors import ConfigError
from farspan.parallel.mesh import Degrees
from farspan.registry import nearest_name_hint
from farspan.trainer.config import Config, DeepSpeedConfig

ZERO = "zero_optimization"
TAKEN = {
    ZERO, "aio", "comms_logger", "disable_python_gc", "dump_state", "flops_profiler", "log_level", "memory_breakdown",
    "steps_per_print", "wall_clock_breakdown",
}  # fmt: skip
"""Keys of DeepSpeed's JSON that pass through. It would take unknown ones without a word."""
OURS = {
    "optimizer.*": ("optimizer", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
    "optimizer.max_gradient_norm": ("gradient_clipping", f"{ZERO}.compute_grad_norm"),
    "optimizer.schedule": ("scheduler",),
    "train.sequences_per_step": (
        "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
        "managed_gradient_accumulation",
    ),
    "train.compute_dtype": (
        "fp16", "bf16", "bfloat16", "amp", "torch_autocast", "data_types", "communication_data_type",
        "seq_parallel_communication_data_type", "prescale_gradients", "gradient_predivide_factor",
        "gradient_allreduce_op", "keep_in_fp32_modules",
    ),
    "train.recompute": ("activation_checkpointing",),
    "train.compile": ("compile",),
    "parallel.*": (
        "sequence_parallel_size", "data_parallel_size", "tensor_parallel", "expert_parallel", "pipeline",
        "use_data_before_expert_parallelism", f"{ZERO}.mics_shard_size", f"{ZERO}.zero_hpz_partition_size",
    ),
    "data.*": ("data_efficiency", "curriculum_learning", "data_types", "dataloader_drop_last"),
    "checkpoint.*": ("checkpoint", f"{ZERO}.load_from_fp32_weights", f"{ZERO}.elastic_checkpoint"),
    "metrics.*": ("tensorboard", "wandb", "csv_monitor", "comet"),
    "deepspeed.zero_stage": (f"{ZERO}.stage",),
}  # fmt: skip
"""Keys of DeepSpeed's JSON that farspan's own settings decide, by these."""
UNREACHED = (
    f"{ZERO}.zenflow",
    *(f"{ZERO}.offload_optimizer.{key}" for key in ("super_offload", "ratio", "pipeline_read", "pipeline_write")),
)
"""Keys under which a part of the optimizer is out of reach of farspan's learning rate or checkpoints: elsewhere, or on
its way to or from NVMe."""


def import_deepspeed() -> ModuleType:
    """Return the package, which then compiles nothing as it starts; raises ConfigError where it is not installed."""
    if find_spec("deepspeed") is None:
        raise ConfigError(
            "train.engine='deepspeed' needs a package that is not installed: run `pip install 'farspan[deepspeed]'`, "
            "or set train.engine=fsdp2."
        )
    import deepspeed
    import deepspeed.ops

    # Transfers between CPUs by shared memory, which DeepSpeed would compile for minutes; gloo serves.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed 0.19 calls these by names that torch 2.13 has renamed, in every step.
    renamed = r".*torch\.distributed\.(all_gather_into|reduce_scatter)_tensor. is deprecated"
    warnings.filterwarnings("ignore", message=renamed, category=FutureWarning)
    return deepspeed


def check_deepspeed(config: Config, degrees: Degrees) -> None:
    """Raise ConfigError for what DeepSpeed, or farspan under it, cannot do."""
    if config.train.engine != "deepspeed":
        if config.deepspeed != DeepSpeedConfig():
            raise ConfigError(
                f"[deepspeed] is for train.engine=deepspeed, but train.engine={config.train.engine!r}: set that, or "
                "remove the section."
            )
        return
    stage = config.deepspeed.zero_stage
    for is_set, setting, reason in (
        (degrees.expert > 1, f"parallel.expert={degrees.expert}", "splits experts: set parallel.expert=1"),
        (
            degrees.dp_replicate > 1,
            f"parallel.dp_replicate={degrees.dp_replicate}",
            "keeps copies of shards, but ZeRO shards over all ranks: set parallel.dp_replicate=1",
        ),
        (config.train.compile, "train.compile=true", "compiles around FSDP2's hooks: set train.compile=false"),
        (
            config.train.torch_dtype == torch.float64,
            "train.compute_dtype='float64'",
            "has no float64 in ZeRO: set float32 or bfloat16",
        ),
        (
            stage == 0 and config.train.torch_dtype == torch.bfloat16,
            "train.compute_dtype='bfloat16' with deepspeed.zero_stage=0",
            "would sum gradients in bfloat16: set deepspeed.zero_stage=1, or float32",
        ),
        (
            any(mechanism.adds_gradient for mechanism in config.mechanisms()),
            "a penalty on lifetimes (nats)",
            "averages gradients, and so divides what is no part of the loss by the number of ranks: set the option "
            "penalty=0, or train.engine=fsdp2",
        ),
        (
            config.run.replay is not None,
            f"run.replay={str(config.run.replay)!r}",
            "reads gradients that ZeRO has freed: set train.engine=fsdp2, which reads the same checkpoints",
        ),
    ):
        if is_set:
            raise ConfigError(f"{setting} does not go with train.engine='deepspeed', it {reason}.")
    settings = settings_of(config, degrees)
    zero = settings[ZERO]
    import_deepspeed()
    from deepspeed.ops.op_builder import AsyncIOBuilder  # pyright: ignore[reportAttributeAccessIssue]
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    offloads = [offload_device(settings, part) for part in ("offload_optimizer", "offload_param")]
    if "nvme" in offloads and not AsyncIOBuilder().is_compatible():
        raise ConfigError(
            f"{_named(config.deepspeed)} offloads to 'nvme', for which DeepSpeed compiles its async_io with libaio, "
            "which is not there: install libaio-dev (libaio-devel), or offload to 'cpu'."
        )

    try:
        DeepSpeedZeroConfig(**zero)
    except (ValueError, AssertionError) as error:
        causes = " ".join(str(error).split())
        raise ConfigError(f"{_named(config.deepspeed)} has a {ZERO} that DeepSpeed refuses: {causes}.") from None


def settings_of(config: Config, degrees: Degrees) -> dict[str, Any]:
    """Return the settings to initialize DeepSpeed with; raises ConfigError for what a JSON file must not have."""
    user, stage, norm = user_settings(config.deepspeed), config.deepspeed.zero_stage, config.optimizer.max_gradient_norm
    return {
        **user,
        # One sequence for each rank and micro-batch, as DeepSpeed counts: to it all ranks are data-parallel.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.train.sequences_per_step // degrees.data,
        # Without ZeRO the norm before clipping is not told: the engine clips by itself. 0 never clips.
        "gradient_clipping": 0.0 if stage == 0 or math.isinf(norm) else norm,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.train.torch_dtype == torch.bfloat16, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        ZERO: {**user.get(ZERO, {}), "stage": stage},
    }


def user_settings(config: DeepSpeedConfig) -> dict[str, Any]:
    """Return the JSON of deepspeed.config, checked; raises ConfigError."""
    if config.config is None:
        return {}
    try:
        found = json.loads(Path(config.config).read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{_named(config)} cannot be read ({error}): name a JSON file.") from None
    if not isinstance(found, dict) or not isinstance(found.get(ZERO, {}), dict):
        raise ConfigError(f"{_named(config)} must hold a JSON object, and another one as its {ZERO}, if it has that.")
    keys = list(_dotted(found))
    for ours, theirs in OURS.items():
        for key in keys:
            if key in theirs:
                raise ConfigError(f"{_named(config)} has {key!r}, which {ours} sets in farspan: remove it there.")
    for key in keys:
        if key in UNREACHED:
            raise ConfigError(f"{_named(config)} has {key!r}, which farspan's checkpoints do not reach: remove it.")
        if "." not in key and key not in TAKEN:
            hint = nearest_name_hint(key, sorted(TAKEN))
            raise ConfigError(
                f"{_named(config)} has {key!r}, which farspan does not pass on: it passes {', '.join(sorted(TAKEN))}."
                f"{hint}"
            )
    for part, least in (("offload_optimizer", 1), ("offload_param", 3)):
        device = offload_device(found, part)
        # Below stage 3 DeepSpeed takes nvme for cpu.
        least = 3 if device == "nvme" else least
        if device is not None and config.zero_stage < least:
            raise ConfigError(
                f"{_named(config)} has {ZERO}.{part}.device={device!r}, but deepspeed.zero_stage={config.zero_stage}: "
                f"set zero_stage={least} or more, or remove it."
            )
        if device == "nvme" and "nvme_path" not in found[ZERO][part]:
            raise ConfigError(f"{_named(config)} has {ZERO}.{part}.device='nvme': set {ZERO}.{part}.nvme_path as well.")
    return found


def offload_device(settings: Mapping[str, Any], part: str) -> str | None:
    """Return where DeepSpeed's settings offload `part`, `offload_optimizer` or `offload_param`, to."""
    offload = settings.get(ZERO, {}).get(part)
    device = offload.get("device", "none") if isinstance(offload, dict) else "none"
    return None if device == "none" else device


def _dotted(tree: Mapping[str, Any], where: str = "") -> Iterable[str]:
    for key, value in tree.items():
        yield f"{where}{key}"
        if isinstance(value, dict):
            yield from _dotted(value, f"{where}{key}.")


def _named(config: DeepSpeedConfig) -> str:
    return f"deepspeed.config={str(config.config)!r}"
