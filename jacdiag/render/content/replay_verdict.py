"""What a replay of a flight means for the banner, for what to do and for the next command."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from jacdiag.records.flight_replay import ReplayRecord
from jacdiag.render.content.command_line import without_options
from jacdiag.rules.flight_replay import LEAST_OTHERS


@dataclass(frozen=True)
class ReplayAdvice:
    """What to do after a replay.

    Attributes:
        banner: the verdict in a few words.
        action: what to do.
        command: the next command; words in capitals stand for the user's own.
        purpose: what the command does.
    """

    banner: str
    action: str
    command: str
    purpose: str


def replay_advice(replay: ReplayRecord, words: Sequence[str]) -> ReplayAdvice:
    """Return what a replay's verdict means.

    Args:
        replay: of a report.
        words: of the command that gave the report; empty if a program called the library.
    """
    # 1. The batch.
    if replay.verdict == "batch":
        return ReplayAdvice(
            banner=f"Replay: it was the batch{_of_step(replay)}",
            action="look at the sequences that are out of range, leave the batch out, and go on "
            f"from {_checkpoint_before(replay)}",
            command='loader = jacdiag.skipping(loader, "skip.jsonl")',
            purpose="leaves the batches of a skip list out of the next run",
        )

    # 2. The weights.
    if replay.verdict == "weights":
        return ReplayAdvice(
            banner=f"Replay: it was the weights, not the batch{_of_step(replay)}",
            action="go back to an earlier checkpoint, and look for what grew between the two",
            command=f"{_audit_command(words)} --against EARLIER --tokens FILE",
            purpose="says which norms grew since an earlier checkpoint",
        )

    # 3. Neither. Too few batches cannot decide on any checkpoint.
    banner = "Replay: not decided whether it was the batch or the weights"
    action = "the sentence of the replay says what would decide"
    if len(replay.others) < LEAST_OTHERS:
        return ReplayAdvice(
            banner=banner,
            action=action,
            command="jacdiag.watch(..., keep_batches=10)",
            purpose="keeps enough batches to compare with the next time",
        )
    return ReplayAdvice(
        banner=banner,
        action=action,
        command=f"jacdiag audit EARLIER --replay {shlex.quote(replay.folder)}",
        purpose="runs the batches again on a checkpoint from before the alert",
    )


def _of_step(replay: ReplayRecord) -> str:
    """Return the step whose batch was looked at, as the end of a sentence; "" if not known."""
    step = replay.onset
    if step is None:
        step = replay.step
    if step is None:
        return ""
    return f" of step {step:,}"


def _checkpoint_before(replay: ReplayRecord) -> str:
    """Return the checkpoint that the batch has not updated: this one, if it is known to be one."""
    # 1. One of the two steps may not be known.
    another = "a checkpoint from before that step"
    step = replay.onset
    if step is None:
        step = replay.step
    if step is None or replay.checkpoint_step is None:
        return another

    # 2. The weights that the batch met are those of the step before.
    is_before = replay.checkpoint_step < step
    if is_before:
        return "this checkpoint"
    return another


def _audit_command(words: Sequence[str]) -> str:
    """Return the audit of the same checkpoint without the replay."""
    if list(words[:2]) != ["jacdiag", "audit"]:
        return "jacdiag audit CHECKPOINT"
    return shlex.join(without_options(list(words), valued=["--replay"]))
