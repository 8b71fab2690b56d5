"""The runs of a job array: each changes one override, or several together, to another value."""

from collections.abc import Sequence

from farspan.errors import ConfigError


def array_overrides(each: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the overrides of each run, from `section.key=A,B,...`; raises ConfigError if the counts differ."""
    columns = []
    for text in each:
        key, equals, values = text.partition("=")
        if not equals:
            raise ConfigError(f"--each {text} has no values; write it as section.key=A,B,...")
        if key.strip() == "run.folder":
            raise ConfigError("--each run.folder=... is not possible: each run has a numbered folder in run.folder.")
        columns.append([f"{key}={value.strip()}" for value in values.split(",")])
    if len({len(column) for column in columns}) > 1:
        counts = ", ".join(str(len(column)) for column in columns)
        raise ConfigError(f"all --each must have as many values, since they change together; these have {counts}.")
    return list(zip(*columns, strict=True))


def element_name(number: int) -> str:
    """Return the name of the folder of an array's element; sbatch's `%3a` is the same."""
    return f"{number:03}"
