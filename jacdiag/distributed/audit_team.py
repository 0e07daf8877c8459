"""One rank among others: it takes jobs, gathers results and notices a rank that is gone.

Rank 0 keeps no plan and hands out nothing: every rank sorts the same jobs the same way, dearest
first, and takes the next number of one counter when it is free. Random starts belong to sub-layers
and norms, not to ranks, so that it does not matter who takes what.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from jacdiag.distributed.failure import Failure, Told, explained
from jacdiag.distributed.fingerprint import Fingerprint
from jacdiag.distributed.liveness import Member
from jacdiag.distributed.store import Store
from jacdiag.errors import JacdiagError, MeasureError, RankError, Stopped, one_line
from jacdiag.records.base import Record

R = TypeVar("R", bound=Record)
T = TypeVar("T")

POLL = 0.02
BEAT = 0.5  # seconds between signs of life
# without one, a rank counts as dead; code that holds the GIL may be silent for a while
SILENCE = 60.0
JOIN = 300.0
PATIENCE = 10.0  # for the others' last words; torchrun kills 30 seconds after SIGTERM
BLAME = 3.0  # after SIGTERM, to find out who has died
OR_ALONE = "WORLD_SIZE=1 in front of the command, for an audit in this process alone"
_SAME = "the same files and versions on every node; a factory must build the same model every time"
_WHY = (
    "what it printed, or the system's log: was it killed for memory? then a smaller --batch or "
    "--seq, or fewer ranks"
)


class Alone:
    """The only rank: every job is its own."""

    rank, size, first = 0, 1, True

    def device(self, wanted: str | None) -> str | None:
        return wanted

    def part(self, items: Sequence[T]) -> Sequence[T]:
        return items

    def jobs(self, costs: Sequence[float]) -> Iterator[tuple[int, Sequence[int]]]:
        """Yields the index of each job to do, and of those handed out since the one before."""
        yield from ((k, (k,)) for k in range(len(costs)))

    def agree(self, make: Callable[[], Fingerprint]) -> None:
        """There is nobody to disagree with; `make` is not called."""

    def gather(self, mine: R) -> list[R]:
        return [mine]

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """What is raised inside is raised to who tried."""
        yield


class Team:
    """One rank of several. See `join.py`.

    Args:
        store: shared by all.
        rank, size: of this process.
        alarm: called from a thread of its own when another rank has failed, with the failure and an
            event that is set once this rank has noticed; without it, the failure is noticed between
            two jobs.
        silence: seconds without a sign of life after which a rank counts as dead.
        patience: seconds to wait for all to join.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        *,
        alarm: Callable[[Failure, threading.Event], None] | None = None,
        silence: float = SILENCE,
        patience: float = JOIN,
    ) -> None:
        self.store, self.rank, self.size, self.alarm, self.silence = (
            store,
            rank,
            size,
            alarm,
            silence,
        )
        self.me = Member.me(rank, size)
        self.members: list[Member] = []
        self.failure: Failure | None = None
        self._turns, self._attempt = itertools.count(), ""
        self._noticed, self._left = threading.Event(), threading.Event()
        store.put(f"member/{rank}", self.me.to_dict())
        self._thread = threading.Thread(target=self._watch, name="jacdiag ranks", daemon=True)
        self._thread.start()
        try:
            self._meet(patience)
        except BaseException as error:
            ended = RankError("a rank ended before it joined", got=self._missing())
            real = self.fail(ended if isinstance(error, Stopped) else error)
            self.close()
            raise real from error

    def _missing(self) -> str:
        return (
            "no sign of rank "
            f"{', '.join(str(r) for r in range(self.size) if not self.store.has(f'member/{r}'))}"
        )

    def _meet(self, patience: float) -> None:
        until, members = time.monotonic() + patience, []
        for rank in range(self.size):
            while not self.store.has(key := f"member/{rank}"):
                self.check()
                if time.monotonic() > until:
                    what = f"waited {patience:.0f} s, and not all of {self.size} ranks have joined"
                    raise RankError(what, got=self._missing(), hint=OR_ALONE)
                time.sleep(POLL)
            members.append(Member.from_dict(self.store.get(key)))
        self.members = members

    @property
    def first(self) -> bool:
        """Whether this rank prints and writes for all."""
        return self.rank == 0

    @property
    def speaks(self) -> bool:
        """Whether this rank reports why the job ended: rank 0, or the next one if that died."""
        dead = (
            self.failure.rank if self.failure is not None and self.failure.kind == "died" else None
        )
        return self.rank == (1 if dead == 0 else 0)

    def device(self, wanted: str | None) -> str | None:
        """Give each rank of a machine its own GPU, by LOCAL_RANK.

        This is done if no device is named and more than one is seen.
        """
        import torch

        local = os.environ.get("LOCAL_RANK")
        if wanted not in (None, "cuda") or local is None or torch.cuda.device_count() < 2:
            return wanted
        return f"cuda:{local}"

    # -- work --------------------------------------------------------------------------------------
    def part(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's stretch of a list, for work of equal pieces."""
        return items[
            self.rank * len(items) // self.size : (self.rank + 1) * len(items) // self.size
        ]

    def jobs(self, costs: Sequence[float]) -> Iterator[tuple[int, Sequence[int]]]:
        """Yield the index of each job that this rank takes, the most expensive first.

        With it come the jobs that others were given since the last one.

        Args:
            costs: of all jobs, the same on every rank.
        """
        order = sorted(range(len(costs)), key=lambda k: (-costs[k], k))
        seen, key = 0, self._key("jobs")
        while (place := self.store.next(key)) < len(order):
            yield order[place], order[seen : place + 1]
            seen = place + 1
            self.check()

    def agree(self, make: Callable[[], Fingerprint]) -> None:
        """Compares what the ranks are about to measure with rank 0's.

        Raises:
            RankError: a rank has something else; the message names it, and the first difference.
        """
        key = self._key("agreed")
        prints = self._collect(key, make())
        for member, other in zip(self.members[1:], prints[1:], strict=False):
            differs = other.difference(prints[0])
            if differs is not None:
                what, name, got = differs
                what = f"{member.name} has {what} than {self.me.name}: '{name}'"
                if self._attempt:
                    raise MeasureError(what, got=got, hint=_SAME)
                self._publish(Failure(member.rank, "error", what, got, _SAME))
                self.check()
        if self.first:
            self.store.put(key, True)
        self._wait(key)

    def gather(self, mine: R) -> list[R]:
        """Returns what every rank has found, in the order of ranks, to every rank."""
        key = self._key("found")
        found = self._collect(key, mine)
        if self.first:
            self.store.put(key, [one.to_dict() for one in found])
            return found
        return [type(mine).from_dict(data) for data in self._wait(key)]

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """Run work that may fail without ending the job.

        What one rank raises in it, all ranks raise at its end.

        Raises:
            MeasureError: another rank could not do it; one that has died or was interrupted still
                ends the job.
        """
        outer, self._attempt, self._turns = (
            self._turns,
            self._key("attempt") + "/",
            itertools.count(),
        )
        try:
            yield
            self.store.put(f"{self._attempt}done/{self.rank}", True)
            for rank in range(self.size):  # later than this nobody can fail
                self._wait(f"{self._attempt}done/{rank}")
        except Exception as error:
            if self.failure is None:
                told = error.what if isinstance(error, JacdiagError) else one_line(error)
                self.store.put_first(f"{self._attempt}failed", f"{self.me.name}: {told}")
            raise
        finally:
            self._turns, self._attempt = outer, ""

    def _collect(self, key: str, mine: R) -> list[R]:
        """To rank 0, which returns all; the others return their own."""
        if self.first:
            others = [self._wait(f"{key}/of/{rank}") for rank in range(1, self.size)]
            return [mine, *(type(mine).from_dict(data) for data in others)]
        self.store.put(f"{key}/of/{self.rank}", mine.to_dict())
        return [mine]

    def _key(self, name: str) -> str:
        """A key of its own for every step, the same on every rank: all take the same steps."""
        return f"{self._attempt}{name}/{next(self._turns)}"

    def _wait(self, key: str) -> Any:
        while not self.store.has(key):
            self.check()
            time.sleep(POLL)
        return self.store.get(key)

    # -- life --------------------------------------------------------------------------------------
    def check(self) -> None:
        """Raises what has ended the job, or the attempt that this rank is in, if anything has."""
        if self.failure is not None:
            raise self.failure.error()
        if self._attempt and self.store.has(key := f"{self._attempt}failed"):
            raise MeasureError(self.store.get(key))

    def _watch(self) -> None:
        """Gives a sign of life, and looks for the others' until one has failed."""
        beats, heard = 0, ("", time.monotonic())
        while self.failure is None and not self._left.is_set():
            beats += 1
            try:
                self.store.raw.set(f"beat/{self.rank}", str(beats))
                if self.store.has("failure"):
                    self.failure = Failure.from_dict(self.store.get("failure"))
                elif self.members:
                    heard = self._look(heard)
            except Exception:
                if not self._left.is_set():
                    self.failure = self._store_lost()
            self._left.wait(0 if self.failure else BEAT)
        if self.failure is not None and self.alarm is not None and not self._left.is_set():
            self.alarm(self.failure, self._noticed)

    def _look(self, heard: tuple[str, float]) -> tuple[str, float]:
        """One look at every process of this machine, and at the next rank wherever it is."""
        dead = [
            (m, f"process {m.pid} is gone")
            for m in self.members
            if m.rank != self.rank and m.is_gone()
        ]
        following = self.members[(self.rank + 1) % self.size]
        key = f"beat/{following.rank}"
        beat = self.store.raw.get(key).decode() if self.store.has(key) else ""
        if beat != heard[0]:
            heard = (beat, time.monotonic())
        elif time.monotonic() - heard[1] > self.silence:
            dead.append((following, f"no sign of life for {self.silence:.0f} s"))
        # asked last: a rank leaves only when the end is there
        if dead and not self.store.has("end"):
            member, got = dead[0]
            self._publish(Failure(member.rank, "died", f"{member.name} died", got, _WHY))
        return heard

    def _store_lost(self) -> Failure:
        who = self.members[0].name if self.members else f"rank 0 of {self.size}"
        return Failure(
            0,
            "died",
            f"{who} died, or the torchrun of its host",
            "the store of the job no longer answers",
        )

    def _publish(self, failure: Failure) -> None:
        """The first failure is the one that all report."""
        try:
            if self.store.put_first("failure", failure.to_dict()):
                self.failure = failure
                return
            until = time.monotonic() + PATIENCE
            while not self.store.has("failure") and time.monotonic() < until:
                time.sleep(POLL)
            self.failure = Failure.from_dict(self.store.get("failure"))
        except Exception:
            self.failure = failure

    # -- the end -----------------------------------------------------------------------------------
    def fail(
        self, error: BaseException, explain: Callable[[BaseException], Told | None] = explained
    ) -> BaseException:
        """Tell the others that this rank has failed, and return what to report.

        A rank that only follows another one tells nothing.

        Args:
            error: what was raised here.
            explain: see `Failure.of`.
        """
        self._noticed.set()
        if isinstance(error, Stopped):  # torchrun stops all when one is gone: who was that?
            self._pause(lambda: self.failure is not None, BLAME)
        if self.failure is None:
            self._publish(Failure.of(error, self.rank, self.me.name, explain))
        assert self.failure is not None
        return self.failure.error()

    def finish(self) -> None:
        """Leaves together: rank 0 has written everything, nobody goes before that."""
        if self.first:
            self.store.put("end", True)
        self._wait("end")
        self._noticed.set()
        self.close()

    def close(self) -> None:
        """Leave the job.

        A rank that reports nothing waits for the one that does. If the store lives here, this rank
        leaves last.
        """
        with contextlib.suppress(Exception):
            if self.failure is not None and self.speaks:
                self.store.put("told", True)
            elif self.failure is not None:
                self._pause(lambda: self.store.has("told"))
            self.store.put(f"bye/{self.rank}", True)
            if self.store.serves:
                self._pause(
                    lambda: all(
                        m.is_gone() or self.store.has(f"bye/{m.rank}") for m in self.members
                    )
                )
        self._left.set()
        self._thread.join(BEAT + 1)

    def _pause(self, until: Callable[[], bool], seconds: float = PATIENCE) -> None:
        limit = time.monotonic() + seconds
        while not until() and time.monotonic() < limit:
            time.sleep(POLL)
