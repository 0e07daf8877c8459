"""Was it the batch? Decide a replay from the kept batches and the run around them.

A jump of the run's loss or gradient norm has two possible sources. If the batch alone made it, the
batch shows the whole of it on the weights of the checkpoint, and other batches show none. If the
weights made it, other batches show it as well. So each source is asked for at least half of the
jump, the point between the two, and for being out of the range of chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, median, stdev
from typing import Any

from jacdiag.records.flight_replay import LevelRecord, ReplayVerdict
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
class Context:
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


@dataclass
class Judged:
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
        if self.jumped is None:
            return self.batch_out
        return self.batch_out and self.jumped and (self.batch_share or 0.0) >= HALF

    @property
    def says_weights(self) -> bool:
        return self.weights_out and bool(self.jumped) and (self.weights_share or 0.0) >= HALF

    def to_dict(self) -> dict[str, Any]:
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
    """The verdict, in words, and what each figure said."""

    verdict: ReplayVerdict
    sentence: str
    evidence: dict[str, Any] = field(default_factory=dict)


# -- the run's own values --------------------------------------------------------------------------
def usual_value(rows: Sequence[tuple[int, float]]) -> LevelRecord | None:
    """Return the usual value of a figure over some steps.

    None for fewer than `LEAST_ROWS` finite values.

    The spread is taken from the differences of successive steps, so that a trend does not widen it,
    by their median, so that a spike does not either.

    Args:
        rows: step and value, in order.

    Example:
        >>> usual_value([(step, 2.0 + 0.1 * (step % 2)) for step in range(1, 41)]).count
        32
    """
    finite = [(step, value) for step, value in rows if math.isfinite(value)][-WINDOW:]
    if len(finite) < LEAST_ROWS:
        return None
    values = [value for _, value in finite]
    differences = [abs(later - earlier) for earlier, later in pairwise(values)]
    spread = _NORMAL * median(differences) / math.sqrt(2)
    return LevelRecord(median(values), spread, len(values), finite[0][0], finite[-1][0])


def is_out(value: float, level: LevelRecord, *, logarithm: bool) -> bool:
    """Return whether one value of the run is above its usual value by more than chance."""
    if not math.isfinite(value):
        return True
    if logarithm:
        value = _log(value)
    error = _floor(level.spread, level.center, logarithm) * math.sqrt(
        1 + _MEDIAN_ERROR**2 / level.count
    )
    return value - level.center > _quantile(FALSE_ALARMS, level.count - 1) * error


def first_out(rows: Sequence[tuple[int, float]], step: int, *, logarithm: bool) -> int | None:
    """Return the first of the steps up to an alert that stand out without a gap.

    None if that of the alert does not stand out.

    An alert may need several steps. The batch that matters is that of the first.

    Args:
        rows: step and value, in order; the logarithm of a gradient norm.
        step: of the alert.
        logarithm: the values are logarithms.
    """
    calm = [(at, value) for at, value in rows if at <= step - LONGEST_ONSET]
    level = usual_value(calm)
    if level is None:
        return None
    first: int | None = None
    error = _floor(level.spread, level.center, logarithm) * math.sqrt(
        1 + _MEDIAN_ERROR**2 / level.count
    )
    for at, value in reversed([row for row in rows if step - LONGEST_ONSET < row[0] <= step]):
        if (
            math.isfinite(value)
            and value - level.center <= _quantile(FALSE_ALARMS, level.count - 1) * error
        ):
            break
        first = at
    return first


# -- the verdict -----------------------------------------------------------------------------------
def decide(figures: Sequence[Figure], context: Context) -> Decision:
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
    known = [figure for figure in figures if figure.others or figure.suspects]
    if context.crash or context.failed:
        return _decide_error(known, context)
    missing = _missing(known, context)
    if missing:
        return Decision("not decided", f"Not decided: {missing}.")

    judged = {figure.name: _judge(figure) for figure in known}
    evidence = {name: found.to_dict() for name, found in judged.items()}
    # A figure whose jump in the run is not known says something only if that is so of all.
    jumps = [figure for figure in known if judged[figure.name].jumped is not None] or known
    batch = [figure for figure in jumps if judged[figure.name].says_batch]
    weights = [figure for figure in known if judged[figure.name].says_weights]
    out = [figure for figure in known if judged[figure.name].batch_out]

    if batch and not weights:
        return Decision("batch", _batch_sentence(batch[0], context), evidence)
    if weights and not out:
        open_question = _not_these_weights(weights, judged, context) or _not_the_run_itself(
            weights[0], context
        )
        if open_question:
            return Decision("not decided", f"Not decided: {open_question}.", evidence)
        return Decision("weights", _weights_sentence(weights[0], context), evidence)
    if weights:
        return Decision("not decided", _both_sentence(weights[0], out[0], context), evidence)
    return Decision("not decided", _neither_sentence(known, judged, out, context), evidence)


def _decide_error(figures: Sequence[Figure], context: Context) -> Decision:
    """Decide about a step that crashed, or whose batch cannot be run again."""
    start = f"on {_weights(context)} the batch of step {context.step}"
    others = max((len(figure.others) for figure in figures), default=0)
    is_alone = bool(others) and not context.others_failed
    # 1. The error comes again, and comes from no other batch.
    if context.failed and context.failed == context.crash and is_alone:
        noun = "batch runs" if others == 1 else "batches run"
        text = (
            f"The batch: {start} raises what the run raised ({context.crash}), and the "
            f"{others} other kept {noun}."
        )
        return Decision("batch", text)
    # 2. It cannot be run here, for a reason that need not be that of the run.
    if context.failed:
        text = f"Not decided: {start} could not be run: {context.failed}"
        if context.crash and context.failed != context.crash:
            text += f" (the run raised {context.crash})"
        if context.others_failed:
            text += f"; {context.others_failed} of the others could not be run either"
        elif not others:
            text += "; no other batch was run to compare it with"
        return Decision("not decided", f"{text}.")
    # 3. It runs: the figures show no error.
    text = (
        f"Not decided: {start}, which was running when the run raised {context.crash}, runs "
        "without an error"
    )
    return Decision("not decided", f"{text}.")


def _missing(figures: Sequence[Figure], context: Context) -> str:
    """Return what the flight lacks for a verdict; "" if it lacks nothing."""
    if not figures:
        return "no loss and no gradient could be computed"
    suspects, others = len(figures[0].suspects), len(figures[0].others)
    if not suspects:
        return f"the batch of step {context.step} was not kept; {context.keep_hint}"
    if others < LEAST_OTHERS:
        kept = "no other batch" if not others else f"{others} other batch{'es' * (others > 1)}"
        return (
            f"the flight keeps {kept}, and {LEAST_OTHERS} are needed to tell an unusual one; "
            f"{context.keep_hint}"
        )
    return ""


def _judge(figure: Figure) -> Judged:
    logarithm = figure.name == GRADIENT
    found = Judged()
    suspects = _scaled(figure.suspects, logarithm)
    others = _scaled(figure.others, logarithm)
    before, at_step = figure.before, figure.at_step

    # 1. The jump that is to be explained.
    if before is not None and at_step is not None:
        found.jump = _scaled([at_step], logarithm)[0] - before.center
        found.jumped = is_out(at_step, before, logarithm=logarithm)

    # 2. Values that are not finite need no comparison of sizes.
    finite = [value for value in others if math.isfinite(value)]
    if len(finite) < len(others):
        # Of other batches, most have to be so: one of them may be broken as well.
        found.weights_out = 2 * len(finite) < len(others)
        found.jumped = True
        if found.weights_out:
            found.weights_share = 1.0
        return found
    if not all(math.isfinite(value) for value in suspects):
        found.batch_out, found.batch_share, found.jumped = True, 1.0, True
        return found

    # 3. The suspects compared with the other batches, on the same weights; and their sequences with
    # the others'.
    center, spread = fmean(others), _floor(stdev(others), fmean(others), logarithm)
    limit = (
        _quantile(FALSE_ALARMS / len(suspects), len(others) - 1)
        * spread
        * math.sqrt(1 + 1 / len(others))
    )
    found.batch_out = max(suspects) - center > limit or bool(figure.sequences_out)
    if found.jump is not None and math.isfinite(found.jump) and found.jump > 0:
        found.batch_share = (fmean(suspects) - center) / found.jump

    # 4. The other batches compared with the run.
    rise = _rise(figure, others, center, spread)
    if rise is not None:
        found.weights_out = rise.mean > _quantile(FALSE_ALARMS, rise.count - 1) * rise.error
        if found.jump is not None and found.jump > 0 and math.isfinite(found.jump):
            found.weights_share = rise.mean / found.jump

    # 5. The suspect compared with the run, which has more values than the flight has batches.
    level = figure.at_checkpoint
    if level is not None and rise is not None and not found.weights_out and len(suspects) == 1:
        found.batch_out = found.batch_out or is_out(figure.suspects[0], level, logarithm=logarithm)
    return found


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
    logarithm = figure.name == GRADIENT
    differences = []
    for now, then in zip(others, figure.then, strict=False):
        if then is not None and math.isfinite(then):
            differences.append(now - _scaled([then], logarithm)[0])
    if len(differences) >= LEAST_OTHERS:
        error = _floor(stdev(differences), center, logarithm) / math.sqrt(len(differences))
        return _Rise(fmean(differences), error, len(differences))
    level = figure.at_checkpoint
    if level is None:
        return None
    error = math.hypot(
        spread / math.sqrt(len(others)), _MEDIAN_ERROR * level.spread / math.sqrt(level.count)
    )
    return _Rise(center - level.center, error, len(others))


def out_of_range(
    values: Sequence[float], others: Sequence[float], *, logarithm: bool
) -> list[bool]:
    """Return which values are above the range of others, at `FALSE_ALARMS` for all of them.

    Args:
        values: of the sequences of one batch.
        others: of the sequences of the other batches.
        logarithm: compare by the logarithm.
    """
    finite = _scaled([v for v in others if math.isfinite(v)], logarithm)
    if len(finite) < LEAST_OTHERS:
        return [False for _ in values]
    center, spread = fmean(finite), _floor(stdev(finite), fmean(finite), logarithm)
    chance = FALSE_ALARMS / max(len(values), 1)
    limit = _quantile(chance, len(finite) - 1) * spread * math.sqrt(1 + 1 / len(finite))
    return [not math.isfinite(v) or v - center > limit for v in _scaled(values, logarithm)]


def _not_these_weights(
    figures: Sequence[Figure], judged: dict[str, Judged], context: Context
) -> str:
    """Return why the model that was run cannot be that of the run; "" if it can be.

    The step after the checkpoint was made with its weights. A run that was usual there had usual
    weights.
    """
    if context.checkpoint_step is None or context.step is None:
        return ""
    hint = "is this the checkpoint of this run, and the model built as it was there?"
    what = _WORDS[figures[0].name]
    if context.checkpoint_step < context.step - 1:
        low, high = three(min(figures[0].others)), three(max(figures[0].others))
        return (
            f"ordinary batches have a {what} of {low} to {high} on {_weights(context)}, and the "
            "run was still usual "
            f"with them at the next step; {hint}"
        )
    for figure in figures:
        jump = judged[figure.name].jump
        if figure.met is None or jump is None or not math.isfinite(jump):
            continue
        now, then = _scaled(figure.met, figure.name == GRADIENT)
        if not abs(now - then) < HALF * jump:
            return (
                f"the batch that met {_weights(context)} in the run had a {_WORDS[figure.name]} of "
                f"{three(figure.met[1])} there, and has {three(figure.met[0])} now; {hint}"
            )
    return ""


def _not_the_run_itself(figure: Figure, context: Context) -> str:
    """Return why the figures may be those of an earlier part of the run; "" if they cannot be."""
    if context.checkpoint_step is not None:
        return ""
    level = fmean(figure.others)
    if not math.isfinite(level):
        return ""
    if figure.name != LOSS:
        return _SAVE_THE_STEP
    if context.highest_before is None:
        return (
            f"ordinary batches have a loss of {three(level)} on these weights, and {_SAVE_THE_STEP}"
        )
    if level <= context.highest_before:
        early = (
            f"ordinary batches have a loss of {three(level)} on these weights, as the run had "
            "early on"
        )
        return f"{early}; {_SAVE_THE_STEP}"
    return ""


_SAVE_THE_STEP = (
    "the checkpoint does not say its step, so that it may be an early one (save 'step' in it)"
)


# -- sentences -------------------------------------------------------------------------------------
def _batch_sentence(figure: Figure, context: Context) -> str:
    what, size = _WORDS[figure.name], three(max(figure.suspects))
    text = f"The batch: on {_weights(context)} its {what} is {size}, and {_range(figure)}"
    if figure.sequences_out:
        text += (
            f". Of its {figure.sequences} sequences {len(figure.sequences_out)} are out of "
            "the range of theirs"
        )
    if figure.at_step is not None and figure.before is not None:
        usual = _center(figure.before, figure)
        text += f". The run had {three(figure.at_step)} at step {context.step}, and {usual} before"
    return text + "."


def _weights_sentence(figure: Figure, context: Context) -> str:
    what, level = _WORDS[figure.name], figure.at_checkpoint
    text = f"The weights: on {_weights(context)} {_range(figure, what=True)}"
    if level is not None:
        text += f", where the run had {_center(level, figure)}"
    text += (
        f". The batch of step {context.step} ({what} {three(max(figure.suspects))}) is not "
        "out of their range"
    )
    if _holds_the_update(context):
        text += (
            f". These weights hold the update of step {context.step}: a checkpoint from before it "
            "tells whether that "
            "batch made them so"
        )
    return text + "."


def _both_sentence(weights: Figure, batch: Figure, context: Context) -> str:
    level = weights.at_checkpoint
    run = ""
    if level is not None:
        run = f", where the run had {_center(level, weights)}"
    return (
        f"Not decided: on {_weights(context)} {_range(weights, what=True)}{run}, and the batch of "
        f"step {context.step} "
        f"is out even among them ({_WORDS[batch.name]} {three(max(batch.suspects))}). "
        f"A checkpoint from before step {context.step} would decide."
    )


def _neither_sentence(
    figures: Sequence[Figure], judged: dict[str, Judged], out: Sequence[Figure], context: Context
) -> str:
    known = [figure for figure in figures if judged[figure.name].jumped is not None]
    jumped = [figure for figure in known if judged[figure.name].jumped]
    start = f"Not decided: on {_weights(context)} the batch of step {context.step} is"
    if known and not jumped:
        values = " and ".join(f"{_WORDS[f.name]} {three(f.at_step)}" for f in known)
        verb = ("is", "are")[len(known) > 1]
        text = f"Not decided: the run's {values} at step {context.step} {verb} usual for it"
        if out:
            return (
                f"{text}, while the batch is out of the range of the others on {_weights(context)}."
            )
        return f"{text}. There is no jump to explain."
    if out:
        return f"{start} out of the range of the others, by less than half of the run's jump."
    if not known:
        return (
            f"{start} not out of the range of the others, and the run's own values are not known."
        )
    same = [figure for figure in jumped if (judged[figure.name].batch_share or 0.0) >= HALF]
    if same:
        hint = "with more kept batches this range would be known better"
        return (
            f"{start} {_above(same[0])}, as in the run, and not out of the range of the "
            f"others; {hint}."
        )
    return (
        f"{start} not out of the range of the others, and these are as usual; "
        f"{_what_decides(jumped[0], context)}."
    )


def _above(figure: Figure) -> str:
    return f"above the others ({_WORDS[figure.name]} {three(max(figure.suspects))})"


def _what_decides(figure: Figure, context: Context) -> str:
    """Return what to look at if neither the batch nor the weights show the jump."""
    if context.checkpoint_step is None or context.step is None:
        return "a checkpoint that says its step, from right before or after that step, would decide"
    if context.checkpoint_step < context.step - 1:
        apart = context.step - context.checkpoint_step
        return (
            f"these weights are from {apart} steps before that step, and a later checkpoint "
            "would decide"
        )
    if context.checkpoint_step >= context.step:
        return (
            f"a checkpoint of step {context.step - 1}, the weights that the batch met, would decide"
        )
    what = _WORDS[figure.name]
    return (
        f"the run had a {what} of {three(figure.at_step)} with this batch and these weights, and "
        "the replay has "
        f"{three(max(figure.suspects))}: what made the jump is in neither (dropout, a loss "
        "outside the model, a fault "
        "that came and went, weights changed by hand)"
    )


def _weights(context: Context) -> str:
    if context.checkpoint_step is None:
        return "these weights (of a step that the checkpoint does not say)"
    return f"these weights (step {context.checkpoint_step})"


def _holds_the_update(context: Context) -> bool:
    if context.step is None:
        return False
    return context.checkpoint_step is None or context.checkpoint_step >= context.step


def _range(figure: Figure, *, what: bool = False) -> str:
    low, high = three(min(figure.others)), three(max(figure.others))
    name = ""
    if what:
        name = f"a {_WORDS[figure.name]} of "
    return f"the {len(figure.others)} other kept batches have {name}{low} to {high}"


def _center(level: LevelRecord, figure: Figure) -> str:
    if figure.name == GRADIENT:
        return three(math.exp(level.center))
    return three(level.center)


# -- numbers ---------------------------------------------------------------------------------------
def _log(value: float) -> float:
    if math.isnan(value) or value == math.inf:
        return value
    return math.log(max(value, 1e-300))


def _scaled(values: Sequence[float], logarithm: bool) -> list[float]:
    """Return values as they are compared: gradient norms by their logarithm."""
    if logarithm:
        return [_log(value) for value in values]
    return list(values)


def _floor(spread: float, center: float, logarithm: bool) -> float:
    """Return a spread, or what rounding alone makes of it."""
    if logarithm:
        return max(spread, _ROUNDING)
    return max(spread, _ROUNDING * abs(center))


def _quantile(chance: float, freedom: int) -> float:
    """Return what a t-distributed value exceeds with this chance."""
    from scipy.stats import t

    return float(t.isf(chance, max(freedom, 1)))
