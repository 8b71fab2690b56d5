"""The configuration in a run's folder: that of the steps to come, beside those of the steps before."""

import logging
from pathlib import Path

from farspan.errors import ConfigError
from farspan.trainer.config import Config, flat
from farspan.trainer.toml_config import load_config, to_toml

log = logging.getLogger("farspan")


def record_config(folder: Path, config: Config, step: int) -> None:
    """Write `config.toml` of a run that goes on at `step`; keep one with other settings as `config_until_step_N.toml`.

    What changed is logged.
    """
    path = folder / "config.toml"
    if step > 0 and path.exists():
        changes = _changes(path, config)
        if not changes:
            return
        until = folder / f"config_until_step_{step}.toml"
        # If it is there, what replaced it has reached no later checkpoint: its steps are no part of the run.
        if not until.exists():
            path.rename(until)
        log.info("changed     %s; see %s", ", ".join(changes), until)
    path.write_text(to_toml(config))


def _changes(path: Path, config: Config) -> list[str]:
    try:
        before = flat(load_config(Config, path))
    except ConfigError as error:
        return [f"all, as far as is known: {str(error).rstrip('.')}"]
    after = flat(config)
    return [
        f"{name} {before.get(name, 'unset')} -> {after.get(name, 'unset')}"
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    ]
