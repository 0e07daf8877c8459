"""The result of a gate: one note per rule with its layers folded, the outcome, what to accept.

The screen of the gate, the comment of a pull request and every format for machines show it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jacdiag.records import LEVELS, Finding, Level, Report
from jacdiag.render.content.sentences import legible

NOT_COMPARED = (
    "a trained model that was compared with nothing: no rule tells it from a wrecked one "
    "(jacdiag audit --against EARLIER, or jacdiag gate --baseline FILE)"
)
_SHOWN = 4  # sentences of one rule; the rest are counted
_OUTCOMES = {0: "PASS", 1: "FAIL", 3: "UNDECIDED"}  # by the gate's exit code


@dataclass(frozen=True)
class Note:
    """All that one rule found.

    Attributes:
        code, name: of the rule.
        level: the loudest of its findings' levels.
        sentences: what was found, loudest first; `more` further ones are left out.
        fix: what to do, "" for nothing.
        file, line: where in the repository; `file` is None if nothing there is known.
        names: every weight and sub-layer that it is about.
        fails: the gate fails because of it.
    """

    code: str
    name: str
    level: Level
    sentences: tuple[str, ...]
    more: int
    fix: str
    file: str | None
    line: int
    names: tuple[str, ...]
    fails: bool = False

    @property
    def text(self) -> str:
        """The sentences, one per line."""
        lines = list(self.sentences)
        if self.more:
            lines.append(f"... and {self.more} more")
        return "\n".join(lines)

    @property
    def place(self) -> str:
        """Return the place as in "model.py:118", or "" if it is not known."""
        return f"{self.file}:{self.line}" if self.file else ""


@dataclass(frozen=True)
class FigureChange:
    """A figure that differs from the baseline, as the evidence of JD110 lists it."""

    where: str
    field: str
    old: float | None
    new: float | None


@dataclass(frozen=True)
class GateView:
    """The result of a gate, or of an audit in a gate's format.

    Attributes:
        command: "gate" or "audit".
        outcome: "FAIL", "PASS", "UNDECIDED" or "OBSERVED".
        seeds: how many initializations were audited.
        seconds: as the gate recorded them; None for an audit.
        notes: one for each rule that fired, in the order of the rules.
        counted: "11 rules clean, 2 not applicable, 1 undecided (JD101)".
        reservations: what the outcome does not say by itself.
        not_applicable: why rules did not apply, if they say so.
        changes: figures that differ from the baseline.
        baseline_day: of the baseline, "" if it does not say; None without a baseline.
        accept: the command that accepts new figures; "" if there are none to accept.
    """

    command: str
    outcome: str
    seeds: int
    seconds: float | None
    notes: list[Note]
    counted: str
    reservations: list[str]
    not_applicable: list[str]
    changes: list[FigureChange]
    baseline_day: str | None
    accept: str


def build_gate_view(report: Report) -> GateView:
    """Build what a gate's renderings show.

    Args:
        report: of `jacdiag gate` or of an audit.
    """
    gate = report.settings.get("gate", {})
    recorded = gate.get("seconds")
    baseline = report.baseline
    return GateView(
        command="gate" if "gate" in report.settings else "audit",
        outcome=_outcome(report),
        seeds=int(gate.get("seeds", 1)),
        seconds=None if recorded is None else float(recorded),
        notes=notes(report),
        counted=_counted(report),
        reservations=_reservations(report),
        not_applicable=_not_applicable(report),
        changes=_changes(report),
        baseline_day=None if baseline is None else baseline.created[:10],
        accept=_accept_command(report),
    )


def notes(report: Report) -> list[Note]:
    """Return one note per rule that fired, in the order of the rules."""
    rule_names = {rule.code: rule.name for rule in report.rules}
    fail_on = str(report.settings.get("gate", {}).get("fail_on", "error"))
    groups: dict[str, list[Finding]] = {}
    for finding in report.findings:
        groups.setdefault(finding.code, []).append(legible(finding))
    return [
        _note(code, rule_names.get(code, ""), findings, fail_on)
        for code, findings in groups.items()
    ]


def _note(code: str, name: str, findings: list[Finding], fail_on: str) -> Note:
    loudest_first = sorted(findings, key=lambda finding: -LEVELS.index(finding.level))
    level = loudest_first[0].level
    location = _location(loudest_first)
    names = []
    for finding in loudest_first:
        names += [*finding.evidence.get("parameters", ()), *finding.where]
    return Note(
        code=code,
        name=name,
        level=level,
        sentences=tuple(finding.what for finding in loudest_first[:_SHOWN]),
        more=max(0, len(loudest_first) - _SHOWN),
        fix=_fix(loudest_first),
        file=location.get("file"),
        line=int(location.get("line", 1)),
        names=tuple(dict.fromkeys(names)),
        fails=_reaches(level, fail_on),
    )


def _location(findings: list[Finding]) -> dict[str, Any]:
    """Return the first place in the repository that a finding names."""
    for finding in findings:
        location = finding.evidence.get("location")
        if isinstance(location, dict):
            return location
    return {}


def _fix(findings: list[Finding]) -> str:
    """Return the first fix; one of a figure's rule (JD1xx, JD2xx) only if it was tried."""
    for finding in findings:
        needs_trial = finding.code.startswith(("JD1", "JD2"))
        if finding.fix and (finding.verified or not needs_trial):
            return finding.fix
    return ""


def _reaches(level: Level, fail_on: str) -> bool:
    """Return whether a gate that fails on `fail_on` fails on a level."""
    if fail_on == "never":
        return False
    return LEVELS.index(level) >= LEVELS.index(fail_on)


def _counted(report: Report) -> str:
    clean = sum(rule.status == "clean" for rule in report.rules)
    absent = sum(rule.status == "not-applicable" for rule in report.rules)
    undecided = [rule.code for rule in report.rules if rule.status == "unknown"]
    counts = [f"{clean} {'rule' if clean == 1 else 'rules'} clean"]
    if absent:
        counts.append(f"{absent} not applicable")
    if undecided:
        counts.append(f"{len(undecided)} undecided ({', '.join(undecided)})")
    return ", ".join(counts)


def _not_applicable(report: Report) -> list[str]:
    """Return why rules did not apply, if they say so."""
    return [
        f"{rule.code}: {rule.note}"
        for rule in report.rules
        if rule.note and rule.status == "not-applicable"
    ]


def _outcome(report: Report) -> str:
    exit_code = report.settings.get("gate", {}).get("exit_code")
    if exit_code == 0 and report.verdict == "observed":
        return "OBSERVED"
    return _OUTCOMES.get(exit_code, report.verdict.upper())


def _reservations(report: Report) -> list[str]:
    """Return whether no rule applied, or a trained model was only observed."""
    lines = []
    if report.settings.get("gate", {}).get("rule_applied") is False:
        lines.append("no rule applied, so nothing can pass (jacdiag explain JD904)")
    if report.verdict == "observed":
        lines.append(NOT_COMPARED)
    return lines


def _changes(report: Report) -> list[FigureChange]:
    """Return the figures that JD110 found to differ from the baseline."""
    changes: list[dict[str, Any]] = []
    for finding in report.findings:
        if finding.code == "JD110":
            changes += finding.evidence.get("changes", ())
    return [
        FigureChange(str(change["where"]), change["field"], change["old"], change["new"])
        for change in changes
    ]


def _accept_command(report: Report) -> str:
    """Return the command that writes the baseline again, if a baseline refused the figures."""
    was_refused = any(finding.code == "JD110" for finding in report.findings)
    if "gate" not in report.settings or not was_refused:
        return ""
    command = str(report.settings.get("command") or "jacdiag gate SOURCE --baseline FILE")
    if "--write-baseline" in command:
        return command
    return f"{command} --write-baseline"
