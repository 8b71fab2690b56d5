import pytest
import torch

from farspan.kernels.backend import choose_backend
from farspan.kernels.errors import ConfigError


def test_auto_takes_the_fastest_that_runs() -> None:
    assert choose_backend("auto", torch.device("cpu")) == "cpu"
    assert choose_backend("auto", torch.device("cuda")) == "reference"


def test_what_is_asked_for_by_name_is_given_or_refused() -> None:
    assert choose_backend("reference", torch.device("cpu")) == "reference"
    with pytest.raises(ConfigError, match=r"attention\.backend='cpu' cannot run on cuda"):
        choose_backend("cpu", torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"attention backend 'refrence' does not exist.* Did you mean 'reference'"):
        choose_backend("refrence", torch.device("cpu"))
