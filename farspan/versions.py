"""Versions of what runs: of packages without importing them, which takes seconds, and the commit of a checkout."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

from farspan import __version__

ROOT = Path(__file__).resolve().parents[1]
UNKNOWN = "unknown"


def summary() -> str:
    """Return what a bug report needs, a line for each of farspan, Python, torch and triton."""
    found = {"farspan": __version__, "python": platform.python_version()}
    found |= {package: version(package) for package in ("torch", "triton")}
    if (of := commit()) != UNKNOWN:
        found["farspan"] += f", commit {of}"
    return "\n".join(f"{name:<8}{text}" for name, text in found.items())


def commit() -> str:
    """Return the commit of this checkout, marked where files differ from it; 'unknown' outside one."""
    # Installed into a folder of another repository, git would find that one.
    if not (ROOT / ".git").exists():
        return UNKNOWN
    try:
        head = _git("rev-parse", "HEAD")
        return f"{head} with changes" if _git("status", "--porcelain", "--untracked-files=no") else head
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
