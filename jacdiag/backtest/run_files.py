"""Runs to test verdicts on: jacdiag's own logs, those of a Trainer or of TensorBoard, or any table.

What was varied between runs (learning rate, recipe, depth ...) are its *factors*: from
`factors.json` next to the log, else the columns of a foreign log that never change.
"""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np

from jacdiag.backtest import event_files, trainer_state
from jacdiag.backtest.archive import is_packed, read_packed
from jacdiag.backtest.event_files import is_event_file, read_events
from jacdiag.backtest.recorded_run import Factor, Floats, Run
from jacdiag.backtest.run_search import find_logs, name_of_run, place_of_run
from jacdiag.backtest.trainer_state import (
    STATE_FILE,
    folder_of_run,
    is_trainer_state,
    read_trainer_state,
)
from jacdiag.detectors.live_rules import LiveRules, StepFigures
from jacdiag.errors import SourceError, UsageError
from jacdiag.records import NewerSchemaError, Report
from jacdiag.records.run_log import RUN_FILE, Alert, RunLog, number, read_run
from jacdiag.rules.risk_features import init_figures
from jacdiag.rules.thresholds import Thresholds

FACTORS, AUDIT = "factors.json", "audit.json"
KEYS = ("step", "loss", "grad_norm", "lr")

# Values of a step that was not logged. A blank is no "nan": that one was logged.
_UNLOGGED = (None, "")

_HOLDS_ROWS = "CSV with a header, JSONL with an object a line, or a log of a Trainer or TensorBoard"


def read_runs(
    paths: Iterable[str | Path],
    columns: Mapping[str, str] | None = None,
    figures: Sequence[str] = (),
    *,
    rules: Thresholds | None = None,
) -> list[Run]:
    """Read runs from files and folders; a folder that holds folders is searched for logs.

    Args:
        paths: run logs, `trainer_state.json` of a Hugging Face Trainer, TensorBoard event files,
            CSV or JSONL files, packed runs, or folders.
        columns: what a foreign log calls step, loss, grad_norm and lr.
        figures: columns of a foreign log whose first value is a figure of the untrained model.
        rules: judge the logs again by the live rules with these thresholds, in place of the alerts
            in the log.

    Raises:
        SourceError: a file that cannot be read, holds no run, or holds less than `rules` need.
        UsageError: a column that is not there, or event files without TensorBoard to read them.
    """
    # 1. The files.
    files: list[Path] = []
    for path in paths:
        files += find_logs(Path(path))
    if not files:
        raise SourceError(
            "no run was found",
            hint=f"files, or folders with {RUN_FILE}, {STATE_FILE}, event files or .csv in them",
        )

    # 2. The runs in each, and where it is.
    runs: list[Run] = []
    places: list[tuple[str, ...]] = []
    for file in files:
        runs_of_file = _read(file, dict(columns or {}), figures, rules)
        runs += runs_of_file
        places += [place_of_run(file)] * len(runs_of_file)
    return _with_unique_names(runs, places)


def _with_unique_names(runs: Sequence[Run], places: Sequence[tuple[str, ...]]) -> list[Run]:
    """Rename runs that share a name: by as much of their path as is needed, then by a number.

    Args:
        runs: as they were read.
        places: the folders of each, as `place_of_run` returns them.
    """
    # 1. By their path, one folder more at a time.
    names = [run.name for run in runs]
    deepest = max((len(place) for place in places), default=0)
    for depth in range(1, deepest + 1):
        shared = _repeated(names)
        if not shared:
            break
        for k, run in enumerate(runs):
            if names[k] in shared:
                names[k] = "/".join((*places[k][-depth:], run.name))

    # 2. By a number.
    seen: Counter[str] = Counter()
    renamed = []
    for name, run in zip(names, runs, strict=True):
        seen[name] += 1
        if seen[name] > 1:
            name = f"{name} ({seen[name]})"
        renamed.append(replace(run, name=name))
    return renamed


def _repeated(names: Iterable[str]) -> set[str]:
    """Return the names that stand there more than once."""
    return {name for name, count in Counter(names).items() if count > 1}


def _read(
    file: Path, columns: dict[str, str], figures: Sequence[str], rules: Thresholds | None
) -> list[Run]:
    """Read the runs of one file. The arguments are those of `read_runs`."""
    # 1. A log of jacdiag, which alone holds what the live rules look at.
    if file.suffix == ".jsonl" and _is_ours(file):
        return [
            of_log(read_run(file), name_of_run(file), _factors(file.parent), _report(file), rules)
        ]
    if rules is not None:
        raise _too_little(str(file))

    # 2. Many runs in one file, and the logs of other programs.
    if is_packed(file):
        return read_packed(file)
    return [_foreign(file, columns, figures)]


def _is_ours(file: Path) -> bool:
    """Return whether a file begins as a log of jacdiag does."""
    # 1. Its first line, which is empty in an empty file.
    try:
        with file.open("rb") as lines:
            line = lines.readline()
    except OSError as error:
        raise SourceError(f"cannot read the run '{file}'", got=error.strerror) from error

    # 2. The header of a run.
    try:
        header = json.loads(line)
    except ValueError:
        return False
    return isinstance(header, dict) and header.get("type") == "run"


def _factors(folder: Path) -> dict[str, Factor]:
    """Read the factors in the folder of a log; a number that is not finite is kept as a text."""
    # 1. Read the file, if there is one.
    path = folder / FACTORS
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot read '{path}'", got=str(error)) from error

    # 2. Check that it is a table of factors.
    if not isinstance(data, dict):
        raise SourceError(
            f"'{path}' holds no factors", hint='for example {"lr": 0.001, "recipe": "vanilla"}'
        )

    # 3. null is a factor that this run does not have.
    factors = {}
    for name, value in data.items():
        if value is not None:
            factors[str(name)] = _factor(value)
    return factors


def _factor(value: Any) -> Factor:
    """Return the value of a factor as a finite number or as text."""
    if isinstance(value, str):
        return value
    as_number = number(value)
    if math.isfinite(as_number):
        return as_number

    # nan differs from itself, so it would be another level in each run.
    return str(as_number)


def _report(file: Path) -> Report | None:
    """Read the audit of the untrained model next to a log; None if there is none.

    It knows more than the first probe in the log.
    """
    path = file.parent / AUDIT
    if not path.is_file():
        return None
    try:
        return Report.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError) as error:
        raise SourceError(f"cannot read the report '{path}'", got=str(error)) from error


def of_log(
    log: RunLog,
    name: str,
    factors: Mapping[str, Factor],
    report: Report | None = None,
    rules: Thresholds | None = None,
) -> Run:
    """Return a run from jacdiag's own log.

    Args:
        log: as it was read.
        name: of the run.
        factors: what was varied; the peak learning rate of the log is added if none is named.
        report: of the untrained model; the log's probe at step 0 if not given.
        rules: see `read_runs`.

    Raises:
        SourceError: no step has a loss, or the log holds less than `rules` need.
    """
    # 1. The steps that have a loss.
    rows = [row for row in log.steps if row.get("loss") is not None]
    if not rows:
        raise _no_loss(name)

    # 2. The alerts of the log, or of the live rules as they are today.
    if rules is None:
        alerts = _alerts_of(log)
    else:
        alerts = _judged_again(log, name, rules)

    # 3. What was varied, and the figures of the untrained model.
    factors = _with_rate(factors, log.column("lr"))
    figures = _figures_of(report or _report_at_start(log), factors.get("lr"))
    return Run(
        name=name,
        factors=factors,
        steps=_array(number(row.get("step")) for row in rows),
        loss=_array(number(row.get("loss")) for row in rows),
        grad_norm=_array(_gradient_norm(row) for row in rows),
        figures=figures,
        alerts=alerts,
    )


def _with_rate(factors: Mapping[str, Factor], rates: Iterable[float]) -> dict[str, Factor]:
    """Return the factors with the largest finite learning rate, unless they name one."""
    if "lr" in factors:
        return dict(factors)
    finite = [rate for rate in rates if math.isfinite(rate)]
    if not finite:
        return dict(factors)

    # The largest is the peak of the schedule.
    return {**factors, "lr": max(finite)}


def _report_at_start(log: RunLog) -> Report | None:
    """Return the report of the probe before the first step; None if the log has none."""
    for row in log.probes:
        if _holds_first_report(row):
            return Report.from_dict(row["report"])
    return None


def _holds_first_report(row: Mapping[str, Any]) -> bool:
    """Return whether the line of a probe holds a report of the untrained model."""
    return row.get("step") == 0 and bool(row.get("report"))


def _figures_of(report: Report | None, rate: Factor | None) -> dict[str, float]:
    """Return the figures of the untrained model; none without a report."""
    if report is None:
        return {}

    # A rate that is a text, such as "cosine", is no number to scale a figure by.
    if isinstance(rate, float):
        return init_figures(report, rate)
    return init_figures(report, None)


def _alerts_of(log: RunLog) -> list[tuple[int, str]]:
    """Return step and code of the alerts in a log."""
    alerts = []
    for row in log.alerts:
        is_complete = "step" in row and "code" in row
        if is_complete:
            alerts.append((int(row["step"]), str(row["code"])))
    return alerts


def _judged_again(log: RunLog, name: str, rules: Thresholds) -> list[tuple[int, str]]:
    """Return step and code of the alerts that the live rules raise today."""
    try:
        return [(alert.step, alert.code) for alert in rejudged(log, rules)]
    except NewerSchemaError:
        raise  # the log may hold all that is needed, in a form that is not known here
    except (KeyError, TypeError, ValueError) as error:
        raise _too_little(name) from error


class _LineOrder(IntEnum):
    """Kinds of lines, in their order within a step."""

    STEP = 0
    STATISTICS = 1
    PROBE = 2


def rejudged(log: RunLog, thresholds: Thresholds) -> list[Alert]:
    """Play a log of `jacdiag.watch` through the live rules, step by step and probe by probe.

    Args:
        log: holds all that the rules look at.
        thresholds: of the rules.

    Raises:
        KeyError, TypeError, ValueError: the log holds less than the rules need.

    Example:
        >>> from jacdiag.records.run_log import read_run
        >>> from jacdiag.rules.thresholds import load_thresholds
        >>> thresholds = load_thresholds({"joint_both": {"warning": 8}})
        >>> rejudged(read_run("runs/a"), thresholds)     # doctest: +SKIP
        [Alert(step=812, code='JD502', ...)]
    """
    # 1. The lines of the log in their order.
    lines = [(row["step"], _LineOrder.STEP, row) for row in log.steps]
    lines += [(row["step"], _LineOrder.STATISTICS, row) for row in log.stats]
    lines += [(row["step"], _LineOrder.PROBE, row) for row in log.probes]
    lines.sort(key=lambda line: line[:2])

    # 2. Each line to the rules.
    rules = LiveRules(thresholds, log.groups)
    resumes = set(log.resumes)
    alerts: list[Alert] = []
    for step, kind, row in lines:
        if kind is _LineOrder.STATISTICS:
            alerts += rules.statistics(step, row["figures"]).alerts
        elif kind is _LineOrder.PROBE:
            alerts += _judge_probe(rules, row)
        else:
            # What the rules learned before a resume is not about the steps after it.
            if step - 1 in resumes:
                rules.resumed()
            alerts += rules.step(StepFigures.from_row(row)).alerts
    return alerts


def _judge_probe(rules: LiveRules, row: Mapping[str, Any]) -> Sequence[Alert]:
    """Return the alerts of a probe. Later ones are compared with that of the untrained model."""
    if _holds_first_report(row):
        rules.know(Report.from_dict(row["report"]))
    return rules.probe(row["step"], row["figures"]).alerts


def _no_loss(name: str) -> SourceError:
    """Return the error of a log without a loss."""
    return SourceError(
        f"'{name}' holds no loss",
        hint="a run is labelled by its loss: steps without are passed over",
    )


def _too_little(name: str) -> SourceError:
    """Return the error of a log that the live rules cannot judge."""
    return SourceError(
        f"'{name}' does not hold what the live rules look at", hint="a log of jacdiag.watch does"
    )


def _gradient_norm(row: Mapping[str, Any]) -> float:
    """Return the gradient norm of a step, before clipping if that was logged."""
    norm = row.get("grad_norm")
    if norm is None:
        norm = row.get("grad_norm_post")
    return number(norm)


def _array(values: Iterable[float]) -> Floats:
    """Return numbers as an array."""
    return np.array(list(values), dtype=np.float64)


# -- foreign logs ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class _ForeignLog:
    """What another program wrote of a run.

    Attributes:
        rows: one for each time that it logged.
        factors: that it knows of.
        places: where a file of factors may be; a later one has the last word.
        names: of `KEYS`, what it may call each, in the order in which they are looked for.
    """

    rows: list[dict[str, Any]]
    places: tuple[Path, ...]
    factors: dict[str, Any] = field(default_factory=dict)
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def _read_foreign(file: Path) -> _ForeignLog:
    """Read what another program wrote, in the form that it has."""
    if file.is_dir():
        return _ForeignLog(read_events(file), (file,), names=event_files.NAMES)
    if is_event_file(file):
        return _ForeignLog(read_events(file), (file.parent,), names=event_files.NAMES)
    if is_trainer_state(file):
        log = read_trainer_state(file)
        places = (folder_of_run(file), file.parent)
        return _ForeignLog(log.rows, places, log.factors, trainer_state.NAMES)
    return _ForeignLog(list(_rows(file)), (file.parent,))


def _foreign(file: Path, columns: dict[str, str], figures: Sequence[str]) -> Run:
    """Read a run that another program wrote.

    Args:
        file: with a row for each step, or a folder of event files.
        columns: what the log calls the keys in `KEYS`.
        figures: columns whose first value is a figure of the untrained model.
    """
    # 1. The rows and the columns.
    log = _read_foreign(file)
    if not log.rows:
        raise SourceError(f"'{file}' holds no row", hint=_HOLDS_ROWS)
    known: dict[str, None] = {}
    for row in log.rows:
        known.update(dict.fromkeys(row))
    names = {key: _name_of_series(key, columns, log, known) for key in KEYS}
    _check_columns(file, known, names["loss"], figures)

    # 2. The steps that have a loss, by their number or by their place.
    has_numbers = names["step"] in known
    losses = []
    norms = []
    steps = []
    for place, row in enumerate(log.rows, start=1):
        loss = row.get(names["loss"])
        if loss in _UNLOGGED:
            continue
        losses.append(number(loss))
        norms.append(number(row.get(names["grad_norm"])))

        step = float(place)
        if has_numbers:
            step = number(row.get(names["step"]))
        steps.append(step)
    if not losses:
        raise _no_loss(file.name)

    # 3. The factors: columns that never change, what the log knows, and the file next to it.
    used = {*names.values(), *figures}
    factors = _constant(log.rows, known, used)
    for name, value in log.factors.items():
        factors[str(name)] = _factor(value)
    for folder in log.places:
        factors.update(_factors(folder))
    factors = _with_rate(factors, (number(row.get(names["lr"])) for row in log.rows))
    return Run(
        name=name_of_run(file),
        factors=factors,
        steps=_array(steps),
        loss=_array(losses),
        grad_norm=_array(norms),
        figures={name: _first_logged(log.rows, name) for name in figures},
    )


def _name_of_series(
    key: str, columns: Mapping[str, str], log: _ForeignLog, known: Mapping[str, None]
) -> str:
    """Return what a log calls a key: as --column says, or else a usual name that it has."""
    if key in columns:
        return columns[key]
    for name in log.names.get(key, ()):
        if name in known:
            return name
    return key


def _check_columns(
    file: Path, known: Mapping[str, None], loss: str, figures: Sequence[str]
) -> None:
    """Raise if the file lacks the column of the loss, or that of a figure."""
    for name in (loss, *figures):
        if name in known:
            continue

        # The option that names the column.
        hint = "a --figure is a column"
        if name == loss:
            hint = "--column loss=NAME says what it is called"
        listed = ", ".join(list(known)[:12])
        raise UsageError(f"'{file.name}' has no column '{name}'", got=listed, hint=hint)


def _first_logged(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    """Return the first value of a column; nan if no row has one."""
    for row in rows:
        value = row.get(name)
        if value not in _UNLOGGED:
            return number(value)
    return math.nan


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a CSV, or the objects of a JSONL."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"cannot read the run '{file}'", got=str(error)) from error
    lines = text.splitlines()
    if file.suffix == ".csv":
        yield from _csv_rows(lines)
    else:
        yield from _jsonl_rows(lines)


def _csv_rows(lines: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a CSV with a header."""
    for row in csv.DictReader(lines):
        row.pop(None, None)  # fields beyond the header
        yield row


def _jsonl_rows(lines: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the lines that are JSON objects."""
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a logger may print other lines between them
        if isinstance(row, dict):
            yield row


def _constant(
    rows: Sequence[Mapping[str, Any]], known: Iterable[str], used: set[str]
) -> dict[str, Factor]:
    """Return the columns that never change, except those that are used for something else."""
    # Of a single row, nothing says what changes.
    constant: dict[str, Factor] = {}
    if len(rows) < 2:
        return constant

    for name in known:
        values = {str(row.get(name)) for row in rows}
        if name in used or len(values) != 1:
            continue

        # "1e-3" is the same level as 0.001.
        value = rows[0].get(name)
        as_number = number(value)
        constant[name] = as_number if math.isfinite(as_number) else str(value)
    return constant
