"""Whether a run continues, is slow, has ended or is dead, in one sentence."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from jacdiag.records.heartbeat import Heartbeat
from jacdiag.records.run_log import RunLog

# A run is slow after this many usual step times without a step. An evaluation or a checkpoint may
# take as long, so the sentence says how long a step usually takes.
_SLOW_TIMES = 10
# And after this long at least. The file is written once a second, and shared disks show it later.
_SLOW_SECONDS = 10.0


class RunStatus(StrEnum):
    """What is known of a run."""

    RUNNING = "running"
    SLOW = "slow"
    GONE = "gone"
    UNKNOWN = "unknown"
    ENDED = "ended"
    BROKEN = "broken"


@dataclass(frozen=True)
class RunState:
    """The state of a run.

    Attributes:
        kind: the state.
        text: a sentence about it, without a full stop.
    """

    kind: RunStatus
    text: str

    @property
    def is_over(self) -> bool:
        """Whether no more lines are to be expected from this process."""
        return self.kind in (RunStatus.ENDED, RunStatus.BROKEN, RunStatus.GONE)


def state_of_run(
    run: RunLog, beat: Heartbeat | None, alive: bool | None, now: float
) -> RunState | None:
    """Return the state of a run; None if neither the log nor a heartbeat says it.

    Args:
        run: the log. Read it after `alive` is known: the last lines are written before a process
            ends.
        beat: the last sign of life.
        alive: whether its process exists; None if that cannot be seen.
        now: seconds since 1970.
    """
    # 1. Without a heartbeat, only a last line says anything.
    ended = run.ended
    if beat is None:
        return _after_the_end(ended) if ended is not None else None

    # 2. A process that has ended says so in the log. The last line of another one is older.
    if ended is not None and ended.get("session") == beat.session:
        return _after_the_end(ended)
    return _without_end(beat, alive, now)


def _without_end(beat: Heartbeat, alive: bool | None, now: float) -> RunState:
    """Return the state of a run whose process wrote no last line."""
    # 1. A process that is gone without a last line was killed.
    last_sign = f"no sign since {_clock(beat.time, now)}"
    if alive is False:
        return RunState(RunStatus.GONE, f"{last_sign}; process {beat.pid} is gone")

    # 2. A recent step shows that it runs, wherever the process is.
    silent = max(now - beat.time, 0.0)
    if silent <= _longest_pause(beat):
        return RunState(RunStatus.RUNNING, "running")

    # 3. Otherwise only a process that can be seen is known to be slow.
    if alive is None:
        where = f"process {beat.pid} on {beat.host} cannot be seen from here"
        return RunState(RunStatus.UNKNOWN, f"{last_sign}; {where}")
    return RunState(RunStatus.SLOW, _describe_pause(beat, silent))


def _longest_pause(beat: Heartbeat) -> float:
    """Return after how many seconds without a step a run is slow."""
    if beat.step_seconds is None:
        return _SLOW_SECONDS
    return max(_SLOW_TIMES * beat.step_seconds, _SLOW_SECONDS)


def _describe_pause(beat: Heartbeat, silent: float) -> str:
    """Return how long a living process has made no step, in words."""
    if beat.step is None:
        return f"no step yet, started {_duration(silent)} ago"

    # How long a step usually takes tells whether it may be an evaluation.
    text = f"slow: last step {_duration(silent)} ago"
    if beat.step_seconds is None:
        return text
    return f"{text}, usually {_duration(beat.step_seconds)}"


def _after_the_end(ended: dict[str, Any]) -> RunState:
    """Return the state that the last line of a log describes."""
    place = f"at step {ended.get('step', 0):,}"
    reason = str(ended.get("reason") or "")

    # 1. Ends that the trainer meant.
    how = ended.get("how")
    if how == "exit":
        return RunState(RunStatus.ENDED, f"ended {place}, with its program")
    if how not in ("crash", "interrupt", "signal"):
        return RunState(RunStatus.ENDED, f"ended {place}")

    # 2. Ends that it did not mean. Most leave a flight.
    if ended.get("flight"):
        place = f"{place}, flight in {ended['flight']}"
    text = f"ended by {reason} {place}"
    if how == "crash":
        text = f"crashed: {reason} {place}"
    elif how == "interrupt":
        text = f"interrupted by Ctrl-C {place}"
    return RunState(RunStatus.BROKEN, text)


def _clock(moment: float, now: float) -> str:
    """Return the time of day, with the date if it is another day.

    >>> _clock(0.0, 10 * 86400.0)[:10]
    '1970-01-01'
    """
    then = datetime.datetime.fromtimestamp(moment)
    today = datetime.datetime.fromtimestamp(now).date()
    if then.date() == today:
        return then.strftime("%H:%M:%S")
    return then.strftime("%Y-%m-%d %H:%M")


def _duration(seconds: float) -> str:
    """Return a duration as people say it.

    >>> _duration(0.014), _duration(2.5), _duration(40.2), _duration(300), _duration(7300)
    ('14 ms', '2.5 s', '40 s', '5 min', '2 h 1 min')
    """
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"

    # Two digits of them are enough.
    if seconds < 100:
        return f"{seconds:.2g} s"

    # From 100 s on in minutes, from 100 min on in hours.
    minutes = int(seconds // 60)
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
