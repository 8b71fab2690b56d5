"""The folder that `farspan data prepare` makes: complete under its name or not there, however the process ends.

.NAME.partial/  beside NAME, from the start to the end of one process
    lock        held by that process; the file names it
    data/       becomes NAME
    earlier/    what data/ replaces, between two renames
"""

import fcntl
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from farspan.errors import DataError
from farspan.trainer.data.source import META_FILE, OFFSETS_FILE, SPLITS, TOKENS_FILE
from farspan.trainer.data.token_bytes import TOKEN_BYTES_FILE
from farspan.trainer.data.tokenizer import TOKENIZER_FILES, TOKENIZER_FOLDER

log = logging.getLogger("farspan")


@contextmanager
def output_folder(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield the path of a folder to make; it takes the name `target` when the block ends, and is removed if it raises.

    Removes what a killed process left of the same folder. Raises DataError while another process is preparing it, or
    where `target` exists (with `overwrite`: and is no earlier result); OSError.
    """
    # Hidden, so that no reader takes it in. Not with_name: the root folder has none.
    partial = target.parent / f".{target.name}.partial"
    partial.parent.mkdir(parents=True, exist_ok=True)
    with _locked(partial):
        try:
            _restore_earlier(partial, target)
            if (partial / "data").exists():
                log.info("%-12s%s, which an interrupted prepare left", "removed", partial)
                shutil.rmtree(partial / "data")
            _check_target(target, overwrite)
            yield partial / "data"
            if overwrite and target.exists():
                target.rename(partial / "earlier")
            # Fails if a folder with files has got the name meanwhile.
            (partial / "data").rename(target)
        finally:
            _restore_earlier(partial, target)
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Make `partial` and lock it; the system releases the lock when the process ends."""
    is_new = not partial.exists()
    partial.mkdir(exist_ok=True)
    with (partial / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise DataError(
                f"{partial} is in use by {file.read() or 'another process'}, which prepares the same folder: wait for "
                "it, or pass another --out."
            ) from None
        except OSError as error:
            if not is_new:
                raise DataError(
                    f"{partial} exists on a file system without locks ({error.strerror}): remove it if no other "
                    "process prepares the same folder, or pass another --out."
                ) from None
        # The last owner may have removed the folder after this process opened the file.
        if not (partial / "lock").exists():
            raise DataError(f"{partial} was in use by another process a moment ago: start again.")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _restore_earlier(partial: Path, target: Path) -> None:
    """Undo the first of two renames, if the second was not reached."""
    if (partial / "earlier").exists() and not target.exists():
        (partial / "earlier").rename(target)


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not overwrite:
        raise DataError(f"{target} exists already; pass another --out, or --overwrite to replace it.")
    ours = {target / split / name for split in SPLITS for name in ("", TOKENS_FILE, OFFSETS_FILE, META_FILE)}
    ours.add(target / TOKEN_BYTES_FILE)
    ours |= {target / TOKENIZER_FOLDER / name for name in ("", *TOKENIZER_FILES)}
    # --overwrite must never be able to delete a corpus.
    stranger = next((path for path in target.rglob("*") if path not in ours), None)
    if stranger is not None or not target.is_dir():
        raise DataError(f"{stranger or target} is not a result of an earlier prepare; pass another --out.")
