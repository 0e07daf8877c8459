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
    computed_tables,
    conditions,
    forward,
    identical_layers,
    init_contract,
    leftover_memory,
    live_catalogue,
    low_rank_adapters,
    measurement,
    modulation,
    regression,
    risk_at_lr,
    routers,
    shortcut_factors,
    small_parameters,
    state_space_rates,
    tied_weights,
)
from jacdiag.rules.interval_status import overall
from jacdiag.rules.profile import profile_of
from jacdiag.rules.rule import Context, Outcome, Rule, RuleInfo
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
# With those that speak in a run only.
EVERY: tuple[RuleInfo, ...] = tuple(
    sorted((*RULES, *live_catalogue.RULES), key=lambda one: one.code)
)
_CODES = tuple(rule.code for rule in RULES)


def rule(code: str) -> RuleInfo:
    """Return a rule by its code.

    Raises UsageError with the closest codes.
    """
    for candidate in EVERY:
        if candidate.code == code.upper():
            return candidate
    near = get_close_matches(code.upper(), [candidate.code for candidate in EVERY], n=3, cutoff=0.4)
    raise UsageError(
        f"no rule has the code '{code}'",
        hint=f"closest: {', '.join(near)}" if near else "`jacdiag rules` lists all",
    )


def selected(select: Iterable[str] = (), ignore: Iterable[str] = ()) -> tuple[Rule, ...]:
    """Return the rules whose code begins with one of `select` and with none of `ignore`.

    An empty `select` stands for all rules.

    Raises:
        UsageError: a prefix that no rule has; it would otherwise match nothing and pass.
    """
    prefixes, ignored = tuple(select), tuple(ignore)
    for prefix in (*prefixes, *ignored):
        if not any(code.startswith(prefix) for code in _CODES):
            raise UsageError(
                f"no rule begins with '{prefix}'", hint=f"the rules are {', '.join(_CODES)}"
            )
    chosen = [r for r in RULES if not prefixes or r.code.startswith(prefixes)]
    return tuple(r for r in chosen if not ignored or not r.code.startswith(ignored))


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
        select, ignore: codes or prefixes.

    Returns:
        The same report with risk, conditions, findings, rules and verdict filled in.
    """
    report = replace(report, risk=risk_at_lr.assess(report, thresholds.risk))
    context = Context(report, thresholds, profile_of(profile, _CODES))
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


def _result(rule: Rule, outcome: Outcome) -> RuleResult:
    status: Status = "clean"
    if outcome.findings:
        status = "fired"
    elif outcome.matched == 0:
        status = "not-applicable"
    elif outcome.undecided:
        status = "unknown"
    return RuleResult(rule.code, status, outcome.matched, rule.name, outcome.note)


def _conditions(report: Report, outcomes: Mapping[str, Outcome]) -> Conditions:
    def of(code: str) -> Any:
        if report.tier == "weights" or code not in outcomes:
            return "unknown"
        return overall(list(outcomes[code].conditions.values()))

    return Conditions(of("JD101"), of("JD102"))


def _verdict(
    context: Context,
    findings: list[Finding],
    results: list[RuleResult],
    outcomes: Mapping[str, Outcome],
) -> Verdict:
    """Return "fail" for an error, "warn" for a warning.

    What was not decided, or did not apply at all, is never a pass.

    A trained model passes only compared with an earlier one. Without one it is observed: no level
    of its norms tells a good run from a wrecked one.
    """
    if any(f.level == "error" for f in findings):
        return "fail"
    if any(f.level == "warning" and f.code not in ("JD901", "JD904") for f in findings):
        return "warn"
    report = context.report
    measured = report.tier == "measured" and measurement.norms_asked(report, outcomes)
    if report.state == "trained" and measured:
        return _trained_verdict(context, results, outcomes)
    if not measurement.applied(report, outcomes):
        return "unknown"
    open_ones = any(r.status == "unknown" or outcomes[r.code].undecided for r in results)
    return "unknown" if open_ones else "pass"


def _trained_verdict(
    context: Context, results: list[RuleResult], outcomes: Mapping[str, Outcome]
) -> Verdict:
    """Return the verdict of a trained model for which no warning fired."""
    # 1. A norm that could not be measured may hide anything.
    unmeasured = [
        row for row in context.report.sublayers if not row.nested and row.branch_norm is None
    ]
    if unmeasured:
        return "unknown"

    # 2. Observations decide nothing: an interval across a threshold that holds at init leaves
    # nothing open.
    observations = {
        r.code for r in RULES if r.observation_when_trained and r.code not in context.profile.levels
    }
    if any(outcomes[r.code].undecided for r in results if r.code not in observations):
        return "unknown"

    # 3. Without a comparison nothing was judged.
    compared = outcomes.get("JD110")
    return "pass" if compared is not None and compared.matched else "observed"


def _shown(report: Report, thresholds: Thresholds) -> dict[str, dict[str, float]]:
    """Return the cuts of this report's figures, in the figures' own units, for renderings."""
    scale = math.sqrt(2 * max(report.model.layers, 1))
    usual = _usual_placement(report)

    def cuts(figure: str, stratum: str, factor: float = 1.0) -> dict[str, float]:
        limits = thresholds.limits(figure, stratum)
        return {cut: value * factor for cut in CUTS if (value := getattr(limits, cut)) is not None}

    return {
        "branch_norm": cuts("branch_norm", usual),
        "core_norm": cuts("core_norm", "", 1 / scale),
        "norm_gain": cuts("norm_gain", ""),
    }


def _usual_placement(report: Report) -> str:
    """Return the placement of the norm that most sub-layers have; the first of several."""
    placements = [row.placement or "pre" for row in report.sublayers]
    return max(dict.fromkeys(placements), key=placements.count) if placements else "pre"


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
        kind, placement: of the sub-layer.
        layers: depth N, for core_norm sqrt(2N).
        thresholds: of the profile in use.

    Returns:
        Field of a sub-layer's record -> thresholds in that field's own units.
    """
    points = {"branch_norm": thresholds.limits("branch_norm", placement).cuts}
    if placement in conditions.SMALL.placements:
        scale = math.sqrt(2 * max(layers, 1))
        points["core_norm"] = tuple(
            cut / scale for cut in thresholds.limits("core_norm", kind).cuts
        )
    return points
