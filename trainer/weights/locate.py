"""Trained models by their folder: a run, a checkpoint of it, or weights without a run."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from farspan.errors import CheckpointError
from farspan.kernels.mechanism import Mechanism
from farspan.trainer.checkpoint.verify import check_complete, newest_complete
from farspan.trainer.config import AttentionConfig, Config
from farspan.trainer.model.config import ModelConfig
from farspan.trainer.model.transformer import Transformer
from farspan.trainer.toml_config import load_config, to_toml

DECODER_FILE = "model.toml"


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoder:
    """The model that weights belong to; `model.toml` beside them, as sections of the configuration of a run."""

    model: ModelConfig
    attention: AttentionConfig = field(default_factory=AttentionConfig)

    def mechanisms(self) -> tuple[Mechanism, ...]:
        return self.attention.build_mechanisms(self.model.layers)

    def shapes(self) -> dict[str, torch.Size]:
        """Return the shape of each parameter and buffer; a tied table has both of its names."""
        with torch.device("meta"):
            return {name: part.shape for name, part in Transformer(self.model, self.mechanisms()).state_dict().items()}

    def text(self) -> str:
        """Return the sections as TOML, without defaults."""
        return to_toml(self, brief=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedModel:
    """A decoder and the folder of its weights; run: the configuration of the run that trained it, if any."""

    decoder: Decoder
    weights: Path
    run: Config | None


def find_trained_model(folder: Path) -> TrainedModel:
    """Return the model in `folder`: a run, one step in its checkpoints/, or weights with a `model.toml`.

    Raises CheckpointError where it is none of them, or has no complete checkpoint.
    """
    if (folder / DECODER_FILE).is_file():
        return TrainedModel(decoder=load_config(Decoder, folder / DECODER_FILE), weights=folder, run=None)
    is_step = folder.absolute().parent.name == "checkpoints"
    run = folder.absolute().parent.parent if is_step else folder
    if not (run / "config.toml").is_file():
        raise CheckpointError(
            f"{folder} is not a trained model: name the folder of a run, one step in its checkpoints/, or weights with "
            f"a {DECODER_FILE}, as `farspan import` writes."
        )
    config = load_config(Config, run / "config.toml")
    if is_step:
        check_complete(folder)
    weights = folder if is_step else newest_complete(run / "checkpoints")
    return TrainedModel(decoder=Decoder(model=config.model, attention=config.attention), weights=weights, run=config)
