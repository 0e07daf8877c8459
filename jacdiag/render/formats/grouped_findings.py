"""One note per rule, layers folded: what every machine's format and the gate's own screen are made
of.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from jacdiag.records import LEVELS, Finding, Level, Report
from jacdiag.render.terminal.sentences import legible

NOT_COMPARED = (
    "a trained model that was compared with nothing: no rule tells it from a wrecked one "
    "(jacdiag audit --against EARLIER, or jacdiag gate --baseline FILE)"
)
_SHOWN = 4  # sentences of one rule; the rest are counted


@dataclass(frozen=True)
class Note:
    """All that one rule found.

    Attributes:
        code, name, level: of the rule; the loudest of its findings' levels.
        sentences: what was found, loudest first; `more` further ones are left out.
        fix: what to do, "" for nothing.
        file, line: where in the repository, None where nothing there is known.
        names: every weight and sub-layer that it is about.
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

    @property
    def text(self) -> str:
        """The sentences, one per line."""
        rest = (f"... and {self.more} more",) if self.more else ()
        return "\n".join((*self.sentences, *rest))

    @property
    def place(self) -> str:
        """ "model.py:118", or ""."""
        return f"{self.file}:{self.line}" if self.file else ""


def notes(report: Report) -> list[Note]:
    """The notes of a report, in the order of the rules."""
    names = {rule.code: rule.name for rule in report.rules}
    groups: dict[str, list[Finding]] = {}
    for finding in report.findings:
        groups.setdefault(finding.code, []).append(legible(finding))
    return [_note(code, names.get(code, ""), found) for code, found in groups.items()]


def _note(code: str, name: str, found: list[Finding]) -> Note:
    loud = sorted(found, key=lambda f: -LEVELS.index(f.level))
    places = [f.evidence.get("location") for f in loud]
    place: dict[str, Any] = next((p for p in places if isinstance(p, dict)), {})
    fix = next(
        (f.fix for f in loud if f.fix and (f.verified or not f.code.startswith(("JD1", "JD2")))), ""
    )
    about = dict.fromkeys(n for f in loud for n in (*f.evidence.get("parameters", ()), *f.where))
    return Note(
        code,
        name,
        loud[0].level,
        tuple(f.what for f in loud[:_SHOWN]),
        max(0, len(loud) - _SHOWN),
        fix,
        place.get("file"),
        int(place.get("line", 1)),
        tuple(about),
    )


def failing(report: Report) -> list[Note]:
    """The notes that made the gate fail."""
    least = str(report.settings.get("gate", {}).get("fail_on", "error"))
    if least == "never":
        return []
    return [n for n in notes(report) if LEVELS.index(n.level) >= LEVELS.index(least)]  # type: ignore[arg-type]


def counted(report: Report) -> str:
    """ "11 rules clean, 2 not applicable, 1 undecided (JD101)"."""
    clean = sum(r.status == "clean" for r in report.rules)
    absent = sum(r.status == "not-applicable" for r in report.rules)
    open_ones = [r.code for r in report.rules if r.status == "unknown"]
    parts = [f"{clean} {'rule' if clean == 1 else 'rules'} clean"]
    parts += [f"{absent} not applicable"] if absent else []
    parts += [f"{len(open_ones)} undecided ({', '.join(open_ones)})"] if open_ones else []
    return ", ".join(parts)


def not_applicable(report: Report) -> Iterable[str]:
    """Why rules did not apply, where they say so."""
    return (f"{r.code}: {r.note}" for r in report.rules if r.note and r.status == "not-applicable")


def outcome(report: Report) -> str:
    """ "FAIL", "PASS", "UNDECIDED" or "OBSERVED"."""
    code = report.settings.get("gate", {}).get("exit_code")
    if code == 0 and report.verdict == "observed":
        return "OBSERVED"
    return {0: "PASS", 1: "FAIL", 3: "UNDECIDED"}.get(code, report.verdict.upper())


def reservations(report: Report) -> list[str]:
    """What a gate's word does not say by itself: that no rule applied, or that a trained model was
    only observed.
    """
    about = report.settings.get("gate", {})
    lines = []
    if about.get("rule_applied") is False:
        lines.append("no rule applied, so nothing can pass (jacdiag explain JD904)")
    if report.verdict == "observed":
        lines.append(NOT_COMPARED)
    return lines


def accepting(report: Report) -> str:
    """The command that accepts what is new, where a baseline refused it; else ""."""
    if "gate" not in report.settings or not any(f.code == "JD110" for f in report.findings):
        return ""
    command = str(report.settings.get("command") or "jacdiag gate SOURCE --baseline FILE")
    return command if "--write-baseline" in command else f"{command} --write-baseline"
