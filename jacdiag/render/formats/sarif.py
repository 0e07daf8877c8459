"""SARIF 2.1.0 (OASIS), for code scanning: a result per rule that found something, with its place
and a fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any
from urllib.parse import quote

from jacdiag.records import Report
from jacdiag.render.formats.grouped_findings import Note, failing, notes

_SCHEMA = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)
_LEVELS = {"error": "error", "warning": "warning", "info": "note"}
_HOME = "pyproject.toml"  # where nothing in the repository is known: what names the gate's settings


def render(report: Report) -> str:
    """A SARIF log with one run.

    Every result has a location relative to the repository's root: the class of the module, the
    factory's line, or the file of the settings. The fingerprint is made of rule and names, not of
    figures or lines, so that it stays.
    """
    from jacdiag.rules import RULES

    fatal = {n.code for n in failing(report)}
    spoken = {n.code for n in notes(report)}
    rules = [rule for rule in RULES if rule.code in spoken]
    index = {rule.code: k for k, rule in enumerate(rules)}
    descriptors = [
        {
            "id": rule.code,
            "name": "".join(part.capitalize() for part in rule.name.split("-")),
            "shortDescription": {"text": rule.summary},
            "fullDescription": {"text": _one_line(rule.page.what)},
            "help": {"text": f"{_one_line(rule.page.why)}\n\n{_one_line(rule.page.remedy)}"},
            "defaultConfiguration": {"level": _LEVELS[rule.level]},
        }
        for rule in rules
    ]
    driver = {
        "name": "jacdiag",
        "rules": descriptors,
        **({"version": report.jacdiag} if report.jacdiag else {}),
    }
    results = [_result(note, index, note.code in fatal) for note in notes(report)]
    run: dict[str, Any] = {
        "tool": {"driver": driver},
        "originalUriBaseIds": {
            "%SRCROOT%": {"description": {"text": "the root of the repository"}}
        },
        "results": results,
        "columnKind": "utf16CodeUnits",
        "properties": {"verdict": report.verdict},
    }
    return (
        json.dumps(
            {"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2, ensure_ascii=False
        )
        + "\n"
    )


def _result(note: Note, index: dict[str, int], fatal: bool) -> dict[str, Any]:
    text = f"{note.text}\n{note.fix}".strip()
    place = {"uri": quote(note.file or _HOME), "uriBaseId": "%SRCROOT%"}
    physical = {"artifactLocation": place, "region": {"startLine": note.line}}
    logical = [{"fullyQualifiedName": name, "kind": "module"} for name in note.names[:20]]
    return {
        "ruleId": note.code,
        **({"ruleIndex": index[note.code]} if note.code in index else {}),
        "level": "error" if fatal else _LEVELS[note.level],
        "message": {"text": text},
        "locations": [
            {"physicalLocation": physical, **({"logicalLocations": logical} if logical else {})}
        ],
        "partialFingerprints": {"jacdiag/v1": _fingerprint(note)},
    }


def _fingerprint(note: Note) -> str:
    return hashlib.sha256("\n".join([note.code, *sorted(note.names)]).encode()).hexdigest()


def _one_line(text: str) -> str:
    return " ".join(text.split())
