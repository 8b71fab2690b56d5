from dataclasses import fields
from pathlib import Path

import pytest

from farspan.errors import ConfigError
from farspan.launch.slurm.site import Container, Site, load_site

EXAMPLE = Path(__file__).resolve().parents[3] / "configs/site/example.toml"


def test_without_a_file_the_defaults_hold() -> None:
    assert load_site(None) == Site()


def test_the_example_loads_and_shows_every_key() -> None:
    site = load_site(EXAMPLE)
    assert site.sbatch["exclusive"] is True
    text = EXAMPLE.read_text()
    for part in (*fields(Site), *fields(Container)):
        assert f"{part.name} = " in text or f"[{part.name}]" in text, part.name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("acount = 1", "acount=1 is not a known key; choose one of sbatch, "),
        ("[sbatch]\nnodes = 2", "sbatch.nodes in FILE is set by farspan launch slurm: "),
        ("[sbatch]\nqos = [1]", "sbatch.qos in FILE must be one line of text"),
        ("[sbatch]\nqos = false", "sbatch.qos in FILE must be one line of text"),
        ('[sbatch]\nqos = "a\\nb"', "sbatch.qos in FILE must be one line of text"),
        ("[environment]\nA-B = 1", "environment.A-B in FILE must be the name of a variable"),
        ("[environment]\nA = true", "environment.A in FILE must be the name of a variable"),
        ("cpus_per_rank = 0", "cpus_per_rank=0 must be at least 1."),
    ],
)
def test_invalid_values_are_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "site.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_site(path)
    assert str(refused.value).startswith(message.replace("FILE", str(path)))
