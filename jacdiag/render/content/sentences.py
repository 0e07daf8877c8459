"""The sentences that every rendering shares: what was audited, and the verdict in words."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jacdiag.records import Interval, JudgedSublayers, Report, SublayerRecord
from jacdiag.records.base import Record
from jacdiag.records.number_format import counted, level, share, spoken, three
from jacdiag.records.placement_words import placements_in_words
from jacdiag.records.report import source_name
from jacdiag.render.content.replay_verdict import replay_advice
from jacdiag.render.content.severity import FIELD_OF_RULE

__all__ = [
    "condition",
    "confidence_words",
    "counted_once",
    "header",
    "headline",
    "judged_rows",
    "judged_sublayers",
    "judged_words",
    "known_share",
    "left_out",
    "legible",
    "model_words",
    "plural",
    "probe_words",
    "read_words",
    "source_name",
    "state_words",
    "status_words",
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
    # 1. A text.
    if isinstance(value, str):
        return "".join(map(_legible_character, value))

    # 2. What holds others.
    if isinstance(value, Record):
        return _legible_record(value)
    if isinstance(value, dict):
        return {legible(key): legible(item) for key, item in value.items()}
    if isinstance(value, list):
        return [legible(item) for item in value]

    # 3. Numbers and None.
    return value


def _legible_record(record: Record) -> Record:
    """Return a record whose fields are legible."""
    changes = {}
    for field in dataclasses.fields(record):  # type: ignore[arg-type]
        changes[field.name] = legible(getattr(record, field.name))
    legible_record: Record = dataclasses.replace(record, **changes)  # type: ignore[type-var]
    return legible_record


def _legible_character(character: str) -> str:
    """Return a printable character in place of one: a space, or the sign of a lost one."""
    if character.isprintable():
        return character
    if character.isspace():
        return " "  # a line break or a tab
    return "\ufffd"


# -- header ----------------------------------------------------------------------------------------
def header(report: Report) -> list[list[str]]:
    """Return the lines above the table, each as pieces that are joined by a dot.

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
    """Return what was read of a file and what else it holds, as pieces of a line.

    Args:
        source: of a report.

    Returns:
        Two pieces; none if the file holds nothing else.

    >>> read_words({"key": "model", "others": ["ema (moving average, 40 tensors)"]})
    ['read: model', 'also in the file: ema (moving average, 40 tensors)']
    """
    others = source.get("others")
    if not others:
        return []

    # A file may hold hundreds of sets: the first few are named.
    listed = ", ".join(map(str, others[:_OTHERS]))
    beyond = len(others) - _OTHERS
    if beyond > 0:
        listed += f" and {beyond} more"
    key = source.get("key") or "the tensors at the top"
    return [f"read: {key}", f"also in the file: {listed}"]


def model_words(report: Report) -> str:
    """Return the model in words: "GPT, 12 layers, width 768, 124M parameters (99.8% covered)"."""
    # 1. Its name and size.
    model = report.model
    facts = []
    if model.name:
        facts.append(model.name)
    facts.append(plural(model.layers, "layer"))
    if model.width:
        facts.append(f"width {model.width}")

    # 2. Its parameters, and what the audit covers.
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
    if report.tier != "measured" or not report.sublayers:
        return state

    # Of two that are equally frequent, the first in the alphabet stands first.
    counts = Counter(str(row.placement) for row in report.sublayers)
    rows = sorted(
        report.sublayers, key=lambda row: (-counts[str(row.placement)], str(row.placement))
    )
    return f"{state}, {' and '.join(placements_in_words(rows))}"


def why_state(report: Report) -> str:
    """Return why a model counts as initialized or trained, and the option that overrides it.

    For example "trained (41 of 48 matrices are no draw of an init); --state init overrides". It is
    "" if the user gave the state.
    """
    was_detected = report.state_basis != "given"
    if not report.state_reason or not was_detected:
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
    is_single = number == 1
    if is_single:
        return f"{number} {noun}"
    return f"{number} {noun}s"


def counted_once(texts: Iterable[str]) -> list[str]:
    """Return each text once, with how many times it was there if that is more than once.

    >>> counted_once(["a", "b", "a"])
    ['a (2 times)', 'b']
    """
    counts = Counter(texts)
    counted = []
    for text, times in counts.items():
        if times > 1:
            text += f" ({times} times)"
        counted.append(text)
    return counted


def _probe(report: Report) -> list[str]:
    """Return probe, device, intervals and training plan, as pieces of a line."""
    # 1. Weights alone were not run.
    plan = _plan(report)
    sublayers = plural(len(report.sublayers), "sub-layer")
    if report.probe is None or report.tier == "weights":
        return ["weights only: no model was run", sublayers, plan]

    # 2. What it was run on, where, and how sure the figures are.
    intervals = sublayers
    confidence = confidence_words(report.settings)
    if confidence:
        intervals = f"{sublayers}, {confidence}"
    device = _device(report.settings)
    facts = [f"probe: {probe_words(report)}", device, intervals, plan]
    return list(filter(None, facts))


def _device(settings: Mapping[str, Any]) -> str:
    """Return precision and device, as far as they are known: "float32 on cpu"."""
    known = []
    for key in ("dtype", "device"):
        if settings.get(key):
            known.append(str(settings[key]))
    return " on ".join(known)


def probe_words(report: Report) -> str:
    """Return what a model was run on, and what was left out of it.

    Args:
        report: with a probe.
    """
    probe = report.probe
    assert probe is not None
    text = _probe_source(report)

    # What limits it.
    if probe.excluded_rows:
        text += f", {plural(probe.excluded_rows, 'special or unused id')} not drawn"
    if probe.off_distribution:
        text += ", off-distribution"
    probes = report.settings.get("probes")
    if probes:
        text += f", the first of {probes['count']} probes"
    return text


def _probe_source(report: Report) -> str:
    """Return the probe's size and where its tokens come from."""
    # 1. Its size.
    probe = report.probe
    assert probe is not None
    size = f"batch {probe.batch}"
    if probe.seq:
        size = f"{probe.batch} x {probe.seq}"

    # 2. Numbers that were drawn.
    if probe.tokens == "random":
        return f"{size} random tokens, seed {probe.seed}"
    if probe.tokens == "random pixels":
        return f"{size} of random pixels, seed {probe.seed}"

    # 3. Tokens of a file.
    if probe.tokens != "inputs":
        return f"{size} tokens of {probe.tokens}"

    # 4. Inputs of a file, or of a recorded step.
    replayed = report.settings.get("replayed")
    if replayed:
        return f"{size}, {_recorded_batch(replayed)}"
    return f"{size}, from --inputs"


def _recorded_batch(replayed: Mapping[str, Any]) -> str:
    """Return the step of a recorded batch, if its flight says so."""
    step = replayed.get("batch_step")
    if step is None:
        return "from --replay"
    return f"from --replay, the batch of step {step:,}"


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
    # 1. Each by itself.
    each, together = settings.get("confidence"), settings.get("confidence_all")
    if not each:
        return ""
    words = f"each interval at {level(each)}"
    if not together:
        return words

    # 2. All of them, and what else the chance of a miss is shared with.
    also = ""
    if together.get("shared_with_remedies"):
        also = " and those of remedies"
    seeds = together.get("seeds", 1)
    if seeds > 1:
        also += f" and of {seeds} seeds"
    return (
        f"{words}, all {together['intervals']}{also} together at {level(together['level'])} "
        "(Bonferroni)"
    )


def _plan(report: Report) -> str:
    """Return the learning rate and what goes with it, or that none was given."""
    # 1. The learning rate and what goes with it.
    plan = report.plan
    others = _settings_besides_rate(report)
    if plan.lr is not None:
        return ", ".join([f"learning rate {plan.lr:g}", *others])

    # 2. Without the learning rate the others are of no use.
    if not others:
        return "no learning rate given"
    verb = "say"
    if len(others) == 1:
        verb = "says"
    return f"no learning rate given: {' and '.join(others)} {verb} nothing without --lr"


def _settings_besides_rate(report: Report) -> list[str]:
    """Return the settings of the plan other than the learning rate, in words."""
    words = []
    for name in ("warmup", "clip", "beta2"):
        value = getattr(report.plan, name)
        if value is not None:
            words.append(f"{name} {value:g}")
    return words


# -- verdict ---------------------------------------------------------------------------------------
def condition(report: Report, code: str) -> str:
    """Return how the condition that a rule judges came out.

    Args:
        report: of either tier and state.
        code: JD101 (small sub-layers) or JD102 (large shortcut).

    Returns:
        The status in the report; "not selected" if the rule was not run.
    """
    # 1. The status.
    conditions = report.conditions
    status = conditions.large_shortcut
    if code == "JD101":
        status = conditions.small_sublayers

    # 2. "unknown" is also the status of a condition that nobody judged.
    if status == "unknown" and not _was_run(report, code):
        return "not selected"
    return status


def status_words(status: str) -> str:
    """Return how a condition came out, as a sentence says it: "partly met" for "partly".

    Args:
        status: of a condition in a report.
    """
    if status == "partly":
        return "partly met"
    return status


def judged_sublayers(report: Report, code: str) -> JudgedSublayers | None:
    """Return which sub-layers a condition was judged at; None if that is not known.

    Args:
        report: of either tier and state.
        code: JD101 (small sub-layers) or JD102 (large shortcut).
    """
    if code == "JD101":
        return report.conditions.small_sublayers_judged
    return report.conditions.large_shortcut_judged


def judged_rows(report: Report, code: str) -> list[SublayerRecord]:
    """Return the sub-layers that the rule of a condition judged.

    A report of an older version does not say which. Those are the pre-norm ones.

    Args:
        report: of either tier and state.
        code: JD101 or JD102.
    """
    # 1. Those that were left out.
    judged = judged_sublayers(report, code)
    left_out: set[str] = set()
    if judged is not None:
        left_out.update(*judged.not_judged.values())

    # 2. The others.
    rows = []
    for row in report.sublayers:
        is_judged = row.placement == "pre" and not row.nested
        if is_judged and row.name not in left_out:
            rows.append(row)
    return rows


def judged_words(judged: JudgedSublayers | None) -> str:
    """Return at how many sub-layers a condition was judged; "" if at all of them.

    It follows how the condition came out: "met (judged at 4 of 8 sub-layers)".

    >>> judged_words(JudgedSublayers(4, 8)), judged_words(JudgedSublayers(8, 8))
    (' (judged at 4 of 8 sub-layers)', '')
    """
    # 1. Not known.
    if judged is None:
        return ""

    # 2. At some sub-layers alone.
    if judged.share:
        return f" (judged at {judged.share})"
    return ""


def _was_run(report: Report, code: str) -> bool:
    """Return whether a rule was run; a report without a list of rules ran them all."""
    if not report.rules:
        return True
    return any(rule.code == code for rule in report.rules)


def headline(report: Report) -> str:
    """Return the verdict in one line, for the verdict block, a title or a heading.

    Args:
        report: of either tier and state.
    """
    text = _headline_of_model(report)
    if report.replay is None:
        return text

    # What a replay was run for stands first.
    return f"{replay_advice(report.replay, []).banner}. {text}"


def _headline_of_model(report: Report) -> str:
    """Return the verdict on the model in one line."""
    # 1. Weights alone have bounds, no branch norm.
    if report.tier == "weights":
        return _weights_headline(report)

    # 2. An error of a rule that judges neither condition comes before them.
    for finding in report.findings:
        is_other_error = finding.level == "error" and finding.code not in FIELD_OF_RULE
        if is_other_error:
            return f"{finding.code}: {finding.what}"

    # 3. The worst branch norm, after what it was judged by.
    gain = _worst_gain(report)
    if report.state != "trained":
        return _conditions_headline(report, gain)
    if not gain:
        gain = "no branch could be measured"
    return f"Trained model: {gain}{_comparison(report)}"


def _conditions_headline(report: Report, gain: str) -> str:
    """Return the verdict on an initialized model, with its worst gain if that was measured."""
    if report.settings.get("products") is False:
        return "The init contract alone: no norm was measured"

    # With a gain, the conditions stand before it.
    words = _conditions_in_words(report)
    if gain:
        return f"{words}: {gain}"
    if words == _NOT_PRE_NORM:
        return "Nothing could be measured"  # neither conditions nor a gain
    return words


def _conditions_in_words(report: Report) -> str:
    """Return how the two conditions of the paper came out, and at how many sub-layers."""
    # 1. Each by itself.
    small, large = condition(report, "JD101"), condition(report, "JD102")
    small_at = judged_words(judged_sublayers(report, "JD101"))
    large_at = judged_words(judged_sublayers(report, "JD102"))
    if small != large or small_at != large_at:
        return (
            f"Large shortcut {status_words(large)}{large_at}, "
            f"small sub-layers {status_words(small)}{small_at}"
        )

    # 2. Both alike.
    both = _BOTH_CONDITIONS.get(small, "Both conditions unknown")
    return f"{both}{small_at}"


def _worst_gain(report: Report) -> str:
    """Return the worst branch norm in words; "" if no branch was measured."""
    worst = worst_branch(report)
    if worst is None:
        return ""
    record, norm = worst
    share = known_share(report)
    if share:
        share = f" ({share})"
    return f"worst branch norm {spoken(norm)} at {record.name}{share}"


def _comparison(report: Report) -> str:
    """Return how a trained model compares, as the end of a sentence; "" if it was judged."""
    against = report.against
    if against is not None:
        return f"; compared with {against.source}"
    if report.verdict == "observed" and report.replay is None:
        return "; nothing to compare it with"
    return ""  # a rule fired, or a profile lets rules decide on a trained model


def _weights_headline(report: Report) -> str:
    """Return the paper's largest bound, in words."""
    bounds = []
    for row in report.sublayers:
        if row.bound is not None and math.isfinite(row.bound):
            bounds.append((row.bound, row.name))
    if not bounds:
        return "From the weights alone: no bound can be given"
    largest, name = max(bounds, key=lambda pair: pair[0])
    return f"From the weights alone: the paper's bound is {three(largest)} at {name}"


def worst_branch(report: Report) -> tuple[SublayerRecord, Interval] | None:
    """Return the sub-layer with the largest finite branch norm, and that norm.

    A norm that is not trusted does not count.
    """
    measured = []
    for row in report.sublayers:
        norm = row.branch_norm
        is_trusted = row.name not in report.distrusted
        if norm and is_trusted and math.isfinite(norm.estimate):
            measured.append((row, norm))

    # None of them may have one.
    if not measured:
        return None

    return max(measured, key=lambda pair: pair[1].estimate)


def known_share(report: Report) -> str:
    """Return at how many sub-layers the branch norm is known; "" if at all.

    It stands next to the worst norm: a branch whose norm is not known may have a larger one.
    """
    # 1. A norm that is not trusted is not known.
    known = 0
    for row in report.sublayers:
        is_trusted = row.name not in report.distrusted
        if row.branch_norm is not None and is_trusted:
            known += 1

    # 2. Some of them.
    if known == len(report.sublayers):
        return ""
    return f"known at {known} of {plural(len(report.sublayers), 'sub-layer')}"
