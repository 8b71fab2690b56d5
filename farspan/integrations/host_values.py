"""What the host has read of tensors on a device, so that layers that share a tensor wait for it once."""

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")


class HostValues(Generic[T]):
    """Values by the tensor that they were read of, as long as it lives and nothing is written to it."""

    def __init__(self) -> None:
        self._found = WeakTensorKeyDictionary()

    def put(self, tensor: Tensor, value: T) -> None:
        """Keep what is known of a tensor without reading it."""
        self._keep(tensor, None, value)

    def get(self, tensor: Tensor, read: Callable[[], T], *, key: Hashable = None) -> T:
        """Return the value kept with this key, or else what `read` returns, and keep that."""
        # Tensors of inference mode have no version: whether they were written to, nobody knows.
        if tensor.is_inference():
            return read()
        known = self._found.get(tensor)
        if known is not None and known[0] == (key, tensor._version):
            return known[1]
        return self._keep(tensor, key, read())

    def _keep(self, tensor: Tensor, key: Hashable, value: T) -> T:
        if not tensor.is_inference():
            self._found[tensor] = (key, tensor._version), value
        return value
