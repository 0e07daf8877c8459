"""What a rule does after it has fired: which event alerts, which is noted, which is the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from detectors.runs import LIMITS, codes, fed, healthy, spike

from jacdiag.detectors.live_rules import LiveRules
from jacdiag.detectors.quiet_time import QUIET, Occurrence, QuietTime, Reaction
from jacdiag.detectors.step_figures import StepFigures
from jacdiag.detectors.written_weights import OutsideWrites, WrittenWeight


def written(step: int, *names: str, change: float = 2.0, count: int | None = None) -> StepFigures:
    """Return the figures of a step before which weights were written."""
    weights = [WrittenWeight(name=n, change=change, times=2.0, scaled=False) for n in names]
    writes = OutsideWrites(after=step - 1, count=count or len(names), of=99, weights=weights)
    return replace(spike(step, 2.0, 1.0), written=writes)


# -- weights ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("pause", [1, 5, 40, 120])
def test_each_weight_has_a_quiet_time_of_its_own(pause: int) -> None:
    live = fed()
    steps = [written(500, "a.weight"), written(500 + pause, "b.weight")]
    assert codes(live, steps) == [(500, "JD508"), (500 + pause, "JD508")]


def test_a_weight_that_is_written_at_every_step_fires_once() -> None:
    live = fed()
    every_step = [written(500 + k, "a.weight", "b.weight") for k in range(QUIET)]
    assert codes(live, every_step) == [(500, "JD508")]
    (again,) = live.step(written(500 + QUIET, "a.weight", "b.weight")).alerts
    assert again.suppressed == QUIET - 1


def test_weights_that_could_not_be_named_are_quiet_too() -> None:
    """At every step all of 99 weights are written, and the log names two others each time."""
    live = fed()
    every_step = [written(500 + k, f"w{k}", f"v{k}", count=99) for k in range(QUIET)]
    assert codes(live, every_step) == [(500, "JD508")]


def test_a_weight_that_was_only_touched_is_not_quiet() -> None:
    """The sentence of step 500 names it behind another one. It was changed by 2% then."""
    live = fed()
    first = written(500, "a.weight")
    assert first.written is not None
    touched = WrittenWeight(name="b.weight", change=0.02, times=1.0, scaled=False)
    both = replace(first.written, count=2, weights=[*first.written.weights, touched])
    steps = [replace(first, written=both), written(505, "b.weight")]
    assert codes(live, steps) == [(500, "JD508"), (505, "JD508")]


# -- spikes ----------------------------------------------------------------------------------------
def test_a_second_spike_in_the_quiet_time_is_a_repeat() -> None:
    live = fed()
    assert codes(live, [spike(500, 9.0, 30.0)]) == [(500, "JD502")]
    assert codes(live, healthy(79, start=501)) == []
    result = live.step(spike(580, 9.0, 30.0))
    assert result.alerts == []
    (repeat,) = result.repeats
    text = str(repeat)
    assert text.startswith("JD502 again at step 580: the loss stands ")
    assert text.endswith("the rule fired at step 500, and is quiet for 200 steps from there")


def test_a_spike_that_lasts_is_one_event() -> None:
    live = fed()
    results = [live.step(spike(500 + k, 9.0 + k, 30.0 + k)) for k in range(100)]
    assert [alert.code for r in results for alert in r.alerts].count("JD502") == 1
    assert [repeat for r in results for repeat in r.repeats] == []


def test_a_healthy_run_after_a_spike_has_no_repeat() -> None:
    """JD501 looks back 16 steps, over the end of the spike."""
    live = fed()
    for step in range(500, 506):
        live.step(spike(step, 9.0, 30.0))
    results = [live.step(f) for f in healthy(100, start=506)]
    assert [repeat for r in results for repeat in r.repeats] == []


# -- values that are not finite --------------------------------------------------------------------
def nonfinite(step: int, gradients: Sequence[str] = ()) -> StepFigures:
    """Return a step whose loss is finite, and the gradients of some parameters are not."""
    return StepFigures(
        step,
        2.0,
        math.nan,
        nonfinite=["a"],
        bad_weights=[],
        bad_gradients=list(gradients),
        with_gradient=9,
        weights_seen=True,
    )


def test_a_value_that_spreads_is_one_event() -> None:
    live = LiveRules(LIMITS, ["a"])
    steps = [nonfinite(10, ["a.weight"]), nonfinite(11, ["a.weight", "b.weight"])]
    assert codes(live, steps) == [(10, "JD505")]


def test_another_gradient_after_finite_steps_fires() -> None:
    live = LiveRules(LIMITS, ["a"])
    steps = [
        nonfinite(10, ["a.weight"]),
        StepFigures(11, 2.0, 1.0),
        nonfinite(12, ["b.weight"]),
    ]
    assert codes(live, steps) == [(10, "JD505"), (12, "JD505")]


def test_the_same_again_after_finite_steps_is_a_repeat() -> None:
    live = LiveRules(LIMITS, ["a"])
    live.step(StepFigures(10, math.nan, math.nan, skipped=True))
    live.step(StepFigures(11, 2.0, 1.0))
    live.step(StepFigures(12, 2.0, 1.0))
    result = live.step(StepFigures(13, math.nan, math.nan, skipped=True))
    assert result.alerts == [] and [repeat.after for repeat in result.repeats] == [10]


def test_skips_fire_though_a_loss_that_was_not_finite_has() -> None:
    live = LiveRules(LIMITS, ["a"])
    live.step(StepFigures(10, math.nan, math.nan, skipped=True))
    live.step(StepFigures(11, 2.0, 1.0))
    skips = [StepFigures(12 + k, 2.0, math.nan, skipped=True, overflow=True) for k in range(30)]
    assert codes(live, skips) == [(21, "JD505")]


# -- drifts ----------------------------------------------------------------------------------------
def test_the_drift_of_another_sublayer_fires() -> None:
    live = LiveRules(LIMITS, ["a", "b"])
    fired = []
    for turn in range(20):
        first = 4.0 if turn >= 8 else 1.0
        second = 4.0 if turn >= 11 else 1.0
        figures = {"branch_norm": {"a": first, "b": second}}
        fired += [(alert.step, alert.where) for alert in live.probe(turn * 10, figures).alerts]
    assert fired == [(90, ["a"]), (120, ["b"])]


# -- the class itself ------------------------------------------------------------------------------
def test_loops_that_leave_numbers_out_have_events_too() -> None:
    quiet = QuietTime()
    reactions = []
    for step in (10, 20, 30, 40):
        quiet.begin_step(step)
        if step != 30:
            reactions.append(quiet.react(Occurrence(topic="JD502", step=step, since=step)))
    assert reactions == [Reaction.ALERT, Reaction.NOTHING, Reaction.REPEAT]


def test_a_state_is_gone_on_from_and_that_of_an_older_version_too() -> None:
    quiet = QuietTime()
    quiet.begin_step(10)
    quiet.react(Occurrence(topic="JD508", step=10, since=10, names=["w"]))
    after = QuietTime()
    after.load({**quiet.state(), "JD502:": 10})
    after.begin_step(50)
    same = Occurrence(topic="JD508", step=50, since=50, names=["w"])
    other = Occurrence(topic="JD508", step=50, since=50, names=["v"])
    spiked = Occurrence(topic="JD502", step=50, since=50)
    assert after.react(same) is not Reaction.ALERT
    assert after.react(spiked) is not Reaction.ALERT
    assert after.react(other) is Reaction.ALERT
