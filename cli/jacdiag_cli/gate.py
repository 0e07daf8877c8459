"""`jacdiag gate SOURCE`: no pull request breaks the initialisation unseen."""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING, Any

import click

from jacdiag.errors import UsageError
from jacdiag_cli.audit import (
    check_rules,
    contract_given,
    flat,
    form_of,
    machine_text,
    output_files,
    warn_of_trust,
    write_files,
)
from jacdiag_cli.config import Configured, current, resolve_profile
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
from jacdiag_cli.streams import Invocation, emit, guest_talk, say, show

if TYPE_CHECKING:
    from jacdiag.records import Report

_PASSED_ON = (
    "model",
    "model_args",
    "key",
    "trust_pickle",
    "tokens",
    "batch",
    "seq",
    "seed",
    "device",
    "dtype",
    "tol",
    "decide",
    "max_products",
    "state",
    "lr",
    "warmup",
    "clip",
    "beta2",
    "risk",
    "seeds",
    "budget",
    "remedies",
)


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
def gate(invocation: Invocation, source: str, **given: Any) -> int:
    """Audits a freshly initialised model over several seeds, and decides whether it may pass.

    SOURCE is as for `jacdiag audit`; a factory or hf:CONFIG is built anew for each seed. The exit
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
    _check(given)
    confidence = confidences(click.get_current_context())
    config = current()
    if given["trust_pickle"] and _in_ci() and not config.allow_trust_pickle:
        raise UsageError(
            "--trust-pickle is refused in CI",
            got=f"CI={os.environ['CI']}",
            hint="allow-trust-pickle = true in [tool.jacdiag], reviewed like code",
        )
    write = given["baseline"] if given["write_baseline"] else None
    files = output_files(source, given, **({"baseline": write} if write is not None else {}))
    profile = resolve_profile(click.get_current_context(), config)
    check_rules(profile, given["risk"])
    warn_of_trust(given["trust_pickle"])
    with guest_talk(), bar("reading the model", invocation.heed) as progress:
        from jacdiag.gate import gate as run
        from jacdiag.gate import write_baseline

        invocation.heed()
        options = {name: given[name] for name in _PASSED_ON} | confidence
        options["decide"] = given["decide"] and write is None
        outcome = run(
            source,
            **options,
            input_factory=given["inputs"],
            profile=profile.levels,
            select=flat(profile.select),
            ignore=flat(profile.ignore),
            thresholds=profile.thresholds or None,
            declared=config.sites or (),
            contract=contract_given(given["contract"]),
            products=not given["contract_only"],
            baseline=None if write is not None else given["baseline"],
            fail_on=profile.fail_on,
            command=shlex.join(["jacdiag", *invocation.args]),
            progress=progress,
        )
    invocation.heed()
    if write is not None:
        write_baseline(write, outcome.figures)
        say_written(write)
    write_files(outcome.report, files)
    _show(outcome.report, given["output_format"], aside=any_on_stdout(files))
    return outcome.exit_code


def _check(given: dict[str, Any]) -> None:
    if given["write_baseline"] and given["baseline"] is None:
        raise UsageError("--write-baseline needs a file", hint="--baseline FILE --write-baseline")
    if given["sort"] != "depth" or given["all_rows"]:
        raise UsageError("--all and --sort belong to `jacdiag audit`", got="beside `jacdiag gate`")


def _in_ci() -> bool:
    return os.environ.get("CI", "").lower() in ("true", "1", "yes")


def _show(report: Report, output_format: str, *, aside: bool) -> None:
    """The result to stdout; beside a machine's format, the gate's own screen to stderr."""
    from jacdiag.render.terminal.gate import render

    if output_format == "pretty":
        show(render(report), aside=aside)
        return
    if output_format == "markdown":
        from jacdiag.render.formats.pr_comment import render as comment

        emit(comment(report), "markdown")
    else:
        emit(machine_text(report, output_format), form_of(output_format))
    say(render(report).rstrip("\n"))
