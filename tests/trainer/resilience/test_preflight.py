"""The check of nodes on real ranks, one or more of which take themselves to be on a node of their own."""

import socket
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from farspan.errors import ConfigError
from farspan.trainer.resilience import preflight
from farspan.trainer.resilience.preflight import BadNodeError, NodeCheck, report, run_preflight


def check(
    folder: Path, what: str | None, bad: tuple[int, ...], ranks_per_node: int = 1
) -> tuple[str | None, list[str]]:
    """On a rank: return the error and the lines to log, where `what` is wrong for `bad` ranks."""
    rank = dist.get_rank()
    fault = what if rank in bad else None
    no_device = ConfigError("there is no GPU") if fault == "device" else None
    choose_device = mock.Mock(side_effect=no_device, return_value=torch.device("cpu"))

    def sum_up(tensor: torch.Tensor) -> None:
        all_reduce(tensor)
        tensor[-1] += 1

    all_reduce = dist.all_reduce
    faults = {
        "folder": mock.patch.object(Path, "write_bytes", side_effect=OSError(30, "Read-only file system")),
        "storage": mock.patch.object(Path, "write_bytes", side_effect=OSError(5, "Input/output error")),
        "bytes": mock.patch.object(Path, "read_bytes", return_value=b"other"),
        "sum": mock.patch.object(dist, "all_reduce", sum_up),
        "compute": mock.patch.object(
            preflight, "_product_seconds", side_effect=RuntimeError("uncorrectable ECC error\nmore")
        ),
    }
    try:
        with (
            mock.patch.object(socket, "gethostname", return_value=f"n{rank // ranks_per_node}"),
            faults.get(str(fault), mock.MagicMock()),
        ):
            return None, run_preflight(folder, choose_device)
    except (BadNodeError, ConfigError) as error:
        return str(error), []


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("device", "there is no GPU"),
        ("folder", "run.folder='FOLDER' cannot be written at FOLDER (Read-only file system)"),
        ("bytes", "FOLDER gives back other bytes than were written"),
        ("compute", "cpu cannot compute (uncorrectable ECC error)"),
        ("sum", "a sum over all ranks is 11, not 10"),
    ],
)
@pytest.mark.parametrize(
    ("bad", "ranks_per_node", "nodes"), [((2,), 1, [2]), ((0, 2), 1, [0, 2]), ((0,), 2, [0]), ((3,), 2, [1])]
)
def test_a_node_that_cannot_take_part_ends_the_run_on_all_ranks(
    ranks, tmp_path: Path, what: str, reason: str, bad: tuple[int, ...], ranks_per_node: int, nodes: list[int]
) -> None:
    """A device may fail beside others of its node that are well, with a lower rank or a higher one."""
    reason = reason.replace("FOLDER", str(tmp_path))
    unfit = "; ".join(f"n{node}: {reason}" for node in nodes)
    assert ranks(4).run(check, tmp_path, what, bad, ranks_per_node) == [(f"{unfit}: start on other nodes.", [])] * 4
    assert (tmp_path / "unfit").read_text() == "".join(f"n{node} {reason}\n" for node in nodes)
    assert [path.name for path in tmp_path.iterdir()] == ["unfit"]


def test_fit_nodes_are_one_line(ranks, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "new"
    answers = ranks(4).run(check, folder, None, ())
    assert [error for error, _ in answers] == [None] * 4
    first, *others = [lines for _, lines in answers]
    assert others == [first] * 3
    assert first[0].startswith("nodes       4 with 4 ranks; each has ")
    # A refused run leaves no folder behind.
    assert list(tmp_path.iterdir()) == []


def test_that_all_ranks_lack_the_device_is_no_fault_of_nodes(ranks, tmp_path: Path) -> None:
    assert ranks(4).run(check, tmp_path, "device", (0, 1, 2, 3)) == [(None, [])] * 4


def test_a_folder_that_no_rank_can_write_is_no_fault_of_nodes(ranks, tmp_path: Path) -> None:
    """Where storage has failed, it may be."""
    folder = tmp_path / "run"
    for what, reason in (("folder", "Read-only file system"), ("storage", "Input/output error")):
        (error, _), *others = ranks(2).run(check, folder, what, (0, 1))
        assert [found for found, _ in others] == [error]
        where = f"run.folder='{folder}' cannot be written at {tmp_path} ({reason}): "
        assert error.startswith(where if what == "folder" else f"n0: {where}".removesuffix(": "))
        assert error.endswith("choose another run.folder." if what == "folder" else "start on other nodes.")
    assert list(tmp_path.iterdir()) == []


def test_what_is_in_the_way_of_the_folder_is_named(ranks, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "gone")
    (tmp_path / "file").touch()
    for folder, place in ((tmp_path / "run", tmp_path / "run/checkpoints"), (tmp_path / "file/x", tmp_path / "file")):
        (error, _), _ = ranks(2).run(check, folder, None, ())
        assert error is not None
        assert error.startswith(f"run.folder='{folder}' cannot be written at")
        assert f"({place} is no folder): " in error


def test_what_is_odd_is_a_line_for_each_rank() -> None:
    usual = NodeCheck(
        host="n1", clock=1e9, memory=2**34, product_s=0.01, disk=2**40, no_device=None, unwritable=None, fault=None
    )
    few = [usual, replace(usual, host="n2")]
    (line,) = report([*few, *few])
    for number in ("2 with 4 ranks", "16 GiB of memory", "10.00 ms", "1 TiB of disk"):
        assert number in line
    odd = [
        replace(usual, host="n3", clock=1e9 - 3),
        replace(usual, host="n4", product_s=0.0151, memory=2**33),
        replace(usual, clock=1e9 + 1.9, product_s=0.0149, memory=int(2**34 * 0.81)),
    ]
    assert list(report([*few, *few, *odd]))[1:] == [
        "check node  n3, rank 4: its clock is -3.0 s off",
        "check node  n4, rank 5: a product takes 15.10 ms, only 8 GiB of memory is free",
    ]


def test_runs_beside_each_other_do_not_take_each_others_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, others = Path.write_bytes, []

    def meanwhile(path: Path, written: bytes) -> int:
        size = write(path, written)
        if not others:
            others.append(1)
            others.append(preflight._fault_of_storage(tmp_path))
        return size

    monkeypatch.setattr(Path, "write_bytes", meanwhile)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    assert preflight._fault_of_storage(tmp_path) is None
    assert others == [1, None]
    assert list(tmp_path.iterdir()) == []
