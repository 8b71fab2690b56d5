"""An exported model of one layer, and copies of it to change."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from farspan.trainer.hugging_face.convert import export_model
from farspan.trainer.weights.io import Decoder
from tests.support import hugging_face_models as ours

safetensors = pytest.importorskip("safetensors.torch")

ONE_LAYER = replace(ours.MODEL, layers=1)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in `run`, and its export in `theirs`, in several files."""
    folder = tmp_path_factory.mktemp("refused")
    decoder = Decoder(model=ONE_LAYER)
    run = ours.save_run(ours.random_model(decoder), decoder, folder / "run")
    export_model(run, folder / "theirs", file_bytes=20_000)
    return folder


@pytest.fixture
def theirs(exported: Path, tmp_path: Path) -> Path:
    """A copy of the exported model, to damage."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    for file in (exported / "theirs").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def tensors(theirs: Path) -> dict[str, torch.Tensor]:
    """The tensors of the exported model, whose files are removed."""
    found = {}
    for file in theirs.glob("*.safetensors"):
        found |= safetensors.load_file(file)
        file.unlink()
    (theirs / "model.safetensors.index.json").unlink()
    return found
