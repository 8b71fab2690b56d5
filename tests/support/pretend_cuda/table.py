"""Write what layers cost the host and the device: `python -m tests.support.pretend_cuda.table docs/device_costs.md`."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tests.support.pretend_cuda.cells import cells
from tests.support.pretend_cuda.long import long_layers
from tests.support.pretend_cuda.pool import PretendPools
from tests.support.pretend_cuda.record import write
from tests.support.pretend_cuda.step import take_step


def main(arguments: Sequence[str]) -> None:
    (path,) = arguments
    with PretendPools() as pools:
        layers = pools(1).run(long_layers)[0]
        steps = {}
        for cell in cells():
            print(cell, flush=True)
            steps[cell] = pools(cell.ranks).run(partial(take_step, cell.all_settings, on_device=True))
    write(Path(path), layers, steps)


if __name__ == "__main__":
    main(sys.argv[1:])
