"""Which steps are no updates: those that are not finite and, where asked for, those far above the steps before."""

import math
from dataclasses import dataclass

from farspan.trainer.state import TrainState
from farspan.trainer.toml_config import bounded


@dataclass(frozen=True, kw_only=True, slots=True)
class SkipConfig:
    """Steps that change nothing but the place in the data: those whose loss or gradient norm is not finite.

    most: how many in a row; the next one ends the run, with a checkpoint and with its batch in failed_batch/. sigma: a
    step is skipped, too, whose loss or gradient norm is so many standard deviations above its mean over the last
    `window` updates; 0 never. window: how many; before there are as many, `sigma` skips nothing.
    """

    most: int = bounded(10, minimum=0)
    sigma: float = bounded(0.0, minimum=0)
    window: int = bounded(128, minimum=2)


def not_finite(loss: float, gradient_norm: float) -> str | None:
    """Return what is wrong with a step whose loss or gradient norm is not finite."""
    for name, value in (("loss", loss), ("gradient norm", gradient_norm)):
        if not math.isfinite(value):
            return f"the {name} is {value}"
    return None


def reason_to_skip(config: SkipConfig, state: TrainState, loss: float, gradient_norm: float) -> str | None:
    """Return why a step shall be no update, None if it shall be one; all that it looks at is equal on all ranks."""
    found = not_finite(loss, gradient_norm)
    if found is not None or not config.sigma:
        return found
    for name, value, before in (
        ("loss", loss, state.recent_losses),
        ("gradient norm", gradient_norm, state.recent_norms),
    ):
        if len(before) < config.window:
            continue
        mean = math.fsum(before) / len(before)
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in before) / len(before))
        if value > mean + config.sigma * deviation:
            return (
                f"the {name} is {value:.6g}, more than {config.sigma:g} deviations of {deviation:.3g} above {mean:.6g}"
            )
    return None


def remember(config: SkipConfig, state: TrainState, loss: float, gradient_norm: float, skipped: str | None) -> None:
    """Count a step as skipped, or keep what `sigma` will compare later ones with."""
    if skipped is not None:
        state.skipped += 1
        state.skipped_in_a_row += 1
        return
    state.skipped_in_a_row = 0
    kept = config.window if config.sigma else 0
    for values, value in ((state.recent_losses, loss), (state.recent_norms, gradient_norm)):
        values.append(value)
        del values[: max(len(values) - kept, 0)]
