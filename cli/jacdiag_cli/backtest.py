"""`jacdiag backtest RUN...`: do the figures and the live rules predict how runs end?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jacdiag.errors import SourceError, UsageError
from jacdiag_cli.config import Configured, current
from jacdiag_cli.output_files import any_on_stdout, encoded, plan_outputs, say_written, write_data
from jacdiag_cli.report_files import check_html
from jacdiag_cli.streams import CommandInvocation, TableColumn, emit, grid, room, show

if TYPE_CHECKING:
    from jacdiag.backtest.recorded_run import Run
    from jacdiag.records.backtest import BacktestReport
    from jacdiag.rules.thresholds import Thresholds

_OUTPUTS = {
    "--json": "json",
    "--markdown": "markdown",
    "--html": "html",
    "--plot": "plot",
    "--write-risk": "risk",
    "--pack": "pack",
}
# What makes a model of another size, or another schedule.
_PEERS = ("placement", "layers", "width", "warmup")
_INTEREST = (100, 100, 90, 60, 50, 50, 40)  # of each column: the least one goes first
_RUN = (
    "RUN is a run.jsonl of jacdiag.watch, a trainer_state.json, a TensorBoard event file, a folder "
    "of such runs, or a CSV or JSONL with a row a step"
)


@click.command(
    cls=Configured, short_help="Checks figures and live rules against how recorded runs ended."
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="NAME=COLUMN",
    help="What a foreign log calls step, loss, grad_norm or lr.",
)
@click.option(
    "--figure",
    "figures",
    multiple=True,
    metavar="COLUMN",
    help="A column of a foreign log: a figure of the untrained model.",
)
@click.option(
    "--stratum",
    multiple=True,
    metavar="FACTOR",
    help="Factors that make an architecture: placement.",
)
@click.option(
    "--peers",
    multiple=True,
    metavar="FACTOR",
    help="Factors whose runs share a best loss; none for all runs. Without the option: placement, "
    "layers, width and warmup, as far as all runs have them.",
)
@click.option(
    "--bad",
    type=click.Choice(["any", "diverged", "spiked", "worse"]),
    default="any",
    show_default=True,
    help="What counts as a run that went wrong.",
)
@click.option(
    "--worse",
    type=click.FloatRange(0, min_open=True),
    default=0.4,
    show_default=True,
    metavar="NATS",
    help="How far over its peers' best at no higher rate a loss ends that went wrong.",
)
@click.option(
    "--false-alarms",
    type=click.FloatRange(0, 1),
    default=0.05,
    show_default=True,
    help="Rate at which precision is given, and that a held-out threshold may have.",
)
@click.option(
    "--lead",
    type=click.IntRange(0),
    default=20,
    show_default=True,
    help="Steps that count as early.",
)
@click.option(
    "--hold-out",
    multiple=True,
    metavar="FACTOR",
    help="Leave out each level of this factor in turn, and predict it from the others.",
)
@click.option(
    "--rejudge",
    is_flag=True,
    help="Ask the live rules as they are now, in place of the alerts in the logs.",
)
@click.option(
    "--risk", "rejudge_risk", metavar="FILE", help="With --rejudge: the curves that JD105 goes by."
)
@click.option(
    "--resamples", type=click.IntRange(1), default=1000, show_default=True, help="Of the bootstrap."
)
@click.option(
    "--format",
    "output_format",
    type=click.Choice(["pretty", "json", "markdown"]),
    default="pretty",
    show_default=True,
    help="Of what is printed.",
)
@click.option("--all", "all_rows", is_flag=True, help="Show every figure.")
@click.option(
    "--json", "json_file", metavar="FILE", help="Write the result as JSON too; - is stdout."
)
@click.option(
    "--markdown",
    "markdown_file",
    metavar="FILE",
    help="Write the report as Markdown too; - is stdout.",
)
@click.option(
    "--html",
    "html_file",
    metavar="FILE",
    help="Write the report as one page for a browser too: .html; - is stdout.",
)
@click.option(
    "--write-risk",
    "risk_file",
    metavar="FILE",
    help="Write the curves of the chance at a learning rate, for `audit --lr LR --risk FILE`; "
    "- is stdout.",
)
@click.option(
    "--pack",
    "pack_file",
    metavar="FILE",
    help="Write all runs into one file: .runs or .runs.gz; - is stdout.",
)
@click.option(
    "--plot",
    "plot_file",
    metavar="FILE",
    help="Write the picture too: .png, .svg or .pdf; - is stdout, as PNG.",
)
@click.pass_obj
def backtest(invocation: CommandInvocation, runs: tuple[str, ...], **given: Any) -> int:
    """Labels recorded runs by their loss, and ranks the figures by how well they predicted it.

    The figures are those of the untrained model.

    RUN is a run log of jacdiag, the trainer_state.json of a Hugging Face Trainer, TensorBoard event
    files, any CSV or JSONL with a row a step, a folder of such runs, or many of them packed (.runs,
    .runs.gz). What was varied between runs is read from `factors.json` next to each log, and from
    the columns of a foreign one that never change.

    \b
    Examples:
      jacdiag backtest runs/lab --plot backtest.png
      jacdiag backtest runs/lab --hold-out seed --hold-out width --write-risk risk.toml
      jacdiag backtest runs/new --rejudge --risk risk.toml
      jacdiag backtest a.csv b.csv --column loss=train/loss --figure gain --stratum model
    """
    from jacdiag.backtest import read_runs

    # 1. Check the options before any work.
    files = _plan_files(runs, given)
    rules = _rules_to_judge_by(given)
    _check_runs(runs)

    # 2. Read the runs, and analyse them.
    recorded = read_runs(runs, _pairs(given["columns"]), given["figures"], rules=rules)
    report = _analyse(recorded, given)
    invocation.heed()

    # 3. Write the files, and print the result.
    _write_files(report, recorded, files, given["lead"])
    _show(report, given, aside=any_on_stdout(files))
    return 0


def _plan_files(runs: Sequence[str], given: Mapping[str, Any]) -> dict[str, str]:
    """Return the output files by option.

    Raises:
        UsageError: one of them cannot be written, or has a suffix that says something else.
    """
    from jacdiag.render.plots.picture_file import check_suffix

    # 1. None of them may be a file that is read.
    named = {option: given[f"{kind}_file"] for option, kind in _OUTPUTS.items()}
    inputs: list[tuple[str, str | None]] = [("a run that is read", run) for run in runs]
    inputs.append(("what --risk reads", given["rejudge_risk"]))
    files = plan_outputs(named, inputs=inputs, output_format=given["output_format"])

    # 2. The suffix chooses the format of a picture and of packed runs.
    if "--plot" in files:
        check_suffix(files["--plot"])
    if "--html" in files:
        check_html(files["--html"])
    if "--pack" in files:
        _check_packed(files["--pack"])
    return files


def _check_packed(path: str) -> None:
    """Raise unless the file of --pack has a suffix of packed runs, or is a stream."""
    from jacdiag.backtest.archive import ENDINGS, is_packed
    from jacdiag.records.output_file import is_streamed

    if not is_packed(Path(path)) and not is_streamed(path):
        raise UsageError("--pack takes another name", got=path, hint=" or ".join(ENDINGS))


def _rules_to_judge_by(given: Mapping[str, Any]) -> Thresholds | None:
    """Return the thresholds of --rejudge; None to take the alerts in the logs."""
    from jacdiag.rules.thresholds import load_thresholds

    if given["rejudge"]:
        return load_thresholds(current().thresholds, given["rejudge_risk"])
    if given["rejudge_risk"]:
        raise UsageError(
            "--risk is for --rejudge", hint="add --rejudge; --write-risk writes curves"
        )
    return None


def _check_runs(runs: Sequence[str]) -> None:
    """Raise SourceError if a run does not exist."""
    for run in runs:
        if Path(run).exists():
            continue
        raise SourceError(
            f"cannot read the run '{run}'", got="No such file or directory", hint=_RUN
        )


def _analyse(recorded: Sequence[Run], given: Mapping[str, Any]) -> BacktestReport:
    """Return how well figures and live rules predicted the outcome of the runs."""
    from jacdiag.backtest import backtest as analyse

    # Without an option, an architecture is a placement, and peers are of one size.
    stratum = given["stratum"] or _shared_factors(recorded, ["placement"])
    peers = given["peers"] or _shared_factors(recorded, _PEERS)
    if peers == ("none",):
        peers = []
    return analyse(
        recorded,
        stratum=stratum,
        peers=peers,
        bad=given["bad"],
        false_alarms=given["false_alarms"],
        lead=given["lead"],
        times=given["resamples"],
        hold_out=given["hold_out"],
        worse=given["worse"],
    )


def _shared_factors(recorded: Sequence[Run], names: Sequence[str]) -> list[str]:
    """Return those of some factors that every run has."""
    return [name for name in names if all(name in run.factors for run in recorded)]


def _write_files(
    report: BacktestReport, recorded: Sequence[Run], files: Mapping[str, str], lead: int
) -> None:
    """Write every output file, and say so for each.

    Args:
        report: what to write.
        recorded: the runs.
        files: the path of each output, by option.
        lead: steps before an event from which an alert counts.
    """
    from jacdiag.render import backtest as layout

    # 1. What each holds. Without a curve, --write-risk is refused before any file is written.
    data: dict[str, bytes] = {}
    if "--write-risk" in files:
        data["--write-risk"] = encoded(_risk(report, files["--write-risk"]))
    if "--json" in files:
        data["--json"] = encoded(report.to_json() + "\n")
    if "--markdown" in files:
        data["--markdown"] = encoded(layout.markdown(report))
    if "--html" in files:
        from jacdiag.render.html.pages import backtest_page

        data["--html"] = encoded(backtest_page(report, lead))

    # 2. Write them in the order of the options; the picture and the runs write themselves.
    for option, path in files.items():
        if option == "--plot":
            layout.save(report, path)
            say_written(path)
        elif option == "--pack":
            write_data(path, _packed(recorded, path))
        else:
            write_data(path, data[option])


def _packed(recorded: Sequence[Run], path: str) -> bytes:
    """Return all runs that came to their end as one file; its suffix says how it is compressed."""
    from jacdiag.backtest.archive import encoded

    complete = [run for run in recorded if run.whole]
    return encoded(complete, Path(path))


def _show(report: BacktestReport, given: Mapping[str, Any], *, aside: bool) -> None:
    """Print the result to stdout.

    Args:
        report: what to show.
        given: the options of the command.
        aside: stdout is taken by an output file: the table goes to stderr.
    """
    from jacdiag.render import backtest as layout

    # 1. Formats for machines and pages.
    if given["output_format"] == "json":
        emit(report.to_json() + "\n", "json")
        return
    if given["output_format"] == "markdown":
        emit(layout.markdown(report), "markdown")
        return

    # 2. The table, with a sentence for each live rule and each factor below it.
    columns = _columns(layout.rows(report, every=given["all_rows"]))
    lines = [*layout.summary(report), "", grid(columns, room(stderr=aside))]
    lines += [layout.detected(detector, given["lead"]) for detector in report.detectors]
    for held_out in report.held_out:
        lines += ["", *layout.held_out_lines(held_out)]
    show("\n".join(lines) + "\n", aside=aside)


def _columns(rows: Sequence[tuple[str, ...]]) -> list[TableColumn]:
    """Return the table of figures by its columns; from the fifth on they hold numbers."""
    from jacdiag.render.backtest import HEAD

    columns = []
    for index, cells in enumerate(zip(*rows, strict=True)):
        columns.append(TableColumn(HEAD[index], cells, _INTEREST[index], right=index > 3))
    return columns


def _risk(report: BacktestReport, path: str) -> str:
    """Return the file of curves.

    Raises:
        UsageError: there is no curve to write.
    """
    from jacdiag.records.risk import RiskTable
    from jacdiag.rules.risk_curves import risk_toml

    if not report.curves:
        raise UsageError(
            f"there is no curve to write to '{path}'",
            got=f"strata: {', '.join(report.strata)}",
            hint="curves are by placement (factors.json needs `placement` and `lr`), of one init "
            "or five and more, in a figure that an audit has",
        )

    # What the curves were fitted to, and how they did on what they had not seen.
    about: dict[str, Any] = {
        "runs": len(report.bad),
        "bad": report.asked["bad"],
        "worse_nats": report.asked["worse"],
    }
    for held_out in report.held_out:
        scores = {"auroc": held_out.auroc.value, "brier": held_out.brier}
        for name, value in scores.items():
            if value is not None:
                about[f"held_out_{held_out.factor}_{name}"] = round(value, 4)
    return risk_toml(RiskTable(report.curves, about))


def _pairs(columns: Sequence[str]) -> dict[str, str]:
    """Return --column as a table: the name of a series -> its column in a foreign log."""
    pairs = {}
    for text in columns:
        name, equals, column = text.partition("=")
        is_series = name in ("step", "loss", "grad_norm", "lr")
        if not equals or not is_series:
            raise UsageError(
                f"--column takes NAME=COLUMN, got '{text}'",
                hint="NAME is step, loss, grad_norm or lr",
            )
        pairs[name] = column
    return pairs
