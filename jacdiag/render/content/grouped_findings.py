"""The result of a gate: one note per rule with its layers folded, the outcome, what to accept.

The screen of the gate, the comment of a pull request and every format for machines show it.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from jacdiag.records import LEVELS, Finding, Level, Report
from jacdiag.render.content.command_line import without_options
from jacdiag.render.content.sentences import legible, plural

NOT_COMPARED = (
    "a trained model that was compared with nothing: no rule tells it from a wrecked one "
    "(jacdiag audit --against EARLIER, or jacdiag gate --baseline FILE)"
)
# Options of a gate that do not belong to the command that writes its baseline again.
_WEAKENING = ("--contract-only", "--write-baseline")
_NOT_OF_A_BASELINE = (
    *("--seeds", "--budget", "--remedies"),
    *("--format", "--json", "--plot", "--html", "--patch"),
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
        advice: what to do and the commands that help next, one line each.
        file, line: where in the repository; `file` is None if nothing there is known, `line` if no
            line of the file is more to the point than another.
        shown_at: what stands there, such as "class MLP"; "" for the line that draws the weight.
        names: every weight and sub-layer that it is about.
        fails: the gate fails because of it.
    """

    code: str
    name: str
    level: Level
    sentences: tuple[str, ...]
    more: int
    fix: str
    advice: tuple[str, ...]
    file: str | None
    line: int | None
    shown_at: str
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
        """Return the place as in "model.py:118 (class MLP)", or "" if it is not known."""
        if not self.file:
            return ""
        place = self.file
        if self.line is not None:
            place += f":{self.line}"
        if self.shown_at:
            place += f" ({self.shown_at})"
        return place


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
    # 1. What only a gate has.
    command, seconds = "audit", None
    gate = report.settings.get("gate", {})
    if "gate" in report.settings:
        command = "gate"
    if gate.get("seconds") is not None:
        seconds = float(gate["seconds"])
    baseline_day = None
    is_compared = any(rule.code == "JD110" for rule in report.rules)
    if report.baseline is not None and is_compared:
        baseline_day = report.baseline.created[:10]

    # 2. What an audit has, too.
    return GateView(
        command=command,
        outcome=_outcome(report),
        seeds=int(gate.get("seeds", 1)),
        seconds=seconds,
        notes=notes(report),
        counted=_counted(report),
        reservations=_reservations(report),
        not_applicable=_not_applicable(report),
        changes=_changes(report),
        baseline_day=baseline_day,
        accept=_accept_command(report),
    )


def notes(report: Report) -> list[Note]:
    """Return one note per rule that fired, in the order of the rules."""
    # 1. The findings of each rule.
    groups: dict[str, list[Finding]] = {}
    for finding in report.findings:
        groups.setdefault(finding.code, []).append(legible(finding))

    # 2. A note for each.
    rule_names = {rule.code: rule.name for rule in report.rules}
    fail_on = str(report.settings.get("gate", {}).get("fail_on", "error"))
    notes = []
    for code, findings in groups.items():
        # A change from the baseline may be meant.
        accept = ""
        if code == "JD110":
            accept = _accept_command(report)
        name = rule_names.get(code, "")
        notes.append(_note(code, name, findings, fail_on, accept))
    return notes


def _note(code: str, name: str, findings: list[Finding], fail_on: str, accept: str) -> Note:
    """Return the note of one rule.

    Args:
        code: of the rule.
        name: of the rule.
        findings: at least one.
        fail_on: the least level at which the gate fails.
        accept: the command that accepts what it found; "" for none.
    """
    # 1. The loudest finding stands for all of them.
    loudest_first = sorted(findings, key=lambda finding: -LEVELS.index(finding.level))
    level = loudest_first[0].level

    # 2. Where it is, in the repository and in the model.
    location = _location(loudest_first)
    names = []
    for finding in loudest_first:
        names += [*finding.evidence.get("parameters", ()), *finding.where]

    # 3. What to do. The rule's page has the rest.
    fix = _fix(loudest_first)
    advice = [fix] if fix else []
    if accept:
        advice.append(f"if the change is meant: {accept}")
    advice.append(f"jacdiag explain {code}   says what the rule checks and what helps")

    # 4. The first sentences; the others are counted.
    return Note(
        code=code,
        name=name,
        level=level,
        sentences=tuple(finding.what for finding in loudest_first[:_SHOWN]),
        more=max(0, len(loudest_first) - _SHOWN),
        fix=fix,
        advice=tuple(advice),
        file=location.get("file"),
        line=_line(location),
        shown_at=_shown_at(location),
        names=tuple(dict.fromkeys(names)),
        fails=_reaches(level, fail_on),
    )


def _location(findings: list[Finding]) -> dict[str, Any]:
    """Return the first place in the repository that a finding names."""
    for finding in findings:
        # A report may come from a file: the evidence is whatever stands there.
        location = finding.evidence.get("location")
        if isinstance(location, dict):
            return location

    return {}


def _line(location: dict[str, Any]) -> int | None:
    """Return the line of a place; None if the file alone is known."""
    is_file_alone = location.get("what") == "file"
    if is_file_alone or "line" not in location:
        return None
    return int(location["line"])


def _shown_at(location: dict[str, Any]) -> str:
    """Return what stands at a place that is less exact than the line of a weight."""
    kinds = {"class": "class", "factory": "function"}
    kind = kinds.get(str(location.get("what")))
    if kind is None:
        return ""
    return f"{kind} {location.get('name', '')}".strip()


def _fix(findings: list[Finding]) -> str:
    """Return the first fix; one of a figure's rule (JD1xx, JD2xx) only if it was tried."""
    for finding in findings:
        if not finding.fix:
            continue
        needs_trial = finding.code.startswith(("JD1", "JD2"))
        if not needs_trial or finding.verified:
            return finding.fix
    return ""


def _reaches(level: Level, fail_on: str) -> bool:
    """Return whether a gate that fails on `fail_on` fails on a level."""
    never_fails = fail_on == "never"
    if never_fails:
        return False
    return LEVELS.index(level) >= LEVELS.index(fail_on)


def _counted(report: Report) -> str:
    """Return how many rules came out in which way, with the codes of the undecided ones."""
    # 1. By status.
    codes: dict[str, list[str]] = {}
    for rule in report.rules:
        codes.setdefault(rule.status, []).append(rule.code)
    undecided = codes.get("unknown", [])
    absent = codes.get("not-applicable", [])

    # 2. In words. The clean ones are always counted, be there none.
    counts = [f"{plural(len(codes.get('clean', [])), 'rule')} clean"]
    if absent:
        counts.append(f"{len(absent)} not applicable")
    if undecided:
        counts.append(f"{len(undecided)} undecided ({', '.join(undecided)})")
    return ", ".join(counts)


def _not_applicable(report: Report) -> list[str]:
    """Return why rules did not apply, if they say so."""
    reasons = []
    for rule in report.rules:
        if rule.status != "not-applicable":
            continue
        if rule.note:
            reasons.append(f"{rule.code}: {rule.note}")
    return reasons


def _outcome(report: Report) -> str:
    """Return the outcome of a gate by its exit code, or the verdict of an audit."""
    exit_code = report.settings.get("gate", {}).get("exit_code")
    # A trained model that was compared with nothing does not pass: it was only looked at.
    if exit_code == 0 and report.is_observed:
        return "OBSERVED"
    return _OUTCOMES.get(exit_code, report.verdict.upper())


def _reservations(report: Report) -> list[str]:
    """Return what the outcome does not say by itself, one sentence each."""
    lines = []
    gate = report.settings.get("gate", {})
    if gate.get("rule_applied") is False:
        lines.append("no rule applied, so nothing can pass (jacdiag explain JD904)")
    if report.is_observed:
        lines.append(NOT_COMPARED)

    # The names in them are those of somebody's model.
    lines += [legible(str(line)) for line in gate.get("not_compared", ())]
    return lines


def _changes(report: Report) -> list[FigureChange]:
    """Return the figures that JD110 found to differ from the baseline."""
    # 1. The evidence of all findings of that rule.
    evidence: list[dict[str, Any]] = []
    for finding in report.findings:
        if finding.code == "JD110":
            evidence += finding.evidence.get("changes", ())

    # 2. As records.
    changes = []
    for change in evidence:
        where = str(change["where"])
        changes.append(FigureChange(where, change["field"], change["old"], change["new"]))
    return changes


def _accept_command(report: Report) -> str:
    """Return the command that writes the baseline again, if a baseline refused the figures."""
    # 1. Whether there is something to accept.
    if "gate" not in report.settings:
        return ""
    fired = {finding.code for finding in report.findings}
    if "JD110" not in fired:
        return ""

    # 2. The command of the gate, without what would make the baseline weaker: it is measured in
    #    full, over as many seeds as before.
    command = str(report.settings.get("command") or "jacdiag gate SOURCE --baseline FILE")
    words = without_options(shlex.split(command), flags=_WEAKENING, valued=_NOT_OF_A_BASELINE)
    if report.baseline is not None:
        words += ["--seeds", str(report.baseline.seeds)]
    return shlex.join([*words, "--write-baseline"])
