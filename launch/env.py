"""The environment variables that farspan reads; nothing else in the code reads any."""

import os

from farspan.kernels.errors import ConfigError
from farspan.parallel.ranks import Ranks


def read_ranks() -> Ranks:
    """Return this process's ranks as torchrun has set them; a process started alone is the only rank."""
    if "RANK" not in os.environ:
        return Ranks()
    try:
        return Ranks(
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            local_rank=int(os.environ["LOCAL_RANK"]),
        )
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"RANK is set but {error} is missing or not a number: start ranks with torchrun or 'farspan launch'."
        ) from None
