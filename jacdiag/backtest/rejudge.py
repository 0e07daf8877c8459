"""What the live rules say of a recorded run as they are today: its log holds all that they look
at.
"""

from __future__ import annotations

from jacdiag.detectors.live_rules import LiveRules, StepFigures
from jacdiag.records import Report
from jacdiag.records.run_log import Alert, RunLog
from jacdiag.rules.thresholds import Thresholds

_STEP, _STATISTICS, _PROBE = range(3)  # the order within a step


def rejudged(log: RunLog, thresholds: Thresholds) -> list[Alert]:
    """Plays a log of `jacdiag.watch` through the live rules, step by step and probe by probe.

    Example:
        >>> from jacdiag.records.run_log import read_run
        >>> from jacdiag.rules.thresholds import load_thresholds
        >>> thresholds = load_thresholds({"joint_both": {"warning": 8}})
        >>> rejudged(read_run("runs/a"), thresholds)     # doctest: +SKIP
        [Alert(step=812, code='JD502', ...)]
    """
    rules, alerts = LiveRules(thresholds, log.groups), list[Alert]()
    resumes = set(log.resumes)
    lines = [
        *((row["step"], _STEP, row) for row in log.steps),
        *((row["step"], _STATISTICS, row) for row in log.stats),
        *((row["step"], _PROBE, row) for row in log.probes),
    ]
    for step, kind, row in sorted(lines, key=lambda line: line[:2]):
        if kind == _STATISTICS:
            alerts += rules.statistics(step, row["figures"]).alerts
            continue
        if kind == _PROBE:
            if step == 0 and row.get("report"):
                rules.know(Report.from_dict(row["report"]))
            alerts += rules.probe(step, row["figures"]).alerts
            continue
        if step - 1 in resumes:
            rules.resumed()
        alerts += rules.step(StepFigures.of(row)).alerts
    return alerts
