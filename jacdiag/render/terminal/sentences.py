"""The sentences that every rendering shares: what was audited, and the verdict in words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from jacdiag.records import Interval, Report, SublayerRecord
from jacdiag.records.base import Record
from jacdiag.render.terminal.columns import badness
from jacdiag.render.terminal.number_cells import counted, level, share, spoken, three
from jacdiag.render.terminal.severity import FIELD_OF_RULE

_OTHERS = 4  # sets of tensors that the header names


def legible(value: Any) -> Any:
    """A report, or a part of one, whose texts hold printable characters only.

    Names come out of files that somebody else made: no escape sequence or line break in one may
    reach a terminal.
    """
    if isinstance(value, str):
        return "".join(
            sign if sign.isprintable() else " " if sign.isspace() else "\ufffd" for sign in value
        )
    if isinstance(value, Record):
        fields = dataclasses.fields(value)  # type: ignore[arg-type]
        return dataclasses.replace(
            value, **{f.name: legible(getattr(value, f.name)) for f in fields}
        )  # type: ignore[type-var]
    if isinstance(value, dict):
        return {legible(key): legible(item) for key, item in value.items()}
    return [legible(item) for item in value] if isinstance(value, list) else value


def header(report: Report) -> list[list[str]]:
    """The lines above the table, as lists of parts that are joined by a dot."""
    lines = [
        [
            f"jacdiag {report.jacdiag}".strip(),
            source_name(report),
            model_words(report),
            state_words(report),
        ],
        _probe(report),
    ]
    why = why_state(report)
    if why:
        lines.insert(1, [why])
    read = read_words(report.source)
    return [*lines, read] if read else lines


def read_words(source: Mapping[str, Any]) -> list[str]:
    """Return what was read of a file and what else it holds, as parts of a line; nothing if it
    holds nothing else.

    >>> read_words({"key": "model", "others": ["ema (moving average, 40 tensors)"]})
    ['read: model', 'also in the file: ema (moving average, 40 tensors)']
    """
    others = source.get("others")
    if not others:
        return []
    shown = ", ".join(map(str, others[:_OTHERS]))
    more = f" and {len(others) - _OTHERS} more" if len(others) > _OTHERS else ""
    return [
        f"read: {source.get('key') or 'the tensors at the top'}",
        f"also in the file: {shown}{more}",
    ]


def source_name(report: Report) -> str:
    """A short name of what was audited."""
    source = report.source
    named = report.settings.get("name") or source.get("name") or source.get("factory")
    return str(named or PurePath(str(source.get("path", "model"))).name)


def model_words(report: Report) -> str:
    """ "GPT, 12 layers, d 768, 124M parameters (99.8% covered)"."""
    model = report.model
    parts = (
        [model.name, plural(model.layers, "layer")]
        if model.name
        else [plural(model.layers, "layer")]
    )
    if model.width:
        parts.append(f"d {model.width}")
    covered = (
        f" ({share(model.covered_parameters, model.parameters)} covered)"
        if model.covered_parameters is not None
        else ""
    )
    sums = f", {plural(len(model.left_out), 'residual sum')} left out" if model.left_out else ""
    return f"{', '.join(parts)}, {counted(model.parameters)} parameters{covered}{sums}"


def state_words(report: Report) -> str:
    """ "init, pre-norm"; several placements are all named, the most frequent first."""
    placements = [row.placement for row in report.sublayers]
    kinds = sorted(set(placements), key=lambda kind: -placements.count(kind))
    norms = " and ".join(placement_words(str(kind)) for kind in kinds)
    known = report.tier == "measured" and norms
    return ", ".join(part for part in (report.state or "state unknown", known and norms) if part)


def placement_words(placement: str) -> str:
    """Return a placement as a noun: "pre-norm", "no norm"."""
    return "no norm" if placement == "none" else f"{placement}-norm"


def why_state(report: Report) -> str:
    """Return why a model counts as freshly initialised or trained, and what overrides it; "" if the
    user said it.

    For example "trained (41 of 48 matrices are no draw of an init); --state init overrides".
    """
    if not report.state_reason or report.state_basis == "given":
        return ""
    other = "trained" if report.state == "init" else "init"
    return f"{report.state} ({report.state_reason}); --state {other} overrides"


def left_out(titles: Sequence[str], other: str = "markdown") -> str:
    """What stands below a table that lost columns to a narrow terminal; `other` is the format that
    has them all.

    >>> left_out(["bound", "who"])
    '2 columns left out: bound, who; a wider terminal or --format markdown shows all'
    """
    count = plural(len(titles), "column")
    return f"{count} left out: {', '.join(titles)}; a wider terminal or --format {other} shows all"


def plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _probe(report: Report) -> list[str]:
    plan = _plan(report)
    if report.probe is None or report.tier == "weights":
        return ["weights only: no model was run", plural(len(report.sublayers), "sub-layer"), plan]
    probe, settings = report.probe, report.settings
    size = f"{probe.batch} x {probe.seq}" if probe.seq else f"batch {probe.batch}"
    words = {
        "random": f"{size} random tokens, seed {probe.seed}",
        "random pixels": f"{size} of random pixels, seed {probe.seed}",
        "inputs": f"{size}, from --inputs",
    }
    if replayed := settings.get("replayed"):
        step = replayed.get("batch_step")
        words["inputs"] = f"{size}, from --replay" + (
            f", the batch of step {step:,}" if step is not None else ""
        )
    what = words.get(probe.tokens, f"{size} tokens of {probe.tokens}")
    if probe.excluded_rows:
        what += f", {plural(probe.excluded_rows, 'dead row')} left out"
    if probe.off_distribution:
        what += ", off-distribution"
    where = " on ".join(str(settings[key]) for key in ("dtype", "device") if settings.get(key))
    several = settings.get("probes")
    if several:
        what += f", the first of {several['count']} probes"
    sure = confidence_words(settings)
    count = ", ".join(part for part in (plural(len(report.sublayers), "sub-layer"), sure) if part)
    return [part for part in (f"probe: {what}", where, count, plan) if part]


def confidence_words(settings: Mapping[str, Any]) -> str:
    """Return what the intervals hold with: each for itself, and all together if that was asked for.

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
    also = " and those of remedies" if together.get("shared_with_remedies") else ""
    also += f" and of {together['seeds']} seeds" if together.get("seeds", 1) > 1 else ""
    return (
        f"{words}, all {together['intervals']}{also} together at {level(together['level'])} "
        "(Bonferroni)"
    )


def _plan(report: Report) -> str:
    plan = report.plan
    others = [
        f"{name} {value:g}"
        for name in ("warmup", "clip", "beta2")
        if (value := getattr(plan, name)) is not None
    ]
    if plan.lr is None:
        useless = (
            f": {' and '.join(others)} say{'s' * (len(others) == 1)} nothing without --lr"
            if others
            else ""
        )
        return f"no learning rate given{useless}"
    return ", ".join([f"learning rate {plan.lr:g}", *others])


def condition(report: Report, code: str) -> str:
    """How the condition that a rule judges came out; one that was not selected is not undecided."""
    small = code == "JD101"
    status = report.conditions.small_sublayers if small else report.conditions.large_shortcut
    unasked = report.rules and all(rule.code != code for rule in report.rules)
    return "not selected" if unasked and status == "unknown" else status


def headline(report: Report) -> str:
    """The verdict in words, one line: for the top of the verdict block, the picture's title, a
    Markdown heading.
    """
    worst = worst_branch(report)
    gain = f"worst branch gain {spoken(worst[1])} at {worst[0].name}" if worst else ""
    if report.tier == "weights":
        return _weights_headline(report)
    errors = [f for f in report.findings if f.level == "error" and f.code not in FIELD_OF_RULE]
    if errors:
        return f"{errors[0].code}: {errors[0].what}"
    if report.state == "trained":
        return f"Trained model: {gain or 'no branch could be measured'}{_comparison(report)}"
    small, large = condition(report, "JD101"), condition(report, "JD102")
    if report.settings.get("products") is False:
        return "The init contract alone: no norm was measured"
    if small == large == "not applicable":
        return (
            f"Not pre-norm, the two conditions do not apply: {gain}"
            if gain
            else "Nothing could be measured"
        )
    if small == large:
        both = {
            "met": "Both conditions met",
            "not met": "Neither condition met",
            "partly": "Both conditions partly met",
            "not selected": "The two conditions were not selected",
        }
        words = both.get(small, "Both conditions unknown")
    else:
        words = f"Large shortcut {large}, small sub-layers {small}"
    return f"{words}: {gain}" if gain else words


def _comparison(report: Report) -> str:
    """How a trained model compares, as the end of a sentence; "" where the verdict has another
    reason.
    """
    against = report.against
    if against is not None:
        return f"; compared with {against.source}"
    return "; nothing to compare it with" if report.verdict == "observed" else ""


def _weights_headline(report: Report) -> str:
    bounds = [row for row in report.sublayers if row.bound is not None and math.isfinite(row.bound)]
    if not bounds:
        return "From the weights alone: no bound can be given"
    worst = max(bounds, key=lambda row: row.bound or 0)
    return f"From the weights alone: the paper's bound is {three(worst.bound)} at {worst.name}"


def worst_branch(report: Report) -> tuple[SublayerRecord, Interval] | None:
    """The sub-layer with the largest finite branch norm."""
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
