"""Measure the memory that one forward and backward pass of `linear_cross_entropy` needs beyond what must exist.

Prints one JSON line. Run in a process of its own: `python -m farspan.tools.measure_loss_memory --tokens 32768`.
CPU and Linux only: the peak is the system's own count of resident pages (VmHWM, proc_pid_status(5)).
"""

import json

import torch

from farspan.kernels.layers.cross_entropy import CHUNK_BYTES, chunk_tokens, linear_cross_entropy
from farspan.tools.bench.run import peak, reset_peak
from farspan.tools.command import parser_of


def peak_extra_bytes(tokens: int, vocabulary: int, width: int, chunk_bytes: int) -> int:
    """Return the peak above inputs, weight and their gradients, float32, of a pass with uneven token weights."""
    generator, cpu = torch.Generator().manual_seed(0), torch.device("cpu")
    hidden = torch.randn(tokens, width, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, width, generator=generator, requires_grad=True)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    before = reset_peak(cpu)
    losses = linear_cross_entropy(hidden, weight, labels, chunk_bytes=chunk_bytes)
    losses.backward(torch.linspace(0.5, 1.5, len(losses)))
    return peak(cpu) - before - hidden.nbytes - weight.nbytes


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--vocabulary", type=int, default=131_072)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--chunk-bytes", type=int, default=CHUNK_BYTES["cpu"], help="largest chunk of logits")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes = {name: getattr(options, name) for name in ("tokens", "vocabulary", "width", "chunk_bytes")}
    peak_extra_bytes(**sizes | {"tokens": 8, "vocabulary": 8})  # loads the matrix library and its workspace
    found = sizes | {
        "chunk_tokens": chunk_tokens(options.vocabulary, torch.float32, options.chunk_bytes),
        "full_logits_bytes": options.tokens * options.vocabulary * 4,
        "peak_extra_bytes": peak_extra_bytes(**sizes),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
