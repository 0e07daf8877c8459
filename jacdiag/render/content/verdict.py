"""What stands below the table: the verdict by condition, other rules, what to do, the cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from jacdiag.errors import clipped
from jacdiag.records import (
    LEVELS,
    Finding,
    Interval,
    JudgedSublayers,
    Report,
    RuleResult,
    SublayerRecord,
)
from jacdiag.records.number_format import (
    ABSENT,
    between,
    memory,
    seconds,
    share,
    spoken,
    three,
    two,
)
from jacdiag.records.placement_words import placements_in_words
from jacdiag.records.report import PRODUCT_ALONE, UNCOVERED_CALLS, Cost, NetworkRecord, ProbeSpread
from jacdiag.render.content.remedies import remedied
from jacdiag.render.content.replay_verdict import replay_advice
from jacdiag.render.content.sentences import (
    condition,
    counted_once,
    judged_rows,
    judged_sublayers,
    known_share,
    plural,
    status_words,
    worst_branch,
)
from jacdiag.render.content.severity import has_interval_across_threshold
from jacdiag.rules.thresholds import load_healthy

CONDITIONS = {"JD101": "small sub-layers", "JD102": "large shortcut"}
OWN_LINES = {*CONDITIONS, "JD104", "JD105", "JD902"}  # rules whose findings stand in other lines
TIED = "\u00a0"  # a space at which no line is broken
_NAMED = 3  # how many names a sentence lists before it counts the rest
_RUNGS_NEAR = 3  # rungs of the ladder that are shown on either side of this model
_YOURS = "▸yours"
_TITLES = {
    "branch_norm": "branch norm",
    "core_norm": "core norm",
    "norm_gain": "norm gain",
    "bound": "paper's bound",
}
_MEASURE_MORE = {
    "weights": "give --model FACTORY, which builds the model: one that runs can be measured",
    "measured": "ask for narrower intervals with --tol, at the price of more products",
}


@dataclass(frozen=True)
class Line:
    """One labelled line below the table: "large shortcut   not met ▲   sentence   JD102".

    Attributes:
        label: what the line is about.
        text: a sentence; `TIED` spaces in it are not broken.
        status: outcome of a condition, else "".
        level: "error", "warning", "undecided", "info" or "".
        code: of the rule, else "".
    """

    label: str
    text: str
    status: str = ""
    level: str = ""
    code: str = ""


def verdict_lines(report: Report) -> list[Line]:
    """Return the lines of the verdict, from the conditions of the paper to the notes.

    Args:
        report: of either tier and state.
    """
    lines = []
    for code in CONDITIONS:
        lines += _condition(report, code)
    lines += _present(_instead(report), _against(report))
    lines += _fired_rules(report)
    lines += _present(_risk(report))
    lines += _depth(report)
    lines += _present(
        _gradients(report),
        _attention(report),
        _over_probes(report),
        _others(report),
    )
    lines += _present(_open(report), _uncovered(report))
    lines += [Line("note", note) for note in counted_once(report.notes)]
    return lines


def _present(*lines: Line | None) -> list[Line]:
    """Return the lines that there are."""
    return [line for line in lines if line is not None]


# -- findings --------------------------------------------------------------------------------------
def _fired_rules(report: Report) -> list[Line]:
    """Return the lines of each rule that fired and has no line of its own."""
    rule_names = {rule.code: rule.name for rule in report.rules}
    lines = []
    for code, findings in _by_code(report.findings).items():
        if code in OWN_LINES:
            continue
        label = rule_names.get(code, "") or code
        lines += _lines_of_rule(label, findings, map(_with_where, findings))
    return lines


def _lines_of_rule(label: str, findings: list[Finding], sentences: Iterable[str]) -> list[Line]:
    """Return a line for each finding of a rule; the first one alone has the label.

    Args:
        label: what the lines are about.
        findings: the loudest first.
        sentences: one for each finding.
    """
    lines = []
    for finding, sentence in zip(findings, sentences, strict=True):
        lines.append(Line(label, sentence, level=finding.level, code=finding.code))
        label = ""
    return lines


def _by_level(findings: list[Finding]) -> list[Finding]:
    """Return findings from the most severe to the least; those of one level stay in order."""
    return sorted(findings, key=lambda finding: -LEVELS.index(finding.level))


def _by_code(findings: list[Finding]) -> dict[str, list[Finding]]:
    """Return findings by rule, the loudest rule and the loudest finding of each first."""
    groups: dict[str, list[Finding]] = {}
    for finding in _by_level(findings):
        groups.setdefault(finding.code, []).append(finding)
    return groups


def _first_of(report: Report, code: str) -> Finding | None:
    """Return the first finding of a rule."""
    return next((finding for finding in report.findings if finding.code == code), None)


def _with_where(finding: Finding) -> str:
    """Return the sentence of a finding, with the names of its places if it has none of them."""
    if not finding.where:
        return finding.what
    for name in finding.where:
        if name in finding.what:
            return finding.what
    return f"{finding.what}: {some(finding.where)}"


def some(names: list[str]) -> str:
    """Return the first few names, and how many there are beyond."""
    shown = [clipped(name, 160) for name in names[:_NAMED]]
    text = ", ".join(shown)
    beyond = len(names) - _NAMED
    if beyond <= 0:
        return text
    return f"{text} and {beyond} more"


# -- the conditions of the paper -------------------------------------------------------------------
def _condition(report: Report, code: str) -> list[Line]:
    """Return the lines of one condition: what its rule found, else the figure that it judged."""
    label = CONDITIONS[code]
    status = status_words(condition(report, code))

    # 1. What the rule found.
    findings = _by_code(report.findings).get(code)
    if findings:
        sentences = [finding.what for finding in findings]
        # The outcome stands next to the first sentence and is not said twice.
        sentences[0] = sentences[0].removeprefix(f"{status} ")
        sentences[0] += _judged_where(report, code)
        first, *others = _lines_of_rule(label, findings, sentences)
        return [replace(first, status=status), *others]

    # 2. Else why it found nothing, or what it looked at.
    level = ""
    if status == "unknown":
        level = "undecided"
    figure = _judged_figure(report, code)
    if figure:
        text = figure + _judged_where(report, code)
    else:
        text = _note_of_rule(report, code) or _judged_nowhere(report, code)
    return [Line(label, text, status, level)]


def _judged_where(report: Report, code: str) -> str:
    """Return at how many sub-layers a condition was judged, and why not at the others.

    It is the end of a sentence, and "" if the condition was judged at all of them.
    """
    # 1. At all of them, or not known.
    judged = judged_sublayers(report, code)
    share = ""
    if judged is not None:
        share = judged.share
    if judged is None or not share:
        return ""

    # 2. The others, by reason.
    return f"; judged at {share}, not at {_left_out(judged)}"


def _judged_nowhere(report: Report, code: str) -> str:
    """Return why a condition was judged at no sub-layer; "" if it was, or if that is not known."""
    judged = judged_sublayers(report, code)
    if judged is None or judged.judged or not judged.not_judged:
        return ""
    return f"not judged at {_left_out(judged)}"


def _left_out(judged: JudgedSublayers) -> str:
    """Return the sub-layers that were not judged, by reason: "h.0.attn (not measured)"."""
    left_out = []
    for reason, names in judged.not_judged.items():
        left_out.append(f"{some(names)} ({reason})")
    return " and ".join(left_out)


def _note_of_rule(report: Report, code: str) -> str:
    """Return what a rule noted in place of a finding; "" if it noted nothing."""
    for rule in report.rules:
        if rule.code == code and rule.note:
            return rule.note
    return ""


def _judged_figure(report: Report, code: str) -> str:
    """Return the figure that a condition is about, at the sub-layer where it is worst."""
    if code == "JD101":
        return _largest_core(report)
    return _smallest_shortcut(report)


def _largest_core(report: Report) -> str:
    """Return the largest core norm times √(2N) that was judged, and how many are missing."""
    # 1. The cores that the condition was judged by.
    measured = []
    for row in judged_rows(report, "JD101"):
        if row.core_norm:
            measured.append((row.core_norm, row))
    if not measured or not report.model.layers:
        return ""

    # 2. The largest, at the scale at which it is judged.
    core_norm, worst = max(measured, key=lambda pair: pair[0].estimate)
    scaled = core_norm.scaled(math.sqrt(2 * report.model.layers))
    text = f"largest core norm times √(2N) {spoken(scaled)}, at {worst.name}"
    return text + _unmeasured_cores(report)


def _unmeasured_cores(report: Report) -> str:
    """Return how many cores that count were not measured, as the end of a sentence."""
    # 1. Those without a norm.
    rows = judged_rows(report, "JD101")
    missing = 0
    for row in rows:
        if row.core_norm is None:
            missing += 1

    # 2. How many they are.
    if not missing:
        return ""
    return f"; not measured at {missing} of {plural(len(rows), 'sub-layer')}"


def _smallest_shortcut(report: Report) -> str:
    """Return the smallest std of a shortcut that was judged, and where; "" if none was."""
    measured = []
    for row in judged_rows(report, "JD102"):
        if row.shortcut_std:
            measured.append((row.shortcut_std, row))
    if not measured:
        return ""
    std, row = min(measured, key=lambda pair: pair[0].min)
    return f"smallest shortcut std {three(std.min)}, at {row.name} (target: about 1)"


def _instead(report: Report) -> Line | None:
    """Return what is looked at if no sub-layer is pre-norm.

    The paper states its conditions for pre-norm alone.
    """
    # 1. Whether the conditions leave something to look at.
    rows = [row for row in report.sublayers if not row.nested]
    if report.tier != "measured" or not rows:
        return None
    placements = {row.placement for row in rows}
    if "pre" in placements or None in placements:
        return None

    # 2. The gains of branches, and of norms at their ends.
    branch_gain = _judged_branch_gain(report)
    norm_gain = _largest_out_norm_gain(rows)
    text = "; ".join(filter(None, [branch_gain, norm_gain]))
    return Line("looked at", text or "nothing could be measured")


def _judged_branch_gain(report: Report) -> str:
    """Return the worst branch norm, and whether a rule judges it; "" if none was measured."""
    worst = worst_branch(report)
    if worst is None:
        return ""
    row, gain = worst
    judged = "judged by no rule"
    if _matched_gain_rule(report):
        judged = "JD103 judges it by its placement"
    facts = "; ".join(filter(None, [judged, known_share(report)]))
    return f"worst branch norm {spoken(gain)} at {row.name} ({facts})"


def _matched_gain_rule(report: Report) -> bool:
    """Return whether JD103 has thresholds for a placement of this model."""
    for rule in report.rules:
        if rule.code == "JD103":
            return bool(rule.matched)
    return False


def _largest_out_norm_gain(rows: list[SublayerRecord]) -> str:
    """Return the largest gain of a norm at the end of a branch; "" if none was measured."""
    # 1. The largest.
    measured = []
    for row in rows:
        if row.out_norm_gain is not None:
            measured.append((row.out_norm_gain, row))
    if not measured:
        return ""
    gain, row = max(measured, key=lambda pair: pair[0].estimate)

    # 2. Where that norm stands.
    place = "the norm at the branch's end"
    if row.placement == "post":
        place = "the norm after the sum"
    return (
        f"gain of {place} {spoken(gain)} at {row.name} (1/σ of its input; no threshold is "
        "published)"
    )


# -- figures of the network ------------------------------------------------------------------------
def _against(report: Report) -> Line | None:
    """Return the comparison with an earlier model: how many figures differ, and the network's."""
    against = report.against
    if against is None:
        return None

    # 1. The branch norms that changed.
    branches = [change for change in against.changes if change.figure == "branch_norm"]
    grew = sum(change.grew for change in branches)
    text = (
        f"{against.source} ({against.state}): of {against.compared} branch norms {grew} grew and "
        f"{len(branches) - grew} shrank beyond both intervals"
    )

    # 2. The gain of the entire network.
    for change in against.changes:
        if change.figure == "end_to_end":
            earlier, now = three(change.earlier[1]), three(change.now[1])
            text += f"; {_name_of_gain(report)} {earlier} -> {now}"
            break
    return Line("against", text)


def _name_of_gain(report: Report) -> str:
    """Return what the norm of the main stream is called, with its range if that is a part."""
    network = report.network
    if network is None or network.part is None:
        return "end-to-end gain"
    return f"gain {network.part.words}"


def _risk(report: Report) -> Line | None:
    """Return the chance at the planned learning rate, or why there is none."""
    risk = report.risk
    if risk is None:
        return None  # no learning rate was given
    if risk.chance is None:
        return Line("risk", f"no chance is given: {risk.reason}")
    rate, value = three(risk.lr or 0.0), three(risk.value or 0.0)
    text = (
        f"at lr {rate} a chance of {risk} to go wrong, "
        f"from {risk.figure} {value}; calibrated on {risk.range}"
    )
    return _judged_by(report, "JD105", "risk", text)


def _judged_by(report: Report, code: str, label: str, text: str) -> Line:
    """Return a line with the level of a rule's finding, if that rule fired."""
    finding = _first_of(report, code)
    if finding is None:
        return Line(label, text)
    return Line(label, text, level=finding.level, code=finding.code)


def _depth(report: Report) -> list[Line]:
    """Return the lines on the end-to-end gain, and on the product of gains over depth."""
    network = report.network
    if network is None or network.gain_product_log is None:
        return []

    # 1. What was measured end to end.
    label = "whole network"
    gains = "the sub-layers' gains"
    if network.part is not None:
        label = "part of network"
        gains = f"the gains {network.part.words},"
    lines = []
    if network.end_to_end is not None:
        lines.append(Line(label, _end_to_end(network, network.end_to_end)))
        label = ""
    if network.end_to_end is not None and network.part is not None:
        gains = "these sub-layers' gains"  # the line before names them
    text = f"product of {gains} {_power_of_e(network.gain_product_log)}"
    text += _relation_to_gain(network, network.gain_product_log)

    # 2. The product, and what the rule says of it.
    finding = _first_of(report, "JD104")
    if finding is None:
        return [*lines, Line(label, text)]
    beyond = finding.what
    limit = finding.evidence.get("threshold")
    if limit is not None:
        beyond = f"it is above e^{limit:g}"
    return [*lines, Line(label, f"{text}; {beyond}", level=finding.level, code=finding.code)]


def _end_to_end(network: NetworkRecord, gain: Interval) -> str:
    """Return the measured end-to-end gain, with what it means.

    Args:
        network: the figures of the network.
        gain: the norm of the Jacobian from the first shortcut to the last.
    """
    # 1. The gain, and how it differs between probes.
    text = spoken(gain)
    spread = network.over_probes.get("end_to_end")
    if spread is not None:
        text += f" ({spread} over {len(spread.estimates)} probes)"

    # 2. What it is, and of which part.
    start, end = _ends_of_stream(network)
    meaning = f"the largest factor by which a small change of {start} grows on its way to {end}"
    part = network.part
    if part is None:
        return f"end-to-end gain {text}: {meaning}"
    return f"gain {text}: {meaning}; these are {part.share}, the others do not lie on this stream"


def _ends_of_stream(network: NetworkRecord) -> tuple[str, str]:
    """Return where the stream begins and ends that the figures are about, in words."""
    part = network.part
    if part is None:
        return "the first shortcut", "the top"
    return f"the shortcut of {part.first}", f"the sum of {part.last}"


def _relation_to_gain(network: NetworkRecord, product_log: float) -> str:
    """Return what the product of gains says of the gain that was measured, as an end.

    Args:
        network: the figures of the network.
        product_log: natural log of the product.
    """
    # 1. It leaves something out.
    stream = network.stream
    if stream is not None and stream.gaps:
        return f", no bound: {stream.gaps_in_words} {UNCOVERED_CALLS}"

    # 2. It stands alone, or next to the gain.
    if network.end_to_end is None:
        return f", {_product_alone(network)}"
    return _not_reached(product_log, network.end_to_end)


def _not_reached(product_log: float, gain: Interval) -> str:
    """Return that the product of gains is larger than the end-to-end gain; "" if it may not be.

    Args:
        product_log: natural log of the product of the gains of all sub-layers.
        gain: the end-to-end gain.
    """
    # The product is a bound. One more than twice the upper end is no rounding.
    log_of_upper = math.log(max(gain.upper, 1e-300))
    if product_log > log_of_upper + math.log(2):
        return " (an upper bound that the network does not reach)"
    return ""


def _product_alone(network: NetworkRecord) -> str:
    """Return that no end-to-end gain was measured, and why if that is known."""
    text = PRODUCT_ALONE
    if network.part is not None:
        text = "an upper bound whose true value was not measured"
    reason = network.notes.get("end_to_end")
    if not reason:
        return text
    return f"{text} ({reason})"


def _power_of_e(log: float) -> str:
    """Return e to a power: as a number, or as a power if the number would be long."""
    is_long = math.log(1e4) <= abs(log) < math.inf
    if is_long:
        return f"e^{log:.1f}"
    return three(math.exp(log))


def _over_probes(report: Report) -> Line | None:
    """Return what several probes gave: worst gains, the largest difference, the verdicts."""
    probes = report.settings.get("probes")
    if not probes:
        return None

    # 1. The verdicts.
    count = probes["count"]
    verdicts = Counter(probes["verdicts"]).most_common()
    listed = ", ".join(f"{verdict} at {times} of {count}" for verdict, times in verdicts)

    # 2. The branch norms, by sub-layer.
    spreads = {}
    for row in report.sublayers:
        if "branch_norm" in row.over_probes:
            spreads[row.name] = row.over_probes["branch_norm"]
    if not spreads:
        text = f"no branch norm was measured on more than one probe; verdict {listed}"
        return Line("over probes", text)

    # 3. The worst gain of each probe, and the sub-layer at which the probes differ most.
    worst = _worst_of_each_probe(spreads)
    text = (
        f"worst branch norm {between(min(worst), max(worst))} on {count} "
        f"probes{_farthest_apart(spreads)}; verdict {listed}; "
        "this is how much the data matter, not an error of the measurement"
    )
    return Line("over probes", text)


def _worst_of_each_probe(spreads: dict[str, ProbeSpread]) -> list[float]:
    """Return the largest branch norm of each probe; a probe without one is left out."""
    by_probe = zip(*(spread.estimates for spread in spreads.values()), strict=True)
    worst = []
    for values in by_probe:
        known = _known(values)
        if known:
            worst.append(max(known))
    return worst


def _farthest_apart(spreads: dict[str, ProbeSpread]) -> str:
    """Return the largest ratio between two probes at one sub-layer, as a part of a sentence."""
    ratios = {}
    for name, spread in spreads.items():
        if spread.least > 0:
            ratios[name] = spread.most / spread.least
    if not ratios:
        return ""
    name = max(ratios, key=ratios.__getitem__)
    return f", at most {three(ratios[name])} times apart at one sub-layer ({name})"


def _known(values: Iterable[float | None]) -> list[float]:
    """Return the values that were measured."""
    return [value for value in values if value is not None and not math.isnan(value)]


def _gradients(report: Report) -> Line | None:
    """Return the gradient's norm at the first shortcut, compared with that at the top."""
    ends = _gradient_ends(report)
    if ends is None or report.network is None:
        return None
    start, end = _ends_of_stream(report.network)
    share = ""
    if report.network.part is not None:
        share = f"; between them lie {report.network.part.share}"

    # 1. Norms whose ratio says nothing.
    first, last = ends
    if not last or not math.isfinite(first / last):
        return None
    if first == 0:
        return Line("gradient", f"norm 0 at {start}, {three(last)} at {end}{share}")

    # 2. The larger of the two over the smaller.
    ratio = first / last
    change = f"{three(1 / ratio)} times smaller than at {end}"
    if ratio >= 1:
        change = f"{three(ratio)} times that at {end}"
    if "1.00" in (three(ratio), three(1 / ratio)):
        change = f"as large as at {end}"
    return Line("gradient", f"norm {three(first)} at {start}, {change} ({three(last)}){share}")


def _gradient_ends(report: Report) -> tuple[float, float] | None:
    """Return the gradient's norm at the first shortcut and at the top; None if not measured."""
    if report.network is None:
        return None
    norms = report.network.gradient_norms
    if not norms or len(norms) < 2:
        return None
    return norms[0], norms[-1]


def _attention(report: Report) -> Line | None:
    """Return the largest logit and the least entropy of attention over all sub-layers."""
    # 1. The figures of all sub-layers that have attention.
    logits, shares = [], []
    for row in report.sublayers:
        if row.attention is None:
            continue
        logits.append(row.attention.max_logit)
        shares.append(row.attention.entropy_share)

    # 2. The extremes of those that were measured.
    known_logits = [logit for logit in logits if logit is not None]
    known_shares = [share for share in shares if share is not None]
    if not known_logits or not known_shares:
        return None
    least_percent = three(100 * min(known_shares))
    text = (
        f"largest logit {three(max(known_logits))}, smallest entropy {least_percent}% of that of "
        "uniform attention"
    )
    return Line("attention", text)


# -- other models ----------------------------------------------------------------------------------
def _others(report: Report) -> Line | None:
    """Return the ladder of inits with this model's placement, and this model's rung among them.

    The ladder's entries are {"name": str, "placement": str, "worst_branch_gain": float, "width":
    int}. A report may hold rungs of every placement: older versions wrote them all.
    """
    worst = worst_branch(report)
    if worst is None or report.state != "init":
        return None

    # 1. One placement: inits of another one have other gains.
    rows = [row for row in report.sublayers if row.branch_norm is not None]
    rows.sort(key=lambda row: str(row.placement))
    placements = {str(row.placement) for row in rows}
    norms = " and ".join(placements_in_words(rows))
    if len(placements) > 1:
        return _not_compared(f"the sub-layers differ in placement ({norms})")
    (placement,) = placements

    # 2. The rungs of this placement.
    rungs = [rung for rung in report.ladder if rung.get("placement") == placement]
    if not rungs and load_healthy(placement=placement):
        return None  # a report without a ladder, such as that of a probe in a run
    if not rungs:
        kind = f"with {norms}"
        if norms == "no norm":
            kind = "without norms"
        return _not_compared(f"no init of another model {kind} was measured")

    # 3. This model among them.
    gain = worst[1].estimate
    ladder = _ladder(rungs, gain)
    basis = f"{norms}, at init{_widths(report, rungs)}"
    share = known_share(report)
    if share:
        basis += f"; this model's norm is {share}"
    text = f"worst branch norm  {ladder}  ({basis})"
    return Line("other models", text)


def _ladder(rungs: list[dict[str, Any]], yours: float) -> str:
    """Return the rungs next to this model's gain, from the smallest to the largest.

    Args:
        rungs: inits of other models.
        yours: the worst branch norm of this model.
    """
    steps = [(yours, _YOURS)]
    for rung in rungs:
        steps.append((float(rung["worst_branch_gain"]), str(rung["name"])))
    shown = []
    for gain, name in _nearest(sorted(steps)):
        shown.append(f"{name} {two(gain)}".replace(" ", TIED))
    return " · ".join(shown)


def _not_compared(reason: str) -> Line:
    """Return the line that says why no other model is shown."""
    return Line("other models", f"nothing is compared: {reason}")


def _widths(report: Report, rungs: list[dict[str, Any]]) -> str:
    """Return the widths of the inits on the ladder, next to the model's own."""
    widths = {rung["width"] for rung in rungs if rung.get("width")}
    if not widths:
        return ""  # the ladder does not say
    own = report.model.width
    if widths == {own}:
        return ", same width"
    return f", width {_range(widths)}; yours {own or 'unknown'}"


def _nearest(steps: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """Return your rung, the nearest ones on both sides, and the two ends of the ladder."""
    names = [name for _, name in steps]
    yours = names.index(_YOURS)
    nearest = []
    for place, step in enumerate(steps):
        is_near = abs(place - yours) <= _RUNGS_NEAR
        is_end = place in (0, len(steps) - 1)
        if is_near or is_end:
            nearest.append(step)
    return nearest


def _range(values: set[int]) -> str:
    """Return the smallest and the largest value, or the one that there is."""
    least, most = min(values), max(values)
    if least == most:
        return str(least)
    return f"{least} to {most}"


# -- what was not judged ---------------------------------------------------------------------------
def _open(report: Report) -> Line | None:
    """Return the rules that did not come to an answer: an undecided rule is never a pass."""
    undecided = []
    for rule in report.rules:
        # The two conditions have lines of their own.
        is_open = rule.status == "unknown" and rule.code not in CONDITIONS
        if is_open:
            undecided.append(_named_with_note(rule))
    if not undecided:
        return None
    return Line("undecided", ", ".join(undecided), level="undecided")


def _named_with_note(rule: RuleResult) -> str:
    """Return code and name of a rule, and what it noted."""
    name = f"{rule.code} {rule.name}".strip()
    if not rule.note:
        return name
    return f"{name} ({rule.note})"


def _uncovered(report: Report) -> Line | None:
    """Return what no figure covers, with its share of the parameters."""
    model = report.model
    if not model.uncovered:
        return None

    # 1. The modules, each with the reason if there is one.
    names = []
    for name in model.uncovered:
        reason = model.uncovered_reasons.get(name)
        if reason:
            names.append(f"{name} ({reason})")
        else:
            names.append(name)
    text = some(names)

    # 2. Their share.
    if model.covered_parameters is not None:
        missing = model.parameters - model.covered_parameters
        text = f"{share(missing, model.parameters)} of the parameters: {text}"
    return _judged_by(report, "JD902", "not covered", text)


def footnotes(report: Report) -> list[str]:
    """Return why columns or figures are missing, one sentence per reason."""
    # 1. Figures that some or all sub-layers lack.
    notes = []
    for key, title in _TITLES.items():
        notes += _missing_figures(report, key, title)

    # 2. What the two factors are worth on a trained model.
    is_split = any(row.core_norm and row.norm_gain for row in report.sublayers)
    if report.state == "trained" and is_split:
        notes.append(
            "norm gain and core norm are observations: on a trained model only the branch norm "
            "is a property of it"
        )
    return notes


def _missing_figures(report: Report, key: str, title: str) -> list[str]:
    """Return a sentence for each of the first reasons why a figure is missing.

    Args:
        report: of either tier and state.
        key: of the figure in a record.
        title: of its column.
    """
    sentences = []
    by_reason = _missing_by_reason(report, key)
    for reason, names in list(by_reason.items())[:_NAMED]:
        where = ""
        if len(names) < len(report.sublayers):
            where = f" at {some(names)}"
        sentences.append(f"no {title}{where}: {reason}")
    return sentences


def _missing_by_reason(report: Report, key: str) -> dict[str, list[str]]:
    """Return the sub-layers without a figure, by the reason that they give."""
    by_reason: dict[str, list[str]] = {}
    for row in report.sublayers:
        is_explained = key in row.notes
        if is_explained and getattr(row, key) is None:
            names = by_reason.setdefault(row.notes[key], [])
            names.append(row.name)
    return by_reason


# -- what to do ------------------------------------------------------------------------------------
def to_do(report: Report) -> list[str]:
    """Return what to change: the remedies that were tried, then the advice of other findings.

    Args:
        report: of either tier and state.
    """
    # 1. What a replay was run for, then changes to the model.
    lines = []
    if report.replay is not None:
        lines.append(replay_advice(report.replay, []).action)
    lines += remedied(report)
    for text, code in _advice(report).items():
        lines.append(f"{text}   jacdiag explain {code}")

    # 2. Without a model to compare it with, the norms of a trained one are not judged.
    is_measured_run = report.state == "trained" and report.tier == "measured"
    if is_measured_run and report.baseline is None and report.replay is None:
        lines.append(_offer_comparison(report))
    return lines or [_without_remedy(report)]


def _advice(report: Report) -> dict[str, str]:
    """Return each fix once with the code of its rule, the loudest first.

    A fix for a figure (JD1xx, JD2xx) is shown only if it was tried on a copy and helps.
    """
    answered = _answered_codes(report)
    advice: dict[str, str] = {}
    for finding in _by_level(report.findings):
        if not finding.fix:
            continue
        if not _needs_trial(report, finding):
            advice.setdefault(finding.fix, finding.code)
        elif finding.verified and finding.code not in answered:
            text = f"{finding.fix} (tried on a copy of this model: it helps)"
            advice.setdefault(text, finding.code)
    return advice


def _answered_codes(report: Report) -> set[str]:
    """Return the rules that the recommended remedy answers."""
    codes: set[str] = set()
    for remedy in report.remedies:
        if remedy.recommended:
            codes.update(remedy.codes)
    return codes


def _needs_trial(report: Report, finding: Finding) -> bool:
    """Return whether a fix is shown only if it was tried: it changes how a figure comes out."""
    if finding.code == "JD110" and report.against is not None:
        return False  # a comparison of two checkpoints: nothing can be tried on a copy
    return finding.code.startswith(("JD1", "JD2"))


def _offer_comparison(report: Report) -> str:
    """Return the command by which a trained model can be judged."""
    offer = "compare it with an earlier checkpoint, or with its JSON report"
    command = str(report.settings.get("command") or "")
    if command.startswith("jacdiag audit"):
        return f"{offer} (--against EARLIER)"
    return f"{offer}: jacdiag audit NOW --against EARLIER"  # the library, or another command


def _without_remedy(report: Report) -> str:
    """Return the line of "What to do" if there is no remedy and no advice."""
    # 1. A better measurement could decide.
    is_undecided = report.verdict == "unknown"
    if is_undecided and _could_measure_more(report):
        return _MEASURE_MORE[report.tier]

    # 2. Nothing fired.
    if not report.findings:
        if is_undecided and any(rule.status == "unknown" for rule in report.rules):
            return "the table says what could not be measured"
        if is_undecided:
            return "nothing: no selected rule applied"
        return "nothing: no rule fired"

    # 3. What fired has no fix that helps.
    loudest = _by_level(report.findings)[0]
    if loudest.level == "info":
        return "nothing: what fired are observations"
    return f"the page of {loudest.code} says what helps   jacdiag explain {loudest.code}"


def _could_measure_more(report: Report) -> bool:
    """Return whether a measurement, or one with more products, could decide the verdict."""
    return report.tier == "weights" or has_interval_across_threshold(report)


def cost(report: Report) -> str:
    """Return what the audit cost: "612 forwards of one sub-layer, 41 s, peak 1.9 GB"."""
    spent = report.cost
    amounts = []
    if spent.forward_equivalents:
        amounts.append(f"{spent.forward_equivalents:,.0f} forwards of one sub-layer")
    if spent.seconds is not None:
        amounts.append(_time_spent(spent, spent.seconds))
    if spent.peak_memory_mb:
        amounts.append(f"peak {memory(spent.peak_memory_mb)}")
    return ", ".join(amounts) or ABSENT


def _time_spent(spent: Cost, total: float) -> str:
    """Return the seconds of an audit, and how many of them went to remedies and probes."""
    time = seconds(total)
    for phase, name in (("remedies", "remedies"), ("probes", "further probes")):
        part = spent.phases.get(phase)
        if part:
            time += f" ({name} {seconds(part)})"
    return time
