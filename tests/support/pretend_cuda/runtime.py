"""torch.cuda of a machine with one H200, without one; for good, so in processes of their own."""

import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _foreach_utils

from tests.support.pretend_cuda import launches, library
from tests.support.pretend_cuda.counts import Kind
from tests.support.pretend_cuda.streams import Event, Stream
from tests.support.pretend_cuda.tensor import PretendDevice, PretendTensor

MEMORY_BYTES = 141 << 30
_run = threading.Thread.run


def synchronize(*_: Any) -> None:
    if PretendDevice.current is not None:
        PretendDevice.current.counts.add(Kind.SYNC, "synchronize")


def _run_pretending(self: threading.Thread) -> None:
    """Run a thread that was started inside a pretend device there too: torch's modes are of a thread."""
    with PretendDevice.current or nullcontext():
        _run(self)


def _lifting(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let torch.tensor make a tensor of the CPU, then copy it, as operators: a switch of each thread, as autograd's."""

    def lifted(*values: Any, **options: Any) -> Tensor:
        torch._C._set_only_lift_cpu_tensors(PretendDevice.current is not None)
        return make(*values, **options)

    return lifted


def _inside(*_: Any, **__: Any) -> AbstractContextManager[None]:
    return nullcontext()


def pretend() -> None:
    """Make this process one with a GPU, before it imports any Triton kernel."""
    os.environ["TRITON_INTERPRET"] = "1"
    launches.install()
    library.load()
    properties = SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, total_memory=MEMORY_BYTES, multi_processor_count=132, warp_size=32
    )
    replaced = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_current_stream_capturing": lambda: False,
        "device_count": lambda: 8,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "get_device_capability": lambda _=None: (properties.major, properties.minor),
        "get_device_name": lambda _=None: properties.name,
        "get_device_properties": lambda _=None: properties,
        "manual_seed_all": lambda _: None,
        "mem_get_info": lambda _=None: (MEMORY_BYTES, MEMORY_BYTES),
        "synchronize": synchronize,
        "device": _inside,
        "device_of": _inside,
        "stream": _inside,
        "Stream": Stream,
        "Event": Event,
        "current_stream": Stream.current,
        "default_stream": lambda _=None: Stream.default,
        "set_stream": Stream.set_current,
    }
    replaced |= dict.fromkeys(
        ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"), lambda _=None: 0
    )
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    torch.accelerator.current_stream = replaced["current_stream"]
    for name in ("tensor", "as_tensor", "asarray"):
        setattr(torch, name, _lifting(getattr(torch, name)))
    torch.backends.cudnn.version = lambda: 91600
    threading.Thread.run = _run_pretending
    # Optimizers ask for the very type of their parameters.
    _foreach_utils._foreach_supported_types.append(PretendTensor)
