"""The one place that knows all engines."""

import torch

from farspan.parallel.mesh import Mesh
from farspan.trainer.config import Config
from farspan.trainer.engines.deepspeed import build_deepspeed
from farspan.trainer.engines.engine import Engine
from farspan.trainer.engines.fsdp2 import build_fsdp2

BUILD = {"fsdp2": build_fsdp2, "deepspeed": build_deepspeed}


def build_engine(config: Config, mesh: Mesh, device: torch.device) -> Engine:
    """Return model and optimizer under train.engine, initialized; each rank has its shards."""
    return BUILD[config.train.engine](config, mesh, device)
