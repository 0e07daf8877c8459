"""Which figure of which sub-layer a rule is about, and how severe it is."""

from __future__ import annotations

from jacdiag.records import LEVELS, Finding, Interval, Report, SublayerRecord

SIGNS = {"error": "●", "warning": "▲", "undecided": "?", "info": "", "": ""}
FIELD_OF_RULE = {"JD101": "core_norm", "JD102": "norm_gain", "JD103": "branch_norm"}
_RULE_OF_FIELD = {field: code for code, field in FIELD_OF_RULE.items()}
UNDECIDED = "undecided"
LOUDNESS = ["", "info", UNDECIDED, "warning", "error"]  # from the least to the most
_FACTOR_OF_RULE = {"JD101": "sub-layer", "JD102": "shortcut"}


def marks(report: Report) -> dict[tuple[str, str], str]:
    """Return the mark of each figure that a rule is about.

    Args:
        report: of either tier and state.

    Returns:
        (sub-layer name, field) to "error", "warning", "undecided" or "info"; the loudest if there
        are several.
    """
    levels: dict[tuple[str, str], str] = {}

    def note(key: tuple[str, str], level: str) -> None:
        if LOUDNESS.index(level) > LOUDNESS.index(levels.get(key, "")):
            levels[key] = level

    # 1. What fired.
    for finding in report.findings:
        field = field_of(finding)
        for name in finding.where:
            note((name, field), finding.level)

    # 2. What is undecided: the interval lies across a threshold.
    open_codes = open_rules(report)
    open_fields = [field for code, field in FIELD_OF_RULE.items() if code in open_codes]
    for row in report.sublayers:
        for field in open_fields:
            if is_across(report, row, field):
                note((row.name, field), UNDECIDED)
    return levels


def field_of(finding: Finding) -> str:
    """Return the figure that a finding is about.

    It is the rule's own figure, else the one that the evidence names, else the branch norm.
    """
    return FIELD_OF_RULE.get(finding.code) or str(finding.evidence.get("field", "branch_norm"))


def open_rules(report: Report) -> set[str]:
    """Return the codes of rules that are undecided or fired.

    A rule that fired may be undecided elsewhere.
    """
    return {rule.code for rule in report.rules if rule.status in ("unknown", "fired")}


def threshold(report: Report, field: str, level: str) -> float | None:
    """Return a threshold that the rules used; None if there is none.

    Args:
        report: its `settings["thresholds"][field][level]` is read.
        field: branch_norm, core_norm or norm_gain.
        level: warning or error.
    """
    value = report.settings.get("thresholds", {}).get(field, {}).get(level)
    if value is None:
        return None
    return float(value)


def drawn_threshold(report: Report, field: str, level: str) -> float | None:
    """Return a threshold at which a rule fires with its level: what a picture may draw.

    On a trained model the rules about norms observe, whatever the value, unless the profile makes
    them decide. A rule that was not selected, or that matched no sub-layer for its placement,
    compares nothing.

    Args:
        report: what is drawn.
        field: branch_norm, norm_gain, core_norm, or core_norm of one kind: "core_norm.mlp".
        level: info, warning or error.
    """
    figure, _, _ = field.partition(".")
    code = _RULE_OF_FIELD[figure]
    if not _decides(report, code):
        return None
    if not _compares(report, code):
        return None
    return threshold(report, field, level)


def _decides(report: Report, code: str) -> bool:
    """Return whether a rule about norms decides on this model, rather than only observe it."""
    if report.state != "trained":
        return True
    was_made_to_decide: bool = code in report.settings.get("levels", ())
    return was_made_to_decide


def _compares(report: Report, code: str) -> bool:
    """Return whether a rule was run, and compared a sub-layer with its thresholds."""
    if not report.rules:
        return True  # an older report does not say
    for rule in report.rules:
        if rule.code == code and rule.matched:
            return True
    return False


def is_across(report: Report, row: SublayerRecord, field: str) -> bool:
    """Return whether the interval of a figure holds one of its thresholds.

    No rule can decide then, and a narrower interval may let it.
    """
    value = getattr(row, field)
    if not isinstance(value, Interval) or row.name in report.distrusted:
        return False  # it was not measured, or its interval is not used
    for limit in _limits_of(report, row, field).values():
        if limit is not None and value.side_of(limit) == "across":
            return True
    return False


def has_interval_across_threshold(report: Report) -> bool:
    """Return whether narrower intervals can decide a rule about norms."""
    open_codes = open_rules(report)
    for code, field in FIELD_OF_RULE.items():
        if code not in open_codes:
            continue
        if any(is_across(report, row, field) for row in report.sublayers):
            return True
    return False


def _limits_of(report: Report, row: SublayerRecord, field: str) -> dict[str, float | None]:
    """Return the thresholds of a figure of one sub-layer, by level.

    Those of a core differ by kind, and those of a branch by placement.
    """
    # 1. Those of its own kind or placement.
    thresholds: dict[str, dict[str, float | None]] = report.settings.get("thresholds", {})
    stratum = {"core_norm": row.kind, "branch_norm": row.placement}.get(field)
    own = thresholds.get(f"{field}.{stratum}")
    if own is not None:
        return own

    # 2. An older report holds the thresholds of branches of the usual placement alone.
    usual = report.settings.get("stratum") or row.placement
    if field == "branch_norm" and row.placement != usual:
        return {}
    return thresholds.get(field, {})


def guilty(report: Report) -> dict[str, str]:
    """Return which factor breaks its condition at each sub-layer, or meets it in part only.

    Only at init: on a trained model the split between the two factors is not identifiable.

    Returns:
        Sub-layer name to "shortcut", "sub-layer" or "both".
    """
    if report.state == "trained":
        return {}

    # 1. The factors that rules named at each sub-layer.
    factors_of: dict[str, set[str]] = {}
    for finding in report.findings:
        factor = _FACTOR_OF_RULE.get(finding.code)
        if factor is None:
            continue
        for name in finding.where:
            factors_of.setdefault(name, set()).add(factor)

    # 2. As one word.
    return {name: _factor_word(factors) for name, factors in factors_of.items()}


def _factor_word(factors: set[str]) -> str:
    """Return the one factor that is to blame, or "both"."""
    if len(factors) > 1:
        return "both"
    (factor,) = factors
    return factor


def at_least(level: str, floor: str) -> bool:
    """Return whether a finding's level is as severe as `floor`.

    Args:
        level: of the finding: info, warning or error.
        floor: the level to compare with.

    >>> at_least("error", "warning"), at_least("info", "warning")
    (True, False)
    """
    return LEVELS.index(level) >= LEVELS.index(floor)
