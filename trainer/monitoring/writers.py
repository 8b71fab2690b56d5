"""Where records of a run go: lines of `metrics.jsonl`, and TensorBoard."""

import json
import logging
import math
import os
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from farspan.trainer.monitoring.tags import EVALUATION_KEY, scalars
from farspan.trainer.state import records

FIRST_TAGS = {"train/loss": "Loss/train", "eval/loss": "Loss/eval"}
"""TensorBoard sorts tags by name, capitals first: the losses are there a second time, to be the first that one sees."""
# Charts with several lines, by group; the tag of a line is a regular expression.
CHARTS = {
    "train": {"loss": ["train/loss", "eval/loss"]},
    "eval": {"loss by position in the document": ["eval/loss_by_position/.*"]},
    "comm": {
        "bytes sent, by kind": ["comm/bytes_by_kind/.*"],
        "bytes received, by kind": ["comm/bytes_received_by_kind/.*"],
    },
    "experts": {"busiest expert over the mean, by layer": ["experts/load/.*"]},
}

log = logging.getLogger("farspan")


class MetricsWriter:
    """Appends records of the steps after `resumed_step` to `metrics.jsonl` and `tensorboard/`.

    First drops records of later steps, which the resumed run will write again, and a line that a crash cut short.
    """

    def __init__(self, folder: Path, *, resumed_step: int) -> None:
        path = folder / "metrics.jsonl"
        self.error: OSError | None = None
        self._evaluated = _drop_records_after(path, resumed_step)
        self._file = path.open("a", buffering=1)
        # Tells TensorBoard to forget later steps of an earlier attempt; without one it forgets nothing.
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)
        self._board.add_custom_scalars(
            {group: {title: ["Multiline", tags] for title, tags in charts.items()} for group, charts in CHARTS.items()}
        )

    def has_evaluation(self, step: int) -> bool:
        return step in self._evaluated

    def write(self, record: dict[str, Any]) -> None:
        """Write one record, which has a `step`; numbers and tables of numbers go to TensorBoard too.

        Numbers that are not finite become null. An error is kept in `error`: only one rank writes, and the others
        have to learn of it before it gives up.
        """
        try:
            self._write({name: _finite(value) for name, value in record.items()})
        except OSError as error:
            self.error = error

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        if EVALUATION_KEY in record:
            self._evaluated.add(record["step"])
        for tag, value in scalars(record):
            self._board.add_scalar(tag, value, record["step"])
            if tag in FIRST_TAGS:
                self._board.add_scalar(FIRST_TAGS[tag], value, record["step"])

    def close(self) -> None:
        for file in (self._file, self._board):
            # The disk may be full for their buffers too.
            with suppress(OSError):
                file.close()


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _drop_records_after(path: Path, step: int) -> set[int]:
    """Drop from the first later record on, and what is unreadable before; return the steps evaluated before it."""
    evaluated: set[int] = set()
    if not path.exists():
        return evaluated
    kept = []
    # Records are in the order of steps.
    for record, line in takewhile(lambda found: found[0]["step"] <= step, records(path)):
        if EVALUATION_KEY in record:
            evaluated.add(record["step"])
        kept.append(line)
    content = b"".join(kept)
    if path.read_bytes().startswith(content):
        os.truncate(path, len(content))
    else:
        log.warning("dropped     unreadable lines of %s; all records before and after them are kept", path)
        # By a rename, so that a crash leaves the old file or the new one.
        path.with_suffix(".partial").write_bytes(content)
        path.with_suffix(".partial").replace(path)
    return evaluated
