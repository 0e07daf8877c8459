"""Selects the rules, runs them on a report, and puts the verdict together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from jacdiag.errors import UsageError
from jacdiag.records import Conditions, Finding, Report, RuleResult, Status, Verdict
from jacdiag.rules import (
    backward,
    conditions,
    forward,
    live_catalogue,
    measurement,
    regression,
    risk_at_lr,
    shortcut_factors,
)
from jacdiag.rules.init import (
    computed_tables,
    identical_layers,
    init_contract,
    leftover_memory,
    low_rank_adapters,
    modulation,
    routers,
    small_parameters,
    state_space_rates,
    tied_weights,
)
from jacdiag.rules.interval_status import overall
from jacdiag.rules.profile import profile_of
from jacdiag.rules.rule import CheckOutcome, Rule, RuleContext, RuleInfo
from jacdiag.rules.thresholds import CUTS, Thresholds

SMALL_ROLES = (small_parameters.RULE, routers.RULE, identical_layers.RULE, leftover_memory.RULE)
STRUCTURE = (
    computed_tables.RULE,
    state_space_rates.RULE,
    tied_weights.RULE,
    low_rank_adapters.RULE,
    modulation.RULE,
)
RULES: tuple[Rule, ...] = (
    *conditions.RULES,
    *risk_at_lr.RULES,
    *regression.RULES,
    *init_contract.RULES,
    *SMALL_ROLES,
    *STRUCTURE,
    *forward.RULES,
    *sorted((*backward.RULES, *shortcut_factors.RULES), key=lambda rule: rule.code),
    *measurement.RULES,
)
# With those that fire in a run only.
EVERY: tuple[RuleInfo, ...] = tuple(
    sorted((*RULES, *live_catalogue.RULES), key=lambda rule: rule.code)
)
_CODES = tuple(rule.code for rule in RULES)


def rule(code: str) -> RuleInfo:
    """Return a rule by its code.

    Args:
        code: such as "JD101", in either case.

    Raises:
        UsageError: no rule has this code; the hint names the closest codes.
    """
    for candidate in EVERY:
        if candidate.code == code.upper():
            return candidate

    codes = [candidate.code for candidate in EVERY]
    near = get_close_matches(code.upper(), codes, n=3, cutoff=0.4)
    hint = "`jacdiag rules` lists all"
    if near:
        hint = f"closest: {', '.join(near)}"
    raise UsageError(f"no rule has the code '{code}'", hint=hint)


def selected(select: Iterable[str] = (), ignore: Iterable[str] = ()) -> tuple[Rule, ...]:
    """Return the rules whose code begins with one of `select` and with none of `ignore`.

    An empty `select` stands for all rules.

    Args:
        select: codes, or prefixes such as "JD2".
        ignore: codes or prefixes of the rules to leave out.

    Raises:
        UsageError: a prefix that no rule has; it would otherwise match nothing and pass.
    """
    # 1. Every prefix must stand for a rule.
    prefixes = tuple(select)
    ignored = tuple(ignore)
    for prefix in (*prefixes, *ignored):
        if not any(code.startswith(prefix) for code in _CODES):
            raise UsageError(
                f"no rule begins with '{prefix}'", hint=f"the rules are {', '.join(_CODES)}"
            )

    # 2. No code begins with one of no prefixes.
    chosen = []
    for candidate in RULES:
        is_selected = not prefixes or candidate.code.startswith(prefixes)
        is_ignored = candidate.code.startswith(ignored)
        if is_selected and not is_ignored:
            chosen.append(candidate)
    return tuple(chosen)


def evaluate(
    report: Report,
    *,
    thresholds: Thresholds,
    profile: str | Mapping[str, Any] = "default",
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
) -> Report:
    """Run the rules on a report.

    Args:
        report: measured, or of the weights-only tier.
        thresholds: see `jacdiag.rules.thresholds`.
        profile: "default", "paper", or a table.
        select: codes or prefixes of the rules to run; all if empty.
        ignore: codes or prefixes of the rules to leave out.

    Returns:
        The same report with risk, conditions, findings, rules and verdict filled in.
    """
    report = replace(report, risk=risk_at_lr.assess(report, thresholds.risk))
    judgement = init_contract.judge(report.contract) if report.contract else None
    context = RuleContext(report, thresholds, profile_of(profile, _CODES), judgement)
    chosen = selected(select, ignore)
    outcomes = {r.code: r.check(context, r) for r in chosen if not r.after}
    context = replace(context, outcomes=outcomes)
    outcomes = outcomes | {r.code: r.check(context, r) for r in chosen if r.after}
    results = [_result(r, outcomes[r.code]) for r in chosen]
    findings = [finding for r in chosen for finding in outcomes[r.code].findings]
    settings = {
        **report.settings,
        "thresholds": _shown(report, thresholds),
        "profile": context.profile.name,
        "levels": dict(context.profile.levels),
        "stratum": _usual_placement(report),
    }
    return replace(
        report,
        conditions=_conditions(report, outcomes),
        findings=findings,
        rules=results,
        verdict=_verdict(context, findings, results, outcomes),
        settings=settings,
    )


def _result(rule: Rule, outcome: CheckOutcome) -> RuleResult:
    status: Status = "clean"
    if outcome.findings:
        status = "fired"
    elif outcome.matched == 0:
        status = "not-applicable"
    elif outcome.undecided:
        status = "unknown"
    return RuleResult(rule.code, status, outcome.matched, rule.name, outcome.note)


def _conditions(report: Report, outcomes: Mapping[str, CheckOutcome]) -> Conditions:
    """Return the two conditions of the paper, each over all sub-layers."""

    def condition_of(code: str) -> Any:
        # Weights alone carry no norm, and a rule that was not selected says nothing.
        if report.tier == "weights":
            return "unknown"
        if code not in outcomes:
            return "unknown"
        return overall(list(outcomes[code].conditions.values()))

    return Conditions(condition_of("JD101"), condition_of("JD102"))


def _verdict(
    context: RuleContext,
    findings: list[Finding],
    results: list[RuleResult],
    outcomes: Mapping[str, CheckOutcome],
) -> Verdict:
    """Return "fail" for an error, "warn" for a warning.

    What was not decided, or did not apply at all, is never a pass.

    A trained model passes only compared with an earlier one. Without one it is observed: no level
    of its norms tells a good run from a wrecked one.
    """
    # 1. What fired. JD901 and JD904 say that something is open, which step 3 judges.
    levels = {finding.level for finding in findings}
    about_the_model = [finding for finding in findings if finding.code not in ("JD901", "JD904")]
    levels_about_the_model = {finding.level for finding in about_the_model}
    if "error" in levels:
        return "fail"
    if "warning" in levels_about_the_model:
        return "warn"

    # 2. A trained model whose norms were measured.
    report = context.report
    is_measured = report.tier == "measured" and measurement.norms_asked(report, outcomes)
    if report.state == "trained" and is_measured:
        return _trained_verdict(context, results, outcomes)

    # 3. Nothing fired, which is a pass only if every rule was decided.
    if not measurement.applied(report, outcomes):
        return "unknown"
    for result in results:
        if result.status == "unknown" or outcomes[result.code].undecided:
            return "unknown"
    return "pass"


def _observing_rules(context: RuleContext) -> set[str]:
    """Return the codes of the rules that only observe a trained model.

    A level that the user gave makes a rule judge.
    """
    codes: set[str] = set()
    for rule in RULES:
        has_level_of_user = rule.code in context.profile.levels
        if rule.observation_when_trained and not has_level_of_user:
            codes.add(rule.code)
    return codes


def _trained_verdict(
    context: RuleContext, results: list[RuleResult], outcomes: Mapping[str, CheckOutcome]
) -> Verdict:
    """Return the verdict of a trained model for which no warning fired."""
    # 1. A norm that could not be measured may hide anything.
    for row in context.report.sublayers:
        if row.branch_norm is None and not row.nested:
            return "unknown"

    # 2. Observations decide nothing: an interval across a threshold that holds at init leaves
    #    nothing open.
    observations = _observing_rules(context)
    for result in results:
        is_observation = result.code in observations
        if outcomes[result.code].undecided and not is_observation:
            return "unknown"

    # 3. Without a comparison nothing was judged.
    comparison = outcomes.get("JD110")
    if comparison is None or not comparison.matched:
        return "observed"
    return "pass"


def _shown(report: Report, thresholds: Thresholds) -> dict[str, dict[str, float]]:
    """Return the cuts of this report's figures, in the figures' own units, for renderings."""
    scale = math.sqrt(2 * max(report.model.layers, 1))
    usual = _usual_placement(report)

    def cuts(figure: str, stratum: str, factor: float = 1.0) -> dict[str, float]:
        limits = thresholds.limits(figure, stratum)
        known: dict[str, float] = {}
        for cut in CUTS:
            value = getattr(limits, cut)
            if value is not None:
                known[cut] = value * factor
        return known

    return {
        "branch_norm": cuts("branch_norm", usual),
        "core_norm": cuts("core_norm", "", 1 / scale),
        "norm_gain": cuts("norm_gain", ""),
    }


def _usual_placement(report: Report) -> str:
    """Return the placement of the norm that most sub-layers have; the first of several."""
    placements = [row.placement or "pre" for row in report.sublayers]
    if not placements:
        return "pre"

    # `max` returns the first of equal counts, in the order of the forward.
    return max(dict.fromkeys(placements), key=placements.count)


def decision_points(
    *,
    kind: str,
    placement: str,
    layers: int,
    thresholds: Thresholds,
) -> dict[str, tuple[float, ...]]:
    """Return the values that the interval of each figure must not straddle.

    Otherwise the rules are not decided.

    Args:
        kind: of the sub-layer.
        placement: of its norm.
        layers: depth N, for core_norm sqrt(2N).
        thresholds: of the profile in use.

    Returns:
        Field of a sub-layer's record -> thresholds in that field's own units.
    """
    points = {"branch_norm": thresholds.limits("branch_norm", placement).cuts}
    if placement in conditions.SMALL.placements:
        scale = math.sqrt(2 * max(layers, 1))
        cuts = thresholds.limits("core_norm", kind).cuts
        points["core_norm"] = tuple(cut / scale for cut in cuts)
    return points
