"""What a replay of a flight means for the banner, for what to do and for the next command."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from jacdiag.records.flight_replay import ReplayRecord, SequenceReplay
from jacdiag.render.content.command_line import without_options

_LEAST_KEPT = 10  # forwards, as the other pages advise

_ACTIONS = {
    "both": "look at the batch, and at what grew in the weights before it: both stand out",
    "neither": "look at what a replay does not have: dropout, a loss outside the model, a write to "
    "the weights (JD508), another rank",
    "no jump": "look at what the alert names: the loss and the gradient of that step need no "
    "explanation",
    "error gone": "look at the traceback of the run: the batch alone does not raise its error",
    "not runnable": "make the batch run with this model first: the error stands in the sentence",
    "few batches": "keep more batches in the next run: this flight cannot decide",
    "wide range": "keep more batches in the next run: this flight cannot decide",
    "no loss": "pass the targets to the model's forward in the next run, so that the flight keeps "
    "them and a loss can be computed",
    "no run values": "leave the flight in the folder of its run, whose log has these values. A "
    "step with few steps before it has no usual value",
    "unknown step": "replay it on a checkpoint that says its step",
    "too early": "replay it on a later checkpoint, as close before that step as there is",
    "too late": "replay it on a checkpoint from before that step",
    "other model": "make sure that the checkpoint is of this run, and that the model is built as "
    "it was there",
}
"""What to do if nothing was decided, by the outcome."""

_OTHER_CHECKPOINTS = {
    "too early": ("LATER", "runs the batches on weights nearer to that step"),
    "too late": ("EARLIER", "runs the batches on weights from before that step"),
    "unknown step": ("CHECKPOINT", "runs the batches on weights of a known step"),
}
"""The checkpoint that would decide, by the outcome, and what its command does."""

_COMPARES = "says which norms grew since an earlier checkpoint"


@dataclass(frozen=True)
class ReplayAdvice:
    """What to do after a replay.

    Attributes:
        banner: the verdict in a few words.
        action: what to do.
        command: the next command; words in capitals stand for the user's own. Empty if no command
            helps.
        purpose: what the command does.
    """

    banner: str
    action: str
    command: str = ""
    purpose: str = ""


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
            action=f"look at {_what_of_the_batch(replay)}, leave the batch out, and go on from "
            f"{_checkpoint_before(replay)}",
            command='loader = jacdiag.skipping(loader, "skip.jsonl")',
            purpose="leaves the batches of a skip list out of the next run",
        )

    # 2. The weights, which that batch may have made so.
    if replay.outcome == "updated weights":
        return ReplayAdvice(
            banner="Replay: it was the weights, which hold the update of the batch"
            f"{_of_step(replay)}",
            action="replay it on a checkpoint from before that step, which shows whether the batch "
            "made the weights so",
            command=_replay_on(replay, words, "EARLIER"),
            purpose="runs the batches on weights from before that update",
        )

    # 3. The weights alone.
    if replay.verdict == "weights":
        return ReplayAdvice(
            banner=f"Replay: it was the weights, not the batch{_of_step(replay)}",
            action="go back to an earlier checkpoint, and look for what grew between the two",
            command=_compare_with_earlier(words),
            purpose=_COMPARES,
        )
    return _advice_undecided(replay, words)


def _advice_undecided(replay: ReplayRecord, words: Sequence[str]) -> ReplayAdvice:
    """Return what to do if nothing was decided."""
    banner = "Replay: not decided whether it was the batch or the weights"
    outcome = replay.outcome
    action = _ACTIONS.get(outcome, "read in the sentence of the replay why nothing was decided")

    # 1. Another checkpoint.
    if outcome in _OTHER_CHECKPOINTS:
        checkpoint, purpose = _OTHER_CHECKPOINTS[outcome]
        command = _replay_on(replay, words, checkpoint)
        return ReplayAdvice(banner, action, command, purpose)

    # 2. Another flight.
    if outcome in ("few batches", "wide range"):
        forwards = max(_LEAST_KEPT, 2 * len(replay.batches))
        command = f"jacdiag.watch(..., keep_batches={forwards})"
        return ReplayAdvice(banner, action, command, "keeps more batches to compare with")

    # 3. The weights have a part in it.
    if outcome == "both":
        return ReplayAdvice(banner, action, _compare_with_earlier(words), _COMPARES)

    # 4. The log of the run may say more. Else no command decides it.
    if outcome in ("neither", "no jump", "error gone"):
        run = PurePath(replay.folder).parent
        command = f"jacdiag live {shlex.quote(str(run))} --once"
        return ReplayAdvice(banner, action, command, "shows all alerts of the run")
    return ReplayAdvice(banner, action)


def _what_of_the_batch(replay: ReplayRecord) -> str:
    """Return what to look at of a batch that is the cause."""
    # 1. All sequences of the batches that are looked at.
    sequences: list[SequenceReplay] = []
    for batch in replay.suspects:
        sequences.extend(batch.sequences)

    # 2. Those that are out of range, if there are any.
    outlying = [sequence for sequence in sequences if sequence.outlying]
    if outlying:
        return "the sequences that are out of range"
    return "what the batch holds"


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


def _is_audit(words: Sequence[str]) -> bool:
    return list(words[:2]) == ["jacdiag", "audit"] and len(words) > 2


def _compare_with_earlier(words: Sequence[str]) -> str:
    """Return the audit of the same checkpoint, compared with an earlier one."""
    audit = "jacdiag audit CHECKPOINT"
    if _is_audit(words):
        audit = shlex.join(without_options(list(words), valued=["--replay"]))
    return f"{audit} --against EARLIER --tokens FILE"


def _replay_on(replay: ReplayRecord, words: Sequence[str], checkpoint: str) -> str:
    """Return the same replay on another checkpoint.

    Args:
        replay: of the report.
        words: of the command that gave the report.
        checkpoint: a word in capitals for the other checkpoint.
    """
    # The source of an audit comes first.
    if _is_audit(words) and not words[2].startswith("-"):
        return shlex.join([*words[:2], checkpoint, *words[3:]])
    return f"jacdiag audit {checkpoint} --replay {shlex.quote(replay.folder)}"
