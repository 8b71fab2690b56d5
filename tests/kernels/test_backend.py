import pytest
import torch

from farspan.errors import ConfigError
from farspan.kernels.backend import BACKENDS, KernelRequest, choose_backend
from farspan.kernels.mechanism import Mechanism
from farspan.kernels.mechanisms.dense import Dense
from farspan.kernels.mechanisms.moba import MoBA
from farspan.kernels.mechanisms.window import Window

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16 = KernelRequest.of(Dense(), torch.bfloat16, 128, 128)


def test_auto_takes_the_fastest_that_runs() -> None:
    assert choose_backend("auto", CPU, BF16) == "cpu"
    assert choose_backend("auto", CUDA, BF16) == "library"


def test_auto_takes_what_can_do_the_work() -> None:
    rest = "reference" if BACKENDS.get("triton").unsupported_reason(CUDA) else "triton"
    assert choose_backend("auto", CUDA, KernelRequest.of(Dense(), torch.float32, 128, 128)) == rest
    assert choose_backend("auto", CUDA, KernelRequest.of(MoBA(), torch.bfloat16, 128, 128)) == rest
    assert choose_backend("auto", CUDA, KernelRequest.of(Dense(), torch.float64, 128, 128)) == "reference"


def test_what_is_asked_for_by_name_is_given_or_refused() -> None:
    assert choose_backend("reference", CPU, BF16) == "reference"
    assert choose_backend("library", CUDA, KernelRequest.of(Window(), torch.float16, 192, 128)) == "library"
    with pytest.raises(ConfigError, match=r"attention\.backend='cpu' cannot run on cuda"):
        choose_backend("cpu", CUDA, BF16)
    with pytest.raises(ConfigError, match=r"attention backend 'refrence' does not exist.* Did you mean 'reference'"):
        choose_backend("refrence", CPU, BF16)


@pytest.mark.parametrize(
    ("mechanism", "dtype", "value_dim", "reason"),
    [
        (Dense(), torch.float32, 128, "it takes bfloat16 and float16, not float32"),
        (Dense(), torch.bfloat16, 264, "it takes head sizes up to 256, not 264"),
        (MoBA(), torch.bfloat16, 128, "it cannot attend to keys that are chosen by content"),
    ],
)
def test_what_a_backend_cannot_do_is_an_error_that_names_those_that_can(
    mechanism: Mechanism, dtype: torch.dtype, value_dim: int, reason: str
) -> None:
    with pytest.raises(ConfigError, match=f"'library' cannot run on cuda: {reason}; these can: .*reference"):
        choose_backend("library", CUDA, KernelRequest.of(mechanism, dtype, 128, value_dim))


def test_every_backend_but_the_library_claims_all_work() -> None:
    """The contract test runs those of this device over all mechanisms and dtypes, and so holds them to it."""
    for name, backend in BACKENDS.load().items():
        if backend.unsupported_reason(CPU) is None:
            assert backend.limit(KernelRequest.of(MoBA(), torch.float64, 256, 256)) is None, name
