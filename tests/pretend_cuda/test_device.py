"""The pretend device itself: what it counts, what it refuses."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from farspan.tools.rank_pool import RankError
from tests.support.pretend_cuda.counts import Kind, Part
from tests.support.pretend_cuda.pool import PretendPools
from tests.support.pretend_cuda.tensor import NoValues, PretendDevice


def on_device() -> Tensor:
    return torch.arange(6, device="cuda").view(2, 3)


def counted(name: str) -> dict[Kind, int]:
    """On a rank: what one of the functions below counts, of a tensor made before."""
    with PretendDevice() as device:
        x = on_device()
        device.take_counts()
        ASKS[name][0](x)
        counts = device.take_counts()
    return {kind: number for kind in Kind if (number := counts.number(Part.REST, kind))}


def copy_pinned(x: Tensor) -> None:
    torch.ones(3, dtype=x.dtype).pin_memory()[1:].to(x.device, non_blocking=True)


def add_in_a_thread(x: Tensor) -> None:
    thread = threading.Thread(target=lambda: torch.ones(3, device="cuda") + x)
    thread.start()
    thread.join()


def go_backward(x: Tensor) -> None:
    class Item(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return x.view_as(x)

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            # A thread of autograd's, for this device.
            torch.tensor([1.0], device="cuda").item()
            return gradient

    Item.apply(x.float().requires_grad_()).backward(x.float())


WAIT, OPERATION = {Kind.SYNC: 1}, {Kind.OPERATION: 1}
ASKS: dict[str, tuple[Callable[[Tensor], object], dict[Kind, int]]] = {
    "item": (lambda x: x[0, 0].item(), WAIT),
    "if": (lambda x: bool(x[0, 1]), WAIT),
    "nonzero": (lambda x: x.nonzero(), WAIT | OPERATION),
    "unique": (lambda x: x.unique(), WAIT | OPERATION),
    "bool index": (lambda x: x[x.bool()], {Kind.SYNC: 1, Kind.OPERATION: 2}),
    "bool put of rows": (lambda x: x.index_put_((x[:, 0].bool(),), x[:1] + 1), {Kind.SYNC: 1, Kind.OPERATION: 3}),
    "bool put of a number": (lambda x: x.index_put_((x.bool(),), x[0, 0] + 1), {Kind.OPERATION: 3}),
    "repeats": (lambda x: x.repeat_interleave(x[:, 1], dim=0), WAIT | {Kind.OPERATION: 2}),
    "repeats of a known size": (lambda x: x.repeat_interleave(x[:, 1], 0, output_size=5), {Kind.OPERATION: 2}),
    "synchronize": (lambda _: torch.cuda.synchronize(), WAIT),
    "event": (lambda _: torch.cuda.Event().synchronize(), WAIT),
    "to the host": (lambda x: x.cpu(), {Kind.TO_HOST: 1}),
    "list": (lambda x: x.tolist(), {Kind.TO_HOST: 1}),
    "copy to the host": (lambda x: torch.empty(2, 3, dtype=x.dtype).copy_(x), {Kind.TO_HOST: 1}),
    "new tensor": (lambda _: torch.tensor([1, 2], device="cuda"), {Kind.PAGEABLE: 1}),
    "another new tensor": (lambda x: x.new_tensor([1, 2]), {Kind.PAGEABLE: 1}),
    "array": (lambda x: torch.as_tensor(np.ones(3), device=x.device), {Kind.PAGEABLE: 1}),
    "pageable": (lambda x: torch.ones(3).to(x.device, non_blocking=True), {Kind.PAGEABLE: 1}),
    "pinned": (copy_pinned, {Kind.PINNED: 1}),
    "pinned, blocking": (lambda x: torch.ones(3).pin_memory().to(x.device), {Kind.PAGEABLE: 1}),
    "CPU index": (lambda x: x[torch.tensor([0, 1])], {Kind.PAGEABLE: 1, Kind.OPERATION: 1}),
    "views": (lambda x: x.t().flatten()[1:].detach().unsqueeze(0).expand(2, -1), OPERATION),
    "memory": (lambda x: torch.empty_like(x), {}),
    "number of the host": (lambda x: x + torch.tensor(1), OPERATION),
    "thread": (add_in_a_thread, {Kind.OPERATION: 2}),
    "backward": (go_backward, {Kind.SYNC: 1, Kind.PAGEABLE: 1, Kind.OPERATION: 3}),
}


@pytest.mark.parametrize("name", ASKS)
def test_it_counts(pretend_ranks: PretendPools, name: str) -> None:
    assert pretend_ranks(1).run(counted, name) == [ASKS[name][1]]


MIXES: dict[str, Callable[[Tensor], object]] = {
    "sum": lambda x: x + torch.ones(3),
    "index of the device": lambda x: torch.ones(3)[x],
    "put from the host": lambda x: x.index_put_((x[0, :2],), torch.ones(3, dtype=x.dtype)),
    "joined": lambda x: torch.cat([x, torch.ones(1, 3)]),
    "out": lambda x: torch.add(x, 1, out=torch.empty(2, 3, dtype=x.dtype)),
}


def refused(name: str) -> str:
    with PretendDevice(), pytest.raises(RuntimeError) as error:
        MIXES[name](on_device())
    return str(error.value)


@pytest.mark.parametrize("name", MIXES)
def test_it_refuses_two_devices(pretend_ranks: PretendPools, name: str) -> None:
    assert "cuda" in pretend_ranks(1).run(refused, name)[0]


def copy_on_another_stream(waits: bool, keeps: bool) -> Tensor:
    """On a rank: use what another stream has copied."""
    with PretendDevice():
        ours, copies = torch.cuda.current_stream(), torch.cuda.Stream()
        torch.cuda.set_stream(copies)
        x = torch.ones(3).pin_memory().to("cuda", non_blocking=True)
        if keeps:
            x.record_stream(ours)
        event = copies.record_event()
        torch.cuda.set_stream(ours)
        if waits:
            ours.wait_event(event)
        return (x[1:] + 1).cpu()


def test_streams_wait_for_each_other(pretend_ranks: PretendPools) -> None:
    assert pretend_ranks(1).run(copy_on_another_stream, True, True)[0].tolist() == [2.0, 2.0]
    for waits, keeps, message in ((False, True, "has not waited"), (True, False, "no record_stream")):
        with pytest.raises(RankError, match=message):
            pretend_ranks(1).run(copy_on_another_stream, waits, keeps)


def without_values() -> None:
    with PretendDevice(has_values=False):
        table = torch.tensor([1, 2, 3], device="cuda")
        x = torch.empty(1 << 40, 3, device="cuda")
        # What the host has sent is known, what depends on anything else is not.
        assert (table + 1).tolist() == [2, 3, 4]
        y = (x * table).sum(0)
        assert y.shape == (3,)
        for ask in (y[0].item, y.tolist, y.nonzero, lambda: y[y > 0]):
            with pytest.raises(NoValues, match="waits for"):
                ask()


def test_tensors_without_values_have_shapes(pretend_ranks: PretendPools) -> None:
    pretend_ranks(1).run(without_values)


def give_a_tensor_of_the_cpu() -> None:
    import triton  # pyright: ignore[reportMissingImports]

    kernel: Any = triton.jit(go_backward)

    with PretendDevice() as device:
        kernel[(1,)](on_device())
        assert device.take_counts().number(Part.REST, Kind.LAUNCH) == 1
        with pytest.raises(RuntimeError, match="of the CPU"):
            kernel[(1,)]((on_device(), torch.ones(3)))


def test_kernels_refuse_tensors_of_the_cpu(pretend_ranks: PretendPools) -> None:
    pretend_ranks(1).run(give_a_tensor_of_the_cpu)
