# pyright: reportMissingImports=false
"""Compile the Triton kernels for an H100 (sm_90), which takes no GPU, and report what each needs of it.

    python -m farspan.tools.kernel_report docs/kernels_sm90.md

Kernels are compiled with the arguments that the backend launches them with: a plan is run on tensors of zeros by a
driver that only names the target. Exit status 1 when registers spill to memory or a kernel takes more shared memory
than a block can have. The report begins with a digest of the kernels' code and of the pinned Triton: while it is
unchanged, tests need not compile again.
"""

import ast
import hashlib
import multiprocessing
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from farspan.kernels.backend import BACKENDS
from farspan.kernels.kinds.routed import LocalShard
from farspan.kernels.lifetimes.lifetimes import DocumentOrder, Lifetimes
from farspan.kernels.linear_attention.state import Segment
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.neighborhood import Dimension, Neighborhood
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockPartition, BlockSelection
from farspan.kernels.mechanisms.moba import MoBA
from farspan.kernels.mechanisms.sparge import SpargeAttention
from farspan.kernels.mechanisms.vmoba import VMoBA
from farspan.kernels.planner import Heads, HeadShare, identity
from farspan.kernels.planning.choice_tiles import MAX_BLOCKS
from farspan.kernels.planning.plan import Plan
from farspan.kernels.recurrent_attention import recurrent_attention_backward, recurrent_attention_forward
from farspan.tools.bench.case import dtype_name

ROOT = Path(__file__).resolve().parents[1]
DATA_ONLY = {"block_mask", "row_tables"}
"""Files beside the kernels that make their data, and have no part in compiling."""

PROCESSES = 2
SHARED_BYTES = 227 << 10
"""Shared memory that a block of threads can have on an H100."""
ROWS, HEADS, KV_HEADS = 1024, 8, 2
GRID = Neighborhood(
    dimensions=(
        Dimension(length=4, window=2, causal=True),
        Dimension(length=16, window=5, dilation=2),
        Dimension(length=16, window=5),
    )
)
TITLE = """# What the Triton kernels need of an H100

Written by `python -m farspan.tools.kernel_report docs/kernels_sm90.md` (Triton 3.6.0, its own ptxas). Every kernel
that a plan launches, at every head size and dtype; one binary that serves several of them is one line. `experts`: a
mixture's experts, at a width and inner size; `heads`: the projections of a mixture of heads, at a width and that of an
expert's queries; tiles of both are rows x columns x depth. `layers`: what is between a block's matrix products, at a
width and head size; tiles are rows x columns. `choice`: choices of blocks; tiles are blocks x queries. `regs`:
registers of a thread, at most 255. `stack`: bytes of a thread's stack, which registers spill to; 0 is none. `shared`:
bytes of shared memory of a block, at most 232,448.

Digest of the code: {digest}

| plan | head size | dtype | kernel | queries x keys, or chunk x columns | warps | stages | regs | stack | shared |
|---|---|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True, slots=True)
class Case:
    """A plan of `plan_of`, or a recurrence, with tensors of one dtype and of head sizes `width` and `value_width`.

    Or experts, or heads that tokens choose, of that width and inner size; or layers, of that width and head size.
    """

    plan: str
    width: int
    value_width: int
    dtype: torch.dtype

    @property
    def size(self) -> str:
        return str(self.width) if self.width == self.value_width else f"{self.width}/{self.value_width}"


class Usage(NamedTuple):
    """The resources of a kernel. binary: its hash."""

    kernel: str
    tile: str
    warps: int
    stages: int
    registers: int
    stack: int
    shared: int
    binary: str


ATTENTION = ("causal", "window and sinks", "neighborhood", "lifetimes", "tiles select", "rows select")
PLANS = (*ATTENTION, "recurrence", "choice")
SIZES = ((64, 64), (128, 128), (192, 128), (256, 256))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EXPERT_SIZES = ((1024, 512), (1000, 500))
"""Width and inner size of experts: multiples of 16 elements, which are loaded 16 bytes at a time, and others."""
LAYER_SIZES = ((4096, 128), (5120, 96), (8192, 256))
"""Width of a model and head size: a common one, one whose tiles have masked columns, and the widest norm."""
CASES = [Case(plan, *sizes, dtype) for sizes in SIZES for dtype in DTYPES for plan in PLANS]
CASES += [Case(plan, *sizes, dtype) for plan in ("experts", "heads") for sizes in EXPERT_SIZES for dtype in DTYPES]
CASES += [Case("layers", *sizes, dtype) for sizes in LAYER_SIZES for dtype in DTYPES]


def plan_of(name: str) -> Plan:
    """Return a small plan for which the kernels load everything that such plans need."""
    rows = Rows.packed([ROWS])
    attention_mask = {
        "window and sinks": AttentionMask(window=100, sinks=4),
        "neighborhood": AttentionMask(causal=False, neighborhood=GRID),
    }.get(name, AttentionMask())
    plan = Plan.build(rows, rows, attention_mask, heads=HEADS)
    if name == "lifetimes":
        return plan.with_lifetimes(torch.zeros(KV_HEADS, ROWS, dtype=torch.int32))
    if name.endswith("select"):
        # Blocks that no tile is aligned with, so that rows are loaded through an index.
        blocks = BlockPartition.blocks(rows, 100)
        query_block = blocks.of(rows) if name == "tiles select" else torch.arange(ROWS)
        own = blocks.of(rows) if name == "rows select" else torch.arange(blocks.count)
        # [query blocks] -> [heads, query blocks, 1]
        return plan.with_selection(
            BlockSelection.from_lists(query_block, blocks, own[None, :, None].expand(HEADS, -1, 1))
        )
    return plan


class _Driver:
    """Names the target, and has nothing that would touch a GPU."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def compile_case(case: Case) -> list[Usage]:
    """Compile every kernel that a forward and a backward pass of the case launch."""
    import triton
    from triton.runtime.jit import JITFunction

    launched: list[Usage] = []
    run = JITFunction.run

    def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = run(kernel, *arguments, grid=grid, warmup=True, **options)
        launched.append(_usage(kernel.fn.__name__.removesuffix("_kernel"), options, compiled))
        return compiled

    triton.runtime.driver.set_active(_Driver())
    JITFunction.run = compile_only
    try:
        of_plan = {
            "recurrence": _recurrence,
            "experts": _experts,
            "heads": _heads,
            "layers": _layers,
            "choice": _choice,
        }
        of_plan.get(case.plan, _attention)(case)
    finally:
        JITFunction.run = run
    return list(dict.fromkeys(launched))


def _attention(case: Case) -> None:
    (q, k, v), plan, backend = _tensors(case), plan_of(case.plan), BACKENDS.get("triton")
    out, lse = backend.forward(q, k, v, plan)
    given = out.to(case.dtype), q, k, v, out.to(case.dtype), lse
    backend.backward(*given, plan)
    if plan.lifetime is not None:
        order = DocumentOrder.of(plan.keys)
        lifetimes = Lifetimes.of(torch.zeros(ROWS, KV_HEADS, dtype=torch.int8), order, window=16)
        plan = replace(plan, lifetime=None)
        _, sums = backend.pair_sums(*given, plan=plan, lifetimes=lifetimes)
        backend.type_gradient(sums, lifetimes, order)


def _tensors(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    heads = ((HEADS, case.width), (KV_HEADS, case.width), (KV_HEADS, case.value_width))
    q, k, v = (torch.zeros(ROWS, *shape, dtype=case.dtype) for shape in heads)
    return q, k, v


def _recurrence(case: Case) -> None:
    q, k, v = _tensors(case)
    segment, decay = Segment.of(Rows.packed([ROWS])), torch.ones(HEADS, dtype=torch.float64)
    out, state = recurrent_attention_forward(q, k, v, segment, decay, backend="triton")
    recurrent_attention_backward(out.to(q.dtype), state.value, q, k, v, segment, decay, backend="triton")


def _experts(case: Case) -> None:
    from farspan.kernels.triton_kernels import grouped_launch

    width, inner, counts = case.width, case.value_width, torch.tensor([ROWS - 300, 0, 300])
    x = torch.zeros(ROWS, width, dtype=case.dtype)
    gate = torch.zeros(len(counts), inner, width, dtype=case.dtype)
    down = torch.zeros(len(counts), width, inner, dtype=case.dtype)
    out = grouped_launch.swiglu(x, gate, gate, down, counts)
    grouped_launch.swiglu_backward(x, gate, gate, down, counts, out)


def _heads(case: Case) -> None:
    from farspan.kernels.triton_kernels import gathered_linear_launch

    width, inner, per_token = case.width, case.value_width, 2
    x, total = torch.zeros(ROWS, width, dtype=case.dtype), torch.zeros(ROWS, width)
    y, weight = (torch.zeros(n, inner, dtype=case.dtype) for n in (ROWS * per_token, 3 * width))
    weight = weight.unflatten(0, (3, width))
    choices = torch.zeros(ROWS * per_token, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), per_token
    gathered_linear_launch.each(y, x, weight, *choices)
    gathered_linear_launch.add_each(total, y, weight.mT, *choices)
    gathered_linear_launch.weight_gradient(torch.zeros_like(weight).mT, y, x, *choices)


def _layers(case: Case) -> None:
    from farspan.kernels.triton_kernels import layers_launch

    width, head_dim = case.width, case.value_width
    x, weight = (torch.zeros(*shape, dtype=case.dtype) for shape in ((ROWS, width), (width,)))
    q, k = (torch.zeros(ROWS, heads, head_dim, dtype=case.dtype) for heads in (HEADS, KV_HEADS))
    # With and without a sum, and so with and without the gradient of the residual stream; norms of heads.
    for rows, delta in ((x, x), (x, None), (q.flatten(0, 1), None)):
        of_rows = weight[: rows.shape[1]]
        layers_launch.rms_norm(rows, delta, of_rows, 1e-5)
        layers_launch.rms_norm_backward(rows, delta, rows, torch.zeros(len(rows)), of_rows)
    for rotated in (head_dim, head_dim // 2):
        table = torch.zeros(ROWS, rotated // 2)
        for back in (False, True):
            layers_launch.rope(q, k, table, table, back=back)
    layers_launch.silu_product(x, x)
    layers_launch.silu_product_backward(x, x, x)


def _choice(case: Case) -> None:
    # The last rows of documents of all kinds of sizes choose among one block for each of their rows.
    lengths = (64, 512, 1024, MAX_BLOCKS, 2 * MAX_BLOCKS)
    rows = Rows.packed(lengths)
    local_rows = rows.take(torch.tensor(lengths).cumsum(0) - 1)
    q, k = (torch.zeros(len(lengths), heads, case.width, dtype=case.dtype) for heads in (HEADS, KV_HEADS))
    # Numbers of few blocks, and the bits of many.
    by_row = MoBA(block=1), MoBA(block=1, top_k=1024), VMoBA(brick=(1,)), VMoBA(brick=(1,), scope="head")
    for mechanism in (*by_row, SpargeAttention(tile=1, block=1)):
        local_shard = LocalShard(
            mechanism=mechanism,
            rows=local_rows,
            key_rows=local_rows,
            global_rows=rows,
            share=HeadShare.all(Heads(query=HEADS, kv=KV_HEADS)),
            backend="triton",
            all_reduce_sum=identity,
        )
        mechanism.select_packed(q, k, local_shard)


def _usage(kernel: str, options: dict[str, Any], compiled: Any) -> Usage:
    sides = ("BLOCKS", "CHUNK", "ROWS", "COLUMNS", "DEPTH", "BLOCK_Q", "BLOCK_K", "BLOCK")
    tile = " x ".join(str(options[side]) for side in sides if side in options)
    if options.get("FOR_K") != options.get("FOR_V"):
        kernel += " (dk)" if options["FOR_K"] else " (dv)"
    if weights := options.get("WEIGHTS"):
        kernel += f" ({weights}, numbers)" if options["NUMBERED"] else f" ({weights})"
    needs = compiled.metadata
    registers, stack = _registers_and_stack(compiled.asm["cubin"])
    return Usage(kernel, tile, needs.num_warps, needs.num_stages, registers, stack, needs.shared, compiled.hash)


def _registers_and_stack(cubin: bytes) -> tuple[int, int]:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        listing = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", listing)
    assert found is not None, listing
    return int(found[1]), int(found[2])


def code_digest(folder: Path = ROOT / "kernels" / "triton_kernels") -> str:
    """Return a digest of everything that decides the binaries: the code of kernels and launches, the pinned Triton.

    Comments and docstrings do not count, nor does where lines break.
    """
    pins = [
        line for line in (ROOT / "Makefile").read_text(encoding="utf-8").splitlines() if line.startswith("TRITON :=")
    ]
    digest = hashlib.sha256("".join(pins).encode())
    for path in sorted(folder.glob("*.py")):
        if path.stem not in DATA_ONLY:
            digest.update(f"{path.name} {_normalized(ast.parse(path.read_text(encoding='utf-8')))}".encode())
    return digest.hexdigest()


def _normalized(node: object) -> str:
    """Return code as a string that is the same under every version of Python."""
    if isinstance(node, list):
        return f"[{', '.join(_normalized(part) for part in node if not _is_docstring(part))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    # Newer versions have more fields, which are empty in code for older ones.
    fields = [f"{name}={_normalized(value)}" for name, value in ast.iter_fields(node) if value not in (None, [])]
    return f"{type(node).__name__}({', '.join(fields)})"


def _is_docstring(node: object) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def row(usage: Usage, cases: list[Case]) -> str:
    """Return the line of the table for a binary and the cases that launch it."""
    names = ([case.plan for case in cases], [case.size for case in cases], [dtype_name(case.dtype) for case in cases])
    cells = (*(", ".join(dict.fromkeys(of_cases)) for of_cases in names), *usage[:-2], f"{usage.shared:,}")
    return f"| {' | '.join(map(str, cells))} |"


def main(out: Path) -> int:
    """Compile all cases in processes, which share binaries through Triton's cache, and write the report."""
    usages: dict[str, Usage] = {}
    cases: dict[str, list[Case]] = {}
    with ProcessPoolExecutor(PROCESSES, mp_context=multiprocessing.get_context("spawn")) as pool:
        for case, launched in zip(CASES, pool.map(compile_case, CASES), strict=True):
            for usage in launched:
                usages.setdefault(usage.binary, usage)
                cases.setdefault(usage.binary, []).append(case)
    lines = {binary: row(usage, cases[binary]) for binary, usage in usages.items()}
    table = "".join(f"{line}\n" for line in lines.values())
    out.write_text(TITLE.format(digest=code_digest()) + table, encoding="utf-8")
    bad = [binary for binary, usage in usages.items() if usage.stack or usage.shared > SHARED_BYTES]
    for binary in bad:
        print(f"does not fit: {lines[binary]}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
