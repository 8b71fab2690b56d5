"""Paths as users write them, in files and on the command line: `~` and `$NAME` as in a shell."""

import os
import re

from farspan.errors import ConfigError

VARIABLE = re.compile(r"\$(?:[A-Za-z_][A-Za-z0-9_]*|\{[^}]*\})")


def expanded(text: str) -> str:
    """Return a path, or words with paths in them, with `$NAME`, `${NAME}` and a leading `~` or `~user` replaced.

    Raises ValueError, whose text follows a name of the value, for a variable or user that does not exist.
    """
    # The variables that users name here are theirs: no setting of farspan is read.
    for variable in VARIABLE.findall(text):
        if os.path.expandvars(variable) in ("", variable):
            raise ValueError(f"has {variable}, which is not set here: set it, or write the path in full")
    home, slash, rest = text.partition("/")
    if home.startswith("~"):
        found = os.path.expanduser(home)
        if found == home:
            raise ValueError(f"has {home}, which is no user's folder: write the path in full, or ./{home} for a name")
        home = found
    return os.path.expandvars(f"{home}{slash}{rest}")


def expanded_setting(name: str, text: str) -> str:
    """As `expanded`; raises ConfigError, which names the setting."""
    try:
        return expanded(text)
    except ValueError as error:
        raise ConfigError(f"{name}={text!r} {error}.") from None
