"""Was it the batch? Decide a replay from the kept batches and the run around them.

A jump of the run's loss or gradient norm has two possible sources. If the batch alone made it, the
batch shows all of it on the weights of the checkpoint, and other batches show none. If the
weights made it, other batches show it as well. So each source has to show at least half of the
jump, the point between the two, and for being out of the range of chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import fmean, median, stdev
from typing import Any

from jacdiag.records.flight_replay import LevelRecord, ReplayOutcome, ReplayVerdict
from jacdiag.records.number_format import three

# chance that one figure of an ordinary batch counts as out, if figures are normally distributed
FALSE_ALARMS = 1e-3
LEAST_OTHERS = 3  # batches to compare with: two cannot tell whether one of the three is the odd one
# steps of the run that its usual value is taken from: its spread is then known to about 16%
WINDOW = 32
LEAST_ROWS = 8  # fewer steps give no usual value
HALF = 0.5  # the share of the jump at which "all of it" and "none of it" are equally far
# steps that an alert may come after the first step that stood out: the longest mean of JD501
LONGEST_ONSET = 16
_NORMAL = 1.4826  # median absolute deviation to standard deviation, of a normal distribution
_MEDIAN_ERROR = 1.2533  # standard error of a median over that of a mean, of a normal distribution
# relative scatter of a float32 loss that no set of batches is trusted to stay below
_ROUNDING = 1e-4

LOSS, GRADIENT = "loss", "gradient"
_WORDS = {LOSS: "loss", GRADIENT: "gradient norm"}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure, the loss or the gradient norm, of all kept batches and of the run.

    Attributes:
        name: "loss" or "gradient". Gradient norms are compared by their logarithm.
        suspects: of the batches of the step that is looked at, on the weights of the checkpoint.
        others: of the other batches, on the same weights.
        at_step: what the run logged at the step that is looked at; None if it cannot be compared.
        before: the usual value in the run before that step.
        at_checkpoint: the usual value in the run when it had the weights of the checkpoint; None if
            that is not known.
        then: what the run logged for each of the others at its own step, before the one that is
            looked at; None where that cannot be compared. Each batch is then compared with itself.
        sequences_out: the sequences of the suspects that are out of the range of the other batches'
            sequences.
        sequences: how many sequences the suspects have.
        met: of the batch that met these very weights in the run: its value now, and the one that
            the run logged.
    """

    name: str
    suspects: Sequence[float]
    others: Sequence[float]
    at_step: float | None = None
    before: LevelRecord | None = None
    at_checkpoint: LevelRecord | None = None
    then: Sequence[float | None] = ()
    sequences_out: Sequence[int] = ()
    sequences: int = 0
    met: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class ReplayContext:
    """What is known around the figures.

    Attributes:
        step: the step that is looked at.
        checkpoint_step: of the weights; None if they do not say it.
        highest_before: the largest usual loss that the run has had since its first step; None if
            that is not known.
        keep_hint: what keeps more batches.
        crash: the error that ended the run in the step that is looked at, in one line; empty if
            none did.
        failed: why a batch of that step could not be run again, in one line; empty if all could be.
        others_failed: how many of the other batches could not be run again.
    """

    step: int | None
    checkpoint_step: int | None
    highest_before: float | None = None
    keep_hint: str = "jacdiag.watch(..., keep_batches=10) keeps those of the last 10 forwards"
    crash: str = ""
    failed: str = ""
    others_failed: int = 0


def _is_enough(share: float | None) -> bool:
    """Return whether a share of the jump is at least half of it; one that is not known is not."""
    return share is not None and share >= HALF


@dataclass
class JudgedFigure:
    """What one figure says.

    Attributes:
        jump: the run's value at the step over its usual value; None if one of them is not known.
        jumped: the jump is out of the range of chance.
        batch_out, batch_share: whether the suspects are out of the range of the other batches, and
            the part of the jump that they show.
        weights_out, weights_share: the same of the other batches, compared with the run.
    """

    jump: float | None = None
    jumped: bool | None = None
    batch_out: bool = False
    batch_share: float | None = None
    weights_out: bool = False
    weights_share: float | None = None

    @property
    def says_batch(self) -> bool:
        """Whether the figure says that the batch made the jump."""
        # Without a known jump, being out of the range decides.
        if self.jumped is None:
            return self.batch_out
        return self.batch_out and self.jumped and _is_enough(self.batch_share)

    @property
    def says_weights(self) -> bool:
        """Whether the figure says that the weights made the jump."""
        has_jumped = self.jumped is True
        return self.weights_out and has_jumped and _is_enough(self.weights_share)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, as the evidence of a decision holds them."""
        return {
            "jump": self.jump,
            "jumped": self.jumped,
            "batch_out": self.batch_out,
            "batch_share": self.batch_share,
            "weights_out": self.weights_out,
            "weights_share": self.weights_share,
        }


@dataclass(frozen=True)
class Decision:
    """The verdict, in words, how it came out, and what each figure said."""

    verdict: ReplayVerdict
    sentence: str
    outcome: ReplayOutcome = ""
    evidence: dict[str, Any] = field(default_factory=dict)


# -- the run's own values --------------------------------------------------------------------------
def usual_value(rows: Sequence[tuple[int, float]]) -> LevelRecord | None:
    """Return the usual value of a figure over some steps.

    The spread is taken from the differences of successive steps, so that a trend does not widen it,
    by their median, so that a spike does not either.

    Args:
        rows: step and value, in order.

    Returns:
        The level; None for fewer than `LEAST_ROWS` finite values.

    Example:
        >>> usual_value([(step, 2.0 + 0.1 * (step % 2)) for step in range(1, 41)]).count
        32
    """
    # 1. The last finite values.
    finite = [(step, value) for step, value in rows if math.isfinite(value)]
    last = finite[-WINDOW:]
    if len(last) < LEAST_ROWS:
        return None

    # 2. Their median, and the spread of successive steps.
    values = [value for _, value in last]
    differences = [abs(later - earlier) for earlier, later in pairwise(values)]
    spread = _NORMAL * median(differences) / math.sqrt(2)

    # 3. The steps that they are of.
    first_step, last_step = last[0][0], last[-1][0]
    return LevelRecord(median(values), spread, len(values), first_step, last_step)


def is_out(value: float, level: LevelRecord, *, logarithm: bool) -> bool:
    """Return whether one value of the run is above its usual value by more than chance.

    Args:
        value: of one step, as the run logged it.
        level: the usual value.
        logarithm: the level is of logarithms, and the value is not one yet.
    """
    # 1. NaN and Inf are never usual.
    if not math.isfinite(value):
        return True

    # 2. Any other value, as it is compared.
    if logarithm:
        value = _log(value)
    return value - level.center > _limit_above(level, logarithm)


def _limit_above(level: LevelRecord, logarithm: bool) -> float:
    """Return how far above its usual value a figure of the run may lie by chance."""
    # A value and the median that it is compared with are both off by chance.
    error = _floor(level.spread, level.center, logarithm) * math.sqrt(
        1 + _MEDIAN_ERROR**2 / level.count
    )
    return _quantile(FALSE_ALARMS, level.count - 1) * error


def first_out(rows: Sequence[tuple[int, float]], step: int, *, logarithm: bool) -> int | None:
    """Return the first of the steps up to an alert that stand out without a gap.

    An alert may need several steps. The batch that matters is that of the first.

    Args:
        rows: step and value, in order; the logarithm of a gradient norm.
        step: of the alert.
        logarithm: the values are logarithms.

    Returns:
        The step; None if that of the alert does not stand out.
    """
    # 1. The usual value before the alert. A run that is too young has none.
    calm, recent = _calm_and_recent(rows, step)
    level = usual_value(calm)
    if level is None:
        return None

    # 2. From the alert back to the last step that was usual.
    limit = _limit_above(level, logarithm)
    first: int | None = None
    for row_step, value in reversed(recent):
        is_usual = math.isfinite(value) and value - level.center <= limit
        if is_usual:
            break

        first = row_step

    return first


def _calm_and_recent(
    rows: Sequence[tuple[int, float]], step: int
) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """Return the rows that show what is usual, and those that may belong to an alert.

    Args:
        rows: step and value, in order.
        step: of the alert. Later rows are in neither list.
    """
    calm: list[tuple[int, float]] = []
    recent: list[tuple[int, float]] = []
    for row in rows:
        row_step, _ = row
        if row_step <= step - LONGEST_ONSET:
            calm.append(row)
        elif row_step <= step:
            recent.append(row)
    return calm, recent


@dataclass(frozen=True)
class Reason:
    """Why nothing was decided.

    Attributes:
        text: the reason.
        outcome: the same as a keyword.
    """

    text: str
    outcome: ReplayOutcome

    def decision(self) -> Decision:
        """Return the decision that has this reason."""
        return Decision("not decided", f"Not decided: {self.text}.", self.outcome)


# -- the verdict -----------------------------------------------------------------------------------
def decide(figures: Sequence[Figure], context: ReplayContext) -> Decision:
    """Decide whether the batch of a step or the weights of a checkpoint stand out.

    Args:
        figures: the loss, the gradient norm, or both.
        context: what is known around them.

    Returns:
        "batch" if a figure of the suspects is out of the range of the other batches on the same
        weights, they show at least half of the run's jump, and the other batches show no jump.
        "weights" if the other batches show at least half of the jump, and the suspects are not out
        among them. Else "not decided", with the reason.

        Of a step that crashed: "batch" if a batch of it raises the error of the run again, and all
            others run.
    """
    # 1. An error decides by itself.
    known = [figure for figure in figures if figure.others or figure.suspects]
    if context.crash or context.failed:
        return _decide_error(known, context)

    # 2. Without enough batches nothing can be decided.
    missing = _missing(known, context)
    if missing is not None:
        return missing.decision()

    # 3. Judge each figure, then weigh what they say.
    judged = {figure.name: _judge(figure) for figure in known}
    evidence = {name: judgement.to_dict() for name, judgement in judged.items()}
    return replace(_weigh(known, judged, context), evidence=evidence)


def _weigh(
    known: Sequence[Figure], judged: dict[str, JudgedFigure], context: ReplayContext
) -> Decision:
    """Return the verdict over all figures, with the sentence that gives its reason."""
    # 1. Sort the figures by what they say.
    with_jump = _figures_with_a_jump(known, judged)
    says_batch = [figure for figure in with_jump if judged[figure.name].says_batch]
    says_weights = [figure for figure in known if judged[figure.name].says_weights]
    out = [figure for figure in known if judged[figure.name].batch_out]

    # 2. The weights are usual.
    if not says_weights:
        if says_batch:
            return Decision("batch", _batch_sentence(says_batch[0], context), "batch")

        return _explain_neither(known, judged, out, context).decision()

    # 3. The weights stand out, and need not be those of the run.
    open_question = _open_question(says_weights, judged, context)
    if open_question is not None:
        return open_question.decision()

    # 4. They are those of the run, and the batch stands out as well.
    if out:
        return _explain_both(says_weights[0], out[0], context).decision()

    # 5. The weights alone stand out.
    outcome: ReplayOutcome = "weights"
    if _holds_the_update(context):
        outcome = "updated weights"
    return Decision("weights", _weights_sentence(says_weights[0], context), outcome)


def _open_question(
    says_weights: Sequence[Figure], judged: dict[str, JudgedFigure], context: ReplayContext
) -> Reason | None:
    """Return why the weights may be others than those that the batch met; None if they are not."""
    not_these = _not_these_weights(says_weights, judged, context)
    if not_these:
        return Reason(not_these, "other model")

    early = _not_the_run_itself(says_weights[0], context)
    if early:
        return Reason(early, "unknown step")
    return None


def _figures_with_a_jump(
    known: Sequence[Figure], judged: dict[str, JudgedFigure]
) -> Sequence[Figure]:
    """Return the figures whose jump in the run is known, or all if that of none is.

    A figure without a known jump is evidence only if no other figure has one.
    """
    with_jump: list[Figure] = []
    for figure in known:
        judgement = judged[figure.name]
        if judgement.jumped is not None:
            with_jump.append(figure)

    return with_jump or known


def _decide_error(figures: Sequence[Figure], context: ReplayContext) -> Decision:
    """Decide about a step that crashed, or whose batch cannot be run again."""
    start = f"on {_weights(context)} the batch of step {context.step}"
    others = max((len(figure.others) for figure in figures), default=0)

    # 1. The batch runs, so that the figures show no error.
    if not context.failed:
        text = (
            f"Not decided: {start}, which was running when the run raised {context.crash}, runs "
            "without an error."
        )
        return Decision("not decided", text, "error gone")

    # 2. The error comes again, and comes from no other batch.
    is_same_error = context.failed == context.crash
    all_others_run = others > 0 and not context.others_failed
    if is_same_error and all_others_run:
        noun = "batch runs" if others == 1 else "batches run"
        text = (
            f"The batch: {start} raises what the run raised ({context.crash}), and the "
            f"{others} other kept {noun}."
        )
        return Decision("batch", text, "batch")

    # 3. It cannot be run here, for a reason that need not be that of the run.
    text = f"Not decided: {start} could not be run: {context.failed}"
    if context.crash and not is_same_error:
        text += f" (the run raised {context.crash})"
    return Decision("not decided", f"{text}{_state_of_others(others, context)}.", "not runnable")


def _state_of_others(others: int, context: ReplayContext) -> str:
    """Return what is wrong with the batches to compare with; "" if nothing is."""
    if context.others_failed:
        return f"; {context.others_failed} of the others could not be run either"

    # Without any, nothing shows whether the batch is at fault.
    if not others:
        return "; no other batch was run to compare it with"
    return ""


def _missing(figures: Sequence[Figure], context: ReplayContext) -> Reason | None:
    """Return what the flight lacks for a verdict; None if it lacks nothing."""
    # 1. Something to look at.
    if not figures:
        return Reason("no loss and no gradient could be computed", "no loss")
    if not figures[0].suspects:
        text = f"the batch of step {context.step} was not kept; {context.keep_hint}"
        return Reason(text, "few batches")

    # 2. Enough batches to compare it with.
    count = len(figures[0].others)
    if count >= LEAST_OTHERS:
        return None
    text = (
        f"the flight keeps {_others_in_words(count)}, and {LEAST_OTHERS} are needed to tell an "
        f"unusual one; {context.keep_hint}"
    )
    return Reason(text, "few batches")


def _others_in_words(count: int) -> str:
    """Return how many other batches there are, as in "2 other batches"."""
    if count == 0:
        return "no other batch"
    if count == 1:
        return "1 other batch"

    # Fewer than are needed.
    return f"{count} other batches"


def _judge(figure: Figure) -> JudgedFigure:
    """Judge one figure: its jump in the run, its suspects, and the other batches."""
    logarithm = figure.name == GRADIENT
    suspects = _scaled(figure.suspects, logarithm)
    others = _scaled(figure.others, logarithm)
    judgement = JudgedFigure()

    # 1. The jump that is to be explained.
    before, at_step = figure.before, figure.at_step
    if before is not None and at_step is not None:
        judgement.jump = _scaled([at_step], logarithm)[0] - before.center
        judgement.jumped = is_out(at_step, before, logarithm=logarithm)

    # 2. Values that are not finite need no comparison of sizes.
    if not _are_finite(others):
        _judge_broken_others(judgement, others)
        return judgement
    if not _are_finite(suspects):
        judgement.batch_out = True
        judgement.batch_share = 1.0
        judgement.jumped = True
        return judgement

    # 3. The suspects compared with the other batches, on the same weights; and their sequences with
    #    the others'.
    center = fmean(others)
    spread = _floor(stdev(others), center, logarithm)
    limit = _limit_of_range(FALSE_ALARMS / len(suspects), spread, len(others))
    is_above_others = max(suspects) - center > limit
    judgement.batch_out = is_above_others or bool(figure.sequences_out)
    judgement.batch_share = _share_of_jump(fmean(suspects) - center, judgement.jump)

    # 4. The other batches compared with the run.
    rise = _rise(figure, others, center, spread)
    if rise is None:
        return judgement

    judgement.weights_out = rise.mean > _quantile(FALSE_ALARMS, rise.count - 1) * rise.error
    judgement.weights_share = _share_of_jump(rise.mean, judgement.jump)

    # 5. The suspect compared with the run, which has more values than the flight has batches.
    level = figure.at_checkpoint
    if level is None or judgement.weights_out or len(suspects) != 1:
        return judgement
    if not judgement.batch_out:
        judgement.batch_out = is_out(figure.suspects[0], level, logarithm=logarithm)
    return judgement


def _are_finite(values: Sequence[float]) -> bool:
    return all(map(math.isfinite, values))


def _judge_broken_others(judgement: JudgedFigure, others: Sequence[float]) -> None:
    """Judge the weights by other batches of which some are NaN or Inf."""
    # 1. Such a value is a jump of any size.
    judgement.jumped = True

    # 2. Most of them have to be so: one of them may be broken as well.
    count_finite = sum(map(math.isfinite, others))
    judgement.weights_out = 2 * count_finite < len(others)
    if judgement.weights_out:
        judgement.weights_share = 1.0


def _share_of_jump(excess: float, jump: float | None) -> float | None:
    """Return the part of the run's jump that an excess is; None if there is no jump upwards."""
    if jump is None or not math.isfinite(jump):
        return None

    # A fall has no part that an excess could be.
    is_upwards = jump > 0
    if not is_upwards:
        return None
    return excess / jump


@dataclass(frozen=True)
class _Rise:
    """By how much the other batches are above what the run had, with its standard error."""

    mean: float
    error: float
    count: int


def _rise(figure: Figure, others: Sequence[float], center: float, spread: float) -> _Rise | None:
    """Compare each of the other batches with itself in the run.

    Without such values all of them are compared with the usual value of the run.
    """
    # 1. Each batch minus what the run logged for it.
    differences = _differences_from_run(figure, others)
    if len(differences) >= LEAST_OTHERS:
        logarithm = figure.name == GRADIENT
        error = _floor(stdev(differences), center, logarithm) / math.sqrt(len(differences))
        return _Rise(fmean(differences), error, len(differences))

    # 2. Too few of them: the mean over all batches minus the usual value of the run.
    level = figure.at_checkpoint
    if level is None:
        return None
    error = math.hypot(
        spread / math.sqrt(len(others)), _MEDIAN_ERROR * level.spread / math.sqrt(level.count)
    )
    return _Rise(center - level.center, error, len(others))


def _differences_from_run(figure: Figure, others: Sequence[float]) -> list[float]:
    """Return each of the other batches minus what the run logged for it, where that is known."""
    logarithm = figure.name == GRADIENT
    differences: list[float] = []
    for on_these_weights, in_the_run in zip(others, figure.then, strict=False):
        is_known = in_the_run is not None and math.isfinite(in_the_run)
        if in_the_run is None or not is_known:
            continue

        # `others` are logarithms already, where figures are compared by them.
        (scaled,) = _scaled([in_the_run], logarithm)
        differences.append(on_these_weights - scaled)

    return differences


def out_of_range(
    values: Sequence[float], others: Sequence[float], *, logarithm: bool
) -> list[bool]:
    """Return which values are above the range of others, at `FALSE_ALARMS` for all of them.

    Args:
        values: of the sequences of one batch.
        others: of the sequences of the other batches.
        logarithm: compare by the logarithm.
    """
    # 1. Too few others have no range.
    finite = _scaled(list(filter(math.isfinite, others)), logarithm)
    if len(finite) < LEAST_OTHERS:
        return [False] * len(values)

    # 2. The range of the others.
    center = fmean(finite)
    spread = _floor(stdev(finite), center, logarithm)
    limit = _limit_of_range(FALSE_ALARMS / max(len(values), 1), spread, len(finite))

    # 3. Each value compared with it. One that is not finite is out of any range.
    results = []
    for value in _scaled(values, logarithm):
        is_usual = math.isfinite(value) and value - center <= limit
        results.append(not is_usual)

    return results


def _limit_of_range(chance: float, spread: float, count: int) -> float:
    """Return how far above the mean of `count` values one more lies with this chance."""
    return _quantile(chance, count - 1) * spread * math.sqrt(1 + 1 / count)


def _not_these_weights(
    figures: Sequence[Figure], judged: dict[str, JudgedFigure], context: ReplayContext
) -> str:
    """Return why the model that was run cannot be that of the run; "" if it can be.

    The step after the checkpoint was made with its weights. A run that was usual there had usual
    weights.
    """
    if context.checkpoint_step is None or context.step is None:
        return ""

    hint = "is this the checkpoint of this run, and the model built as it was there?"

    # 1. The run was usual with these weights for a step or more.
    if context.checkpoint_step < context.step - 1:
        what = _WORDS[figures[0].name]
        low, high = three(min(figures[0].others)), three(max(figures[0].others))
        return (
            f"ordinary batches have a {what} of {low} to {high} on {_weights(context)}, and the "
            "run was still usual "
            f"with them at the next step; {hint}"
        )

    # 2. The batch that met these weights in the run has another value now.
    for figure in figures:
        if figure.met is None or _is_as_in_the_run(figure, judged[figure.name].jump):
            continue

        value_now, value_in_run = figure.met
        return (
            f"the batch that met {_weights(context)} in the run had a {_WORDS[figure.name]} of "
            f"{three(value_in_run)} there, and has {three(value_now)} now; {hint}"
        )

    return ""


def _is_as_in_the_run(figure: Figure, jump: float | None) -> bool:
    """Return whether the batch that met these weights differs by less than half of the jump."""
    # 1. What is not known is no difference.
    if figure.met is None:
        return True
    if jump is None or not math.isfinite(jump):
        return True

    # 2. The two values as they are compared.
    value_now, value_in_run = _scaled(figure.met, figure.name == GRADIENT)
    return abs(value_now - value_in_run) < HALF * jump


def _not_the_run_itself(figure: Figure, context: ReplayContext) -> str:
    """Return why the figures may be those of an earlier part of the run; "" if they cannot be."""
    # 1. The step of the checkpoint is known.
    if context.checkpoint_step is not None:
        return ""

    # 2. No early step has values that are not finite.
    level = fmean(figure.others)
    if not math.isfinite(level):
        return ""

    # 3. Only a loss can show that it is not of an early step.
    if figure.name != LOSS:
        return _SAVE_THE_STEP

    ordinary = f"ordinary batches have a loss of {three(level)} on these weights"
    if context.highest_before is None:
        return f"{ordinary}, and {_SAVE_THE_STEP}"

    # 4. The run never had such a loss before the jump, unless it was early on.
    if level <= context.highest_before:
        return f"{ordinary}, as the run had early on; {_SAVE_THE_STEP}"
    return ""


_SAVE_THE_STEP = (
    "the checkpoint does not say its step, so that it may be an early one (save 'step' in it)"
)


# -- sentences -------------------------------------------------------------------------------------
def _batch_sentence(figure: Figure, context: ReplayContext) -> str:
    what, size = _WORDS[figure.name], three(max(figure.suspects))
    text = f"The batch: on {_weights(context)} its {what} is {size}, and {_range(figure)}"

    # 1. Its sequences.
    if figure.sequences_out:
        text += (
            f". Of its {figure.sequences} sequences {len(figure.sequences_out)} are out of "
            "the range of theirs"
        )

    # 2. The run.
    if figure.at_step is not None and figure.before is not None:
        usual = _center(figure.before, figure)
        text += f". The run had {three(figure.at_step)} at step {context.step}, and {usual} before"
    return text + "."


def _weights_sentence(figure: Figure, context: ReplayContext) -> str:
    what, level = _WORDS[figure.name], figure.at_checkpoint
    text = f"The weights: on {_weights(context)} {_range(figure, what=True)}"

    # 1. What the run had with these weights.
    if level is not None:
        text += f", where the run had {_center(level, figure)}"

    # 2. What the batch of the step has.
    text += (
        f". The batch of step {context.step} ({what} {three(max(figure.suspects))}) is not "
        "out of their range"
    )

    # 3. The weights may be those that the batch made.
    if _holds_the_update(context):
        text += (
            f". These weights hold the update of step {context.step}: a checkpoint from before it "
            "shows whether "
            "that batch made them so"
        )
    return text + "."


def _explain_both(weights: Figure, batch: Figure, context: ReplayContext) -> Reason:
    """Return what is open if the weights stand out, and the batch does even among the others."""
    # 1. What the replay shows.
    level = weights.at_checkpoint
    run = ""
    if level is not None:
        run = f", where the run had {_center(level, weights)}"
    text = (
        f"on {_weights(context)} {_range(weights, what=True)}{run}, and the batch of "
        f"step {context.step} "
        f"is out even among them ({_WORDS[batch.name]} {three(max(batch.suspects))})"
    )

    # 2. Weights that hold its update may be what it has made of them.
    if _holds_the_update(context):
        text += f". A checkpoint from before step {context.step} would decide"
        return Reason(text, "too late")

    # 3. The very weights that the batch met.
    text += (
        ". The batch met these very weights, so that no other checkpoint tells the two apart: each "
        "of them stands out"
    )
    return Reason(text, "both")


def _explain_neither(
    figures: Sequence[Figure],
    judged: dict[str, JudgedFigure],
    out: Sequence[Figure],
    context: ReplayContext,
) -> Reason:
    """Return why neither the batch nor the weights explain the jump."""
    # 1. There was no jump.
    known = [figure for figure in figures if judged[figure.name].jumped is not None]
    jumped = [figure for figure in known if judged[figure.name].jumped]
    if known and not jumped:
        return Reason(_no_jump_text(known, out, context), "no jump")

    # 2. The batch is out, but not by enough.
    start = f"on {_weights(context)} the batch of step {context.step} is"
    if out:
        remedy = _what_decides(jumped[0], context, of="the rest of the jump")
        text = f"{start} out of the range of the others, and shows less than half of the run's jump"
        return Reason(f"{text}; {remedy.text}", remedy.outcome)

    # 3. The batch is not out, and nobody knows whether the run jumped.
    if not known:
        text = f"{start} not out of the range of the others, and the run's own values are not known"
        return Reason(text, "no run values")

    # 4. It shows the jump, within the range of the others.
    above = [figure for figure in jumped if _is_enough(judged[figure.name].batch_share)]
    if above:
        hint = "with more kept batches this range would be known better"
        text = (
            f"{start} {_above(above[0])}, as in the run, and not out of the range of the "
            f"others; {hint}"
        )
        return Reason(text, "wide range")

    # 5. It does not show the jump.
    remedy = _what_decides(jumped[0], context)
    text = f"{start} not out of the range of the others, and these are as usual; {remedy.text}"
    return Reason(text, remedy.outcome)


def _no_jump_text(known: Sequence[Figure], out: Sequence[Figure], context: ReplayContext) -> str:
    """Return what is to be said about a step at which the run was usual."""
    # 1. What the run had there.
    values = " and ".join(f"{_WORDS[figure.name]} {three(figure.at_step)}" for figure in known)
    verb = "are" if len(known) > 1 else "is"
    text = f"the run's {values} at step {context.step} {verb} usual for it"

    # 2. What the replay shows.
    if not out:
        return f"{text}. There is no jump to explain"
    weights = _weights(context)
    return f"{text}, while the batch is out of the range of the others on {weights}"


def _above(figure: Figure) -> str:
    return f"above the others ({_WORDS[figure.name]} {three(max(figure.suspects))})"


def _what_decides(figure: Figure, context: ReplayContext, *, of: str = "the jump") -> Reason:
    """Return what to look at if neither the batch nor the weights show the jump.

    Args:
        figure: one with a jump in the run.
        context: what is known around it.
        of: what they do not show.
    """
    if context.checkpoint_step is None or context.step is None:
        text = "a checkpoint that says its step, from right before or after that step, would decide"
        return Reason(text, "unknown step")

    # 1. Weights from long before the step.
    if context.checkpoint_step < context.step - 1:
        apart = context.step - context.checkpoint_step
        text = (
            f"these weights are from {apart} steps before that step, and a later checkpoint "
            "would decide"
        )
        return Reason(text, "too early")

    # 2. Weights from after the step.
    if context.checkpoint_step >= context.step:
        text = (
            f"a checkpoint of step {context.step - 1}, the weights that the batch met, would decide"
        )
        return Reason(text, "too late")

    # 3. The very weights that the batch met.
    what = _WORDS[figure.name]
    text = (
        f"the run had a {what} of {three(figure.at_step)} with this batch and these weights, and "
        "the replay has "
        f"{three(max(figure.suspects))}: what made {of} is in neither (dropout, a loss "
        "outside the model, a fault "
        "that came and went, weights changed by hand)"
    )
    return Reason(text, "neither")


def _weights(context: ReplayContext) -> str:
    step = context.checkpoint_step
    if step is None:
        return "these weights (of a step that the checkpoint does not say)"

    return f"these weights (step {step})"


def _holds_the_update(context: ReplayContext) -> bool:
    """Return whether the weights may be those after the update of the step."""
    if context.step is None:
        return False

    # A checkpoint that does not say its step may be a later one.
    if context.checkpoint_step is None:
        return True

    return context.checkpoint_step >= context.step


def _range(figure: Figure, *, what: bool = False) -> str:
    low, high = three(min(figure.others)), three(max(figure.others))
    name = ""
    if what:
        name = f"a {_WORDS[figure.name]} of "
    return f"the {len(figure.others)} other kept batches have {name}{low} to {high}"


def _center(level: LevelRecord, figure: Figure) -> str:
    center = level.center
    if figure.name == GRADIENT:
        center = math.exp(level.center)
    return three(center)


# -- numbers ---------------------------------------------------------------------------------------
def _log(value: float) -> float:
    """Return a logarithm; NaN and Inf stay what they are, and zero is a tiny number."""
    is_kept = math.isnan(value) or value == math.inf
    if is_kept:
        return value

    # Norms are not negative.
    return math.log(max(value, 1e-300))


def _scaled(values: Sequence[float], logarithm: bool) -> list[float]:
    """Return values as they are compared: gradient norms by their logarithm."""
    if logarithm:
        return list(map(_log, values))

    return list(values)


def _floor(spread: float, center: float, logarithm: bool) -> float:
    """Return a spread, or what rounding alone makes of it."""
    rounding = _ROUNDING * abs(center)
    if logarithm:
        rounding = _ROUNDING
    return max(spread, rounding)


def _quantile(chance: float, freedom: int) -> float:
    """Return what a t-distributed value exceeds with this chance."""
    from scipy.stats import t

    return float(t.isf(chance, max(freedom, 1)))
