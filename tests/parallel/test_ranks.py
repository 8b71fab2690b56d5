"""What a process does to itself when it joins a run."""

import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from farspan.parallel import ranks as parallel_ranks
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


@pytest.mark.parametrize(("kinds", "is_bound"), [(("cuda", "cuda"), True), (("cuda", "cpu"), False)])
def test_nccl_connects_at_once_unless_a_rank_lacks_its_gpu(
    kinds: Sequence[str], is_bound: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise that rank could not tell the others, which would wait for it in NCCL."""
    store, bound = dist.HashStore(), {}  # pyright: ignore[reportPrivateImportUsage]
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, rank, device_id, **__: bound.update({rank: device_id}))
    monkeypatch.setattr(parallel_ranks, "_leave", lambda: None)

    def join(rank: int) -> None:
        with connected(Ranks(rank=rank, world_size=2), torch.device(kinds[rank], rank), timedelta(seconds=20), store):
            pass

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(join, range(2)))
    assert bound == {rank: torch.device("cuda", rank) if is_bound else None for rank in range(2)}


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
