"""SIGKILL of a rank at any moment of saving: what is finished is whole, and the next life goes on, to the bit."""

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from farspan.trainer.checkpoint.steps import finished, step_of
from farspan.trainer.checkpoint.verify import check_whole
from farspan.trainer.config import Config
from tests.ranks import RankError, RankPool
from tests.trainer.checkpoint.conftest import small
from tests.trainer.checkpoint.kills import SAVES, Death, events, live, undisturbed

IN_CI, IN_ALL = 24, 200


def deaths(moments: list[list[str]], number: int) -> Iterator[Death]:
    """Each kind of moment on each rank comes once, if `number` allows it; then any moment."""
    chance = random.Random(0)
    kinds = {(rank, name): i for rank, names in enumerate(moments) for i, name in enumerate(names)}
    first = [Death(rank=rank, moment=moment) for (rank, _), moment in kinds.items()]
    chance.shuffle(first)
    yield from first[:number]
    for _ in range(number - len(first)):
        rank = chance.randrange(len(moments))
        yield Death(rank=rank, moment=chance.randrange(len(moments[rank])))


def die(config: Config, expected: list[list[str]], death: Death) -> str:
    """Let two ranks live until one dies; return at what, once everything was as it must be."""
    folder = config.run.folder / "checkpoints"
    newest = max((step_of(path) for path in finished(folder)), default=0)
    heard = [len(events(config.run.folder, rank)) for rank in range(2)]
    pool = RankPool(2)
    # Which rank is heard first, the dead or the one that misses it, is chance.
    with pytest.raises(RankError):
        pool.run(live, config, expected, death, grace_s=0)
    logs = [events(config.run.folder, rank)[heard[rank] :] for rank in range(2)]
    for log in logs:
        assert log[0] == {"loaded": newest, "same": True}
        assert all(line["same"] for line in log if "same" in line), log
    saved = [line["saved"] for line in logs[0] if "saved" in line]
    for path in finished(folder):
        check_whole(path)
    now = max((step_of(path) for path in finished(folder)), default=0)
    assert now >= max(saved, default=newest), "a save that had ended is not there"
    (died,) = [line["died"] for line in logs[death.rank] if "died" in line]
    return f"rank {death.rank}: {died}"


def kill(config: Config, number: int) -> Counter[str]:
    config.run.folder.mkdir()
    for rank in range(2):
        (config.run.folder / f"log_{rank}.jsonl").touch()
    pool = RankPool(2)
    expected = pool.run(undisturbed, config, SAVES * (number + 2))
    moments = pool.run(live, config, expected, None)
    pool.stop()
    where = Counter(die(config, expected, death) for death in deaths(moments, number))
    last = RankPool(2)
    last.run(live, config, expected, None)
    last.stop()
    assert all(line["same"] for rank in range(2) for line in events(config.run.folder, rank) if "same" in line)
    return where


def test_a_rank_killed_while_saving_loses_nothing(tmp_path: Path) -> None:
    where = kill(small(tmp_path), IN_CI)
    assert where.total() == IN_CI


@pytest.mark.faults
def test_200_ranks_killed_while_saving_lose_nothing(tmp_path: Path) -> None:
    where = kill(small(tmp_path), IN_ALL)
    assert where.total() == IN_ALL
    for moment, times in sorted(where.items()):
        print(f"{times:5}  {moment}")
