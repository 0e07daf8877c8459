"""From the buffer's numbers to the rows of the log."""

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
    Row,
)
from jacdiag.monitor.step_usage import Outcome

# a norm summed in float32 on a CPU is off by up to 3e-3: a difference below this is no clipping
_CLIPPED = 5e-3


@dataclass(frozen=True)
class BadNames:
    """Names of what was not finite at a step, before the optimizer's step.

    Attributes:
        gradients: parameters whose gradient was not.
        weights: parameters that were not; None if nobody looked.
    """

    gradients: list[str]
    weights: list[str] | None


def row_of(
    row: Row,
    values: Sequence[float],
    labels: Sequence[str],
    bad: BadNames | None = None,
    written: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One step as the log tells it; what was not measured is null.

    A step with a gradient that is not finite also has `nonfinite_weights`, `nonfinite_gradients`
    and `with_gradient`. A step before which weights were written outside the optimizer has
    `written`.

    `grad_norm` is what `clip_grad_norm_` returned (before clipping), if it was given;
    `grad_norm_post` and `grad` (one per group) are what the optimiser saw. Under clipping by the
    global norm a group's norm before it is `grad` times `clip_ratio`.
    """
    # 1. Gradient norms before and after clipping.
    squares = list(values[FIRST:])
    post = _total_norm(squares) if row.made else None
    if row.late and post == 0:  # the gradients were cleared before anyone could read them
        row.made, post = False, None
    pre = _given_norm(values)
    is_known = pre is not None and math.isfinite(pre) and post is not None and post > 0
    ratio = pre / post if is_known else None  # type: ignore[operator]

    # 2. Whether the optimizer made a step, and with which rate.
    given_up = values[INF] > 0
    overflow = given_up or (pre is not None and not math.isfinite(pre))
    skipped = _is_skipped(row, given_up, overflow)
    nonfinite = (
        [label for label, s in zip(labels, squares, strict=True) if not math.isfinite(s)]
        if row.made
        else []
    )
    rate = row.lr
    if rate is None and row.rates:
        rate = row.rates[0]  # type: ignore[assignment]

    # 3. The line of the log.
    found: dict[str, Any] = {
        "step": row.step,
        "loss": values[LOSS] if row.told else None,
        "lr": rate,
        "lrs": row.rates if len(row.rates) > 1 else None,
        "tokens": row.tokens,
        "step_seconds": None if math.isnan(row.time) else row.time,
        "grad_norm": pre,
        "grad_norm_post": post,
        "clipped": None if ratio is None else ratio > 1 + _CLIPPED,
        "clip_ratio": ratio,
        "skipped": skipped,
        "skipped_for": "inf" if skipped and overflow else None,
        "optimizer_step": row.optimizer_step,
        "nonfinite": nonfinite,
        "weights_seen": row.weights_seen,
        "grad": [_root(s) for s in squares] if row.made else None,
        "update": None,
        "noise": micro_batch_norms(row, values),
    }
    if bad is not None:
        found |= {"nonfinite_gradients": bad.gradients, "nonfinite_weights": bad.weights}
        found["with_gradient"] = row.with_gradient
    if written is not None:
        found["written"] = {"after": row.written_after, **written}
    if row.update and not skipped:
        found["update"] = _update(row.update, values)
    return found


def _total_norm(squares: Sequence[float]) -> float | None:
    """Return the norm over all sub-layers; inf or nan where one of them is."""
    finite = all(map(math.isfinite, squares))
    return _root(math.fsum(squares) if finite else sum(squares))


def _given_norm(values: Sequence[float]) -> float | None:
    """Return the norm that the loop passed; None if it passed none."""
    given = values[GIVEN] if not math.isnan(values[GIVEN]) else _root(values[GIVEN_PART])
    return None if given is None or math.isnan(given) else given


def _update(where: str, values: Sequence[float]) -> dict[str, Any] | None:
    """Return how far a sub-layer moved in the step; None if it was not measured."""
    moved, size = _root(values[UPDATE]), _root(values[WEIGHT])
    if moved is None or size is None:
        return None
    return {"where": where, "norm": moved, "weight": size, "ratio": moved / size if size else None}


def micro_batch_norms(row: Row, values: Sequence[float]) -> MicroBatchNorms | None:
    """What the step's micro-batches say of the noise of the gradient; None if they were not read or
    not finite.
    """
    first, summed = values[MICRO], values[MICRO_SUM]
    if not row.micro_batches or not math.isfinite(first) or not math.isfinite(summed) or first <= 0:
        return None
    return MicroBatchNorms(first=first, summed=summed, count=row.micro_batches, rows=row.sequences)


def _is_skipped(row: Row, given_up: bool, overflow: bool) -> bool | None:
    """Whether the optimizer made no step; None if that is not known.

    A loss scaler that meets an overflow does not call the optimizer, so that no hook runs. The same
    is seen of an optimizer that steps by methods of its own and writes to `.data`: that one has
    never been seen to step.

    Args:
        row: the step.
        given_up: the optimizer was called and told of an overflow.
        overflow: a norm was not finite.
    """
    if row.optimizer_step != Outcome.NONE:
        return given_up
    if row.stepped_before or overflow:
        return True
    return None


def _root(square: float) -> float | None:
    return math.sqrt(square) if square >= 0 else (math.nan if math.isnan(square) else None)
