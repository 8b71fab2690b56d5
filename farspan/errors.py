"""Errors that a user can fix: each message is one sentence that says what to change."""

SHOWN_CHARACTERS = 60


def shortened(text: str) -> str:
    """Return a value as a message shows it."""
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"


class FarspanError(Exception):
    """Base of every error that the command line prints as one sentence, without a traceback."""


class ConfigError(FarspanError):
    """A configuration value, or a combination of values, that cannot work."""


class DataError(FarspanError):
    """An input file or a prepared data folder that is missing, empty, truncated or corrupt."""


class CheckpointError(FarspanError):
    """A checkpoint that is missing, damaged or of another model."""


class TrainingError(FarspanError):
    """A run that cannot continue, such as one whose loss is no longer finite."""
