"""Imported once by the forkserver, so that each rank of a test starts with torch in memory."""

import torch.distributed.checkpoint
import torch.distributed.device_mesh
import torch.distributed.fsdp
import torch.distributed.tensor
import torch.utils.tensorboard  # noqa: F401

import farspan.trainer.train  # noqa: F401
