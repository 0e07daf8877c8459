"""Selects the rules, runs them on a report, and puts the verdict together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from jacdiag.errors import UsageError
from jacdiag.records import Condition, Conditions, Finding, Report, RuleResult, Status, Verdict
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
from jacdiag.rules.baseline_values import with_baseline_values
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
from jacdiag.rules.init.contract_judgement import Judgement
from jacdiag.rules.interval_status import overall
from jacdiag.rules.profile import profile_of
from jacdiag.rules.rule import NOT_APPLICABLE, CheckOutcome, Rule, RuleContext, RuleInfo
from jacdiag.rules.thresholds import Thresholds

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
    by_code = {candidate.code: candidate for candidate in EVERY}
    upper = code.upper()
    if upper in by_code:
        return by_code[upper]

    # Name the codes that may be meant.
    near = get_close_matches(upper, by_code, n=3, cutoff=0.4)
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
        _check_prefix(prefix)

    # 2. Without a prefix all rules are selected.
    chosen = list(RULES)
    if prefixes:
        chosen = [candidate for candidate in RULES if candidate.code.startswith(prefixes)]

    # 3. No code begins with one of no prefixes.
    return tuple(candidate for candidate in chosen if not candidate.code.startswith(ignored))


def _check_prefix(prefix: str) -> None:
    """Raise UsageError if no rule has a prefix."""
    has_rule = any(code.startswith(prefix) for code in _CODES)
    if not has_rule:
        raise UsageError(
            f"no rule begins with '{prefix}'", hint=f"the rules are {', '.join(_CODES)}"
        )


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
    # 1. What the rules see.
    report = replace(report, risk=risk_at_lr.assess(report, thresholds.risk))
    context = RuleContext(report, thresholds, profile_of(profile, _CODES), _judgement_of(report))

    # 2. Run them.
    chosen = selected(select, ignore)
    outcomes = _run(chosen, context)
    context = replace(context, outcomes=outcomes)

    # 3. Put the report together.
    results = [_result(rule, outcomes[rule.code]) for rule in chosen]
    fired = [finding for rule in chosen for finding in outcomes[rule.code].findings]
    findings = with_baseline_values(fired, report)
    return replace(
        report,
        conditions=_conditions(report, outcomes),
        findings=findings,
        rules=results,
        verdict=_verdict(context, findings, results, outcomes),
        settings={**report.settings, **_settings(context)},
    )


def _judgement_of(report: Report) -> Judgement | None:
    """Return the judgement of a report's weights; None without a contract."""
    if report.contract is None:
        return None

    # Worked out when a rule needs it first.
    return init_contract.judge(report.contract)


def _run(rules: Sequence[Rule], context: RuleContext) -> dict[str, CheckOutcome]:
    """Return the outcomes of rules by their code.

    Rules that judge the outcomes of the others run after them.
    """
    # 1. Rules on the report.
    outcomes: dict[str, CheckOutcome] = {}
    for rule in rules:
        if not rule.after:
            outcomes[rule.code] = rule.check(context, rule)

    # 2. Rules on those outcomes.
    context = replace(context, outcomes=dict(outcomes))
    for rule in rules:
        if rule.after:
            outcomes[rule.code] = rule.check(context, rule)

    return outcomes


def _settings(context: RuleContext) -> dict[str, Any]:
    """Return what the rules were run with, as the settings of a report hold it."""
    return {
        "thresholds": _shown(context.report, context.thresholds),
        "profile": context.profile.name,
        "levels": dict(context.profile.levels),
        "stratum": _usual_placement(context.report),
    }


def _result(rule: Rule, outcome: CheckOutcome) -> RuleResult:
    """Return the result of a rule as a report lists it."""
    status: Status = "clean"

    # A finding counts more than what is undecided.
    if outcome.findings:
        status = "fired"
    elif outcome.matched == 0:
        status = "not-applicable"
    elif outcome.undecided:
        status = "unknown"

    return RuleResult(rule.code, status, outcome.matched, rule.name, outcome.note)


def _conditions(report: Report, outcomes: Mapping[str, CheckOutcome]) -> Conditions:
    """Return the two conditions of the paper, each over the sub-layers that its rule judged."""
    # Weights alone carry no norm.
    if report.tier == "weights":
        return Conditions("unknown", "unknown")

    return Conditions(
        small_sublayers=_condition_of("JD101", outcomes),
        large_shortcut=_condition_of("JD102", outcomes),
        small_sublayers_judged=outcomes.get("JD101", NOT_APPLICABLE).judged,
        large_shortcut_judged=outcomes.get("JD102", NOT_APPLICABLE).judged,
    )


def _condition_of(code: str, outcomes: Mapping[str, CheckOutcome]) -> Condition:
    """Return the condition that a rule judges; unknown if the rule was not selected."""
    if code not in outcomes:
        return "unknown"
    conditions = outcomes[code].conditions
    return overall(list(conditions.values()))


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
    # 1. What fired.
    fired = _verdict_of_findings(findings)
    if fired is not None:
        return fired

    # 2. A trained model whose norms were measured.
    report = context.report
    is_measured = report.tier == "measured" and measurement.norms_asked(report, outcomes)
    if is_measured and report.state == "trained":
        return _trained_verdict(context, results, outcomes)

    # 3. Nothing fired, which is a pass only if every rule was decided.
    is_applied = measurement.applied(report, outcomes)
    if not is_applied or _is_any_open(results, outcomes):
        return "unknown"
    return "pass"


def _verdict_of_findings(findings: Sequence[Finding]) -> Verdict | None:
    """Return "fail" for an error, "warn" for a warning about the model; None for neither."""
    levels = {finding.level for finding in findings}
    if "error" in levels:
        return "fail"

    # JD901 and JD904 say that something is open, which is no warning about the model.
    codes_of_warnings = {finding.code for finding in findings if finding.level == "warning"}
    if codes_of_warnings - {"JD901", "JD904"}:
        return "warn"
    return None


def _is_any_open(results: list[RuleResult], outcomes: Mapping[str, CheckOutcome]) -> bool:
    """Return whether a rule has no answer, for all or for some sub-layers."""
    for result in results:
        is_undecided = bool(outcomes[result.code].undecided)
        if is_undecided or result.status == "unknown":
            return True

    return False


def _observing_rules(context: RuleContext) -> set[str]:
    """Return the codes of the rules that only observe a trained model.

    A level that the user gave makes a rule judge.
    """
    observing = {rule.code for rule in RULES if rule.observation_when_trained}
    return observing.difference(context.profile.levels)


def _trained_verdict(
    context: RuleContext, results: list[RuleResult], outcomes: Mapping[str, CheckOutcome]
) -> Verdict:
    """Return the verdict of a trained model for which no warning fired."""
    # 1. A norm that could not be measured may hide anything.
    for row in context.report.sublayers:
        is_on_stream = not row.nested
        if is_on_stream and row.branch_norm is None:
            return "unknown"

    # 2. Observations decide nothing: an interval across a threshold that holds at init leaves
    #    nothing open.
    judging = {result.code for result in results} - _observing_rules(context)
    if any(outcomes[code].undecided for code in judging):
        return "unknown"

    # 3. Without a comparison nothing was judged.
    comparison = outcomes.get("JD110", NOT_APPLICABLE)
    if not comparison.matched:
        return "observed"
    return "pass"


def _shown(report: Report, thresholds: Thresholds) -> dict[str, dict[str, float]]:
    """Return the cuts of this report's figures, in the figures' own units, for renderings."""
    scale = math.sqrt(2 * max(report.model.layers, 1))
    usual = _usual_placement(report)

    def cuts(figure: str, stratum: str, factor: float = 1.0) -> dict[str, float]:
        # In the unit of the figure.
        limits = thresholds.limits(figure, stratum)
        return {cut: value * factor for cut, value in limits.named_cuts.items()}

    shown = {
        "branch_norm": cuts("branch_norm", usual),
        "core_norm": cuts("core_norm", "", 1 / scale),
        "norm_gain": cuts("norm_gain", ""),
    }

    # The cuts of cores differ by kind of sub-layer.
    for kind in dict.fromkeys(row.kind for row in report.sublayers):
        shown[f"core_norm.{kind}"] = cuts("core_norm", kind, 1 / scale)

    # Those of branches differ by placement, where it is known.
    placements = dict.fromkeys(row.placement for row in report.sublayers)
    for placement in filter(None, placements):
        shown[f"branch_norm.{placement}"] = cuts("branch_norm", placement)

    return shown


def _usual_placement(report: Report) -> str:
    """Return the placement of the norm that most sub-layers have; the first of several."""
    placements = [row.placement or "pre" for row in report.sublayers]
    if not placements:
        return "pre"

    # `most_common` keeps the order of the forward among equal counts.
    counts = Counter(placements)
    usual, _ = counts.most_common(1)[0]
    return usual


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
        # The norm of the core is compared times √(2N).
        scale = math.sqrt(2 * max(layers, 1))
        cuts = thresholds.limits("core_norm", kind).cuts
        points["core_norm"] = tuple(cut / scale for cut in cuts)

    return points
