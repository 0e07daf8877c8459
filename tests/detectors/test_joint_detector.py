"""The joint detector on made-up series: lifts that no single step shows, updates that leap, noise
of every kind.
"""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
from detectors.runs import LIMITS, codes, fed, healthy, spike

from jacdiag.detectors.joint_detector import JointDetector, StepScores
from jacdiag.detectors.live_rules import LiveRules, StepFigures
from jacdiag.detectors.sustained_rise import SustainedRise
from jacdiag.rules.thresholds import load_thresholds


def lifted(loss: float, gradient: float, steps: int, at: int = 500) -> list[StepFigures]:
    """Steps that stand out by so many standard deviations of `healthy`'s scatter on average, not
    one by one.
    """
    made = healthy(at + steps, seed=5)
    return [
        StepFigures(
            f.step,
            (f.loss or 0) + 0.05 * loss * (f.step >= at),
            f.gradient + 0.2 * gradient * (f.step >= at),
        )
        for f in made
    ]


def test_a_lift_of_both_is_seen_in_some_steps_and_of_one_alone_is_not() -> None:
    live = LiveRules(LIMITS)
    found = [a for f in lifted(4.0, 4.0, 40) for a in live.step(f).alerts]
    assert [a.code for a in found] == ["JD501"] and 504 <= found[0].step < 520
    evidence = found[0].evidence
    assert evidence["steps"] in (4, 16) and min(evidence["loss_z"], evidence["gradient_z"]) > 5
    assert codes(LiveRules(LIMITS), lifted(4.0, 0.0, 40)) == []
    assert codes(LiveRules(LIMITS), lifted(0.0, 4.0, 40)) == []


def test_falling_loss_does_not_widen_the_scatter() -> None:
    """At step 300 the last 300 losses spread over 3 nats, and scatter by 0.05: by their spread
    nothing is seen.
    """

    def falling(lift: float) -> list[StepFigures]:
        source = random.Random(2)
        loss = [
            2 + 4 * math.exp(-step / 60) + source.gauss(0, 0.05) + lift * (step >= 300)
            for step in range(330)
        ]
        return [
            StepFigures(k, v, 1 + source.gauss(0, 0.1) + 2 * lift * (k >= 300))
            for k, v in enumerate(loss)
        ]

    assert np.std([f.loss for f in falling(0)[:300]]) > 12 * 0.05
    assert codes(LiveRules(LIMITS), falling(0)) == []
    assert [code for _, code in codes(LiveRules(LIMITS), falling(0.2))] == ["JD501"]


def gauss(source: random.Random) -> float:
    return source.gauss(0, 1)


def student(freedom: float) -> Any:
    return lambda source: (
        source.gauss(0, 1) / math.sqrt(source.gammavariate(freedom / 2, 2 / freedom))
    )


NOISE = {
    "Gaussian": gauss,
    "Student t, 3": student(3),
    "Student t, 2": student(2),
    "lognormal": lambda source: math.exp(0.7 * source.gauss(0, 1)),
    "uniform": lambda source: source.uniform(-1, 1),
}


# Every shape of noise, once without memory and once with it; the fast tests take the two most
# common. With memory the heavy tails are the harder of the two.
RARE = [name for name in NOISE if name not in ("Gaussian", "Student t, 3")]


@pytest.mark.parametrize(
    ("noise", "memory"),
    [
        ("Gaussian", 0.0),
        ("Student t, 3", 0.0),
        ("Student t, 3", 0.8),
        *(pytest.param(name, 0.0, marks=pytest.mark.long) for name in RARE),
        *(pytest.param(name, 0.8, marks=pytest.mark.long) for name in ("Gaussian", *RARE)),
    ],
)
def test_heavy_tailed_and_autocorrelated_noise_give_no_alert(noise: str, memory: float) -> None:
    """20,000 steps. Without memory loss and gradient norm are one and the same number, which is the
    worst case.

    With memory a shock of 20 deviations lasts for steps: one figure over 8 for three steps is an
    alert as published.
    """
    source, loss, gradient, found = random.Random(11), 0.0, 0.0, []
    live = LiveRules(LIMITS)
    for step in range(20_000):
        loss, gradient = (
            memory * loss + NOISE[noise](source),
            memory * gradient + NOISE[noise](source),
        )
        found += live.step(
            StepFigures(step, 3 + 0.02 * loss, 3 + 0.02 * (gradient if memory else loss))
        ).alerts
    assert [a for a in found if a.code == "JD501" and ("steps" in a.evidence or not memory)] == []


def test_two_isolated_spikes_are_no_joint_lift() -> None:
    live = fed()
    row = [
        spike(500 + k, 9.0 if k in (0, 2) else 2.9, 30.0 if k in (0, 2) else 1.2) for k in range(20)
    ]
    assert "JD501" not in [code for _, code in codes(live, row)]


def stepped(live: LiveRules, rates: list[float], calm: bool = True) -> list[tuple[int, str]]:
    """Updates that follow the learning rate at once; if not calm, the gradient norm stands out from
    step 400 on.
    """
    source = random.Random(4)
    found = []
    for step, lr in enumerate(rates):
        gradient = 1 + source.gauss(0, 0.1) + (0.6 if step >= 400 and not calm else 0)
        f = StepFigures(
            step, 2 + source.gauss(0, 0.05), gradient, lr, update=("abcd"[step % 4], 1.2 * lr)
        )
        found += [(a.step, a.code) for a in live.step(f).alerts]
    return found


def test_leaping_updates_alert_only_together_with_another_signal() -> None:
    leap = [1e-3] * 400 + [3e-2] * 4
    (alert,) = stepped(LiveRules(LIMITS), leap, calm=False)
    assert alert[1] == "JD501" and 402 <= alert[0] <= 403  # three sub-layers in turn
    assert stepped(LiveRules(LIMITS), [1e-3] * 400 + [3e-2] * 2, calm=False) == []
    # under the alarm of the field
    assert stepped(LiveRules(LIMITS), [1e-3] * 400 + [5e-3] * 4, calm=False) == []
    warm_up = [3e-2 * min(step / 300, 1.0) for step in range(404)]
    assert stepped(LiveRules(LIMITS), warm_up, calm=False) == []
    quiet = LiveRules(load_thresholds({"gradient_z": {"info": 1e9}}))
    assert stepped(quiet, leap) == []


def test_lift_goes_on_exactly_from_its_state() -> None:
    import json

    source = random.Random(0)
    one = SustainedRise()
    for _ in range(700):
        one.add(2 + source.gauss(0, 0.1), outlier=source.random() < 0.02)
    other = SustainedRise()
    other.load(json.loads(json.dumps(one.state())))
    for _ in range(300):
        value = 2.2 + source.gauss(0, 0.1)
        assert one.z(value) == pytest.approx(other.z(value), rel=1e-9)
        one.add(value)
        other.add(value)


def test_lift_of_white_noise_is_a_z_score() -> None:
    """Means of 4 and 16 steps over their own deviation scatter by about 1, and lie a little low: a
    chance rise of the level is carried forward, which is by 0.075 deviations of one step on
    average, so 0.15 and 0.3 of those means.
    """
    source, lift, found = np.random.default_rng(3), SustainedRise(), {4: [], 16: []}  # type: ignore[var-annotated]
    for value in source.normal(5, 0.3, 6000).tolist():
        for span, z in lift.z(value).items():
            if z < 2:  # above it three steps are asked for
                found[span].append(z)
        lift.add(value)
    assert lift.level() == pytest.approx(5, abs=0.15)
    for scores in found.values():
        assert -0.5 < np.mean(scores) < 0 and 0.75 < np.std(scores) < 1.2


def test_what_is_not_finite_or_too_early_is_no_lift() -> None:
    lift = SustainedRise()
    for value in (math.nan, math.inf):
        lift.add(value)
    assert lift.count == 0 and lift.z(1.0) == {}
    for _ in range(76):
        lift.add(1.0)
    assert lift.z(math.nan) == {} and set(lift.z(1.0)) == {4, 16}


def test_leaps_of_different_factors_are_not_said_to_be_one() -> None:
    """Nor is the loss said to stand out if the gradient norm does."""
    detector = JointDetector(LIMITS)
    calm, loud = StepScores(), StepScores(gradient_ema=5.0)
    for step in range(48):
        assert detector.look(step, 2.0, 1.0, calm, ("abcd"[step % 4], 1e-3)) is None
    alarm = None
    for step, ratio in zip(range(48, 51), (2e-2, 3e-2, 6.6e-2), strict=True):
        alarm = detector.look(step, 2.0, 1.0, loud, ("abcd"[step % 4], ratio))
    assert alarm is not None
    assert "the last 3 updates that were measured are over 10 times their usual share" in alarm.what
    assert "the last one 66.0 times, and the gradient norm stands 5.00 standard" in alarm.what
    assert "loss" not in alarm.what
