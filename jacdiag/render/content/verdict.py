"""What stands below the table: the verdict by condition, other rules, what to do, the cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from jacdiag.errors import clipped
from jacdiag.records import LEVELS, Finding, Report, SublayerRecord
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
from jacdiag.records.report import PRODUCT_ALONE
from jacdiag.render.content.remedies import remedied
from jacdiag.render.content.sentences import condition, placement_words, worst_branch
from jacdiag.rules.thresholds import load_healthy

CONDITIONS = {"JD101": "small sub-layers", "JD102": "large shortcut"}
OWN_LINES = {*CONDITIONS, "JD104", "JD105", "JD902"}  # rules whose findings stand in other lines
TIED = "\u00a0"  # a space at which no line is broken
_NAMED = 3  # how many names a sentence lists before it counts the rest
_RUNGS_NEAR = 3  # rungs of the ladder that are shown on either side of this model
_YOURS = "▸yours"
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
    lines = [_condition(report, code) for code in CONDITIONS]
    lines += _present(_instead(report), _against(report))
    lines += _fired_rules(report)
    lines += _present(
        _risk(report),
        _depth(report),
        _gradients(report),
        _attention(report),
        _over_probes(report),
        _others(report),
    )
    lines += _present(_open(report), _uncovered(report))
    lines += [Line("note", note) for note in report.notes]
    return lines


def _present(*lines: Line | None) -> list[Line]:
    """Return the lines that there are."""
    return [line for line in lines if line is not None]


# -- findings --------------------------------------------------------------------------------------
def _fired_rules(report: Report) -> list[Line]:
    """Return one line for each rule that fired and has no line of its own."""
    rule_names = {rule.code: rule.name for rule in report.rules}
    lines = []
    for code, findings in _by_code(report.findings).items():
        if code in OWN_LINES:
            continue
        text = "; ".join(_with_where(finding) for finding in findings)
        label = rule_names.get(code, "") or code
        lines.append(Line(label, text, level=findings[0].level, code=code))
    return lines


def _by_level(findings: list[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: -LEVELS.index(finding.level))


def _by_code(findings: list[Finding]) -> dict[str, list[Finding]]:
    """Return findings by rule, the loudest rule and the loudest finding of each first."""
    groups: dict[str, list[Finding]] = {}
    for finding in _by_level(findings):
        groups.setdefault(finding.code, []).append(finding)
    return groups


def _first_of(report: Report, code: str) -> Finding | None:
    return next((finding for finding in report.findings if finding.code == code), None)


def _with_where(finding: Finding) -> str:
    names_are_said = any(name in finding.what for name in finding.where)
    if not finding.where or names_are_said:
        return finding.what
    return f"{finding.what}: {some(finding.where)}"


def some(names: list[str]) -> str:
    """Return the first few names, and how many there are beyond."""
    text = ", ".join(clipped(name, 160) for name in names[:_NAMED])
    if len(names) <= _NAMED:
        return text
    return f"{text} and {len(names) - _NAMED} more"


# -- the conditions of the paper -------------------------------------------------------------------
def _condition(report: Report, code: str) -> Line:
    """Return the line of one condition: what its rule found, else the figure that it judged."""
    label = CONDITIONS[code]
    status = condition(report, code)
    findings = _by_level([finding for finding in report.findings if finding.code == code])
    if findings:
        text = "; ".join(finding.what for finding in findings)
        return Line(label, text, status, findings[0].level, code)

    level = ""
    if status == "unknown":
        level = "undecided"
    notes = [rule.note for rule in report.rules if rule.code == code and rule.note]
    if notes:
        text = notes[0]
    elif code == "JD101":
        text = _largest_core(report)
    else:
        text = _smallest_shortcut(report)
    return Line(label, text, status, level)


def _largest_core(report: Report) -> str:
    """Return the largest ‖J‖·√(2N) of a core, and how many of them were not measured."""
    measured = [
        (row.core_norm, row)
        for row in report.sublayers
        if row.core_norm and row.placement in ("pre", "sandwich")
    ]
    if not measured or not report.model.layers:
        return ""
    core_norm, worst = max(measured, key=lambda pair: pair[0].estimate)
    scaled = core_norm.scaled(math.sqrt(2 * report.model.layers))
    text = f"largest core ‖J‖·√(2N) {spoken(scaled)}, at {worst.name}"

    pre_norm = [row for row in report.sublayers if row.placement == "pre" and not row.nested]
    missing = sum(row.core_norm is None for row in pre_norm)
    if missing:
        text += f"; not measured at {missing} of {len(pre_norm)} sub-layers"
    return text


def _smallest_shortcut(report: Report) -> str:
    measured = [(row.shortcut_std, row) for row in report.sublayers if row.shortcut_std]
    if not measured:
        return ""
    std, row = min(measured, key=lambda pair: pair[0].min)
    return f"σ_x at least {three(std.min)}, at {row.name}"


def _instead(report: Report) -> Line | None:
    """Return what is looked at if no sub-layer is pre-norm.

    The paper states its conditions for pre-norm alone.
    """
    rows = [row for row in report.sublayers if not row.nested]
    placements = {row.placement for row in rows}
    conditions_apply = "pre" in placements or None in placements
    if report.tier != "measured" or not rows or conditions_apply:
        return None
    sentences = [_judged_branch_gain(report), _largest_out_norm_gain(rows)]
    text = "; ".join(sentence for sentence in sentences if sentence)
    return Line("looked at", text or "nothing could be measured")


def _judged_branch_gain(report: Report) -> str:
    worst = worst_branch(report)
    if worst is None:
        return ""
    row, gain = worst
    judged = "judged by no rule"
    for rule in report.rules:
        if rule.code != "JD103":
            continue
        if rule.matched:
            judged = "JD103 judges it by its placement"
        break
    return f"branch gain {spoken(gain)} at {row.name} ({judged})"


def _largest_out_norm_gain(rows: list[SublayerRecord]) -> str:
    measured = [(row.out_norm_gain, row) for row in rows if row.out_norm_gain is not None]
    if not measured:
        return ""
    gain, row = max(measured, key=lambda pair: pair[0].estimate)
    place = "the norm at the branch's end"
    if row.placement == "post":
        place = "the norm after the sum"
    return (
        f"gain of {place} {spoken(gain)} at {row.name} (1/σ of what it reads; no cut-off is "
        "published)"
    )


# -- figures of the network ------------------------------------------------------------------------
def _against(report: Report) -> Line | None:
    """Return the comparison with an earlier model: how many figures differ, and the network's."""
    against = report.against
    if against is None:
        return None
    branches = [change for change in against.changes if change.figure == "branch_norm"]
    grew = sum(change.grew for change in branches)
    text = (
        f"{against.source} ({against.state}): of {against.compared} branch gains {grew} grew and "
        f"{len(branches) - grew} shrank beyond both intervals"
    )
    network = next((change for change in against.changes if change.figure == "end_to_end"), None)
    if network is not None:
        text += f"; true end-to-end gain {three(network.earlier[1])} -> {three(network.now[1])}"
    return Line("against", text)


def _risk(report: Report) -> Line | None:
    """Return the chance at the planned learning rate, or why there is none."""
    risk = report.risk
    if risk is None:
        return None
    if risk.chance is None:
        return Line("risk", f"no chance is given: {risk.reason}")
    text = (
        f"at lr {three(risk.lr or 0.0)} a chance of {risk} to go "
        f"wrong, from {risk.figure} {three(risk.value or 0.0)}; calibrated on {risk.range}"
    )
    return _judged_by(report, "JD105", "risk", text)


def _judged_by(report: Report, code: str, label: str, text: str) -> Line:
    """Return a line with the level of a rule's finding, if that rule fired."""
    finding = _first_of(report, code)
    if finding is None:
        return Line(label, text)
    return Line(label, text, level=finding.level, code=finding.code)


def _depth(report: Report) -> Line | None:
    """Return the product of gains over depth, and the true end-to-end gain."""
    network = report.network
    if network is None or network.gain_product_log is None:
        return None

    # 1. The product, and what was measured end to end.
    text = f"product of gains {_power_of_e(network.gain_product_log)}"
    if network.end_to_end:
        text += f", true end-to-end gain {spoken(network.end_to_end)}"
        spread = network.over_probes.get("end_to_end")
        if spread is not None:
            text += f" ({spread} over {len(spread.estimates)} probes)"
        log_of_upper = math.log(max(network.end_to_end.upper, 1e-300))
        if network.gain_product_log > log_of_upper + math.log(2):
            text += " (the rest cancels)"
    else:
        reason = network.notes.get("end_to_end")
        text += f", {PRODUCT_ALONE}"
        if reason:
            text += f" ({reason})"

    # 2. What the rule says of it.
    finding = _first_of(report, "JD104")
    if finding is None:
        return Line("over depth", text)
    limit = finding.evidence.get("threshold")
    beyond = finding.what
    if limit is not None:
        beyond = f"the product is above e^{limit:g}"
    return Line("over depth", f"{text}; {beyond}", level=finding.level, code=finding.code)


def _power_of_e(log: float) -> str:
    if math.log(1e4) <= abs(log) < math.inf:
        return f"e^{log:.1f}"
    return three(math.exp(log))


def _over_probes(report: Report) -> Line | None:
    """Return what several probes gave: worst gains, the largest difference, the verdicts."""
    probes = report.settings.get("probes")
    if not probes:
        return None
    count = probes["count"]
    verdicts = Counter(probes["verdicts"]).most_common()
    listed = ", ".join(f"{verdict} at {times} of {count}" for verdict, times in verdicts)
    spreads = {
        row.name: row.over_probes["branch_norm"]
        for row in report.sublayers
        if "branch_norm" in row.over_probes
    }
    if not spreads:
        text = f"no branch gain was measured on more than one probe; verdict {listed}"
        return Line("over probes", text)

    # 1. The worst gain of each probe.
    worst = []
    for values in zip(*(spread.estimates for spread in spreads.values()), strict=True):
        known = _known(values)
        if known:
            worst.append(max(known))

    # 2. The sub-layer at which the probes differ most.
    ratios = {
        name: spread.most / spread.least for name, spread in spreads.items() if spread.least > 0
    }
    apart = ""
    if ratios:
        name = max(ratios, key=ratios.__getitem__)
        apart = f", at most {three(ratios[name])} times apart at one sub-layer ({name})"
    text = (
        f"worst branch gain {between(min(worst), max(worst))} on {count} "
        f"probes{apart}; verdict {listed}; "
        "what other data give, not an error of the measurement"
    )
    return Line("over probes", text)


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and not math.isnan(value)]


def _gradients(report: Report) -> Line | None:
    """Return the gradient's norm at the first shortcut, compared with that at the top."""
    if report.network is None:
        return None
    norms = report.network.gradient_norms
    if not norms or len(norms) < 2:
        return None
    first, last = norms[0], norms[-1]
    if not last or not math.isfinite(first / last):
        return None
    if first == 0:
        return Line("gradient", f"at the first shortcut 0, at the top {three(last)}")

    ratio = first / last
    change = f"{three(1 / ratio)} times smaller than at the top"
    if ratio >= 1:
        change = f"{three(ratio)} times that at the top"
    return Line("gradient", f"at the first shortcut {three(first)}, {change} ({three(last)})")


def _attention(report: Report) -> Line | None:
    """Return the largest logit and the least entropy of attention over all sub-layers."""
    records = [row.attention for row in report.sublayers if row.attention is not None]
    logits = [record.max_logit for record in records if record.max_logit is not None]
    shares = [record.entropy_share for record in records if record.entropy_share is not None]
    if not logits or not shares:
        return None
    text = (
        f"logits at most {three(max(logits))}, entropy at least {three(100 * min(shares))}% of "
        "uniform"
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
    placements = sorted(
        {str(row.placement) for row in report.sublayers if row.branch_norm is not None}
    )
    if len(placements) > 1:
        several = " and ".join(placement_words(placement) for placement in placements)
        return _not_compared(f"the sub-layers differ in placement ({several})")
    placement = placements[0]
    norms = placement_words(placement)

    # 2. The rungs of this placement.
    rungs = [rung for rung in report.ladder if rung.get("placement") == placement]
    if not rungs:
        if load_healthy(placement=placement):
            return None  # a report without a ladder, such as that of a probe in a run
        kind = f"with {norms}"
        if placement == "none":
            kind = "without norms"
        return _not_compared(f"no init of another model {kind} was measured")

    # 3. This model among them.
    steps = [(float(rung["worst_branch_gain"]), str(rung["name"])) for rung in rungs]
    steps = sorted([*steps, (worst[1].estimate, _YOURS)])
    shown = [f"{name} {two(gain)}".replace(" ", TIED) for gain, name in _nearest(steps)]
    text = f"worst branch gain  {' · '.join(shown)}  ({norms}, at init{_widths(report, rungs)})"
    return Line("other models", text)


def _not_compared(reason: str) -> Line:
    """Return the line that says why no other model is shown."""
    return Line("other models", f"nothing is compared: {reason}")


def _widths(report: Report, rungs: list[dict[str, Any]]) -> str:
    widths = {rung["width"] for rung in rungs if rung.get("width")}
    if not widths:
        return ""
    if widths == {report.model.width}:
        return ", same width"
    return f", width {_range(widths)}; yours {report.model.width or 'unknown'}"


def _nearest(steps: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """Return your rung, the nearest ones on both sides, and the two ends of the ladder."""
    yours = next(place for place, (_, name) in enumerate(steps) if name.startswith("▸"))
    ends = (0, len(steps) - 1)
    nearest = []
    for place, step in enumerate(steps):
        if abs(place - yours) <= _RUNGS_NEAR or place in ends:
            nearest.append(step)
    return nearest


def _range(values: set[int]) -> str:
    if len(values) == 1:
        return str(min(values))
    return f"{min(values)} to {max(values)}"


# -- what was not judged ---------------------------------------------------------------------------
def _open(report: Report) -> Line | None:
    """Return the rules that did not come to an answer: an undecided rule is never a pass."""
    undecided = []
    for rule in report.rules:
        if rule.status != "unknown" or rule.code in CONDITIONS:
            continue
        name = f"{rule.code} {rule.name}".strip()
        if rule.note:
            name = f"{name} ({rule.note})"
        undecided.append(name)
    if not undecided:
        return None
    return Line("undecided", ", ".join(undecided), level="undecided")


def _uncovered(report: Report) -> Line | None:
    """Return what no figure covers, with its share of the parameters."""
    model = report.model
    if not model.uncovered:
        return None
    names = []
    for name in model.uncovered:
        reason = model.uncovered_reasons.get(name)
        if reason:
            names.append(f"{name} ({reason})")
        else:
            names.append(name)
    text = some(names)
    if model.covered_parameters is not None:
        missing = model.parameters - model.covered_parameters
        text = f"{share(missing, model.parameters)} of the parameters: {text}"
    return _judged_by(report, "JD902", "not covered", text)


def footnotes(report: Report) -> list[str]:
    """Return why columns or figures are missing, one sentence per reason."""
    titles = {
        "branch_norm": "branch ‖J‖",
        "core_norm": "core ‖J‖",
        "norm_gain": "1/σ gain",
        "bound": "bound",
    }
    notes = []
    for key, title in titles.items():
        by_reason = _missing_by_reason(report, key)
        for reason, names in list(by_reason.items())[:_NAMED]:
            where = ""
            if len(names) < len(report.sublayers):
                where = f" at {some(names)}"
            notes.append(f"no {title}{where}: {reason}")

    is_split = any(row.core_norm and row.norm_gain for row in report.sublayers)
    if report.state == "trained" and is_split:
        notes.append(
            "1/σ gain and core ‖J‖ are observations: on a trained model only branch ‖J‖ is a "
            "property of it"
        )
    return notes


def _missing_by_reason(report: Report, key: str) -> dict[str, list[str]]:
    """Return the sub-layers without a figure, by the reason that they give."""
    by_reason: dict[str, list[str]] = {}
    for row in report.sublayers:
        if getattr(row, key) is None and key in row.notes:
            by_reason.setdefault(row.notes[key], []).append(row.name)
    return by_reason


# -- what to do ------------------------------------------------------------------------------------
def to_do(report: Report) -> list[str]:
    """Return what to change: the remedies that were tried, then the advice of other findings.

    Args:
        report: of either tier and state.
    """
    lines = remedied(report)
    lines += [f"{text}   jacdiag explain {code}" for text, code in _advice(report).items()]
    nothing_to_compare_with = report.baseline is None
    if report.state == "trained" and report.tier == "measured" and nothing_to_compare_with:
        lines.append(_offer_comparison(report))
    return lines or [_without_remedy(report)]


def _advice(report: Report) -> dict[str, str]:
    """Return each fix once with the code of its rule, the loudest first.

    A fix for a figure (JD1xx, JD2xx) is shown only if it was tried on a copy and helps.
    """
    answered = {code for remedy in report.remedies if remedy.recommended for code in remedy.codes}
    advice: dict[str, str] = {}
    for finding in _by_level(report.findings):
        if not finding.fix:
            continue
        is_comparison = finding.code == "JD110" and report.against is not None
        needs_trial = finding.code.startswith(("JD1", "JD2")) and not is_comparison
        if not needs_trial:
            advice.setdefault(finding.fix, finding.code)
        elif finding.verified and finding.code not in answered:
            text = f"{finding.fix} (tried on a copy of this model: it helps)"
            advice.setdefault(text, finding.code)
    return advice


def _offer_comparison(report: Report) -> str:
    """Return the command by which a trained model can be judged."""
    command = str(report.settings.get("command") or "")
    if not command.startswith("jacdiag audit"):
        command = "jacdiag audit NOW"
    return f"compare it with an earlier checkpoint, or its JSON report: {command} --against EARLIER"


def _without_remedy(report: Report) -> str:
    loudest = next(iter(_by_level(report.findings)), None)
    is_undecided = report.verdict == "unknown"
    if is_undecided and (report.tier == "weights" or _norms_judged(report)):
        return _MEASURE_MORE[report.tier]
    if loudest is None and is_undecided:
        return "nothing: no selected rule applied"
    if loudest is None:
        return "nothing: no rule fired"
    if loudest.level == "info":
        return "nothing: what fired are observations"
    return f"read on: jacdiag explain {loudest.code}"


def _norms_judged(report: Report) -> bool:
    """Return whether more products could decide an undecided verdict."""
    for rule in report.rules:
        judges_norms = rule.matched and rule.code.startswith("JD1")
        if rule.status == "unknown" or judges_norms:
            return True
    return False


def cost(report: Report) -> str:
    """Return what the audit cost: "612 forwards of one sub-layer, 41 s, peak 1.9 GB"."""
    spent = report.cost
    amounts = []
    if spent.forward_equivalents:
        amounts.append(f"{spent.forward_equivalents:,.0f} forwards of one sub-layer")
    if spent.seconds is not None:
        time = seconds(spent.seconds)
        for phase, name in (("remedies", "remedies"), ("probes", "further probes")):
            if spent.phases.get(phase):
                time += f" ({name} {seconds(spent.phases[phase])})"
        amounts.append(time)
    if spent.peak_memory_mb:
        amounts.append(f"peak {memory(spent.peak_memory_mb)}")
    return ", ".join(amounts) or ABSENT
