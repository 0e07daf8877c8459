"""About which step the next Jacobian probe of a run is due, as far as its log says."""

from __future__ import annotations

import math
from statistics import median

from jacdiag.records.run_log import RunLog, number

_RECENT = 50  # steps whose median is the time of a step


def next_probe_step(run: RunLog) -> int | None:
    """Return the step at which the next probe is due; None if none is, or if it is not known.

    Args:
        run: as far as it has come.
    """
    # 1. A run that has ended, or whose probe is off.
    parts_off = [row.get("part") for row in run.faults]
    is_off = "probe" in parts_off
    has_ended = run.ended is not None
    if has_ended or is_off:
        return None

    # 2. By the number of steps.
    every = run.header.get("every")
    last = max(_last_step(run.steps), _last_step(run.probes))
    if isinstance(every, int) and every > 0:
        return (last // every + 1) * every

    # 3. By a share of the time.
    if isinstance(every, float) and 0 < every < 1:
        return _step_within_budget(run, every, last)
    return None


def _step_within_budget(run: RunLog, share: float, last: int) -> int | None:
    """Return the step at which the steps since the last probe pay for the next one.

    Args:
        run: as far as it has come.
        share: of the time that probes may take.
        last: the last step.
    """
    # 1. What a probe takes.
    if not run.probes:
        return None
    price = number(run.probes[-1].get("seconds"))
    if not math.isfinite(price):
        return None

    # 2. What a step takes.
    durations = []
    for row in run.steps[-_RECENT:]:
        duration = number(row.get("step_seconds"))
        if duration > 0:
            durations.append(duration)
    if not durations:
        return None

    # 3. So many steps after the last probe.
    seconds_a_step = share * median(durations)
    steps = math.ceil(price / seconds_a_step)
    return max(_last_step(run.probes) + steps, last + 1)


def _last_step(rows: list[dict[str, object]]) -> int:
    """Return the step of the last line; 0 without one."""
    if not rows:
        return 0
    step = rows[-1].get("step")
    if not isinstance(step, int):
        return 0
    return step
