"""Stretches of consecutive integers, many at a time."""

import numpy as np


def ranges(start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Return start[0], ..., stop[0] - 1, start[1], ..., one range after another."""
    sizes = stop - start
    if (sizes == 1).all():
        return start
    return np.arange(sizes.sum()) + np.repeat(start - np.cumsum(sizes) + sizes, sizes)
