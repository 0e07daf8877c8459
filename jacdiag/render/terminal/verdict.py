"""What stands below the table: verdict by condition, what the other rules say, what to do, what it
cost.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from jacdiag.errors import clipped
from jacdiag.records import LEVELS, Finding, Report
from jacdiag.records.report import PRODUCT_ALONE
from jacdiag.render.terminal.number_cells import (
    ABSENT,
    between,
    memory,
    seconds,
    share,
    spoken,
    three,
)
from jacdiag.render.terminal.remedies import remedied
from jacdiag.render.terminal.sentences import condition, placement_words, worst_branch
from jacdiag.rules.thresholds import load_healthy

CONDITIONS = {"JD101": "small sub-layers", "JD102": "large shortcut"}
TIED = "\u00a0"  # a space at which no line is broken
_NAMED = 3  # how many names a sentence lists before it counts the rest


@dataclass(frozen=True)
class Line:
    """One labelled line below the table: "large shortcut   not met ▲   sentence   JD102"."""

    label: str
    text: str
    status: str = ""
    level: str = ""
    code: str = ""


def verdict_lines(report: Report) -> list[Line]:
    """Verdict by condition, what the other rules say, depth, other models, what was not covered."""
    lines = [_condition(report, code) for code in CONDITIONS]
    lines += [line for line in (_instead(report), _against(report)) if line]
    named = {rule.code: rule.name for rule in report.rules}
    for code, found in _by_code(report.findings).items():
        if code not in (*CONDITIONS, "JD104", "JD105", "JD902"):  # these have lines of their own
            text = "; ".join(_with_where(finding) for finding in found)
            lines.append(Line(named.get(code, "") or code, text, level=found[0].level, code=code))
    figures = (
        _risk(report),
        _depth(report),
        _gradients(report),
        _attention(report),
        _over_probes(report),
        _others(report),
    )
    lines += [line for line in figures if line]
    lines += [line for line in (_open(report), _uncovered(report)) if line]
    return lines + [Line("note", note) for note in report.notes]


def _by_level(findings: list[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: -LEVELS.index(finding.level))


def _by_code(findings: list[Finding]) -> dict[str, list[Finding]]:
    """Findings by rule, the loudest rule and the loudest finding of each first."""
    found: dict[str, list[Finding]] = {}
    for finding in _by_level(findings):
        found.setdefault(finding.code, []).append(finding)
    return found


def _with_where(finding: Finding) -> str:
    if not finding.where or any(name in finding.what for name in finding.where):
        return finding.what
    return f"{finding.what}: {some(finding.where)}"


def some(names: list[str]) -> str:
    """The first few names, and how many there are beyond."""
    text = ", ".join(clipped(name, 160) for name in names[:_NAMED])
    return text if len(names) <= _NAMED else f"{text} and {len(names) - _NAMED} more"


def _condition(report: Report, code: str) -> Line:
    label, status = CONDITIONS[code], condition(report, code)
    findings = _by_level([finding for finding in report.findings if finding.code == code])
    if findings:
        text = "; ".join(finding.what for finding in findings)
        return Line(label, text, status, findings[0].level, code)
    note = next((rule.note for rule in report.rules if rule.code == code and rule.note), "")
    text = note or (_largest_core(report) if code == "JD101" else _smallest_shortcut(report))
    return Line(label, text, status, "undecided" if status == "unknown" else "")


def _instead(report: Report) -> Line | None:
    """What is looked at where no sub-layer is pre-norm: the paper states its conditions for
    pre-norm alone.
    """
    rows = [row for row in report.sublayers if not row.nested]
    placements = {row.placement for row in rows}
    if report.tier != "measured" or not rows or "pre" in placements or None in placements:
        return None
    parts = []
    worst = worst_branch(report)
    if worst is not None:
        rule = next((rule for rule in report.rules if rule.code == "JD103"), None)
        judged = (
            "judged by no rule"
            if rule is None or not rule.matched
            else "JD103 judges it by its placement"
        )
        parts.append(f"branch gain {spoken(worst[1])} at {worst[0].name} ({judged})")
    gained = [(row.out_norm_gain, row) for row in rows if row.out_norm_gain is not None]
    if gained:
        gain, row = max(gained, key=lambda pair: pair[0].estimate)
        place = (
            "the norm after the sum" if row.placement == "post" else "the norm at the branch's end"
        )
        parts.append(
            f"gain of {place} {spoken(gain)} at {row.name} (1/σ of what it reads; no cut-off is "
            "published)"
        )
    return Line("looked at", "; ".join(parts) or "nothing could be measured")


def _against(report: Report) -> Line | None:
    """The comparison with an earlier model: how many figures differ, and the end-to-end norm."""
    against = report.against
    if against is None:
        return None
    branches = [change for change in against.changes if change.figure == "branch_norm"]
    grew = sum(change.grew for change in branches)
    text = (
        f"{against.source} ({against.state}): of {against.compared} branch gains {grew} grew and "
    )
    text += f"{len(branches) - grew} shrank beyond both intervals"
    network = next((change for change in against.changes if change.figure == "end_to_end"), None)
    if network is not None:
        text += f"; true end-to-end gain {three(network.earlier[1])} -> {three(network.now[1])}"
    return Line("against", text)


def _largest_core(report: Report) -> str:
    rows = [
        row for row in report.sublayers if row.core_norm and row.placement in ("pre", "sandwich")
    ]
    if not rows or not report.model.layers:
        return ""
    worst = max(rows, key=lambda row: row.core_norm.estimate if row.core_norm else 0)
    assert worst.core_norm is not None
    scaled = worst.core_norm.scaled(math.sqrt(2 * report.model.layers))
    pre = [row for row in report.sublayers if row.placement == "pre" and not row.nested]
    missing = sum(row.core_norm is None for row in pre)
    rest = f"; not measured at {missing} of {len(pre)} sub-layers" if missing else ""
    return f"largest core ‖J‖·√(2N) {spoken(scaled)}, at {worst.name}{rest}"


def _smallest_shortcut(report: Report) -> str:
    rows = [row for row in report.sublayers if row.shortcut_std]
    if not rows:
        return ""
    least = min(rows, key=lambda row: row.shortcut_std.min if row.shortcut_std else math.inf)
    assert least.shortcut_std is not None
    return f"σ_x at least {three(least.shortcut_std.min)}, at {least.name}"


def _risk(report: Report) -> Line | None:
    """The chance at the planned learning rate, or why there is none."""
    risk = report.risk
    if risk is None:
        return None
    if risk.chance is None:
        return Line("risk", f"no chance is given: {risk.reason}")
    text = f"at lr {three(risk.lr or 0.0)} a chance of {risk} to go "
    text += f"wrong, from {risk.figure} {three(risk.value or 0.0)}; calibrated on {risk.range}"
    finding = next((finding for finding in report.findings if finding.code == "JD105"), None)
    level, code = (finding.level, finding.code) if finding else ("", "")
    return Line("risk", text, level=level, code=code)


def _depth(report: Report) -> Line | None:
    network = report.network
    if network is None or network.gain_product_log is None:
        return None
    text = f"product of gains {_power_of_e(network.gain_product_log)}"
    if network.end_to_end:
        text += f", true end-to-end gain {spoken(network.end_to_end)}"
        spread = network.over_probes.get("end_to_end")
        if spread is not None:
            text += f" ({spread} over {len(spread.estimates)} probes)"
        if network.gain_product_log > math.log(max(network.end_to_end.upper, 1e-300)) + math.log(2):
            text += " (the rest cancels)"
    else:
        reason = network.notes.get("end_to_end")
        why = f" ({reason})" if reason else ""
        text += f", {PRODUCT_ALONE}{why}"
    finding = next((finding for finding in report.findings if finding.code == "JD104"), None)
    if finding is None:
        return Line("over depth", text)
    limit = finding.evidence.get("threshold")
    beyond = finding.what if limit is None else f"the product is above e^{limit:g}"
    return Line("over depth", f"{text}; {beyond}", level=finding.level, code=finding.code)


def _over_probes(report: Report) -> Line | None:
    """Return what several probes gave: the worst branch gain of each, where they differ most, their
    verdicts.
    """
    probes = report.settings.get("probes")
    if not probes:
        return None
    rows = [row for row in report.sublayers if "branch_norm" in row.over_probes]
    spreads = {row.name: row.over_probes["branch_norm"] for row in rows}
    verdicts = Counter(probes["verdicts"])
    said = ", ".join(
        f"{verdict} at {count} of {probes['count']}" for verdict, count in verdicts.most_common()
    )
    if not spreads:
        return Line(
            "over probes", f"no branch gain was measured on more than one probe; verdict {said}"
        )

    by_probe = zip(*(spread.estimates for spread in spreads.values()), strict=True)
    worst = [max(known) for values in by_probe if (known := _known(values))]
    ratios = {
        name: spread.most / spread.least for name, spread in spreads.items() if spread.least > 0
    }
    apart = ""
    if ratios:
        name = max(ratios, key=ratios.__getitem__)
        apart = f", at most {three(ratios[name])} times apart at one sub-layer ({name})"
    text = (
        f"worst branch gain {between(min(worst), max(worst))} on {probes['count']} "
        f"probes{apart}; verdict {said}; "
    )
    return Line("over probes", text + "what other data give, not an error of the measurement")


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and not math.isnan(value)]


def _power_of_e(log: float) -> str:
    return f"e^{log:.1f}" if math.log(1e4) <= abs(log) < math.inf else three(math.exp(log))


def _gradients(report: Report) -> Line | None:
    norms = report.network.gradient_norms if report.network else None
    if not norms or len(norms) < 2 or not norms[-1] or not math.isfinite(norms[0] / norms[-1]):
        return None
    if norms[0] == 0:
        return Line("gradient", f"at the first shortcut 0, at the top {three(norms[-1])}")
    ratio = norms[0] / norms[-1]
    change = (
        f"{three(ratio)} times that at the top"
        if ratio >= 1
        else f"{three(1 / ratio)} times smaller than at the top"
    )
    return Line(
        "gradient", f"at the first shortcut {three(norms[0])}, {change} ({three(norms[-1])})"
    )


def _attention(report: Report) -> Line | None:
    """The largest logit and the least entropy of attention, over the sub-layers in which they were
    read.
    """
    read = [row.attention for row in report.sublayers if row.attention is not None]
    logits = [record.max_logit for record in read if record.max_logit is not None]
    shares = [record.entropy_share for record in read if record.entropy_share is not None]
    if not logits or not shares:
        return None
    text = (
        f"logits at most {three(max(logits))}, entropy at least {three(100 * min(shares))}% of "
        "uniform"
    )
    return Line("attention", text)


def _others(report: Report) -> Line | None:
    """Return the ladder of inits with the placement of this model, with its own rung among them.

    The ladder's entries are {"name": str, "placement": str, "worst_branch_gain": float, "width":
    int}.
    """
    worst = worst_branch(report)
    if worst is None or report.state != "init":
        return None
    placements = sorted(
        {str(row.placement) for row in report.sublayers if row.branch_norm is not None}
    )
    if len(placements) > 1:
        several = " and ".join(placement_words(placement) for placement in placements)
        return Line(
            "beside others", f"nothing is compared: the sub-layers differ in placement ({several})"
        )

    # A report may hold rungs of every placement: older versions wrote them all.
    norms = placement_words(placements[0])
    kind = "without norms" if placements[0] == "none" else f"with {norms}"
    rungs = [rung for rung in report.ladder if rung.get("placement") == placements[0]]
    if not rungs and load_healthy(placement=placements[0]):
        return None  # a report without a ladder, such as that of a probe in a run
    if not rungs:
        return Line(
            "beside others", f"nothing is compared: no init of another model {kind} was measured"
        )
    steps = [(float(rung["worst_branch_gain"]), str(rung["name"])) for rung in rungs]
    steps = sorted([*steps, (worst[1].estimate, "▸yours")])
    shown = " · ".join(f"{name} {two(gain)}".replace(" ", TIED) for gain, name in _nearest(steps))
    return Line(
        "beside others", f"worst branch gain  {shown}  ({norms}, at init{_widths(report, rungs)})"
    )


def _widths(report: Report, rungs: list[dict[str, Any]]) -> str:
    widths = {rung["width"] for rung in rungs if rung.get("width")}
    if not widths:
        return ""
    if widths == {report.model.width}:
        return ", same width"
    return f", width {_range(widths)}; yours {report.model.width or 'unknown'}"


def _nearest(steps: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """Your rung, the nearest ones on both sides, and the two ends of the ladder."""
    yours = next(place for place, (_, name) in enumerate(steps) if name.startswith("▸"))
    return [
        step
        for place, step in enumerate(steps)
        if abs(place - yours) <= 3 or place in (0, len(steps) - 1)
    ]


def two(value: float) -> str:
    """Two significant digits: as much as a comparison between models bears."""
    return three(value) if not 0.01 < abs(value) < 1e6 else f"{float(f'{value:.1e}'):g}"


def _range(values: set[int]) -> str:
    return str(min(values)) if len(values) == 1 else f"{min(values)} to {max(values)}"


def _open(report: Report) -> Line | None:
    """Rules that did not come to an answer: an undecided rule is never a pass."""
    unknown = [
        rule for rule in report.rules if rule.status == "unknown" and rule.code not in CONDITIONS
    ]
    undecided = [
        f"{rule.code} {rule.name}".strip() + (f" ({rule.note})" if rule.note else "")
        for rule in unknown
    ]
    if not undecided:
        return None
    return Line("undecided", ", ".join(undecided), level="undecided")


def _uncovered(report: Report) -> Line | None:
    model = report.model
    if not model.uncovered:
        return None
    names = [
        f"{name} ({reason})" if (reason := model.uncovered_reasons.get(name)) else name
        for name in model.uncovered
    ]
    part = ""
    if model.covered_parameters is not None:
        part = (
            f"{share(model.parameters - model.covered_parameters, model.parameters)} of the "
            "parameters: "
        )
    finding = next((finding for finding in report.findings if finding.code == "JD902"), None)
    level, code = (finding.level, finding.code) if finding else ("", "")
    return Line("not covered", part + some(names), level=level, code=code)


def footnotes(report: Report) -> list[str]:
    """Why columns or figures are missing, one sentence per reason."""
    notes = []
    for key, title in (
        ("branch_norm", "branch ‖J‖"),
        ("core_norm", "core ‖J‖"),
        ("norm_gain", "1/σ gain"),
        ("bound", "bound"),
    ):
        reasons: dict[str, list[str]] = {}
        for row in report.sublayers:
            if getattr(row, key) is None and key in row.notes:
                reasons.setdefault(row.notes[key], []).append(row.name)
        for reason, names in list(reasons.items())[:_NAMED]:
            where = "" if len(names) == len(report.sublayers) else f" at {some(names)}"
            notes.append(f"no {title}{where}: {reason}")
    if report.state == "trained" and any(
        row.core_norm and row.norm_gain for row in report.sublayers
    ):
        notes.append(
            "1/σ gain and core ‖J‖ are observations: on a trained model only branch ‖J‖ is a "
            "property of it"
        )
    return notes


def to_do(report: Report) -> list[str]:
    """What to change: the remedies that were tried, then what the loudest of the other findings
    asks for.
    """
    answered = {code for remedy in report.remedies if remedy.recommended for code in remedy.codes}
    lines = remedied(report)
    advice: dict[str, str] = {}
    for finding in _by_level(report.findings):
        is_comparison = finding.code == "JD110" and report.against is not None
        if finding.fix and (is_comparison or not finding.code.startswith(("JD1", "JD2"))):
            advice.setdefault(finding.fix, finding.code)
        elif finding.fix and finding.verified and finding.code not in answered:
            advice.setdefault(
                f"{finding.fix} (tried on a copy of this model: it helps)", finding.code
            )
    lines += [f"{text}   jacdiag explain {code}" for text, code in advice.items()]
    if report.state == "trained" and report.tier == "measured" and report.baseline is None:
        lines.append(_offer_comparison(report))
    return lines or [_without_remedy(report)]


def _offer_comparison(report: Report) -> str:
    """What a trained model can be judged by, as a command."""
    command = str(report.settings.get("command") or "")
    if not command.startswith("jacdiag audit"):
        command = "jacdiag audit NOW"
    return f"compare it with an earlier checkpoint, or its JSON report: {command} --against EARLIER"


def _without_remedy(report: Report) -> str:
    loudest = next(iter(_by_level(report.findings)), None)
    if report.verdict == "unknown" and (report.tier == "weights" or _norms_judged(report)):
        return _MEASURE_MORE[report.tier]
    if loudest is None:
        return (
            "nothing: no rule fired"
            if report.verdict != "unknown"
            else "nothing: no selected rule applied"
        )
    if loudest.level == "info":
        return "nothing: what fired are observations"
    return f"read on: jacdiag explain {loudest.code}"


def _norms_judged(report: Report) -> bool:
    """Whether an undecided verdict can be for want of products."""
    return any(
        rule.status == "unknown" or (rule.matched and rule.code.startswith("JD1"))
        for rule in report.rules
    )


_MEASURE_MORE = {
    "weights": "give --model FACTORY, which builds the model: one that runs can be measured",
    "measured": "ask for narrower intervals with --tol, at the price of more products",
}


def cost(report: Report) -> str:
    """ "612 forwards of one sub-layer, 41 s, peak 1.9 GB"."""
    spent = report.cost
    parts = (
        [f"{spent.forward_equivalents:,.0f} forwards of one sub-layer"]
        if spent.forward_equivalents
        else []
    )
    tried = spent.phases.get("remedies")
    more = f" (remedies {seconds(tried)})" if tried else ""
    probes = spent.phases.get("probes")
    more += f" (further probes {seconds(probes)})" if probes else ""
    parts += [seconds(spent.seconds) + more] if spent.seconds is not None else []
    parts += [f"peak {memory(spent.peak_memory_mb)}"] if spent.peak_memory_mb else []
    return ", ".join(parts) or ABSENT
