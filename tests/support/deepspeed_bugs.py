"""Bugs in the DeepSpeed engine, for tests that have to see them."""

import math
from contextlib import nullcontext
from typing import Any
from unittest import mock

from farspan.trainer.engines import deepspeed as engine_module


def planted(bug: str | None) -> Any:
    """The context of a bug in the engine; None: of none."""
    settings, owner = engine_module.settings_of, engine_module.ZeroEngine
    norm, backward = owner._gradient_norm, owner.backward
    match bug:
        case None:
            return nullcontext()
        case "told of CP":
            told = {"sequence_parallel_size": 2, "data_parallel_size": 1}
            return mock.patch.object(engine_module, "settings_of", lambda *of: settings(*of) | told)
        case "scaled by the degree":
            return mock.patch.object(owner, "backward", lambda self, loss: backward(self, loss * 2))
        case "averaged":
            return mock.patch.object(owner, "backward", lambda self, loss: backward(self, loss / 2))
        case "norm of a rank":
            part = math.sqrt(0.5)
            return mock.patch.object(owner, "_gradient_norm", lambda self: part * norm(self))
        case "not clipped":
            clips = "gradient_clipping"
            return mock.patch.object(engine_module, "settings_of", lambda *of: settings(*of) | {clips: 0.0})
    raise AssertionError(bug)
