"""A team within one process: threads as ranks over torch's own in-memory store."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist

from jacdiag.distributed import Alone, Share, Team, enlisted, fingerprint, join, merged
from jacdiag.distributed.store import Store
from jacdiag.errors import MeasureError, RankError, Stopped, UsageError
from jacdiag.measure.network import GradientProfile
from jacdiag.records import Interval, SublayerRecord


def together(size: int, work: Callable[[Team], Any], **options: Any) -> list[Any]:
    """Runs `work` on every rank at once; what it raised stands in the place of what it returned."""
    raw, found = dist.HashStore(), [None] * size

    def rank(k: int) -> None:
        try:
            team = Team(Store(raw), k, size, **options)
            found[k] = work(team)
            team.finish()
        except BaseException as error:
            found[k] = error

    threads = [threading.Thread(target=rank, args=(k,), daemon=True) for k in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
    return found


@contextmanager
def job(team: Team) -> Iterator[None]:
    """Ends as an audit does where something is raised inside."""
    try:
        yield
    except BaseException as error:
        real = team.fail(error)
        team.close()
        raise real from error


def test_every_job_runs_once_most_expensive_first() -> None:
    costs = [1.0, 5.0, 3.0, math.inf, 3.0, 0.0, 2.0]

    def work(team: Team) -> tuple[list[int], list[int]]:
        mine, heard = [], []
        for k, handed_out in team.jobs(costs):
            mine.append(k)
            heard += handed_out
            time.sleep(0.01)
        return mine, heard

    for size in (1, 2, 3, 9):
        found = together(size, work)
        assert sorted(k for mine, _ in found for k in mine) == list(range(7))
        for mine, heard in found:
            assert [costs[k] for k in mine] == sorted((costs[k] for k in mine), reverse=True)
            assert heard == [3, 1, 2, 4, 6, 0, 5][: len(heard)] and (
                not mine or heard[-1] == mine[-1]
            )


def test_alone_is_a_team_of_one() -> None:
    alone, share = Alone(), Share(products=3)
    assert list(alone.jobs([1.0, 2.0])) == [(0, (0,)), (1, (1,))]
    assert alone.part([1, 2]) == [1, 2] and alone.gather(share) == [share]


@pytest.mark.parametrize(("size", "n"), [(1, 5), (2, 5), (3, 2), (4, 24)])
def test_parts_are_the_whole(size: int, n: int) -> None:
    parts = together(size, lambda team: list(team.part(range(n))))
    assert [k for part in parts for k in part] == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def record(index: int) -> SublayerRecord:
    norm = Interval(1.5 + index, 1.4, math.inf, 0.999, False, 8, [1.5, math.nan])
    return SublayerRecord(f"h.{index}", index, 0, "mlp", "pre", branch_norm=norm)


def test_what_is_gathered_is_what_was_found() -> None:
    """Not finite numbers too; every rank gets everything, and a second gathering is another."""
    profile = GradientProfile([0.1, 0.2], [1.0, 2.0], "loss", 3.0)

    def work(team: Team) -> list[Share]:
        mine = Share(
            [record(2 - team.rank)], 8, {f"h.{team.rank}": math.inf}, profile if team.rank else None
        )
        return [merged(team.gather(mine)), merged(team.gather(Share(products=team.rank)))]

    for first, second in together(3, work):
        assert [r.index for r in first.records] == [0, 1, 2] and first.products == 24
        assert (
            first.errors == dict.fromkeys(("h.0", "h.1", "h.2"), math.inf)
            and first.profile == profile
        )
        assert (
            first.records[1].branch_norm is not None
            and first.records[1].branch_norm.upper == math.inf
        )
        assert second.products == 3 and second.records == []


def test_large_data_travel_in_pieces() -> None:
    """The server refuses more than 8 MiB at once."""
    import random

    store = Store(dist.TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False))
    data = random.Random(0).randbytes(12 << 20).hex()
    store.put("large", data)
    assert store.get("large") == data


def test_error_on_one_rank_is_raised_on_all_with_its_rank() -> None:
    def work(team: Team) -> None:
        with job(team):
            if team.rank == 1:
                raise UsageError("no such file", got="x.pt", hint="another")
            team.gather(Share())

    for error in together(3, work):
        assert isinstance(error, RankError) and error.what.startswith("rank 1 of 3 (")
        assert "no such file" in error.what and (error.got, error.hint) == ("x.pt", "another")


@pytest.mark.parametrize("when", ["before any step", "among jobs", "after the last step"])
def test_an_attempt_fails_for_all_or_for_none(when: str) -> None:
    """One rank fails in it; all say so, and the next attempt and the job go on in step."""

    # by rank 1, a job of each attempt: the others leave it one
    taken = [threading.Event() for _ in range(3)]

    def trial(team: Team, fails: bool, by_one: threading.Event) -> int:
        if fails and when == "before any step":
            raise ZeroDivisionError("no room")
        for k, _ in team.jobs([1.0] * 4):
            if team.rank == 1:
                by_one.set()
            elif when == "among jobs":
                assert by_one.wait(60)
            if fails and when == "among jobs":
                raise ZeroDivisionError("no room")
            time.sleep(0.02 * k)
        found = sum(share.products for share in team.gather(Share(products=team.rank)))
        if fails and when == "after the last step":
            raise ZeroDivisionError("no room")
        return found

    def work(team: Team) -> tuple[list[Any], int]:
        told: list[Any] = []
        for fails, by_one in zip((True, False, True), taken, strict=True):
            try:
                with team.attempt():
                    found = trial(team, fails and team.rank == 1, by_one)
                told.append(found)
            except (ZeroDivisionError, MeasureError) as error:
                told.append(str(error))
        return told, sum(share.products for share in team.gather(Share(products=1)))

    for rank, (told, together_again) in enumerate(together(3, work)):
        failed = "no room" if rank == 1 else "rank 1 of 3 ("
        assert [str(text).startswith(failed) for text in told] == [True, False, True]
        assert told[1] == 3 and together_again == 3
        assert all("no room" in told[k] for k in (0, 2))


def test_a_rank_that_dies_in_an_attempt_ends_the_job() -> None:
    def work(team: Team) -> None:
        with job(team), team.attempt():
            if team.rank == 1:
                raise Stopped
            team.gather(Share())

    for error in together(2, work):
        assert isinstance(error, RankError) and error.what.startswith("rank 1 of 2 (")


def test_a_difference_in_an_attempt_is_no_end() -> None:
    def work(team: Team) -> list[str]:
        told = []
        for other in (True, False):
            values = torch.ones(3) * (2.0 if other and team.rank else 1.0)
            try:
                with team.attempt():
                    team.agree(lambda v=values: fingerprint(None, [("w", v)], (), {}, {}))  # type: ignore[misc]
                    told.append("")
            except MeasureError as error:
                told.append(str(error))
        return told

    for first, second in together(2, work):
        assert "rank 1 of 2" in first and "'w'" in first and second == ""


def test_a_silent_rank_is_named() -> None:
    """One that gives no sign of life although its process is there: another machine, or a stopped
    process.
    """
    raw, heard = dist.HashStore(), []

    def mute() -> None:
        team = Team(Store(raw), 1, 2)
        team._left.set()  # its heart stops

    def listen() -> None:
        team = Team(Store(raw), 0, 2, silence=1.0)
        begun = time.monotonic()
        try:
            team.gather(Share())
        except RankError as error:
            heard.extend([error.what, error.got, time.monotonic() - begun])
        team.close()

    threads = [threading.Thread(target=one, daemon=True) for one in (mute, listen)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert heard and heard[0].startswith("rank 1 of 2 (") and heard[0].endswith("died")
    assert heard[1] == "no sign of life for 1 s"


class EndingStore:
    """A store whose server may end, as rank 0 does when it is killed."""

    def __init__(self, raw: dist.Store) -> None:
        self.raw = raw
        self.has_ended = False

    def __getattr__(self, name: str) -> Any:
        if self.has_ended:
            raise dist.DistNetworkError("Connection was likely closed")
        return getattr(self.raw, name)


def test_work_that_meets_the_end_of_the_store_first_says_which_rank_died(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before the thread that looks for signs of life does."""
    monkeypatch.setattr("jacdiag.distributed.audit_team.BEAT", 5.0)
    both = threading.Barrier(2)

    def work(team: Team) -> str:
        store = team.store.raw
        both.wait(10)
        if team.rank == 0:
            time.sleep(0.5)
            raise LookupError("killed")  # it says no more: its store is gone
        store.has_ended = True
        with pytest.raises(RankError) as ended, job(team):
            next(team.jobs([1.0, 2.0]))
        assert team.reports_failure
        assert ended.value.got is not None
        assert "rank 1 of 2" in ended.value.got and "likely closed" in ended.value.got
        return str(ended.value)

    raw = dist.HashStore()
    results: list[Any] = [None, None]

    def rank(k: int) -> None:
        try:
            results[k] = work(Team(Store(EndingStore(raw)), k, 2))
        except BaseException as error:
            results[k] = error

    threads = [threading.Thread(target=rank, args=(k,), daemon=True) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert isinstance(results[0], LookupError)
    assert "rank 0 of 2" in results[1] and "died" in results[1]
    assert "no longer answers" in results[1]


def test_a_rank_that_never_comes() -> None:
    with pytest.raises(RankError, match=r"rank 0 of 3 .*not all of 3 ranks have joined") as caught:
        Team(Store(dist.HashStore()), 0, 3, patience=0.2)
    assert caught.value.got == "no sign of rank 1, 2"


def test_sharing_that_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match="ranks=True needs other ranks"), enlisted(True):
        pass
    monkeypatch.setenv("WORLD_SIZE", "1")
    with enlisted(True) as crew:
        assert isinstance(crew, Alone)
    monkeypatch.setenv("WORLD_SIZE", "8")
    with enlisted(False) as crew:  # not asked, not done
        assert isinstance(crew, Alone)


@pytest.mark.parametrize(
    "wrong", [{"RANK": "one"}, {"RANK": "2"}, {"MASTER_PORT": "x"}, {"WORLD_SIZE": "many"}]
)
def test_an_environment_without_sense_is_refused(
    monkeypatch: pytest.MonkeyPatch, wrong: dict[str, str]
) -> None:
    for name, text in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
        **wrong,
    }.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(UsageError, match="no rank of several"):
        join()


@pytest.mark.parametrize(
    ("wanted", "seen", "local", "picked"),
    [
        (None, 4, "2", "cuda:2"),
        ("cuda", 4, "3", "cuda:3"),
        ("cuda:1", 4, "3", "cuda:1"),
        ("cpu", 4, "3", "cpu"),
        (None, 0, "1", None),
        ("cuda", 1, "3", "cuda"),
    ],
)
def test_each_rank_its_own_gpu(
    monkeypatch: pytest.MonkeyPatch, wanted: str | None, seen: int, local: str, picked: str | None
) -> None:
    """A rank that is shown one GPU only (as by Slurm's --gpus-per-task) takes that one."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setenv("LOCAL_RANK", local)
    assert together(1, lambda team: team.device(wanted)) == [picked]
