"""Trains all cases on four gloo ranks; a program, as its processes are forked from one that has imported Megatron.

python -m tests.support.megatron.program results.pt
"""

import multiprocessing
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from tests.support.megatron import checks, on_cpu
from tests.support.megatron.cases import CASES, CHECKS, Case
from tests.support.megatron.steps import train_step

RANKS, TIMEOUT_S = 4, 120


def outcome(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns, or its traceback."""
    try:
        return function(*arguments)
    except BaseException:  # pytest's own failures are no Exception
        return traceback.format_exc()


def results() -> dict[tuple[str, bool], Any]:
    """On a rank: the step of each case by its name and whether it is a truth, None for a check, or how it failed."""
    found: dict[tuple[str, bool], Any] = {}
    truths = {case.alone.name: case.alone for case in CASES}
    by_sizes = sorted([*truths.values(), *CASES], key=lambda case: tuple(case.sizes.values()))
    for sizes, cases in groupby(by_sizes, key=lambda case: case.sizes):
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=sizes["tp"],
            context_parallel_size=sizes["cp"],
            expert_model_parallel_size=sizes["ep"],
            pipeline_model_parallel_size=sizes["pp"],
            hybrid_context_parallel=True,
        )
        for case in cases:
            found[case.name, case.truth] = outcome(train_step, case)
        if sizes == Case(cp=2).sizes:
            found |= {(name, False): outcome(getattr(checks, name)) for name in CHECKS}
        parallel_state.destroy_model_parallel()
    return found


def serve(rank: int, folder: str, out: Path) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    store = dist.FileStore(f"{folder}/store", RANKS)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=TIMEOUT_S))
    on_cpu.install()
    with on_cpu.OnCPU():
        found = results()
    if rank == 0:
        torch.save(found, out)
    dist.destroy_process_group()


def main(out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        fork = multiprocessing.get_context("fork")
        processes = [fork.Process(target=serve, args=(rank, folder, out)) for rank in range(RANKS)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
