"""Registries: a folder of parts of one kind, each of which registers itself with one `add` line.

Parts of other packages are entry points: in their pyproject.toml,

    [project.entry-points."farspan.kernels.mechanisms"]
    name = "their_package.module:Part"
"""

import difflib
import importlib
import pkgutil
from collections.abc import Iterator
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from typing import Generic, TypeVar

from farspan.errors import ConfigError

T = TypeVar("T")


def nearest_name_hint(name: str, valid: list[str]) -> str:
    """' Did you mean X?' for a near miss, else an empty string."""
    near = difflib.get_close_matches(name, valid, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


class Registry(Generic[T]):
    """Parts of one kind by name: of the modules of `package`, and of entry points in the group of that name."""

    def __init__(self, kind: str, package: str) -> None:
        self._kind = kind
        self._package = package
        self._parts: dict[str, T] = {}
        self._entries: EntryPoints | None = None

    def add(self, name: str, part: T) -> T:
        """Register `part`; raises ValueError if the name is taken."""
        if name in self._parts:
            raise ValueError(f"{self._kind} {name!r} is registered twice")
        self._parts[name] = part
        return part

    def load(self) -> dict[str, T]:
        """Import every module of the package, and every entry point; all parts by name, sorted.

        Raises ConfigError where an entry point cannot be imported or has the name of another part.
        """
        # Helper modules of the folder ("_name.py") are imported too: they register nothing.
        for module in pkgutil.iter_modules(importlib.import_module(self._package).__path__):
            importlib.import_module(f"{self._package}.{module.name}")
        if self._entries is None:
            # Once: to look through what is installed takes some milliseconds.
            self._entries = entry_points(group=self._package)
        for entry in self._entries:
            self._add_entry(entry)
        return dict(sorted(self._parts.items()))

    def _add_entry(self, entry: EntryPoint) -> None:
        try:
            part = entry.load()
        except Exception as error:  # code of others may raise anything as it is imported
            raise ConfigError(
                f"{self._kind} {entry.name!r} of an installed package, {entry.value}, cannot be imported "
                f"({type(error).__name__}: {error}): fix or uninstall that package."
            ) from error
        if self._parts.setdefault(entry.name, part) is not part:
            raise ConfigError(
                f"{self._kind} {entry.name!r} is registered twice, once by an installed package as {entry.value}: "
                "rename its entry point."
            )

    def get(self, name: str) -> T:
        """The part called `name`; raises ConfigError with the nearest valid name."""
        # Parts whose module is already imported need no scan of the folder.
        if name in self._parts:
            return self._parts[name]
        parts = self.load()
        if name not in parts:
            raise ConfigError(
                f"{self._kind} {name!r} does not exist; choose one of {', '.join(parts)}."
                + nearest_name_hint(name, list(parts))
            )
        return parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.load())
