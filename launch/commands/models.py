"""`farspan upcycle`, `pool-heads`, `import` and `export`: weights from other models, and for them."""

import argparse
import logging
import shlex
from pathlib import Path
from typing import Any

from farspan.launch.commands.arguments import Subparsers, add_command, add_overrides, config_of

log = logging.getLogger("farspan")


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(subparsers, "upcycle", _upcycle, "make experts from trained models, to start a run from")
    parser.add_argument("config", type=Path, help="TOML file of the model with experts")
    add_overrides(parser)
    parser.add_argument(
        "--of", type=Path, nargs="+", required=True, metavar="RUN", help="folders of runs without experts, one or more"
    )
    _add_out(parser)

    parser = add_command(subparsers, "pool-heads", _pool_heads, "reduce KV heads, to GQA or MQA, to start a run from")
    parser.add_argument("source", type=Path, metavar="MODEL", help="a run, one of its checkpoints, or imported weights")
    parser.add_argument("--kv-heads", type=int, required=True, metavar="N", help="1 for multi-query attention")
    _add_out(parser)

    parser = add_command(subparsers, "import", _import, "read a Hugging Face model, to start a run from")
    parser.add_argument("source", type=Path, metavar="FOLDER", help="config.json and safetensors")
    _add_out(parser)
    _add_dtype(parser)

    add_export(subparsers)


def add_export(subparsers: Subparsers) -> None:
    """Add `export`, which is also a command of `farspan checkpoint`."""
    parser = add_command(subparsers, "export", _export, "write a trained model for Hugging Face's transformers")
    parser.add_argument("source", type=Path, metavar="MODEL", help="a run, one of its checkpoints, or weights")
    _add_out(parser, "gets config.json, safetensors and the tokenizer")
    _add_dtype(parser)
    parser.add_argument(
        "--as",
        dest="mechanism",
        choices=("dense",),
        help="attention of the exported model, with the weights as they are; default: as trained",
    )


def _add_out(parser: argparse.ArgumentParser, text: str = "for run.start_from") -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help=text)


def _add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="of the tensors; default: as they are stored"
    )


def _upcycle(options: argparse.Namespace) -> None:
    from farspan.trainer.weights.upcycle import upcycle

    upcycle(config_of(options), options.of, options.out)
    _log_written("upcycled", options.out)


def _pool_heads(options: argparse.Namespace) -> None:
    from farspan.trainer.weights.pool_heads import pool_heads

    pool_heads(options.source, options.kv_heads, options.out)
    _log_written("pooled", options.out)
    log.info("%-12smodel.kv_heads=%d; see %s", "requires", options.kv_heads, options.out / "model.toml")


def _import(options: argparse.Namespace) -> None:
    from farspan.trainer.hugging_face.convert import import_model

    decoder = import_model(options.source, options.out, dtype=_dtype_of(options))
    _log_written("imported", options.out)
    log.info("%-12sthese settings, also in %s:\n\n%s", "requires", options.out / "model.toml", decoder.text())


def _export(options: argparse.Namespace) -> None:
    from farspan.trainer.hugging_face.convert import export_model

    as_dense = options.mechanism == "dense"
    architecture = export_model(options.source, options.out, dtype=_dtype_of(options), as_dense=as_dense)
    log.info("%-12s%s, a %s", "exported", options.out, architecture.name)


def _dtype_of(options: argparse.Namespace) -> Any:
    import torch

    return None if options.dtype is None else getattr(torch, options.dtype)


def _log_written(action: str, weights: Path) -> None:
    setting = shlex.quote(f"run.start_from={weights}")
    log.info("%-12s%s: start a run from it with %s", action, weights, setting)
