"""JUnit XML: a test case per rule."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from jacdiag.records import Report
from jacdiag.render.formats.grouped_findings import Note, failing, notes
from jacdiag.render.terminal.sentences import source_name

# What XML 1.0 cannot hold.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render(report: Report) -> str:
    """One test suite: rules that failed the gate are failures, undecided ones errors, those not
    applicable skipped.
    """
    found = {note.code: note for note in notes(report)}
    fatal = {note.code for note in failing(report)}
    about = report.settings.get("gate", {})
    seconds = f"{float(about.get('seconds', report.cost.seconds or 0.0)):.3f}"
    counts = {
        "tests": len(report.rules),
        "failures": len(fatal & {r.code for r in report.rules}),
        "errors": sum(r.status == "unknown" for r in report.rules),
        "skipped": sum(r.status == "not-applicable" for r in report.rules),
    }
    shared = {key: str(value) for key, value in counts.items()}
    root = ElementTree.Element("testsuites", {"name": "jacdiag", "time": seconds, **shared})
    suite = ElementTree.SubElement(
        root, "testsuite", {"name": _clean(source_name(report)), "time": seconds, **shared}
    )
    properties = ElementTree.SubElement(suite, "properties")
    ElementTree.SubElement(properties, "property", {"name": "verdict", "value": report.verdict})
    for rule in report.rules:
        case = ElementTree.SubElement(
            suite, "testcase", classname="jacdiag", name=f"{rule.code} {rule.name}", time="0"
        )
        note = found.get(rule.code)
        if note is not None and rule.code in fatal:
            _failure(case, note)
        elif rule.status == "unknown":
            error = ElementTree.SubElement(case, "error", message="undecided", type="unknown")
            error.text = _clean(
                rule.note
                or "an interval lies across a threshold, or a figure could not be measured"
            )
        elif rule.status == "not-applicable":
            ElementTree.SubElement(case, "skipped", message=_clean(rule.note or "not applicable"))
        elif note is not None:
            ElementTree.SubElement(case, "system-out").text = _clean(f"{note.level}: {note.text}")
    ElementTree.indent(root)
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        + ElementTree.tostring(root, encoding="unicode")
        + "\n"
    )


def _failure(case: ElementTree.Element, note: Note) -> None:
    if note.file:
        case.set("file", _clean(note.file))
        case.set("line", str(note.line))
    failure = ElementTree.SubElement(
        case, "failure", message=_clean(note.sentences[0]), type=note.level
    )
    failure.text = _clean("\n".join(part for part in (note.place, note.text, note.fix) if part))


def _clean(text: str) -> str:
    return _NOT_XML.sub("\ufffd", text)
