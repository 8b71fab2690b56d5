"""What this rank really sends, seen below all of farspan and FSDP: the operators of torch's process groups."""

from collections import Counter
from typing import Any

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

# Where an operator has the tensors that it sends, and its process group.
SENDING = {
    "_allgather_base_": (1, 2),
    "allgather_": (1, 2),
    "_reduce_scatter_base_": (1, 2),
    "alltoall_base_": (1, 2),
    "allreduce_": (0, 1),
    "send": (0, 1),
}


class SentBytes(TorchDispatchMode):
    """Counts bytes by operator and number of ranks, for rings: an all-gather of N bytes sends (P-1) N, an all-reduce
    2 (P-1)/P N, and so on."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[tuple[str, int]] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "c10d" and name in SENDING:
            tensors, group = (args[place] for place in SENDING[name])
            group = dist.ProcessGroup.unbox(group)
            size, ranks = sum(t.nbytes for t in (tensors if isinstance(tensors, list) else [tensors])), group.size()
            if name == "send":
                sent = size
            elif name == "alltoall_base_":
                rows = args[4] or [1] * ranks  # rows for each rank; its own stay
                sent = size - size * rows[group.rank()] / max(sum(rows), 1)
            elif name in ("allreduce_", "_reduce_scatter_base_"):
                sent = (2 if name == "allreduce_" else 1) * size * (ranks - 1) / ranks
            else:
                sent = (ranks - 1) * size
            self.calls[name] += 1
            self.sent[name, ranks] += sent  # pyright: ignore[reportArgumentType]
        return func(*args, **(kwargs or {}))
