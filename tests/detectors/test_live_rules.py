"""The live rules on made-up series: what speaks, what only votes, what is silent."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from detectors.runs import LIMITS, codes, fed, healthy, spike

from jacdiag.detectors.live_rules import QUIET, LiveRules, StepFigures
from jacdiag.detectors.running_statistics import (
    ExponentialMoments,
    LogTrend,
    RollingMedian,
    RollingMoments,
)
from jacdiag.errors import UsageError
from jacdiag.rules import EVERY, RULES, rule
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.thresholds import load_thresholds


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(2, 8))]
)
def test_ten_thousand_healthy_steps_are_silent(seed: int) -> None:
    live = LiveRules(LIMITS, ["a", "b", "c"])
    assert codes(live, healthy(10_000, seed)) == []


def test_one_z_score_alone_would_not_be() -> None:
    """62 alarms in 10,000 Gaussian steps is what one z-score over 2.5 comes to: 10,000 (1 -
    Phi(2.5)).
    """
    source = random.Random(0)
    live = LiveRules(LIMITS)
    votes, alerts = 0, 0
    for step in range(10_000):
        verdict = live.step(
            StepFigures(step, 2.0 + source.gauss(0, 0.02), 1.0 + source.gauss(0, 0.1))
        )
        votes += "JD503" in verdict.votes
        alerts += len(verdict.alerts)
    assert 40 < votes < 250 and alerts == 0


@pytest.mark.parametrize("rate", [1e-3, 2e-3])
@pytest.mark.parametrize("kind", ["line", "exponential"])
@pytest.mark.parametrize("sign", [1, -1])
def test_slow_monotone_drift_never_alerts(rate: float, kind: str, sign: int) -> None:
    source = random.Random(1)
    live = LiveRules(LIMITS)
    found = []
    for step in range(3000):
        drift = 1 + rate * step if kind == "line" else math.exp(rate * step)
        level = drift if sign > 0 else 1 / drift
        f = StepFigures(
            step, 3.0 * level + source.gauss(0, 0.01), level * math.exp(source.gauss(0, 0.1))
        )
        found += live.step(f).alerts
        if step % 50 == 0:
            found += live.probe(
                step, {"branch_norm": {"a": 2.0 * level}, "shortcut_std": {"a": level}}
            ).alerts
    assert found == []


@pytest.mark.check("detectors")
def test_joint_detector_takes_both_for_three_steps_in_a_row() -> None:
    live = fed()
    assert codes(live, [spike(500, 9.0, 30.0), spike(501, 9.0, 30.0)]) == [(500, "JD502")]
    assert codes(live, [spike(502, 9.0, 30.0)]) == [(502, "JD501")]
    live = fed()
    assert codes(live, [spike(500, 2.9, 40.0), spike(501, 2.9, 40.0), spike(502, 2.9, 40.0)]) == [
        (502, "JD501")
    ]


# The gradient norm of a young run that falls evenly scatters by a fiftieth of itself.
def _young(steps: int) -> list[StepFigures]:
    figures = []
    for step in range(steps):
        loss = 5.6 - 0.008 * step
        gradient = 0.8 + 0.01 * math.sin(step)
        figures.append(StepFigures(step, loss, gradient, 1e-4, [gradient] * 3))
    return figures


@pytest.mark.parametrize("times", [1.5, 1.98])
def test_a_gradient_norm_that_rises_alone_by_less_than_double_is_no_alarm(times: float) -> None:
    live = LiveRules(LIMITS, ["a", "b", "c"])
    assert not codes(live, _young(90))
    high = [spike(step, 4.8, 0.8 * times) for step in range(90, 96)]
    results = [live.step(figures) for figures in high]
    assert all(result.scores["gradient"] > 8 for result in results)
    assert not [alert.code for result in results for alert in result.alerts]


def test_a_gradient_norm_that_doubles_alone_says_that_it_is_alone() -> None:
    live = LiveRules(LIMITS, ["a", "b", "c"])
    assert not codes(live, _young(90))
    results = [live.step(spike(step, 4.8, 1.7)) for step in range(90, 93)]
    (alert,) = results[2].alerts
    score = results[2].scores
    assert alert.code == "JD501" and alert.evidence["gradient_times"] == pytest.approx(2.1, abs=0.1)
    assert alert.what.startswith(
        f"gradient norm {plain(score['gradient'])} standard deviations above the mean of the steps "
        f"before (at most 1,000), the loss {plain(-score['loss'])} below its own; 3 steps in a row "
        "stand out, since step 90 (loss 4.8"
    )


def test_a_loss_that_stands_out_alone_says_where_the_gradient_norm_is() -> None:
    live = fed(500)
    results = [live.step(spike(step, 9.0, 1.5)) for step in range(500, 503)]
    alerts = [alert for alert in results[2].alerts if alert.code == "JD501"]
    assert alerts[0].what.startswith("loss ")
    assert "the steps before (at most 1,000), the gradient norm" in alerts[0].what


def test_without_a_loss_nothing_is_said_of_it() -> None:
    live = LiveRules(LIMITS, ["a", "b", "c"])
    for figures in _young(90):
        live.step(replace(figures, loss=None))
    results = [live.step(StepFigures(s, None, 8.0, 1e-4, [5.0] * 3)) for s in range(90, 93)]
    (alert,) = [alert for result in results for alert in result.alerts]
    assert "the steps before (at most 1,000); 3 steps in a row stand out" in alert.what


def test_two_steps_or_a_broken_row_are_not_enough() -> None:
    live = fed()
    row = [
        spike(500 + k, 2.9, gradient) for k, gradient in enumerate((40.0, 40.0, 0.9, 40.0, 40.0))
    ]
    assert codes(live, row) == []


def test_warm_up_is_silent() -> None:
    live = LiveRules(LIMITS)
    wild = [
        StepFigures(step, 10.0 if step % 7 else 500.0, 50.0 if step % 5 else 5000.0)
        for step in range(60)
    ]
    assert codes(live, wild) == []


def test_a_corrupted_batch_of_one_step_is_seen_and_its_neighbours_are_not_hidden() -> None:
    live = fed()
    assert codes(live, [spike(500, 7.0, 9.0)]) == [(500, "JD502")]
    after = fed(600)
    after.step(spike(600, 7.0, 9.0))
    # the spike is not in its own yardstick
    assert after._loss.z(7.0) == pytest.approx(fed(600)._loss.z(7.0))


def test_the_sub_layer_that_moved_first_is_named() -> None:
    live = fed()
    live.step(spike(500, 2.9, 1.2, (0.7, 9.0, 0.7)))
    live.step(spike(501, 2.9, 1.2, (0.7, 9.0, 9.0)))
    alerts = [
        a for s in (502, 503, 504) for a in live.step(spike(s, 9.0, 40.0, (9.0, 9.0, 9.0))).alerts
    ]
    assert {a.code for a in alerts} == {"JD501", "JD502"}
    assert all(a.where == ["b", "c", "a"] for a in alerts)
    assert (
        "; b moved first (gradient norm 9.00, usually 0.9" in alerts[0].what
        and "since step 500" in alerts[0].what
    )
    assert [moved["since"] for moved in alerts[0].evidence["moved"]] == [500, 501, 502]


def test_no_sub_layer_is_called_the_first_where_none_was() -> None:
    """All at the same step, none at all, one by a chance vote before the others, and sub-layers
    that are not known.
    """
    live = fed()
    (alert,) = live.step(spike(500, 9.0, 40.0, (9.0, 9.0, 9.0))).alerts
    assert "none moved first: all 3 sub-layers have stood out since step 500" in alert.what
    live = fed()
    (alert,) = live.step(spike(500, 9.0, 40.0, (9.0, 9.0, 0.7))).alerts
    assert "none moved first: 2 of 3 sub-layers have stood out since step 500" in alert.what
    live = fed()
    (alert,) = live.step(spike(500, 9.0, 40.0, (0.7, 0.7, 0.7))).alerts
    assert alert.where == [] and "no sub-layer's gradient norm stands out" in alert.what
    live = fed()
    live.step(spike(500, 2.9, 1.2, (0.7, 1.7, 0.7)))  # 3 to 4 standard deviations
    (alert,) = live.step(spike(501, 9.0, 40.0, (9.0, 9.0, 9.0))).alerts
    assert "moved first (" not in alert.what and "since step 501" in alert.what
    live = LiveRules(LIMITS)
    for f in healthy(500):
        live.step(f)
    (alert,) = live.step(StepFigures(500, 9.0, 40.0)).alerts
    assert alert.where == [] and "sub-layer" not in alert.what


def fed_with(names: list[str]) -> LiveRules:
    """Return live rules that have seen a healthy run of other sub-layers."""
    live = LiveRules(LIMITS, names)
    for f in healthy(500):
        live.step(replace(f, sublayers=[f.sublayers[0]] * len(names)))
    return live


def test_all_sub_layers_are_counted_though_few_are_listed() -> None:
    names = [f"h.{layer}.{kind}" for layer in range(30) for kind in ("attn", "mlp")]
    (alert,) = fed_with(names).step(spike(500, 9.0, 40.0, [9.0] * 60)).alerts
    assert "none moved first: all 60 sub-layers have stood out since step 500" in alert.what
    assert len(alert.where) == len(alert.evidence["moved"]) == 20
    assert alert.evidence["moved_count"] == 60
    calm = [9.0] * 59 + [0.7]
    (alert,) = fed_with(names).step(spike(500, 9.0, 40.0, calm)).alerts
    assert "none moved first: 59 of 60 sub-layers have stood out" in alert.what


def test_parameters_outside_of_the_sub_layers_are_no_sub_layers() -> None:
    names = ["h.0.attn", "h.0.mlp", "(embedding)", "(head)"]
    (alert,) = fed_with(names).step(spike(500, 9.0, 40.0, [9.0] * 4)).alerts
    assert "all 2 sub-layers, (embedding) and (head) have stood out since" in alert.what
    (alert,) = fed_with(names).step(spike(500, 9.0, 40.0, [0.7, 0.7, 9.0, 9.0])).alerts
    assert "none moved first: (embedding) and (head) have stood out since" in alert.what
    (alert,) = fed_with(names).step(spike(500, 9.0, 40.0, [0.7, 9.0, 0.7, 0.7])).alerts
    assert "; h.0.mlp moved first (" in alert.what


def test_alerts_are_rate_limited_and_what_was_held_back_is_counted() -> None:
    live = fed()
    row = [spike(500 + k, 9.0 + k, 30.0 + k) for k in range(100)]
    assert [code for _, code in codes(live, row)].count("JD501") == 1
    later = [alert for f in healthy(QUIET, start=600) for alert in live.step(f).alerts]
    assert later == []
    again = [
        a
        for s in range(900, 903)
        for a in live.step(spike(s, 9.0, 300.0)).alerts
        if a.code == "JD501"
    ]
    assert [a.suppressed > 0 for a in again] == [True]


def test_nonfinite_loss_alerts_at_once_but_not_during_amp_scale_search() -> None:
    live = LiveRules(LIMITS, ["a"])
    (alert,) = live.step(StepFigures(1, math.nan, 1.0)).alerts
    assert (alert.code, alert.level) == ("JD505", "error")
    live = LiveRules(LIMITS, ["a"])
    (alert,) = live.step(StepFigures(1, 2.0, math.nan, nonfinite=["a"])).alerts
    assert alert.where == ["a"] and "only in a" in alert.what and "first" not in alert.what
    live = LiveRules(LIMITS, ["a"])
    skips = [StepFigures(step, 2.0, math.inf, skipped=True, nonfinite=["a"]) for step in range(12)]
    assert codes(live, skips) == [(9, "JD505")]
    live = LiveRules(LIMITS)
    mixed = [StepFigures(step, 2.0, 1.0, skipped=step % 5 == 0) for step in range(50)]
    assert codes(live, mixed) == []


def probes(live: LiveRules, values: list[float], figure: str = "branch_norm") -> list[int]:
    return [
        k
        for k, v in enumerate(values)
        for _ in live.probe(200 * k, {figure: {"a": v, "b": 1.0}}).alerts
    ]


def test_a_jump_of_a_gain_against_its_own_trend() -> None:
    steady = [1.0 * 1.02**k for k in range(12)]
    # at the second probe in a row
    assert probes(LiveRules(LIMITS), [*steady, 4.0, 4.1, 4.1]) == [13]
    assert probes(LiveRules(LIMITS), [*steady, 4.0, 1.3, 1.3]) == []  # one probe alone
    assert probes(LiveRules(LIMITS), [*steady, 0.3, 0.3]) == [13]
    assert probes(LiveRules(LIMITS), [1.0, 4.0, 4.0, 4.0]) == []  # too few to have a trend
    assert probes(LiveRules(LIMITS), [*steady, 0.2, 0.2], "shortcut_std") == [13]
    (alert,) = [a for k, v in enumerate([*steady, 4.0, 4.1]) for a in LiveRulesWith.probe(k, v)]
    assert alert.where == ["a"] and alert.evidence["times"] == pytest.approx(3.2, rel=0.1)


class LiveRulesWith:
    live = LiveRules(LIMITS)

    @classmethod
    def probe(cls, k: int, value: float) -> list[Any]:
        return cls.live.probe(200 * k, {"branch_norm": {"a": value}}).alerts


def test_what_scatters_widely_has_to_move_further() -> None:
    source = random.Random(3)
    wild = [math.exp(source.gauss(0, 0.6)) for _ in range(60)]
    assert probes(LiveRules(LIMITS), wild) == []


def test_stable_rank_and_update_are_votes_only() -> None:
    live = LiveRules(LIMITS)
    assert live.probe(0, {"stable_rank": {"w": 100.0}}).votes == []
    verdict = live.probe(200, {"stable_rank": {"w": 40.0}})
    assert verdict.votes == ["JD507:w"] and not verdict.alerts
    for step in range(20):
        live.step(StepFigures(step, 2.0, 1.0, 1e-3, update=("w", 1e-3)))
    verdict = live.step(StepFigures(20, 2.0, 1.0, 1e-3, update=("w", 3e-3)))
    assert verdict.votes == ["JD506"] and not verdict.alerts


def test_update_rule_is_silent_while_the_learning_rate_moves_and_after_a_resume() -> None:
    live = LiveRules(LIMITS)
    for step in range(60):
        lr = 1e-5 * (step + 1)
        assert not live.step(
            StepFigures(step, 2.0, 1.0, lr, update=("w", lr * (9.0 if step == 50 else 1.0)))
        ).votes
    live = LiveRules(LIMITS)
    for step in range(20):
        live.step(StepFigures(step, 2.0, 1.0, 1e-3, update=("w", 1e-3)))
    live.resumed()
    assert not live.step(StepFigures(20, 2.0, 1.0, 1e-3, update=("w", 3e-3))).votes


def test_memory_goes_on_exactly() -> None:
    import json

    one, other = fed(300), LiveRules(LIMITS)
    for live in (one,):
        for k in range(7):
            live.probe(50 * k, {"branch_norm": {"a": 1.0 + 0.01 * k}})
    other.load(json.loads(json.dumps(one.state())))
    for f in [*healthy(100, seed=9, start=300), *[spike(s, 9.0, 30.0) for s in range(400, 405)]]:
        a, b = one.step(f), other.step(f)
        assert a.votes == b.votes and a.alerts == b.alerts
        assert a.scores == pytest.approx(b.scores)


# -- the series, against numpy ---------------------------------------------------------------------
def test_rolling_moments_and_median_equal_numpy() -> None:
    values = np.random.default_rng(0).normal(3, 1, 3000)
    rolling, middle = RollingMoments(1000), RollingMedian(201)
    for k, v in enumerate(values.tolist()):
        if k >= 1500 and k % 250 == 0:
            window = values[k - 1000 : k]
            assert rolling.z(v) == pytest.approx((v - window.mean()) / window.std())
            assert middle.median() == pytest.approx(np.median(values[k - 201 : k]))
        rolling.add(v)
        middle.add(v)
    trend = LogTrend()
    for k in range(8):
        trend.add(k, math.exp(0.3 * k))
    off, error = trend.departure(8, math.exp(2.4) * 2) or (0, 0)
    assert off == pytest.approx(math.log(2)) and error == pytest.approx(0, abs=1e-9)
    ema = ExponentialMoments()
    assert [ema.z(1.0) for _ in range(3)] == [None] * 3


def test_the_error_of_a_trend_is_that_of_its_prediction() -> None:
    """Against the textbook's matrix form: s^2 (1 + x^T (X^T X)^-1 x), and by trial: it is what
    predictions miss by.
    """
    random_ = np.random.default_rng(1)
    misses = []
    for _ in range(2000):
        noise = random_.normal(0, 0.1, 7)
        trend = LogTrend(points=6, least=6)
        for k in range(6):
            trend.add(20 * k, math.exp(0.05 * k + noise[k]))
        off, error = trend.departure(120, math.exp(0.05 * 6 + noise[6])) or (0, 0)
        misses.append(off)
    design = np.stack([np.ones(6), 20.0 * np.arange(6)], axis=1)
    new = np.array([1.0, 120.0])
    _, rest, *_ = np.linalg.lstsq(design, 0.05 * np.arange(6) + noise[:6], rcond=None)
    leverage = 1 + new @ np.linalg.inv(design.T @ design) @ new
    assert error == pytest.approx(math.sqrt(float(rest[0]) / 4 * leverage))
    assert np.std(misses) == pytest.approx(0.1 * math.sqrt(leverage), rel=0.05)


def test_values_that_are_not_finite_are_left_out() -> None:
    rolling, middle, ema, trend = (
        RollingMoments(),
        RollingMedian(),
        ExponentialMoments(),
        LogTrend(),
    )
    for series in (rolling, middle, ema):
        series.add(math.nan)
        series.add(math.inf)
    trend.add(1, math.nan)
    trend.add(1, 0.0)
    assert not rolling.values and not middle.values and ema.count == 0 and not trend.logs


def test_live_rules_have_documentation_and_known_thresholds() -> None:
    mine = [r for r in EVERY if r.code.startswith("JD5")]
    assert [r.code for r in mine] == [f"JD50{k}" for k in range(1, 9)]
    for one in mine:
        assert rule(one.code) is one and one not in RULES
        page = one.page
        assert all(
            text.strip() for text in (page.summary, page.what, page.why, page.example, page.remedy)
        )
    for figure in (
        "spike_score",
        "median_spike",
        "gradient_z",
        "joint_both",
        "joint_one",
        "gradient_leap",
        "lift_both",
        "update_ratio",
        "update_leap",
        "gain_drift",
        "update_jump",
        "weight_write",
    ):
        limits = LIMITS.limits(figure)
        assert (
            limits.cuts
            and limits.origin in ("published", "derived", "convention")
            and limits.source
        )
    with pytest.raises(UsageError, match="closest"):
        rule("JD509")


def test_thresholds_are_the_users() -> None:
    silent = {figure: {"warning": 1e9} for figure in ("joint_one", "joint_both", "lift_both")}
    live = LiveRules(load_thresholds(silent))
    for f in healthy(500):
        live.step(f)
    assert [c for _, c in codes(live, [spike(s, 9.0, 30.0) for s in range(500, 510)])] == ["JD502"]
