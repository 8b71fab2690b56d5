"""A dry run: resolve, summarize and shard a configuration for ranks that do not exist."""

import logging
from pathlib import Path

import torch

from farspan.parallel.mesh import Degrees, Mesh
from farspan.parallel.ranks import fake_process_group
from farspan.trainer.build import parameters_held
from farspan.trainer.config import Config
from farspan.trainer.estimate.summary import describe
from farspan.trainer.resolve import choose_strategy, fill_in, open_data
from farspan.trainer.validate import validate

log = logging.getLogger("farspan")


def dry_run(config: Config, num_ranks: int) -> None:
    """Print the summary of a run of `config` on `num_ranks` ranks; raises ConfigError as the run would."""
    dry_run_plan(config, num_ranks)
    has_data = Path(config.data.folder).exists()
    log.info("%-12snothing was started%s", "dry run", "" if has_data else f"; {config.data.folder} is not there yet")


def dry_run_plan(config: Config, num_ranks: int) -> None:
    """As `dry_run`, for a run that is about to start elsewhere.

    The steps of `resolve`, but without GPUs, and without data if that is absent: device and vocabulary then are those
    of the configuration.
    """
    degrees = Degrees.resolve(config.parallel, num_ranks)
    validate(config, degrees)
    device = torch.device("cuda" if config.train.device == "cuda" or torch.cuda.is_available() else "cpu")
    has_data = Path(config.data.folder).exists()
    config, reasons = choose_strategy(config, degrees, device.type)
    config = fill_in(config, degrees, device, open_data(config)[0].vocabulary_size if has_data else None)
    log.info("%s", "\n".join((describe(config, degrees), *reasons)))
    with fake_process_group(num_ranks):
        local = parameters_held(config, Mesh.build(config.parallel, "cpu"))
    log.info("%-12s%s parameters on rank 0 of %d", "sharded", f"{local:,}", num_ranks)
