import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from farspan.errors import ConfigError
from farspan.launch import cli
from farspan.launch.env import (
    check_single_task,
    choose_gloo_interface,
    environment_with_threads,
    read_ranks,
    record_nccl_in,
    report_to_torchrun,
    set_deepspeed_defaults,
    set_device_defaults,
)
from farspan.parallel.mesh import ParallelConfig
from farspan.parallel.ranks import Ranks
from farspan.trainer import train as training
from farspan.trainer.toml_config import to_toml
from tests.support import tiny

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def _empty_environment() -> Iterator[None]:
    with mock.patch.dict(os.environ, clear=True):
        yield


def test_without_torchrun_there_is_one_rank() -> None:
    assert read_ranks() == Ranks(rank=0, world_size=1, local_rank=0)


def test_ranks_are_those_of_torchrun() -> None:
    os.environ.update(TORCHRUN)
    assert read_ranks() == Ranks(rank=3, world_size=8, local_rank=1)


def test_ranks_know_their_slurm_job() -> None:
    os.environ["SLURM_JOB_ID"] = "17"
    assert read_ranks().job == "17"
    os.environ.update(TORCHRUN | {"SLURM_ARRAY_JOB_ID": "16", "SLURM_ARRAY_TASK_ID": "3"})
    assert read_ranks().job == "16_3"


def test_variables_of_torch_are_set_unless_the_user_has_set_them_by_either_name() -> None:
    ours = {
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": "run/nccl_rank_",
    }
    users = {
        "PYTORCH_CUDA_ALLOC_CONF": "",
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "7",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "elsewhere_",
    }
    for before, after in (({}, ours), (users, users), (dict.fromkeys(ours, "x"), dict.fromkeys(ours, "x"))):
        os.environ.clear()
        os.environ.update(before)
        set_device_defaults()
        record_nccl_in(Path("run"))
        assert dict(os.environ) == after


def test_a_rank_sets_them_before_it_meets_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, str] = {}
    monkeypatch.setattr(training, "train", lambda *_: bool(found.update(os.environ)))
    config = tiny.config(tmp_path / "tokens", tmp_path / "run", ParallelConfig())
    (tmp_path / "run.toml").write_text(to_toml(config))
    assert cli.main(["train", str(tmp_path / "run.toml")]) == 0
    assert found["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert found["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/run/nccl_rank_"


def test_deepspeed_finds_its_rank_and_kind_of_device() -> None:
    set_deepspeed_defaults(Ranks(rank=3, world_size=4, local_rank=1), "auto")
    assert (os.environ["LOCAL_RANK"], os.environ.get("DS_ACCELERATOR")) == ("1", None)
    set_deepspeed_defaults(Ranks(), "cpu")
    assert (os.environ["LOCAL_RANK"], os.environ["DS_ACCELERATOR"]) == ("1", "cpu")


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_missing_variable_is_named(name: str) -> None:
    os.environ.update({key: value for key, value in TORCHRUN.items() if key != name})
    with pytest.raises(ConfigError, match=rf"^RANK is set but {name} is not.*torchrun"):
        read_ranks()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "three"}, "RANK='three' in the environment must be an integer"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE='' in the environment must be an integer"),
        ({"RANK": "8"}, "RANK=8, LOCAL_RANK=1 do not fit WORLD_SIZE=8"),
        ({"LOCAL_RANK": "-1"}, "RANK=3, LOCAL_RANK=-1 do not fit WORLD_SIZE=8"),
    ],
)
def test_an_invalid_value_is_refused(changes: dict[str, str], message: str) -> None:
    os.environ.update(TORCHRUN | changes)
    with pytest.raises(ConfigError) as refused:
        read_ranks()
    assert str(refused.value).startswith(message)


def test_ranks_get_their_threads_and_the_rest_of_the_environment() -> None:
    os.environ["FARSPAN_TEST_MARKER"] = "1"
    environment = environment_with_threads(3)
    assert (environment["OMP_NUM_THREADS"], environment["FARSPAN_TEST_MARKER"]) == ("3", "1")
    os.environ["OMP_NUM_THREADS"] = "7"
    assert environment_with_threads(3)["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(
    "name",
    [
        "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "JSM_NAMESPACE_SIZE",
        "FLUX_JOB_SIZE",
    ],
)  # fmt: skip
def test_several_tasks_without_ranks_are_refused(name: str) -> None:
    """Each would be a run of its own, in one folder."""
    os.environ[name] = "4"
    for check in (read_ranks, check_single_task):
        with pytest.raises(ConfigError, match=rf"^{name}=4: .*'farspan launch slurm'.*RANK=0 WORLD_SIZE=1"):
            check()
    os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    assert read_ranks() == Ranks()


@pytest.mark.parametrize(("name", "count"), [("SLURM_NTASKS", "4"), ("SLURM_STEP_NUM_TASKS", "1"), ("PMI_SIZE", "")])
def test_one_task_is_one_rank(name: str, count: str) -> None:
    """A batch script, which is one process, has SLURM_NTASKS of its allocation."""
    os.environ.update({name: count, "SLURM_PROCID": "0"})
    assert read_ranks() == Ranks()


@pytest.mark.parametrize("port", ["", "http", "0", "65536", "-1"])
def test_a_port_that_is_none_is_refused(port: str) -> None:
    os.environ.update(TORCHRUN | {"MASTER_PORT": port})
    with pytest.raises(ConfigError, match=rf"^MASTER_PORT='{port}' "):
        read_ranks()


ROUTES = """Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT
eth0\t00000000\t0100000A\t0003\t0\t0\t0\t00000000\t0\t0\t0
eth1\t00004D0A\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0
eth2\t01004D0A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
"""


@pytest.mark.skipif(sys.byteorder != "little", reason="the table is in the byte order of the machine")
@pytest.mark.parametrize(
    ("address", "named", "interface"),
    [
        ("10.77.9.9", None, "eth1"),
        ("10.77.0.9", None, "eth1"),
        ("192.168.0.1", None, "eth0"),
        ("no-such-host.invalid", None, None),
        ("10.77.9.9", "127.0.1.1", "eth1"),
        ("10.77.9.9", "own", None),
    ],
)
def test_gloo_does_not_need_the_name_of_the_machine(
    address: str, named: str | None, interface: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks on several nodes, whose name leads nowhere, to loopback, or to an address that the machine has."""

    def look_up(host: str, *arguments: object, **options: object):
        if named is None:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1" if named == "own" else named, 0))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(Path, "read_text", lambda path: ROUTES)
    if named == "own":
        monkeypatch.setattr("farspan.launch.env.ip_address", lambda text: mock.Mock(is_loopback=False))
    os.environ.update(TORCHRUN | {"MASTER_ADDR": address, "LOCAL_WORLD_SIZE": "2"})
    assert choose_gloo_interface(read_ranks()) == interface
    assert os.environ.get("GLOO_SOCKET_IFNAME") == interface


def test_ranks_of_one_machine_meet_on_loopback() -> None:
    os.environ.update(TORCHRUN | {"LOCAL_WORLD_SIZE": "8"})
    loopback = choose_gloo_interface(read_ranks())
    assert loopback in ("lo", "lo0")
    os.environ["GLOO_SOCKET_IFNAME"] = "ib0"
    assert choose_gloo_interface(read_ranks()) is None
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"


def test_torchrun_reads_the_error_of_a_rank(tmp_path: Path) -> None:
    report_to_torchrun("nobody asks for it")
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(tmp_path / "error.json")
    report_to_torchrun("farspan: train.steps=0 is wrong")
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(tmp_path / "error.json"))
    last_words = str(ChildFailedError("farspan", {3: failure})).splitlines()[-2]
    assert last_words == "  traceback : farspan: train.steps=0 is wrong"
