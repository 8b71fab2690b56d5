"""The configurations in a run's folder: of the steps to come and, after a change, of the steps before."""

import logging
from pathlib import Path

from farspan.errors import ConfigError
from farspan.trainer.config import Config, flat
from farspan.trainer.metrics import writing_to
from farspan.trainer.toml_config import load_config, to_toml

log = logging.getLogger("farspan")


def record_config(folder: Path, config: Config, step: int) -> None:
    """Write `config.toml` of a run that goes on at `step`; keep one with other settings as `config_until_step_N.toml`.

    Logs the changes. Raises TrainingError where the folder cannot be written.
    """
    path = folder / "config.toml"
    with writing_to(folder):
        if step > 0 and path.exists():
            changes = _changes(path, config)
            if not changes:
                return
            until = folder / f"config_until_step_{step}.toml"
            # If it exists, the configuration that replaced it reached no later checkpoint: its steps are undone.
            if not until.exists():
                path.rename(until)
            log.info("changed     %s; see %s", ", ".join(changes), until)
        path.write_text(to_toml(config))


def _changes(path: Path, config: Config) -> list[str]:
    try:
        before = flat(load_config(Config, path))
    except ConfigError as error:
        return [f"{path.name}, which this version cannot read: {str(error).rstrip('.')}"]
    after = flat(config)
    return [
        f"{name} {before.get(name, 'unset')} -> {after.get(name, 'unset')}"
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    ]
