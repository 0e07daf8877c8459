"""`jacdiag audit SOURCE`: from a checkpoint or a model factory to a verdict."""

from __future__ import annotations

import dataclasses
import shlex
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jacdiag.errors import UsageError
from jacdiag_cli.config import Configured, Profile, current, resolve_profile, toml_text
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
from jacdiag_cli.output_files import any_on_stdout, plan_outputs, say_written, write_data
from jacdiag_cli.progress import bar
from jacdiag_cli.streams import Invocation, console, emit, guest_talk, say, show

if TYPE_CHECKING:
    from jacdiag.records import Report
    from jacdiag.render.ascii_symbols import Form

_ASKED = (
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
    "probes",
    "state",
    "lr",
    "warmup",
    "clip",
    "beta2",
    "risk",
)


@click.command(cls=Configured)
@add(SOURCE, PROBE, PROBES, REPLAY, SOLVER, TOGETHER, JUDGEMENT, AGAINST, remedies("first"), OUTPUT)
@click.pass_obj
def audit(invocation: Invocation, source: str, **given: Any) -> int:
    """Measures every sub-layer of a model and says what stands out.

    SOURCE is a checkpoint (.pt .pth .bin .ckpt .safetensors), a Hugging Face folder, a factory
    (package.module:callable or file.py:callable), or hf:CONFIG for a fresh model of that config.

    The exit code is 0, 1 (findings at or above --fail-on) or 2 (cannot run). The verdict "unknown"
    exits 0; at init it comes with a warning, which --fail-on warning makes 1. A trained model
    without --against is at best "observed", and exits 0: its norms alone do not tell a good run
    from a wrecked one.

    Of the output files, - is stdout: the table then goes to stderr, and a second output for stdout
    is refused. A file is replaced whole or not at all; links are followed; devices and pipes are
    written through.

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
    files = output_files(source, given) if invocation.heard else {}
    _check_probe(given)
    confidence = confidences(click.get_current_context())
    profile = resolve_profile(click.get_current_context(), current())
    check_rules(profile, given["risk"])
    warn_of_trust(given["trust_pickle"])
    with guest_talk(), bar("reading the model", invocation.heed) as progress:
        from jacdiag.pipeline.audit import audit as run

        invocation.heed()
        report = run(
            source,
            **{name: given[name] for name in _ASKED},
            **confidence,
            inputs=_kept_batch(given["replay"]),
            input_factory=given["inputs"],
            profile=profile.levels,  # type: ignore[arg-type]
            select=flat(profile.select),
            ignore=flat(profile.ignore),
            thresholds=profile.thresholds or None,
            declared=current().sites or (),
            contract=contract_given(given["contract"]),
            remedies=given["remedies"],
            progress=progress,
            ranks=invocation.team or False,
            against=given["against"],
            replay=given["replay"],
        )
    invocation.heed()
    command = shlex.join(["jacdiag", *invocation.args])
    told: Report = dataclasses.replace(report, settings={**report.settings, "command": command})
    if given["replay"] is not None:
        told = _replayed(told, given["replay"])
    if invocation.heard:
        write_files(told, files)
        _show(
            told,
            given["output_format"],
            given["all_rows"],
            given["sort"],
            aside=any_on_stdout(files),
        )
    return _exit_code(told, profile.fail_on)


def _check_probe(given: dict[str, Any]) -> None:
    """Raises UsageError if --replay and another option both give the probe."""
    others = [f"--{name} {given[name]}" for name in ("tokens", "inputs") if given[name] is not None]
    if given["replay"] is not None and others:
        got = f"--replay {given['replay']} and {others[0]}"
        raise UsageError("the probe is given twice", got=got, hint="give one of them")


def _kept_batch(folder: str | None) -> Any:
    """The batch of a flight recorder; as many of its sequences as --batch says, all of them if it
    says nothing.
    """
    if folder is None:
        return None
    from jacdiag.monitor.log.flight_recorder import read_batch

    context = click.get_current_context()
    given = context.get_parameter_source("batch") is click.core.ParameterSource.COMMANDLINE
    return read_batch(folder, context.params["batch"] if given else None)


def _replayed(report: Report, folder: str) -> Report:
    """The report with where its batch is from: the step, and whether that is the one the folder is
    about.
    """
    from jacdiag.monitor.log.flight_recorder import told_of

    about = told_of(folder)
    settings = {**report.settings, "replayed": {"folder": folder, **about}}
    at, of = about.get("step"), about.get("batch_step")
    notes = list(report.notes)
    if None not in (at, of) and at != of != about.get("running_step"):
        notes.append(
            f"the batch is of step {of}, not of step {at} that {Path(folder).name} is about: "
            "keep_batches of "
            "jacdiag.watch did not reach back (log_every of it do, 10 by default, times the "
            "micro-batches of a step)"
        )
    return dataclasses.replace(report, settings=settings, notes=notes)


def flat(groups: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    return tuple(code for group in groups for code in group)


def check_rules(profile: Profile, risk: str | None) -> None:
    """Refuses levels, thresholds and curves without meaning here, rather than when everything has
    been measured.
    """
    from jacdiag.rules import RULES
    from jacdiag.rules.profile import profile_of
    from jacdiag.rules.thresholds import load_thresholds

    profile_of(profile.levels, tuple(rule.code for rule in RULES))
    load_thresholds(profile.thresholds, risk)


def output_files(source: str, given: dict[str, Any], **others: str | None) -> dict[str, str]:
    """Return the output files by option, refused here rather than after minutes of work.

    Args:
        source: what is audited.
        given: the options of the command.
        others: further outputs, such as `baseline="init.json"`.

    Raises:
        UsageError: one of them cannot be written, or would write over what is read.
    """
    named = {f"--{kind}": given[f"{kind}_file"] for kind in ("json", "plot", "patch")}
    named |= {f"--{option}": path for option, path in others.items()}
    inputs: list[tuple[str, str | None]] = [
        ("what is audited", source),
        ("what is audited", source.removeprefix("hf:")),
        ("what is audited", source.rpartition(":")[0]),
        ("the factory of --model", (given["model"] or "").rpartition(":")[0]),
        ("the factory of --inputs", (given["inputs"] or "").rpartition(":")[0]),
        *((f"what --{option} reads", given[option]) for option in ("tokens", "contract", "risk")),
        ("what --against reads", given.get("against")),
    ]
    if "baseline" in given and "baseline" not in others:
        inputs.append(("what --baseline reads", given["baseline"]))
    files = plan_outputs(named, inputs=inputs, output_format=given["output_format"])
    if "--plot" in files:
        from jacdiag.render.plots.report_plot import check_suffix

        check_suffix(files["--plot"])
    if "--patch" in files:
        _check_markdown(files["--patch"])
    return files


def _check_markdown(path: str) -> None:
    from jacdiag.records.output_file import is_streamed

    suffix = Path(path).suffix
    if suffix.lower() != ".md" and not is_streamed(path):
        raise UsageError(
            f"cannot write remedies to '{path}'",
            got=f"suffix '{suffix}'",
            hint="they are Markdown: end it in .md",
        )


def write_files(report: Report, files: dict[str, str]) -> None:
    """Write the report, the picture and the remedies, and say so for each."""
    if "--json" in files:
        write_data(files["--json"], (report.to_json() + "\n").encode())
    if "--plot" in files:
        from jacdiag.render.plots import report_plot as plot

        plot.save(report, files["--plot"])
        say_written(files["--plot"])
    if "--patch" in files:
        from jacdiag.render.terminal.remedies import document

        write_data(files["--patch"], document(report).encode())


def _show(report: Report, output_format: str, all_rows: bool, sort: str, *, aside: bool) -> None:
    """The report to stdout; beside a machine's format, the verdict in words to stderr.

    Args:
        report: what to show.
        output_format: of what is printed.
        all_rows, sort: of the table.
        aside: stdout is taken by an output file: the table goes to stderr.
    """
    if output_format == "pretty":
        from jacdiag.render.terminal.table import print_report

        terminal = console(stderr=aside)
        with terminal.capture() as held:
            print_report(report, terminal, all_rows=all_rows, sort=sort)
        show(held.get(), aside=aside)
        return
    if output_format == "markdown":
        from jacdiag.render.formats.markdown import render

        emit(render(report, all_rows=all_rows, sort=sort), "markdown")
    else:
        emit(machine_text(report, output_format), form_of(output_format))
    from jacdiag.render.terminal.sentences import headline

    say(f"{report.verdict}: {headline(report)}")


def machine_text(report: Report, output_format: str) -> str:
    """A report in one of the formats that machines read."""
    from jacdiag.render.formats import format_report

    if output_format == "json":
        return report.to_json() + "\n"
    return format_report(report, output_format)


def form_of(output_format: str) -> Form:
    """Return the syntax of a format that machines read."""
    forms: dict[str, Form] = {"json": "json", "sarif": "json", "junit": "xml"}
    return forms.get(output_format, "text")


def warn_of_trust(trusted: bool) -> None:
    """Says aloud that the file's own code may run."""
    if trusted:
        say("warning: --trust-pickle: code in the file may run, with all your rights")


def contract_given(path: str | None) -> dict[str, Any] | None:
    """The pinned contract: that of --contract, else the one in the configuration.

    Raises:
        UsageError: the file cannot be read, is no TOML, or holds no contract.
    """
    from jacdiag.rules import checked_contract

    if path is None:
        return checked_contract(current().contract) or None
    try:
        data = tomllib.loads(toml_text(Path(path)))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"cannot read the contract '{path}'", got=str(error)) from error
    table = data.get("contract", data)
    if not isinstance(table, dict) or not table:
        raise UsageError(f"'{path}' holds no contract", hint='for example: W_O = "0.02/sqrt(2*N)"')
    return checked_contract(table)


def _exit_code(report: Report, fail_on: str) -> int:
    from jacdiag.render.terminal.severity import at_least

    return int(
        fail_on != "never" and any(at_least(finding.level, fail_on) for finding in report.findings)
    )
