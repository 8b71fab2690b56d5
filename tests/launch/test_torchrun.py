import pytest

from farspan.launch.torchrun import _report


@pytest.mark.parametrize(
    ("status", "passed_on", "how"),
    [
        (1, 1, "failed with exit status 1"),
        (-11, 139, "was killed by SIGSEGV"),
        (137, 137, "was killed by SIGKILL (the system does that when memory runs out)"),
        (2, 2, None),
        (75, 75, None),
    ],
)
def test_a_failure_is_one_sentence(
    capsys: pytest.CaptureFixture[str], status: int, passed_on: int, how: str | None
) -> None:
    assert _report(3, status) == passed_on
    cure = "the same command resumes from the last checkpoint, if there is one."
    assert capsys.readouterr() == ("", "" if how is None else f"farspan: rank 3 {how}; {cure}\n")
