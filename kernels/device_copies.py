"""Copies on devices of what the host plans ahead, such as index maps; the host never waits for them."""

import torch
from torch import Tensor


def copy_to(x: Tensor, device: torch.device) -> Tensor:
    """Return x, which lies on the CPU, on `device`; the host goes on before the copy is made."""
    # A copy from pageable memory waits for what was launched before.
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
