"""A young run: the line through the last steps, drift with few points, and when each rule is
ready.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from detectors.runs import LIMITS, codes, healthy, spike

from jacdiag.detectors import drift
from jacdiag.detectors import recent_trend as recent
from jacdiag.detectors.live_rules import LiveRules, StepFigures
from jacdiag.detectors.readiness import OF_NORMS
from jacdiag.detectors.recent_trend import LEAST, WINDOW, RecentTrend, fit_line

POSITIONS = (80, 90, 100, 120, 150, 190, 250, 330, 450, 600, 800, 1000)


def young(seed: int, steps: int) -> Iterator[StepFigures]:
    """The first fall of a loss, from 4.2 to 1.1 within 200 steps, and a gradient norm that rises
    and falls again.
    """
    source = random.Random(seed)
    for step in range(1, steps + 1):
        loss = 1.1 + 3.1 / (1 + math.exp((step - 110) / 25)) + source.gauss(0, 0.06)
        gradient = (0.8 + 1.2 * math.exp(-(((step - 150) / 90) ** 2))) * math.exp(
            source.gauss(0, 0.12)
        )
        yield StepFigures(step, loss, gradient, 1e-3)


@pytest.mark.parametrize("at", POSITIONS)
@pytest.mark.parametrize("seed", [0, 1])
def test_one_corrupted_batch_is_found_at_its_own_step_from_step_80_on(at: int, seed: int) -> None:
    live = LiveRules(LIMITS)
    found: list[tuple[int, str]] = []
    for f in young(seed, at + 20):
        if f.step == at:
            f = StepFigures(at, (f.loss or 0) + 1.5, 3 * f.gradient, 1e-3)
        found += codes(live, [f])
    assert found == [(at, "JD502")]


@pytest.mark.parametrize("seed", range(6))
def test_a_young_run_without_a_fault_is_silent(seed: int) -> None:
    assert codes(LiveRules(LIMITS), young(seed, 1200)) == []


def test_one_figure_alone_is_no_corrupted_batch() -> None:
    """The gradient norm alone, the loss alone, and the loss by less than 0.1 with a gradient not
    far out.
    """
    for loss, gradient in ((0.0, 20.0), (3.0, 1.0)):
        live = LiveRules(LIMITS)
        steps = list(young(0, 121))
        bad = StepFigures(121, (steps[-1].loss or 0) + loss, gradient * 1.2, 1e-3)
        assert codes(live, [*steps[:-1], bad]) == []
    live = LiveRules(LIMITS)
    still = [StepFigures(k, 2.0 + 1e-3 * (k % 3), 1.0 + 0.01 * (k % 5), 1e-3) for k in range(120)]
    # 0.09 higher, and the gradient not by 8
    assert codes(live, [*still, StepFigures(120, 2.09, 1.08, 1e-3)]) == []


def test_gradient_norm_known_only_after_clipping_is_not_judged() -> None:
    def last(**options: bool) -> list[tuple[int, str]]:
        live = LiveRules(LIMITS)
        for f in young(0, 300):
            live.step(StepFigures(f.step, f.loss, 1.0, 1e-3, **options))  # type: ignore[arg-type]
        return codes(live, [StepFigures(301, 5.0, 1.0, 1e-3, **options)])  # type: ignore[arg-type]

    assert last(after_clipping=True) == [(301, "JD502")]
    assert last() == []


def test_the_alert_says_what_is_usual_and_since_when() -> None:
    live = LiveRules(LIMITS)
    for f in young(3, 149):
        live.step(f)
    (alert,) = live.step(StepFigures(150, 6.0, 12.0, 1e-3)).alerts
    usual_loss, usual_gradient = alert.evidence["usual_loss"], alert.evidence["usual_gradient"]
    assert 1.6 < usual_loss < 2.2 and 1.6 < usual_gradient < 2.4
    assert f"loss 6.00, usually {usual_loss:.2f}" in alert.what and alert.evidence["since"] == 150


def test_the_line_against_numpy() -> None:
    source = np.random.default_rng(0)
    slope, level = 0.03, 2.0
    errors, deviations = [], []
    for _ in range(300):
        line = fit_line(
            (level + slope * np.arange(WINDOW) + source.normal(0, 0.5, WINDOW)).tolist(), floor=0.0
        )
        errors.append(line.expected - level - slope * WINDOW)
        deviations.append(line.deviation)
    assert abs(np.mean(errors)) < 0.05 and np.mean(deviations) == pytest.approx(0.5, rel=0.1)
    bent = [1.0] * WINDOW
    bent[5], bent[40] = 100.0, -100.0  # what stands out changes nothing
    assert fit_line(bent, floor=1e-3).expected == pytest.approx(1.0)


def test_how_often_gaussian_noise_passes_the_cut() -> None:
    """Over 8 deviations: 2 of 4 million draws. Here over 6, of 60,000: 0.8 are expected, and 5 are
    one in 1,500.
    """
    source, line = random.Random(1), RecentTrend()
    over = 0
    for _ in range(60_000 // 6):
        for _ in range(6):
            line.add(source.gauss(0, 1))
        over += sum((line.z(source.gauss(0, 1)) or 0) > 6 for _ in range(6))
    assert over < 5


def test_what_is_early_or_not_finite_has_no_score_and_memory_goes_on() -> None:
    one = RecentTrend(logarithm=True)
    for k in range(LEAST):
        assert one.z(1.0) is None and one.usual() is None
        one.add(2.0 + 0.1 * (k % 3))
    one.add(math.nan)
    one.add(0.0)
    assert one.count == LEAST and one.z(math.inf) is None and one.z(0.0) is None
    other = RecentTrend(logarithm=True)
    other.load(json.loads(json.dumps(one.state())))
    assert other.z(5.0) == one.z(5.0) and other.usual() == pytest.approx(2.1, abs=0.1)


# -- drift with few points -------------------------------------------------------------------------
def rounds(values: list[float], figure: str = "branch_norm") -> list[int]:
    live = LiveRules(LIMITS)
    found = []
    for place, value in enumerate(values):
        steady = {"a": value, "b": 1.0 + 0.02 * (place % 2), "c": 2.0}
        found += [place for _ in live.probe(100 * place, {figure: steady}).alerts]
    return found


@pytest.mark.parametrize("points", [3, 4, 5, 6, 8])
@pytest.mark.parametrize("times", [8.0, 0.2])
def test_a_jump_after_few_points_is_found_at_the_second_round(points: int, times: float) -> None:
    steady = [1.0 + 0.03 * k for k in range(points)]
    assert rounds([*steady, times, times]) == [points + 1]
    assert rounds([*steady, times, 1.2]) == []  # one round alone


def test_two_points_are_no_trend_and_a_bent_curve_is_no_departure() -> None:
    assert rounds([1.0, 1.1, 8.0, 8.0]) == []
    assert rounds([1.0, 3.0, 6.0, 8.0, 9.0, 9.5, 9.7, 9.8]) == []  # a line foretells 9, 12, 15 ...
    assert rounds([10.0, 4.0, 2.0, 1.5, 1.4, 1.4, 1.4]) == []
    assert rounds([1.0, 1.6, 2.6, 4.2, 6.6, 10.0, 16.0]) == []  # a steady growth


def test_few_points_borrow_the_scatter_of_the_other_sub_layers() -> None:
    """Three points on a line by chance say nothing of their scatter; the others of the figure
    do.
    """
    source = random.Random(5)
    live = LiveRules(LIMITS)
    for place in range(3):
        wild = {f"s{k}": math.exp(source.gauss(0, 0.6)) for k in range(8)}
        live.probe(100 * place, {"branch_norm": {"a": 1.0, **wild}})
    assert [live.probe(100 * p, {"branch_norm": {"a": 2.3, "s0": 1.0}}).alerts for p in (3, 4)] == [
        [],
        [],
    ]


def test_statistics_have_a_trend_of_their_own() -> None:
    live = LiveRules(LIMITS)
    found = []
    for place, logit in enumerate([1.0, 1.1, 1.2, 1.3, 40.0, 41.0]):
        figures = {
            "logit": {"a": logit, "b": None},
            "branch_std": {"a": 0.5},
            "max_activation": {"a": 10.0**place},
        }
        found += [(place, alert) for alert in live.statistics(25 * place, figures).alerts]
    ((place, alert),) = found
    assert place == 5 and alert.code == "JD504" and alert.where == ["a"]
    assert (
        "the largest attention logit of a" in alert.what
        and "41.0 now, 1.30 before step 100" in alert.what
    )


# -- readiness -------------------------------------------------------------------------------------
def test_each_rule_says_when_it_is_ready_and_is_silent_before() -> None:
    live = LiveRules(LIMITS)
    assert set(live.waits()) == {"JD501", "JD502", "JD503", "JD504", OF_NORMS, "JD506", "JD507"}
    ready: dict[str, int] = {}
    for f in healthy(120, start=1):
        before = live.waits()
        live.step(StepFigures(f.step, f.loss, f.gradient, 1e-3, update=("a", 1e-3)))
        if f.step % 40 == 0:
            live.statistics(f.step, {"logit": {"a": 1.0}})
        ready |= {code: f.step for code in before if code not in live.waits()}
    assert ready == {
        "JD501": recent.LEAST,
        "JD502": recent.LEAST,
        "JD503": 25,
        "JD504": 120,
        "JD506": 9,
    }
    assert live.waits() == {"JD507": "a first probe", OF_NORMS: "3 probes"} and drift.LEAST == 3


def test_forward_statistics_do_not_count_as_norms_for_readiness() -> None:
    """It is ready with the third probe: a branch whose norm jumps at the fourth is found at the
    fifth.
    """
    live = LiveRules(LIMITS)
    for step in range(1, 9):
        live.statistics(step, {"branch_std": {"a": 1.0}})
    alerts, ready = [], []
    for place, value in enumerate([1.0, 1.02, 1.04, 8.3, 8.3]):
        alerts += live.probe(
            100 * (place + 1), {"branch_norm": {"a": value, "b": 1.0 + 0.02 * (place % 2)}}
        ).alerts
        ready.append(OF_NORMS not in live.waits())
        assert "JD504" not in live.waits()
    assert ready == [False, False, True, True, True]
    assert [(alert.step, alert.code, alert.where) for alert in alerts] == [(500, "JD504", ["a"])]


def test_a_loop_without_a_loss_never_has_the_rule_that_needs_one() -> None:
    live = LiveRules(LIMITS)
    for f in healthy(200):
        live.step(StepFigures(f.step, None, f.gradient, 1e-3))
    assert "JD502" in live.waits() and "JD501" not in live.waits()


@pytest.mark.parametrize(
    ("gradient", "after_clipping", "fires"),
    [(9.0, False, True), (1.6, False, False), (9.0, True, False)],
)
def test_a_loss_that_hardly_moves_needs_a_gradient_as_far_out(
    gradient: float, after_clipping: bool, fires: bool
) -> None:
    """Adapters on a frozen model: losses scatter by 0.01, and a corrupted batch lifts one by
    0.09.
    """
    live, source = LiveRules(LIMITS), random.Random(0)
    for step in range(1, 90):
        norm = 0.3 * math.exp(source.gauss(0, 0.12))
        assert not live.step(
            StepFigures(step, 3.7 + source.gauss(0, 0.01), norm, after_clipping=after_clipping)
        ).alerts
    alerts = live.step(StepFigures(90, 3.79, 0.3 * gradient, after_clipping=after_clipping)).alerts
    assert [alert.code for alert in alerts] == ["JD502"] * fires


@pytest.mark.parametrize("block", [1, 2, 7, 10, 64])
def test_steps_that_are_expected_are_judged_to_the_last_bit_as_others(block: int) -> None:
    figures = list(healthy(150))
    figures[80] = spike(80, 9.0, 30.0)
    figures[90] = StepFigures(90, math.nan, 0.7, 1e-3)
    figures[100] = StepFigures(100, 2.5, math.inf, 1e-3)
    figures[110] = StepFigures(110, 2.5, 0.7, 1e-3, skipped=True)
    alone, expecting = LiveRules(LIMITS, ["a", "b", "c"]), LiveRules(LIMITS, ["a", "b", "c"])
    results: list[Any] = []
    for start in range(0, len(figures), block):
        steps = figures[start : start + block]
        # What was expected may not come: here every third block lacks its second step.
        expecting.expect(steps if start % 3 else [*steps[:1], *steps[2:]])
        results += map(expecting.step, steps)
    assert results == [alone.step(f) for f in figures]
    assert repr(expecting.state()) == repr(alone.state())


@pytest.mark.parametrize("logarithm", [False, True])
def test_lines_that_are_fitted_at_once_are_those_that_are_fitted_alone(logarithm: bool) -> None:
    source = random.Random(1)
    recent = RecentTrend(logarithm=logarithm)
    for _ in range(70):
        recent.add(source.lognormvariate(0.0, 1.0))
    coming = [source.lognormvariate(0.0, 1.0) for _ in range(20)]
    recent.foresee(coming)
    assert len(recent._foreseen) == 20
    for value in coming:
        recent.add(value)
        assert recent._line == fit_line(recent.values, floor=recent._floor)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("a", ""),
        ("ab", "; 1 more sub-layer with it, which of the two first is not known"),
        ("abc", "; 2 more sub-layers with it, which of them first is not known"),
    ],
)
def test_other_sublayers_that_leave_their_trend_are_counted(names: str, words: str) -> None:
    live = LiveRules(LIMITS)
    alerts = []
    for place, logit in enumerate([1.0, 1.1, 1.2, 1.3, 40.0, 41.0]):
        figures = {"logit": dict.fromkeys(names, logit)}
        alerts += live.statistics(25 * place, figures).alerts
    (alert,) = alerts
    assert alert.what.endswith(f"since which it has been so{words}")
