"""`jacdiag backtest RUN...`: do the figures and the live rules foretell how runs end?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jacdiag.errors import SourceError, UsageError
from jacdiag_cli.config import Configured, current
from jacdiag_cli.output_files import any_on_stdout, plan_outputs, say_written, write_data
from jacdiag_cli.streams import Column, Invocation, emit, grid, room, show

if TYPE_CHECKING:
    from jacdiag.records.backtest import BacktestReport

_OUTPUTS = {
    "--json": "json",
    "--markdown": "markdown",
    "--plot": "plot",
    "--write-risk": "risk",
    "--pack": "pack",
}
_RUN = (
    "RUN is a run.jsonl of jacdiag.watch, a folder of such runs, or a CSV or JSONL with a row "
    "a step"
)


@click.command(
    cls=Configured, short_help="Holds figures and live rules against how recorded runs ended."
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
    "--peers", multiple=True, metavar="FACTOR", help="Factors whose runs share a best loss."
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
    help="Leave out each level of this factor in turn, and foretell it from the others.",
)
@click.option(
    "--rejudge",
    is_flag=True,
    help="Ask the live rules as they are now, in place of the alerts in the logs.",
)
@click.option(
    "--risk", "asked_risk", metavar="FILE", help="With --rejudge: the curves that JD105 goes by."
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
def backtest(invocation: Invocation, runs: tuple[str, ...], **given: Any) -> int:
    """Labels recorded runs by their loss, and ranks every figure of the untrained model by how well
    it foretold them.

    RUN is a run log of jacdiag, a folder of such runs, many of them packed (.runs, .runs.gz), or
    any CSV or JSONL with a row a step. What was varied between runs is read from `factors.json`
    beside each log, and from the columns of a foreign one that never change.

    \b
    Examples:
      jacdiag backtest runs/lab --plot backtest.png
      jacdiag backtest runs/lab --hold-out seed --hold-out width --write-risk risk.toml
      jacdiag backtest runs/new --rejudge --risk risk.toml
      jacdiag backtest a.csv b.csv --column loss=train/loss --figure gain --stratum model
    """
    from jacdiag.backtest import backtest as run
    from jacdiag.backtest import read_runs
    from jacdiag.backtest.archive import ENDINGS, encoded, is_packed
    from jacdiag.records.output_file import is_streamed
    from jacdiag.render import backtest as words
    from jacdiag.render.plots.report_plot import check_suffix
    from jacdiag.rules.thresholds import load_thresholds

    named = {option: given[f"{kind}_file"] for option, kind in _OUTPUTS.items()}
    inputs = [("a run that is read", run) for run in runs] + [
        ("what --risk reads", given["asked_risk"])
    ]
    files = plan_outputs(named, inputs=inputs, output_format=given["output_format"])
    if "--plot" in files:
        check_suffix(files["--plot"])
    if (
        "--pack" in files
        and not is_packed(Path(files["--pack"]))
        and not is_streamed(files["--pack"])
    ):
        raise UsageError(
            "--pack takes another name", got=files["--pack"], hint=" or ".join(ENDINGS)
        )
    rules = None
    if given["rejudge"]:
        rules = load_thresholds(current().thresholds, given["asked_risk"])
    elif given["asked_risk"]:
        raise UsageError(
            "--risk is for --rejudge", hint="add --rejudge; --write-risk writes curves"
        )
    missing = next((path for path in runs if not Path(path).exists()), None)
    if missing is not None:
        raise SourceError(
            f"cannot read the run '{missing}'", got="No such file or directory", hint=_RUN
        )
    found = read_runs(runs, _pairs(given["columns"]), given["figures"], rules=rules)
    stratum = given["stratum"] or [f for f in ("placement",) if all(f in r.factors for r in found)]
    report = run(
        found,
        stratum=stratum,
        peers=given["peers"],
        bad=given["bad"],
        false_alarms=given["false_alarms"],
        lead=given["lead"],
        times=given["resamples"],
        hold_out=given["hold_out"],
        worse=given["worse"],
    )
    invocation.heed()
    risk = _risk(report, files["--write-risk"]) if "--write-risk" in files else ""
    if "--json" in files:
        write_data(files["--json"], (report.to_json() + "\n").encode())
    if "--markdown" in files:
        write_data(files["--markdown"], words.markdown(report).encode())
    if "--plot" in files:
        words.save(report, files["--plot"])
        say_written(files["--plot"])
    if "--write-risk" in files:
        write_data(files["--write-risk"], risk.encode())
    if "--pack" in files:
        write_data(files["--pack"], encoded([r for r in found if r.whole], Path(files["--pack"])))
    aside = any_on_stdout(files)
    if given["output_format"] == "json":
        emit(report.to_json() + "\n", "json")
    elif given["output_format"] == "markdown":
        emit(words.markdown(report), "markdown")
    else:
        cells = zip(*words.rows(report, every=given["all_rows"]), strict=True)
        interest = (100, 100, 90, 60, 50, 50, 40)
        columns = [
            Column(title, column, interest[k], right=k > 3)
            for k, (title, column) in enumerate(zip(words.HEAD, cells, strict=True))
        ]
        text = "\n".join(words.summary(report)) + "\n\n" + grid(columns, room(stderr=aside)) + "\n"
        text += "".join(f"{words.detected(one, given['lead'])}\n" for one in report.detectors)
        text += "".join(
            f"\n{line}" for one in report.held_out for line in (*words.foretold(one), "")
        )
        show(text, aside=aside)
    return 0


def _risk(report: BacktestReport, path: str) -> str:
    """The file of curves. Raises UsageError where there is none to write."""
    from jacdiag.records.risk import RiskTable
    from jacdiag.rules.risk_curves import risk_toml

    if not report.curves:
        raise UsageError(
            f"there is no curve to write to '{path}'",
            got=f"strata: {', '.join(report.strata)}",
            hint="curves are by placement (factors.json needs `placement` and `lr`), of one init "
            "or five "
            "and more, in a figure that an audit has",
        )
    about: dict[str, Any] = {
        "runs": len(report.bad),
        "bad": report.asked["bad"],
        "worse_nats": report.asked["worse"],
    }
    for one in report.held_out:
        scores = {"auroc": one.auroc.value, "brier": one.brier}
        about |= {
            f"held_out_{one.factor}_{name}": round(v, 4)
            for name, v in scores.items()
            if v is not None
        }
    return risk_toml(RiskTable(report.curves, about))


def _pairs(columns: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for text in columns:
        name, equals, column = text.partition("=")
        if not equals or name not in ("step", "loss", "grad_norm", "lr"):
            raise UsageError(
                f"--column takes NAME=COLUMN, got '{text}'",
                hint="NAME is step, loss, grad_norm or lr",
            )
        found[name] = column
    return found
