"""Which figure of which sub-layer a rule speaks about, and how loudly."""

from __future__ import annotations

from jacdiag.records import LEVELS, Finding, Interval, Report, SublayerRecord

SIGNS = {"error": "●", "warning": "▲", "undecided": "?", "info": "", "": ""}
FIELD_OF_RULE = {"JD101": "core_norm", "JD102": "norm_gain", "JD103": "branch_norm"}
UNDECIDED = "undecided"
LOUDNESS = ["", "info", UNDECIDED, "warning", "error"]


def marks(report: Report) -> dict[tuple[str, str], str]:
    """Maps (sub-layer name, field) to "error", "warning", "undecided" or "info"; the others no rule
    speaks about.
    """
    found: dict[tuple[str, str], str] = {}

    def note(key: tuple[str, str], level: str) -> None:
        if LOUDNESS.index(level) > LOUDNESS.index(found.get(key, "")):
            found[key] = level

    for finding in report.findings:
        field = field_of(finding)
        for name in finding.where:
            note((name, field), finding.level)
    for row in report.sublayers:
        for rule, field in FIELD_OF_RULE.items():
            if rule in open_rules(report) and is_across(report, row, field):
                note((row.name, field), UNDECIDED)
    return found


def field_of(finding: Finding) -> str:
    """The figure a finding is about: its rule's own, else what its evidence names, else the branch
    norm.
    """
    return FIELD_OF_RULE.get(finding.code) or str(finding.evidence.get("field", "branch_norm"))


def open_rules(report: Report) -> set[str]:
    """Codes of the rules that are undecided, or that fired: such a one may be undecided
    elsewhere.
    """
    return {rule.code for rule in report.rules if rule.status in ("unknown", "fired")}


def threshold(report: Report, field: str, level: str) -> float | None:
    """A threshold that the rules used, from `settings["thresholds"][field][level]`; None where
    there is none.
    """
    value = report.settings.get("thresholds", {}).get(field, {}).get(level)
    return float(value) if value is not None else None


def drawn_threshold(report: Report, field: str, level: str) -> float | None:
    """A threshold that a rule compares with to speak at its level: what a picture may draw.

    On a trained model the rules about norms observe, whatever the value, unless the profile makes
    them decide. A rule that was not selected, or that matched no sub-layer for its placement,
    compares nothing.

    Args:
        report: what is drawn.
        field: branch_norm, core_norm or norm_gain.
        level: warning or error.
    """
    code = next(code for code, figure in FIELD_OF_RULE.items() if figure == field)
    decides = report.state != "trained" or code in report.settings.get("levels", ())
    if not decides:
        return None
    if report.rules and not any(rule.code == code and rule.matched for rule in report.rules):
        return None
    return threshold(report, field, level)


def is_across(report: Report, row: SublayerRecord, field: str) -> bool:
    """Whether the interval of a figure holds one of its thresholds, so that no rule can decide."""
    value = getattr(row, field)
    limits = [threshold(report, field, level) for level in ("warning", "error")]
    return isinstance(value, Interval) and any(
        x is not None and value.side_of(x) == "across" for x in limits
    )


def guilty(report: Report) -> dict[str, str]:
    """Whose condition is not, or only partly, met, per sub-layer name: "shortcut", "sub-layer" or
    "both".

    Only at init: on a trained model the split between the two factors is not identifiable.
    """
    if report.state == "trained":
        return {}
    blamed: dict[str, set[str]] = {}
    for finding in report.findings:
        for factor, code in (("sub-layer", "JD101"), ("shortcut", "JD102")):
            if finding.code == code:
                for name in finding.where:
                    blamed.setdefault(name, set()).add(factor)
    return {name: "both" if len(who) == 2 else next(iter(who)) for name, who in blamed.items()}


def at_least(level: str, floor: str) -> bool:
    """Whether a finding's level is as loud as `floor`, one of info, warning, error."""
    return LEVELS.index(level) >= LEVELS.index(floor)  # type: ignore[arg-type]
