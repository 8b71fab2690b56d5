import math
import sys
from pathlib import Path

import pytest

from farspan.errors import ConfigError
from farspan.registry import Registry


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / "some_parts"
    folder.mkdir()
    (folder / "one.py").write_text("import registry_under_test as r\nr.PARTS.add('first', 1)\n")
    (tmp_path / "registry_under_test.py").write_text(
        "from farspan.registry import Registry\nPARTS = Registry('part', 'some_parts')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.startswith(("some_parts", "registry_under_test"))]:
        monkeypatch.delitem(sys.modules, name)
    return "some_parts"


def parts() -> "Registry[int]":
    import registry_under_test  # pyright: ignore[reportMissingImports]

    return registry_under_test.PARTS


def test_one_more_file_is_one_more_part(package: str, tmp_path: Path) -> None:
    assert list(parts()) == ["first"]
    (tmp_path / package / "two.py").write_text("import registry_under_test as r\nr.PARTS.add('another', 2)\n")
    assert parts().load() == {"another": 2, "first": 1}
    assert parts().get("another") == 2


def add_entry_point(folder: Path, value: str, name: str = "theirs") -> None:
    """Install a package that has an entry point."""
    info = folder / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[some_parts]\n{name} = {value}\n")


def test_installed_packages_add_parts(package: str, tmp_path: Path) -> None:
    add_entry_point(tmp_path, "math:pi")
    assert parts().load() == {"first": 1, "theirs": math.pi}
    assert parts().load() == {"first": 1, "theirs": math.pi}
    assert parts().get("theirs") == math.pi


def test_a_package_that_cannot_be_imported_is_named(package: str, tmp_path: Path) -> None:
    add_entry_point(tmp_path, "no_module_of_theirs:x")
    with pytest.raises(ConfigError, match="part 'theirs' of an installed package, no_module_of_theirs:x, cannot be"):
        parts().get("other")


def test_a_package_takes_no_name_that_exists(package: str, tmp_path: Path) -> None:
    add_entry_point(tmp_path, "math:pi", name="first")
    with pytest.raises(ConfigError, match="part 'first' is registered twice, once by an installed package as math:pi"):
        parts().load()


def test_a_wrong_name_is_answered_with_the_right_ones(package: str) -> None:
    with pytest.raises(ConfigError, match=r"part 'frist' does not exist; choose one of first\. Did you mean 'first'\?"):
        parts().get("frist")


def test_a_name_is_taken_once(package: str) -> None:
    parts().load()
    with pytest.raises(ValueError, match="part 'first' is registered twice"):
        parts().add("first", 3)
