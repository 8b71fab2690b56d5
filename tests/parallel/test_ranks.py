"""What a process does to itself when it joins a run."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from farspan.parallel.ranks import keep_freed_memory
keep_freed_memory()

def faults(numbers):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(numbers)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(1 << 24), faults(1 << 23))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries keep what they will")
def test_freed_memory_is_used_again() -> None:
    """Each page of 64 MiB, be it small or huge, is a fault the first time; half of them hold the next tensor.

    Half: before 2.38, glibc looks for room for the tensor and its alignment, and the same size may just miss it.
    """
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, timeout=120, check=True)
    first, second = map(int, done.stdout.split())
    assert 4 * second < first
