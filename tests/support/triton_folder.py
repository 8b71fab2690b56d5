"""Triton for the tests of its kernels: a pinned version in a folder of its own, for processes that start with it.

It is no requirement of farspan: a CUDA build of torch brings its own Triton, and refuses another one.
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".venv" / "triton-3.6.0"


def run_with_triton(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python with Triton on its path; skips the test where Triton has no wheel."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("Triton is made for Linux on x86-64")
    assert FOLDER.is_dir(), f"{FOLDER} is missing: `make test` installs Triton there"
    path = os.pathsep.join([str(FOLDER), str(ROOT)])
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
