import pytest

from farspan.launch.torchrun import _report


@pytest.mark.parametrize(
    ("status", "passed_on", "said"),
    [
        (1, 1, "farspan: rank 3 failed with exit status 1; the same command resumes from the last checkpoint.\n"),
        (-11, 139, "farspan: rank 3 was killed by SIGSEGV; the same command resumes from the last checkpoint.\n"),
        (2, 2, ""),
    ],
)
def test_a_failure_is_one_sentence(capsys: pytest.CaptureFixture[str], status: int, passed_on: int, said: str) -> None:
    assert _report(3, status) == passed_on
    assert capsys.readouterr() == ("", said)
