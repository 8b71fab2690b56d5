"""Measure the memory that one forward and backward pass of `linear_cross_entropy` needs beyond what must exist.

Prints one JSON line. Run in a process of its own: `python -m farspan.tools.measure_loss_memory --tokens 32768`.
CPU and Linux only: the peak is the system's own count of resident pages (VmHWM, proc_pid_status(5)).
"""

import json
import time

import torch

from farspan.kernels.layers.cross_entropy import DEFAULT_CHUNK_BYTES, chunk_tokens, linear_cross_entropy
from farspan.tools.bench.memory import Meter
from farspan.tools.command import DTYPES, parser_of


def one_pass(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk_bytes: int) -> float:
    """Run forward and backward with uneven token weights and return the seconds taken."""
    start = time.perf_counter()
    losses = linear_cross_entropy(hidden, weight, labels, chunk_bytes=chunk_bytes)
    losses.backward(torch.linspace(0.5, 1.5, len(losses), dtype=losses.dtype))
    return time.perf_counter() - start


def measure(tokens: int, vocabulary: int, width: int, dtype: torch.dtype, chunk_bytes: int) -> dict[str, float | str]:
    """Return the peak bytes above inputs, weight and their gradients, beside the sizes."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, generator=generator).requires_grad_()

    warm_up = torch.zeros(8, dtype=torch.int64)
    one_pass(normal(8, width), normal(8, width), warm_up, chunk_bytes)  # loads the matrix library and its workspace
    hidden, weight = normal(tokens, width), normal(vocabulary, width)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    meter = Meter()
    before = meter.reset()
    seconds = one_pass(hidden, weight, labels, chunk_bytes)
    return {
        "tokens": tokens,
        "vocabulary": vocabulary,
        "width": width,
        "dtype": str(dtype).removeprefix("torch."),
        "chunk_tokens": chunk_tokens(vocabulary, dtype, chunk_bytes),
        "chunk_bytes": chunk_bytes,
        "full_logits_bytes": tokens * vocabulary * max(dtype.itemsize, 4),
        "peak_extra_bytes": meter.peak() - before - hidden.nbytes - weight.nbytes,
        "seconds": round(seconds, 3),
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--vocabulary", type=int, default=131_072)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--chunk-bytes", type=int, default=DEFAULT_CHUNK_BYTES, help="largest chunk of logits")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = DTYPES[options.dtype]
    print(json.dumps(measure(options.tokens, options.vocabulary, options.width, dtype, options.chunk_bytes)))


if __name__ == "__main__":
    main()
