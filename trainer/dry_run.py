"""A dry run: the whole derivation of a run, sharding included, on ranks that do not exist."""

import logging
from pathlib import Path

import torch

from farspan.parallel.fsdp import shard_parameters
from farspan.parallel.mesh import Degrees, Mesh
from farspan.parallel.ranks import pretended
from farspan.trainer.build import fill_in, open_data
from farspan.trainer.config import Config
from farspan.trainer.describe import describe
from farspan.trainer.model.transformer import Transformer
from farspan.trainer.validate import validate

log = logging.getLogger("farspan")


def dry_run(config: Config, num_ranks: int) -> None:
    """Print what a run of `config` on `num_ranks` ranks would be; raises ConfigError as the run would."""
    degrees = Degrees.resolve(config.parallel, num_ranks)
    validate(config, degrees)
    # A dry run may be far from the GPUs and the data that the run will have.
    device = torch.device("cuda" if config.train.device == "cuda" or torch.cuda.is_available() else "cpu")
    has_data = (Path(config.data.folder) / "train").exists()
    config = fill_in(config, degrees, device, open_data(config)[0].vocabulary_size if has_data else None)
    log.info("%s", describe(config, degrees, device))
    with pretended(num_ranks), torch.device("meta"):
        mesh = Mesh.build(config.parallel, "cpu")
        model = Transformer(config.model)
        shard_parameters(model, model.blocks, mesh, getattr(torch, config.train.compute_dtype))
        held = sum(p.to_local().numel() for p in model.parameters())  # pyright: ignore[reportAttributeAccessIssue]
    log.info("%-12s %s parameters on rank 0 of %d; nothing was started", "sharded", f"{held:,}", num_ranks)
