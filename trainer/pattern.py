"""Patterns of layers, such as 'lightning*7, dense'."""

from farspan.errors import ConfigError


def parse_pattern(text: str, setting: str) -> list[str]:
    """Return the names of one round of a pattern; raises ConfigError, which names the setting, for anything else."""
    names: list[str] = []
    for part in text.split(","):
        name, star, times = (piece.strip() for piece in part.partition("*"))
        if not name or (star and not (times.isdecimal() and int(times) > 0)):
            raise ConfigError(
                f"{setting}={text!r} must be names with commas between, each with how many "
                "layers in a row have it, such as 'lightning*7, dense'."
            )
        names += [name] * (int(times) if star else 1)
    return names
