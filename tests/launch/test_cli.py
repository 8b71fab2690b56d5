"""The command line in this process: refusals in one sentence with exit status 2, overrides, dry runs, start-up."""

import logging
import os
import shlex
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import farspan
from farspan import versions
from farspan.errors import DataError
from farspan.launch import cli
from farspan.launch.local import LocalJob
from farspan.launch.slurm.job import SlurmJob
from farspan.launch.slurm.site import Site
from farspan.parallel.mesh import ParallelConfig
from farspan.trainer.config import Config
from farspan.trainer.data import prepare
from farspan.trainer.toml_config import load_config, to_toml
from tests.support import tiny
from tests.support.programs import install

Capture = pytest.CaptureFixture[str]
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A configuration whose data does not exist."""
    path = tmp_path / "run.toml"
    path.write_text(to_toml(tiny.config(tmp_path / "tokens", tmp_path / "run", ParallelConfig())))
    return path


@pytest.fixture(autouse=True)
def _starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalJob, "run", mock.Mock(side_effect=AssertionError("a job was started")))


LOCAL, SLURM = "launch local CONFIG --gpus-per-node", "launch slurm CONFIG --nodes 1 --gpus-per-node 2"
# The command, and what its error names: key, value, and a fix if there is one.
REFUSALS = [
    ("train CONFIG model.layer=3", ["model.layer=3", "layers"]),
    ("train CONFIG model.head_dim=7", ["model.head_dim=7", "even"]),
    ("train CONFIG train.compute_dtype=float16", ['train.compute_dtype="float16"', "'bfloat16'"]),
    ("train CONFIG other.toml", ["'other.toml'", "section.key=value"]),
    ("train CONFIG parallel.context=2", ["parallel.context=2 x parallel.dp_replicate=1 = 2"]),
    (
        "train CONFIG --dry-run parallel.context=2",
        ["the number of ranks, 1", "`farspan launch local CONFIG --gpus-per-node 2`", "--ranks 2"],
    ),
    ("train CONFIG --dry-run parallel.context=2 --ranks 3", ["the number of ranks, 3"]),
    ("train CONFIG", ["tokens'", "`farspan data prepare`"]),
    ("train nowhere.toml", ["nowhere.toml does not exist"]),
    ("train CONFIG --ranks 4", ["--ranks 4", "--dry-run", "torchrun"]),
    ("train CONFIG --ranks 0 --dry-run", ["--ranks 0 must be at least 1."]),
    ("train CONFIG --ranks 3 --dry-run", ["train.sequences_per_step=2", "3 data-parallel groups"]),
    (f"{LOCAL} 0", ["--gpus-per-node 0 must be at least 1."]),
    (f"{LOCAL} 2", ["data.folder="]),
    (f"{LOCAL} 3", ["train.sequences_per_step=2", "3 data-parallel groups"]),
    (f"{LOCAL} 2 parallel.layout=x", ["parallel.layout='x'"]),
    (f"{LOCAL} 2 model.x=1", ["model.x=1", "layers"]),
    ("launch local nowhere.toml --gpus-per-node 2", ["nowhere.toml does not exist"]),
    ("launch slurm CONFIG --nodes 0 --gpus-per-node 2", ["--nodes 0 must be at least 1."]),
    (f"{SLURM} --chain 0", ["--chain 0 must be at least 1."]),
    (f"{SLURM} --time x", ["--time x"]),
    (f"{SLURM} --at-most 2", ["--at-most 2", "--each"]),
    ("launch slurm CONFIG --nodes 3 --gpus-per-node 1 --dry-run", ["train.sequences_per_step=2", "multiple of the 3"]),
    (f"{SLURM} --site nowhere.toml", ["nowhere.toml does not exist"]),
    (f"{SLURM} --each run.seed", ["--each run.seed ", "section.key=A,B"]),
    (f"{SLURM} --each run.folder=a,b", ["--each run.folder="]),
    (f"{SLURM} --each run.seed=1,2 --each train.steps=1,2,3", ["--each", " 2, 3."]),
    (f"{SLURM} --each run.seed=1,x", ["run.seed="]),
    ("jobs status nowhere", ["nowhere has no job in jobs.jsonl"]),
    ("data prepare nowhere --tokenizer bytes --out OUT", ["nowhere"]),
]


@pytest.mark.parametrize(("command", "parts"), REFUSALS, ids=[command for command, _ in REFUSALS])
def test_a_refusal_is_one_sentence_and_status_2(
    command: str, parts: list[str], config_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    places = {"CONFIG": str(config_file), "OUT": str(tmp_path / "out")}
    assert cli.main([places.get(word, word) for word in command.split()]) == cli.EXIT_USER_ERROR
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("farspan: ")
    assert [part for part in parts if part not in err] == []
    assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.toml"]
    assert not dist.is_initialized()


@pytest.mark.parametrize("command", ["train", "launch local x.toml", "train x.toml --nodes 3", "data prepare"])
def test_wrong_usage_is_status_2(command: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(command.split())
    assert exit_.value.code == 2
    assert "usage: farspan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "commands"),
    [
        ("", ["train", "launch", "jobs", "data", "upcycle", "pool-heads", "import", "export", "checkpoint"]),
        ("checkpoint", ["ls", "verify", "prune", "export"]),
        ("launch", ["local", "slurm", "submitit"]),
        ("jobs", ["status", "cancel", "resume", "logs"]),
        ("data", ["prepare"]),
    ],
)
def test_commands_are_listed_if_none_is_given(command: str, commands: list[str], capsys: Capture) -> None:
    assert cli.main(command.split()) == cli.EXIT_USER_ERROR
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split()[0] for line in err.splitlines() if line.startswith("    ") and line[4] != " "] == commands


@pytest.mark.parametrize("words", ["--train.steps=4", "--train.steps 4", "--dry-runs --train.steps=4"])
def test_an_override_with_dashes_is_understood_in_the_refusal(words: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "x.toml", *words.split()])
    assert capsys.readouterr().err.endswith(" without dashes: train.steps=VALUE\n")


@pytest.mark.parametrize(
    "words",
    [
        "train CONFIG model.layers=3 run.seed=5 --dry-run --ranks 2",
        "train CONFIG --dry-run model.layers=9 --ranks 2 model.layers=3 run.seed=5",
        "train --ranks 2 CONFIG model.layers=3 --dry-run run.seed=5",
        "train --dry-run --ranks 2 CONFIG model.layers=3 run.seed=5",
    ],
)
def test_overrides_stand_anywhere_and_the_last_wins(words: str, config_file: Path, capsys: Capture) -> None:
    assert cli.main([str(config_file) if word == "CONFIG" else word for word in words.split()]) == 0
    assert "3 of width 32" in capsys.readouterr().out


# Numbers of parameters and of active ones are in test_flops.py.
PRESETS = {
    ("llama3_8b_128k", 8): ("dp_shard 1 x context 8", "sharded     1,003,782,656"),
    ("llama3_8b_128k", 64): ("dp_shard 8 x context 8", "sharded     125,472,832"),
    ("qwen3_8b_128k", 8): ("dp_shard 1 x context 8", "sharded     1,023,841,920"),
    ("qwen3_8b_128k", 64): ("dp_shard 8 x context 8", "sharded     127,980,"),
    ("qwen3_30b_a3b_128k", 64): ("dp_shard 8 x context 8", "sharded     477,064,416", "expert-parallel degree 8"),
    ("mixtral_8x7b_64k", 32): ("dp_shard 8 x context 4", "sharded     1,459,560,576", "expert-parallel degree 8"),
    ("minimax_style", 8): (
        "dp_shard 1 x context 8", "sharded     2,597,281,024", "expert-parallel degree 8",
        "attention   7 x Lightning, Dense(causal=True), 7 x Lightning, ", "recurrences in gated layers",
        "strategy    state and fetch, zigzag",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("preset", "num_ranks"), list(PRESETS))
def test_a_dry_run_of_a_preset_needs_neither_gpus_nor_data(
    preset: str, num_ranks: int, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", str(CONFIGS / f"{preset}.toml"), "--dry-run", "--ranks", str(num_ranks)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines["ranks"].startswith(f"{num_ranks} = ")
    tokens = {"mixtral_8x7b_64k": 65_536, "minimax_style": 262_144}.get(preset, 131_072)
    local = 32_768 if preset == "minimax_style" else 16_384
    assert lines["step"] == f"4,194,304 tokens = {2**22 // tokens} sequences x {tokens:,}"
    assert lines["micro-batch"].startswith(f"{local:,} tokens per rank, ")
    assert all(part in out for part in PRESETS[preset, num_ranks])
    if preset != "minimax_style":
        assert lines["attention"] == "Dense(causal=True)"
        # What `auto` finds fastest.
        fastest = lines["auto"].partition(":")[0]
        assert lines["strategy"] == f"{fastest}, zigzag layout"
    assert not dist.is_initialized()
    assert list(tmp_path.iterdir()) == []


def test_a_dry_launch_prints_the_command(config_file: Path, capsys: Capture) -> None:
    words = ["launch", "local", str(config_file), "--gpus-per-node", "2", "--dry-run", "run.folder=with space"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "ranks       2 = " in out
    label, _, command = out.splitlines()[-1].partition("OMP_NUM_THREADS=")
    assert label == "by torchrun "
    started = LocalJob(config=config_file, overrides=("run.folder=with space",), num_ranks=2)._torchrun()
    assert shlex.split(command)[1:] == started
    assert started[-3:] == ["train", str(config_file), "run.folder=with space"]


def test_a_dry_launch_on_slurm_prints_only_the_script_on_standard_output(
    tmp_path: Path, config_file: Path, job: SlurmJob, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site.toml"
    site.write_text('[sbatch]\naccount = "my_project"\n')
    monkeypatch.setenv("FARSPAN_SITE", str(site))
    monkeypatch.chdir(tmp_path)
    words = f"launch slurm {config_file} run.folder=run --nodes 2 --gpus-per-node 1 --dry-run".split()
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    expected = replace(job, ranks_per_node=1, site=Site(sbatch={"account": "my_project"}))
    assert out == expected.script()
    assert err.startswith("ranks       2 = ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.toml", "site.toml"]
    # Submitted from a machine without GPUs, a run with device=auto has to get GPUs.
    assert cli.main([*words, "train.device=auto", "train.compute_dtype=bfloat16", "attention.backend=auto"]) == 0
    assert "#SBATCH --gpus-per-node=1\n" in capsys.readouterr().out


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake sbatch, which copies the script and prints the id 5."""
    folder = install(tmp_path / "bin", sbatch='cp "$2" "$2.submitted"; echo 5')
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.usefixtures("sbatch")
def test_a_launch_on_slurm_submits_the_checked_configuration(
    tmp_path: Path, config_file: Path, capsys: Capture
) -> None:
    words = f"launch slurm {config_file} run.seed=3 --nodes 1 --gpus-per-node 2 --chain 2".split()
    assert cli.main(words) == cli.EXIT_USER_ERROR
    assert "data.folder=" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    tiny.make_data(tmp_path)
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "\njobs        2, on 1 node; the script is submitted 2 times" in out
    assert "\nresources   1 core per rank: set cpus_per_rank; the cluster's default memory: set mem in [sbatch]" in out
    assert f"submitted   5 then 5; see `farspan jobs status {tmp_path}/run`\n" in out
    assert "nothing was started" not in out
    submitted = tmp_path / "run/submitted/001"
    assert (submitted / "job.sh.submitted").read_text() == (submitted / "job.sh").read_text()
    assert load_config(Config, submitted / "config.toml") == load_config(Config, config_file, ["run.seed=3"])


@pytest.mark.usefixtures("sbatch")
def test_a_launch_of_several_runs_is_a_job_array(tmp_path: Path, config_file: Path, capsys: Capture) -> None:
    data = tiny.make_data(tmp_path)
    each = ["--each", "run.seed=3, 4", "--each", "optimizer.learning_rate=1e-3,2e-3", "--at-most", "1"]
    launch = ["launch", "slurm", str(config_file), "--nodes", "1", "--gpus-per-node", "2"]
    # The last run is checked as the first one is.
    assert cli.main([*launch, "--each", f"data.folder={data},{tmp_path}/nowhere"]) == cli.EXIT_USER_ERROR
    assert f"data.folder='{tmp_path}/nowhere' does not exist" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert cli.main([*launch, *each]) == 0
    out = capsys.readouterr().out
    assert "001         run.seed=4  optimizer.learning_rate=2e-3\n" in out
    submitted = tmp_path / "run/submitted/001"
    for number, (seed, rate) in enumerate(((3, 1e-3), (4, 2e-3))):
        config = load_config(Config, submitted / f"config_00{number}.toml")
        assert (config.run.seed, config.optimizer.learning_rate) == (seed, rate)
        assert config.run.folder == tmp_path / f"run/00{number}"
    assert "jobs        2, each on 1 node: an array of 2 runs, at most 1 at a time\n" in out
    assert "#SBATCH --array=0-1%1\n" in (submitted / "job.sh").read_text()


def test_a_launch_starts_as_many_ranks_as_asked(
    tmp_path: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.make_data(tmp_path)
    started = []
    monkeypatch.setattr(LocalJob, "run", lambda job: started.append(job) or 7)
    assert cli.main(["launch", "local", str(config_file), "run.seed=3", "--gpus-per-node", "2"]) == 7
    assert started == [LocalJob(config=config_file, overrides=("run.seed=3",), num_ranks=2)]


def test_only_the_first_rank_prints_errors(config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    variables = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for rank, prints in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert cli.main(["train", str(config_file), "model.x=1"]) == cli.EXIT_USER_ERROR
        assert ("model.x=1" in capsys.readouterr().err) == prints


@pytest.mark.parametrize(("rank", "job", "status"), [("0", None, 2), ("1", None, 2), ("0", "17", 1)])
def test_ranks_that_do_not_meet_are_one_sentence(
    rank: str, job: str | None, status: int, config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Each prints its own, as rank 0 may not be there. A scheduler may start them again."""
    with socket.socket() as other:
        other.bind(("", 0))
        if rank == "0":
            other.listen()  # the port is in use
        port = str(other.getsockname()[1])
        variables = {
            "RANK": rank,
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        if job is not None:
            monkeypatch.setenv("SLURM_JOB_ID", job)
        assert cli.main(["train", str(config_file), "parallel.timeout_s=1"]) == status
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"farspan: rank {rank} cannot meet the others (")
    assert ("address already in use" in error) == (rank == "0")
    for part in (f"port: {port}" if rank == "0" else port, "WORLD_SIZE=2", "parallel.timeout_s=1", "MASTER_PORT"):
        assert part in error


def test_several_launchers_are_refused(config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    for words in (["train"], ["launch", "local", "--gpus-per-node", "2"]):
        assert cli.main([*words, str(config_file)]) == cli.EXIT_USER_ERROR
        assert capsys.readouterr().err.startswith("farspan: SLURM_STEP_NUM_TASKS=4: 4 processes were started but RANK")


def test_stop_signals_are_blocked_before_torch_is_imported() -> None:
    """Otherwise a warning is lost: ignored by the shell above, or taken by a thread of numpy or torch."""
    program = """
import signal, sys, types
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
class Finder:
    def find_spec(name, *_):
        if name in ("numpy", "torch"):
            assert signal.SIGUSR1 in signal.pthread_sigmask(signal.SIG_BLOCK, []), name
            signal.raise_signal(signal.SIGUSR1)
            print(name, flush=True)
            sys.meta_path.remove(Finder)
sys.meta_path.insert(0, Finder)
from farspan.launch import cli
def train(config, ranks, stop):
    print(stop.preemption_warning)
sys.modules["farspan.trainer.train"] = types.SimpleNamespace(train=train)
cli.run_and_exit()
"""
    command = [sys.executable, "-c", program, "train", "configs/demo.toml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CONFIGS.parent)
    assert (done.stdout.split()[-1:], done.stderr.count("Error")) == (["True"], 0), done.stdout + done.stderr


def test_an_error_of_a_command_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def fail(options: object) -> None:
        logging.getLogger("farspan").info("it begins")
        raise DataError("it is gone")

    monkeypatch.setattr(prepare, "run", fail)
    assert cli.main(["data", "prepare", "x", "--tokenizer", "bytes", "--out", "y"]) == cli.EXIT_USER_ERROR
    assert capsys.readouterr() == ("it begins\n", "farspan: it is gone\n")
    assert logging.getLogger("farspan").handlers == []


def test_help_does_not_wait_for_torch() -> None:
    program = (
        "import sys; from farspan.launch import cli\n"
        "try: cli.main(['launch', 'local', '--help'])\n"
        "finally: assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--gpus-per-node" in done.stdout


def test_the_version_has_what_a_bug_report_needs(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def printed() -> dict[str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["--version"])
        assert ended.value.code == 0
        lines = capsys.readouterr().out.splitlines()
        return {name: value.strip() for name, _, value in (line.partition(" ") for line in lines)}

    monkeypatch.setattr(versions, "ROOT", tmp_path)
    (tmp_path / ".git").mkdir()
    calls = {"rev-parse": "abc123", "status": " M x.py"}
    monkeypatch.setattr(versions, "_git", lambda name, *_: calls[name])
    found = printed()
    assert list(found) == ["farspan", "python", "torch", "triton"]
    assert found["farspan"] == f"{farspan.__version__}, commit abc123 with changes"
    assert found["python"] == sys.version.split()[0]
    assert found["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert found["triton"] == "not installed" or found["triton"][0].isdigit()
    calls["status"] = ""
    assert printed()["farspan"] == f"{farspan.__version__}, commit abc123"
    # Installed, below somebody else's repository: not that one's commit.
    (tmp_path / ".git").rmdir()
    assert printed()["farspan"] == farspan.__version__
