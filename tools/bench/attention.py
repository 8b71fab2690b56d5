"""Records: the measured numbers, one for each pair, size and direction, as they are written to JSON."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanisms.dense import Dense
from farspan.tools.bench.case import Shape
from farspan.tools.bench.run import Result
from farspan.tools.bench.timing import DIRECTIONS

MATMULS = {"fwd": 2, "bwd": 5, "fwd_bwd": 7}
"""Products of matrices that attention cannot avoid, by direction; backward recomputes the scores, as is usual."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """ms: median of the rounds. useful_tflops: of visible pairs only. peak_bytes: above what was held before.

    ideal_speedup: pairs that dense causal attention sees over those that the mechanism sees. Numbers are None where
    the pair is not correct, or was not measured.
    """

    mechanism: str
    backend: str
    device: str
    dtype: str
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    direction: str
    ms: float | None
    useful_tflops: float | None
    speedup_over_dense: float | None
    ideal_speedup: float
    fraction_of_ideal: float | None
    peak_bytes: int | None
    correct: bool

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def useful_flops(pairs: int, shape: Shape, direction: str) -> float:
    """Return the FLOPs of products over visible pairs: 2 per pair, query head and element; 2 products forward, 5 back.

    Where D differs from Dv, their mean stands for both.
    """
    return MATMULS[direction] * pairs * shape.heads.query * (shape.head_dim + shape.value_dim)


def records_of(results: Iterable[Result], shape: Shape) -> list[Record]:
    """Return three records for each result: forward, backward, and both."""
    return [_record(result, shape, direction) for result in results for direction in DIRECTIONS]


def _record(result: Result, shape: Shape, direction: str) -> Record:
    rows = result.pair.case.rows(result.tokens)
    pairs = result.pair.case.mechanism.unmasked_pairs(rows, rows)
    one_document = Rows.packed([result.tokens])
    ideal = Dense().unmasked_pairs(one_document, one_document) / max(pairs, 1)
    ms = useful_tflops = speedup = fraction = None
    if result.times is not None:
        ms = result.times.median(direction)
        useful_tflops = useful_flops(pairs, shape, direction) / ms / 1e9
        if result.baseline:
            fastest = min(result.baseline, key=lambda times: times.median(direction))
            speedup = result.times.speedup_over(fastest, direction)
            fraction = speedup / ideal
    return Record(
        mechanism=result.pair.case.name,
        backend=result.pair.contender.name,
        device=shape.device.type,
        dtype=str(shape.dtype).removeprefix("torch."),
        tokens=result.tokens,
        heads=shape.heads.query,
        kv_heads=shape.heads.kv,
        head_dim=shape.head_dim,
        direction=direction,
        ms=ms,
        useful_tflops=useful_tflops,
        speedup_over_dense=speedup,
        ideal_speedup=ideal,
        fraction_of_ideal=fraction,
        peak_bytes=None if result.peaks is None else result.peaks[direction],
        correct=result.pair.verdict.correct,
    )
