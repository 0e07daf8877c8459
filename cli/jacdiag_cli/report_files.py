"""The files that `audit` and `gate` write of a report, and its formats that machines read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jacdiag.errors import UsageError
from jacdiag_cli.output_files import plan_outputs, say_written, write_text

if TYPE_CHECKING:
    from jacdiag.records import Report
    from jacdiag.render.ascii_symbols import Form


def plan_report_files(source: str, given: Mapping[str, Any], **others: str) -> dict[str, str]:
    """Return the output files by option, refused here rather than after minutes of work.

    Args:
        source: what is audited.
        given: the options of the command.
        others: further outputs, such as `baseline="init.json"`.

    Raises:
        UsageError: one of them cannot be written, or would write over a file that is read.
    """
    # 1. What is written.
    named: dict[str, str | None] = {}
    for kind in ("json", "plot", "html", "patch"):
        named[f"--{kind}"] = given[f"{kind}_file"]
    for option, path in others.items():
        named[f"--{option}"] = path

    # 2. What is read. A baseline that is written is not.
    inputs = _read_by(source, given)
    if "baseline" in given and "baseline" not in others:
        inputs.append(("what --baseline reads", given["baseline"]))

    # 3. Refuse what cannot be written, or has a suffix of something else.
    files = plan_outputs(named, inputs=inputs, output_format=given["output_format"])
    if "--plot" in files:
        from jacdiag.render.plots.picture_file import check_suffix

        check_suffix(files["--plot"])

    if "--html" in files:
        check_html(files["--html"])
    if "--patch" in files:
        _check_markdown(files["--patch"])
    return files


def _read_by(source: str, given: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    """Return the files that a command may read: words for each, and its path."""
    factories = {name: (given[name] or "").rpartition(":")[0] for name in ("model", "inputs")}
    return [
        ("what is audited", source),
        ("what is audited", source.removeprefix("hf:")),
        ("what is audited", source.rpartition(":")[0]),
        ("the factory of --model", factories["model"]),
        ("the factory of --inputs", factories["inputs"]),
        ("what --tokens reads", given["tokens"]),
        ("what --contract reads", given["contract"]),
        ("what --risk reads", given["risk"]),
        ("what --against reads", given.get("against")),
    ]


def check_html(path: str) -> None:
    """Raise UsageError unless the file of --html has the suffix of HTML, or is a stream."""
    from jacdiag.records.output_file import is_streamed

    suffix = Path(path).suffix
    if suffix.lower() not in (".html", ".htm") and not is_streamed(path):
        raise UsageError(
            f"cannot write a page to '{path}'", got=f"suffix '{suffix}'", hint="end it in .html"
        )


def _check_markdown(path: str) -> None:
    """Raise unless the file of --patch has the suffix of Markdown, or is a stream."""
    from jacdiag.records.output_file import is_streamed

    suffix = Path(path).suffix
    if suffix.lower() != ".md" and not is_streamed(path):
        raise UsageError(
            f"cannot write remedies to '{path}'",
            got=f"suffix '{suffix}'",
            hint="they are Markdown: end it in .md",
        )


def write_report_files(report: Report, files: Mapping[str, str]) -> None:
    """Write the report, the picture, the page and the remedies, and say so for each."""
    if "--json" in files:
        write_text(files["--json"], (report.to_json() + "\n"))

    if "--plot" in files:
        from jacdiag.render.plots import report_plot

        report_plot.save(report, files["--plot"])
        say_written(files["--plot"])

    if "--html" in files:
        from jacdiag.render.html.pages import report_page

        write_text(files["--html"], report_page(report))

    if "--patch" in files:
        from jacdiag.render.content.remedies import document

        write_text(files["--patch"], document(report))


def machine_text(report: Report, output_format: str) -> str:
    """Return a report in one of the formats that machines read."""
    from jacdiag.render.formats import format_report

    if output_format == "json":
        return report.to_json() + "\n"
    return format_report(report, output_format)


def form_of(output_format: str) -> Form:
    """Return the syntax of a format that machines read."""
    forms: dict[str, Form] = {"json": "json", "sarif": "json", "junit": "xml"}
    return forms.get(output_format, "text")
