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


class Kind(StrEnum):
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

    kind: Kind
    text: str

    @property
    def is_over(self) -> bool:
        """Whether no more lines are to be expected from this process."""
        return self.kind in (Kind.ENDED, Kind.BROKEN, Kind.GONE)


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
    # 1. A run that has ended says so in its log.
    ended = run.ended
    if ended is not None and (beat is None or ended.get("session") == beat.session):
        return _after_the_end(ended)
    if beat is None:
        return None

    # 2. A process that is gone without a last line was killed.
    last_sign = f"no sign since {_clock(beat.time, now)}"
    if alive is False:
        return RunState(Kind.GONE, f"{last_sign}; process {beat.pid} is gone")

    # 3. A recent step shows that it runs, wherever the process is.
    silent = max(now - beat.time, 0.0)
    longest = max(_SLOW_TIMES * (beat.step_seconds or 0.0), _SLOW_SECONDS)
    if silent <= longest:
        return RunState(Kind.RUNNING, "running")
    if alive is None:
        where = f"process {beat.pid} on {beat.host} cannot be seen from here"
        return RunState(Kind.UNKNOWN, f"{last_sign}; {where}")
    return RunState(Kind.SLOW, _slow(beat, silent))


def _slow(beat: Heartbeat, silent: float) -> str:
    """Return how long a living process has made no step, in words."""
    if beat.step is None:
        return f"no step yet, started {_duration(silent)} ago"
    text = f"slow: last step {_duration(silent)} ago"
    if beat.step_seconds is None:
        return text
    return f"{text}, usually {_duration(beat.step_seconds)}"


def _after_the_end(ended: dict[str, Any]) -> RunState:
    """Return the state that the last line of a log describes."""
    step = ended.get("step", 0)
    how = ended.get("how")
    reason = str(ended.get("reason") or "")
    flight = ""
    if ended.get("flight"):
        flight = f", flight in {ended['flight']}"
    if how == "crash":
        return RunState(Kind.BROKEN, f"crashed: {reason} at step {step:,}{flight}")
    if how == "interrupt":
        return RunState(Kind.BROKEN, f"interrupted by Ctrl-C at step {step:,}{flight}")
    if how == "signal":
        return RunState(Kind.BROKEN, f"ended by {reason} at step {step:,}{flight}")
    if how == "exit":
        return RunState(Kind.ENDED, f"ended at step {step:,}, with its program")
    return RunState(Kind.ENDED, f"ended at step {step:,}")


def _clock(moment: float, now: float) -> str:
    """Return the time of day, with the date if it is another day.

    >>> _clock(0.0, 10 * 86400.0)[:10]
    '1970-01-01'
    """
    then = datetime.datetime.fromtimestamp(moment)
    is_today = then.date() == datetime.datetime.fromtimestamp(now).date()
    return then.strftime("%H:%M:%S" if is_today else "%Y-%m-%d %H:%M")


def _duration(seconds: float) -> str:
    """Return a duration as people say it.

    >>> _duration(0.014), _duration(2.5), _duration(40.2), _duration(300), _duration(7300)
    ('14 ms', '2.5 s', '40 s', '5 min', '2 h 1 min')
    """
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 100:
        return f"{seconds:.2g} s"
    minutes = int(seconds // 60)
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
