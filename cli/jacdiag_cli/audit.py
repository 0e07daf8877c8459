"""`jacdiag audit SOURCE`: from a checkpoint or a model factory to a verdict."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from jacdiag.errors import UsageError
from jacdiag_cli.audit_options import audit_options, read_profile, rule_options
from jacdiag_cli.config import Configured
from jacdiag_cli.options import (
    AGAINST,
    JUDGEMENT,
    OUTPUT,
    PROBE,
    PROBES,
    REPLAY,
    SOLVER,
    SOURCE,
    TOGETHER,
    add,
    confidences,
    remedies,
)
from jacdiag_cli.output_files import any_on_stdout
from jacdiag_cli.progress import bar
from jacdiag_cli.report_files import form_of, machine_text, plan_report_files, write_report_files
from jacdiag_cli.streams import CommandInvocation, console, emit, model_output, say, show

if TYPE_CHECKING:
    from jacdiag.records import Report


@click.command(cls=Configured)
@add(SOURCE, PROBE, PROBES, REPLAY, SOLVER, TOGETHER, JUDGEMENT, AGAINST, remedies("first"), OUTPUT)
@click.pass_obj
def audit(invocation: CommandInvocation, source: str, **given: Any) -> int:
    """Measures every sub-layer of a model and says what stands out.

    SOURCE is a checkpoint (.pt .pth .bin .ckpt .safetensors), a Hugging Face folder, a factory
    (package.module:callable or file.py:callable), or hf:CONFIG for a fresh model of a config: a
    folder, a JSON file, or a kind of model such as hf:gpt2.

    The exit code is 0, 1 (findings at or above --fail-on) or 2 (cannot run). The verdict "unknown"
    exits 0; at init it comes with a warning, which --fail-on warning makes 1. A trained model
    without --against is at best "observed", and exits 0: its norms alone do not distinguish a good
    run from a wrecked one.

    Of the output files, - is stdout: the table then goes to stderr, and a second output for stdout
    is refused. A file is replaced in full or not at all; links are followed; devices and pipes
    are written through.

    \b
    Examples:
      jacdiag audit checkpoint.pt
      jacdiag audit build.py:model --plot gain.png --json report.json
      jacdiag audit weights.safetensors --model build.py:model --tokens text.txt
      jacdiag audit step-20000.pt --against step-10000.pt --tokens text.txt
      jacdiag audit step-4200.pt --replay runs/a/flight-4210              (was it the batch?)
      torchrun --nproc-per-node 2 -m jacdiag_cli audit checkpoint.pt      (shared out over
      processes)
    """
    # 1. Check the options before any work. Of several ranks one writes.
    files = {}
    if invocation.heard:
        files = plan_report_files(source, given)
    _check_replay(given)
    confidence = confidences(click.get_current_context())
    profile = read_profile(given)
    warn_of_trust(given["trust_pickle"])

    # 2. Audit.
    with model_output(), bar("reading the model", invocation.heed) as progress:
        from jacdiag.pipeline.audit import run_audit

        invocation.heed()
        options = audit_options(
            given,
            **confidence,
            **rule_options(profile, given["contract"]),
            inputs=_recorded_batch(given["replay"]),
            progress=progress,
            ranks=invocation.team or False,
        )
        report: Report = run_audit(source, options)
    invocation.heed()

    # 3. Write and print the report.
    report = _with_command(report, invocation)
    if given["replay"] is not None:
        report = _with_replayed_step(report, given["replay"])
    if invocation.heard:
        write_report_files(report, files)
        _show(report, given, aside=any_on_stdout(files))
    return _exit_code(report, profile.fail_on)


def _check_replay(given: Mapping[str, Any]) -> None:
    """Raise UsageError if --replay and another option both give the probe."""
    if given["replay"] is None:
        return
    for name in ("tokens", "inputs"):
        if given[name] is not None:
            got = f"--replay {given['replay']} and --{name} {given[name]}"
            raise UsageError("the probe is given twice", got=got, hint="give one of them")


def _recorded_batch(folder: str | None) -> Any:
    """Return the batch of a flight recorder; None without --replay.

    It has as many sequences as --batch on the command line says, and all of them without it.
    """
    if folder is None:
        return None
    from jacdiag.monitor.log.flight_recorder import read_batch

    context = click.get_current_context()
    if context.get_parameter_source("batch") is not ParameterSource.COMMANDLINE:
        return read_batch(folder, None)
    return read_batch(folder, context.params["batch"])


def _with_command(report: Report, invocation: CommandInvocation) -> Report:
    """Return the report with the command that gives it again."""
    command = shlex.join(["jacdiag", *invocation.args])
    return dataclasses.replace(report, settings={**report.settings, "command": command})


def _with_replayed_step(report: Report, folder: str) -> Report:
    """Return the report with the step of its batch, and whether that is the step of the folder."""
    from jacdiag.monitor.log.flight_recorder import read_about

    # 1. A batch of another step. That of a step that had begun is what the folder is about.
    about = read_about(folder)
    step, batch_step = about.get("step"), about.get("batch_step")
    is_known = step is not None and batch_step is not None
    is_running = batch_step == about.get("running_step")
    notes = list(report.notes)
    if is_known and step != batch_step and not is_running:
        notes.append(
            f"the batch is of step {batch_step}, not of step {step} that {Path(folder).name} is "
            "about: keep_batches of jacdiag.watch did not reach back (log_every of it do, 10 by "
            "default, times the micro-batches of a step)"
        )

    # 2. The step itself, for the header.
    settings = {**report.settings, "replayed": {"folder": folder, **about}}
    return dataclasses.replace(report, settings=settings, notes=notes)


def warn_of_trust(trusted: bool) -> None:
    """Say that the file's own code may run, if it may."""
    if trusted:
        say("warning: --trust-pickle: code in the file may run, with all your rights")


def _show(report: Report, given: Mapping[str, Any], *, aside: bool) -> None:
    """Print the report to stdout; with a machine's format, the verdict in words to stderr.

    Args:
        report: what to show.
        given: the options of the command.
        aside: stdout is taken by an output file: the table goes to stderr.
    """
    output_format = given["output_format"]
    layout = {"all_rows": given["all_rows"], "sort": given["sort"]}

    # 1. The table, for people.
    if output_format == "pretty":
        from jacdiag.render.terminal.report import print_report

        terminal = console(stderr=aside)
        with terminal.capture() as captured:
            print_report(report, terminal, **layout)
        show(captured.get(), aside=aside)
        return

    # 2. A format for pages or machines.
    if output_format == "markdown":
        from jacdiag.render.formats.markdown import render

        emit(render(report, **layout), "markdown")
    else:
        emit(machine_text(report, output_format), form_of(output_format))

    # 3. The verdict, which such a format may hide from the person who ran the command.
    from jacdiag.render.content.sentences import headline

    say(f"{report.verdict}: {headline(report)}")


def _exit_code(report: Report, fail_on: str) -> int:
    """Return 1 if there is a finding at this level or above, else 0."""
    from jacdiag.render.content.severity import at_least

    if fail_on == "never":
        return 0
    for finding in report.findings:
        if at_least(finding.level, fail_on):
            return 1
    return 0
