"""The settings that a run must share with the checkpoint it resumes from."""

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
