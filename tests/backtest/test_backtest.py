"""Whole backtests on runs that are made so that the right answer is known."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jacdiag_cli.main import main

from jacdiag.backtest import Run, backtest, read_runs
from jacdiag.backtest.metrics import auroc
from jacdiag.errors import SourceError, UsageError
from jacdiag.records.backtest import BacktestReport
from jacdiag.render.backtest import by_stratum


def curve(bad: bool, seed: int, steps: int = 300) -> np.ndarray:
    k = np.arange(steps)
    loss = 2.0 + 3.0 * np.exp(-k / 20) + 0.01 * np.random.default_rng(seed).normal(size=steps)
    if bad:
        loss[200:] += np.minimum(2.0, 0.1 * np.arange(steps - 200))
    return loss


def made(count: int = 120, seed: int = 0) -> list[Run]:
    """A signal that decides within architecture and learning rate; the rate alone decides a little;
    noise nothing.
    """
    draw = np.random.default_rng(seed)
    runs = []
    for k in range(count):
        placement, lr = ("pre", "post")[k % 2], (1e-3, 1e-2, 1e-1)[k // 2 % 3]
        signal = draw.normal()
        bad = signal + math.log10(lr) + 2 + (placement == "post") > 0.5
        figures = {"signal": signal, "noise": draw.normal(), "missing": math.nan}
        steps = np.arange(300) + 1.0
        alerts = [(150, "JD501")] if bad and k % 3 else [(50, "JD502")] if k % 20 == 0 else []
        factors = {"placement": placement, "lr": lr, "seed": float(k)}
        runs.append(
            Run(f"run {k}", factors, steps, curve(bad, k), np.full(300, 1.0), figures, alerts)
        )
    return runs


def test_a_figure_that_decides_is_found_and_noise_is_not() -> None:
    found = backtest(made(), times=200)
    ranks = {r.name: r for r in found.rankings}
    assert found.best is not None and found.best.name == "signal"
    assert ranks["signal"].given_lr.value == 1.0 > ranks["signal"].over_all.value  # type: ignore[operator]
    assert (
        ranks["learning rate"].given_lr.value == 0.5 and ranks["learning rate"].within.value > 0.6
    )  # type: ignore[operator]
    architecture = ranks["architecture"]
    assert architecture.within.value == 0.5 < architecture.over_all.value, (
        "it knows nothing inside a stratum"
    )  # type: ignore[operator]
    assert ranks["missing"].given_lr.value is None and ranks["missing"].measured == 0
    assert [r.trivial for r in found.rankings] == sorted(r.trivial for r in found.rankings)


def test_a_figure_that_is_right_about_few_runs_is_not_the_best() -> None:
    runs = []
    for k, run in enumerate(made()):
        signal = run.figures["signal"]
        runs.append(
            replace(
                run,
                figures={"few": signal if k < 30 else math.nan, "close": signal + 0.3 * (k % 5)},
            )
        )
    found = backtest(runs, times=10, hold_out=["placement"])
    ranks = {r.name: r for r in found.rankings}
    assert ranks["few"].given_lr.value == 1.0 > ranks["close"].given_lr.value  # type: ignore[operator]
    assert found.best is not None and found.best.name == "close" == found.rankings[0].name
    assert {level.figure for level in found.held_out[0].levels.values()} == {"close"}


def test_noise_ranks_nothing_on_average() -> None:
    found = [
        {r.name: r for r in backtest(made(seed=k), times=1).rankings}["noise"].given_lr.value
        for k in range(6)
    ]
    assert np.mean(found) == pytest.approx(0.5, abs=4 * 0.08 / 6**0.5)  # type: ignore[arg-type]


def test_live_rules_are_counted_on_healthy_runs_and_timed_on_bad_ones() -> None:
    runs = made()
    found = {d.code: d for d in backtest(runs, times=10).detectors}
    one = found["JD501"]
    assert (
        one.found == one.ahead == sum(1 for r in runs if r.alerts and r.alerts[0][1] == "JD501")
        and one.alarms == 0
    )
    assert all(49 <= lead <= 60 for lead in one.leads)
    healthy = [r for r in runs if r.alerts and r.alerts[0][1] == "JD502"]
    assert found["JD502"].alarms == len([r for r in healthy if np.median(r.loss[-30:]) < 2.5])
    assert found["JD502"].alarms_per_10k == pytest.approx(
        1e4 * found["JD502"].alarms / found["JD502"].healthy_steps
    )
    assert found["any"].found >= one.found


def test_what_an_audit_says_at_step_0_is_no_live_alert() -> None:
    runs = [replace(run, alerts=[(0, "JD103"), *run.alerts]) for run in made()]
    assert [d.to_dict() for d in backtest(runs, times=10).detectors] == [
        d.to_dict() for d in backtest(made(), times=10).detectors
    ]


def test_leads_are_of_the_runs_that_count_as_wrong() -> None:
    runs = made()
    spiked = curve(False, 999)
    spiked[250:254] += 1.0
    factors = {"placement": "pre", "lr": 1e-3, "seed": 999.0}
    runs.append(
        Run("spiked", factors, runs[0].steps, spiked, runs[0].grad_norm, alerts=[(251, "JD502")])
    )
    found = {kind: backtest(runs, bad=kind, times=10).detectors[-1] for kind in ("any", "diverged")}
    assert found["any"].bad == found["diverged"].bad + 1
    diverged = found["diverged"].ahead_by_outcome["diverged"]
    assert diverged == [found["diverged"].ahead, found["diverged"].bad]
    # said a step behind it
    assert found["any"].ahead_by_outcome == {"diverged": diverged, "spiked": [0, 1]}


def test_each_architecture_has_its_own_ranks_with_the_rate_given() -> None:
    report = backtest(made(), times=10)
    for r in report.rankings:
        if r.name in ("signal", "noise"):
            for name, value in r.given_by_stratum.items():
                mine = [run for run in made() if run.factors["placement"] == name]
                wrong = np.array([report.bad[run.name] for run in mine])
                keys = [run.factors["lr"] for run in mine]
                values = np.array([run.figures[r.name] for run in mine])
                assert value == auroc(values, wrong, keys, missing_ties=True)
    (line,) = [line for line in by_stratum(report) if line.startswith("pre: ")]
    assert "signal" in line.split(";")[0] and "x lr" not in line


def test_a_run_that_did_not_learn_is_worse_than_its_peers() -> None:
    runs = made(12)
    factors = {"placement": "pre", "lr": 1e-3, "seed": 99.0}
    dull = Run("dull", factors, runs[0].steps, np.full(300, 5.0), runs[0].grad_norm)
    assert backtest([*runs, dull], bad="worse", times=10).bad["dull"]
    assert not backtest([*runs, dull], bad="diverged", times=10).bad["dull"]
    assert not backtest([*runs, dull], bad="worse", times=10, worse=3.5).bad["dull"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bad": "sad"}, "unknown outcome"),
        ({"stratum": ("colour",)}, "no run has the factor 'colour'"),
        ({"peers": ("size",)}, "no run has the factor 'size'"),
    ],
)
def test_bad_questions_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        backtest(made(12), **options)


def test_runs_that_all_ended_alike_rank_nothing() -> None:
    healthy = [r for r in made() if np.median(r.loss[-30:]) < 2.5]
    with pytest.raises(UsageError, match="all runs ended alike"):
        backtest(healthy)


# -- foreign logs and the command ------------------------------------------------------------------
def written(folder: Path, run: Run) -> Path:
    path = folder / f"{run.name.replace(' ', '-')}.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["_step", "train/loss", "gain", "placement", "lr", "note"])
        for step, loss in zip(run.steps, run.loss, strict=True):
            rows.writerow(
                [
                    step,
                    loss,
                    run.figures["signal"] if step == 1 else "",
                    run.factors["placement"],
                    run.factors["lr"],
                    "x" if step < 5 else "y",
                ]
            )
    return path


def test_a_foreign_csv_gives_the_same_ranks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = made(60)
    files = [written(tmp_path, run) for run in runs]
    read = read_runs(files, {"loss": "train/loss", "step": "_step"}, ["gain"])
    assert (
        read[0].factors == {"placement": "pre", "lr": 1e-3}
        and read[0].figures["gain"] == runs[0].figures["signal"]
    )
    code = main(
        [
            "backtest",
            *map(str, files),
            "--column",
            "loss=train/loss",
            "--column",
            "step=_step",
            "--figure",
            "gain",
            "--resamples",
            "50",
            "--json",
            str(tmp_path / "b.json"),
            "--plot",
            str(tmp_path / "b.png"),
            "--markdown",
            str(tmp_path / "b.md"),
        ]
    )
    out = capsys.readouterr().out
    assert (
        code == 0 and "best given the learning rate: gain, 1.00" in out and "(learning rate)" in out
    )
    report = BacktestReport.from_dict(json.loads((tmp_path / "b.json").read_text()))
    ours = {r.name: r.given_lr.value for r in backtest(runs, times=10).rankings}
    assert {r.name: r.given_lr.value for r in report.rankings}["gain"] == ours["signal"]
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG") and "| gain |" in (
        tmp_path / "b.md"
    ).read_text()


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no run was found"):
        read_runs([tmp_path])
    with pytest.raises(SourceError, match="cannot read the run"):
        read_runs([tmp_path / "none.csv"])
    (tmp_path / "a.csv").write_text("step,cost\n1,2\n")
    with pytest.raises(UsageError, match="has no column 'loss'"):
        read_runs([tmp_path / "a.csv"])
    (tmp_path / "b.jsonl").write_text("not json\n")
    with pytest.raises(SourceError, match="holds no row"):
        read_runs([tmp_path / "b.jsonl"])


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backtest", str(tmp_path)]) == 2
    assert "no run was found" in capsys.readouterr().err
    assert main(["backtest", str(tmp_path), "--column", "cost"]) == 2
    assert "--column takes NAME=COLUMN" in capsys.readouterr().err


@pytest.mark.check("jacdiag backtest")
def test_outputs_of_every_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(written(tmp_path, run)) for run in made(12)]
    command = [
        "backtest",
        *files,
        "--column",
        "loss=train/loss",
        "--column",
        "step=_step",
        "--figure",
        "gain",
        "--resamples",
        "5",
    ]
    (tmp_path / "link.json").symlink_to("real.json")
    assert main([*command, "--json", str(tmp_path / "link.json"), "--pack", "/dev/null"]) == 0
    said = capsys.readouterr().err
    assert f"wrote {tmp_path / 'link.json'}\n" in said and "wrote /dev/null\n" in said
    assert (tmp_path / "link.json").is_symlink() and (
        tmp_path / "real.json"
    ).read_text().startswith("{")

    assert main([*command, "--json", "-"]) == 0
    left = capsys.readouterr()
    assert json.loads(left.out)["rankings"] and "gain" in left.err and "wrote" not in left.err
    assert (
        main([*command, "--markdown", "/dev/full"]) == 2
        and "No space left" in capsys.readouterr().err
    )
    assert main([*command, "--json", files[0]]) == 2
    assert "would write over a run that is read" in capsys.readouterr().err
    assert Path(files[0]).read_text().startswith("_step")
