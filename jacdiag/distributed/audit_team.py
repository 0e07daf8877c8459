"""One rank among others: it takes jobs, gathers results and notices a rank that is gone.

No rank distributes the jobs. Every rank sorts the same jobs the same way, the most expensive first,
and takes the next number of one counter when it is free. Random starts belong to sub-layers and
norms, not to ranks, so that the result does not depend on which rank takes which job.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from jacdiag.distributed.failure import Explanation, Failure, explained
from jacdiag.distributed.fingerprint import Fingerprint
from jacdiag.distributed.liveness import Member
from jacdiag.distributed.store import Store
from jacdiag.errors import JacdiagError, MeasureError, RankError, Stopped, one_line
from jacdiag.records.base import Record

R = TypeVar("R", bound=Record)
T = TypeVar("T")

# All times are in seconds.
POLL = 0.02  # between two looks at the store
BEAT = 0.5  # between signs of life
# Without a sign of life for this long, a rank counts as dead. Code that holds the GIL may be silent
# for a while.
SILENCE = 60.0
JOIN = 300.0  # until all ranks have joined
PATIENCE = 10.0  # for the last messages of the others; torchrun kills 30 seconds after SIGTERM
BLAME = 3.0  # after SIGTERM, to find out which rank has died
OR_ALONE = "WORLD_SIZE=1 in front of the command, for an audit in this process alone"
_SAME = "the same files and versions on every node; a factory must build the same model every time"
_WHY = (
    "what it printed, or the system's log: was it killed for memory? then a smaller --batch or "
    "--seq, or fewer ranks"
)


@dataclass(frozen=True)
class _LastBeat:
    """The last sign of life of another rank, and when it was first seen here."""

    beat: str
    time: float  # of time.monotonic()


class Alone:
    """The only rank of a job. It has the methods of `Team`."""

    rank = 0
    size = 1
    first = True

    def device(self, requested: str | None) -> str | None:
        """Return the requested device."""
        return requested

    def part(self, items: Sequence[T]) -> Sequence[T]:
        """Return all items."""
        return items

    def jobs(self, costs: Sequence[float]) -> Iterator[tuple[int, Sequence[int]]]:
        """Yield the index of each job, and the jobs handed out since the last one.

        Args:
            costs: of all jobs.
        """
        for index in range(len(costs)):
            yield index, (index,)

    def agree(self, make: Callable[[], Fingerprint]) -> None:
        """Do nothing: there is no other rank, and `make` is not called."""

    def gather(self, record: R) -> list[R]:
        """Return the record of the only rank."""
        return [record]

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """Run the block; an exception in it is raised to the caller."""
        yield


class Team:
    """One rank of several. See `join.py`.

    Args:
        store: shared by all ranks.
        rank, size: of this process.
        alarm: called from a separate thread when another rank has failed. It gets the failure and
            an event that is set once this rank has noticed. Without an alarm, the failure is
            noticed between two jobs.
        silence: seconds without a sign of life after which a rank counts as dead.
        patience: seconds to wait for all ranks to join.

    Raises:
        RankError: not all ranks have joined in time, or one of them has failed.
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
        self.store = store
        self.rank = rank
        self.size = size
        self.alarm = alarm
        self.silence = silence
        self.me = Member.me(rank, size)
        self.members: list[Member] = []
        self.failure: Failure | None = None

        # Steps that all ranks take have numbered keys; an attempt has its own prefix.
        self._step_numbers = itertools.count()
        self._attempt_prefix = ""

        # Announce this rank and give signs of life before the others are waited for.
        self._noticed = threading.Event()
        self._left = threading.Event()
        store.put(f"member/{rank}", self.me.to_dict())
        self._thread = threading.Thread(
            target=self._watch_others, name="jacdiag ranks", daemon=True
        )
        self._thread.start()
        try:
            self._wait_for_members(patience)
        except BaseException as error:
            reported = error
            if isinstance(error, Stopped):
                reported = RankError("a rank ended before it joined", got=self._list_missing())
            cause = self.fail(reported)
            self.close()
            raise cause from error

    def _list_missing(self) -> str:
        """Return which ranks have not joined, in words."""
        missing = [str(rank) for rank in range(self.size) if not self.store.has(f"member/{rank}")]
        return f"no sign of rank {', '.join(missing)}"

    def _wait_for_members(self, patience: float) -> None:
        """Wait until all ranks have joined.

        Raises:
            RankError: they have not within `patience` seconds, or one has failed.
        """
        deadline = time.monotonic() + patience
        members = []
        for rank in range(self.size):
            key = f"member/{rank}"
            while not self.store.has(key):
                self.check()
                if time.monotonic() > deadline:
                    what = f"waited {patience:.0f} s, and not all of {self.size} ranks have joined"
                    raise RankError(what, got=self._list_missing(), hint=OR_ALONE)
                time.sleep(POLL)
            members.append(Member.from_dict(self.store.get(key)))
        self.members = members

    @property
    def first(self) -> bool:
        """Whether this rank prints and writes for all."""
        return self.rank == 0

    @property
    def reports_failure(self) -> bool:
        """Whether this rank reports why the job ended: rank 0, or rank 1 if rank 0 died."""
        failure = self.failure
        rank_0_died = failure is not None and failure.kind == "died" and failure.rank == 0
        if rank_0_died:
            return self.rank == 1
        return self.rank == 0

    def device(self, requested: str | None) -> str | None:
        """Return the device of this rank: each rank of a machine has its own, by LOCAL_RANK.

        This is done if more than one accelerator is visible, and none or only its kind is named.

        Args:
            requested: the device that the user named, if any.
        """
        import torch

        from jacdiag.devices.accelerators import count_of, has_float64, present_kinds

        # 1. One process alone, or one that was given its device.
        local_rank = os.environ.get("LOCAL_RANK")
        if local_rank is None or (requested is not None and ":" in requested):
            return requested

        # 2. One of several of the kind, or of the first kind that would be taken by itself.
        kinds = present_kinds() if requested is None else [requested]
        for kind in kinds:
            own = f"{kind}:{local_rank}"
            is_named = requested is not None
            if count_of(kind) >= 2 and (is_named or has_float64(torch.device(own))):
                return own
        return requested

    # -- work --------------------------------------------------------------------------------------
    def part(self, items: Sequence[T]) -> Sequence[T]:
        """Return this rank's stretch of a list, for jobs of equal cost."""
        start = self.rank * len(items) // self.size
        end = (self.rank + 1) * len(items) // self.size
        return items[start:end]

    def jobs(self, costs: Sequence[float]) -> Iterator[tuple[int, Sequence[int]]]:
        """Yield the index of each job that this rank takes, the most expensive first.

        With it come the jobs that others were given since the last one.

        Args:
            costs: of all jobs, the same on every rank.
        """
        order = sorted(range(len(costs)), key=lambda index: (-costs[index], index))
        key = self._next_key("jobs")
        handed_out = 0
        while True:
            place = self.store.next(key)
            if place >= len(order):
                return
            yield order[place], order[handed_out : place + 1]
            handed_out = place + 1
            self.check()

    def agree(self, make: Callable[[], Fingerprint]) -> None:
        """Compare what the ranks are about to measure with what rank 0 measures.

        Args:
            make: takes the fingerprint of this rank.

        Raises:
            RankError: a rank differs; the message names it, and the first difference.
            MeasureError: the same in an attempt, which does not end the job.
        """
        key = self._next_key("agreed")
        fingerprints = self._collect(key, make())

        # Only rank 0 has more than its own fingerprint, so it alone compares.
        for member, other in zip(self.members[1:], fingerprints[1:], strict=False):
            difference = other.difference(fingerprints[0])
            if difference is None:
                continue
            what, name, got = difference
            what = f"{member.name} has {what} than {self.me.name}: '{name}'"
            if self._attempt_prefix:
                raise MeasureError(what, got=got, hint=_SAME)
            self._publish(Failure(member.rank, "error", what, got, _SAME))
            self.check()

        if self.first:
            self.store.put(key, True)
        self._wait_for(key)

    def gather(self, record: R) -> list[R]:
        """Return the records of all ranks, in the order of ranks, on every rank.

        Args:
            record: of this rank.
        """
        key = self._next_key("found")
        records = self._collect(key, record)
        if self.first:
            self.store.put(key, [item.to_dict() for item in records])
            return records
        return [type(record).from_dict(data) for data in self._wait_for(key)]

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """Run work that may fail without ending the job.

        What one rank raises in it, all ranks raise at its end.

        Raises:
            MeasureError: another rank could not do it; one that has died or was interrupted still
                ends the job.
        """
        # 1. Steps inside the attempt are numbered from 0 again, under a prefix of their own.
        outer_numbers = self._step_numbers
        self._attempt_prefix = self._next_key("attempt") + "/"
        self._step_numbers = itertools.count()
        try:
            # 2. Wait for all ranks: after this none can fail in the attempt.
            yield
            self.store.put(f"{self._attempt_prefix}done/{self.rank}", True)
            for rank in range(self.size):
                self._wait_for(f"{self._attempt_prefix}done/{rank}")
        except Exception as error:
            # 3. Say why, unless the entire job has ended; the others read it in `check`.
            if self.failure is None:
                reason = error.what if isinstance(error, JacdiagError) else one_line(error)
                self.store.put_first(f"{self._attempt_prefix}failed", f"{self.me.name}: {reason}")
            raise
        finally:
            self._step_numbers = outer_numbers
            self._attempt_prefix = ""

    def _collect(self, key: str, record: R) -> list[R]:
        """Send a record to rank 0, which returns all of them; other ranks return their own."""
        if not self.first:
            self.store.put(f"{key}/of/{self.rank}", record.to_dict())
            return [record]
        records = [record]
        for rank in range(1, self.size):
            data = self._wait_for(f"{key}/of/{rank}")
            records.append(type(record).from_dict(data))
        return records

    def _next_key(self, name: str) -> str:
        """Return the key of the next step: the same on every rank, as all take the same steps."""
        return f"{self._attempt_prefix}{name}/{next(self._step_numbers)}"

    def _wait_for(self, key: str) -> Any:
        """Return the value of a key once it is there; raise if the job ends meanwhile."""
        while not self.store.has(key):
            self.check()
            time.sleep(POLL)
        return self.store.get(key)

    # -- life --------------------------------------------------------------------------------------
    def check(self) -> None:
        """Raise what has ended the job, or the attempt that this rank is in, if anything has.

        Raises:
            RankError: another rank has failed.
            MeasureError: another rank could not do what is attempted.
        """
        if self.failure is not None:
            raise self.failure.error()
        if not self._attempt_prefix:
            return
        key = f"{self._attempt_prefix}failed"
        if self.store.has(key):
            raise MeasureError(self.store.get(key))

    def _watch_others(self) -> None:
        """Give signs of life and look for those of the others, until one of them has failed.

        Runs in its own thread.
        """
        # 1. Look until a rank has failed, or this one leaves.
        last_beat = _LastBeat("", time.monotonic())
        for beat in itertools.count(1):
            if self.failure is not None or self._left.is_set():
                break
            last_beat = self._look_once(beat, last_beat)
            if self.failure is None:
                self._left.wait(BEAT)

        # 2. A rank that has left needs no alarm.
        if self.failure is None or self._left.is_set():
            return
        if self.alarm is not None:
            self.alarm(self.failure, self._noticed)

    def _look_once(self, beat: int, last_beat: _LastBeat) -> _LastBeat:
        """Give one sign of life, and note a failure if there is one.

        Args:
            beat: the number of this sign of life.
            last_beat: of the next rank.

        Returns:
            The last sign of life of the next rank.
        """
        try:
            self.store.raw.set(f"beat/{self.rank}", str(beat))
            if self.store.has("failure"):
                self.failure = Failure.from_dict(self.store.get("failure"))
            elif self.members:
                return self._find_dead(last_beat)
        except Exception:
            # The store may end before this rank, once it has left.
            if not self._left.is_set():
                self.failure = self._failure_of_store()
        return last_beat

    def _find_dead(self, last_beat: _LastBeat) -> _LastBeat:
        """Publish a failure if a process of this machine is gone or the next rank is silent.

        Args:
            last_beat: of the next rank.

        Returns:
            The same, or a newer one.
        """
        # 1. Processes of this machine can be seen.
        gone = [member for member in self.members if member.rank != self.rank and member.is_gone()]

        # 2. The next rank may be on any machine: its signs of life are in the store.
        following = self.members[(self.rank + 1) % self.size]
        beat = self._read_beat(following.rank)
        if beat != last_beat.beat:
            last_beat = _LastBeat(beat, time.monotonic())
        is_silent = time.monotonic() - last_beat.time > self.silence

        # 3. Report the first of them.
        if gone:
            self._report_dead(gone[0], f"process {gone[0].pid} is gone")
        elif is_silent:
            self._report_dead(following, f"no sign of life for {self.silence:.0f} s")
        return last_beat

    def _read_beat(self, rank: int) -> str:
        """Return the last sign of life of a rank; "" before its first one."""
        key = f"beat/{rank}"
        if not self.store.has(key):
            return ""
        return self.store.raw.get(key).decode()

    def _report_dead(self, member: Member, got: str) -> None:
        """Publish that a rank has died, unless the job has ended.

        A rank leaves only after the end is in the store, so the end is read last.
        """
        if self.store.has("end"):
            return
        self._publish(Failure(member.rank, "died", f"{member.name} died", got, _WHY))

    def _failure_of_store(self) -> Failure:
        """Return the failure of a store that no longer answers: its process has ended."""
        name = self.members[0].name if self.members else f"rank 0 of {self.size}"
        return Failure(
            0,
            "died",
            f"{name} died, or the torchrun of its host",
            "the store of the job no longer answers",
        )

    def _publish(self, failure: Failure) -> None:
        """Publish a failure, or take over the one that was published first: all report that one."""
        try:
            # 1. This rank is the first.
            if self.store.put_first("failure", failure.to_dict()):
                self.failure = failure
                return

            # 2. Another one was. `put_first` takes the key before the data are there.
            self._wait_until(lambda: self.store.has("failure"))
            self.failure = Failure.from_dict(self.store.get("failure"))
        except Exception:
            # 3. The store does not answer. Unless it lives here, its process has ended.
            if self.store.serves:
                self.failure = failure
                return
            gone = self._failure_of_store()
            here = failure.got or failure.what
            self.failure = replace(gone, got=f"{gone.got}; {self.me.name} met: {here}")

    # -- the end -----------------------------------------------------------------------------------
    def fail(
        self,
        error: BaseException,
        explain: Callable[[BaseException], Explanation | None] = explained,
    ) -> BaseException:
        """Publish that this rank has failed, and return the exception to report.

        A rank that fails because another one has publishes nothing.

        Args:
            error: what was raised here.
            explain: see `Failure.of`.
        """
        self._noticed.set()
        if isinstance(error, Stopped):
            # torchrun stops all ranks when one is gone; find out which one that was.
            self._wait_until(lambda: self.failure is not None, BLAME)
        if self.failure is None:
            self._publish(Failure.of(error, self.rank, self.me.name, explain))
        assert self.failure is not None
        return self.failure.error()

    def finish(self) -> None:
        """Leave the job with all others, once rank 0 has written everything."""
        if self.first:
            self.store.put("end", True)
        self._wait_for("end")
        self._noticed.set()
        self.close()

    def close(self) -> None:
        """Leave the job.

        A rank that reports nothing waits for the one that does. If the store lives here, this rank
        leaves last.
        """
        # The store may be gone with the rank that served it.
        with contextlib.suppress(Exception):
            # 1. The failure is reported once.
            if self.failure is not None:
                if self.reports_failure:
                    self.store.put("reported", True)
                else:
                    self._wait_until(lambda: self.store.has("reported"))

            # 2. The store must outlive the other ranks.
            self.store.put(f"bye/{self.rank}", True)
            if self.store.serves:
                self._wait_until(self._others_have_left)

        # 3. End the thread.
        self._left.set()
        self._thread.join(BEAT + 1)

    def _others_have_left(self) -> bool:
        """Return whether every rank has left the job or has ended."""
        for member in self.members:
            if member.is_gone():
                continue
            if not self.store.has(f"bye/{member.rank}"):
                return False
        return True

    def _wait_until(self, is_done: Callable[[], bool], seconds: float = PATIENCE) -> None:
        """Wait until a condition holds, for a limited time."""
        deadline = time.monotonic() + seconds
        while not is_done() and time.monotonic() < deadline:
            time.sleep(POLL)
