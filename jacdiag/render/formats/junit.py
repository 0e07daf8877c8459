"""JUnit XML: a test case per rule."""

from __future__ import annotations

import re
from collections import Counter
from xml.etree import ElementTree

from jacdiag.records import Report, RuleResult
from jacdiag.render.content.grouped_findings import GateView, Note, build_gate_view
from jacdiag.render.content.next_step import next_step
from jacdiag.render.content.sentences import source_name

# What XML 1.0 cannot hold.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_UNDECIDED = "an interval lies across a threshold, or a figure could not be measured"


def render(report: Report) -> str:
    """Return one test suite with a case for each rule.

    Rules that failed the gate are failures, undecided ones errors, those not applicable skipped.

    Args:
        report: of `jacdiag gate` or of an audit.
    """
    gate = build_gate_view(report)
    notes = {note.code: note for note in gate.notes}
    counts = _counts(report, gate)

    # 1. The suite.
    root = ElementTree.Element("testsuites", {"name": "jacdiag", **counts})
    name = _clean(source_name(report))
    suite = ElementTree.SubElement(root, "testsuite", {"name": name, **counts})
    properties = ElementTree.SubElement(suite, "properties")
    ElementTree.SubElement(properties, "property", {"name": "verdict", "value": report.verdict})

    following = next_step(report).text
    ElementTree.SubElement(properties, "property", {"name": "next", "value": _clean(following)})

    # 2. A case for each rule.
    for rule in report.rules:
        _add_case(suite, rule, notes.get(rule.code))

    # 3. What the outcome does not say by itself.
    output = ElementTree.SubElement(suite, "system-out")
    lines = [*gate.reservations, f"next: {following}"]
    output.text = _clean("\n".join(lines))
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def _counts(report: Report, gate: GateView) -> dict[str, str]:
    """Return the attributes that suite and root share: time and numbers of cases."""
    # 1. The time: of the gate, or of the audit.
    seconds = gate.seconds
    if seconds is None:
        seconds = float(report.cost.seconds or 0.0)

    # 2. The cases. A finding of a rule without a result has none.
    statuses = Counter(rule.status for rule in report.rules)
    codes = {rule.code for rule in report.rules}
    failing = {note.code for note in gate.notes if note.fails}
    return {
        "time": f"{seconds:.3f}",
        "tests": str(len(report.rules)),
        "failures": str(len(failing & codes)),
        "errors": str(statuses["unknown"]),
        "skipped": str(statuses["not-applicable"]),
    }


def _add_case(suite: ElementTree.Element, rule: RuleResult, note: Note | None) -> None:
    """Add the test case of one rule.

    Args:
        suite: the element to add to.
        rule: how the rule came out.
        note: what it found; None if it found nothing.
    """
    name = f"{rule.code} {rule.name}"
    case = ElementTree.SubElement(suite, "testcase", classname="jacdiag", name=name, time="0")

    # 1. Findings that fail the gate come before the rule's own status.
    if note is not None and note.fails:
        _add_failure(case, note)
        return

    # 2. Rules that did not decide, or did not apply.
    if rule.status == "unknown":
        error = ElementTree.SubElement(case, "error", message="undecided", type="unknown")
        reason = rule.note or _UNDECIDED
        error.text = _clean(f"{reason}\n{_explain(rule.code)}")
        return
    if rule.status == "not-applicable":
        reason = rule.note or "not applicable"
        ElementTree.SubElement(case, "skipped", message=_clean(reason))
        return

    # 3. Findings that the gate lets pass.
    if note is not None:
        output = ElementTree.SubElement(case, "system-out")
        lines = [f"{note.level}: {note.text}", *note.advice]
        output.text = _clean("\n".join(lines))


def _add_failure(case: ElementTree.Element, note: Note) -> None:
    """Add a failure to a test case, with the place in the repository if it is known."""
    if note.file:
        case.set("file", _clean(note.file))
    if note.file and note.line is not None:
        case.set("line", str(note.line))

    # The message is one sentence; the text below it has them all.
    message = _clean(note.sentences[0])
    failure = ElementTree.SubElement(case, "failure", message=message, type=note.level)
    lines = filter(None, (note.place, note.text, *note.advice))
    failure.text = _clean("\n".join(lines))


def _explain(code: str) -> str:
    """Return the command that explains a rule, with what it does."""
    return f"jacdiag explain {code}   says what the rule checks and what helps"


def _clean(text: str) -> str:
    """Return a text without the characters that XML cannot hold."""
    return _NOT_XML.sub("\ufffd", text)
