"""The sentences that every rendering shares: what was audited, and the verdict in words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jacdiag.records import Interval, Report, SublayerRecord
from jacdiag.records.base import Record
from jacdiag.records.number_format import counted, level, share, spoken, three
from jacdiag.records.report import source_name
from jacdiag.render.content.severity import FIELD_OF_RULE
from jacdiag.render.content.sublayer_table import badness

__all__ = [
    "condition",
    "confidence_words",
    "header",
    "headline",
    "left_out",
    "legible",
    "model_words",
    "placement_words",
    "plural",
    "read_words",
    "source_name",
    "state_words",
    "why_state",
    "worst_branch",
]

_OTHERS = 4  # sets of tensors that the header names
_NOT_PRE_NORM = "Not pre-norm, the two conditions do not apply"
_BOTH_CONDITIONS = {
    "not applicable": _NOT_PRE_NORM,
    "met": "Both conditions met",
    "not met": "Neither condition met",
    "partly": "Both conditions partly met",
    "not selected": "The two conditions were not selected",
}


def legible(value: Any) -> Any:
    """Return a report, or a part of one, whose texts hold printable characters only.

    Names come out of files that somebody else made: no escape sequence or line break in one may
    reach a terminal.

    Args:
        value: a report, or any value that stands in one.
    """
    if isinstance(value, str):
        return "".join(_legible_character(character) for character in value)
    if isinstance(value, Record):
        names = [field.name for field in dataclasses.fields(value)]  # type: ignore[arg-type]
        changes = {name: legible(getattr(value, name)) for name in names}
        return dataclasses.replace(value, **changes)  # type: ignore[type-var]
    if isinstance(value, dict):
        return {legible(key): legible(item) for key, item in value.items()}
    if isinstance(value, list):
        return [legible(item) for item in value]
    return value


def _legible_character(character: str) -> str:
    if character.isprintable():
        return character
    if character.isspace():
        return " "
    return "\ufffd"


# -- header ----------------------------------------------------------------------------------------
def header(report: Report) -> list[list[str]]:
    """Return the lines above the table, each as parts that are joined by a dot.

    Args:
        report: of either tier and state.
    """
    version = f"jacdiag {report.jacdiag}".strip()
    lines = [[version, source_name(report), model_words(report), state_words(report)]]
    why = why_state(report)
    if why:
        lines.append([why])
    lines.append(_probe(report))
    read = read_words(report.source)
    if read:
        lines.append(read)
    return lines


def read_words(source: Mapping[str, Any]) -> list[str]:
    """Return what was read of a file and what else it holds, as parts of a line.

    Args:
        source: of a report.

    Returns:
        Two parts; none if the file holds nothing else.

    >>> read_words({"key": "model", "others": ["ema (moving average, 40 tensors)"]})
    ['read: model', 'also in the file: ema (moving average, 40 tensors)']
    """
    others = source.get("others")
    if not others:
        return []
    listed = ", ".join(map(str, others[:_OTHERS]))
    if len(others) > _OTHERS:
        listed += f" and {len(others) - _OTHERS} more"
    key = source.get("key") or "the tensors at the top"
    return [f"read: {key}", f"also in the file: {listed}"]


def model_words(report: Report) -> str:
    """Return the model in words: "GPT, 12 layers, d 768, 124M parameters (99.8% covered)"."""
    model = report.model
    facts = []
    if model.name:
        facts.append(model.name)
    facts.append(plural(model.layers, "layer"))
    if model.width:
        facts.append(f"d {model.width}")
    parameters = f"{counted(model.parameters)} parameters"
    if model.covered_parameters is not None:
        parameters += f" ({share(model.covered_parameters, model.parameters)} covered)"
    facts.append(parameters)
    if model.left_out:
        facts.append(f"{plural(len(model.left_out), 'residual sum')} left out")
    return ", ".join(facts)


def state_words(report: Report) -> str:
    """Return state and placements: "init, pre-norm".

    Several placements are all named, the most frequent first.
    """
    state = report.state or "state unknown"
    placements = [row.placement for row in report.sublayers]
    if report.tier != "measured" or not placements:
        return state
    kinds = sorted(set(placements), key=lambda kind: -placements.count(kind))
    norms = " and ".join(placement_words(str(kind)) for kind in kinds)
    return f"{state}, {norms}"


def placement_words(placement: str) -> str:
    """Return a placement as a noun: "pre-norm", "no norm"."""
    if placement == "none":
        return "no norm"
    return f"{placement}-norm"


def why_state(report: Report) -> str:
    """Return why a model counts as initialized or trained, and the option that overrides it.

    For example "trained (41 of 48 matrices are no draw of an init); --state init overrides". It is
    "" if the user gave the state.
    """
    if not report.state_reason or report.state_basis == "given":
        return ""
    other = "init"
    if report.state == "init":
        other = "trained"
    return f"{report.state} ({report.state_reason}); --state {other} overrides"


def left_out(titles: Sequence[str], other: str = "markdown") -> str:
    """Return the note below a table that lost columns to a narrow terminal.

    Args:
        titles: of the columns.
        other: the format that has them all.

    >>> left_out(["bound", "who"])
    '2 columns left out: bound, who; a wider terminal or --format markdown shows all'
    """
    count = plural(len(titles), "column")
    return f"{count} left out: {', '.join(titles)}; a wider terminal or --format {other} shows all"


def plural(number: int, noun: str) -> str:
    """Return a count with its noun.

    >>> plural(1, "layer"), plural(12, "layer")
    ('1 layer', '12 layers')
    """
    if number == 1:
        return f"{number} {noun}"
    return f"{number} {noun}s"


def _probe(report: Report) -> list[str]:
    """Return probe, device, intervals and training plan, as parts of a line."""
    plan = _plan(report)
    sublayers = plural(len(report.sublayers), "sub-layer")
    if report.probe is None or report.tier == "weights":
        return ["weights only: no model was run", sublayers, plan]

    settings = report.settings
    device = " on ".join(str(settings[key]) for key in ("dtype", "device") if settings.get(key))
    confidence = confidence_words(settings)
    intervals = sublayers
    if confidence:
        intervals = f"{sublayers}, {confidence}"
    facts = [f"probe: {_probe_words(report)}", device, intervals, plan]
    return [fact for fact in facts if fact]


def _probe_words(report: Report) -> str:
    """Return what the model was run on, and what was left out of it."""
    probe, settings = report.probe, report.settings
    assert probe is not None
    text = _probe_source(report)
    if probe.excluded_rows:
        text += f", {plural(probe.excluded_rows, 'dead row')} left out"
    if probe.off_distribution:
        text += ", off-distribution"
    if settings.get("probes"):
        text += f", the first of {settings['probes']['count']} probes"
    return text


def _probe_source(report: Report) -> str:
    """Return the probe's size and where its tokens come from."""
    # 1. Its size.
    probe = report.probe
    assert probe is not None
    size = f"batch {probe.batch}"
    if probe.seq:
        size = f"{probe.batch} x {probe.seq}"

    # 2. Tokens that were drawn or read.
    if probe.tokens == "random":
        return f"{size} random tokens, seed {probe.seed}"
    if probe.tokens == "random pixels":
        return f"{size} of random pixels, seed {probe.seed}"
    if probe.tokens != "inputs":
        return f"{size} tokens of {probe.tokens}"

    # 3. Inputs of a file, or of a recorded step.
    replayed = report.settings.get("replayed")
    if not replayed:
        return f"{size}, from --inputs"
    step = replayed.get("batch_step")
    if step is None:
        return f"{size}, from --replay"
    return f"{size}, from --replay, the batch of step {step:,}"


def confidence_words(settings: Mapping[str, Any]) -> str:
    """Return the confidence of each interval, and of all together if that was requested.

    Args:
        settings: of a report.

    >>> confidence_words({"confidence": 0.999})
    'each interval at 99.9%'
    >>> together = {"level": 0.99, "intervals": 20}
    >>> confidence_words({"confidence": 0.9995, "confidence_all": together})
    'each interval at 99.95%, all 20 together at 99% (Bonferroni)'
    """
    each, together = settings.get("confidence"), settings.get("confidence_all")
    if not each:
        return ""
    words = f"each interval at {level(each)}"
    if not together:
        return words
    also = ""
    if together.get("shared_with_remedies"):
        also = " and those of remedies"
    if together.get("seeds", 1) > 1:
        also += f" and of {together['seeds']} seeds"
    return (
        f"{words}, all {together['intervals']}{also} together at {level(together['level'])} "
        "(Bonferroni)"
    )


def _plan(report: Report) -> str:
    """Return the learning rate and what goes with it, or that none was given."""
    plan = report.plan
    others = []
    for name in ("warmup", "clip", "beta2"):
        value = getattr(plan, name)
        if value is not None:
            others.append(f"{name} {value:g}")
    if plan.lr is not None:
        return ", ".join([f"learning rate {plan.lr:g}", *others])
    if not others:
        return "no learning rate given"
    verb = "say"
    if len(others) == 1:
        verb = "says"
    return f"no learning rate given: {' and '.join(others)} {verb} nothing without --lr"


# -- verdict ---------------------------------------------------------------------------------------
def condition(report: Report, code: str) -> str:
    """Return how the condition that a rule judges came out.

    Args:
        report: of either tier and state.
        code: JD101 (small sub-layers) or JD102 (large shortcut).

    Returns:
        The status in the report; "not selected" if the rule was not run.
    """
    conditions = report.conditions
    status = conditions.large_shortcut
    if code == "JD101":
        status = conditions.small_sublayers
    was_run = not report.rules or any(rule.code == code for rule in report.rules)
    if status == "unknown" and not was_run:
        return "not selected"
    return status


def headline(report: Report) -> str:
    """Return the verdict in one line, for the verdict block, a title or a heading.

    Args:
        report: of either tier and state.
    """
    # 1. Weights alone have bounds, no branch gain.
    if report.tier == "weights":
        return _weights_headline(report)

    # 2. An error of a rule that judges neither condition comes before them.
    for finding in report.findings:
        if finding.level == "error" and finding.code not in FIELD_OF_RULE:
            return f"{finding.code}: {finding.what}"

    # 3. The worst branch gain, after what it was judged by.
    gain = _worst_gain(report)
    if report.state == "trained":
        return f"Trained model: {gain or 'no branch could be measured'}{_comparison(report)}"
    return _conditions_headline(report, gain)


def _conditions_headline(report: Report, gain: str) -> str:
    """Return the verdict on an initialized model, with its worst gain if that was measured."""
    if report.settings.get("products") is False:
        return "The init contract alone: no norm was measured"
    words = _conditions_in_words(report)
    if gain:
        return f"{words}: {gain}"
    if words == _NOT_PRE_NORM:
        return "Nothing could be measured"
    return words


def _conditions_in_words(report: Report) -> str:
    """Return how the two conditions of the paper came out."""
    small, large = condition(report, "JD101"), condition(report, "JD102")
    if small != large:
        return f"Large shortcut {large}, small sub-layers {small}"
    return _BOTH_CONDITIONS.get(small, "Both conditions unknown")


def _worst_gain(report: Report) -> str:
    """Return the worst branch gain in words; "" if no branch was measured."""
    worst = worst_branch(report)
    if worst is None:
        return ""
    record, norm = worst
    return f"worst branch gain {spoken(norm)} at {record.name}"


def _comparison(report: Report) -> str:
    """Return how a trained model compares, as the end of a sentence; "" if it was judged."""
    if report.against is not None:
        return f"; compared with {report.against.source}"
    if report.verdict == "observed":
        return "; nothing to compare it with"
    return ""


def _weights_headline(report: Report) -> str:
    """Return the paper's largest bound, in words."""
    bounds = [row for row in report.sublayers if row.bound is not None and math.isfinite(row.bound)]
    if not bounds:
        return "From the weights alone: no bound can be given"
    worst = max(bounds, key=lambda row: row.bound or 0)
    return f"From the weights alone: the paper's bound is {three(worst.bound)} at {worst.name}"


def worst_branch(report: Report) -> tuple[SublayerRecord, Interval] | None:
    """Return the sub-layer with the largest finite branch norm, and that norm."""
    rows = [
        row
        for row in report.sublayers
        if row.branch_norm and math.isfinite(row.branch_norm.estimate)
    ]
    if not rows:
        return None
    row = max(rows, key=badness)
    assert row.branch_norm is not None
    return row, row.branch_norm
