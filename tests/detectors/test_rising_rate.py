"""JD105 in a run: from which learning rate on it speaks, once a level, and where it is silent."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rules.curves import by_warmup, limits
from rules.reports import healthy, report

import jacdiag
from jacdiag.detectors.live_rules import LiveRules, StepFigures
from jacdiag.records import Report
from jacdiag.records.risk import RiskCurve, RiskTable
from jacdiag.rules.risk_curves import risk_toml
from jacdiag.rules.thresholds import Thresholds

# lr, where chance = limit
CROSSES = {cut: limit / (1 - limit) for cut, limit in (("warning", 0.3), ("error", 0.5))}


def untrained(**other: object) -> Report:
    made = report(healthy(), source={"format": "live", "step": 0})
    return replace(made, **other)  # type: ignore[arg-type]


def knowing(made: Report | None = None) -> LiveRules:
    """The chance at lr is lr / (1 + lr); 1 is the highest that was run. The rate begins at
    nothing.
    """
    return begun(limits(0.0), made or untrained())


def begun(thresholds: Thresholds, made: Report) -> LiveRules:
    live = LiveRules(thresholds)
    live.know(made)
    live.step(StepFigures(0, 2.0, 1.0, 0.0))
    return live


def said(live: LiveRules, rates: list[float], start: int = 1) -> list[tuple[int, str, str]]:
    steps = [StepFigures(start + k, 2.0, 1.0, lr) for k, lr in enumerate(rates)]
    return [(a.step, a.code, a.level) for f in steps for a in live.step(f).alerts]


def test_rising_rate_alerts_once_per_level() -> None:
    live = knowing()
    assert said(live, [CROSSES["warning"] * (1 - 1e-9)]) == []  # on the boundary nothing is said
    assert said(live, [CROSSES["warning"] * (1 + 1e-6), 0.9, 0.1, 0.9, 0.95], start=2) == [
        (2, "JD105", "warning")
    ]
    # 1 is inside, and the chance 50%: not above it
    assert said(live, [CROSSES["error"] + 1e-6, 1.0], start=9) == []
    other = begun(limits(1.0), untrained())
    assert said(other, [0.01, 0.9, 1.0]) == [(2, "JD105", "error")]  # the loudest level alone


def test_rising_rate_message_has_the_probability_and_its_source() -> None:
    (alert,) = [
        a
        for step, lr in ((1, 0.1), (2, 0.5))
        for a in knowing().step(StepFigures(step, 2.0, 1.0, lr)).alerts
    ]
    assert (
        "the learning rate has risen to 0.5: a chance of 33%" in alert.what
        and "warning above 30%" in alert.what
    )
    known = {"field": "risk", "lr": 0.5, "threshold": 0.3, "figure": "worst branch norm"}
    assert known.items() <= alert.evidence.items() and alert.evidence["value"] == pytest.approx(
        1 / 3
    )
    assert "100 runs" in alert.evidence["range"] and not alert.where


@pytest.mark.parametrize(
    "made",
    [
        untrained(state="trained"),
        untrained(tier="weights"),
        untrained(source={"format": "live", "step": 40}),
        untrained(sublayers=[replace(row, placement="post") for row in healthy()]),
        untrained(model=replace(untrained().model, width=4096)),
        untrained(model=replace(untrained().model, layers=None)),
    ],
    ids=[
        "trained",
        "structure alone",
        "a later probe",
        "no curve",
        "wider than what was run",
        "depth not known",
    ],
)
def test_rising_rate_gives_no_alert_outside_the_curves(made: Report) -> None:
    assert said(knowing(made), [0.1, 0.5, 0.9]) == []


def test_rising_rate_gives_no_alert_at_rates_outside_the_data() -> None:
    assert said(knowing(), [3.0, math.nan]) == []
    assert said(LiveRules(limits(0.0)), [0.5, 0.9]) == []  # no probe was made


# by_warmup: odds of e^2 lr / warm-up, over 3 to 7 where lr / warm-up is over it
EDGE = 3 / (7 * math.exp(2))


def test_the_warm_up_of_a_linear_rise_is_the_steps_so_far() -> None:
    live = begun(by_warmup(), untrained())
    assert said(live, [0.99 * EDGE * step for step in range(1, 25)]) == []
    steeper = begun(by_warmup(), untrained())
    rates = [1.01 * EDGE * step for step in range(1, 25)]
    assert said(steeper, rates) == [(10, "JD105", "warning")]  # 10 is the shortest


def test_a_leap_counts_as_the_shortest_warm_up_and_a_long_rise_as_the_longest() -> None:
    assert said(begun(by_warmup(), untrained()), [11 * EDGE]) == [(1, "JD105", "warning")]
    assert said(begun(by_warmup(), untrained()), [9.9 * EDGE]) == []
    slow = begun(by_warmup(), untrained())  # e^2 / 1,000 at the longest that was run
    assert said(slow, [step / 5000 for step in range(1, 5001)]) == []
    late = begun(by_warmup(), untrained())
    assert said(late, [0.01] * 500 + [0.6], start=1) == [(501, "JD105", "warning")]


@pytest.mark.parametrize("rates", [[11 * EDGE] * 3, [11 * EDGE, 10.9 * EDGE]])
def test_a_rate_that_begins_where_it_stays_was_there_in_one_step(rates: list[float]) -> None:
    live = LiveRules(by_warmup())
    live.know(untrained())
    assert said(live, rates) == [(2, "JD105", "warning")]


def test_no_rate_at_all_says_nothing() -> None:
    assert said(begun(by_warmup(), untrained()), [0.0, 0.0, 0.0]) == []


def test_a_later_probe_changes_nothing() -> None:
    live = knowing()
    live.know(replace(untrained(), sublayers=[], source={"format": "live", "step": 200}))
    assert said(live, [0.5]) == [(1, "JD105", "warning")]


def test_rising_rate_state_survives_a_checkpoint() -> None:
    live = knowing()
    assert said(live, [0.1]) == []
    again = LiveRules(limits(0.0))  # the rate stood at 0.1 when it was saved
    again.load(json.loads(json.dumps(live.state())))
    assert said(again, [0.1, 0.5, 0.6], start=2) == [(3, "JD105", "warning")]
    third = LiveRules(limits(0.0))
    third.load(json.loads(json.dumps(again.state())))
    assert said(third, [0.7], start=5) == []


def test_a_skipped_step_says_it_too() -> None:
    verdict = knowing().step(StepFigures(1, None, math.inf, 0.5, skipped=True))
    assert [a.code for a in verdict.alerts] == ["JD105"]


def test_watch_accepts_user_risk_curves(tmp_path: Path) -> None:
    from monitor.rig import adam, lines, plain_step, small

    curve = RiskCurve(
        "pre",
        "worst branch norm",
        [20.0, 0.0, 1.0],
        [[0.0] * 3] * 3,
        {"figure": [1e-9, 1e9], "lr": [1e-9, 1.0]},
        9,
        4,
        "a lab",
    )
    file = tmp_path / "risk.toml"
    file.write_text(risk_toml(RiskTable({"pre": curve})), encoding="utf-8")
    model = small()
    optimizer = adam(model)
    with jacdiag.watch(
        model, optimizer, log_dir=tmp_path / "run", risk=file, quiet=True, strict=True
    ) as w:
        for step in range(1, 4):
            loss, norm = plain_step(model, optimizer, step)
            w.step(loss, grad_norm=norm)
    (alert,) = [row for row in lines(tmp_path / "run", "alert") if row["code"] == "JD105"]
    assert (alert["step"], alert["level"]) == (2, "error")
    with pytest.raises(jacdiag.JacdiagError, match=r"none\.toml"):
        jacdiag.watch(model, optimizer, risk=tmp_path / "none.toml", quiet=True)
