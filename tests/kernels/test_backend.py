import pytest
import torch

from farspan.errors import ConfigError
from farspan.kernels.backend import BACKENDS, KernelRequest, choose_backend, why_not_before
from farspan.kernels.mechanism import Access, Mechanism
from farspan.kernels.mechanisms.dense import Dense
from farspan.kernels.mechanisms.moba import MoBA
from farspan.kernels.mechanisms.window import Window
from tests.support.mechanisms import examples

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16 = KernelRequest.of(Dense(), torch.bfloat16, 128, 128)


def test_auto_takes_the_fastest_that_runs() -> None:
    assert choose_backend("auto", CPU, BF16) == "cpu"
    assert choose_backend("auto", CUDA, BF16) == "cuda"


def test_auto_takes_a_backend_that_supports_the_request() -> None:
    rest = "reference" if BACKENDS.get("triton").unavailable_reason(CUDA) else "triton"
    assert choose_backend("auto", CUDA, KernelRequest.of(Dense(), torch.float32, 128, 128)) == rest
    assert choose_backend("auto", CUDA, KernelRequest.of(MoBA(), torch.bfloat16, 128, 128)) == rest
    assert choose_backend("auto", CUDA, KernelRequest.of(Dense(), torch.float64, 128, 128)) == "reference"


@pytest.mark.parametrize("has_triton", [True, False])
@pytest.mark.parametrize("mechanism", examples(), ids=str)
def test_auto_asks_what_the_work_is(mechanism: Mechanism, has_triton: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that expire count as selected, a recurrence is no softmax; windows, neighborhoods and spans are tiles."""
    reason = None if has_triton else "it is not installed"
    monkeypatch.setattr(type(BACKENDS.get("triton")), "unavailable_reason", lambda self, device: reason)
    request = KernelRequest.of(mechanism, torch.bfloat16, 64, 64)
    is_windowed = type(mechanism).__name__ in {"Window", "Spans", "Neighborhood"}
    assert request.is_windowed == is_windowed
    by_library = mechanism.accesses == {Access.MASK} and not (is_windowed and has_triton)
    tiles = "triton" if has_triton else "reference"
    chosen = choose_backend("auto", CUDA, request)
    assert chosen == ("cuda" if by_library else tiles)
    assert list(why_not_before(chosen, CUDA, request)) == ([] if by_library else ["cuda"])


def test_a_backend_asked_for_by_name_is_taken_or_refused() -> None:
    assert choose_backend("reference", CPU, BF16) == "reference"
    assert choose_backend("cuda", CUDA, KernelRequest.of(Window(), torch.float16, 192, 128)) == "cuda"
    with pytest.raises(ConfigError, match=r"attention\.backend='cpu' cannot run on cuda"):
        choose_backend("cpu", CUDA, BF16)
    with pytest.raises(ConfigError, match=r"attention backend 'refrence' does not exist.* Did you mean 'reference'"):
        choose_backend("refrence", CPU, BF16)


@pytest.mark.parametrize(
    ("mechanism", "dtype", "value_dim", "reason"),
    [
        (Dense(), torch.float32, 128, "it takes bfloat16 and float16, not float32"),
        (Dense(), torch.bfloat16, 264, "it takes head sizes up to 256, not 264"),
        (MoBA(), torch.bfloat16, 128, "it cannot attend to keys that are selected by content"),
    ],
)
def test_unsupported_requests_are_errors_that_name_other_backends(
    mechanism: Mechanism, dtype: torch.dtype, value_dim: int, reason: str
) -> None:
    with pytest.raises(ConfigError, match=f"'cuda' cannot run on cuda: {reason}; these can: .*reference"):
        choose_backend("cuda", CUDA, KernelRequest.of(mechanism, dtype, 128, value_dim))


def test_backends_of_this_device_support_every_request() -> None:
    """The contract test runs those of this device over all mechanisms and dtypes, and so holds them to it."""
    for name, backend in BACKENDS.load().items():
        if backend.unavailable_reason(CPU) is None:
            assert backend.unsupported_reason(KernelRequest.of(MoBA(), torch.float64, 256, 256)) is None, name
