"""Imported once by the forkserver, so that each rank of a test starts with torch and all of farspan in memory."""

import torch.distributed.checkpoint
import torch.distributed.device_mesh
import torch.distributed.fsdp
import torch.distributed.tensor
import torch.utils.tensorboard  # noqa: F401

import farspan.trainer.train  # noqa: F401
from farspan.kernels.backend import BACKENDS
from farspan.kernels.mechanism import MECHANISMS
from farspan.parallel.context_parallel.strategy import STRATEGIES

for parts in (BACKENDS, MECHANISMS, STRATEGIES):
    parts.load()
