"""What the host has read of a tensor is read again only where it may have changed."""

import torch

from farspan.integrations.host_values import HostValues


def test_a_tensor_is_read_once_until_it_is_written_to() -> None:
    values: HostValues[list[int]] = HostValues()
    tensor, other = torch.tensor([1, 2]), torch.tensor([1, 2])
    reads: list[str] = []

    def get(x: torch.Tensor, key: str = "") -> list[int]:
        return values.get(x, lambda: reads.append(key) or x.tolist(), key=key)

    assert [get(tensor), get(tensor), get(other)] == [[1, 2]] * 3
    assert len(reads) == 2
    get(tensor, "other")
    tensor += 1
    assert get(tensor, "other") == [2, 3]
    assert len(reads) == 4


def test_what_is_known_is_not_read() -> None:
    values: HostValues[str] = HostValues()
    tensor = torch.zeros(1)
    values.put(tensor, "known")
    assert values.get(tensor, lambda: "read") == "known"
    tensor += 1
    assert values.get(tensor, lambda: "read") == "read"


def test_tensors_without_a_version_are_read_each_time() -> None:
    values: HostValues[float] = HostValues()
    with torch.inference_mode():
        tensor = torch.zeros(())
        values.put(tensor, 5.0)
        assert values.get(tensor, tensor.item) == 0.0
        tensor += 1
        assert values.get(tensor, tensor.item) == 1.0
