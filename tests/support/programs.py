"""Small bash programs in place of those of a cluster."""

from pathlib import Path


def install(folder: Path, **texts: str) -> Path:
    """Write a program for each name, for the front of PATH; return the folder."""
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return folder
