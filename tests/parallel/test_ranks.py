"""What a process does to itself when it joins a run."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from farspan.parallel.mesh import device_mesh
from farspan.parallel.ranks import Ranks, connected

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


def test_meshes_of_a_process_group_that_has_ended_are_forgotten() -> None:
    """DTensor gives what it computes the mesh of an earlier, equal tensor; groups are called by their number."""
    for num_groups in (2, 1):
        with connected(Ranks(), torch.device("cpu")):
            for _ in range(num_groups):
                dist.new_group([0])
            tensor = distribute_tensor(torch.ones(2), device_mesh("test", {"shard": 1}, "cpu"), [Shard(0)])
            doubled = tensor * 2
            assert isinstance(doubled, DTensor)
            assert doubled.device_mesh.get_local_rank(0) == 0
