"""Runs as jobs of submitit, for Python and notebooks: on a SLURM cluster, on this machine, or in this process.

On a cluster, a job of submitit runs the batch script of `farspan launch slurm` where submitit would run Python on each
node. So SLURM warns the ranks, not submitit; the script saves, queues the job again and excludes nodes; and a job that
starts again, from the call as it was submitted, resumes from the run's own folder.

submitit is imported here only, when it is needed.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import chdir
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from farspan.errors import ConfigError, TrainingError, file_errors_reported
from farspan.launch.env import (
    choose_gloo_interface,
    job_id,
    outside_jobs,
    read_ranks,
    restart_count,
    set_deepspeed_defaults,
    set_device_defaults,
    set_visible_gpus,
    visible_gpus,
)
from farspan.launch.local import LocalJob
from farspan.launch.output import last_error, log_to
from farspan.launch.slurm.client import SlurmError
from farspan.launch.slurm.history import is_final, logs_of_start
from farspan.trainer.resilience.signals import WARNING_SIGNAL, StopSignal
from farspan.trainer.state import last_step

if TYPE_CHECKING:
    from submitit import Job

    from farspan.launch.slurm.job import SlurmJob
    from farspan.trainer.config import Config

Overrides = str | Sequence[str] | Mapping[str, object]
"""Changes of single values: `section.key=value`, one or several, or values by `section.key`."""
Executor = Literal["slurm", "local", "debug"]
UNLIMITED_MINUTES = 10 * 365 * 24 * 60


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """folder: the run's, with metrics.jsonl and checkpoints. step: the last one; less than train.steps after a stop.

    loss: that of the last step, None if it was skipped.
    """

    folder: Path
    step: int
    loss: float | None


def submit(
    config: str | Path | Mapping[str, Any] | Config,
    *,
    nodes: int = 1,
    gpus_per_node: int = 1,
    executor: Executor = "slurm",
    overrides: Overrides = (),
    time: str | int | None = None,
    partition: str | None = None,
    constraint: str | None = None,
    container: str | None = None,
    site: str | Path | None = None,
    task_per_rank: bool = False,
) -> Job[RunResult]:
    """Submit a run and return its job; `job.result()` waits for a RunResult, or raises with the error of the run.

    config: a TOML file, its values, or a Config. gpus_per_node: ranks; CPU processes with train.device=cpu. executor:
    "local" starts the ranks on this machine, in the background; "debug" is one rank in this process, once the result is
    asked for. The other options are those of `farspan launch slurm`. Raises ConfigError or another FarspanError if the
    run could not start.
    """
    with log_to(sys.stdout):
        (job,) = submit_jobs(
            config,
            [],
            nodes=nodes,
            gpus_per_node=gpus_per_node,
            executor=executor,
            overrides=overrides,
            time=time,
            partition=partition,
            constraint=constraint,
            container=container,
            site=site,
            task_per_rank=task_per_rank,
        )
    return job


def submit_sweep(
    config: str | Path | Mapping[str, Any] | Config,
    sweep: Sequence[Overrides],
    *,
    at_most: int | None = None,
    **options: Any,
) -> list[Job[RunResult]]:
    """Submit a run for each set of overrides, on a cluster as one job array; return the jobs.

    They run in run.folder/000, 001 and so on. at_most: how many at a time, None for all. options: those of `submit`.
    """
    if not sweep:
        raise ConfigError("sweep=[] submits nothing: give one set of overrides for each run.")
    if any(text.startswith("run.folder") for changes in sweep for text in _texts(changes)):
        raise ConfigError("run.folder in a sweep is not possible: each run has a numbered folder in run.folder.")
    with log_to(sys.stdout):
        return submit_jobs(config, sweep, at_most, **options)


def submit_jobs(
    config: str | Path | Mapping[str, Any] | Config,
    sweep: Sequence[Overrides],
    at_most: int | None = None,
    *,
    executor: Executor = "slurm",
    nodes: int = 1,
    gpus_per_node: int = 1,
    overrides: Overrides = (),
    time: str | int | None = None,
    site: str | Path | None = None,
    **shape: Any,
) -> list[Job[RunResult]]:
    """Submit one run, or as many as `sweep` has sets of overrides; shape: further options of `submit`."""
    submitit = _submitit()
    from farspan.launch.slurm.prepare import job_of, load_runs, on_gpus

    _check_executor(executor, nodes=nodes, gpus_per_node=gpus_per_node, time=time, at_most=at_most, **shape)
    source = Path(config) if isinstance(config, str) else config
    folder, configs = load_runs(source, _texts(overrides), [_texts(changes) for changes in sweep])
    if executor == "slurm":
        configs = [on_gpus(config) for config in configs]
    # submitit submits an array of one as a plain job.
    is_array = len(configs) > 1
    job = job_of(
        folder if is_array else configs[0].run.folder,
        configs,
        is_array=is_array,
        site=None if site is None else Path(site),
        nodes=nodes,
        ranks_per_node=gpus_per_node,
        time=None if time is None else str(time),
        at_most=at_most if is_array else None,
        **shape,
    )
    if executor == "slurm":
        return _submit_to_slurm(submitit, job, configs)
    return _submit_here(submitit, job, configs, is_debug=executor == "debug")


def _submitit() -> Any:
    try:
        return import_module("submitit")
    except ModuleNotFoundError:
        raise ConfigError("farspan.launch.submit needs submitit: pip install 'farspan[submitit]'.") from None


def _check_executor(executor: str, *, nodes: int, gpus_per_node: int, **shape: Any) -> None:
    """Raise ConfigError for what an executor cannot do."""
    if executor not in ("slurm", "local", "debug"):
        raise ConfigError(f"executor={executor!r} must be 'slurm', 'local' or 'debug'.")
    if executor == "slurm":
        return
    if nodes != 1 or (executor == "debug" and gpus_per_node != 1):
        what = "one rank in this process" if executor == "debug" else "this machine alone"
        raise ConfigError(
            f"nodes={nodes}, gpus_per_node={gpus_per_node} do not fit executor={executor!r}, which is {what}."
        )
    for name, value in shape.items():
        if value and (name != "time" or executor == "debug"):
            raise ConfigError(f"{name}={value!r} does not fit executor={executor!r}: leave it out.")


def _texts(overrides: Overrides) -> list[str]:
    from farspan.trainer.toml_config import toml_value

    if isinstance(overrides, Mapping):
        return [f"{key}={toml_value(value)}" for key, value in overrides.items()]
    return [overrides] if isinstance(overrides, str) else list(overrides)


def _submit_to_slurm(submitit: Any, job: SlurmJob, configs: Sequence[Config]) -> list[Job[RunResult]]:
    from farspan.launch.slurm.prepare import check_submission
    from farspan.launch.slurm.submit import excluded_nodes, record, write_files
    from farspan.trainer.toml_config import to_toml

    check_submission(job, configs)
    script = write_files(job, [to_toml(config) for config in configs])
    # submitit's own options have underscores, and the later of two names wins.
    options = {name.replace("-", "_"): value for name, value in job.options().items() if name != "array"}
    nodes = excluded_nodes(job.runs(), script, job.site.exclusion)
    executor = submitit.SlurmExecutor(job.submitted / "submitit")
    executor.update_parameters(
        # No defaults of submitit: what the batch script does not ask for, this job does not either.
        time=None,
        wckey=None,
        use_srun=False,
        stderr_to_stdout=True,
        array_parallelism=job.at_most or max(job.elements, 1),
        setup=[
            f"export PYTHONPATH={shlex.quote(str(job.submitted / 'code'))} PYTHONSAFEPATH=1",
            # `scontrol requeue` sends SIGTERM to all processes. This shell has to outlive the batch script.
            "trap : TERM",
        ],
        additional_parameters=options if nodes is None else {**options, "exclude": nodes},
    )
    try:
        with outside_jobs():
            jobs = executor.submit_array([partial(run_batch_script, script, run) for run in job.runs()])
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise SlurmError(f"sbatch refused: {' '.join(str(error).split())}") from None
    record(job, script, jobs[0].job_id.partition("_")[0])
    for submitted, run in zip(jobs, job.runs(), strict=True):
        submitted.paths.stdout.symlink_to(run / "logs" / f"{submitted.job_id}.log")
    return jobs


def run_batch_script(script: Path, run: Path) -> RunResult:
    """Run a batch script in the job that SLURM started for it, and end without a result if the job starts again."""
    with subprocess.Popen(["bash", str(script)]) as shell:
        # Whether SLURM sends it to this process, or to all of the job: the script acts on it.
        signal.signal(signal.SIGTERM, lambda *_: shell.terminate())
        status = shell.wait()
    job = str(job_id())
    if not is_final(logs_of_start(run, job, restart_count())):
        sys.exit(status)
    return _result(run, status, run / "logs" / f"{job}.log")


def _submit_here(submitit: Any, job: SlurmJob, configs: Sequence[Config], *, is_debug: bool) -> list[Job[RunResult]]:
    """Submit runs to this machine, where there is no batch script."""
    from farspan.launch.slurm.job import seconds
    from farspan.launch.slurm.submit import write_configs
    from farspan.parallel.ranks import Ranks
    from farspan.trainer.resolve import resolve
    from farspan.trainer.toml_config import to_toml

    num_ranks, folder = job.ranks_per_node, job.submitted / "submitit"
    for config in configs:
        # The last rank needs the most GPUs.
        resolve(config, Ranks(world_size=num_ranks, local_rank=num_ranks - 1))
    if is_debug:
        calls = [partial(train_here, config, job.workdir) for config in configs]
        return submitit.DebugExecutor(folder).submit_array(calls)
    with file_errors_reported():
        write_configs(job, [to_toml(config) for config in configs])
    local = submitit.LocalExecutor(folder)
    local.update_parameters(
        timeout_min=UNLIMITED_MINUTES if job.time is None else seconds(job.time) / 60,
        signal_delay_s=job.site.warning_s,
        stderr_to_stdout=True,
    )
    gpus = visible_gpus()
    return local.submit_array(
        [
            partial(run_local_job, path, run, num_ranks, gpus)
            for path, run in zip(job.configs(), job.runs(), strict=True)
        ]
    )


def run_local_job(config: Path, run: Path, num_ranks: int, gpus: str | None) -> RunResult:
    """Run `farspan launch local`. gpus: what CUDA_VISIBLE_DEVICES was at submission, as submitit sets its own."""
    set_visible_gpus(gpus)
    # submitit's warning of the time limit, which the ranks do not know.
    signal.signal(signal.SIGUSR2, lambda *_: signal.raise_signal(WARNING_SIGNAL))
    status = LocalJob(config=config, overrides=(), num_ranks=num_ranks).run()
    return _result(run, status, _submitit().JobEnvironment().paths.stdout)


def train_here(config: Config, folder: Path) -> RunResult:
    """Train in this process, as one rank. folder: the current one at submission, where relative paths begin."""
    from farspan.trainer.train import train

    set_device_defaults()
    ranks = read_ranks()
    set_deepspeed_defaults(ranks, config.train.device)
    with chdir(folder), log_to(sys.stdout), StopSignal() as stop:
        choose_gloo_interface(ranks)
        train(config, ranks, stop)
    return _result(folder / config.run.folder, 0, None)


def _result(run: Path, status: int, log: Path | None) -> RunResult:
    """Return what a run has reached; raises TrainingError with the last error in its log if it has failed."""
    last = last_step(run) or {"step": 0, "loss": None}
    if status != 0:
        known = None if log is None else last_error(log)
        raise TrainingError(
            known
            or f"the run ended with exit status {status} at step {last['step']}, see {log}; submit it again to resume."
        )
    return RunResult(folder=run, step=last["step"], loss=last["loss"])
