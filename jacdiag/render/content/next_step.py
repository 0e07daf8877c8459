"""The next command after a verdict: one line, true for the report that it stands below."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from jacdiag.records import LEVELS, Finding, Report
from jacdiag.render.content.command_line import (
    has_option,
    without_options,
    words_of,
)
from jacdiag.render.content.replay_verdict import replay_advice
from jacdiag.render.content.severity import at_least, has_interval_across_threshold
from jacdiag.rules.remedy_targets import aims

_ONLY_AUDIT = ("--replay", "--against", "--probes")  # options with a value that a gate lacks
_NARROWER = 5  # how many times narrower the intervals of the next command are
_MORE_PRODUCTS = 1000  # five times the default
_TOLERANCE = 0.05  # of a report that does not say


@dataclass(frozen=True)
class NextStep:
    """A command, and what it does.

    Attributes:
        command: to type; words in capitals stand for the user's own.
        purpose: what it does.
    """

    command: str
    purpose: str

    @property
    def text(self) -> str:
        """The step as one line."""
        return f"{self.command}   {self.purpose}"


def next_step(report: Report) -> NextStep:
    """Return the command that helps next, after an audit or a gate.

    Args:
        report: of either tier and state.
    """
    # 1. A change that was tried and is enough.
    if _has_recommended_remedy(report) and not has_option(report, "--patch"):
        return _with_options(report, "--patch fix.md", "writes the change as code")

    # 2. Whether a batch or the weights made an alert.
    if report.replay is not None:
        advice = replay_advice(report.replay, words_of(report))
        if advice.command:
            return NextStep(advice.command, advice.purpose)
    return _after_verdict(report)


def _after_verdict(report: Report) -> NextStep:
    """Return what helps next after the verdict on a model."""
    # 1. What nothing decided.
    if report.verdict == "unknown" or _gate_setting(report, "exit_code") == 3:
        return _after_unknown(report)

    # 2. What fired.
    finding = _loudest(report)
    if finding is not None:
        return _after_finding(report, finding)
    if report.verdict == "observed":
        return _after_observed(report)

    # 3. Nothing to change.
    if "gate" in report.settings:
        return _after_passed_gate(report)
    return _after_passed_audit(report)


# -- one verdict each ------------------------------------------------------------------------------
def _after_finding(report: Report, finding: Finding) -> NextStep:
    """Return what helps against the loudest warning or error."""
    is_random_probe = finding.code == "JD903" and report.probe is not None
    if is_random_probe and report.probe is not None:
        if report.probe.tokens == "random pixels":
            return _with_options(report, "--inputs FACTORY", "probes the model with real images")
        return _with_options(report, "--tokens FILE", "probes the model with real text")
    if _is_folder_without_remedies(report):
        source = shlex.quote(f"hf:{report.source['path']}")
        command = f"jacdiag audit {source} --patch fix.md"
        return NextStep(command, "tries remedies on a fresh model of this config")
    return _explain(finding.code)


def _explain(code: str) -> NextStep:
    """Return the step that shows the page of a rule."""
    return NextStep(f"jacdiag explain {code}", "says what the rule checks and what helps")


def _is_folder_without_remedies(report: Report) -> bool:
    """Return whether an init in a Hugging Face folder asks for a remedy and none was tried.

    Its weights stay in their files, and a remedy is tried on a copy in memory.
    """
    if report.source.get("format") != "huggingface" or report.state != "init":
        return False
    return bool(aims(report)) and not report.remedies


def _after_unknown(report: Report) -> NextStep:
    """Return what lets rules decide."""
    # 1. Weights without a model.
    if report.tier == "weights" and not has_option(report, "--model"):
        return _with_options(report, "--model FACTORY", "measures the model that FACTORY builds")

    # 2. A gate without time.
    if _gate_setting(report, "budget_ran_out"):
        words = without_options(words_of(report), valued=["--budget"])
        return NextStep(f"{shlex.join(words)} --budget SECONDS", "gives the gate more time")

    # 3. Intervals that lie across a threshold.
    if has_interval_across_threshold(report):
        tolerance = float(report.settings.get("tol") or _TOLERANCE) / _NARROWER
        options = f"--tol {tolerance:g}"
        if not has_option(report, "--max-products"):
            options += f" --max-products {_MORE_PRODUCTS}"
        return _with_options(report, options, "asks for narrower intervals")

    # 4. No rule that judges the model applied, or nothing could be measured.
    for code in ("JD904", "JD901"):
        if any(finding.code == code for finding in report.findings):
            return _explain(code)
    return NextStep("jacdiag rules", "lists which rules apply to which models")


def _after_observed(report: Report) -> NextStep:
    """Return how a trained model can be judged: by comparison."""
    if "gate" in report.settings:
        return _with_options(report, "--baseline FILE", "compares it with recorded figures")
    return _with_options(
        report, "--against EARLIER", "compares it with an earlier checkpoint or report"
    )


def _after_passed_gate(report: Report) -> NextStep:
    """Return how a gate that passed is used from now on."""
    # 1. A baseline was written: the same command without that option reads it.
    words = words_of(report)
    if "--write-baseline" in words:
        words.remove("--write-baseline")
        return NextStep(shlex.join(words), "compares a later version with this baseline")

    # 2. There is none yet. One without norms would leave most of the model out.
    if not has_option(report, "--baseline"):
        options = "--baseline init.json --write-baseline"
        if "--contract-only" not in words:
            return _with_options(report, options, "records this init for later gates")
        measured = shlex.join(without_options(words, flags=["--contract-only"]))
        purpose = "measures the norms too, and records this init for later gates"
        return NextStep(f"{measured} {options}", purpose)

    # 3. It runs where changes are reviewed.
    if not has_option(report, "--format"):
        return _with_options(report, "--format github", "marks findings in a pull request")
    return NextStep("jacdiag rules", "lists what the gate checks")


def _after_passed_audit(report: Report) -> NextStep:
    """Return how to keep a clean init, or to look closer at a trained model."""
    # 1. A trained model.
    if report.state == "trained":
        if has_option(report, "--html"):
            return NextStep("jacdiag explain columns", "says what each figure means")
        return _with_options(report, "--html report.html", "writes the report for a browser")

    # 2. An init, gated with the options of the audit that a gate takes.
    words = without_options(words_of(report), valued=_ONLY_AUDIT)
    gate = "jacdiag gate SOURCE"
    if words[:2] == ["jacdiag", "audit"]:
        gate = shlex.join(["jacdiag", "gate", *words[2:]])
    command = f"{gate} --baseline init.json --write-baseline"
    return NextStep(command, "records this init, so that later changes are compared with it")


# -- the command that gave the report -------------------------------------------------------------
def _with_options(report: Report, options: str, purpose: str) -> NextStep:
    """Return the command that gave the report, with further options."""
    command = shlex.join(words_of(report))
    if not command:
        command = "jacdiag audit SOURCE"
    return NextStep(f"{command} {options}", purpose)


# -- what the report says --------------------------------------------------------------------------
def _has_recommended_remedy(report: Report) -> bool:
    return any(remedy.recommended for remedy in report.remedies)


def _gate_setting(report: Report, key: str) -> Any:
    """Return what a gate recorded under a key; None for an audit."""
    return report.settings.get("gate", {}).get(key)


def _loudest(report: Report) -> Finding | None:
    """Return the first of the loudest findings that are a warning or an error."""
    loud = [finding for finding in report.findings if at_least(finding.level, "warning")]
    return max(loud, key=lambda finding: LEVELS.index(finding.level), default=None)
