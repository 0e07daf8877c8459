"""Runs to test verdicts on: jacdiag's own logs, or any CSV or JSONL with a row a step.

What was varied between runs (learning rate, recipe, depth ...) are its *factors*: from
`factors.json` beside the log, else the columns of a foreign log that never change.
"""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jacdiag.backtest.archive import is_packed, read_packed
from jacdiag.backtest.recorded_run import Factor, Floats, Run
from jacdiag.backtest.rejudge import rejudged
from jacdiag.errors import SourceError, UsageError
from jacdiag.records import Report
from jacdiag.records.run_log import RUN_FILE, RunLog, number, read_run
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
    """Reads runs from files and folders; a folder that holds folders is searched for logs.

    Args:
        paths: run logs, CSV or JSONL files, packed runs, or folders.
        columns: what a foreign log calls step, loss, grad_norm and lr.
        figures: columns of a foreign log whose first value is a figure of the untrained model.
        rules: take what the live rules say of the logs with these thresholds, not what they said in
            the run.

    Raises:
        SourceError: a file that cannot be read, holds no run, or holds less than `rules` need.
        UsageError: a column that is not there.
    """
    files = [file for path in paths for file in _files(Path(path))]
    if not files:
        raise SourceError("no run was found", hint=f"files, or folders with {RUN_FILE} in them")
    return _apart(
        [(file, run) for file in files for run in _read(file, dict(columns or {}), figures, rules)]
    )


def _apart(found: Sequence[tuple[Path, Run]]) -> list[Run]:
    """Runs that share a name are told apart by as much of their place as is needed, then by a
    number.
    """
    names = [run.name for _, run in found]
    places = [_place(file) for file, _ in found]
    for up in range(1, max(map(len, places)) + 1):
        shared = {name for name, count in Counter(names).items() if count > 1}
        if not shared:
            break
        names = [
            "/".join((*place[-up:], run.name)) if name in shared else name
            for name, place, (_, run) in zip(names, places, found, strict=True)
        ]
    seen: Counter[str] = Counter()
    for k, name in enumerate(names):
        seen[name] += 1
        names[k] = name if seen[name] == 1 else f"{name} ({seen[name]})"
    return [replace(run, name=name) for (_, run), name in zip(found, names, strict=True)]


def _place(file: Path) -> tuple[str, ...]:
    """The folders (and the pack) that a run's name lies in: a log of ours has its name from its own
    folder.
    """
    folder = file.absolute().parent
    folder = folder.parent if file.name == RUN_FILE else folder
    return (*folder.parts[1:], *([file.name] if is_packed(file) else []))


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
    side = file.parent / FACTORS
    if not side.is_file():
        return {}
    try:
        data = json.loads(side.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot read '{side}'", got=str(error)) from error
    if not isinstance(data, dict):
        raise SourceError(
            f"'{side}' holds no factors", hint='for example {"lr": 0.001, "recipe": "vanilla"}'
        )
    read = {
        str(k): v if isinstance(v, str) else number(v) for k, v in data.items() if v is not None
    }
    return {k: v if isinstance(v, str) or math.isfinite(v) else str(v) for k, v in read.items()}


def _report(file: Path) -> Report | None:
    """The audit of the untrained model beside a log, which knows more than the log's own first
    probe.
    """
    side = file.parent / AUDIT
    if not side.is_file():
        return None
    try:
        return Report.from_json(side.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError) as error:
        raise SourceError(f"cannot read the report '{side}'", got=str(error)) from error


def of_log(
    log: RunLog,
    name: str,
    factors: Mapping[str, Factor],
    report: Report | None = None,
    rules: Thresholds | None = None,
) -> Run:
    """A run out of jacdiag's own log; its peak learning rate is a factor where none is named.

    Args:
        report: of the untrained model; the log's probe at step 0 if not given.
        rules: see `read_runs`.
    """
    rates = [r for r in log.column("lr") if math.isfinite(r)]
    told = dict(factors)
    if "lr" not in told and rates:
        told["lr"] = max(rates)
    rate = told.get("lr")
    first = next((row for row in log.probes if row.get("step") == 0 and row.get("report")), None)
    report = report or (Report.from_dict(first["report"]) if first is not None else None)
    found = (
        init_figures(report, rate if isinstance(rate, float) else None)
        if report is not None
        else {}
    )
    rows = [row for row in log.steps if row.get("loss") is not None]
    if not rows:
        raise _no_loss(name)
    grads = [_first_known(row.get("grad_norm"), row.get("grad_norm_post")) for row in rows]
    alerts = [
        (int(row["step"]), str(row["code"]))
        for row in log.alerts
        if "step" in row and "code" in row
    ]
    if rules is not None:
        try:
            alerts = [(alert.step, alert.code) for alert in rejudged(log, rules)]
        except (KeyError, TypeError, ValueError) as error:
            raise _too_little(name) from error
    steps, losses = (_array(number(row.get(key)) for row in rows) for key in ("step", "loss"))
    return Run(name, told, steps, losses, _array(grads), found, alerts)


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
    rows = list(_rows(file))
    if not rows:
        raise SourceError(
            f"'{file}' holds no row", hint="CSV with a header, or JSONL with an object a line"
        )
    names = {key: columns.get(key, key) for key in KEYS}
    known = dict.fromkeys(name for row in rows for name in row)
    missing = [name for name in (names["loss"], *figures) if name not in known]
    if missing:
        hint = (
            "--column loss=NAME says what it is called"
            if missing[0] == names["loss"]
            else "a --figure is a column"
        )
        raise UsageError(
            f"'{file.name}' has no column '{missing[0]}'",
            got=", ".join(list(known)[:12]),
            hint=hint,
        )
    lossy = [
        (k + 1.0, row) for k, row in enumerate(rows) if row.get(names["loss"]) not in _UNLOGGED
    ]
    if not lossy:
        raise _no_loss(file.name)
    loss = _array(number(row[names["loss"]]) for _, row in lossy)
    steps = _array(
        number(row.get(names["step"])) if names["step"] in known else k for k, row in lossy
    )
    factors: dict[str, Factor] = {
        **_constant(rows, known, {*names.values(), *figures}),
        **_factors(file),
    }
    rates = [r for row in rows if math.isfinite(r := number(row.get(names["lr"])))]
    if "lr" not in factors and rates:
        factors["lr"] = max(rates)
    grads = _array(number(row.get(names["grad_norm"])) for _, row in lossy)
    return Run(
        _name(file), factors, steps, loss, grads, {name: _first(rows, name) for name in figures}
    )


def _first(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return next((number(row[name]) for row in rows if row.get(name) not in _UNLOGGED), math.nan)


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"cannot read the run '{file}'", got=str(error)) from error
    if file.suffix == ".csv":
        for row in csv.DictReader(text.splitlines()):
            row.pop(None, None)  # type: ignore[call-overload]  # fields beyond the header
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
    found: dict[str, Factor] = {}
    for name in known:
        values = {str(row.get(name)) for row in rows}
        if name in used or len(values) != 1 or len(rows) < 2:
            continue
        value = rows[0].get(name)
        as_number = number(value)
        found[name] = as_number if math.isfinite(as_number) else str(value)
    return found
