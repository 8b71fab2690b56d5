"""Jobs of submitit on this machine and in this process, and what is submitted to a fake SLURM; tests/slurm has one."""

import os
import re
import signal
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import farspan.launch
from farspan.errors import ConfigError, TrainingError
from farspan.launch import cli
from farspan.launch.slurm.client import SlurmError
from farspan.launch.slurm.history import add_failure, read_submissions
from farspan.launch.submitit_jobs import run_batch_script
from farspan.parallel.mesh import ParallelConfig
from farspan.trainer.config import Config, EvaluateConfig
from farspan.trainer.toml_config import to_toml
from tests.support import tiny
from tests.support.programs import install
from tests.support.runs import records

submitit = pytest.importorskip("submitit", reason="submitit is not installed: pip install 'farspan[submitit]'")

ROOT = Path(__file__).resolve().parents[2]
# Keeps its batch script and environment. SLURM prints no id alone without --parsable, which submitit does not use.
SBATCH = """
folder=$(dirname "$0")
[ ! -e "$folder/refuse" ] || { echo "sbatch: error: invalid partition" >&2; exit 1; }
[ "$1" != --test-only ] || exit 0
cp "$1" "$folder/script"
env >"$folder/environment"
echo "Submitted batch job 41"
"""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = tiny.config(tiny.make_data(tmp_path), tmp_path / "run", ParallelConfig(), steps=4)
    return replace(config, evaluate=EvaluateConfig(every_steps=0, sequences=2))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = install(tmp_path / "bin", sbatch=SBATCH, srun="")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def numbers(run: Path) -> list[list[Any]]:
    """What training has computed, of each record."""
    return [
        [record.get(name) for name in ("step", "loss", "grad_norm", "eval_loss", "stream")] for record in records(run)
    ]


def call_of(job: Any) -> Any:
    return job.submission().function


def options_in(script: Path) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)", script.read_text(), re.MULTILINE))


def test_ranks_on_this_machine_do_what_launch_local_does(config: Config, tmp_path: Path) -> None:
    config = replace(config, parallel=ParallelConfig(context=2))
    (tmp_path / "run.toml").write_text(to_toml(config))
    job = farspan.launch.submit(
        config, gpus_per_node=2, executor="local", overrides={"run.folder": str(tmp_path / "job")}
    )
    assert cli.main(["launch", "local", str(tmp_path / "run.toml"), "--gpus-per-node", "2"]) == 0
    result = job.result()
    assert numbers(tmp_path / "job") == numbers(tmp_path / "run")
    steps = numbers(tmp_path / "run")
    assert len(steps) == 5
    assert None not in [*steps[3][:3], steps[4][3]]
    assert result == farspan.launch.RunResult(folder=tmp_path / "job", step=4, loss=steps[3][1])
    assert "finished    at step 4" in str(job.stdout())


# submitit leaves the logs of a debug job open.
@pytest.mark.filterwarnings("ignore:unclosed file .*_log:ResourceWarning")
def test_one_rank_in_this_process(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the values of a file; each run of a sweep has its folder, and an error of a run is that of its job.

    Paths are relative to the folder of the submission.
    """
    monkeypatch.chdir(tmp_path)
    run, data = replace(config.run, folder=Path("run")), replace(config.data, folder=Path("tokens"))
    config = replace(config, run=run, data=data)
    values = tomllib.loads(to_toml(config))
    sweep = [{"run.seed": 3}, {"run.seed": 4, "train.steps": 3}]
    first, second = farspan.launch.submit_sweep(values, sweep, executor="debug")
    assert values == tomllib.loads(to_toml(config))
    assert not (tmp_path / "run/000").exists()
    monkeypatch.chdir("/")
    assert first.result().step == 4
    result = second.result()
    found = numbers(tmp_path / "run/001")
    assert result == farspan.launch.RunResult(folder=tmp_path / "run/001", step=3, loss=found[2][1])
    assert found[1][1] != numbers(tmp_path / "run/000")[1][1]
    assert Path.cwd() == Path("/")
    # The run resumes with other settings than it began with.
    monkeypatch.chdir(tmp_path)
    again = farspan.launch.submit(config, executor="debug", overrides="run.folder=run/000")
    assert re.search(r"run\.seed", str(again.exception()))


def test_what_slurm_gets_is_the_batch_script(
    config: Config, slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_CONF", "file")
    run = tmp_path / "run"
    run.mkdir()
    add_failure(run, "40", "a rank was killed", ["n2"])
    job = farspan.launch.submit(config, time=20, partition="p", task_per_rank=True)
    submitted = run / "submitted/001"
    # Of two lines for one option the later counts: none of submitit's own comes after ours, or besides.
    expected = options_in(submitted / "job.sh")
    assert options_in(slurm / "script") == {**expected, "exclude": "n2"}
    assert expected["signal"] == "USR1@300"
    environment = (slurm / "environment").read_text()
    assert ("SLURM_CONF=file" in environment, "SLURM_NTASKS" in environment) == (True, False)
    assert [(x.job, x.script) for x in read_submissions(run)] == [("41", str(submitted / "job.sh"))]
    assert call_of(job).args == (submitted / "job.sh", run)
    assert (submitted / "code/farspan/launch/submitit_jobs.py").is_file()
    # SLURM writes the log where `farspan jobs logs` looks for it.
    (run / "logs/41.log").write_text("what ranks say")
    assert job.stdout() == "what ranks say"


@pytest.mark.parametrize("runs", [1, 3])
def test_a_sweep_is_an_array(config: Config, slurm: Path, tmp_path: Path, runs: int) -> None:
    """But for one run, of which submitit makes a plain job."""
    sweep = [[f"run.seed={seed}"] for seed in range(runs)]
    jobs = farspan.launch.submit_sweep(config, sweep, at_most=2)
    arrays = re.findall("--array=(.*)", (slurm / "script").read_text())
    assert arrays == ([] if runs == 1 else ["0-2%2"])
    ids = ["41"] if runs == 1 else ["41_0", "41_1", "41_2"]
    assert [job.job_id for job in jobs] == ids
    for number, name in enumerate(ids):
        run = tmp_path / "run" / f"{number:03}"
        assert [submission.job for submission in read_submissions(run)] == [name]
        assert call_of(jobs[number]).args[1] == run
    submitted = (tmp_path / "run/000" if runs == 1 else tmp_path / "run") / "submitted/001"
    names = ["config.toml"] if runs == 1 else [f"config_{number:03}.toml" for number in range(runs)]
    assert [tomllib.loads((submitted / name).read_text())["run"]["seed"] for name in names] == list(range(runs))


def test_refusals_are_one_sentence(config: Config, slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (slurm / "refuse").touch()
    with pytest.raises(SlurmError, match=r"^sbatch refused: .*invalid partition"):
        farspan.launch.submit(config)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"executor": "cloud"}, "executor='cloud' must be 'slurm', 'local' or 'debug'"),
        ({"executor": "local", "nodes": 2}, "nodes=2, gpus_per_node=1 do not fit executor='local'"),
        ({"executor": "debug", "gpus_per_node": 2}, "gpus_per_node=2 do not fit executor='debug'"),
        ({"executor": "local", "partition": "p"}, "partition='p' does not fit executor='local'"),
        ({"executor": "debug", "time": "20"}, "time='20' does not fit executor='debug'"),
        ({"executor": "local", "time": "2"}, "--time 2 leaves no time"),
        ({"overrides": {"run.sed": 3}}, "Did you mean 'seed'"),
    ]
    for options, message in cases:
        with pytest.raises(ConfigError, match=re.escape(message)):
            farspan.launch.submit(config, **options)
    for sweep, message in (([], "sweep=[] submits nothing"), ([{"run.folder": "a"}], "run.folder in a sweep")):
        with pytest.raises(ConfigError, match=re.escape(message)):
            farspan.launch.submit_sweep(config, sweep)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'farspan[submitit]'")):
        farspan.launch.submit(config)


@pytest.mark.parametrize(
    ("script", "end"),
    [
        ('echo "3: farspan: no room" >>$log; : >$logs/over; exit 2', "^no room$"),
        (": >$logs/over; exit 75", "exit status 75 at step 0, see .*; submit it again"),
        ("printf 'queued again' >$logs/over; exit 75", 75),
        # SLURM ends it, and may start it again; the script has to know.
        ("trap 'exit 9' TERM; sleep 0.3; kill -TERM $PPID; for i in $(seq 500); do sleep 0.01; done", 9),
    ],
    ids=["refused", "never again", "requeued", "ended by SLURM"],
)
def test_a_job_that_starts_again_has_no_result_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, end: str | int
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    logs = tmp_path / "logs/17/2"
    logs.mkdir(parents=True)
    (tmp_path / "logs/17.log").write_text("3: farspan: an error of an earlier start\n" if "no room" in script else "")
    (tmp_path / "job.sh").write_text(f"log={tmp_path}/logs/17.log logs={logs}\n{script}")
    # submitit has a handler too, which does nothing.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        if isinstance(end, int):
            with pytest.raises(SystemExit) as left:
                run_batch_script(tmp_path / "job.sh", tmp_path)
            assert left.value.code == end
        else:
            with pytest.raises(TrainingError, match=end):
                run_batch_script(tmp_path / "job.sh", tmp_path)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_command_line_submits_with_submitit(
    config: Config, slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.toml").write_text(to_toml(config))
    words = ["launch", "submitit", str(tmp_path / "run.toml"), "--nodes", "1", "--gpus-per-node", "1"]
    assert cli.main([*words, "--each", "run.seed=1,2", "--time", "30"]) == 0
    assert f"submitted   41_0, 41_1; see `farspan jobs status {tmp_path}/run`\n" in capsys.readouterr().out
    assert "--time=30" in (slurm / "script").read_text()


def test_the_module_is_light() -> None:
    program = "import sys, farspan.launch; assert not {'torch', 'submitit'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
