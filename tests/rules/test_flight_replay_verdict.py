"""Was it the batch? Each verdict on numbers for which it is true, and on neighbours for which it
would be false.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from jacdiag.records.flight_replay import LevelRecord
from jacdiag.rules.flight_replay import (
    GRADIENT,
    LEAST_ROWS,
    LOSS,
    WINDOW,
    Figure,
    ReplayContext,
    decide,
    first_out,
    is_out,
    out_of_range,
    usual_value,
)

USUAL = LevelRecord(center=2.0, spread=0.1, count=32, first=68, last=99)
OTHERS = [1.9, 2.1, 2.0, 1.95, 2.05, 1.9, 2.1, 2.0, 2.0]
AT = ReplayContext(step=100, checkpoint_step=99)


def loss(suspects: Sequence[float], others: Sequence[float] = OTHERS, **more: Any) -> Figure:
    options: dict[str, Any] = {"at_step": 7.0, "before": USUAL, "at_checkpoint": USUAL, **more}
    return Figure(name=LOSS, suspects=suspects, others=others, **options)


def verdict(*figures: Figure, context: ReplayContext = AT) -> tuple[str, str]:
    decision = decide(figures, context)
    start = {"batch": "The batch:", "weights": "The weights:", "not decided": "Not decided:"}[
        decision.verdict
    ]
    assert decision.sentence.startswith(start)
    assert decision.sentence.endswith(".") and not decision.sentence.endswith("..")
    return decision.verdict, decision.sentence


# -- the batch -------------------------------------------------------------------------------------
@pytest.mark.parametrize("step", [99, 100, 140, 60, None])
def test_a_batch_that_alone_stands_out_is_named_on_weights_of_any_step(step: int | None) -> None:
    named, text = verdict(loss([7.0]), context=ReplayContext(step=100, checkpoint_step=step))
    assert named == "batch"
    assert "its loss is 7" in text and "9 other kept batches have 1.90 to 2.10" in text
    assert "The run had 7 at step 100, and 2 before" in text.replace("7.00", "7").replace(
        "2.00", "2"
    )


def test_half_of_the_jump_is_the_boundary() -> None:
    assert verdict(loss([4.6]))[0] == "batch"  # 2.6 of a jump of 5
    named, text = verdict(loss([4.4]))
    assert named == "not decided" and "shows less than half of the run's jump" in text
    assert "what made the rest of the jump is in neither" in text


def test_a_batch_out_of_range_in_a_run_without_a_jump_is_not_named() -> None:
    named, text = verdict(loss([7.0], at_step=2.1))
    assert named == "not decided" and "usual for it, while the batch is out of the range" in text


def test_where_the_run_logged_nothing_the_range_of_the_others_decides() -> None:
    assert verdict(loss([7.0], at_step=None))[0] == "batch"
    named, text = verdict(loss([2.1], at_step=None))
    assert named == "not decided" and "the run's own values are not known" in text
    # A figure whose jump is not known does not outvote one whose jump is known to be none.
    gradient = Figure(name=GRADIENT, suspects=[50.0], others=[1.0, 1.1, 0.9, 1.0, 1.05])
    assert verdict(loss([2.1], at_step=2.1), gradient)[0] == "not decided"


def test_one_sequence_out_of_range_counts_if_the_batch_shows_the_jump() -> None:
    few = [1.0, 2.0, 3.0]  # a range so wide that a batch of 7 is in it
    assert verdict(loss([7.0], few, at_checkpoint=None))[0] == "not decided"
    named, text = verdict(loss([7.0], few, at_checkpoint=None, sequences_out=[3], sequences=8))
    assert named == "batch" and "Of its 8 sequences 1 " in text
    # it does not show the jump
    assert verdict(loss([2.1], sequences_out=[3], sequences=8))[0] == "not decided"


def test_a_batch_that_is_not_finite_is_named_if_the_others_are() -> None:
    assert verdict(loss([math.nan], at_step=math.nan))[0] == "batch"
    assert verdict(loss([math.nan], [math.nan] * 5, at_step=math.nan))[0] == "weights"
    assert verdict(loss([2.0], [math.nan, 2.0, 2.0, 2.0]))[0] == "not decided"
    named, text = verdict(loss([2.0], at_step=math.inf))
    assert named == "not decided" and "has 2" in text


def test_one_of_several_micro_batches_is_enough() -> None:
    assert verdict(loss([2.0, 12.0]))[0] == "batch"
    assert verdict(loss([2.0, 2.1]))[0] == "not decided"


# -- the weights -----------------------------------------------------------------------------------
HIGH = [6.9, 7.1, 7.0, 6.95, 7.05, 6.9, 7.1, 7.0, 7.0]


def test_weights_on_which_ordinary_batches_stand_out_are_named() -> None:
    named, text = verdict(loss([7.0], HIGH))
    assert named == "weights"
    assert "9 other kept batches have a loss of 6.90 to 7.10, where the run had 2" in text
    assert "hold the update" not in text  # the batch met these weights: it cannot have made them so
    _, text = verdict(loss([7.0], HIGH), context=replace(AT, checkpoint_step=100))
    assert (
        "hold the update of step 100: a checkpoint from before it shows whether that batch made "
        "them so" in text
    )


def test_half_of_the_jump_is_the_boundary_for_weights_too() -> None:
    assert verdict(loss([4.6], [x + 2.6 for x in OTHERS]))[0] == "weights"
    assert verdict(loss([4.4], [x + 2.4 for x in OTHERS]))[0] == "not decided"


def test_each_batch_is_compared_with_itself_where_the_run_logged_it() -> None:
    wide = [1.0, 2.0, 3.0, 1.5, 2.5, 5.0, 0.5]  # batches differ more than the weights made them
    now = [x + 0.6 for x in wide]
    level = LevelRecord(2.0, 0.1, 32, 68, 99)
    known = {"at_step": 3.0, "before": level, "at_checkpoint": level}
    assert verdict(loss([2.6], now, **known))[0] == "not decided"
    assert verdict(loss([2.6], now, **known, then=wide))[0] == "weights"
    assert verdict(loss([2.6], wide, **known, then=wide))[0] != "weights"


def test_a_batch_that_is_out_even_on_bad_weights_leaves_it_open() -> None:
    after = replace(AT, checkpoint_step=100)
    named, text = verdict(loss([15.0], HIGH), context=after)
    assert named == "not decided" and "is out even among them (loss 15" in text
    assert text.endswith("A checkpoint from before step 100 would decide.")
    # The checkpoint is one from before that step.
    named, text = verdict(loss([15.0], HIGH))
    assert named == "not decided" and "is out even among them (loss 15" in text
    assert "would decide" not in text and "The batch met these very weights" in text


def test_weights_without_a_step_may_be_early_ones() -> None:
    unknown = ReplayContext(step=100, checkpoint_step=None, highest_before=5.5)
    # no part of the run was that high
    assert verdict(loss([7.0], HIGH), context=unknown)[0] == "weights"
    for highest in (7.5, None):
        named, text = verdict(loss([7.0], HIGH), context=replace(unknown, highest_before=highest))
        assert named == "not decided" and "does not say its step" in text and "save 'step'" in text


def test_weights_that_the_run_was_usual_with_are_not_those_of_the_run() -> None:
    """Step 61 was made with the weights of step 60, and it was usual."""
    named, text = verdict(loss([7.0], HIGH), context=replace(AT, checkpoint_step=60))
    assert named == "not decided" and "the run was still usual with them at the next step" in text
    named, text = verdict(
        loss([7.0], HIGH, met=(7.0, 2.0)), context=replace(AT, checkpoint_step=100)
    )
    assert (
        named == "not decided"
        and "had a loss of 2" in text
        and "is this the checkpoint of this run" in text
    )
    assert (
        verdict(loss([7.0], HIGH, met=(7.0, 6.8)), context=replace(AT, checkpoint_step=100))[0]
        == "weights"
    )


def test_early_weights_as_the_run_had_them_are_not_named() -> None:
    early = LevelRecord(7.0, 0.1, 32, 1, 32)
    named, text = verdict(
        loss([7.0], HIGH, at_checkpoint=early), context=replace(AT, checkpoint_step=16)
    )
    assert named == "not decided" and "84 steps before that step" in text


# -- not decided -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("others", "words"),
    [([], "no other batch"), ([2.0], "1 other batch,"), ([2.0, 2.1], "2 other batches")],
)
def test_too_few_batches_decide_nothing(others: list[float], words: str) -> None:
    named, text = verdict(loss([7.0], others))
    assert named == "not decided" and words in text and "keep_batches" in text
    assert verdict(loss([7.0], [2.0, 2.1, 1.9]))[0] == "batch"  # the boundary: three


def test_a_batch_that_was_not_kept() -> None:
    named, text = verdict(loss([], OTHERS))
    assert (
        named == "not decided"
        and "the batch of step 100 was not kept" in text
        and "keep_batches" in text
    )
    assert verdict(loss([], []))[0] == "not decided"
    assert "no loss" in verdict()[1]


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (60, "40 steps before that step, and a later checkpoint would decide"),
        (99, "what made the jump is in neither"),
        (100, "a checkpoint of step 99, the weights that the batch met, would decide"),
        (None, "a checkpoint that says its step"),
    ],
)
def test_replay_is_undecided_when_neither_batch_nor_weights_stand_out(
    step: int | None, words: str
) -> None:
    named, text = verdict(loss([2.0]), context=ReplayContext(step=100, checkpoint_step=step))
    assert named == "not decided" and words in text


# -- numbers ---------------------------------------------------------------------------------------
def test_the_usual_value_of_a_falling_loss_is_not_as_wide_as_its_fall() -> None:
    noise = random.Random(0)
    rows = [(step, 10 - 0.05 * step + noise.gauss(0, 0.1)) for step in range(1, 101)]
    level = usual_value(rows)
    assert level is not None and level.count == WINDOW and (level.first, level.last) == (69, 100)
    assert level.spread == pytest.approx(0.1, rel=0.5)
    assert (
        usual_value(rows[: LEAST_ROWS - 1]) is None and usual_value(rows[:LEAST_ROWS]) is not None
    )
    spiked = [(step, 50.0 if step == 90 else value) for step, value in rows]
    assert usual_value(spiked).spread == pytest.approx(level.spread, rel=0.3)  # type: ignore[union-attr]


def test_the_first_step_that_stands_out_is_found() -> None:
    noise = random.Random(1)
    rows = [(step, 2 + noise.gauss(0, 0.1) + 3 * (step >= 148)) for step in range(1, 153)]
    assert first_out(rows, 152, logarithm=False) == 148
    assert first_out(rows, 148, logarithm=False) == 148
    calm = [(step, value) for step, value in rows if step < 148]
    assert first_out(calm, 147, logarithm=False) is None
    assert first_out(rows[:5], 5, logarithm=False) is None  # nothing to compare with


@pytest.mark.parametrize("logarithm", [False, True])
def test_false_alarms_of_ordinary_values(logarithm: bool) -> None:
    """At 1e-3 each, 4,000 ordinary values give about 4; the spread is estimated from 32 of them by
    a median.
    """
    noise = random.Random(2)

    def value() -> float:
        drawn = noise.gauss(2.0, 0.1)
        return math.exp(drawn) if logarithm else drawn

    count = 0
    for _ in range(4000):
        history = [(step, math.log(value()) if logarithm else value()) for step in range(32)]
        level = usual_value(history)
        assert level is not None
        count += is_out(value(), level, logarithm=logarithm)
    assert count <= 40  # at most 1%

    batches = [
        out_of_range([value() for _ in range(8)], [value() for _ in range(40)], logarithm=logarithm)
        for _ in range(2000)
    ]
    assert sum(map(any, batches)) <= 10  # of about 2: the chance is that of the whole batch
    assert out_of_range([2.0, 9.0, math.nan], [2.0, 2.1, 1.9, 2.0], logarithm=False) == [
        False,
        True,
        True,
    ]
    assert out_of_range([9.0], [2.0, 2.1], logarithm=False) == [False]


# -- the outcome -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("figure", "checkpoint", "outcome"),
    [
        (loss([7.0]), 99, "batch"),
        (loss([7.0], HIGH), 99, "weights"),
        (loss([7.0], HIGH), 100, "updated weights"),
        (loss([15.0], HIGH), 99, "both"),
        (loss([15.0], HIGH), 100, "too late"),
        (loss([2.0]), 99, "neither"),
        (loss([2.0]), 98, "too early"),
        (loss([2.0]), 100, "too late"),
        (loss([2.0]), None, "unknown step"),
        (loss([4.4]), 60, "too early"),
        (loss([2.1], at_step=2.1), 99, "no jump"),
        (loss([2.1], at_step=None), 99, "no run values"),
        (loss([7.0], HIGH), 60, "other model"),
        (loss([7.0], OTHERS[:2]), 99, "few batches"),
        (loss([], OTHERS), 99, "few batches"),
        (loss([7.0], [1.0, 2.0, 3.0], at_checkpoint=None), 99, "wide range"),
    ],
)
def test_the_outcome_says_why_nothing_was_decided(
    figure: Figure, checkpoint: int | None, outcome: str
) -> None:
    decision = decide([figure], replace(AT, checkpoint_step=checkpoint))
    assert decision.outcome == outcome


def test_the_outcome_of_errors() -> None:
    crashed = replace(AT, crash="IndexError: 7")
    assert decide([loss([2.0])], crashed).outcome == "error gone"
    same = replace(crashed, failed="IndexError: 7")
    assert decide([loss([], OTHERS)], same).outcome == "batch"
    assert decide([loss([], OTHERS)], replace(AT, failed="no file")).outcome == "not runnable"
    assert decide([], AT).outcome == "no loss"
