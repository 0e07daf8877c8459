"""`python -m jacdiag.render REPORT.json FORMAT`: a report that was written, in another format."""

from __future__ import annotations

import sys
from pathlib import Path

from jacdiag.records import Report
from jacdiag.render.ascii_symbols import Form, spelled
from jacdiag.render.formats import MODULES, format_report

FORMATS = tuple(MODULES)
_FORMS: dict[str, Form] = {
    "comment": "markdown",
    "markdown": "markdown",
    "sarif": "json",
    "junit": "xml",
}


def main(args: list[str]) -> int:
    """Print a report in another format, and return the exit code."""
    if len(args) != 2 or args[1] not in FORMATS:
        print(f"usage: python -m jacdiag.render REPORT.json {'|'.join(FORMATS)}", file=sys.stderr)
        return 2
    try:
        report = Report.from_json(Path(args[0]).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError) as error:
        print(f"error: cannot read the report '{args[0]}'\n  got: {error}", file=sys.stderr)
        return 2
    text = format_report(report, args[1])
    sys.stdout.write(spelled(text, sys.stdout.encoding, _FORMS.get(args[1], "text")))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
