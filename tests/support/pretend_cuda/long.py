"""One layer of attention over 131,072 tokens or more, 32:8 heads of 128, in bfloat16, on a device without memory.

    python -m tests.support.pretend_cuda.long moba_512x8 dense_packed

prints what each source line asks of the device in the second layer of a sequence; without names, a line for each case.
Nothing has values but what the host makes: a layer that looks at more ends with the line that would wait.
"""

import argparse
import math
from dataclasses import dataclass, replace

import torch

from farspan.kernels.backend import KernelRequest, choose_backend
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Heads, Mechanism
from farspan.kernels.mechanisms.dense import Dense
from farspan.kernels.mechanisms.moba import MoBA
from farspan.kernels.mechanisms.neighborhood import Neighborhood
from farspan.kernels.mechanisms.spans import Spans
from farspan.kernels.mechanisms.sparge import SpargeAttention
from farspan.kernels.mechanisms.vggt import VGGT
from farspan.kernels.mechanisms.vmoba import VMoBA
from farspan.kernels.merge import accumulation_dtype
from farspan.kernels.planner import InputSpec
from farspan.kernels.sequence_attention import plan_sequence_attention
from farspan.tools.bench.case import find_cases
from tests.support.pretend_cuda.counts import DEVICE_WORK, Counts, Kind, Part
from tests.support.pretend_cuda.runtime import pretend
from tests.support.pretend_cuda.tensor import CUDA, NoValues, PretendDevice
from tests.support.pretend_cuda.watch import watch

TOKENS = 131_072
HEADS = Heads(query=32, kv=8)
HEAD_DIM = 128
DTYPE = torch.bfloat16
PACKED_DOCUMENTS = 125


@dataclass(frozen=True, kw_only=True)
class LongCase:
    mechanism: Mechanism
    rows: Rows


@dataclass(frozen=True, kw_only=True)
class Layers:
    """What a sequence and two equal layers of it count; waits: why and where the host would have waited, if it did.

    What is made once for a sequence is planned, ahead of the first layer.
    """

    backend: str
    planned: Counts
    first: Counts
    second: Counts
    waits: str | None


MANY_TILES = 67_584
MANY_BLOCKS: dict[str, tuple[Mechanism, int]] = {
    "moba_128x32 of 1M": (MoBA(block=128, top_k=32), 8 * TOKENS),
    "vmoba_16": (VMoBA(brick=(16,)), TOKENS),
    "sparge_16": (SpargeAttention(similarity=-0.1, top=0.1, block=16), MANY_TILES),
    "vggt_16": (VGGT(mass=0.0, sparsity=0.9, block=16), MANY_TILES),
}
"""Documents of 8,192 blocks, or of 4,224, where the host plans tiles; and the number of tokens of each."""
BY_ROW, BY_TILE = (60, 120), (40, 60)
"""Most operations forward and backward: where single rows select blocks, and elsewhere."""


def target_of(case: LongCase) -> tuple[int, int]:
    return BY_ROW if isinstance(case.mechanism, MoBA | VMoBA) else BY_TILE


def long_cases() -> dict[str, LongCase]:
    """Return what `farspan.tools.bench_attention` measures, dense attention to many packed documents, and choices among
    more blocks than registers hold.
    """
    cases = {"dense_packed": LongCase(mechanism=Dense(), rows=packed_documents())}
    for case in find_cases([], []):
        mechanism, documents = case.mechanism, [TOKENS]
        if isinstance(mechanism, Spans):
            # Windows of 8 heads.
            repeats = HEADS.query // len(mechanism.alpha)
            mechanism = replace(
                mechanism, alpha=mechanism.alpha * repeats, beta=mechanism.beta * repeats, length=TOKENS
            )
        if isinstance(mechanism, Neighborhood):
            size = math.prod(mechanism.grid)
            documents = [size] * (TOKENS // size)
        assert mechanism.unsupported_reason(HEADS, max(documents)) is None, case.name
        cases[case.name] = LongCase(mechanism=mechanism, rows=Rows.packed(documents))
    for name, (mechanism, tokens) in MANY_BLOCKS.items():
        cases[name] = LongCase(mechanism=mechanism, rows=Rows.packed([tokens]))
    return cases


def packed_documents() -> Rows:
    """Return documents whose lengths are log-normal, the same at every call."""
    lengths = torch.randn(PACKED_DOCUMENTS, generator=torch.Generator().manual_seed(0), dtype=torch.float64).exp()
    ends = (lengths.cumsum(0) / lengths.sum() * TOKENS).round().long()
    return Rows.packed(torch.diff(ends, prepend=torch.zeros(1, dtype=torch.int64)).tolist())


def long_layers() -> dict[str, Layers]:
    """Return what all cases count."""
    return {name: run_layers(case) for name, case in long_cases().items() if is_quick(case)}


def is_quick(case: LongCase) -> bool:
    """Return whether a case takes less than minutes: libraries are called for each of thousands of small regions."""
    return backend_of(case) != "cuda" or not isinstance(case.mechanism, Neighborhood | Spans)


def backend_of(case: LongCase, name: str = "auto") -> str:
    return choose_backend(name, CUDA, KernelRequest.of(case.mechanism, DTYPE, HEAD_DIM, HEAD_DIM))


def run_layers(case: LongCase, backend: str = "auto") -> Layers:
    """Run forward and backward passes of two layers that share a plan."""
    device, counted, waits = PretendDevice(has_values=False), [], None
    backend = backend_of(case, backend)
    spec = InputSpec(device=CUDA, dtype=DTYPE, kv_heads=HEADS.kv, head_dim=HEAD_DIM, value_dim=HEAD_DIM)
    with device:
        planned = plan_sequence_attention(case.mechanism, case.rows, HEADS, range(HEADS.query), backend=backend)
        planned.prepare(spec)
        of_plan = device.take_counts()
        watch([planned], device)
        widths = {HEADS.query: 1, HEADS.kv: 2}
        inputs = [
            torch.empty(len(case.rows), heads, HEAD_DIM, dtype=DTYPE, device=CUDA)
            for heads, number in widths.items()
            for _ in range(number)
        ]
        if width := case.mechanism.routing_width:
            inputs.append(torch.empty(len(case.rows), HEADS.kv, width, dtype=accumulation_dtype(DTYPE), device=CUDA))
        device.take_counts()
        for _ in range(2):
            try:
                out, saved = planned.forward(*inputs)
                planned.backward(torch.empty_like(out), saved)
            except NoValues as error:
                waits = str(error)
            counted.append(device.take_counts())
    return Layers(backend=backend, planned=of_plan, first=counted[0], second=counted[1], waits=waits)


def summary(layers: Layers) -> str:
    """Return one line of numbers of the second layer."""
    if layers.waits is not None:
        return f"{layers.backend:10s} {layers.waits}"
    of, passes = layers.second, (Part.FORWARD, Part.BACKWARD)
    waits, to_host, pageable = (
        sum(of.number(part, kind) for part in passes) for kind in (Kind.SYNC, Kind.TO_HOST, Kind.PAGEABLE)
    )
    work = ", ".join(
        f"{part.split()[1]} {of.number(part, *DEVICE_WORK)} operations, host {1000 * of.host_s[part][0]:.1f} ms"
        for part in passes
    )
    return f"{layers.backend:10s} {waits} waits, {to_host} + {pageable} copies, {work}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="such as moba_512x8; all, a line for each, if none is given")
    parser.add_argument("--backend", default="auto", help="of farspan's attention.backend")
    parser.add_argument("--most", type=int, default=30, help="source lines to print of each kind")
    options = parser.parse_args()
    pretend()
    cases = long_cases()
    for name in options.cases or (name for name, case in cases.items() if is_quick(case)):
        layers = run_layers(cases[name], options.backend)
        print(f"{name:24s}{summary(layers)}", flush=True)
        if options.cases:
            print("\n".join(layers.second.lines(options.most)))


if __name__ == "__main__":
    main()
