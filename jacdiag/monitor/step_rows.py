"""Build the rows of the log from the numbers of the buffer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jacdiag.monitor.noise_scale import MicroBatchNorms
from jacdiag.monitor.step_metrics import (
    FIRST,
    GIVEN,
    GIVEN_PART,
    INF,
    LOSS,
    MICRO,
    MICRO_SUM,
    UPDATE,
    WEIGHT,
    StepRow,
)
from jacdiag.monitor.step_usage import StepOutcome

# a norm summed in float32 on a CPU is off by up to 3e-3: a difference below this is no clipping
_CLIPPED = 5e-3


@dataclass(frozen=True)
class NonfiniteNames:
    """Names of what was not finite in a step, before the optimizer's step.

    Attributes:
        gradients: parameters whose gradient was not finite.
        weights: parameters that were not finite themselves; None if nobody looked.
    """

    gradients: list[str]
    weights: list[str] | None


@dataclass(frozen=True, kw_only=True)
class GradientNorms:
    """Norms of the gradient of a step.

    Attributes:
        before_clipping: the norm that the loop passed; None if it passed none.
        after_clipping: the norm that the optimizer used; None if it was not read.
        squares: one sum of squares per sub-layer; None if they were not read.
    """

    before_clipping: float | None
    after_clipping: float | None
    squares: Sequence[float] | None

    @property
    def is_overflow(self) -> bool:
        """Whether the norm that the loop passed is not finite."""
        return self.before_clipping is not None and not math.isfinite(self.before_clipping)

    @property
    def is_nan(self) -> bool:
        """Whether the norm that the loop passed is NaN."""
        return self.before_clipping is not None and math.isnan(self.before_clipping)

    @property
    def clip_ratio(self) -> float | None:
        """The norm before clipping over the one after it; None if either is not known."""
        before, after = self.before_clipping, self.after_clipping
        if before is None or after is None:
            return None

        # A norm that is not finite, or zero, has no ratio.
        if math.isfinite(before) and after > 0:
            return before / after
        return None

    @property
    def is_clipped(self) -> bool | None:
        """Whether the gradient was clipped; None if that is not known."""
        ratio = self.clip_ratio
        if ratio is None:
            return None
        return ratio > 1 + _CLIPPED


def build_step_row(
    row: StepRow,
    values: Sequence[float],
    labels: Sequence[str],
    nonfinite: NonfiniteNames | None = None,
    written: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return one step as a row of the log; what was not measured is null.

    A step with a gradient that is not finite also has `nonfinite_weights`, `nonfinite_gradients`
    and `with_gradient`. A step before which weights were written outside the optimizer has
    `written`.

    `grad_norm` is what `clip_grad_norm_` returned (before clipping), if it was passed.
    `grad_norm_post` and `grad` (one per group) are what the optimizer used. Under clipping by the
    global norm a group's norm before clipping is `grad` times `clip_ratio`.

    Args:
        row: what the host knew at once.
        values: the columns of the buffer, then one sum of squares per sub-layer.
        labels: names of the sub-layers.
        nonfinite: what was not finite; None if everything was finite.
        written: what was written outside the optimizer; None if nothing was.
    """
    # 1. Gradient norms before and after clipping.
    norms = _gradient_norms(row, values)
    sublayer_norms: list[float | None] | None = None
    nonfinite_labels: list[str] = []
    if norms.squares is not None:
        sublayer_norms = [_root(square) for square in norms.squares]
        for label, square in zip(labels, norms.squares, strict=True):
            if not math.isfinite(square):
                nonfinite_labels.append(label)

    # 2. Whether the optimizer made a step, and with which rate.
    has_found_inf = values[INF] > 0
    is_overflow = has_found_inf or norms.is_overflow
    skipped = _is_skipped(row, has_found_inf, is_overflow)
    skipped_for: str | None = None
    if skipped and is_overflow:
        # The flag of a loss scaler stands for inf and for NaN.
        skipped_for = "nan" if norms.is_nan else "inf"
    rate = row.lr
    if rate is None and row.rates:
        rate = row.rates[0]  # type: ignore[assignment]

    # 3. The row of the log.
    line: dict[str, Any] = {
        "step": row.step,
        "loss": values[LOSS] if row.has_loss else None,
        "lr": rate,
        "lrs": row.rates if len(row.rates) > 1 else None,
        "tokens": row.tokens,
        "step_seconds": None if math.isnan(row.time) else row.time,
        "grad_norm": norms.before_clipping,
        "grad_norm_post": norms.after_clipping,
        "clipped": norms.is_clipped,
        "clip_ratio": norms.clip_ratio,
        "skipped": skipped,
        "skipped_for": skipped_for,
        "optimizer_step": row.optimizer_step,
        "nonfinite": nonfinite_labels,
        "weights_seen": row.weights_seen,
        "grad": sublayer_norms,
        "update": None,
        "noise": micro_batch_norms(row, values),
    }

    # 4. What only some steps have.
    if nonfinite is not None:
        line["nonfinite_gradients"] = nonfinite.gradients
        line["nonfinite_weights"] = nonfinite.weights
        line["with_gradient"] = row.with_gradient
    if written is not None:
        line["written"] = {"after": row.written_after, **written}
    if row.update and not skipped:
        line["update"] = _describe_update(row.update, values)
    return line


def _gradient_norms(row: StepRow, values: Sequence[float]) -> GradientNorms:
    # 1. A step without gradients.
    passed = _passed_norm(row, values)
    if not row.has_gradients:
        return GradientNorms(before_clipping=passed, after_clipping=None, squares=None)

    # 2. Gradients that were cleared before anyone could read them.
    squares = list(values[FIRST:])
    total = _total_norm(squares)
    if row.late and total == 0:
        row.has_gradients = False
        return GradientNorms(before_clipping=passed, after_clipping=None, squares=None)

    # 3. Those that the optimizer used. A loop may pass NaN for a norm that it does not know.
    is_contradicted = passed is not None and math.isnan(passed)
    if is_contradicted and total is not None and math.isfinite(total):
        passed = None
    return GradientNorms(before_clipping=passed, after_clipping=total, squares=squares)


def _total_norm(squares: Sequence[float]) -> float | None:
    """Return the norm over all sub-layers; inf or nan if one of them is."""
    if all(map(math.isfinite, squares)):
        return _root(math.fsum(squares))
    return _root(sum(squares))


def _passed_norm(row: StepRow, values: Sequence[float]) -> float | None:
    """Return the norm that the loop passed, which may be NaN; None if it passed none."""
    # NaN also stands for a column that nobody has written to.
    if not row.has_norm:
        return None
    if math.isnan(values[GIVEN]):
        return _root(values[GIVEN_PART])
    return values[GIVEN]


def _describe_update(label: str, values: Sequence[float]) -> dict[str, Any] | None:
    """Return how far a sub-layer moved in the step; None if it was not measured."""
    moved = _root(values[UPDATE])
    size = _root(values[WEIGHT])
    if moved is None or size is None:
        return None
    ratio = None
    if size:
        ratio = moved / size
    return {"where": label, "norm": moved, "weight": size, "ratio": ratio}


def micro_batch_norms(row: StepRow, values: Sequence[float]) -> MicroBatchNorms | None:
    """Return the gradient norms of the step's micro-batches.

    Returns:
        None if the gradients of single micro-batches were not read, or are not finite.
    """
    if not row.micro_batches:
        return None
    first, summed = values[MICRO], values[MICRO_SUM]
    are_finite = math.isfinite(first) and math.isfinite(summed)
    if not are_finite:
        return None
    if first <= 0:
        return None
    return MicroBatchNorms(first=first, summed=summed, count=row.micro_batches, rows=row.sequences)


def _is_skipped(row: StepRow, has_found_inf: bool, is_overflow: bool) -> bool | None:
    """Return whether the optimizer made no step; None if that is not known.

    A loss scaler that meets an overflow does not call the optimizer, so that no hook runs. An
    optimizer that steps by methods of its own and writes to `.data` looks the same. That one has
    never been seen to step. Whether a CUDA graph with the step was replayed is not known either.

    Args:
        row: the step.
        has_found_inf: the optimizer was called, and a loss scaler had found inf.
        is_overflow: a norm was not finite.
    """
    # 1. The optimizer was called.
    if row.optimizer_step == StepOutcome.REPLAYED:
        return None
    if row.optimizer_step != StepOutcome.NONE:
        return has_found_inf

    # 2. It was not, as far as anyone has seen.
    if row.stepped_before or is_overflow:
        return True
    return None


def _root(square: float) -> float | None:
    """Return the square root; None for a negative number, which stands for no number."""
    if square >= 0:
        return math.sqrt(square)
    if math.isnan(square):
        return math.nan
    return None
