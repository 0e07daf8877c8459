"""Logs as people have them: blanks, copies of one name, surplus fields, factors that are not
known.
"""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jacdiag.backtest import Run, backtest, read_runs
from jacdiag.backtest.archive import pack, unpack
from jacdiag.backtest.cross_validation import curves
from jacdiag.backtest.dataset import build_dataset
from jacdiag.backtest.outcomes import label
from jacdiag.errors import SourceError, UsageError
from jacdiag.rules.risk_features import CONDITIONS
from tests.backtest.test_backtest import curve, made


def log(path: Path, rows: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row))
        writer.writeheader()
        writer.writerows(rows)
    return path


def sparse(bad: bool, every: int = 10) -> list[dict[str, object]]:
    """The loss every tenth row, the rate in each, as loggers with more than one frequency write
    it.
    """
    losses = curve(bad, 1, 3000)[::every]
    rows: list[dict[str, object]] = []
    for k, loss in enumerate(losses):
        rows += [{"step": k * every, "loss": loss, "lr": 0.1}]
        rows += [{"step": k * every + j, "loss": "", "lr": 0.1} for j in range(1, every)]
    return rows


@pytest.mark.parametrize("bad", [False, True])
def test_a_row_without_a_loss_is_no_broken_step(tmp_path: Path, bad: bool) -> None:
    [run] = read_runs([log(tmp_path / "a.csv", sparse(bad))])
    assert len(run.steps) == 300 and run.steps.tolist() == [10.0 * k for k in range(300)]
    found = label(run.loss)
    assert found.outcome == ("diverged" if bad else "healthy")
    if bad:
        assert found.left is not None and 200 <= run.steps[found.left] <= 400


def test_a_loss_that_was_logged_as_nan_broke(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"step": k, "loss": 3.0 if k < 150 else "nan"} for k in range(200)
    ]
    [run] = read_runs([log(tmp_path / "a.csv", [*rows, {"step": 200, "loss": ""}])])
    assert (label(run.loss).outcome, label(run.loss).left) == ("diverged", 150)


def test_a_log_without_any_loss_is_refused(tmp_path: Path) -> None:
    path = log(tmp_path / "a.csv", [{"step": k, "loss": ""} for k in range(20)])
    with pytest.raises(SourceError, match=r"a\.csv' holds no loss"):
        read_runs([path])


def test_a_first_loss_that_is_not_finite_moves_no_lead() -> None:
    loss = curve(True, 1)
    late = label(loss).left
    loss[:30] = math.nan
    assert label(loss).left == late is not None


def test_runs_of_one_name_get_distinct_names(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"step": k, "loss": 3.0} for k in range(20)]
    paths = [log(tmp_path / place / "history.csv", rows) for place in ("a/x", "b/x", "c/y")]
    names = [run.name for run in read_runs(paths)]
    assert names == ["a/x/history", "b/x/history", "y/history"]
    assert len({r.name for r in read_runs([paths[0], paths[0]])}) == 2
    alone = replace(read_runs([paths[0]])[0], name="one")
    packs = [tmp_path / "a.runs", tmp_path / "b.runs"]
    for path in packs:
        path.write_text(pack([alone]))
    assert [run.name for run in read_runs(packs)] == ["a.runs/one", "b.runs/one"]


def test_logs_of_one_name_are_distinguished_by_parent_folders(tmp_path: Path) -> None:
    lines = [{"type": "run"}, *({"type": "step", "step": k, "loss": 3.0} for k in range(1, 20))]
    for place in ("a/x", "b/x"):
        (tmp_path / place).mkdir(parents=True)
        text = "".join(json.dumps({"schema_version": 1, **line}) + "\n" for line in lines)
        (tmp_path / place / "run.jsonl").write_text(text)
    assert [run.name for run in read_runs([tmp_path])] == ["a/x", "b/x"]


def test_surplus_fields_of_a_csv_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("step,loss\n1,3.0\n2,2.9,7,8\n")
    assert read_runs([path])[0].loss.tolist() == [3.0, 2.9]
    with pytest.raises(UsageError, match="no column 'gain'") as caught:
        read_runs([path], figures=["gain"])
    assert "--figure" in str(caught.value.hint)


def test_a_factor_that_is_not_known_is_none(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"step": k, "loss": 3.0, "beta": "inf"} for k in range(20)]
    path = log(tmp_path / "a.csv", rows)
    (tmp_path / "factors.json").write_text(
        json.dumps({"lr": 0.1, "warmup": None, "clip": math.inf})
    )
    runs = read_runs([path])
    assert runs[0].factors == {"lr": 0.1, "clip": "inf", "beta": "inf"}
    assert next(unpack(pack(runs))).factors == runs[0].factors


def test_runs_without_factors_are_not_one_cluster() -> None:
    plain = [replace(run, factors={}) for run in made(40)]
    best = next(r for r in backtest(plain, stratum=[], times=200).rankings if r.name == "signal")
    assert best.over_all.lower is not None and best.over_all.upper is not None
    assert best.over_all.lower < best.over_all.upper


def test_few_clusters_give_no_interval() -> None:
    few = [replace(run, factors={"of": float(k % 4)}) for k, run in enumerate(made(40))]
    best = next(r for r in backtest(few, stratum=[], times=200).rankings if r.name == "signal")
    assert best.over_all.value is not None and best.over_all.lower is None


def test_no_run_at_its_end_is_said_so() -> None:
    begun = [replace(run, factors={**run.factors, "steps": 500.0}) for run in made(12)]
    with pytest.raises(UsageError, match="no run has reached its end"):
        backtest(begun)


def test_a_figure_of_nothing_makes_no_range() -> None:
    runs: list[Run] = []
    for k in range(96):
        lr, signal = 10.0 ** (k % 4 - 3), 0.0 if k % 12 == 0 else 1.0 + k % 12
        bad = signal * lr > 0.05
        factors = {
            "placement": "pre",
            "lr": lr,
            "branch_std": float(k % 12),
            "seed": float(k),
            "warmup": 20.0,
        }
        runs.append(
            Run(
                f"{k}",
                factors,
                np.arange(60) + 1.0,
                curve(bad, k, 60),
                np.ones(60),
                {CONDITIONS[0]: signal},
            )
        )
    wrong = np.array([run.figures[CONDITIONS[0]] * float(run.factors["lr"]) > 0.05 for run in runs])
    cast = build_dataset(
        runs,
        [label(run.loss) for run in runs],
        bad="any",
        stratum=["placement"],
        peers=[],
        cluster_without=["seed"],
    )
    [found] = curves(replace(cast, is_wrong=wrong), 10).values()
    assert found.ranges["figure"][0] > 0 and found.runs == 88
