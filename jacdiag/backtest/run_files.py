"""Runs to test verdicts on: jacdiag's own logs, or any CSV or JSONL with a row a step.

What was varied between runs (learning rate, recipe, depth ...) are its *factors*: from
`factors.json` next to the log, else the columns of a foreign log that never change.
"""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np

from jacdiag.backtest.archive import is_packed, read_packed
from jacdiag.backtest.recorded_run import Factor, Floats, Run
from jacdiag.detectors.live_rules import LiveRules, StepFigures
from jacdiag.errors import SourceError, UsageError
from jacdiag.records import Report
from jacdiag.records.run_log import RUN_FILE, Alert, RunLog, number, read_run
from jacdiag.rules.risk_features import init_figures
from jacdiag.rules.thresholds import Thresholds

FACTORS, AUDIT = "factors.json", "audit.json"
KEYS = ("step", "loss", "grad_norm", "lr")
_UNLOGGED = (None, "")  # a blank is no "nan": that one was logged


def read_runs(
    paths: Iterable[str | Path],
    columns: Mapping[str, str] | None = None,
    figures: Sequence[str] = (),
    *,
    rules: Thresholds | None = None,
) -> list[Run]:
    """Read runs from files and folders; a folder that holds folders is searched for logs.

    Args:
        paths: run logs, CSV or JSONL files, packed runs, or folders.
        columns: what a foreign log calls step, loss, grad_norm and lr.
        figures: columns of a foreign log whose first value is a figure of the untrained model.
        rules: judge the logs again by the live rules with these thresholds, in place of the alerts
            in the log.

    Raises:
        SourceError: a file that cannot be read, holds no run, or holds less than `rules` need.
        UsageError: a column that is not there.
    """
    files = [file for path in paths for file in _files(Path(path))]
    if not files:
        raise SourceError("no run was found", hint=f"files, or folders with {RUN_FILE} in them")
    sources: list[tuple[Path, Run]] = []
    for file in files:
        sources += [(file, run) for run in _read(file, dict(columns or {}), figures, rules)]
    return _with_unique_names(sources)


def _with_unique_names(sources: Sequence[tuple[Path, Run]]) -> list[Run]:
    """Rename runs that share a name: by as much of their path as is needed, then by a number."""
    # 1. By their path, one folder more at a time.
    names = [run.name for _, run in sources]
    places = [_place(file) for file, _ in sources]
    for depth in range(1, max(map(len, places)) + 1):
        shared = {name for name, count in Counter(names).items() if count > 1}
        if not shared:
            break
        for k, (_, run) in enumerate(sources):
            if names[k] in shared:
                names[k] = "/".join((*places[k][-depth:], run.name))

    # 2. By a number.
    seen: Counter[str] = Counter()
    renamed = []
    for name, (_, run) in zip(names, sources, strict=True):
        seen[name] += 1
        unique = name if seen[name] == 1 else f"{name} ({seen[name]})"
        renamed.append(replace(run, name=unique))
    return renamed


def _place(file: Path) -> tuple[str, ...]:
    """Return the folders (and the pack) in which a run's name is unique.

    A log of jacdiag has its name from its own folder.
    """
    folder = file.absolute().parent
    if file.name == RUN_FILE:
        folder = folder.parent
    parts = folder.parts[1:]
    return (*parts, file.name) if is_packed(file) else parts


def _files(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
    elif (path / RUN_FILE).is_file():
        yield path / RUN_FILE
    else:
        yield from sorted(path.rglob(RUN_FILE))


def _read(
    file: Path, columns: dict[str, str], figures: Sequence[str], rules: Thresholds | None
) -> list[Run]:
    if file.suffix == ".jsonl" and _is_ours(file):
        return [of_log(read_run(file), _name(file), _factors(file), _report(file), rules)]
    if rules is not None:
        raise _too_little(str(file))
    if is_packed(file):
        return read_packed(file)
    return [_foreign(file, columns, figures)]


def _is_ours(file: Path) -> bool:
    try:
        with file.open("rb") as lines:
            first = json.loads(lines.readline() or b"null")
    except OSError as error:
        raise SourceError(f"cannot read the run '{file}'", got=error.strerror) from error
    except ValueError:
        return False
    return isinstance(first, dict) and first.get("type") == "run"


def _name(file: Path) -> str:
    return file.parent.name if file.name == RUN_FILE else file.stem


def _factors(file: Path) -> dict[str, Factor]:
    """Read the factors next to a log; a number that is not finite is kept as a text."""
    path = file.parent / FACTORS
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot read '{path}'", got=str(error)) from error
    if not isinstance(data, dict):
        raise SourceError(
            f"'{path}' holds no factors", hint='for example {"lr": 0.001, "recipe": "vanilla"}'
        )
    return {str(name): _factor(value) for name, value in data.items() if value is not None}


def _factor(value: Any) -> Factor:
    if isinstance(value, str):
        return value
    as_number = number(value)
    return as_number if math.isfinite(as_number) else str(as_number)


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
    rows = [row for row in log.steps if row.get("loss") is not None]
    if not rows:
        raise _no_loss(name)
    factors = _with_rate(factors, log.column("lr"))
    return Run(
        name,
        factors,
        _array(number(row.get("step")) for row in rows),
        _array(number(row.get("loss")) for row in rows),
        _array(_first_known(row.get("grad_norm"), row.get("grad_norm_post")) for row in rows),
        _figures_of(report or _report_at_start(log), factors.get("lr")),
        _alerts_of(log) if rules is None else _judged_again(log, name, rules),
    )


def _with_rate(factors: Mapping[str, Factor], rates: Iterable[float]) -> dict[str, Factor]:
    """Return the factors with the largest finite learning rate, unless they name one."""
    completed = dict(factors)
    finite = [rate for rate in rates if math.isfinite(rate)]
    if "lr" not in completed and finite:
        completed["lr"] = max(finite)
    return completed


def _report_at_start(log: RunLog) -> Report | None:
    for row in log.probes:
        if row.get("step") == 0 and row.get("report"):
            return Report.from_dict(row["report"])
    return None


def _figures_of(report: Report | None, rate: Factor | None) -> dict[str, float]:
    """Return the figures of the untrained model; none without a report."""
    if report is None:
        return {}
    return init_figures(report, rate if isinstance(rate, float) else None)


def _alerts_of(log: RunLog) -> list[tuple[int, str]]:
    """Return step and code of the alerts in a log."""
    return [
        (int(row["step"]), str(row["code"]))
        for row in log.alerts
        if "step" in row and "code" in row
    ]


def _judged_again(log: RunLog, name: str, rules: Thresholds) -> list[tuple[int, str]]:
    """Return step and code of the alerts that the live rules raise today."""
    try:
        return [(alert.step, alert.code) for alert in rejudged(log, rules)]
    except (KeyError, TypeError, ValueError) as error:
        raise _too_little(name) from error


class _Kind(IntEnum):
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
    lines = [(row["step"], _Kind.STEP, row) for row in log.steps]
    lines += [(row["step"], _Kind.STATISTICS, row) for row in log.stats]
    lines += [(row["step"], _Kind.PROBE, row) for row in log.probes]
    lines.sort(key=lambda line: line[:2])

    # 2. Each line to the rules.
    rules = LiveRules(thresholds, log.groups)
    resumes = set(log.resumes)
    alerts: list[Alert] = []
    for step, kind, row in lines:
        if kind is _Kind.STATISTICS:
            alerts += rules.statistics(step, row["figures"]).alerts
        elif kind is _Kind.PROBE:
            if step == 0 and row.get("report"):
                rules.know(Report.from_dict(row["report"]))
            alerts += rules.probe(step, row["figures"]).alerts
        else:
            if step - 1 in resumes:
                rules.resumed()
            alerts += rules.step(StepFigures.from_row(row)).alerts
    return alerts


def _no_loss(name: str) -> SourceError:
    return SourceError(
        f"'{name}' holds no loss",
        hint="a run is labelled by its loss: steps without are passed over",
    )


def _too_little(name: str) -> SourceError:
    return SourceError(
        f"'{name}' does not hold what the live rules look at", hint="a log of jacdiag.watch does"
    )


def _first_known(*values: Any) -> float:
    return next((number(v) for v in values if v is not None), math.nan)


def _array(values: Iterable[float]) -> Floats:
    return np.array(list(values), dtype=np.float64)


# -- foreign logs ----------------------------------------------------------------------------------
def _foreign(file: Path, columns: dict[str, str], figures: Sequence[str]) -> Run:
    """Read a run from CSV or JSONL that another program wrote.

    Args:
        file: with a row for each step.
        columns: what the file calls the keys in `KEYS`.
        figures: columns whose first value is a figure of the untrained model.
    """
    # 1. The rows and the columns.
    rows = list(_rows(file))
    if not rows:
        raise SourceError(
            f"'{file}' holds no row", hint="CSV with a header, or JSONL with an object a line"
        )
    names = {key: columns.get(key, key) for key in KEYS}
    known = dict.fromkeys(name for row in rows for name in row)
    _check_columns(file, known, names["loss"], figures)

    # 2. The steps that have a loss, by their number or by their place.
    losses, norms, steps = [], [], []
    for place, row in enumerate(rows, start=1):
        if row.get(names["loss"]) in _UNLOGGED:
            continue
        losses.append(number(row[names["loss"]]))
        norms.append(number(row.get(names["grad_norm"])))
        steps.append(number(row.get(names["step"])) if names["step"] in known else float(place))
    if not losses:
        raise _no_loss(file.name)

    # 3. The factors: columns that never change, and the file next to the log.
    used = {*names.values(), *figures}
    factors = {**_constant(rows, known, used), **_factors(file)}
    factors = _with_rate(factors, (number(row.get(names["lr"])) for row in rows))
    first_values = {name: _first(rows, name) for name in figures}
    return Run(_name(file), factors, _array(steps), _array(losses), _array(norms), first_values)


def _check_columns(
    file: Path, known: Mapping[str, None], loss: str, figures: Sequence[str]
) -> None:
    """Raise if the file lacks the column of the loss, or that of a figure."""
    for name in (loss, *figures):
        if name in known:
            continue
        hint = "a --figure is a column"
        if name == loss:
            hint = "--column loss=NAME says what it is called"
        listed = ", ".join(list(known)[:12])
        raise UsageError(f"'{file.name}' has no column '{name}'", got=listed, hint=hint)


def _first(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return next((number(row[name]) for row in rows if row.get(name) not in _UNLOGGED), math.nan)


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"cannot read the run '{file}'", got=str(error)) from error
    if file.suffix == ".csv":
        for row in csv.DictReader(text.splitlines()):
            row.pop(None, None)  # fields beyond the header
            yield row
        return
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def _constant(
    rows: Sequence[Mapping[str, Any]], known: Iterable[str], used: set[str]
) -> dict[str, Factor]:
    """Return the columns that never change, except those that are used for something else."""
    constant: dict[str, Factor] = {}
    if len(rows) < 2:
        return constant
    for name in known:
        values = {str(row.get(name)) for row in rows}
        if name in used or len(values) != 1:
            continue
        value = rows[0].get(name)
        as_number = number(value)
        constant[name] = as_number if math.isfinite(as_number) else str(value)
    return constant
