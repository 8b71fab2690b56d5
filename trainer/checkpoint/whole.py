"""Checkpoints of a run read by one process: whether they are whole, and which is the newest that is."""

import logging
from pathlib import Path

from farspan.kernels.errors import CheckpointError
from farspan.trainer.checkpoint.manifest import DamagedError, Manifest, check_content, check_sizes
from farspan.trainer.checkpoint.steps import finished

log = logging.getLogger("farspan")


def check_whole(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint; raises DamagedError unless every file holds what was written."""
    manifest = Manifest.read(folder)
    check_sizes(folder, manifest.files)
    check_content(folder, manifest.files)
    return manifest


def newest_whole(folder: Path) -> Path:
    """Return the newest checkpoint in `folder` that is whole; say in one line why each newer one is not.

    Raises CheckpointError if there is none.
    """
    found = finished(folder)
    if not found:
        raise CheckpointError(f"{folder} holds no finished checkpoint: name the folder of a run that has saved one.")
    for path in reversed(found):
        try:
            check_whole(path)
        except DamagedError as error:
            log.info("refused     %s", error)
        else:
            return path
    raise CheckpointError(f"none of the {len(found)} checkpoints in {folder} is whole: restore one of them.")
