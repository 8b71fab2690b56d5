"""Dtypes of stored tensors: rounded where asked for, refused by the name of the tensor where numbers would be lost."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from farspan.errors import CheckpointError, ConfigError, FarspanError
from farspan.trainer.hugging_face.convert import export_model, import_model
from farspan.trainer.weights.io import Decoder
from tests.support import hugging_face_models as ours

safetensors = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.filterwarnings("ignore")

EXPERTS = ours.EXPERTS
ONE_LAYER = replace(ours.MODEL, layers=1)


NORM = "model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (1e5, "float16", f"numbers up to 1e+05 in {NORM}, which --dtype float16 turns into infinity"),
        (-1e5, "float16", f"numbers up to 1e+05 in {NORM}, which --dtype float16 turns into infinity"),
        (3.4e38, "bfloat16", f"numbers up to 3.4e+38 in {NORM}, which --dtype bfloat16 turns into infinity"),
        (float("nan"), None, f"numbers in {NORM} that are not finite"),
        (float("inf"), "float16", f"numbers in {NORM} that are not finite"),
        (1e-9, "float16", f"numbers up to 1e-09 in {NORM}, which --dtype float16 turns into 0"),
    ],
)
def test_numbers_that_a_dtype_cannot_hold_are_refused(
    value: float, dtype: str | None, message: str, theirs: Path, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """By import and by export; a single number that becomes infinite, or all that become 0."""
    changed = tensors[NORM].clone()
    changed[0 if abs(value) > 1e-8 or value != value else slice(None)] = value
    as_dtype = None if dtype is None else getattr(torch, dtype)
    safetensors.save_file(tensors | {NORM: changed}, theirs / "model.safetensors")
    with pytest.raises(FarspanError) as error:
        import_model(theirs, tmp_path / "weights", dtype=as_dtype)
    assert message in str(error.value)
    assert not (tmp_path / "weights").exists()
    decoder = Decoder(model=ONE_LAYER)
    model = ours.random_model(decoder)
    with torch.no_grad():
        model.get_parameter("blocks.0.attention_norm.weight").copy_(changed)
    run = ours.save_run(model, decoder, tmp_path / "run")
    with pytest.raises(FarspanError) as error:
        export_model(run, tmp_path / "out", dtype=as_dtype)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_import_may_round(theirs: Path, tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    safetensors.save_file(tensors, theirs / "model.safetensors")
    fields = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps(fields | {"dtype": "float32"}))
    import_model(theirs, tmp_path / "weights", dtype=torch.float16)
    export_model(tmp_path / "weights", tmp_path / "out")
    written = safetensors.load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float16}
    assert torch.equal(written[NORM], tensors[NORM].half())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == ("float16", "float16")


def test_eight_bit_floats_are_refused(theirs: Path, tensors: dict[str, torch.Tensor]) -> None:
    safetensors.save_file(tensors | {NORM: tensors[NORM].to(torch.float8_e4m3fn)}, theirs / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"has {NORM} in torch\.float8_e4m3fn, which is quantized"):
        import_model(theirs, theirs.parent / "weights")


def test_a_dtype_that_torch_lacks_is_refused(theirs: Path, tensors: dict[str, torch.Tensor]) -> None:
    content = safetensors.save({name: tensor for name, tensor in tensors.items() if name != NORM})
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    header[NORM] = {"dtype": "F6_E2M3", "shape": [32], "data_offsets": [len(data), len(data) + 24]}
    encoded = json.dumps(header).encode()
    (theirs / "model.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded + data + bytes(24))
    with pytest.raises(CheckpointError, match=rf"has {NORM}, which torch cannot read \(.*F6_E2M3\)"):
        import_model(theirs, theirs.parent / "weights")


def test_experts_of_several_dtypes_are_refused(tmp_path: Path) -> None:
    decoder = Decoder(model=replace(ONE_LAYER, experts=EXPERTS))
    export_model(ours.save_run(ours.random_model(decoder), decoder, tmp_path / "run"), tmp_path / "theirs")
    file, name = tmp_path / "theirs" / "model.safetensors", "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    tensors = safetensors.load_file(file)
    safetensors.save_file(tensors | {name: tensors[name].half()}, file)
    with pytest.raises(ConfigError, match=rf"{name} is in torch\.float16 and .*--dtype float32"):
        import_model(tmp_path / "theirs", tmp_path / "weights")
    import_model(tmp_path / "theirs", tmp_path / "weights", dtype=torch.float32)
