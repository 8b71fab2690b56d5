"""What a process does to itself when it joins a run."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from farspan.parallel.ranks import keep_freed_memory
keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(), faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries keep what they will")
def test_freed_memory_is_used_again() -> None:
    """Each page of 64 MiB, be it small or huge, is a fault the first time, none the second."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, timeout=120, check=True)
    first, second = map(int, done.stdout.split())
    assert 4 * second < first
