"""`jacdiag plot RUN...|REPORT.json`: the picture of a run, of several runs, or of a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jacdiag.errors import SourceError, UsageError
from jacdiag_cli.output_files import plan_outputs, say_written, write_text
from jacdiag_cli.report_files import check_html
from jacdiag_cli.streams import say

if TYPE_CHECKING:
    from jacdiag.records.run_log import RunLog
    from jacdiag.render.plots.run_plot import RunPlot

_MOST_ALERTS = 8  # that are printed


@click.command(short_help="Draws runs, or a report, as PNG, SVG, PDF or a page for a browser.")
@click.argument("source", metavar="SOURCE...", nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    help="Where to: .png, .svg, .pdf; - is stdout, as PNG; next to SOURCE if not given.",
)
@click.option(
    "--html",
    "html_file",
    metavar="FILE",
    help="Write a page for a browser, with the picture and all alerts: .html; - is stdout. No "
    "other picture is written then, unless -o names one.",
)
@click.option(
    "--figures",
    metavar="NAMES",
    help="Panels of a run, with commas: loss, gradient, gain, lr, update, shortcut, logits, clip. "
    "All that the log has data for if not given.",
)
@click.option("--from", "first", type=click.IntRange(0), metavar="STEP", help="First step to draw.")
@click.option("--to", "last", type=click.IntRange(0), metavar="STEP", help="Last step to draw.")
@click.option(
    "--smooth",
    type=click.IntRange(1),
    metavar="STEPS",
    help=(
        "Steps that the bold line is the mean of; 1 for none. A fiftieth of the steps if not given."
    ),
)
@click.option(
    "--size",
    metavar="SIZE",
    default="slide",
    show_default=True,
    help="slide (16:9), page (upright), wide, or inches such as 12.8x7.2.",
)
def plot(
    source: tuple[str, ...],
    output: str | None,
    html_file: str | None,
    figures: str | None,
    first: int | None,
    last: int | None,
    smooth: int | None,
    size: str,
) -> None:
    """Draws the log of a run (run.jsonl, or its folder), or a JSON report of `jacdiag audit`.

    Several runs are drawn over each other, each in a colour of its own.

    \b
    Examples:
      jacdiag plot runs/a -o run.svg
      jacdiag plot runs/a runs/b --figures loss,gradient --from 1000 -o both.png
      jacdiag plot runs/a --html run.html
      jacdiag plot report.json
    """
    from jacdiag.render.plots.run_plot import RunPlot, parse_figures, parse_size

    # 1. Check the options before any work.
    paths = [_log_in(path) for path in source]
    runs = [path for path in paths if path.suffix == ".jsonl"]
    _check_several(paths, runs, output or html_file)
    options = RunPlot(
        figures=() if figures is None else parse_figures(figures),
        size=parse_size(size),
        first=first,
        last=last,
        smooth=smooth,
    )
    if not runs and options != RunPlot():
        raise UsageError(
            "--figures, --from, --to, --smooth and --size are for runs",
            got="a report",
            hint="leave them out; they choose what is drawn of a run",
        )
    target = output
    if output is None and html_file is None:
        target = str(paths[0].with_suffix(".png"))
    inputs: list[tuple[str, str | None]] = [("what is drawn", str(path)) for path in paths]
    plan_outputs({"-o": target, "--html": html_file}, inputs=inputs)
    if html_file is not None:
        check_html(html_file)

    # 2. Draw.
    if runs:
        _draw_runs(runs, target, html_file, options)
    else:
        _draw_report(paths[0], target, html_file)


def _check_several(paths: list[Path], runs: list[Path], output: str | None) -> None:
    """Raise if several sources cannot be drawn into one picture.

    Args:
        paths: all sources.
        runs: those that are runs.
        output: where the picture or the page goes, if that was given.
    """
    if len(paths) == 1:
        return
    if len(runs) < len(paths):
        raise UsageError(
            "several sources are drawn over each other only if all are runs",
            hint="jacdiag plot A B",
        )
    if output is None:
        raise UsageError("several runs need a name for their picture", hint="add -o FILE.png")


def _log_in(source: str) -> Path:
    """Return the log of a run that is named by its folder; any other path as it is."""
    from jacdiag.records.run_log import RUN_FILE

    path = Path(source)
    if not path.is_dir():
        return path
    return path / RUN_FILE


def _draw_runs(
    paths: list[Path], target: str | None, html_file: str | None, options: RunPlot
) -> None:
    """Draw the logs of runs, several over each other.

    Args:
        paths: of the logs.
        target: the picture, if one is to be written.
        html_file: the page, if one is to be written.
        options: size, range and panels.
    """
    from jacdiag.records.run_log import read_run
    from jacdiag.render.plots.run_plot import picture_of_run, save_run

    # 1. A single run needs no name in its picture.
    logs = {_run_name(path, paths): read_run(path, light=True) for path in paths}
    folders = {_run_name(path, paths): path.parent for path in paths}
    drawn: Any = logs
    if len(logs) == 1:
        drawn = next(iter(logs.values()))

    # 2. The picture, the page, or both.
    if target is not None:
        save_run(drawn, target, options)
        say_written(target)
    if html_file is not None:
        from jacdiag.render.content.run_flights import flights_of_run
        from jacdiag.render.html.pages import run_page

        flights = {name: flights_of_run(logs[name], folders[name]) for name in logs}
        page = run_page(logs, picture_of_run(drawn, ".svg", options), flights)
        write_text(html_file, page)

    # 3. The alerts, with the command that runs a flight again.
    for name, log in logs.items():
        _say_alerts(log, folders[name])


def _say_alerts(run: RunLog, folder: Path) -> None:
    """Print the alerts of a run, each with its flight if one was written.

    Args:
        run: its log.
        folder: of the log.
    """
    from jacdiag.render.content.run_alerts import alerts_of_run
    from jacdiag.render.content.run_flights import alert_lines, flights_of_run
    from jacdiag.render.content.sentences import legible, plural

    # 1. The first few. Observations are in the picture alone.
    flights = flights_of_run(run, folder)
    alerts = [row for row in alerts_of_run(run) if row.get("level") != "info"]
    for row in alerts[:_MOST_ALERTS]:
        first, *others = alert_lines(row, flights)
        say(str(legible(f"alert: {first}")))
        for line in others:
            say(str(legible(f"  {line}")))

    # 2. The others.
    beyond = len(alerts) - _MOST_ALERTS
    if beyond > 0:
        say(f"{plural(beyond, 'further alert')}; --html FILE lists them all")


def _run_name(path: Path, paths: list[Path]) -> str:
    """Return as many of the last folders of a run as distinguish it from the other runs."""
    folders = _folders(path)
    others = [_folders(other) for other in paths if other != path]

    # From the last folder up, until no other run ends in the same ones.
    for count in range(1, len(folders)):
        ending = folders[-count:]
        if ending not in [other[-count:] for other in others]:
            return "/".join(ending)
    return "/".join(folders)


def _folders(path: Path) -> tuple[str, ...]:
    """Return the folders in a path, without run.jsonl."""
    from jacdiag.records.run_log import RUN_FILE

    resolved = path.resolve()
    if resolved.name == RUN_FILE:
        return resolved.parent.parts
    return resolved.parts


def _draw_report(path: Path, target: str | None, html_file: str | None) -> None:
    """Draw a JSON report as a picture, as a page, or as both."""
    from jacdiag.records import NewerSchemaError, Report
    from jacdiag.render.plots.report_plot import save

    # 1. Read the report.
    hint = "a report from --json, or a run.jsonl"
    try:
        report = Report.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"cannot read '{path}'", got=error.strerror, hint=hint) from error
    except NewerSchemaError as error:
        raise SourceError(
            f"cannot read '{path}': {error.what}", got=error.got, hint=error.hint
        ) from error
    except (ValueError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise SourceError(
            f"'{path}' is no report of jacdiag", got=str(error)[:200], hint=hint
        ) from error

    # 2. Draw what was requested.
    if target is not None:
        save(report, target)
        say_written(target)
    if html_file is not None:
        from jacdiag.render.html.pages import report_page

        write_text(html_file, report_page(report))
