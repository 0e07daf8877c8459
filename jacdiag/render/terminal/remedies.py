"""Remedies in words: what was tried, before and after, its price, how to make it."""

from __future__ import annotations

from collections.abc import Sequence

from jacdiag.records import Outlook, RemedyRecord, Report
from jacdiag.render.terminal.number_cells import between, three
from jacdiag.rules.remedy_targets import aims

DIALECTS = {
    "pytorch": ("PyTorch", "python"),
    "huggingface": ("Hugging Face transformers", "python"),
    "megatron": ("Megatron-LM", "sh"),
    "torchtitan": ("torchtitan", "python"),
}


def remedied(report: Report) -> list[str]:
    """Lines for "What to do": the recommended remedy, or how far the nearest one came, or what a
    begun run can take.
    """
    tried = report.remedies
    best = next((r for r in tried if r.recommended), None)
    if best is not None:
        others = [f"{r.name}: {_outcome(r)}" for r in tried if r is not best]
        return [
            f"{best.title} ({best.name})   jacdiag explain {best.codes[0]}",
            f"tried on a copy{_on_seeds(best)}: {effect(best)}",
            f"price: {best.price}; the change as code: --patch FILE",
            *([f"also tried: {'; '.join(others)}"] if others else []),
        ]
    if _begun(report):
        return [f"{r.title}: {_kept(r)}; price: {r.price}" for r in tried]
    if tried:
        nearest = _nearest(tried)
        text = (
            f"none of {len(tried)} remedies was enough; nearest: {nearest.title}: "
            f"{_outcome(nearest)}"
        )
        return [f"{text}; its change as code: --patch FILE"]
    return []


def _begun(report: Report) -> bool:
    """Whether the remedies are those for a run that has begun: to choose from, whether one is
    enough or not.
    """
    way, tried = report.settings.get("remedies"), report.remedies
    kept = any(r.keeps_function for r in tried) and not any(r.sufficient for r in tried)
    return way == "begun" or (way is None and kept)  # an older report does not say


def _nearest(tried: Sequence[RemedyRecord]) -> RemedyRecord:
    """The one that leaves the fewest rules, of these the smallest gain."""
    return min(tried, key=lambda r: (len(r.after.fired), _upper(r.after.branch_norm)))


def effect(remedy: RemedyRecord) -> str:
    """ "worst branch gain 23.2 to 24.1 → 1.05 to 1.10, both conditions met"."""
    before, after = remedy.before, remedy.after
    parts = []
    if before.branch_norm is not None and after.branch_norm is not None:
        parts.append(
            f"worst branch gain {between(*before.branch_norm)} → {between(*after.branch_norm)}"
        )
    if (
        before.norm_gain is not None
        and after.norm_gain is not None
        and before.norm_gain != after.norm_gain
    ):
        parts.append(f"1/σ gain {three(before.norm_gain)} → {three(after.norm_gain)}")
    return ", ".join([*parts, _conditions(after)])


def document(report: Report) -> str:
    """The remedies as Markdown: a table of all that were tried, and some as code: the recommended
    one, all that a run that has begun can take, or the nearest, marked as not enough.
    """
    tried = report.remedies
    if not tried:
        return f"# Remedies\n\nNone was tried: {_why_none(report)}.\n"
    rows = [
        "| remedy | worst branch gain | 1/σ gain | left | enough | price |",
        "|:---|---:|---:|:---|:---|:---|",
    ]
    first = tried[0].before
    rows.append(_row("(as it is)", first, "", ""))
    rows += [_row(r.name, r.after, "yes" if r.sufficient else "no", r.price) for r in tried]
    chosen = tried if _begun(report) else [r for r in tried if r.recommended]
    parts = ["# Remedies", "\n".join(rows)]
    parts += (
        []
        if chosen
        else [
            f"None of {len(tried)} remedies was enough. The nearest as code, which is not enough:"
        ]
    )
    for remedy in chosen or [_nearest(tried)]:
        parts.append(f"## {remedy.title} ({remedy.name}){'' if chosen else ': not enough'}")
        did = (
            _kept(remedy)
            if remedy.keeps_function
            else effect(remedy)
            if chosen
            else _outcome(remedy)
        )
        parts.append(f"Tried on a copy{_on_seeds(remedy)}: {did}.")
        for key, (title, language) in DIALECTS.items():
            if remedy.patches.get(key):
                parts.append(
                    f"### {title}\n\n```{language}\n"
                    f"{remedy.patches[key].rstrip().replace('```', '')}\n```"
                )
    return "\n\n".join(parts) + "\n"


def _why_none(report: Report) -> str:
    """Why no remedy was tried: no finding asks for one, or one does and still none was."""
    codes = aims(report)
    if not codes:
        return "no finding asks for one"
    ask = f"{', '.join(codes)} {'asks' if len(codes) == 1 else 'ask'} for one"
    if report.settings.get("remedies") == "none":
        return (
            f"{ask}, but remedies are switched off (--remedies none); --remedies first tries them"
        )
    if report.state == "trained":
        return (
            f"{ask}, but the model is trained; --remedies begun tries what a run that has "
            "begun can take"
        )
    told = next((note for note in report.notes if note.startswith("no remedy was tried: ")), "")
    reason = told.removeprefix("no remedy was tried: ")
    return f"{ask}, but {reason or 'none is known, or the model cannot be copied'}"


def _row(name: str, figures: Outlook, enough: str, price: str) -> str:
    branch = between(*figures.branch_norm) if figures.branch_norm is not None else "-"
    gain = three(figures.norm_gain) if figures.norm_gain is not None else "-"
    left = (
        ", ".join([*figures.fired, *(f"{code} undecided" for code in figures.undecided)])
        or "no warning or error"
    )
    return f"| {name} | {branch} | {gain} | {left} | {enough} | {price} |"


def _outcome(remedy: RemedyRecord) -> str:
    left = remedy.after.fired or [f"{code} undecided" for code in remedy.after.undecided]
    rest = (
        "enough"
        if remedy.sufficient
        else f"left {', '.join(left)}"
        if left
        else "not on every seed"
    )
    return f"{effect(remedy)} ({rest})"


def _conditions(figures: Outlook) -> str:
    small, large = figures.small_sublayers, figures.large_shortcut
    if small == large:
        other = "the conditions do not apply" if figures.fired else "no warning or error left"
        return {"met": "both conditions met", "not applicable": other}.get(
            small, f"both conditions {small}"
        )
    return f"small sub-layers {small}, large shortcut {large}"


def _kept(remedy: RemedyRecord) -> str:
    if not remedy.keeps_function:
        return f"tried on a copy: {effect(remedy)}"
    if remedy.function_change is None:
        return "meant to keep the function; that could not be measured"
    if remedy.function_change == 0:
        return "the function stays, to the last bit"
    return f"the function stays (outputs differ by {remedy.function_change:.1e} at most, relative)"


def _on_seeds(remedy: RemedyRecord) -> str:
    return f", on seeds {remedy.seeds[0]} to {remedy.seeds[-1]}" if len(remedy.seeds) > 1 else ""


def _upper(ends: Sequence[float] | None) -> float:
    return ends[1] if ends is not None else float("inf")
