"""The runs of a job array: one override, or several together, with another value for each run."""

from collections.abc import Sequence

from farspan.errors import ConfigError


def sweep(each: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the overrides of each run, of `section.key=A,B,...`; raises ConfigError where the counts differ."""
    columns = []
    for text in each:
        key, equals, values = text.partition("=")
        if not equals:
            raise ConfigError(f"--each {text} has no values; write it as section.key=A,B,...")
        if key.strip() == "run.folder":
            raise ConfigError("--each run.folder=... cannot be: each run has a numbered folder below run.folder.")
        columns.append([f"{key}={value.strip()}" for value in values.split(",")])
    if len({len(column) for column in columns}) > 1:
        counts = ", ".join(str(len(column)) for column in columns)
        raise ConfigError(f"all --each must have as many values, since they change together; these have {counts}.")
    return list(zip(*columns, strict=True))
