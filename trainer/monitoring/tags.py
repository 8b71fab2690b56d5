"""The tags of recorded numbers in TensorBoard and W&B, which show them in groups: `train/loss`, `speed/mfu`."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

EVALUATION_KEY = "eval_loss"
SPEED_KEYS = ("tokens_per_s", "step_s", "mfu", "peak_memory_bytes")
TAG_PREFIXES = {"comm_": "comm/", "expert_": "experts/", "head_": "experts/head_"}
"""Groups of tags by how a key of a step begins; other keys are in `train/`."""


def scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the finite numbers of a record and of its tables, each with a tag that begins with its group: `train/loss`.

    Evaluations are in `eval/`; steps by their keys.
    """
    is_evaluation = EVALUATION_KEY in record
    for key, value in record.items():
        if key == "step":
            continue
        tag = f"eval/{key.removeprefix('eval_')}" if is_evaluation else _tag_of_step(key)
        parts = {f"{tag}/{name}": part for name, part in value.items()} if isinstance(value, dict) else {tag: value}
        for name, part in parts.items():
            if isinstance(part, int | float) and math.isfinite(part):
                yield name, part


def _tag_of_step(key: str) -> str:
    for prefix, group in TAG_PREFIXES.items():
        if key.startswith(prefix):
            return group + key.removeprefix(prefix)
    return f"{'speed' if key in SPEED_KEYS else 'train'}/{key}"
