"""A report in the formats that other programs and web pages read."""

from __future__ import annotations

from importlib import import_module

from jacdiag.records import Report

MODULES = {
    "gate": "jacdiag.render.terminal.gate",
    "comment": "jacdiag.render.formats.pr_comment",
    "markdown": "jacdiag.render.formats.markdown",
    "github": "jacdiag.render.formats.github",
    "sarif": "jacdiag.render.formats.sarif",
    "junit": "jacdiag.render.formats.junit",
}
"""The module of each format, imported when the format is requested."""


def format_report(report: Report, name: str) -> str:
    """Return a report in a format of `MODULES`.

    Args:
        report: the report.
        name: a key of `MODULES`.

    Raises:
        KeyError: there is no such format.
    """
    text: str = import_module(MODULES[name]).render(report)
    return text
