"""A dry run: the whole derivation of a run, sharding included, on ranks that do not exist."""

import logging
from pathlib import Path

import torch

from farspan.parallel.mesh import Degrees, Mesh
from farspan.parallel.ranks import fake_process_group
from farspan.trainer.auto import choose_strategy
from farspan.trainer.build import parameters_held
from farspan.trainer.config import Config
from farspan.trainer.estimate.summary import describe
from farspan.trainer.resolve import fill_in, open_data
from farspan.trainer.validate import validate

log = logging.getLogger("farspan")


def dry_run(config: Config, num_ranks: int) -> None:
    """Print what a run of `config` on `num_ranks` ranks would be; raises ConfigError as the run would."""
    rehearse(config, num_ranks)
    has_data = Path(config.data.folder).exists()
    log.info("%-12snothing was started%s", "dry run", "" if has_data else f"; {config.data.folder} is not there yet")


def rehearse(config: Config, num_ranks: int) -> None:
    """Print what a run of `config` on `num_ranks` ranks will be; raises ConfigError as the run would.

    GPUs and data may be elsewhere: the device is what the configuration says, the vocabulary too where data is absent.
    """
    degrees = Degrees.resolve(config.parallel, num_ranks)
    validate(config, degrees)
    device = torch.device("cuda" if config.train.device == "cuda" or torch.cuda.is_available() else "cpu")
    has_data = Path(config.data.folder).exists()
    config, why = choose_strategy(config, degrees, device.type)
    config = fill_in(config, degrees, device, open_data(config)[0].vocabulary_size if has_data else None)
    log.info("%s", "\n".join((describe(config, degrees), *why)))
    with fake_process_group(num_ranks):
        held = parameters_held(config, Mesh.build(config.parallel, "cpu"))
    log.info("%-12s%s parameters on rank 0 of %d", "sharded", f"{held:,}", num_ranks)
