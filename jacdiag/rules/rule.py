"""A rule: what it is called and applies to, its check, and what a check gets and returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from jacdiag.records import (
    Condition,
    ContractRecord,
    Finding,
    JudgedSublayers,
    Level,
    Report,
    SublayerRecord,
)
from jacdiag.rules.init.contract_judgement import Judgement
from jacdiag.rules.page import RulePage, read_page
from jacdiag.rules.profile import Profile
from jacdiag.rules.thresholds import Thresholds


@dataclass(frozen=True)
class RuleContext:
    """What a check sees: the report so far, the thresholds and the profile.

    Attributes:
        report: The report so far.
        thresholds: Of the figures.
        profile: Of the levels.
        judgement: How the weights compare with a scheme; None if the report has no contract.
        outcomes: Of the other rules, for the rules that run after them.
    """

    report: Report
    thresholds: Thresholds
    profile: Profile
    judgement: Judgement | None = None
    outcomes: Mapping[str, CheckOutcome] = field(default_factory=dict)

    def rows(self, rule: Rule) -> list[SublayerRecord]:
        """Return the sub-layers on the stream that a rule applies to, by state and placement.

        Args:
            rule: that checks.
        """
        # 1. Weights alone have no sub-layers, and a rule may be for another state.
        report = self.report
        if report.tier != "measured" or report.state not in rule.states:
            return []

        # 2. What is nested in another sub-layer is not on the stream.
        rows: list[SublayerRecord] = []
        for row in report.sublayers:
            is_on_stream = not row.nested
            if is_on_stream and row.placement in rule.placements:
                rows.append(row)

        return rows

    def contract_for(self, rule: Rule) -> ContractRecord | None:
        """Return how the weights were initialized, if a rule applies to a model of this state.

        Args:
            rule: that checks.

        Returns:
            None if it does not, or if the report has no contract.
        """
        return self.report.contract if self._is_for_this_state(rule) else None

    def judgement_for(self, rule: Rule) -> Judgement | None:
        """Return the judgement of the weights, if a rule applies to a model of this state.

        Args:
            rule: that checks.

        Returns:
            None if it does not, or if the report has no contract.
        """
        return self.judgement if self._is_for_this_state(rule) else None

    def _is_for_this_state(self, rule: Rule) -> bool:
        """Return whether a rule applies to a model of this state, init or trained."""
        return self.report.state in rule.states

    @property
    def distrusted(self) -> Mapping[str, str]:
        """Sub-layers whose figures cannot be trusted, with the reason."""
        return dict.fromkeys(self.report.distrusted, "its replay differs from the whole model")

    def level(self, rule: Rule, cut: Level) -> Level:
        """Return the level at which a rule may fire.

        A level that the profile asks for holds in any state. Otherwise a rule may be an observation
        on a trained model, and a norm that was measured off distribution is no error.

        Args:
            rule: that fires.
            cut: the level that the figure is beyond.
        """
        level = self.profile.promoted(rule.code, cut)
        if rule.code in self.profile.levels:
            return level

        # 1. A trained model.
        if self.report.state == "trained" and rule.observation_when_trained:
            return "info"

        # 2. A probe unlike what the model was trained on. Rules of the init contract read no norm.
        reads_norms = not rule.code.startswith("JD2")
        if reads_norms and self._is_off_distribution:
            return _capped_at_warning(level)

        return level

    @property
    def _is_off_distribution(self) -> bool:
        """Whether the probe is unlike what a trained model was trained on."""
        probe = self.report.probe
        return probe is not None and probe.off_distribution


def _capped_at_warning(level: Level) -> Level:
    if level == "error":
        return "warning"

    return level


@dataclass(frozen=True)
class CheckOutcome:
    """How a check came out.

    Attributes:
        matched: how many sub-layers (or other things) it applied to; 0 is "not applicable", never a
            pass.
        undecided: names whose interval lies across a threshold, or that could not be measured.
        conditions: per sub-layer, for the two conditions of the paper.
        judged: which sub-layers the rule compared with its thresholds; None if it was not run.
    """

    matched: int
    findings: list[Finding] = field(default_factory=list)
    undecided: list[str] = field(default_factory=list)
    note: str = ""
    conditions: Mapping[str, Condition] = field(default_factory=dict)
    judged: JudgedSublayers | None = None


NOT_APPLICABLE = CheckOutcome(0)
ALL_PLACEMENTS = ("pre", "post", "sandwich", "reordered", "none")


@dataclass(frozen=True)
class RuleInfo:
    """What a rule is called, what it applies to, and where its documentation is.

    Attributes:
        code: never reused.
        name: a short name, such as "small-sublayers".
        level: the highest level at which the rule fires by itself.
        states: "init", "trained" or both.
        placements: placements of the norm that it applies to.
        observation_when_trained: it fires at info on a trained model.
        after: it judges the outcomes of the other rules (`RuleContext.outcomes`), and runs after
            them.
    """

    code: str
    name: str
    level: Level
    states: tuple[str, ...] = ("init", "trained")
    placements: tuple[str, ...] = ALL_PLACEMENTS
    observation_when_trained: bool = False
    after: bool = False

    @property
    def page(self) -> RulePage:
        """The documentation page, read when it is first needed."""
        return read_page(self.code)

    @property
    def summary(self) -> str:
        """What the rule says, in one line."""
        return self.page.summary


@dataclass(frozen=True)
class Rule(RuleInfo):
    """A rule on a report.

    Attributes:
        check: from a context to an outcome.
    """

    check: Callable[[RuleContext, Rule], CheckOutcome] = field(kw_only=True)
