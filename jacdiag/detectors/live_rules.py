"""JD501 to JD508, and JD105 at each learning rate: a run while it goes on. Signals vote; the joint
detectors speak.

One z-score over 2.5 alarms 62 times in 10,000 Gaussian steps. So the published single signals (a
spike of OLMo 2's score, of the rolling median, of ZClip's z-score) are votes in the log, and an
alert takes several of them at once or one of them for several steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jacdiag.detectors.drift import Drift, statistics_series
from jacdiag.detectors.first_mover import Moved, Movers
from jacdiag.detectors.first_nonfinite import NonFinite, explain_nonfinite
from jacdiag.detectors.joint_detector import Joint, Scores, Spoken
from jacdiag.detectors.readiness import Waits, waits_of
from jacdiag.detectors.recent_trend import WINDOW, Recent
from jacdiag.detectors.rising_rate import RisingRate
from jacdiag.detectors.running_statistics import Exponential, Rolling, RollingMedian
from jacdiag.detectors.update_jump import UpdateJump
from jacdiag.detectors.written_weights import Written, describe_written
from jacdiag.records import Report
from jacdiag.records.report import Level
from jacdiag.records.run_log import Alert, number
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.thresholds import Thresholds

# a loss scaler halves its scale at every skip: ten in a row are a factor of 1,000
SKIPPED_IN_A_ROW = 10
QUIET = 200  # steps in which a rule that has spoken says nothing more


@dataclass(frozen=True)
class StepFigures:
    """One optimiser step, as the live rules see it.

    Attributes:
        loss: None where the loop does not tell it.
        gradient: global gradient norm: before clipping where that is known, else after it.
        sublayers: gradient norm per sub-layer, in the order of `names`.
        skipped: the optimiser did not step.
        overflow: it did not step because a gradient was not finite; False where the cause is not
            known.
        nonfinite: sub-layers with a gradient that is not finite.
        update: (sub-layer, update norm / weight norm) of the sub-layer whose turn it was.
        bad_weights: weights that were not finite before the optimizer's step; None if nobody
            looked.
        bad_gradients: parameters whose gradient was not finite; None if nobody looked.
        with_gradient: how many parameters had a gradient; None if nobody looked.
        weights_seen: somebody looked whether the weights were finite.
        written: weights that were written outside the optimizer before the step; None if none is
            known.
        after_clipping: `gradient` is the norm after clipping, and says nothing of a spike if the
            loop clips.
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
    bad_weights: Sequence[str] | None = None
    bad_gradients: Sequence[str] | None = None
    with_gradient: int | None = None
    weights_seen: bool = False
    after_clipping: bool = False
    written: Written | None = None

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
            update=(update["where"], number(update["ratio"]))
            if update and update["ratio"] is not None
            else None,
            bad_weights=row.get("nonfinite_weights"),
            bad_gradients=row.get("nonfinite_gradients"),
            with_gradient=row.get("with_gradient"),
            weights_seen=bool(row.get("weights_seen")),
            after_clipping=row["grad_norm"] is None,
            written=Written.of_row(row),
        )


@dataclass
class Verdict:
    """What a step gave: codes that voted, z-scores, alerts, and notes for the log alone."""

    votes: list[str] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    alerts: list[Alert] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class LiveRules:
    """The live rules of one run, with all that they remember.

    Args:
        thresholds: see `jacdiag.rules.thresholds`.
        names: sub-layers, in the order of `StepFigures.sublayers`.

    Example:
        >>> from jacdiag.rules.thresholds import load_thresholds
        >>> live = LiveRules(load_thresholds())
        >>> for step in range(100):
        ...     _ = live.step(StepFigures(step, 2.0 + 0.01 * (step % 7), 1.0 + 0.1 * (step % 5)))
        >>> [a.code for s in range(100, 103) for a in live.step(StepFigures(s, 9.0, 50.0)).alerts]
        ['JD502', 'JD501']
    """

    def __init__(self, thresholds: Thresholds, names: Sequence[str] = ()) -> None:
        self.limits = thresholds
        self._cuts: dict[tuple[str, str], float] = {}  # those that were asked for
        self.loss, self.gradient = Rolling(), Rolling()
        self.recent_loss, self.recent_gradient = Recent(), Recent(logarithm=True)
        self.median, self.z = RollingMedian(), Exponential()
        self.drift, self.updates = Drift(thresholds), UpdateJump(thresholds)
        self.joint, self.rate = Joint(thresholds), RisingRate(thresholds)
        self.skipped = self.overflows = self.seen = self.probes = 0
        # last step with a finite loss and gradients; weights seen finite
        self.finite: tuple[int, bool] | None = None
        self.spikes = {"loss": 0, "gradient": 0}
        self.noted_write = False
        self.spoken: dict[str, int] = {}
        self.suppressed: dict[str, int] = {}
        self.set_names(names)

    def set_names(self, names: Sequence[str]) -> None:
        """Says which sub-layers the figures belong to; their history begins anew."""
        self.names = list(names)
        self.movers = Movers(names, self._cut("joint_both", "warning"))

    # -- a step ------------------------------------------------------------------------------------
    def step(self, figures: StepFigures) -> Verdict:
        """Looks at one step. Steps must come in order."""
        verdict = Verdict(alerts=self.rate.look(figures.step, figures.lr))
        self._written(figures, verdict)
        self._non_finite(figures, verdict)
        loss = figures.loss
        if figures.skipped or (loss is not None and not math.isfinite(loss)):
            return verdict
        self.seen += 1
        # 1. Score the step by what came before it.
        scores = self._scores(figures)
        verdict.scores = scores.known()
        self.movers.look(figures.step, figures.sublayers)
        # 2. Collect the votes of single signals.
        spike = self._cut("spike_score", "info")
        high_loss = scores.loss is not None and scores.loss >= spike
        high_gradient = scores.gradient is not None and scores.gradient >= spike
        middle = self.median.median()
        above = (
            middle is not None
            and loss is not None
            and loss > middle + self._cut("median_spike", "info")
        )
        self.spikes["loss"] += high_loss
        self.spikes["gradient"] += high_gradient
        vote = self._cut("gradient_z", "info")
        if high_loss or above:
            verdict.votes.append("JD502")
        if high_gradient or (scores.gradient_ema is not None and scores.gradient_ema > vote):
            verdict.votes.append("JD503")
        # 3. Speak where several agree.
        spoken = self.joint.look(figures.step, loss, figures.gradient, scores, figures.update)
        if spoken is not None:
            self._together(figures, spoken, verdict)
        published = (
            high_loss and above and scores.gradient_ema is not None and scores.gradient_ema > vote
        )
        if published or self._is_recent_spike(figures, scores):
            self._loss_spike(figures, scores, verdict)
        if figures.update is not None and self.updates.add(*figures.update, figures.lr):
            verdict.votes.append("JD506")
        # 4. Take the step in.
        if loss is not None:
            self.loss.add(loss, outlier=self.joint.hit or high_loss)
            self.median.add(loss)
            self.recent_loss.add(loss)
        self.gradient.add(figures.gradient, outlier=self.joint.hit or high_gradient)
        self.z.add(figures.gradient)
        self.recent_gradient.add(figures.gradient)
        return verdict

    def _scores(self, f: StepFigures) -> Scores:
        loss = f.loss
        return Scores(
            loss=self.loss.z(loss) if loss is not None else None,
            gradient=self.gradient.z(f.gradient),
            gradient_ema=self.z.z(f.gradient),
            loss_recent=self.recent_loss.z(loss) if loss is not None else None,
            gradient_recent=self.recent_gradient.z(f.gradient),
        )

    def _is_recent_spike(self, f: StepFigures, scores: Scores) -> bool:
        """Whether loss and gradient norm stand out of the last 48 steps at this very step.

        The loss has to stand out, because batches differ in their gradient norm by much more than
        in their loss. It has to be 0.1 above its usual value too, unless the gradient norm stands
        as far out as the loss. Over 375,000 steps of the lab's healthy runs this is true once.
        Without the gradient norm it is true twice. The gradient norm is left out if it is only
        known after clipping.
        """
        loss, gradient, usual = scores.loss_recent, scores.gradient_recent, self.recent_loss.usual()
        if f.loss is None or loss is None or usual is None:
            return False
        far = self._cut("joint_one", "warning")
        if loss <= far:
            return False
        is_high = f.loss > usual + self._cut("median_spike", "info")
        if f.after_clipping:
            return is_high
        # a model of which little is trained: its loss hardly moves, and hardly scatters
        if not is_high:
            return gradient is not None and gradient > far
        return gradient is not None and gradient > self._cut("gradient_z", "info")

    def _together(self, f: StepFigures, spoken: Spoken, verdict: Verdict) -> None:
        what = f"{spoken.what}{self._usual(f)}"
        evidence = {
            "loss": f.loss,
            "gradient": f.gradient,
            **spoken.evidence,
            **self._evidence(spoken.since),
        }
        self._speak(verdict, self._alert(f.step, "JD501", "warning", what, evidence))

    def _loss_spike(self, f: StepFigures, scores: Scores, verdict: Verdict) -> None:
        """One step on which several signals agree: a corrupted batch does not last for three."""
        gradient = (
            scores.gradient_recent if scores.gradient_recent is not None else scores.gradient_ema
        )
        what = (
            f"the loss stands {plain(scores.loss_recent)} and the gradient norm "
            f"{plain(gradient)} standard "
        )
        what += f"deviations above the line of the last {WINDOW} steps{self._usual(f)}"
        evidence = {
            "loss": f.loss,
            "gradient": f.gradient,
            "median": self.median.median(),
            "loss_z": scores.loss,
            "gradient_ema_z": scores.gradient_ema,
            "loss_recent_z": scores.loss_recent,
            "gradient_recent_z": scores.gradient_recent,
            **self._evidence(f.step),
        }
        self._speak(verdict, self._alert(f.step, "JD502", "warning", what, evidence))

    def _usual(self, f: StepFigures) -> str:
        """The figures of the step beside what is usual."""
        known = []
        loss, gradient = self.recent_loss.usual(), self.recent_gradient.usual()
        if f.loss is not None and loss is not None:
            known.append(f"loss {plain(f.loss)}, usually {plain(loss)}")
        if gradient is not None:
            clipped = " after clipping" if f.after_clipping else ""
            known.append(f"gradient norm{clipped} {plain(f.gradient)}, usually {plain(gradient)}")
        return f" ({'; '.join(known)})" if known else ""

    def _evidence(self, since: int) -> dict[str, Any]:
        """Since when, against which usual values, and which sub-layers moved."""
        return {
            "since": since,
            "usual_loss": self.recent_loss.usual(),
            "usual_gradient": self.recent_gradient.usual(),
            "moved": [moved.evidence() for moved in self.moved_first()],
        }

    def _alert(
        self, step: int, code: str, level: Level, what: str, evidence: dict[str, Any]
    ) -> Alert:
        where = [moved.where for moved in self.moved_first()]
        return Alert(step, code, level, what + self.movers.sentence(), where, evidence)

    def _written(self, f: StepFigures, verdict: Verdict) -> None:
        """Alert on weights that changed between two steps by their own norm; note smaller changes
        once in a run.
        """
        if f.written is None:
            return
        what = describe_written(f.written, f.step)
        largest = f.written.weights[0]
        if largest.change < self._cut("weight_write", "warning"):
            if largest.change >= self._cut("weight_write", "info") and not self.noted_write:
                self.noted_write = True
                verdict.notes.append(f"{what}. Later writes as small as this one are not told")
            return
        evidence = {
            "since": f.step,
            "after": f.written.after,
            "change": largest.change,
            "times": largest.times,
            "count": f.written.count,
        }
        where = [weight.name for weight in f.written.weights]
        self._speak(verdict, Alert(f.step, "JD508", "warning", what, where, evidence))

    def _non_finite(self, f: StepFigures, verdict: Verdict) -> None:
        self.skipped = self.skipped + 1 if f.skipped else 0
        self.overflows = self.overflows + 1 if f.skipped and f.overflow else 0
        lost = f.loss is not None and not math.isfinite(f.loss)
        broken = lost or (not f.skipped and (math.isinf(f.gradient) or bool(f.nonfinite)))
        if not broken and not f.skipped:
            self.finite = (f.step, f.weights_seen)
            return
        if f.skipped and self.skipped < SKIPPED_IN_A_ROW and not lost:
            return  # a loss scaler looks for its scale
        evidence: dict[str, Any] = {
            "loss": f.loss,
            "gradient": f.gradient,
            "skipped_in_a_row": self.skipped,
        }
        if not broken:
            since = f.step - self.skipped + 1
            what = (
                f"the optimizer made no step in {self.skipped} steps in a row, since step {since}"
            )
            if self.overflows == self.skipped:
                what = (
                    f"{self.skipped} steps in a row were skipped for inf gradients, since step "
                    f"{since}"
                )
            alert = Alert(f.step, "JD505", "error", what, [], {**evidence, "since": since})
            self._speak(verdict, alert)
            return
        previous, weights_before = self.finite or (None, False)
        nonfinite = NonFinite(
            loss=f.loss,
            groups=f.nonfinite,
            weights=f.bad_weights,
            gradients=f.bad_gradients,
            parameters=f.with_gradient,
            ordered=[name for name in self.names if not name.startswith("(")],
            previous=previous,
            weights_before=weights_before,
        )
        explanation = explain_nonfinite(nonfinite)
        evidence |= {"first": explanation.first, "since": f.step, "sublayers": list(f.nonfinite)}
        self._speak(
            verdict, Alert(f.step, "JD505", "error", explanation.what, explanation.where, evidence)
        )

    def moved_first(self) -> list[Moved]:
        """Sub-layers whose gradient is high now, the one that has been so for longest first."""
        return self.movers.order()

    # -- a probe -----------------------------------------------------------------------------------
    def probe(self, step: int, series: Mapping[str, Mapping[str, float]]) -> Verdict:
        """Looks at a probe: figure -> sub-layer (or matrix) -> value."""
        verdict = Verdict()
        self.probes += 1
        for alert in self.drift.look(step, series):
            self._speak(verdict, alert)
        verdict.votes += self.drift.votes
        return verdict

    def statistics(self, step: int, series: Mapping[str, Mapping[str, float | None]]) -> Verdict:
        """Looks at a round of statistics: figure -> sub-layer -> value, None where it was not
        measured.
        """
        verdict = Verdict()
        for alert in self.drift.look(step, statistics_series(series)):
            self._speak(verdict, alert)
        return verdict

    def waits(self) -> Waits:
        """Return what each rule still waits for; a rule that is ready is not in it."""
        return waits_of(self)

    def know(self, report: Report) -> None:
        """Takes the report of a probe; what the untrained model was like decides how high a rate it
        bears.
        """
        self.rate.know(report)

    def resumed(self) -> None:
        """The run goes on from a checkpoint: the figures that an optimiser disturbs then are silent
        for a while.
        """
        self.updates.mute()
        self.joint.resumed()

    def renumber(self, old: int, new: int) -> None:
        """Give what was looked at as step `old` another number: the loop has said where it is."""
        self.drift.renumber(old, new)
        self.spoken = {key: new if step == old else step for key, step in self.spoken.items()}

    def rewind(self, base: int) -> None:
        """The loop goes on from an earlier step, and does the steps after it again."""
        self.resumed()
        self.spoken = {key: min(step, base) for key, step in self.spoken.items()}

    # -- speaking ----------------------------------------------------------------------------------
    def _speak(self, verdict: Verdict, alert: Alert) -> None:
        """One alert of a rule in `QUIET` steps; those in between are counted. The louder level is
        never held back.
        """
        key = f"{alert.code}:{alert.evidence.get('figure', '')}"
        last = self.spoken.get(key)
        if last is not None and alert.step - last < QUIET:
            self.suppressed[key] = self.suppressed.get(key, 0) + 1
            return
        self.spoken[key] = alert.step
        held = self.suppressed.pop(key, 0)
        verdict.alerts.append(
            Alert(
                alert.step, alert.code, alert.level, alert.what, alert.where, alert.evidence, held
            )
        )

    def _cut(self, figure: str, cut: str) -> float:
        known = self._cuts.get((figure, cut))
        if known is None:
            value = getattr(self.limits.limits(figure), cut)
            known = self._cuts[figure, cut] = math.inf if value is None else float(value)
        return known

    # -- memory ------------------------------------------------------------------------------------
    def state(self) -> dict[str, Any]:
        return {
            "loss": self.loss.state(),
            "gradient": self.gradient.state(),
            "median": self.median.state(),
            "z": self.z.state(),
            **self.movers.state(),
            "names": self.names,
            "drift": self.drift.state(),
            "updates": self.updates.state(),
            "joint": self.joint.state(),
            "rate": self.rate.state(),
            "seen": self.seen,
            "spikes": dict(self.spikes),
            "spoken": dict(self.spoken),
            "probes": self.probes,
            "recent": {"loss": self.recent_loss.state(), "gradient": self.recent_gradient.state()},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self.loss.load(state["loss"])
        self.gradient.load(state["gradient"])
        self.median.load(state["median"])
        self.z.load(state["z"])
        self.set_names(state["names"])
        self.movers.load(state)
        recent = state.get("recent")  # a state of an older version has none
        if recent is not None:
            self.recent_loss.load(recent["loss"])
            self.recent_gradient.load(recent["gradient"])
        self.probes = int(state.get("probes", 0))
        self.drift.load(state["drift"])
        self.updates.load(state["updates"])
        self.joint.load(state["joint"])
        self.rate.load(state["rate"])
        self.seen = state["seen"]
        self.spikes, self.spoken = dict(state["spikes"]), dict(state["spoken"])
