"""Steps to skip: those that are not finite and, on request, those far above the steps before."""

import math
from dataclasses import dataclass

from farspan.trainer.state import TrainState
from farspan.trainer.toml_config import bounded


@dataclass(frozen=True, kw_only=True, slots=True)
class SkipConfig:
    """Steps that change nothing but the position in the data; any whose loss or gradient norm is not finite is one."""

    max_consecutive_skips: int = bounded(10, minimum=0)
    """Skipped steps in a row that a run survives; the next one ends it, with a checkpoint and with the batch in
    failed_batch/."""
    spike_sigma: float = bounded(0.0, minimum=0)
    """Also skip a step whose loss or gradient norm is this many standard deviations above its mean over the last
    `window` updates; 0 never does."""
    window: int = bounded(128, minimum=2)
    """Updates that `spike_sigma` compares with; until that many are done, no step is skipped as a spike."""


def not_finite(loss: float, gradient_norm: float) -> str | None:
    """Return what is wrong with a step whose loss or gradient norm is not finite."""
    for name, value in (("loss", loss), ("gradient norm", gradient_norm)):
        if not math.isfinite(value):
            return f"the {name} is {value}"
    return None


def reason_to_skip(config: SkipConfig, state: TrainState, loss: float, gradient_norm: float) -> str | None:
    """Return why to skip a step, None if it is to be an update; the arguments are equal on all ranks."""
    reason = not_finite(loss, gradient_norm)
    if reason is not None or not config.spike_sigma:
        return reason
    for name, value, recent in (
        ("loss", loss, state.recent_losses),
        ("gradient norm", gradient_norm, state.recent_norms),
    ):
        if len(recent) < config.window:
            continue
        mean = math.fsum(recent) / len(recent)
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in recent) / len(recent))
        if value > mean + config.spike_sigma * deviation:
            return (
                f"the {name} is {value:.6g}, more than {config.spike_sigma:g} deviations of {deviation:.3g} above "
                f"{mean:.6g}"
            )
    return None


def remember(config: SkipConfig, state: TrainState, loss: float, gradient_norm: float, skipped: str | None) -> None:
    """Count a skipped step, or keep an update's loss and norm for `spike_sigma` to compare later ones with."""
    if skipped is not None:
        state.skipped += 1
        state.skipped_in_a_row += 1
        return
    state.skipped_in_a_row = 0
    window = config.window if config.spike_sigma else 0
    for values, value in ((state.recent_losses, loss), (state.recent_norms, gradient_norm)):
        values.append(value)
        del values[: max(len(values) - window, 0)]
