"""Fewer KV heads for a trained model: each is the mean of a group of them (GQA uptraining, arXiv 2305.13245).

Section 2.1: key and value matrices of the heads of a group are mean-pooled, all else is kept; training then goes on for
about a twentieth of its steps.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from farspan.errors import ConfigError
from farspan.parallel.ranks import Ranks, connected
from farspan.trainer.weights.io import StoredWeights, save_weights
from farspan.trainer.weights.locate import DECODER_FILE, Decoder, find_trained


def pool_heads(source: Path, kv_heads: int, out: Path) -> Decoder:
    """Write the weights of the model in `source` (see `find_trained`) with `kv_heads` KV heads; return its decoder.

    Raises ConfigError where heads cannot be pooled.
    """
    trained = find_trained(source)
    before = trained.decoder
    _check(before, kv_heads)
    after = replace(before, model=replace(before.model, kv_heads=kv_heads))
    stored, old_shapes, new_shapes = StoredWeights(trained.weights), before.shapes(), after.shapes()
    stored.check(old_shapes)
    with connected(Ranks(), torch.device("cpu")):
        tensors = stored.read(old_shapes)
        for name, shape in new_shapes.items():
            # Keys and values, and convolutions on keys, have other shapes then; gated recurrences share no heads.
            if shape != old_shapes[name]:
                tensors[name] = pooled(tensors[name], before.model.kv_heads // kv_heads, before.model.head_dim)
        save_weights(tensors, out, {DECODER_FILE: after.text()})
    return after


def pooled(matrix: Tensor, group: int, head_dim: int) -> Tensor:
    """Return the mean over each `group` of neighboring heads of a matrix `[heads * head_dim, in]`."""
    heads = matrix.unflatten(0, (-1, group, head_dim))
    return heads.double().mean(dim=1).flatten(0, 1).to(matrix.dtype)


def _check(decoder: Decoder, kv_heads: int) -> None:
    model = decoder.model
    if not 1 <= kv_heads < model.kv_heads or model.kv_heads % kv_heads:
        fitting = [str(number) for number in range(1, model.kv_heads) if model.kv_heads % number == 0]
        raise ConfigError(
            f"--kv-heads {kv_heads} makes no even groups of the model.kv_heads={model.kv_heads} of this model: "
            + (f"take {', '.join(fitting)}." if fitting else "it has one already, which all queries share.")
        )
    if model.head_mixture.kind == "heads":
        raise ConfigError(
            "model.head_mixture.kind='heads' counts heads for each KV head, so that pooled ones leave tokens fewer: "
            "pool a model without it."
        )
    for mechanism in dict.fromkeys(decoder.mechanisms()):
        if mechanism.routing_width:
            raise ConfigError(
                f"attention.mechanism has {mechanism}, whose router was trained for each of the "
                f"{model.kv_heads} KV heads: pool a model without one."
            )
