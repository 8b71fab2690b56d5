import sys
from pathlib import Path

import pytest

from farspan.launch.slurm.job import SlurmJob


@pytest.fixture
def job(tmp_path: Path) -> SlurmJob:
    """A run of four ranks, not yet submitted."""
    return SlurmJob(
        run=tmp_path / "run",
        submitted=tmp_path / "run/submitted/001",
        workdir=tmp_path,
        python=Path(sys.executable),
        nodes=2,
        ranks_per_node=2,
        gpus=False,
    )
