"""What is held out is predicted from the others alone."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from jacdiag_cli.main import main

from jacdiag.backtest import Run, backtest
from jacdiag.backtest.archive import encoded, pack, read_packed, unpack
from jacdiag.backtest.cross_validation import choose_figure, curves
from jacdiag.backtest.dataset import build_dataset
from jacdiag.errors import SourceError, UsageError
from jacdiag.records.backtest import BacktestReport
from jacdiag.rules.risk_curves import load_risk
from jacdiag.rules.risk_features import CONDITIONS
from tests.backtest.conftest import label_once
from tests.backtest.test_backtest import curve


def made(count: int = 240, seed: int = 0, leak: bool = False) -> list[Run]:
    """Signal and learning rate decide, with noise; `leak` is a figure that tells the truth at width
    128 only.
    """
    draw = np.random.default_rng(seed)
    runs = []
    for k in range(count):
        lr, width = (1e-3, 1e-2, 1e-1)[k % 3], (32.0, 64.0, 128.0)[k // 3 % 3]
        placement = ("pre", "post")[k // 9 % 2]
        signal = math.exp(draw.normal())
        bad = bool(
            draw.random() < 1 / (1 + math.exp(-(6.0 + 3 * math.log(signal) + 1.3 * math.log(lr))))
        )
        figures = {"signal": signal, "noise": math.exp(draw.normal())}
        if leak:
            figures["leak"] = (10.0 if bad else 0.1) if width == 128.0 else math.exp(draw.normal())
        factors = {
            "placement": placement,
            "lr": lr,
            "width": width,
            "layers": 6.0,
            "branch_std": float(k % 7),
        }
        factors["seed"] = float(k % 5)
        runs.append(
            Run(f"run {k}", factors, np.arange(300) + 1.0, curve(bad, k), np.ones(300), figures)
        )
    return runs


def named(runs: list[Run]) -> list[Run]:
    """With a figure that an audit has: only such a one makes a curve."""
    return [replace(run, figures={"mean branch norm": run.figures["signal"]}) for run in runs]


def test_signal_is_predicted_at_held_out_levels() -> None:
    found = backtest(made(), times=50, hold_out=["width", "lr"])
    for one in found.held_out:
        assert {level.figure for level in one.levels.values()} == {"signal"}
        assert one.auroc.value is not None and one.auroc.value > 0.85
        assert (
            one.brier is not None
            and one.brier_rate_alone is not None
            and one.brier < one.brier_rate_alone
        )
        assert (
            sum(b.runs for b in one.calibration)
            == sum(level.runs for level in one.levels.values())
            == 240
        )
        assert set(one.transfer) == {"pre", "post"}
    width = found.held_out[0]
    assert all(abs(t.expected - t.observed) < 0.12 for t in width.transfer.values()), (
        "chances carry over"
    )  # type: ignore[operator]
    assert width.false_alarms is not None and width.false_alarms < 0.15 and width.recall is not None


def test_data_of_the_held_out_level_is_not_used_to_predict_it() -> None:
    found = backtest(made(leak=True), times=10, hold_out=["width"])
    assert found.best is not None
    [one] = found.held_out
    assert one.levels["128"].figure == "signal", "only its own runs make the leak look good"


def test_each_architecture_is_predicted_by_its_own_figure() -> None:
    runs = []
    for run in made():
        signal, noise = run.figures["signal"], run.figures["noise"]
        post = run.factors["placement"] == "post"
        figures = {"of pre": noise if post else signal, "of post": signal if post else noise}
        runs.append(replace(run, figures=figures))
    [one] = backtest(runs, times=20, hold_out=["width"]).held_out
    assert one.transfer["pre"].figures == ["of pre"] and one.transfer["post"].figures == ["of post"]
    assert one.auroc.value is not None and one.one_figure.value is not None
    assert one.auroc.value > 0.85 > one.one_figure.value


def inits(smooth: str, bent: str) -> list[Run]:
    """Six inits at six rates; both figures rank them alike, only of `smooth` one edge tells the
    next.
    """
    draw = np.random.default_rng(3)
    runs = []
    for k, lr, seed in itertools.product(range(6), 10 ** np.linspace(-3, 0, 6), range(2)):
        signal = math.exp(k - 2.5)
        bad = signal * lr * math.exp(0.5 * draw.normal()) > 0.03
        figures = {bent: 1.0 + 1e-3 * k if k < 5 else 1e6, smooth: signal}
        factors = {
            "placement": "pre",
            "lr": float(lr),
            "branch_std": float(k),
            "seed": float(seed),
            "warmup": 20.0,
        }
        runs.append(
            Run(
                f"{k} {lr:g} {seed}",
                factors,
                np.arange(300) + 1.0,
                curve(bad, k),
                np.ones(300),
                figures,
            )
        )
    return runs


@pytest.mark.parametrize("smooth", CONDITIONS)
def test_risk_curve_uses_the_condition_that_predicts_held_out_inits(smooth: str) -> None:
    [bent] = set(CONDITIONS) - {smooth}
    runs = inits(smooth, bent)
    cast = build_dataset(
        runs,
        [label_once(run.loss) for run in runs],
        bad="any",
        stratum=["placement"],
        peers=[],
        cluster_without=["seed"],
    )
    everything = np.ones(len(runs), dtype=bool)
    assert len(set(cast.inits)) == 6 and cast.best(everything) == bent, (
        "they rank alike: the first one is named"
    )
    assert choose_figure(cast, everything) == smooth
    assert backtest(runs, times=5).curves["pre"].figure == smooth
    one_init = np.array([run.factors["branch_std"] == 2.0 for run in runs])
    assert choose_figure(cast, one_init) == cast.best(one_init), (
        "with nothing to leave out, the ranks"
    )


def test_user_figures_are_ranked_and_make_no_curve_for_audits() -> None:
    found = backtest(inits("signal", "bent"), times=5, hold_out=["seed"])
    assert found.held_out[0].transfer["pre"].figures == ["bent"], "named first among equals"
    assert found.curves == {}, "no audit measures it"


def test_nothing_is_predicted_if_one_outcome_is_missing() -> None:
    runs = [
        replace(r, factors={**r.factors, "side": float(np.median(r.loss[-30:]) > 2.5)})
        for r in made(60)
    ]
    [one] = backtest(runs, times=10, hold_out=["side"]).held_out
    assert (
        one.auroc.value is None
        and one.brier is None
        and one.recall is None
        and one.calibration == []
    )


def test_a_placement_with_few_runs_of_one_outcome_has_no_curve() -> None:
    known = named(made(120))
    found = backtest(known, times=5)
    few = [r for r in known if r.factors["placement"] == "pre" or not found.bad[r.name]]
    ill = [r for r in known if r.factors["placement"] == "post" and found.bad[r.name]]
    assert set(backtest([*few, *ill[:9]], times=5).curves) == {"pre"}
    assert set(backtest([*few, *ill[:10]], times=5).curves) == {"pre", "post"}


def test_two_inits_give_no_risk_curve_and_one_does() -> None:
    for stds, there in (((1.0,), {"pre", "post"}), ((1.0, 2.0), set())):
        runs = [
            replace(r, factors={**r.factors, "width": 64.0, "branch_std": stds[k // 3 % len(stds)]})
            for k, r in enumerate(named(made(120)))
        ]
        cast = build_dataset(
            runs,
            [label_once(run.loss) for run in runs],
            bad="any",
            stratum=["placement"],
            peers=[],
            cluster_without=["seed"],
        )
        assert set(curves(cast, 10)) == there


def test_a_lower_rate_is_not_worse_for_being_slow() -> None:
    flat = np.full(300, 3.0)
    runs = made(120)
    slow = Run("slow", {**runs[0].factors, "lr": 1e-4}, runs[0].steps, flat, np.ones(300))
    fast = Run("fast", {**runs[0].factors, "lr": 1.0}, runs[0].steps, flat, np.ones(300))
    bad = backtest([*runs, slow, fast], bad="worse", times=1).bad
    assert not bad["slow"] and bad["fast"]


def test_runs_that_did_not_end_are_left_out() -> None:
    runs = made(60)
    asked = {**runs[0].factors, "steps": 400.0}
    short = replace(runs[0], name="short", factors=asked)
    broken = replace(
        runs[1], name="broken", factors=asked, loss=np.append(runs[1].loss[:-1], math.nan)
    )
    found = backtest([*runs, short, broken], times=1)
    assert "short" not in found.bad and found.bad["broken"] and found.asked["not_whole"] == 1


def test_a_factor_that_no_run_has_is_refused() -> None:
    with pytest.raises(UsageError, match="no run has the factor 'colour'"):
        backtest(made(30), times=1, hold_out=["colour"])


# -- files -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["a.runs", "a.runs.gz"])
def test_packed_runs_come_back(tmp_path: Path, name: str) -> None:
    runs = made(20)
    runs[3] = replace(
        runs[3],
        loss=np.append(runs[3].loss[:-1], math.inf),
        alerts=[(7, "JD501")],
        figures={"signal": math.nan, "noise": 2.0},
    )
    path = tmp_path / name
    path.write_bytes(encoded(runs, path))
    assert encoded(runs, path) == path.read_bytes(), "the same runs give the same bytes"
    back = read_packed(path)
    for a, b in zip(runs, back, strict=True):
        assert (a.name, dict(a.factors), list(a.alerts)) == (
            b.name,
            dict(b.factors),
            list(b.alerts),
        )
        assert b.loss == pytest.approx(a.loss, rel=1e-3) and b.steps.tolist() == a.steps.tolist()
    assert back[3].figures == {"noise": 2.0}, "what was not measured is absent"
    assert pack(list(unpack(pack(back)))) == pack(back)


def test_what_is_not_packed_is_named(tmp_path: Path) -> None:
    for name, data in (
        ("a.runs", b"{}\n"),
        ("b.runs.gz", b"no gzip"),
        ("c.runs", b'{"type": "step"}\n'),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(SourceError, match="cannot read the runs"):
            read_packed(tmp_path / name)


def test_the_command_holds_out_packs_and_writes_curves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = [
        replace(run, factors={**run.factors, "clip": 1.0, "beta2": 0.95})
        for run in named(made(120))
    ]
    path = tmp_path / "all.runs"
    path.write_bytes(encoded(known, path))
    options = [
        "--hold-out",
        "width",
        "--resamples",
        "20",
        "--write-risk",
        str(tmp_path / "risk.toml"),
        "--pack",
        str(tmp_path / "again.runs.gz"),
        "--json",
        str(tmp_path / "b.json"),
        "--markdown",
        str(tmp_path / "b.md"),
    ]
    assert main(["backtest", str(path), *options]) == 0
    out = capsys.readouterr().out
    assert (
        "held out by width" in out
        and "AUROC, learning rate given" in out
        and "chance → went wrong" in out
    )
    report = BacktestReport.from_dict(json.loads((tmp_path / "b.json").read_text()))
    assert report.curves == backtest(read_packed(path), times=20).curves
    table = load_risk(tmp_path / "risk.toml")
    assert set(table.curves) == {"pre", "post"} and table.curves["pre"].ranges["width"] == [
        32.0,
        128.0,
    ]
    for written_curve in table.curves.values():
        assert (written_curve.ranges["clip"], written_curve.ranges["beta2"]) == (
            [1.0, 1.0],
            [0.95, 0.95],
        )
    assert len(read_packed(tmp_path / "again.runs.gz")) == 120
    assert "## Held out" in (tmp_path / "b.md").read_text()


def test_bad_names_of_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "all.runs"
    path.write_bytes(encoded(made(60), path))
    assert main(["backtest", str(path), "--pack", str(tmp_path / "x.json")]) == 2
    assert "--pack takes another name" in capsys.readouterr().err
    given = ["--stratum", "layers", "--resamples", "5", "--write-risk", str(tmp_path / "r.toml")]
    given += ["--json", str(tmp_path / "r.json")]
    assert main(["backtest", str(path), *given]) == 2
    assert "there is no curve to write" in capsys.readouterr().err and not list(
        tmp_path.glob("r.*")
    )
