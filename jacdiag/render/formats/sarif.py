"""SARIF 2.1.0 (OASIS), for code scanning: a result per rule, with its place and a fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from jacdiag.records import Report
from jacdiag.render.content.grouped_findings import Note, build_gate_view
from jacdiag.render.content.next_step import next_step

if TYPE_CHECKING:
    from jacdiag.rules.rule import Rule

_SCHEMA = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)
_LEVELS = {"error": "error", "warning": "warning", "info": "note"}
_HOME = "pyproject.toml"  # if no place in the repository is known: it names the gate's settings
_MODULES = 20  # that a result names


def render(report: Report) -> str:
    """Return a SARIF log with one run.

    Every result has a location relative to the repository's root: the line that draws the weight,
    the class of the module, the factory's line, or the file of the settings. The fingerprint is
    made of rule and names, not of figures or lines, so that it stays.

    Args:
        report: of `jacdiag gate` or of an audit.
    """
    # 1. What fired, and the rules in the order of the program.
    gate = build_gate_view(report)
    notes = gate.notes
    rules = _rules_of(notes)
    index = {rule.code: place for place, rule in enumerate(rules)}

    # 2. The program.
    driver: dict[str, Any] = {
        "name": "jacdiag",
        "rules": [_descriptor(rule) for rule in rules],
    }
    if report.jacdiag:
        driver["version"] = report.jacdiag

    # 3. The run.
    root = {"description": {"text": "the root of the repository"}}
    run: dict[str, Any] = {
        "tool": {"driver": driver},
        "originalUriBaseIds": {"%SRCROOT%": root},
        "results": [_result(note, index) for note in notes],
        "columnKind": "utf16CodeUnits",
        "properties": {"verdict": report.verdict, "next": next_step(report).text},
    }
    if gate.reservations:
        run["invocations"] = [_invocation(gate.reservations)]
    log = {"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}
    return json.dumps(log, indent=2, ensure_ascii=False) + "\n"


def _rules_of(notes: list[Note]) -> list[Rule]:
    """Return the rules that notes are about; a report of another version may name unknown ones."""
    from jacdiag.rules import RULES

    fired = {note.code for note in notes}
    return [rule for rule in RULES if rule.code in fired]


def _descriptor(rule: Rule) -> dict[str, Any]:
    """Return a rule as SARIF describes it."""
    words = rule.name.split("-")
    return {
        "id": rule.code,
        "name": "".join(word.capitalize() for word in words),
        "shortDescription": {"text": rule.summary},
        "fullDescription": {"text": _one_line(rule.page.what)},
        "help": {"text": f"{_one_line(rule.page.why)}\n\n{_one_line(rule.page.remedy)}"},
        "defaultConfiguration": {"level": _LEVELS[rule.level]},
    }


def _invocation(reservations: Sequence[str]) -> dict[str, Any]:
    """Return what the outcome does not say by itself, as notifications of the program."""
    notifications = [{"message": {"text": text}, "level": "note"} for text in reservations]
    return {"executionSuccessful": True, "toolExecutionNotifications": notifications}


def _result(note: Note, index: dict[str, int]) -> dict[str, Any]:
    """Return the result of one rule.

    Args:
        note: all that the rule found.
        index: the place of each rule among those of the log, by code.
    """
    # 1. The rule, and how severe its findings are.
    result: dict[str, Any] = {"ruleId": note.code}
    if note.code in index:
        result["ruleIndex"] = index[note.code]
    result["level"] = _LEVELS[note.level]
    if note.fails:
        result["level"] = "error"

    # 2. What it found, and where.
    result["message"] = {"text": "\n".join([note.text, *note.advice])}
    result["locations"] = [_location(note)]
    result["partialFingerprints"] = {"jacdiag/v1": _fingerprint(note)}
    return result


def _location(note: Note) -> dict[str, Any]:
    """Return a file of the repository and modules of the model."""
    file = {"uri": quote(note.file or _HOME), "uriBaseId": "%SRCROOT%"}
    place: dict[str, Any] = {"artifactLocation": file}
    # Code scanning wants a line; the first one stands for the entire file.
    place["region"] = {"startLine": note.line or 1}
    location: dict[str, Any] = {"physicalLocation": place}
    if note.shown_at:
        location["message"] = {"text": f"shown at {note.shown_at}"}
    modules = [{"fullyQualifiedName": name, "kind": "module"} for name in note.names[:_MODULES]]
    if modules:
        location["logicalLocations"] = modules
    return location


def _fingerprint(note: Note) -> str:
    """Return what a finding is recognised by: a hash of its rule and its names."""
    identity = "\n".join([note.code, *sorted(note.names)])
    return hashlib.sha256(identity.encode()).hexdigest()


def _one_line(text: str) -> str:
    """Return a text without line breaks."""
    return " ".join(text.split())
