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
    is_off = any(row.get("part") == "probe" for row in run.faults)
    if run.ended is not None or is_off:
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
    # 1. What a probe and a step take.
    if not run.probes:
        return None
    price = number(run.probes[-1].get("seconds"))
    durations = [number(row.get("step_seconds")) for row in run.steps[-_RECENT:]]
    known = [duration for duration in durations if duration > 0]
    if not known or not math.isfinite(price):
        return None

    # 2. So many steps after the last probe.
    steps = math.ceil(price / (share * median(known)))
    return max(_last_step(run.probes) + steps, last + 1)


def _last_step(rows: list[dict[str, object]]) -> int:
    """Return the step of the last line; 0 without one."""
    if not rows:
        return 0
    step = rows[-1].get("step")
    if not isinstance(step, int):
        return 0
    return step
