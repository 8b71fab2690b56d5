"""Fewer KV heads for a trained model: the mean of each group of heads (GQA uptraining, arXiv 2305.13245).

Section 2.1: mean-pool the key and value matrices of the heads of a group, keep all else, and train on for about 5 % of
the steps.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from farspan.errors import ConfigError
from farspan.parallel.ranks import Ranks, connected
from farspan.trainer.weights.io import Decoder, StoredWeights, check_absent, find_trained_model, save_weights
from farspan.trainer.weights.source_files import files_beside


def pool_heads(source: Path, kv_heads: int, out: Path) -> Decoder:
    """Write the model in `source` (see `find_trained_model`) with `kv_heads` KV heads; return its decoder.

    Raises ConfigError where heads cannot be pooled.
    """
    check_absent(out)
    trained = find_trained_model(source)
    before = trained.decoder
    _check(before, kv_heads)
    after = replace(before, model=replace(before.model, kv_heads=kv_heads))
    stored, old_shapes, new_shapes = StoredWeights(trained.weights), before.shapes(), after.shapes()
    stored.check(old_shapes)
    with connected(Ranks(), torch.device("cpu")):
        tensors = stored.read(old_shapes)
        for name, shape in new_shapes.items():
            # Shapes differ for keys, values and convolutions on keys; not in gated recurrences, which share no heads.
            if shape != old_shapes[name]:
                tensors[name] = pool_rows(tensors[name], before.model.kv_heads // kv_heads, before.model.head_dim)
        save_weights(tensors, out, after, files_beside(trained.weights))
    return after


def pool_rows(matrix: Tensor, group: int, head_dim: int) -> Tensor:
    """Return the mean over each `group` of neighboring heads of a matrix `[heads * head_dim, in]`."""
    heads = matrix.unflatten(0, (-1, group, head_dim))  # [heads / group, group, head_dim, in]
    return heads.double().mean(dim=1).flatten(0, 1).to(matrix.dtype)


def _check(decoder: Decoder, kv_heads: int) -> None:
    model = decoder.model
    if not 1 <= kv_heads < model.kv_heads or model.kv_heads % kv_heads:
        divisors = [str(number) for number in range(1, model.kv_heads) if model.kv_heads % number == 0]
        raise ConfigError(
            f"--kv-heads {kv_heads} does not divide the model.kv_heads={model.kv_heads} of this model: "
            + (f"take {', '.join(divisors)}." if divisors else "it has a single KV head already.")
        )
    if model.head_mixture.kind == "heads":
        raise ConfigError(
            "model.head_mixture.kind='heads' chooses heads for each KV head, so that fewer would attend after pooling: "
            "pool a model without it."
        )
    for mechanism in dict.fromkeys(decoder.mechanisms()):
        if mechanism.routing_width:
            raise ConfigError(
                f"attention.mechanism has {mechanism}, whose router was trained for each of the "
                f"{model.kv_heads} KV heads: pool a model without one."
            )
