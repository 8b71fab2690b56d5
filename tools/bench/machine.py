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


def facts(device: torch.device, arguments: Sequence[str], *, tool: str = "bench_attention") -> dict[str, str]:
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
        found |= {"gpu": device_name(device), "cuda": str(torch.version.cuda)}
        found |= {"cudnn": str(torch.backends.cudnn.version()), "cuda_backend": BACKENDS.get("cuda").calls()}
    return found


def default_out(device: torch.device, what: str) -> Path:
    """Return docs/benchmarks/DATE_DEVICE_WHAT in this checkout."""
    model = re.sub(r"[^a-z0-9]+", "_", device_name(device).lower()).strip("_")
    return ROOT / "docs" / "benchmarks" / f"{datetime.date.today():%Y-%m-%d}_{model}_{what}"


def device_name(device: torch.device) -> str:
    """Return the model of the GPU, or of the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


def cpu_model() -> str:
    """Return the model of the CPU, as Linux tells it, or its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


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
    """Return the version of a package, or that there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
