"""`jacdiag diff A B`: two models compared figure by figure."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jacdiag_cli.audit_options import audit_options
from jacdiag_cli.config import Configured
from jacdiag_cli.options import PROBE, SOLVER, add
from jacdiag_cli.output_files import any_on_stdout, plan_outputs, say_written, write_text
from jacdiag_cli.report_files import check_html
from jacdiag_cli.streams import (
    CommandInvocation,
    TableColumn,
    emit,
    grid,
    model_output,
    room,
    row_width,
    show,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jacdiag.comparison import Comparison, Pair
    from jacdiag.records import Report
    from jacdiag.render.content.compared_models import ComparisonView

_ALWAYS_SHOWN = 4  # columns up to this one stay on a narrow terminal
_NUMBERS = (0, 3, 4, 5)  # columns that are aligned to the right


@click.command(cls=Configured, short_help="Compares two models, checkpoints or reports.")
@click.argument("a")
@click.argument("b")
@click.option(
    "--model", metavar="FACTORY", help="Builds the module that a bare state dict belongs to."
)
@click.option(
    "--key",
    metavar="NAME",
    help="Which weights to read, if a file holds several sets: ema, model.net.",
)
@click.option("--contract-only", is_flag=True, help="Weights alone; no Jacobians.")
@click.option(
    "--all", "all_rows", is_flag=True, help="Show every figure, not only those that differ."
)
@add(PROBE, SOLVER)
@click.option(
    "--plot",
    "plot_file",
    metavar="FILE",
    help="Draw the figures that differ too: .png, .svg or .pdf; - is stdout.",
)
@click.option(
    "--html",
    "html_file",
    metavar="FILE",
    help="Write every figure as one page for a browser too: .html; - is stdout.",
)
@click.option(
    "--format",
    "output_format",
    type=click.Choice(["pretty", "json", "markdown"]),
    default="pretty",
    show_default=True,
    help="Of what is printed.",
)
@click.pass_obj
def diff(
    invocation: CommandInvocation,
    a: str,
    b: str,
    output_format: str,
    html_file: str | None,
    plot_file: str | None,
    all_rows: bool,
    **given: Any,
) -> int:
    """Compares two models, checkpoints or JSON reports: where do their figures differ first?

    A and B are each a SOURCE as for `jacdiag audit`, or a report that `--json` wrote. Sub-layers
    and weights are matched by role and depth, whatever they are called. The exit code is 1 if a
    figure differs beyond its interval.

    \b
    Examples:
      jacdiag diff main.json build.py:model
      jacdiag diff hf:config.json megatron.pt --model build.py:megatron
    """
    # 1. Check the options before any work.
    inputs = [("what is compared", a), ("what is compared", b)]
    named = {"--html": html_file, "--plot": plot_file}
    files = plan_outputs(named, inputs=inputs, output_format=output_format)
    if html_file is not None:
        check_html(html_file)
    if plot_file is not None:
        from jacdiag.render.plots.picture_file import check_suffix

        check_suffix(plot_file)

    # 2. Compare.
    with model_output():
        from jacdiag.comparison import compare

        first, second = _report(a, given), _report(b, given)
        comparison = compare(first, second)
    invocation.heed()
    view = _view(comparison, first, second, (a, b))

    # 3. Write the page and the picture, and print the result with the next command.
    if html_file is not None:
        _write_page(view, html_file)
    if plot_file is not None:
        _write_picture(view, plot_file)
    aside = any_on_stdout(files)
    _show(view, output_format, all_rows, aside=aside)
    if output_format == "pretty":
        step = _next_command(comparison, (a, b), (first, second), invocation.args)
        show(f"next: {step}\n", aside=aside)
    return int(comparison.first is not None)


def _next_command(
    comparison: Comparison, names: tuple[str, str], reports: tuple[Report, Report], args: list[str]
) -> str:
    """Return the command that helps next, with what it does.

    Args:
        comparison: that was printed.
        names: of the two models, as on the command line.
        reports: of the two models.
        args: of this command.
    """
    from jacdiag.comparison.match import is_off_distribution

    # 1. Nothing was compared. A report is no model to look at.
    first, _ = names
    if not comparison.pairs and Path(first).suffix == ".json":
        return "jacdiag sites SOURCE   lists the sub-layers and weights of a model"
    if not comparison.pairs:
        return (
            f"{shlex.join(['jacdiag', 'sites', first])}   lists what was found in the first model"
        )

    # 2. Trained models on random tokens. A report that was written keeps its probe.
    command = shlex.join(["jacdiag", *args])
    has_random_probe = any(map(is_off_distribution, reports))
    can_be_measured_again = all(Path(name).suffix != ".json" for name in names)
    if has_random_probe and can_be_measured_again:
        option = "--tokens FILE   measures both on real text"
        if _is_of_pixels(reports):
            option = "--inputs FACTORY   measures both on real images"
        return f"{command} {option}"

    # 3. The figures agree, and are not shown.
    is_folded = comparison.first is None and "--all" not in args
    if is_folded:
        return f"{command} --all   shows the figures that agree too"

    # 4. A table was shown.
    return "jacdiag explain columns   says what each figure and column means"


def _is_of_pixels(reports: tuple[Report, Report]) -> bool:
    """Return whether a model was measured on random pixels."""
    for report in reports:
        probe = report.probe
        if probe is None:
            continue
        if probe.tokens == "random pixels":
            return True
    return False


def _report(source: str, given: dict[str, Any]) -> Report:
    """Return a report: read from its file, or of an audit."""
    from jacdiag.comparison import read_report

    # 1. A report that was written.
    path = Path(source)
    if path.suffix == ".json" and path.is_file():
        return read_report(path)

    # 2. An audit. --model and --key are for the side that is a file.
    from jacdiag.pipeline.audit import run_audit

    options = audit_options(given, products=not given["contract_only"])
    if _builds_its_model(source):
        options = dataclasses.replace(options, model=None, key=None)
    return run_audit(source, options)


def _builds_its_model(source: str) -> bool:
    """Return whether a source has a model, not weights alone."""
    from jacdiag.sources.factory import is_factory

    if source.startswith("hf:") or is_factory(source):
        return True
    return Path(source).is_dir()  # a folder of Hugging Face


def _view(
    comparison: Comparison, first: Report, second: Report, names: tuple[str, str]
) -> ComparisonView:
    """Return what is shown of a comparison.

    Args:
        comparison: of the two reports.
        first: report A.
        second: report B.
        names: of both, as on the command line.
    """
    from jacdiag.render.content.compared_models import build_comparison_view

    return build_comparison_view(comparison.pairs, comparison.notes, (first, second), names)


def _write_page(view: ComparisonView, path: str) -> None:
    """Write the page of a comparison."""
    from jacdiag.render.html.pages import comparison_page

    write_text(path, comparison_page(view))


def _write_picture(view: ComparisonView, path: str) -> None:
    """Write the picture of the figures that differ, and say so."""
    from jacdiag.render.plots.diff_plot import save

    save(view, path)
    say_written(path)


def _show(view: ComparisonView, output_format: str, all_rows: bool, *, aside: bool) -> None:
    """Print a comparison to stdout.

    Args:
        view: what to show.
        output_format: pretty, json or markdown.
        all_rows: show the figures that do not differ, too.
        aside: stdout is taken by an output file: the table goes to stderr.
    """
    from jacdiag.render.formats import diff as layout

    # 1. All pairs, for machines.
    if output_format == "json":
        emit(layout.as_json(view), "json")
        return

    # 2. Those that differ, for people.
    if output_format == "markdown":
        emit(layout.markdown(view, all_rows=all_rows), "markdown")
        return
    show("\n".join(view.model_lines) + "\n\n", aside=aside)
    shown = view.shown_pairs(all_rows=all_rows)
    if shown:
        width = room(stderr=aside)
        show(grid(_columns(shown, width), width) + "\n", aside=aside)

    # 3. What changed, the verdict, and what limits it.
    lines = [*view.summary.lines, view.verdict]
    lines += [f"note: {note}" for note in view.notes]
    show("\n".join(lines) + "\n", aside=aside)


def _columns(pairs: Sequence[Pair], width: int | None) -> list[TableColumn]:
    """Return the columns of a table of pairs.

    A value is not cut. On a narrow terminal those of weights and shortcuts have no range, and layer
    and part share a column.

    Args:
        pairs: a row each.
        width: of the terminal; None for no limit.
    """
    from jacdiag.render.formats import diff as layout

    # 1. All columns, if those that stay have room.
    columns = _full_columns(layout.rows(pairs))
    shown = columns[: _ALWAYS_SHOWN + 1]
    if width is None or row_width(shown) <= width:
        return columns

    # 2. Less of each.
    depth, part, *others = _full_columns(layout.rows(pairs, with_range=False))
    places = [" ".join(words) for words in zip(depth.cells, part.cells, strict=True)]
    return [TableColumn(f"{depth.title}, {part.title}", places, 100), *others]


def _full_columns(rows: Sequence[tuple[str, ...]]) -> list[TableColumn]:
    """Return the columns of the rows of a table of pairs."""
    from jacdiag.render.formats import diff as layout

    columns = []
    for index, cells in enumerate(zip(*rows, strict=True)):
        # The last column is the first to go on a narrow terminal.
        interest = 100
        if index > _ALWAYS_SHOWN:
            interest = 10 - index
        is_number = index in _NUMBERS
        columns.append(TableColumn(layout.HEAD[index], list(cells), interest, right=is_number))
    return columns
