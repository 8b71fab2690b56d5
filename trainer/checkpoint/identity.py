"""The settings that a run must share with the checkpoint it resumes from."""

from collections.abc import Container
from dataclasses import MISSING, fields
from typing import Any

from farspan.trainer.config import Config, flat
from farspan.trainer.estimate.summary import format_layers
from farspan.trainer.model.config import ModelConfig


def resume_identity(config: Config, data_fingerprint: str) -> dict[str, Any]:
    """Return the settings that a resumed run has to share with the run before, by dotted name."""
    return {
        "run.seed": config.run.seed,
        "data.folder": data_fingerprint,
        "data.sequence_tokens": config.data.sequence_tokens,
        # In full, so that a default that has changed counts too.
        "attention.mechanism": format_layers(config.mechanisms()),
        **flat(config.model, "model."),
    }


def identity_defaults(config: Config) -> dict[str, Any]:
    """Return the defaults of the settings of `resume_identity` that have one, by dotted name."""
    model = config.model
    required = {part.name for part in fields(model) if part.default is MISSING and part.default_factory is MISSING}
    plain = ModelConfig(**{name: getattr(model, name) for name in required})
    return {name: value for name, value in flat(plain, "model.").items() if name.removeprefix("model.") not in required}


def begins_data_anew(changes: Container[str]) -> list[str]:
    """Return the changed settings that give the data another order, in which the place so far tells nothing."""
    return [name for name in ("data.folder", "run.seed") if name in changes]


def is_recut(changes: Container[str]) -> bool:
    """Return whether sequences have another length in the same data.

    A run cannot go on then: sequences are read in a random order, so that those that are left of an epoch are pieces of
    the earlier length from all over it.
    """
    return "data.sequence_tokens" in changes and not begins_data_anew(changes)
