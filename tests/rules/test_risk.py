"""JD105 on curves and reports made by hand: fires, does not, undecided, and where there is no
chance.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from rules.curves import NONE, RANGES, WIDE, by_warmup, limits
from rules.reports import healthy, report

from jacdiag.records import Interval, Plan, Report
from jacdiag.records.risk import RiskTable
from jacdiag.rules import evaluate
from jacdiag.rules.thresholds import Thresholds, load_thresholds


def judged(thresholds: Thresholds, made: Report | None = None, lr: float | None = 1.0) -> Report:
    made = made or report(healthy())
    made = replace(made, plan=Plan(lr=lr), model=replace(made.model, width=64))
    return evaluate(made, thresholds=thresholds, select=["JD105"])


@pytest.mark.parametrize(
    ("intercept", "covariance", "level"),
    [
        (2.0, NONE, "error"),
        (-0.7, NONE, "warning"),
        (-3.0, NONE, None),
        (0.5, WIDE, None),
        (4.5, WIDE, "error"),
        (3.3, WIDE, "warning"),
    ],
)
def test_the_whole_interval_must_lie_beyond_a_cut(
    intercept: float, covariance: list[list[float]], level: str | None
) -> None:
    made = judged(limits(intercept, covariance))
    assert made.risk is not None and made.risk.chance == pytest.approx(
        1 / (1 + math.exp(-intercept))
    )
    assert [f.level for f in made.findings] == ([level] if level else [])
    assert made.rules[0].status == (
        "fired" if level else "clean" if covariance is NONE else "unknown"
    )


def test_on_the_boundary_nothing_is_said() -> None:
    cut = load_thresholds().limits("risk").warning
    assert cut is not None
    made = judged(limits(math.log(cut / (1 - cut)) - 1e-9))
    assert not made.findings and made.rules[0].status == "clean"


def test_without_a_learning_rate_there_is_no_chance() -> None:
    made = judged(limits(2.0), lr=None)
    assert made.risk is None and made.rules[0].status == "not-applicable"


def test_the_learning_rate_enters() -> None:
    low, high = judged(limits(0.0), lr=1e-3).risk, judged(limits(0.0), lr=0.5).risk
    assert low is not None and high is not None and low.chance < 1e-2 < 0.3 < high.chance  # type: ignore[operator]


def outside(made: Report, lr: float = 1.0) -> str:
    found = judged(limits(2.0), made, lr)
    assert found.risk is not None and found.risk.chance is None and not found.findings
    assert found.rules[0].status == "not-applicable" and found.rules[0].note == found.risk.reason
    return found.risk.reason


def test_outside_of_what_was_run_there_is_no_chance_and_the_reason_is_told() -> None:
    plain = report(healthy())
    assert outside(plain, lr=3.0) == "outside the calibrated range: lr 3, 0.0001 to 1 were run"
    assert "layers 40, 1 to 12 were run" in outside(
        replace(plain, model=replace(plain.model, layers=40))
    )
    rows = [replace(row, branch_norm=Interval.exact(1e4)) for row in plain.sublayers]
    assert "worst branch norm 10,000, 0.01 to 100 were run" in outside(
        replace(plain, sublayers=rows)
    )
    rows = [replace(row, branch_norm=None) for row in plain.sublayers]
    assert "worst branch norm not known" in outside(replace(plain, sublayers=rows))
    rows = [replace(row, placement="post") for row in plain.sublayers]
    assert "no curve for this placement (post-norm)" in outside(replace(plain, sublayers=rows))
    assert "of untrained models" in outside(replace(plain, state="trained"))


@pytest.mark.parametrize(
    ("warmup", "told"),
    [
        (10, 0.4249),
        (100, 0.0688),
        (None, "depends on the warm-up"),
        (9, "warm-up 9, 10 to 1,000 were run"),
        (0, "warm-up 0"),
    ],
)
def test_the_warm_up_enters_where_the_curve_asks_for_it(
    warmup: int | None, told: float | str
) -> None:
    made = report(healthy())
    made = replace(made, plan=Plan(lr=1.0, warmup=warmup), model=replace(made.model, width=64))
    found = evaluate(made, thresholds=by_warmup(), select=["JD105"]).risk
    assert found is not None
    if isinstance(told, str):
        assert found.chance is None and told in found.reason
    else:
        assert found.chance == pytest.approx(told, abs=1e-4)


def in_the_lab(plan: Plan, **ranges: list[float]) -> Report:
    """Judge a plan by curves of runs that all clipped at 1 and had a beta2 of 0.95, unless `ranges`
    says otherwise.
    """
    limit = limits(2.0)
    spans = {**RANGES, "clip": [1.0, 1.0], "beta2": [0.95, 0.95], **ranges}
    curve = replace(limit.risk.curves["pre"], ranges=spans)
    made = report(healthy())
    made = replace(made, plan=plan, model=replace(made.model, width=64))
    return evaluate(
        made, thresholds=replace(limit, risk=RiskTable({"pre": curve})), select=["JD105"]
    )


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (Plan(lr=1.0, clip=0.5), "outside the calibrated range: clip 0.5, 1 was run"),
        (Plan(lr=1.0, beta2=0.999), "outside the calibrated range: beta2 0.999, 0.95 was run"),
        (Plan(lr=1.0, clip=2.0, beta2=0.9), "clip 2, 1 was run; beta2 0.9, 0.95 was run"),
    ],
)
def test_another_clip_or_beta2_than_the_runs_had_has_no_chance(plan: Plan, reason: str) -> None:
    judged = in_the_lab(plan)
    assert judged.risk is not None
    assert judged.risk.chance is None and judged.risk.reason.endswith(reason)
    assert not judged.findings and judged.rules[0].status == "not-applicable"
    assert judged.rules[0].note == judged.risk.reason


@pytest.mark.parametrize(
    "plan", [Plan(lr=1.0), Plan(lr=1.0, clip=1.0), Plan(lr=1.0, clip=1.0, beta2=0.95)]
)
def test_the_runs_own_clip_and_beta2_or_none_given_have_a_chance(plan: Plan) -> None:
    judged = in_the_lab(plan)
    assert judged.risk is not None and judged.risk.chance is not None
    assert judged.findings
    assert "clip 1, beta2 0.95" in judged.risk.range


def test_a_clip_between_those_that_were_run_has_a_chance() -> None:
    inside = in_the_lab(Plan(lr=1.0, clip=0.5), clip=[0.1, 1.0]).risk
    outside = in_the_lab(Plan(lr=1.0, clip=5.0), clip=[0.1, 1.0]).risk
    assert inside is not None and inside.chance is not None
    assert outside is not None and outside.reason.endswith("clip 5, 0.1 to 1 were run")


def test_curves_that_do_not_say_the_clip_of_their_runs_ask_for_none() -> None:
    made = report(healthy())
    made = replace(
        made, plan=Plan(lr=1.0, clip=7.0, beta2=0.5), model=replace(made.model, width=64)
    )
    risk = evaluate(made, thresholds=limits(2.0), select=["JD105"]).risk
    assert risk is not None and risk.chance is not None


def test_the_curves_that_ship_say_the_clip_and_beta2_of_their_runs() -> None:
    for curve in load_thresholds().risk.curves.values():
        assert curve.ranges["clip"] == [1.0, 1.0]
        assert curve.ranges["beta2"] == [0.95, 0.95]
