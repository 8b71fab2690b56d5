"""What Megatron-Core's rotary embedding, attention, recomputation and experts need of a GPU, done on the CPU."""

from typing import Any
from unittest.mock import MagicMock

import torch
from megatron.core.tensor_parallel import random
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from torch.overrides import TorchFunctionMode


class OnCPU(TorchFunctionMode):
    """Inside it tensors asked for on a GPU, or in pinned memory, are on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {key: value for key, value in (kwargs or {}).items() if key not in ("pin_memory", "non_blocking")}
        if func is torch.Tensor.cuda:
            return args[0]
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def install() -> None:
    """Replace what a function mode does not see; for the rest of this process."""
    torch.cuda.current_device = lambda: torch.device("cpu")  # pyright: ignore
    for name in ("Stream", "Event", "stream", "current_stream", "synchronize"):
        setattr(torch.cuda, name, MagicMock())
    # States of a GPU's generator are kept; there is no dropout here that would draw from it.
    torch.cuda.get_rng_state = random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    torch.cuda.set_rng_state = random._set_cuda_rng_state = lambda *_, **__: None
    random.model_parallel_cuda_manual_seed(1, tp_rank=0, ep_rank=0, etp_rank=0)
    # 0.16.1 asks for these without Transformer Engine too.
    moe_utils.te_general_gemm = None
    token_dispatcher.maybe_move_tensor_to_cpu = _numbers


def _numbers(tensor: torch.Tensor | None, as_numpy: bool = False, **_: Any) -> Any:
    return tensor.numpy() if as_numpy and tensor is not None else tensor
