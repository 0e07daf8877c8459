"""The verdict of a replay stands in the banner, in what to do, in the next command, on the page."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import pytest
from render import synthetic

from jacdiag.records import Report
from jacdiag.records.flight_replay import BatchReplay, ReplayOutcome, ReplayRecord, SequenceReplay
from jacdiag.render.content.flight_replay import replay_facts
from jacdiag.render.content.next_step import next_step
from jacdiag.render.html.pages import report_page
from jacdiag.render.view import build_view

COMMAND = "jacdiag audit step-110.pt --replay runs/a/flight-120"


def replayed(
    verdict: str,
    *,
    checkpoint: int | None = 110,
    others: int = 4,
    outcome: str = "",
    outlying: bool = True,
) -> Report:
    """The report of a trained model with a replay that came out so."""
    batches = [BatchReplay(f"batch-{k}.pt", 120 - k, k == 0, 5.0, 2.0) for k in range(others + 1)]
    if outlying:
        sequence = SequenceReplay(5.0, 2.0, outlying=["loss"])
        batches[0] = dataclasses.replace(batches[0], sequences=[sequence])
    replay = ReplayRecord(
        folder="runs/a/flight-120",
        step=120,
        onset=120,
        why="an alert",
        checkpoint_step=checkpoint,
        computed="",
        verdict=verdict,  # type: ignore[arg-type]
        sentence="The sentence.",
        about_checkpoint="",
        outcome=outcome,  # type: ignore[arg-type]
        batches=batches,
    )
    base = dataclasses.replace(synthetic.trained(2), verdict="observed")
    settings: dict[str, Any] = {**base.settings, "command": COMMAND}
    return dataclasses.replace(base, replay=replay, settings=settings)


NOT_DECIDED = "Replay: not decided whether it was the batch or the weights. "
OUTCOMES: dict[str, tuple[str, str, str, str]] = {
    # outcome -> the verdict, the banner, a part of what to do, and the next command
    "batch": (
        "batch",
        "Replay: it was the batch of step 120. ",
        "leave the batch out",
        "loader = jacdiag.skipping(",
    ),
    "weights": (
        "weights",
        "Replay: it was the weights, not the batch of step 120. ",
        "go back to an earlier checkpoint",
        "jacdiag audit step-110.pt --against EARLIER --tokens FILE",
    ),
    "updated weights": (
        "weights",
        "Replay: it was the weights, which hold the update of the batch of step 120. ",
        "whether the batch made the weights so",
        "jacdiag audit EARLIER --replay runs/a/flight-120",
    ),
    "both": (
        "not decided",
        NOT_DECIDED,
        "both stand out",
        "jacdiag audit step-110.pt --against EARLIER --tokens FILE",
    ),
    "neither": ("not decided", NOT_DECIDED, "JD508", "jacdiag live runs/a --once"),
    "no jump": ("not decided", NOT_DECIDED, "need no explanation", "jacdiag live runs/a --once"),
    "error gone": ("not decided", NOT_DECIDED, "traceback", "jacdiag live runs/a --once"),
    "few batches": ("not decided", NOT_DECIDED, "keep more", "jacdiag.watch(..., keep_batches=10)"),
    "wide range": ("not decided", NOT_DECIDED, "keep more", "jacdiag.watch(..., keep_batches=10)"),
    "unknown step": (
        "not decided",
        NOT_DECIDED,
        "that says its step",
        "jacdiag audit CHECKPOINT --replay runs/a/flight-120",
    ),
    "too early": (
        "not decided",
        NOT_DECIDED,
        "a later checkpoint",
        "jacdiag audit LATER --replay runs/a/flight-120",
    ),
    "too late": (
        "not decided",
        NOT_DECIDED,
        "from before that step",
        "jacdiag audit EARLIER --replay runs/a/flight-120",
    ),
    # What no command decides has the next command of the model.
    "not runnable": ("not decided", NOT_DECIDED, "make the batch run", ""),
    "no loss": ("not decided", NOT_DECIDED, "pass the targets", ""),
    "no run values": ("not decided", NOT_DECIDED, "leave the flight in the folder", ""),
    "other model": ("not decided", NOT_DECIDED, "the checkpoint is of this run", ""),
    "": ("not decided", NOT_DECIDED, "read in the sentence of the replay", ""),
}


def test_every_outcome_is_tested() -> None:
    assert set(OUTCOMES) == set(get_args(ReplayOutcome))


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_banner_action_and_next_command_follow_the_outcome(outcome: str) -> None:
    verdict, banner, action, command = OUTCOMES[outcome]
    report = replayed(verdict, outcome=outcome)
    view = build_view(report)
    assert view.verdict.headline.startswith(banner)
    assert "nothing to compare it with" not in view.verdict.headline
    assert action in view.actions[0]
    assert not any("--against EARLIER" in text for text in view.actions)
    following = next_step(report).command
    assert following.startswith(command)
    if not command:
        assert "keep_batches" not in following and "EARLIER --replay" not in following


def test_another_checkpoint_is_replayed_with_the_options_of_this_one() -> None:
    report = replayed("not decided", outcome="too early")
    command = "jacdiag audit step-110.pt --model m.py:model --replay runs/a/flight-120"
    report = dataclasses.replace(report, settings={**report.settings, "command": command})
    expected = "jacdiag audit LATER --model m.py:model --replay runs/a/flight-120"
    assert next_step(report).command == expected


def test_sequences_are_named_only_if_some_are_out_of_range() -> None:
    [action, *_] = build_view(replayed("batch")).actions
    assert action.startswith("look at the sequences that are out of range")
    [action, *_] = build_view(replayed("batch", outlying=False)).actions
    assert "sequences" not in action


def test_the_run_goes_on_from_a_checkpoint_that_the_batch_has_not_updated() -> None:
    this = "and go on from this checkpoint"
    before = "and go on from a checkpoint from before that step"
    [action, *_] = build_view(replayed("batch", checkpoint=119)).actions
    assert action.endswith(this)
    for step in (120, None):
        [action, *_] = build_view(replayed("batch", checkpoint=step)).actions
        assert action.endswith(before)


def test_the_first_step_that_stands_out_is_only_called_so_if_the_one_before_was_looked_at() -> None:
    replay = replayed("batch").replay
    assert replay is not None
    later = " | ".join(replay_facts(dataclasses.replace(replay, step=135, onset=121)))
    assert "step 121 is the first one that stands out before the alert at step 135" in later
    at_the_limit = " | ".join(replay_facts(dataclasses.replace(replay, step=135, onset=120)))
    assert "is the first one" not in at_the_limit
    assert "all of the 16 steps up to the alert at step 135 stand out" in at_the_limit


def test_without_a_replay_nothing_is_said_of_one() -> None:
    report = dataclasses.replace(replayed("batch"), replay=None)
    view = build_view(report)
    assert "Replay" not in view.verdict.headline
    assert view.verdict.headline.endswith("nothing to compare it with")
    assert "skipping" not in next_step(report).command


def test_the_page_has_the_table_of_batches() -> None:
    page = report_page(replayed("batch"))
    assert "<td>120 suspect</td>" in page and "sequences out</th>" in page
    without = report_page(dataclasses.replace(replayed("batch"), replay=None))
    assert "sequences out</th>" not in without
