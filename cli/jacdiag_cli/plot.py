"""`jacdiag plot RUN.jsonl|REPORT.json`: the picture of a run or of a report."""

from __future__ import annotations

import json
from pathlib import Path

import click

from jacdiag.errors import SourceError
from jacdiag_cli.outputs import plan_outputs, say_written


@click.command(short_help="Draws a run, or a report, as PNG, SVG or PDF.")
@click.argument("source")
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    help="Where to: .png, .svg, .pdf; - is stdout, as PNG; next to SOURCE if not given.",
)
def plot(source: str, output: str | None) -> None:
    """Draws the log of a run (run.jsonl, or its folder), or a JSON report of `jacdiag audit`.

    \b
    Examples:
      jacdiag plot runs/a -o run.svg
      jacdiag plot report.json
    """
    from jacdiag.report.runlog import RUN_FILE

    path = Path(source) / RUN_FILE if Path(source).is_dir() else Path(source)
    target = output if output is not None else str(path.with_suffix(".png"))
    plan_outputs({"-o": target}, inputs=[("what is drawn", str(path))])
    if path.suffix == ".jsonl":
        from jacdiag.render.run_plot import save_run
        from jacdiag.report.runlog import read_run

        save_run(read_run(path), target)
    else:
        from jacdiag.render.plot import save
        from jacdiag.report import Report

        hint = "a report from --json, or a run.jsonl"
        try:
            report = Report.from_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise SourceError(f"cannot read '{path}'", got=error.strerror, hint=hint) from error
        except (ValueError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise SourceError(f"'{path}' is no report of jacdiag", got=str(error)[:200], hint=hint) from error
        save(report, target)
    say_written(target)
