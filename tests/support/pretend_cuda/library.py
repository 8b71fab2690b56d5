"""The C++ half of the pretend device, built by the system's compiler once for each torch and source."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import torch
from torch.utils import cpp_extension

SOURCE = Path(__file__).parent / "device.cpp"
COMPILER = "g++"


def missing_reason() -> str | None:
    """Return why the library cannot be built, or serve, here; or None."""
    if torch.version.cuda is not None:
        return "torch is built for CUDA, whose driver FSDP would ask: the pretend device wants the CPU build"
    return None if shutil.which(COMPILER) else f"{COMPILER} is not installed"


def load() -> None:
    """Give this process the guard, the hooks and the pinned memory of a CUDA device, for good."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libc10.so", "libtorch_cpu.so"):
        # torch loads them for itself alone; the library looks for their symbols among those of the process.
        ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(build())).install()


def build() -> Path:
    """Return the built library; processes that build it at the same time do not disturb each other."""
    key = hashlib.sha256(SOURCE.read_bytes() + f"{torch.__version__} {torch.version.git_version}".encode()).hexdigest()
    folder = Path(tempfile.gettempdir()) / f"farspan-pretend-cuda-{os.getuid()}"
    built = folder / f"{key[:16]}.so"
    if not built.exists():
        folder.mkdir(mode=0o700, exist_ok=True)
        includes = [f"-I{path}" for path in (*cpp_extension.include_paths(), sysconfig.get_path("include"))]
        with tempfile.TemporaryDirectory(dir=folder) as own:
            out = Path(own) / built.name
            command = [COMPILER, "-shared", "-fPIC", "-O1", "-std=c++20", *includes, str(SOURCE), "-o", str(out)]
            subprocess.run(command, check=True)
            out.replace(built)
    return built
