"""`jacdiag gate SOURCE`: no pull request breaks the initialisation unseen."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jacdiag.errors import JacdiagError, UsageError, printable
from jacdiag_cli.audit import warn_of_trust
from jacdiag_cli.audit_options import audit_options, read_profile, rule_options
from jacdiag_cli.config import Configured, current
from jacdiag_cli.options import (
    DECIDING,
    GATE,
    JUDGEMENT,
    OUTPUT,
    PROBE,
    SOLVER,
    SOURCE,
    TOGETHER,
    add,
    confidences,
    remedies,
)
from jacdiag_cli.output_files import any_on_stdout, say_written
from jacdiag_cli.progress import bar
from jacdiag_cli.report_files import form_of, machine_text, plan_report_files, write_report_files
from jacdiag_cli.streams import CommandInvocation, emit, model_output, say, show

if TYPE_CHECKING:
    from jacdiag.records import FiguresRecord, Report


@click.command(
    cls=Configured, short_help="Decides whether a fresh model may pass: exit 0, 1, 2 or 3."
)
@add(
    SOURCE,
    PROBE,
    [*SOLVER[:2], DECIDING, *SOLVER[3:]],
    TOGETHER,
    JUDGEMENT,
    GATE,
    remedies("none"),
    OUTPUT,
)
@click.pass_obj
def gate(invocation: CommandInvocation, source: str, **given: Any) -> int:
    """Audits a freshly initialised model over several seeds, and decides whether it may pass.

    SOURCE is as for `jacdiag audit`; a factory or hf:CONFIG is built again for each seed. The exit
    code is 0 (passed), 1 (findings at or above --fail-on), 2 (cannot run) or 3 (nothing fired, but
    a rule stayed undecided, no rule applied, or the budget ran out). A trained model without
    --baseline is observed, and exits with 0.

    An init contract is pinned in pyproject.toml or jacdiag.toml, by role or by name pattern;
    formulas may use N, d, V, fan_in, fan_out and l:

    \b
      [tool.jacdiag.contract]
      matrix = "0.02"
      W_O = "0.02/sqrt(2*N)"

    \b
    Examples:
      jacdiag gate build.py:model
      jacdiag gate build.py:model --baseline init.json --write-baseline
      jacdiag gate hf:config.json --baseline init.json --format github
    """
    # 1. Check the options before any work.
    _check(given)
    confidence = confidences(click.get_current_context())
    new_baseline = given["baseline"] if given["write_baseline"] else None
    outputs = {} if new_baseline is None else {"baseline": new_baseline}
    files = plan_report_files(source, given, **outputs)
    profile = read_profile(given)
    warn_of_trust(given["trust_pickle"])

    # 2. Run the gate.
    with model_output(), bar("reading the model", invocation.heed) as progress:
        from jacdiag.gate import run_gate, write_baseline

        invocation.heed()
        options = audit_options(
            given,
            **confidence,
            **rule_options(profile, given["contract"]),
            decide=given["decide"] and new_baseline is None,
            products=not given["contract_only"],
            progress=progress,
        )
        outcome = run_gate(
            source,
            options,
            seeds=given["seeds"],
            budget=given["budget"],
            baseline=None if given["write_baseline"] else given["baseline"],
            fail_on=profile.fail_on,
            command=shlex.join(["jacdiag", *invocation.args]),
        )
    invocation.heed()

    # 3. Write and print the result.
    if new_baseline is not None:
        losses = _losses(new_baseline, outcome.figures)
        write_baseline(new_baseline, outcome.figures)
        say_written(new_baseline)
        for loss in losses:
            say(f"  {printable(loss)}")
    write_report_files(outcome.report, files)
    _show(outcome.report, given["output_format"], aside=any_on_stdout(files))
    return outcome.exit_code


def _losses(path: str, figures: FiguresRecord) -> list[str]:
    """Return what a baseline that is written again holds no more, a sentence each.

    Args:
        path: of the file, not yet written.
        figures: that are written.
    """
    from jacdiag.comparison.baseline_coverage import describe_losses
    from jacdiag.gate import read_baseline

    if not Path(path).is_file():
        return []
    try:
        earlier = read_baseline(path)
    except JacdiagError:
        return []  # nothing to compare with stood there
    return describe_losses(figures, earlier)


def _check(given: Mapping[str, Any]) -> None:
    """Raise if the options contradict each other, or need more rights than a run in CI has."""
    # 1. Options that need or exclude others.
    if given["write_baseline"] and given["baseline"] is None:
        raise UsageError("--write-baseline needs a file", hint="--baseline FILE --write-baseline")
    if given["sort"] != "depth" or given["all_rows"]:
        raise UsageError("--all and --sort belong to `jacdiag audit`", got="with `jacdiag gate`")

    # 2. In CI the code of a pull request would run with the rights of the repository.
    is_allowed = current().allow_trust_pickle
    if given["trust_pickle"] and _in_ci() and not is_allowed:
        raise UsageError(
            "--trust-pickle is refused in CI",
            got=f"CI={os.environ['CI']}",
            hint="allow-trust-pickle = true in [tool.jacdiag], reviewed like code",
        )


def _in_ci() -> bool:
    """Return whether this process says that it runs in CI."""
    return os.environ.get("CI", "").lower() in ("true", "1", "yes")


def _show(report: Report, output_format: str, *, aside: bool) -> None:
    """Print the result to stdout; with a machine's format, the gate's own screen to stderr."""
    from jacdiag.render.terminal.gate import render

    # 1. The gate's own screen.
    if output_format == "pretty":
        show(render(report), aside=aside)
        return

    # 2. Another format, and the screen where it does not disturb.
    if output_format == "markdown":
        from jacdiag.render.formats.pr_comment import render as render_comment

        emit(render_comment(report), "markdown")
    else:
        emit(machine_text(report, output_format), form_of(output_format))
    say(render(report).rstrip("\n"))
