"""Keys, values and folders that were renamed: an old name is refused in one sentence that gives the new one."""

from collections.abc import Mapping
from typing import Any

from farspan.errors import ConfigError

KEYS = {
    "checkpoint.permanent_every": "checkpoint.permanent_every_steps",
    "skip.most": "skip.max_consecutive_skips",
    "skip.sigma": "skip.spike_sigma",
    "parallel.rounded_gradients": 'parallel.grad_comm_dtype ("compute" for true, "accumulation" for false)',
    "model.experts.normalised": "model.experts.normalized",
    "model.head_mixture.normalised": "model.head_mixture.normalized",
    "attention.options.neighbourhood": "attention.options.neighborhood",
}
VALUES = {"attention.mechanism": {"neighbourhood": "neighborhood"}, "attention.backend": {"library": "cuda"}}
"""By key; of a pattern of layers, the names in it."""
RENAMED_SPLITS = {"held_out": "validation"}
"""Folders of prepared data."""


def refuse_old_key(key: str) -> None:
    """Raise ConfigError for an old key."""
    if key in KEYS:
        raise ConfigError(f"{key} was renamed to {KEYS[key]}.")


def refuse_old_value(key: str, value: Any) -> None:
    """Raise ConfigError for an old value of a key."""
    if key in VALUES and isinstance(value, str):
        # A pattern such as 'neighborhood*3, dense'; most values are a single name.
        for name in (part.partition("*")[0].strip() for part in value.split(",")):
            if name in VALUES[key]:
                raise ConfigError(f"{key}={value!r}: {name!r} was renamed to {VALUES[key][name]!r}.")


def current_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of an earlier version, by dotted name, under the names of today."""
    return {KEYS.get(key, key): value for key, value in settings.items()}
