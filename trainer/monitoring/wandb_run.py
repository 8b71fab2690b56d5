"""Weights & Biases, if asked for: the numbers of TensorBoard under the same tags, and the configuration."""

import io
import logging
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from farspan.trainer.monitoring.tags import scalars

FINISH_TIMEOUT_S = 60.0
"""How long the end of a run waits for uploads; `wandb sync` sends what is missing."""

Mode = Literal["offline"]

log = logging.getLogger("farspan")


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricsConfig:
    wandb_project: str | None = None
    """Send metrics and the configuration to this project of Weights & Biases too; needs `pip install 'farspan[wandb]'`.
    With WANDB_MODE=offline in the environment they stay in wandb/ of the run's folder."""


class WandbRun:
    """A run on W&B, continued by a resume under the same id. An error of W&B ends its part only, not the training."""

    def __init__(self, project: str, folder: Path, config: Mapping[str, Any], *, resumed_step: int) -> None:
        """Start or continue the run; without a connection or an API key it is kept offline, in `folder`/wandb/.

        Raises OSError where the folder cannot be written.
        """
        self._run: Any = None
        # A fresh start is another run: W&B refuses steps that it has.
        path = folder / "wandb_run_id"
        run_id = path.read_text().strip() if resumed_step > 0 and path.exists() else secrets.token_hex(4)
        path.write_text(run_id)
        modes: dict[str, Mode | None] = {"kept offline": None, "off": "offline"}
        for otherwise, mode in modes.items():
            with _surviving(otherwise):
                self._run = _init(project, folder, run_id, config, mode)
                return

    def log(self, record: Mapping[str, Any]) -> None:
        """Send the numbers of a record; of steps that W&B has already, it keeps what was sent first."""
        if self._run is None:
            return
        run, self._run = self._run, None
        with _surviving("off"):
            run.log(dict(scalars(record)), step=record["step"])
            self._run = run

    def close(self) -> None:
        if self._run is not None:
            with _surviving("off"):
                import wandb

                self._run.finish(exit_code=int(sys.exception() is not None))
                wandb.teardown()


def _init(project: str, folder: Path, run_id: str, config: Mapping[str, Any], mode: Mode | None) -> Any:
    import wandb

    standard_input, sys.stdin = sys.stdin, io.StringIO()  # at a terminal, wandb would ask for an API key and wait
    try:
        return wandb.init(
            project=project,
            dir=folder,
            id=run_id,
            name=folder.resolve().name,
            config=dict(config),
            resume="allow",
            allow_val_change=True,
            mode=mode,
            settings={"console": "off", "finish_timeout": FINISH_TIMEOUT_S},
        )
    finally:
        sys.stdin = standard_input


@contextmanager
def _surviving(otherwise: str) -> Iterator[None]:
    """Report any error of W&B, which may raise whatever its service or its network meets, and go on."""
    try:
        yield
    except Exception as error:
        log.warning("wandb       %s: %s: %s", otherwise, type(error).__name__, str(error).partition("\n")[0])
        with suppress(Exception):
            import wandb

            # What is left of its service would keep the run's id in use, and fail again at exit.
            wandb.teardown()
