"""JD501 to JD507, and JD105 at each learning rate: a run while it goes on. Signals vote; the joint detectors speak.

One z-score over 2.5 alarms 62 times in 10,000 Gaussian steps. So the published single signals (a spike of OLMo 2's
score, of the rolling median, of ZClip's z-score) are votes in the log, and an alert takes several of them at once or
one of them for several steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jacdiag.report import Report
from jacdiag.report.runlog import Alert, number
from jacdiag.report.thresholds import Thresholds
from jacdiag.rules import live_texts
from jacdiag.rules.drift import Drift
from jacdiag.rules.joint import Joint
from jacdiag.rules.numbers import plain
from jacdiag.rules.rising_rate import RisingRate
from jacdiag.rules.rule import NOT_APPLICABLE, Context, Outcome, Rule
from jacdiag.rules.series import Exponential, Rolling, RollingMedian
from jacdiag.rules.updates import UpdateJump

SKIPPED_IN_A_ROW = 10  # a loss scaler halves its scale at every skip: ten in a row are a factor of 1,000
QUIET = 200  # steps in which a rule that has spoken says nothing more
_LOOK_BACK = 20


@dataclass(frozen=True)
class StepFigures:
    """One optimiser step, as the live rules see it.

    Attributes:
        loss: None where the loop does not tell it.
        gradient: global gradient norm: before clipping where that is known, else after it.
        sublayers: gradient norm per sub-layer, in the order of `names`.
        skipped: the optimiser did not step.
        overflow: it did not step because a gradient was not finite; False where the cause is not known.
        nonfinite: sub-layers with a gradient that is not finite.
        update: (sub-layer, update norm / weight norm) of the sub-layer whose turn it was.
    """

    step: int
    loss: float | None
    gradient: float
    lr: float = math.nan
    sublayers: Sequence[float] = ()
    skipped: bool = False
    overflow: bool = False
    nonfinite: Sequence[str] = ()
    update: tuple[str, float] | None = None

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> StepFigures:
        """A line of type `step` of the run log; gradients before clipping where that is known."""
        gradient = row["grad_norm"] if row["grad_norm"] is not None else row["grad_norm_post"]
        ratio = number(row["clip_ratio"]) if row["clip_ratio"] else 1.0
        update = row["update"]
        return cls(
            step=row["step"],
            loss=None if row["loss"] is None else number(row["loss"]),
            gradient=number(gradient),
            lr=number(row["lr"]),
            sublayers=[number(g) * ratio for g in row["grad"] or ()],
            skipped=bool(row["skipped"]),
            overflow=row.get("skipped_for") == "inf",
            nonfinite=row["nonfinite"] if not row["skipped"] else (),
            update=(update["where"], number(update["ratio"])) if update and update["ratio"] is not None else None,
        )


@dataclass
class Verdict:
    """What a step gave: codes that voted, z-scores, alerts."""

    votes: list[str] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    alerts: list[Alert] = field(default_factory=list)


class LiveRules:
    """The live rules of one run, with all that they remember.

    Args:
        thresholds: see `jacdiag.report.thresholds`.
        names: sub-layers, in the order of `StepFigures.sublayers`.

    Example:
        >>> from jacdiag.report.thresholds import load_thresholds
        >>> live = LiveRules(load_thresholds())
        >>> for step in range(100):
        ...     _ = live.step(StepFigures(step, 2.0 + 0.01 * (step % 7), 1.0 + 0.1 * (step % 5)))
        >>> [a.code for s in range(100, 103) for a in live.step(StepFigures(s, 9.0, 50.0)).alerts]
        ['JD502', 'JD501']
    """

    def __init__(self, thresholds: Thresholds, names: Sequence[str] = ()) -> None:
        self.limits = thresholds
        self.loss, self.gradient = Rolling(), Rolling()
        self.median, self.z = RollingMedian(), Exponential()
        self.drift, self.updates = Drift(thresholds), UpdateJump(thresholds)
        self.joint, self.rate = Joint(thresholds), RisingRate(thresholds)
        self.skipped = self.overflows = self.seen = 0
        self.spikes = {"loss": 0, "gradient": 0}
        self.spoken: dict[str, int] = {}
        self.suppressed: dict[str, int] = {}
        self.set_names(names)

    def set_names(self, names: Sequence[str]) -> None:
        """Says which sub-layers the figures belong to; their history begins anew."""
        self.names = list(names)
        self.each = [Exponential() for _ in names]
        self.risen = [-1] * len(self.names)  # step since which a sub-layer's gradient has been high

    # -- a step ----------------------------------------------------------------------------------------------------
    def step(self, figures: StepFigures) -> Verdict:
        """Looks at one step. Steps must come in order."""
        verdict = Verdict(alerts=self.rate.look(figures.step, figures.lr))
        self._non_finite(figures, verdict)
        loss = figures.loss
        if figures.skipped or (loss is not None and not math.isfinite(loss)):
            return verdict
        self.seen += 1
        zl, zg = self.loss.z(loss) if loss is not None else None, self.gradient.z(figures.gradient)
        ema = self.z.z(figures.gradient)
        middle = self.median.median()
        spike = self._cut("spike_score", "info")
        above = middle is not None and loss is not None and loss > middle + self._cut("median_spike", "info")
        high_loss, high_gradient = zl is not None and zl >= spike, zg is not None and zg >= spike
        self.spikes["loss"] += high_loss
        self.spikes["gradient"] += high_gradient
        if high_loss or above:
            verdict.votes.append("JD502")
        if high_gradient or (ema is not None and ema > self._cut("gradient_z", "info")):
            verdict.votes.append("JD503")
        known = {"loss": zl, "gradient": zg, "gradient_ema": ema}
        verdict.scores = {key: value for key, value in known.items() if value is not None}
        self._sublayers(figures)
        said = self.joint.look(loss, figures.gradient, zl, zg, ema, figures.update)
        if said is not None:
            self._together(figures, *said, verdict)
        if high_loss and above and ema is not None and ema > self._cut("gradient_z", "info"):
            self._loss_spike(figures, zl or 0.0, ema, middle or 0.0, verdict)
        if figures.update is not None and self.updates.add(*figures.update, figures.lr):
            verdict.votes.append("JD506")
        if loss is not None:
            self.loss.add(loss, outlier=self.joint.hit or high_loss)
            self.median.add(loss)
        self.gradient.add(figures.gradient, outlier=self.joint.hit or high_gradient)
        self.z.add(figures.gradient)
        return verdict

    def _together(self, f: StepFigures, what: str, evidence: Mapping[str, Any], verdict: Verdict) -> None:
        where = self.moved_first()
        known = {"loss": f.loss, "gradient": f.gradient, **evidence}
        self._speak(verdict, Alert(f.step, "JD501", "warning", what + _first(where), where, known))

    def _loss_spike(self, f: StepFigures, zl: float, ema: float, middle: float, verdict: Verdict) -> None:
        """One step on which three published signals agree: a corrupted batch does not last for three."""
        where = self.moved_first()
        loss = f.loss if f.loss is not None else math.nan
        what = f"loss {plain(loss)}, {plain(loss - middle)} over its median and {plain(zl)} standard deviations "
        what += f"over its mean, with the gradient norm at z {plain(ema)}{_first(where)}"
        evidence = {"loss": f.loss, "median": middle, "loss_z": zl, "gradient_ema_z": ema, "gradient": f.gradient}
        self._speak(verdict, Alert(f.step, "JD502", "warning", what, where, evidence))

    def _non_finite(self, f: StepFigures, verdict: Verdict) -> None:
        self.skipped = self.skipped + 1 if f.skipped else 0
        self.overflows = self.overflows + 1 if f.skipped and f.overflow else 0
        lost = f.loss is not None and not math.isfinite(f.loss)
        broken = lost or (not f.skipped and (math.isinf(f.gradient) or bool(f.nonfinite)))
        if f.skipped and self.skipped < SKIPPED_IN_A_ROW and not lost:
            return  # a loss scaler looks for its scale
        if not broken and self.skipped < SKIPPED_IN_A_ROW:
            return
        which = "the loss is" if lost else "gradients are"
        if broken:
            what = f"{which} not finite"
        elif self.overflows == self.skipped:
            what = f"{self.skipped} steps in a row were skipped for inf gradients"
        else:
            what = f"the optimizer made no step in {self.skipped} steps in a row"
        where = list(f.nonfinite)
        evidence = {"loss": f.loss, "gradient": f.gradient, "skipped_in_a_row": self.skipped}
        self._speak(verdict, Alert(f.step, "JD505", "error", what + _first(where), where, evidence))

    def _sublayers(self, f: StepFigures) -> None:
        """Keeps since when each sub-layer's gradient has been high, to name the one that moved first."""
        limit = self._cut("gradient_z", "info")
        for k, (series, value) in enumerate(zip(self.each, f.sublayers, strict=False)):
            z = series.z(value)
            high = z is not None and z > limit
            self.risen[k] = (self.risen[k] if self.risen[k] >= 0 else f.step) if high else -1
            series.add(value)

    def moved_first(self) -> list[str]:
        """Sub-layers whose gradient is high now, the one that has been so for longest first."""
        high = [(since, name) for since, name in zip(self.risen, self.names, strict=True) if since >= 0]
        return [name for _, name in sorted(high, key=lambda pair: pair[0])][:_LOOK_BACK]

    # -- a probe ---------------------------------------------------------------------------------------------------
    def probe(self, step: int, series: Mapping[str, Mapping[str, float]]) -> Verdict:
        """Looks at a probe: figure -> sub-layer (or matrix) -> value."""
        verdict = Verdict()
        for alert in self.drift.look(step, series):
            self._speak(verdict, alert)
        verdict.votes += self.drift.votes
        return verdict

    def know(self, report: Report) -> None:
        """Takes the report of a probe; what the untrained model was like decides how high a rate it bears."""
        self.rate.know(report)

    def resumed(self) -> None:
        """The run goes on from a checkpoint: the figures that an optimiser disturbs then are silent for a while."""
        self.updates.mute()
        self.joint.resumed()

    # -- speaking --------------------------------------------------------------------------------------------------
    def _speak(self, verdict: Verdict, alert: Alert) -> None:
        """One alert of a rule in `QUIET` steps; those in between are counted. The louder level is never held back."""
        key = f"{alert.code}:{alert.evidence.get('figure', '')}"
        last = self.spoken.get(key)
        if last is not None and alert.step - last < QUIET:
            self.suppressed[key] = self.suppressed.get(key, 0) + 1
            return
        self.spoken[key] = alert.step
        held = self.suppressed.pop(key, 0)
        verdict.alerts.append(Alert(alert.step, alert.code, alert.level, alert.what, alert.where, alert.evidence, held))

    def _cut(self, figure: str, cut: str) -> float:
        value = getattr(self.limits.limits(figure), cut)
        return math.inf if value is None else float(value)

    # -- memory ----------------------------------------------------------------------------------------------------
    def state(self) -> dict[str, Any]:
        return {
            "loss": self.loss.state(), "gradient": self.gradient.state(), "median": self.median.state(),
            "z": self.z.state(), "each": [series.state() for series in self.each], "names": self.names,
            "drift": self.drift.state(), "updates": self.updates.state(), "joint": self.joint.state(),
            "rate": self.rate.state(), "seen": self.seen, "risen": list(self.risen), "spikes": dict(self.spikes),
            "spoken": dict(self.spoken),
        }  # fmt: skip

    def load(self, state: Mapping[str, Any]) -> None:
        self.loss.load(state["loss"])
        self.gradient.load(state["gradient"])
        self.median.load(state["median"])
        self.z.load(state["z"])
        self.set_names(state["names"])
        for series, saved in zip(self.each, state["each"], strict=True):
            series.load(saved)
        self.risen = list(state["risen"])
        self.drift.load(state["drift"])
        self.updates.load(state["updates"])
        self.joint.load(state["joint"])
        self.rate.load(state["rate"])
        self.seen = state["seen"]
        self.spikes, self.spoken = dict(state["spikes"]), dict(state["spoken"])


def _first(where: Sequence[str]) -> str:
    return f"; {where[0]} first" if where else ""


def _of_a_run(_context: Context, _rule: Rule) -> Outcome:
    return NOT_APPLICABLE


RULES = tuple(
    Rule(code, name, level, **text, check=_of_a_run)  # type: ignore[arg-type]
    for code, name, level, text in (
        ("JD501", "joint-detector", "warning", live_texts.JOINT),
        ("JD502", "loss-spike", "warning", live_texts.LOSS_SPIKE),
        ("JD503", "gradient-spike", "info", live_texts.GRADIENT_SPIKE),
        ("JD504", "spectral-drift", "warning", live_texts.DRIFT),
        ("JD505", "non-finite-run", "error", live_texts.NON_FINITE),
        ("JD506", "update-jump", "info", live_texts.UPDATE_JUMP),
        ("JD507", "stable-rank-fall", "info", live_texts.STABLE_RANK),
    )
)
