"""The verdict of a replay stands in the banner, in what to do, in the next command, on the page."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from render import synthetic

from jacdiag.records import Report
from jacdiag.records.flight_replay import BatchReplay, ReplayRecord
from jacdiag.render.content.next_step import next_step
from jacdiag.render.html.pages import report_page
from jacdiag.render.view import build_view

COMMAND = "jacdiag audit step-110.pt --replay runs/a/flight-120"


def replayed(verdict: str, *, checkpoint: int | None = 110, others: int = 4) -> Report:
    """The report of a trained model with a replay that came out so."""
    batches = [BatchReplay(f"batch-{k}.pt", 120 - k, k == 0, 5.0, 2.0) for k in range(others + 1)]
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
        batches=batches,
    )
    base = dataclasses.replace(synthetic.trained(2), verdict="observed")
    settings: dict[str, Any] = {**base.settings, "command": COMMAND}
    return dataclasses.replace(base, replay=replay, settings=settings)


@pytest.mark.parametrize(
    ("verdict", "banner", "command"),
    [
        ("batch", "Replay: it was the batch of step 120. ", "loader = jacdiag.skipping("),
        (
            "weights",
            "Replay: it was the weights, not the batch of step 120. ",
            "jacdiag audit step-110.pt --against EARLIER --tokens FILE",
        ),
        (
            "not decided",
            "Replay: not decided whether it was the batch or the weights. ",
            "jacdiag audit EARLIER --replay runs/a/flight-120",
        ),
    ],
)
def test_banner_and_next_command_follow_the_verdict(
    verdict: str, banner: str, command: str
) -> None:
    report = replayed(verdict)
    view = build_view(report)
    assert view.verdict.headline.startswith(banner)
    assert "nothing to compare it with" not in view.verdict.headline
    assert next_step(report).command.startswith(command)
    assert not any("--against EARLIER" in action for action in view.actions)


def test_with_too_few_batches_the_next_run_keeps_more() -> None:
    assert "keep_batches" in next_step(replayed("not decided", others=2)).command
    assert "keep_batches" not in next_step(replayed("not decided", others=3)).command


def test_the_run_goes_on_from_a_checkpoint_that_the_batch_has_not_updated() -> None:
    this = "and go on from this checkpoint"
    before = "and go on from a checkpoint from before that step"
    [action, *_] = build_view(replayed("batch", checkpoint=119)).actions
    assert action.endswith(this)
    for step in (120, None):
        [action, *_] = build_view(replayed("batch", checkpoint=step)).actions
        assert action.endswith(before)


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
