"""Judge a run while it trains: JD501 to JD508, and JD105 at each new learning rate.

One z-score over 2.5 alarms 62 times in 10,000 Gaussian steps. So the published single signals are
only votes in the log: a spike of OLMo 2's score, of the rolling median, or of ZClip's z-score. An
alert takes several signals at once, or one signal for several steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jacdiag.detectors.drift import Drift, statistics_series
from jacdiag.detectors.first_mover import MOST_LISTED, GradientRises, HighGradient
from jacdiag.detectors.first_nonfinite import NonFiniteStep, explain_nonfinite
from jacdiag.detectors.group_counts import is_sublayer
from jacdiag.detectors.joint_detector import JointAlarm, JointDetector, StepScores
from jacdiag.detectors.loss_spike import find_spike
from jacdiag.detectors.quiet_time import QUIET, Occurrence, QuietTime, Reaction
from jacdiag.detectors.readiness import SampleCounts, Waits, waits_of
from jacdiag.detectors.recent_trend import RecentTrend
from jacdiag.detectors.rising_rate import RisingRate
from jacdiag.detectors.running_statistics import ExponentialMoments, RollingMedian, RollingMoments
from jacdiag.detectors.step_figures import StepFigures, StepLimits, StepSignals
from jacdiag.detectors.update_jump import UpdateJump
from jacdiag.detectors.written_weights import describe_written
from jacdiag.records import Report
from jacdiag.records.report import Level
from jacdiag.records.run_log import Alert
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.thresholds import Thresholds

# A loss scaler halves its scale at every skip. Ten skips in a row are a factor of 1,000.
SKIPPED_IN_A_ROW = 10

# Topics of the quiet time. Those of other rules are their codes.
_SKIPS = "JD505:skips"
_SPIKES = ("JD501", "JD502")


@dataclass(frozen=True, kw_only=True)
class Repeat:
    """A rule that stands out again in its quiet time.

    Attributes:
        alert: what it would have fired with.
        after: the step of its last alert.
    """

    alert: Alert
    after: int

    def __str__(self) -> str:
        """Return what stands out, and why it is no alert."""
        alert = self.alert
        return (
            f"{alert.code} again at step {alert.step}: {alert.what}. No alert: the rule fired at "
            f"step {self.after}, and is quiet for {QUIET} steps from there"
        )


@dataclass
class LiveResult:
    """What the live rules make of one step, one probe or one round of statistics.

    Attributes:
        votes: codes of the rules whose single signal stands out.
        scores: z-scores by name.
        alerts: rules that fire.
        repeats: rules that stand out again in their quiet time, in another event than the last one.
        notes: texts for the log alone.
    """

    votes: list[str] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    alerts: list[Alert] = field(default_factory=list)
    repeats: list[Repeat] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def _is_left_out(figures: StepFigures) -> bool:
    """Return whether a step is compared with nothing: it was skipped, or its loss is not finite."""
    has_nonfinite_loss = figures.loss is not None and not math.isfinite(figures.loss)
    return figures.skipped or has_nonfinite_loss


class LiveRules:
    """The live rules of one run, with the running statistics that they compare a step with.

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
        """Begin without a history; see the class for the arguments."""
        self._limits = StepLimits.from_thresholds(thresholds)
        # What a step is compared with.
        self._loss = RollingMoments()
        self._gradient = RollingMoments()
        self._recent_loss = RecentTrend()
        self._recent_gradient = RecentTrend(logarithm=True)
        self._median_loss = RollingMedian()
        self._gradient_ema = ExponentialMoments()
        # The detectors that keep statistics of their own.
        self._drift = Drift(thresholds)
        self._updates = UpdateJump(thresholds)
        self._joint = JointDetector(thresholds)
        self._rate = RisingRate(thresholds)
        # Counts of what was judged.
        self.seen = 0
        self.probes = 0
        self.spikes = {"loss": 0, "gradient": 0}
        # JD505: skips in a row, how many of them for inf, and the last step that was finite.
        self._skips_in_a_row = 0
        self._overflows_in_a_row = 0
        self._last_finite_step: int | None = None
        self._last_finite_saw_weights = False
        self._is_still_nonfinite = False
        # What was reported already.
        self._has_noted_write = False
        self._quiet = QuietTime()
        self.set_names(names)

    def set_names(self, names: Sequence[str]) -> None:
        """Set which sub-layers the figures belong to; their history begins again."""
        self.names = list(names)
        self._rises = GradientRises(names, self._limits.both_signals)

    @property
    def updates_leap(self) -> bool:
        """Whether the last update that was measured is far above the usual ones."""
        return self._joint.updates_leap

    # -- a step ------------------------------------------------------------------------------------
    def expect(self, block: Sequence[StepFigures]) -> None:
        """Prepare for steps that are going to be judged: what they share is done once.

        `step` gives the same results without this call, to the last bit.

        Args:
            block: the figures of each step, in order.
        """
        judged = [figures for figures in block if not _is_left_out(figures)]
        self._recent_gradient.foresee([figures.gradient for figures in judged])
        self._recent_loss.foresee([f.loss for f in judged if f.loss is not None])

    def step(self, figures: StepFigures) -> LiveResult:
        """Judge one step, then add it to the running statistics.

        Args:
            figures: of the step. Steps must come in order.

        Returns:
            Its scores and votes, and the alerts of the rules that fire at it.
        """
        result = LiveResult(alerts=self._rate.look(figures.step, figures.lr))
        self._quiet.begin_step(figures.step)
        self._judge_writes(figures, result)
        self._judge_nonfinite(figures, result)
        if _is_left_out(figures):
            return result
        self.seen += 1

        # 1. Score the step by the steps before it.
        scores = self._score(figures)
        result.scores = scores.known()
        self._rises.look(figures.step, figures.sublayers)
        # 2. Collect the votes of single signals.
        signals = self._find_signals(figures, scores)
        self._vote(figures, signals, result)
        # 3. Alert if several signals agree.
        self._alert_on_agreement(figures, scores, signals, result)
        # A spike lasts until no single signal stands out any more.
        if "JD502" in result.votes or "JD503" in result.votes:
            self._quiet.extend(_SPIKES)
        # 4. Add the step to what the next ones are compared with.
        self._absorb(figures, signals)
        return result

    def _score(self, figures: StepFigures) -> StepScores:
        """Return how far loss and gradient norm stand above the steps before."""
        loss_z, recent_loss_z = None, None
        if figures.loss is not None:
            loss_z = self._loss.z(figures.loss)
            recent_loss_z = self._recent_loss.z(figures.loss)
        return StepScores(
            loss=loss_z,
            gradient=self._gradient.z(figures.gradient),
            gradient_ema=self._gradient_ema.z(figures.gradient),
            loss_recent=recent_loss_z,
            gradient_recent=self._recent_gradient.z(figures.gradient),
        )

    def _find_signals(self, figures: StepFigures, scores: StepScores) -> StepSignals:
        """Return which single signals are above their limits."""
        limits = self._limits
        # 1. The loss, compared with its median.
        median = self._median_loss.median()
        above_median = False
        if median is not None and figures.loss is not None:
            above_median = figures.loss > median + limits.median_vote

        # 2. The gradient norm, compared with its exponential mean.
        gradient_vote = False
        if scores.gradient_ema is not None:
            gradient_vote = scores.gradient_ema > limits.gradient_vote

        # 3. Both, compared with the last 1,000 steps.
        return StepSignals(
            high_loss=scores.loss is not None and scores.loss >= limits.spike_vote,
            high_gradient=scores.gradient is not None and scores.gradient >= limits.spike_vote,
            above_median=above_median,
            gradient_vote=gradient_vote,
        )

    def _vote(self, figures: StepFigures, signals: StepSignals, result: LiveResult) -> None:
        """Count the spikes of a step and add its votes."""
        # 1. Count what the published score calls a spike.
        if signals.high_loss:
            self.spikes["loss"] += 1
        if signals.high_gradient:
            self.spikes["gradient"] += 1

        # 2. Loss and gradient norm: either of two signals is a vote.
        if signals.high_loss or signals.above_median:
            result.votes.append("JD502")
        if signals.high_gradient or signals.gradient_vote:
            result.votes.append("JD503")

        # 3. The sub-layer whose update was measured at this step.
        if figures.update is None:
            return
        if self._updates.add(*figures.update, figures.lr):
            result.votes.append("JD506")

    def _alert_on_agreement(
        self, figures: StepFigures, scores: StepScores, signals: StepSignals, result: LiveResult
    ) -> None:
        """Fire JD501 and JD502 if several signals agree."""
        # 1. JD501: for several steps, or over their mean.
        alarm = self._joint.look(
            figures.step,
            figures.loss,
            figures.gradient,
            scores,
            figures.update,
            usual_gradient=self._recent_gradient.usual(),
        )
        if alarm is not None:
            self._emit(result, self._joint_alert(figures, alarm))

        # 2. JD502: at this one step.
        what = find_spike(figures, scores, signals, self._limits, self._recent_loss.usual())
        if what is not None:
            self._emit(result, self._loss_spike_alert(figures, scores, what))

    def _absorb(self, figures: StepFigures, signals: StepSignals) -> None:
        """Add a step to the running statistics. Outliers stay out of the means."""
        is_hit = self._joint.hit
        if figures.loss is not None:
            self._loss.add(figures.loss, outlier=is_hit or signals.high_loss)
            self._median_loss.add(figures.loss)
            self._recent_loss.add(figures.loss)
        self._gradient.add(figures.gradient, outlier=is_hit or signals.high_gradient)
        self._gradient_ema.add(figures.gradient)
        self._recent_gradient.add(figures.gradient)

    # -- JD501 and JD502 ---------------------------------------------------------------------------
    def _joint_alert(self, figures: StepFigures, alarm: JointAlarm) -> Alert:
        """Return the alert of JD501."""
        evidence = {
            "loss": figures.loss,
            "gradient": figures.gradient,
            **alarm.evidence,
            **self._evidence_since(alarm.since),
        }
        what = f"{alarm.what}{self._describe_usual(figures)}"
        return self._spike_alert(figures.step, "JD501", "warning", what, evidence)

    def _loss_spike_alert(self, figures: StepFigures, scores: StepScores, what: str) -> Alert:
        """Return the alert of JD502, with what `find_spike` says."""
        evidence = {
            "loss": figures.loss,
            "gradient": figures.gradient,
            "median": self._median_loss.median(),
            "loss_z": scores.loss,
            "gradient_ema_z": scores.gradient_ema,
            "loss_recent_z": scores.loss_recent,
            "gradient_recent_z": scores.gradient_recent,
            **self._evidence_since(figures.step),
        }
        sentence = f"{what}{self._describe_usual(figures)}"
        return self._spike_alert(figures.step, "JD502", "warning", sentence, evidence)

    def _describe_usual(self, figures: StepFigures) -> str:
        """Return the figures of the step compared with their usual values, in brackets."""
        usual_loss = self._recent_loss.usual()
        usual_gradient = self._recent_gradient.usual()
        texts = []
        # Before there are enough steps nothing is usual.
        if figures.loss is not None and usual_loss is not None:
            texts.append(f"loss {plain(figures.loss)}, usually {plain(usual_loss)}")
        if usual_gradient is not None:
            clipped = " after clipping" if figures.after_clipping else ""
            norm, usual = plain(figures.gradient), plain(usual_gradient)
            texts.append(f"gradient norm{clipped} {norm}, usually {usual}")
        if not texts:
            return ""
        return f" ({'; '.join(texts)})"

    def _evidence_since(self, since: int) -> dict[str, Any]:
        """Return since when, against which usual values, and which sub-layers moved."""
        return {
            "since": since,
            "usual_loss": self._recent_loss.usual(),
            "usual_gradient": self._recent_gradient.usual(),
            "moved": [rise.evidence() for rise in self.moved_first()[:MOST_LISTED]],
            "moved_count": len(self.moved_first()),
        }

    def _spike_alert(
        self, step: int, code: str, level: Level, what: str, evidence: dict[str, Any]
    ) -> Alert:
        """Return an alert that also says which sub-layers moved first."""
        where = [rise.where for rise in self.moved_first()[:MOST_LISTED]]
        return Alert(step, code, level, what + self._rises.sentence(), where, evidence)

    def moved_first(self) -> list[HighGradient]:
        """Return the sub-layers whose gradient is high, the one that has been so longest first."""
        return self._rises.order()

    # -- JD508 -------------------------------------------------------------------------------------
    def _judge_writes(self, figures: StepFigures, result: LiveResult) -> None:
        """Alert on weights that changed between two steps by their own norm.

        Smaller changes are noted once in a run.
        """
        writes = figures.written
        if writes is None:
            return
        what = describe_written(writes, figures.step)
        largest = writes.weights[0]

        # 1. A small change is noted once.
        if largest.change < self._limits.write_alert:
            is_worth_a_note = largest.change >= self._limits.write_note
            if is_worth_a_note and not self._has_noted_write:
                self._has_noted_write = True
                result.notes.append(f"{what}. Later writes as small as this one are not reported")
            return

        # 2. A large one fires.
        evidence = {
            "since": figures.step,
            "after": writes.after,
            "change": largest.change,
            "times": largest.times,
            "count": writes.count,
        }
        where = [weight.name for weight in writes.weights]
        alert = Alert(figures.step, "JD508", "warning", what, where, evidence)
        rewritten = [w.name for w in writes.weights if w.change >= self._limits.write_alert]
        # If all that are named have changed so much, those that are not named may have, too.
        have_all_changed = len(rewritten) == len(writes.weights)
        has_more = have_all_changed and writes.count > len(rewritten)
        self._emit(result, alert, names=rewritten, has_more=has_more)

    # -- JD505 -------------------------------------------------------------------------------------
    def _judge_nonfinite(self, figures: StepFigures, result: LiveResult) -> None:
        """Alert on a loss or gradients that are not finite, and on many skips in a row."""
        # 1. Count the skips that lead up to this step.
        if figures.skipped:
            self._skips_in_a_row += 1
        else:
            self._skips_in_a_row = 0
        if figures.skipped and figures.overflow:
            self._overflows_in_a_row += 1
        else:
            self._overflows_in_a_row = 0

        # 2. Find out whether the step is finite.
        is_loss_lost = figures.loss is not None and not math.isfinite(figures.loss)
        is_norm_lost = math.isinf(figures.gradient) or figures.nan_norm
        has_lost_gradient = is_norm_lost or bool(figures.nonfinite)
        is_gradient_lost = has_lost_gradient and not figures.skipped
        if is_loss_lost or is_gradient_lost:
            alert = self._nonfinite_alert(figures)
            # A value that is not finite spreads to every weight by the next step.
            goes_on = self._is_still_nonfinite
            self._is_still_nonfinite = True
            self._emit(result, alert, names=alert.where, goes_on=goes_on)
            return
        self._is_still_nonfinite = False
        if not figures.skipped:
            self._last_finite_step = figures.step
            self._last_finite_saw_weights = figures.weights_seen
            return

        # 3. Alert on many skips only: a few are a loss scaler that looks for its scale.
        if self._skips_in_a_row >= SKIPPED_IN_A_ROW:
            self._emit(result, self._skips_alert(figures), topic=_SKIPS)

    def _nonfinite_evidence(self, figures: StepFigures) -> dict[str, Any]:
        return {
            "loss": figures.loss,
            "gradient": figures.gradient,
            "skipped_in_a_row": self._skips_in_a_row,
        }

    def _skips_alert(self, figures: StepFigures) -> Alert:
        """Return the alert of an optimizer that has not stepped for a while."""
        count = self._skips_in_a_row
        since = figures.step - count + 1
        what = f"the optimizer made no step in {count} steps in a row, since step {since}"
        if self._overflows_in_a_row == count:
            what = (
                f"{count} steps in a row were skipped for gradients that are not finite, since "
                f"step {since}"
            )
            # A scale that is far too high takes as many skips. Later it cannot be so far off.
            if self._last_finite_step is None:
                what += (
                    "; the watch has seen no finite step before them, so that a loss scaler that "
                    "began at far too high a scale would look the same"
                )
        evidence = {**self._nonfinite_evidence(figures), "since": since}
        return Alert(figures.step, "JD505", "error", what, [], evidence)

    def _nonfinite_alert(self, figures: StepFigures) -> Alert:
        """Return the alert of a loss or gradients that are not finite."""
        sublayers = list(filter(is_sublayer, self.names))
        explanation = explain_nonfinite(
            NonFiniteStep(
                loss=figures.loss,
                groups=figures.nonfinite,
                weights=figures.bad_weights,
                gradients=figures.bad_gradients,
                parameters=figures.with_gradient,
                ordered=sublayers,
                previous=self._last_finite_step,
                weights_before=self._last_finite_saw_weights,
            )
        )
        evidence = {
            **self._nonfinite_evidence(figures),
            "first": explanation.first,
            "since": figures.step,
            "sublayers": list(figures.nonfinite),
        }
        return Alert(figures.step, "JD505", "error", explanation.what, explanation.where, evidence)

    # -- probes and statistics ---------------------------------------------------------------------
    def probe(self, step: int, series: Mapping[str, Mapping[str, float]]) -> LiveResult:
        """Judge a probe.

        Args:
            step: that it was measured at.
            series: figure -> sub-layer (or matrix) -> value.
        """
        result = LiveResult()
        self.probes += 1
        for alert in self._drift.look(step, series):
            self._emit_drift(result, alert)
        result.votes += self._drift.votes
        return result

    def statistics(self, step: int, series: Mapping[str, Mapping[str, float | None]]) -> LiveResult:
        """Judge a round of statistics.

        Args:
            step: that they were measured at.
            series: figure -> sub-layer -> value, None if it was not measured.
        """
        result = LiveResult()
        for alert in self._drift.look(step, statistics_series(series)):
            self._emit_drift(result, alert)
        return result

    def know(self, report: Report) -> None:
        """Take the report of a probe, for JD105.

        What the untrained model was like decides how high a learning rate it tolerates.
        """
        self._rate.know(report)

    def waits(self) -> Waits:
        """Return what each rule still waits for; a rule that is ready is not in it."""
        return waits_of(
            SampleCounts(
                losses=self._recent_loss.count,
                gradients=self._recent_gradient.count,
                gradient_ema=self._gradient_ema.count,
                rounds=self._drift.looks,
                probes=self.probes,
                updates_of_one=self._updates.most_samples(),
            )
        )

    # -- where the loop is -------------------------------------------------------------------------
    def resumed(self) -> None:
        """Go on from a checkpoint: drop figures that a fresh optimizer disturbs for a while."""
        self._updates.mute()
        self._joint.resumed()

    def renumber(self, old: int, new: int) -> None:
        """Give what was judged as step `old` the number `new`, once the loop has passed it."""
        self._drift.renumber(old, new)
        self._quiet.renumber(old, new)

    def rewind(self, base: int) -> None:
        """Go on from an earlier step: the loop does the steps after `base` again."""
        self.resumed()
        self._quiet.rewind(base)

    # -- alerts ------------------------------------------------------------------------------------
    def _emit(
        self,
        result: LiveResult,
        alert: Alert,
        *,
        topic: str = "",
        names: Sequence[str] = (),
        has_more: bool = False,
        goes_on: bool = False,
    ) -> None:
        """Add an alert, unless the same was reported in the last `QUIET` steps.

        Alerts that are held back are counted, and the next one that is shown has their number.

        Args:
            result: gets the alert, or the repeat.
            alert: the alert.
            topic: of the quiet time; that of the rule if not given.
            names: weights that have a quiet time of their own.
            has_more: the alert is about more weights than these.
            goes_on: it is known to be the event of the last time.
        """
        # 1. Whether that was reported before.
        topic = topic or alert.code
        since = alert.evidence.get("since", alert.step)
        reaction = self._quiet.react(
            Occurrence(
                topic=topic,
                step=alert.step,
                since=since,
                names=names,
                has_more=has_more,
                goes_on=goes_on,
            )
        )

        # 2. Fire.
        if reaction is Reaction.ALERT:
            held_back = self._quiet.take_held_back(topic)
            result.alerts.append(replace(alert, suppressed=held_back))
            return

        # 3. Another event. A weight that is named again adds nothing to what was said of it.
        last_step = self._quiet.last_alert(topic)
        is_named_again = alert.code == "JD508"
        if reaction is Reaction.REPEAT and last_step is not None and not is_named_again:
            result.repeats.append(Repeat(alert=alert, after=last_step))

    def _emit_drift(self, result: LiveResult, alert: Alert) -> None:
        """Add an alert of JD504, unless the same figure of its sub-layers was reported before."""
        self._emit(result, alert, topic=f"JD504:{alert.evidence['figure']}", names=alert.where)

    # -- memory ------------------------------------------------------------------------------------
    def state(self) -> dict[str, Any]:
        """Return what `load` goes on from, as a checkpoint keeps it."""
        # The keys are those of earlier versions: a checkpoint may outlive one.
        return {
            "loss": self._loss.state(),
            "gradient": self._gradient.state(),
            "median": self._median_loss.state(),
            "z": self._gradient_ema.state(),
            **self._rises.state(),
            "names": self.names,
            "drift": self._drift.state(),
            "updates": self._updates.state(),
            "joint": self._joint.state(),
            "rate": self._rate.state(),
            "seen": self.seen,
            "spikes": dict(self.spikes),
            "spoken": self._quiet.state(),
            "probes": self.probes,
            "recent": {
                "loss": self._recent_loss.state(),
                "gradient": self._recent_gradient.state(),
            },
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. One of an older version may lack some of the keys."""
        # 1. Load the running statistics of a step.
        self._loss.load(state["loss"])
        self._gradient.load(state["gradient"])
        self._median_loss.load(state["median"])
        self._gradient_ema.load(state["z"])
        recent = state.get("recent")
        if recent is not None:
            self._recent_loss.load(recent["loss"])
            self._recent_gradient.load(recent["gradient"])
        # 2. Load the detectors.
        self.set_names(state["names"])
        self._rises.load(state)
        self._drift.load(state["drift"])
        self._updates.load(state["updates"])
        self._joint.load(state["joint"])
        self._rate.load(state["rate"])
        # 3. Load the counts, and what was reported.
        self.seen = state["seen"]
        self.probes = int(state.get("probes", 0))
        self.spikes = dict(state["spikes"])
        self._quiet.load(state["spoken"])
