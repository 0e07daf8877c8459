"""What came out of running a flight's batches again on the weights of a checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from jacdiag.records.base import Record
from jacdiag.records.batch_values import BatchValues

ReplayVerdict = Literal["batch", "weights", "not decided"]

ReplayOutcome = Literal[
    "",
    "batch",
    "weights",
    "updated weights",
    "both",
    "neither",
    "no jump",
    "error gone",
    "not runnable",
    "few batches",
    "wide range",
    "no loss",
    "no run values",
    "unknown step",
    "too early",
    "too late",
    "other model",
]
"""How a replay came out: the verdict, and for "not decided" why. Empty if that is not known.

- "batch", "weights": the verdict.
- "updated weights": the weights, which hold the update of the batch that is looked at.
- "both": the batch and the weights that it met.
- "neither": the run had a jump with this batch and these weights, and the replay has none.
- "no jump": the run's figures are usual at that step.
- "error gone": the batch of a step that crashed runs.
- "not runnable": the batch cannot be run here.
- "few batches": the flight does not keep that batch, or too few others.
- "wide range": the batch shows the jump within the range of the others.
- "no loss": no loss can be computed.
- "no run values": the run's own values are not known.
- "unknown step": the checkpoint does not say its step.
- "too early", "too late": the weights are older or newer than those that the batch met.
- "other model": the weights, or the model that was built, are not those of the run.
"""


@dataclass(frozen=True)
class SequenceReplay(Record):
    """One sequence of a batch, run alone.

    Attributes:
        loss: its loss; None if no loss can be computed.
        gradient: the norm of the gradient of that loss.
        tokens: how many targets the loss is the mean of; None if that is not known.
        outlying: the figures, "loss" or "gradient", that are out of the range of the other batches'
            sequences.
    """

    loss: float | None
    gradient: float | None
    tokens: int | None = None
    outlying: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class BatchReplay(Record):
    """One kept batch.

    Attributes:
        file: its file in the flight.
        step: the optimizer step that it belongs to.
        suspect: it belongs to the step that is looked at.
        loss, gradient: on the weights of the checkpoint; the gradient is that of the batch's loss.
        logged_loss, logged_gradient: what the run logged at the step of the batch, over all its
            micro-batches.
        sequences: in the order of the batch.
        note: what a reader should know of these figures.
        values: what of the batch is not finite; None if it was not looked at.
    """

    # Which batch it is.
    file: str
    step: int
    suspect: bool

    # What it gave here, and what the run logged of it.
    loss: float | None
    gradient: float | None
    logged_loss: float | None = None
    logged_gradient: float | None = None

    # A closer look.
    sequences: list[SequenceReplay] = field(default_factory=list)
    note: str = ""
    values: BatchValues | None = None


@dataclass(frozen=True)
class TokenReplay(Record):
    """A token of a batch whose loss is among the largest.

    Attributes:
        sequence, position: where its target stands.
        target: the id that the model had to predict.
        loss: its cross entropy.
        batch: the file of the batch.
    """

    sequence: int
    position: int
    target: int
    loss: float
    batch: str


@dataclass(frozen=True)
class LevelRecord(Record):
    """The usual value of a figure in the run, over some of its steps.

    Attributes:
        center: the median.
        spread: the standard deviation of one step, from the differences of successive steps.
        count: how many steps.
        first, last: the first and the last of these steps.
    """

    center: float
    spread: float
    count: int
    first: int
    last: int


@dataclass(frozen=True)
class NormChange(Record):
    """A branch norm on the batch, and on the probe of the run."""

    name: str
    batch: float
    probe: float

    @property
    def ratio(self) -> float:
        """The norm on the batch over that on the probe; inf if that was 0."""
        if not self.probe:
            return math.inf
        return self.batch / self.probe


@dataclass(frozen=True)
class ReplayRecord(Record):
    """The batches of a flight, run again on the weights of a checkpoint.

    Attributes:
        folder: the flight.
        step: the step that the flight is about.
        onset: the first step that stands out in the run, whose batch is looked at.
        why: why the flight was written.
        checkpoint_step: of the weights; None if the checkpoint does not say it.
        computed: the loss that was computed, in words.
        verdict: "batch", "weights" or "not decided".
        sentence: the verdict in words, with its reason and what would decide.
        outcome: the verdict, and for "not decided" the reason; empty in reports of older versions.
        about_checkpoint: the step of the checkpoint compared with that of the flight, in words.
        batches: the kept ones, the latest first.
        before: figure -> its usual value in the run before the onset; of the gradient norm, its
            logarithm.
        at_checkpoint: figure -> its usual value in the run when it had the weights of the
            checkpoint.
        tokens: of the suspect batches, the ones with the largest loss.
        token_cut: the loss that one in 1,000 tokens of the other batches exceeds; None if they have
            too few.
        tokens_beyond, tokens_counted: how many tokens of the suspect batches exceed it, and of how
            many.
        norms: branch norms on the latest batch, which is the probe of the audit, and on the last
            probe of the run.
        probe_step: of that probe of the run.
        probed_step: of the latest batch.
        evidence: what the verdict was taken from, figure by figure.
        notes: what could not be done, and why.
        seconds: that it took.
    """

    # The flight and the weights.
    folder: str
    step: int | None
    onset: int | None
    why: str
    checkpoint_step: int | None
    computed: str

    # The verdict.
    verdict: ReplayVerdict
    sentence: str
    about_checkpoint: str

    # The batches, and what the run had of the same figures.
    batches: list[BatchReplay] = field(default_factory=list)
    before: dict[str, LevelRecord] = field(default_factory=dict)
    at_checkpoint: dict[str, LevelRecord] = field(default_factory=dict)

    # Tokens whose loss stands out.
    tokens: list[TokenReplay] = field(default_factory=list)
    token_cut: float | None = None
    tokens_beyond: int = 0
    tokens_counted: int = 0

    # Branch norms on the batch and on the probe of the run.
    norms: list[NormChange] = field(default_factory=list)
    probe_step: int | None = None
    probed_step: int | None = None

    # What the verdict was taken from, and what could not be done.
    outcome: ReplayOutcome = ""
    evidence: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def suspects(self) -> list[BatchReplay]:
        """The batches of the step that is looked at."""
        return [batch for batch in self.batches if batch.suspect]

    @property
    def others(self) -> list[BatchReplay]:
        """The batches of other steps."""
        return [batch for batch in self.batches if not batch.suspect]
