"""What the live rules read of one step: its figures, and which single signals of it stand out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jacdiag.detectors.written_weights import OutsideWrites
from jacdiag.records.run_log import number
from jacdiag.rules.thresholds import Thresholds


@dataclass(frozen=True)
class StepFigures:
    """The figures of one optimizer step, as the live rules read them.

    Attributes:
        step: its number.
        loss: None if the loop does not pass it.
        gradient: global gradient norm: before clipping if that is known, else after it.
        lr: learning rate; nan if it is not known.
        sublayers: gradient norm per sub-layer, in the order of `LiveRules.names`.
        skipped: the optimizer did not step.
        overflow: it did not step because a gradient was not finite; False if the cause is not
            known.
        nan_norm: the gradient norm is known to be NaN. `gradient` is NaN too if it is not known.
        nonfinite: sub-layers with a gradient that is not finite.
        update: (sub-layer, update norm / weight norm) of the sub-layer whose turn it was.
        bad_weights: weights that were not finite before the optimizer's step; None if they were
            not checked.
        bad_gradients: parameters whose gradient was not finite; None if they were not checked.
        with_gradient: how many parameters had a gradient; None if they were not counted.
        weights_seen: the weights were checked for values that are not finite.
        after_clipping: `gradient` is the norm after clipping, which says nothing about a spike if
            the loop clips.
        written: weights that were written outside the optimizer before the step; None if none is
            known.
    """

    step: int
    loss: float | None
    gradient: float
    lr: float = math.nan
    sublayers: Sequence[float] = ()
    skipped: bool = False
    overflow: bool = False
    nan_norm: bool = False
    nonfinite: Sequence[str] = ()
    update: tuple[str, float] | None = None
    bad_weights: Sequence[str] | None = None
    bad_gradients: Sequence[str] | None = None
    with_gradient: int | None = None
    weights_seen: bool = False
    after_clipping: bool = False
    written: OutsideWrites | None = None

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> StepFigures:
        """Return the figures of a line of type `step` of the run log."""
        # 1. Take the gradient norms from before clipping, if they are known.
        is_after_clipping = row["grad_norm"] is None
        gradient = row["grad_norm_post"] if is_after_clipping else row["grad_norm"]
        unclipped_factor = number(row["clip_ratio"]) if row["clip_ratio"] else 1.0
        sublayers = [number(norm) * unclipped_factor for norm in row["grad"] or ()]

        # 2. Read what may be absent.
        loss = None
        if row["loss"] is not None:
            loss = number(row["loss"])
        update = None
        if row["update"] and row["update"]["ratio"] is not None:
            update = (row["update"]["where"], number(row["update"]["ratio"]))

        # 3. Take what is not finite, if the optimizer made the step.
        is_skipped = bool(row["skipped"])
        nonfinite: Sequence[str] = ()
        if not is_skipped:
            nonfinite = row["nonfinite"]

        return cls(
            step=row["step"],
            loss=loss,
            gradient=number(gradient),
            lr=number(row["lr"]),
            sublayers=sublayers,
            skipped=is_skipped,
            overflow=row.get("skipped_for") in ("inf", "nan"),
            nan_norm=gradient is not None and math.isnan(number(gradient)),
            nonfinite=nonfinite,
            update=update,
            bad_weights=row.get("nonfinite_weights"),
            bad_gradients=row.get("nonfinite_gradients"),
            with_gradient=row.get("with_gradient"),
            weights_seen=bool(row.get("weights_seen")),
            after_clipping=is_after_clipping,
            written=OutsideWrites.from_row(row),
        )


@dataclass(frozen=True, kw_only=True)
class StepLimits:
    """Limits of the signals of a step; inf for one that is switched off."""

    spike_vote: float
    median_vote: float
    gradient_vote: float
    one_signal: float
    both_signals: float
    write_note: float
    write_alert: float

    @classmethod
    def from_thresholds(cls, thresholds: Thresholds) -> StepLimits:
        """Return the limits of a table of thresholds."""

        # A limit that is not set, such as one that the user switched off, is never exceeded.
        def cut(figure: str, level: str) -> float:
            value = getattr(thresholds.limits(figure), level)
            return math.inf if value is None else float(value)

        return cls(
            spike_vote=cut("spike_score", "info"),
            median_vote=cut("median_spike", "info"),
            gradient_vote=cut("gradient_z", "info"),
            one_signal=cut("joint_one", "warning"),
            both_signals=cut("joint_both", "warning"),
            write_note=cut("weight_write", "info"),
            write_alert=cut("weight_write", "warning"),
        )


@dataclass(frozen=True)
class StepSignals:
    """Which single signals of a step stand out.

    Attributes:
        high_loss: the loss, by its deviations above the last 1,000 steps.
        high_gradient: the gradient norm, in the same way.
        above_median: the loss, compared with its rolling median.
        gradient_vote: the gradient norm, compared with its exponential mean.
    """

    high_loss: bool
    high_gradient: bool
    above_median: bool
    gradient_vote: bool
