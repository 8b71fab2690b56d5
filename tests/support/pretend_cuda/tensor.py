"""Tensors that say cuda:0 and hold a tensor of a CPU, or one without values; what is done with them is counted.

Devices that do not go together raise as they do on a GPU: also the indices of a tensor, and what kernels are given.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.pretend_cuda.counts import Counts, Kind, source_line
from tests.support.pretend_cuda.operators import FREE, ONLY_CUDA, waits
from tests.support.pretend_cuda.streams import CUDA, Stream, Work

aten = torch.ops.aten

INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
COPIES = {aten.copy_.default, aten._to_copy.default, aten._foreach_copy_.default}


class NoValues(RuntimeError):  # noqa: N818
    """The host asked for values that do not exist: it would have waited for the device here."""


class PretendDevice(TorchDispatchMode):
    """Inside, `device="cuda"` makes pretend tensors.

    has_values: False for tensors without memory, of any size: what the host makes and copies keeps its values, and all
    that depends on anything else has only a shape. runs_kernels: whether Triton's launches compute; without, what is
    allocated is 0. runs_choices: whether those that choose do, by which ranks tell what to send.
    """

    current: ClassVar["PretendDevice | None"] = None

    def __init__(self, *, has_values: bool = True, runs_kernels: bool = False, runs_choices: bool = False) -> None:
        super().__init__()
        self.has_values, self.runs_kernels, self.counts = has_values, runs_kernels, Counts()
        self.runs_choices = runs_choices or runs_kernels
        self._threads = 0

    def __enter__(self) -> "PretendDevice":
        assert PretendDevice.current in (None, self), "a process has one device"
        PretendDevice.current, self._threads = self, self._threads + 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._threads -= 1
        PretendDevice.current = self if self._threads else None

    def take_counts(self) -> Counts:
        """Return what was counted since the last call."""
        taken, self.counts = self.counts, Counts()
        return taken

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:  # pyright: ignore
            # DTensor asks what shapes an operator returns.
            return func(*args, **(kwargs or {}))
        if not _all_plain(types):
            return NotImplemented
        return _dispatch(self, func, args, kwargs or {})


class PretendTensor(Tensor):
    """See the module. value: of the CPU, or on the meta device. work: what made it, the base of a view."""

    value: Tensor
    work: Work

    @staticmethod
    def __new__(cls, value: Tensor) -> "PretendTensor":
        made = Tensor._make_wrapper_subclass(
            cls, value.size(), strides=value.stride(), storage_offset=value.storage_offset(), dtype=value.dtype,
            layout=value.layout, device=CUDA, requires_grad=False,
        )  # fmt: skip
        made.value = value.detach()
        made.work = Stream.current().work()
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if not _all_plain(types):
            return NotImplemented
        assert PretendDevice.current is not None, "pretend tensors live inside a PretendDevice"
        return _dispatch(PretendDevice.current, func, args, kwargs or {})

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"PretendTensor({self.value})"

    def record_stream(self, s: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.work.users.add(s)

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def new_tensor(self, data: Any, *, dtype: Any = None, device: Any = None, **options: Any) -> Tensor:  # pyright: ignore
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device, **options)

    def data_ptr(self) -> int:
        return self.value.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.value.untyped_storage()

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["value"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: None, size: Any, stride: Any) -> "PretendTensor":
        return PretendTensor(inner["value"])


def _all_plain(types: Any) -> bool:
    """Return whether no type is one, such as DTensor, that calls operators of its own local tensors."""
    return all(of in (Tensor, nn.Parameter) or issubclass(of, PretendTensor) for of in types)


def _each(x: Any) -> Iterator[Any]:
    """Yield what lists hold; torch's own pytrees take longer than most operators."""
    if type(x) in (list, tuple):
        for part in x:
            yield from _each(part)
    else:
        yield x


def _mapped(function: Callable[[Any], Any], x: Any) -> Any:
    return type(x)(_mapped(function, part) for part in x) if type(x) in (list, tuple) else function(x)


def _dispatch(device: PretendDevice, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    leaves = [*_each(args), *_each([*kwargs.values()])]
    ours = [x for x in leaves if isinstance(x, PretendTensor)]
    target = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    if not ours and (target is None or target.type != "cuda"):
        return func(*args, **kwargs)
    with device.counts.inside():
        _check_devices(func, args, leaves)
        for x in ours:
            x.work.check()
        if func is aten._to_copy.default:
            return _to_copy(device, args[0], target, kwargs)
        _count(device.counts, func, args, kwargs)
        return _compute(device, func, args, kwargs, ours, target)


def _check_devices(func: Any, args: Sequence[Any], leaves: list[Any]) -> None:
    """Raise where a GPU would: numbers, which are tensors of no dimension, may be of the CPU."""
    of_host = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, PretendTensor) and x.dim()]
    if func in INDEXED:
        of_host = [] if isinstance(args[0], PretendTensor) else [x for x in leaves if isinstance(x, PretendTensor)]
        of_host += [x for x in args[2:3] if not isinstance(x, PretendTensor) and x.dim()]
    ours = [x for x in leaves if isinstance(x, PretendTensor)]
    if ours and of_host and func not in COPIES:
        shapes = ([tuple(x.shape) for x in of] for of in (of_host, ours))
        raise RuntimeError("{} mixes tensors {} of the CPU with {} of cuda:0".format(func, *shapes))


def _to_copy(device: PretendDevice, x: Tensor, target: torch.device | None, kwargs: dict[str, Any]) -> Tensor:
    options = {name: value for name, value in kwargs.items() if name not in ("device", "non_blocking", "pin_memory")}
    if not isinstance(x, PretendTensor):
        count_copy(device.counts, x, to_host=False, non_blocking=kwargs.get("non_blocking", False))
        return PretendTensor(aten._to_copy.default(x, **options))
    if target is None or target.type == "cuda":
        device.counts.add(Kind.OPERATION, "aten._to_copy")
        return PretendTensor(aten._to_copy.default(x.value, **options))
    if target.type == "cpu":
        count_copy(device.counts, x, to_host=True)
        return aten._to_copy.default(_known(x), **options)
    return aten._to_copy.default(x.value, device=target, **options)


def count_copy(counts: Counts, x: Tensor, *, to_host: bool, non_blocking: bool = False) -> None:
    """Count a copy of `x` between host and device; only from pinned memory does the host not wait for it."""
    if not x.numel():
        # Nothing is copied, nor waited for.
        return None
    if to_host:
        return counts.add(Kind.TO_HOST, "copy", x.nbytes)
    return counts.add(Kind.PINNED if non_blocking and x.is_pinned() else Kind.PAGEABLE, "copy", x.nbytes)


def _known(x: PretendTensor) -> Tensor:
    if x.value.is_meta:
        raise NoValues(f"waits for {x.dtype} {list(x.shape)} at {source_line(sys._getframe())}")
    return x.value


def _count(counts: Counts, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    name = str(func).removesuffix(".default")
    if func.namespace in ("c10d", "_c10d_functional"):
        return counts.add(Kind.COLLECTIVE, name)
    if func is aten.copy_.default and isinstance(args[0], PretendTensor) != isinstance(args[1], PretendTensor):
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        return count_copy(counts, args[1], to_host=isinstance(args[1], PretendTensor), non_blocking=non_blocking)
    if func in INDEXED:
        for index in args[1]:
            if index is not None and not isinstance(index, PretendTensor):
                counts.add(Kind.PAGEABLE, f"index of {name}", index.nbytes)
    if waits(func, args, kwargs):
        counts.add(Kind.SYNC, name)
    if not func.is_view and func not in FREE and func is not aten._local_scalar_dense.default:
        counts.add(Kind.OPERATION, name)


def _compute(
    device: PretendDevice, func: Any, args: Sequence[Any], kwargs: dict[str, Any], ours: list[PretendTensor],
    target: torch.device | None,
) -> Any:  # fmt: skip
    unknown = any(x.value.is_meta for x in ours)
    if waits(func, args, kwargs):
        for x in ours:
            _known(x)
    if func is aten._local_scalar_dense.default:
        return func(ours[0].value)

    def unwrapped(x: Any) -> Any:
        if isinstance(x, PretendTensor):
            if unknown and not x.value.is_meta:
                x.value = x.value.to("meta")
            return x.value
        return x.to("meta") if unknown and isinstance(x, Tensor) and x.dim() else x

    inner_args = _mapped(unwrapped, tuple(args))
    inner_kwargs = {name: _mapped(unwrapped, value) for name, value in kwargs.items()}
    if target is not None and target.type == "cuda":
        inner_kwargs["device"] = torch.device("cpu" if device.has_values else "meta")
    operator: Any = ONLY_CUDA.get(func, func)
    out = operator(*inner_args, **inner_kwargs)
    if func in FREE and "empty" in func.__name__ and not device.runs_kernels and isinstance(out, Tensor):
        # What a kernel that does not run would have written; without values it has no memory, which would take time.
        out = out.zero_() if device.has_values else out.to("meta")
    if target is not None and target.type != "cuda":
        return out
    # Operators in place, and collectives, return what they were given.
    given = {id(x.value): x for x in ours}

    def wrapped(x: Any) -> Any:
        found = given.get(id(x))
        if found is not None or not isinstance(x, Tensor):
            return x if found is None else found
        made = PretendTensor(x)
        if func.is_view:
            made.work = ours[0].work
        return made

    return _mapped(wrapped, out)
