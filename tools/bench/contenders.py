"""Rivals: what torch and installed packages offer, measured in the same run where they compute the same function."""

from functools import partial
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from farspan.errors import ConfigError
from farspan.kernels.cuda.packages import FlashAttn2
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Mechanism
from farspan.kernels.mechanisms.dense import Dense
from farspan.tools.bench.baselines.flash_packages import installed_flash_attn
from farspan.tools.bench.baselines.flex import Flex
from farspan.tools.bench.baselines.public_moba import PublicMoBA
from farspan.tools.bench.case import Attention, Contender, Shape


def rivals_on(device: torch.device) -> list[Contender]:
    """Return the rivals that run on a device."""
    if device.type == "cpu":
        return [Sdpa("torch_sdpa", "FLASH_ATTENTION")]
    return [
        Sdpa("torch_sdpa_flash", "FLASH_ATTENTION"),
        Sdpa("torch_sdpa_cudnn", "CUDNN_ATTENTION"),
        Flex(),
        *installed_flash_attn(),
        *([] if FlashAttn2.find() is None else [PublicMoBA()]),
    ]


@final
class Sdpa(Contender):
    """torch's scaled_dot_product_attention by one of its kernels; dense causal attention over one document only.

    kernel: a name of SDPBackend, whose members cannot be sent to another process.
    """

    packed: ClassVar[bool] = False

    def __init__(self, name: str, kernel: str) -> None:
        self.name, self.kernel = name, kernel

    def plan(self, mechanism: Mechanism, rows: Rows, shape: Shape) -> Attention:
        if mechanism != Dense(causal=True) or not _is_one_document(rows):
            raise ConfigError(f"{self.name} computes dense causal attention over one document only.")
        return partial(_sdpa, kernel=self.kernel)


def _is_one_document(rows: Rows) -> bool:
    return bool((rows.document == 0).all()) and torch.equal(rows.position, torch.arange(len(rows)).int())


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, kernel: str) -> Tensor:
    with sdpa_kernel(getattr(SDPBackend, kernel)):
        query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)
