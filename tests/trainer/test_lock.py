import subprocess
import sys
from pathlib import Path

import pytest

from farspan.kernels.errors import ConfigError
from farspan.trainer.lock import lock_folder

HOLDER = """
import sys, time
from pathlib import Path
from farspan.trainer.lock import lock_folder
file = lock_folder(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""


def test_a_folder_belongs_to_one_process_until_it_ends(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mine"
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "locked\n"
            with pytest.raises(ConfigError) as refused:
                lock_folder(folder)
            assert str(refused.value).startswith(f"run.folder='{folder}' is in use by process {holder.pid} on ")
        finally:
            # However it ends, the lock is free again.
            holder.kill()
    with lock_folder(folder), pytest.raises(ConfigError, match="is in use by"):
        lock_folder(folder)
    lock_folder(folder).close()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/run' cannot be written \(Not a directory\): choose another\."):
        lock_folder(tmp_path / "file" / "run")
