"""SIGKILL of a rank at any moment of a save: finished checkpoints are complete, and the next start resumes, bitwise."""

import random
from collections import Counter
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from pprint import pprint

import pytest

from farspan.trainer.checkpoint.steps import finished, step_of
from farspan.trainer.checkpoint.verify import check_complete
from farspan.trainer.config import Config
from tests.support.checkpoint_kills import SAVES, Death, events, resume_and_save, undisturbed
from tests.support.rank_pool import RankError, RankPool
from tests.trainer.checkpoint.conftest import small

IN_ALL = 200


def deaths(moments: list[list[str]], number: int | None) -> Iterator[Death]:
    """Yield `number` deaths, or each kind of call on each rank once, at any of its occurrences."""
    chance = random.Random(0)
    kinds = [(rank, name, times) for rank, names in enumerate(moments) for name, times in Counter(names).items()]
    chance.shuffle(kinds)
    for rank, name, times in islice(cycle(kinds), len(kinds) if number is None else number):
        yield Death(rank=rank, moment=name, times=1 + chance.randrange(times))


def die(config: Config, expected: list[list[str]], death: Death) -> str:
    """Run two ranks until one dies; check logs and checkpoints, and return where it died."""
    folder = config.run.folder / "checkpoints"
    newest = max((step_of(path) for path in finished(folder)), default=0)
    logged = [len(events(config.run.folder, rank)) for rank in range(2)]
    pool = RankPool(2)
    # Either the killed rank or the one that waits for it fails first.
    with pytest.raises(RankError):
        pool.run(resume_and_save, config, expected, death, grace_s=0)
    logs = [events(config.run.folder, rank)[logged[rank] :] for rank in range(2)]
    for log in logs:
        assert log[0] == {"loaded": newest, "same": True}
        assert all(line["same"] for line in log if "same" in line), log
    saved = [line["saved"] for line in logs[0] if "saved" in line]
    for path in finished(folder):
        check_complete(path)
    now = max((step_of(path) for path in finished(folder)), default=0)
    assert now >= max(saved, default=newest), "a save that had ended is not there"
    assert logs[death.rank][-1] == {"died": death.moment}
    return f"rank {death.rank}: {death.moment}"


def kill(config: Config, number: int | None) -> Counter[str]:
    config.run.folder.mkdir()
    for rank in range(2):
        (config.run.folder / f"log_{rank}.jsonl").touch()
    pool = RankPool(2)
    expected = pool.run(undisturbed, config, 2 * SAVES)
    pool.run(resume_and_save, config, expected, None)
    pool.stop()
    pool = RankPool(2)
    moments = pool.run(resume_and_save, config, expected, None)
    planned = list(deaths(moments, number))
    expected = pool.run(undisturbed, config, SAVES * (len(planned) + 3))
    pool.stop()
    where = Counter(die(config, expected, death) for death in planned)
    last = RankPool(2)
    last.run(resume_and_save, config, expected, None)
    last.stop()
    assert all(line["same"] for rank in range(2) for line in events(config.run.folder, rank) if "same" in line)
    return where


def test_a_rank_killed_while_saving_loses_nothing(tmp_path: Path) -> None:
    where = kill(small(tmp_path), None)
    pprint(where)
    assert set(where.values()) == {1}
    for moment in ("0: write __0_0.distcp", "1: write __0_0.distcp", "0: open manifest.json", "0: fsync manifest.json"):
        assert where[f"rank {moment}"] == 1
    assert where["rank 0: rename partial folder"] == 1
    assert where["rank 0: remove manifest.json"] == 1


@pytest.mark.faults
def test_200_ranks_killed_while_saving_lose_nothing(tmp_path: Path) -> None:
    where = kill(small(tmp_path), IN_ALL)
    assert where.total() == IN_ALL
    pprint(where)
