"""farspan: train language models on long context, any attention under any context parallelism."""

from pathlib import Path

__version__ = "0.1.0"

if not (Path(__file__).parent / "kernels").is_dir():
    raise ImportError(
        "farspan/kernels is not a folder: the links inside farspan/ were lost when the repository was copied; "
        "clone it with git, or copy it with 'cp -a', 'rsync -a' or 'tar'."
    )
