"""How many runs an AUROC takes, what is said if there are too few, and the lead over a rival."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from jacdiag_cli.main import main

from jacdiag.backtest import Run, backtest
from jacdiag.backtest.metrics import auroc, lead_interval, pair_runs
from jacdiag.records.backtest import LEAST_RUNS, BacktestReport
from jacdiag.render.backtest import summary
from tests.backtest.test_backtest import curve, made


def few(bad: int, good: int) -> list[Run]:
    """Return runs of one architecture and rate, of which some went wrong."""
    steps = np.arange(300) + 1.0
    runs = []
    for k in range(bad + good):
        is_bad = k < bad
        factors = {"placement": "pre", "lr": 0.1, "seed": float(k)}
        figures = {"signal": float(is_bad)}
        runs.append(Run(f"{k}", factors, steps, curve(is_bad, k), np.ones(300), figures))
    return runs


@pytest.mark.parametrize("counts", [(1, 1), (3, 20), (20, 3)])
def test_too_few_runs_give_no_auroc_and_a_sentence(counts: tuple[int, int]) -> None:
    report = backtest(few(*counts), times=10)
    for ranking in report.rankings:
        assert ranking.given_lr.value is ranking.within.value is ranking.over_all.value is None
        assert ranking.operating is ranking.all_pairs is None
        assert set(ranking.by_stratum.values()) == set(ranking.given_by_stratum.values()) == {None}
    assert report.best is report.lead is None
    (sentence,) = [line for line in summary(report) if line.startswith("no AUROC")]
    assert f"at least {LEAST_RUNS} runs that went wrong and {LEAST_RUNS} others" in sentence
    assert sentence.endswith(f"here {counts[0]} went wrong and {counts[1]} did not")


def test_enough_runs_give_an_auroc_and_no_such_sentence() -> None:
    report = backtest(few(LEAST_RUNS, LEAST_RUNS), times=10)
    assert report.best is not None and report.best.given_lr.value == 1.0
    assert not any(line.startswith("no ") for line in summary(report))


def test_runs_that_share_no_rate_are_ranked_within_their_architecture() -> None:
    runs = []
    for k, run in enumerate(few(5, 5)):
        runs.append(replace(run, factors={**run.factors, "lr": 0.1 + k}))
    report = backtest(runs, times=10)
    assert report.best is None and report.rankings[0].name == "signal"
    assert report.comparable == {"over_all": [5, 5], "within": [5, 5], "given_lr": [0, 0]}
    lines = summary(report)
    assert any("that share them; here 0 and 0 do" in line for line in lines)
    assert any(line.startswith("best within an architecture: signal, 1.00") for line in lines)


def test_a_summary_without_any_figure_says_how_to_name_one() -> None:
    runs = [replace(run, figures={}) for run in few(5, 5)]
    lines = summary(backtest(runs, times=10))
    assert any("--figure COLUMN" in line for line in lines)
    assert not any(line.startswith("best") for line in lines)


def test_figures_that_are_ranked_over_all_runs_alone_make_no_best_within() -> None:
    runs = []
    for k, run in enumerate(few(5, 5)):
        factors = {**run.factors, "placement": "pre" if k < 5 else "post"}
        runs.append(replace(run, factors=factors))
    report = backtest(runs, times=10)
    assert report.rankings[0].over_all.value == 1.0
    assert report.rankings[0].within.value is None
    assert not any(line.startswith("best") for line in summary(report))


def test_runs_that_only_ended_worse_are_counted_apart() -> None:
    slow = replace(few(0, 1)[0], name="slow", loss=np.full(300, 5.0))
    runs = [*few(4, 6), slow]
    text = (
        "1 of those that went wrong neither diverged nor spiked, and ended 0.4 nats or more over "
    )
    (line,) = [line for line in summary(backtest(runs, times=10)) if line.startswith(text)]
    assert line == f"{text}the best of all runs at the same or a lower learning rate"
    peers = backtest(runs, times=10, peers=["placement"])
    assert any(f"{text}the best run of the same placement at" in x for x in summary(peers))
    assert not any(text[2:] in x for x in summary(backtest(runs, times=10, bad="diverged")))
    no_rates = [replace(run, factors={"placement": "pre"}) for run in runs]
    assert f"{text}the best of all runs" in summary(backtest(no_rates, times=10))


def test_the_lead_is_the_difference_on_the_same_runs() -> None:
    draw = np.random.default_rng(0)
    bad = np.arange(60) % 2 == 0
    good_score = 2 * bad + draw.normal(size=60)
    noise = draw.normal(size=60)
    lead = lead_interval(good_score, noise, bad, None, range(60), times=300)
    assert lead.value == pytest.approx(auroc(good_score, bad) - auroc(noise, bad))  # type: ignore[operator]
    assert 0 < lead.lower < lead.value < lead.upper  # type: ignore[operator]

    # A score has no lead over itself, and an unmeasured run counts for neither.
    itself = lead_interval(noise, noise, bad, None, range(60), times=50)
    assert itself.value == itself.lower == itself.upper == 0.0
    noise[:50] = np.nan
    part = lead_interval(good_score, noise, bad, None, range(60), times=50)
    assert part.value == pytest.approx(
        auroc(good_score[50:], bad[50:]) - auroc(noise[50:], bad[50:])  # type: ignore[operator]
    )


def test_the_report_says_whose_lead_it_is_and_keeps_it() -> None:
    report = backtest(made(48), times=20)
    ranked = {ranking.name: ranking.given_lr.value for ranking in report.rankings}
    assert report.lead is not None
    assert report.lead.figure == "signal" and report.lead.candidates == 2
    difference = ranked["signal"] - ranked[report.lead.rival]  # type: ignore[operator]
    assert report.lead.difference.value == pytest.approx(difference)
    assert BacktestReport.from_dict(report.to_dict()).lead == report.lead
    (line,) = [line for line in summary(report) if line.startswith("its lead over ")]
    assert line.endswith("it was picked among 2 figures on these runs")


def test_runs_in_pairs_are_counted_once() -> None:
    scores = np.array([1.0, 2.0, 3.0, np.nan, 5.0])
    wrong = np.array([True, False, False, True, True])
    assert pair_runs(scores, wrong, None).runs == (2, 2)
    assert pair_runs(scores, wrong, ["a", "a", "b", "b", "c"]).runs == (1, 1)


def test_peers_are_of_one_size_unless_the_command_says_otherwise(
    tmp_path: object, capsys: pytest.CaptureFixture[str]
) -> None:
    from pathlib import Path

    from jacdiag.backtest.archive import pack

    # Wide runs end higher than narrow ones, and none of them went wrong among its own.
    runs = []
    for k, run in enumerate(few(4, 8)):
        width = 32.0 if k < 8 else 64.0
        shifted = run.loss + (1.0 if k >= 8 else 0.0)
        runs.append(replace(run, loss=shifted, factors={**run.factors, "width": width}))
    file = Path(str(tmp_path)) / "x.runs"
    file.write_text(pack(runs))
    assert main(["backtest", str(file), "--resamples", "1"]) == 0
    assert "12 runs, 4 went wrong" in capsys.readouterr().out
    assert main(["backtest", str(file), "--resamples", "1", "--peers", "none"]) == 0
    assert "12 runs, 8 went wrong" in capsys.readouterr().out
