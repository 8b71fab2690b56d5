"""What a measurement was made on and with."""

import datetime
import importlib.metadata
import platform
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from farspan.kernels.backend import BACKENDS

ROOT = Path(__file__).resolve().parents[2]


def facts(device: torch.device, tool: str, arguments: Sequence[str]) -> dict[str, str]:
    """Return the machine, the software, the commit and the command, in words."""
    found = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "command": shlex.join(["python", "-m", f"farspan.tools.{tool}", *arguments]),
        "cpu": cpu_model(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
    } | {package: version(package) for package in ("triton", "flash-attn", "flash-attn-3", "flash-attn-4")}
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)}
        found |= {"cudnn": str(torch.backends.cudnn.version()), "cuda_backend": BACKENDS.get("cuda").calls()}
    return found


def default_out(machine: dict[str, str], what: str) -> Path:
    """Return docs/benchmarks/DATE_DEVICE_WHAT in this checkout."""
    device = re.sub(r"[^a-z0-9]+", "_", model(machine).lower()).strip("_")
    return ROOT / "docs" / "benchmarks" / f"{machine['date']}_{device}_{what}"


def model(machine: dict[str, str]) -> str:
    """Return the GPU, or without one the CPU, of a machine's facts."""
    return machine.get("gpu") or machine["cpu"]


def cpu_model() -> str:
    """Return the model of the CPU, as Linux tells it, or its architecture."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.*\S)", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def commit() -> str:
    """Return the commit of this checkout, marked where files differ from it; 'unknown' outside git."""
    try:
        head = _git("rev-parse", "HEAD")
        return f"{head} with changes" if _git("status", "--porcelain", "--untracked-files=no") else head
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
