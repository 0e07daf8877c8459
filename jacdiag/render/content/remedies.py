"""Remedies in words: what was tried, before and after, its price, the change as code."""

from __future__ import annotations

from collections.abc import Sequence

from jacdiag.records import Outlook, RemedyRecord, Report
from jacdiag.records.number_format import between, three
from jacdiag.render.content.command_line import has_option
from jacdiag.render.content.sentences import judged_words, status_words
from jacdiag.rules.remedy_targets import aims

DIALECTS = {
    "pytorch": ("PyTorch", "python"),
    "huggingface": ("Hugging Face transformers", "python"),
    "megatron": ("Megatron-LM", "sh"),
    "torchtitan": ("torchtitan", "python"),
}
_NOT_SELECTED = "not selected"
_NOT_TRIED = "no remedy was tried: "  # how the audit's note begins that gives the reason


def remedied(report: Report) -> list[str]:
    """Return the lines of "What to do" that are about remedies.

    These are the recommended remedy, or those that a begun run can take, or how far the nearest
    one came.

    Args:
        report: of either tier and state.
    """
    # 1. One that is enough.
    remedies = report.remedies
    recommended = _recommended(remedies)
    if recommended is not None:
        return _recommendation(recommended, remedies, _offer_of_code(report))

    # 2. A choice for a run that has begun.
    if _is_for_begun_run(report):
        return [f"{r.title}: {_effect_on_function(r)}; price: {r.price}" for r in remedies]

    # 3. None was enough.
    if not remedies:
        return []
    nearest = _nearest(remedies)
    tried = f"none of {len(remedies)} remedies was enough; nearest: "
    if len(remedies) == 1:
        tried = "one remedy was tried, and it was not enough: "
    return [f"{tried}{nearest.title}: {_outcome(nearest)}{_offer_of_code(report)}"]


def _offer_of_code(report: Report) -> str:
    """Return how to get a change as code, as the end of a line; "" if the command requests it."""
    if has_option(report, "--patch"):
        return ""
    return "; the change as code: --patch FILE"


def _recommended(remedies: Sequence[RemedyRecord]) -> RemedyRecord | None:
    """Return the remedy that is recommended, if one is."""
    return next((remedy for remedy in remedies if remedy.recommended), None)


def _recommendation(best: RemedyRecord, remedies: Sequence[RemedyRecord], offer: str) -> list[str]:
    """Return the lines on the recommended remedy.

    Args:
        best: the recommended one.
        remedies: all that were tried.
        offer: how to get the change as code.
    """
    lines = [
        f"{best.title} ({best.name})   jacdiag explain {best.codes[0]}",
        f"tried on a copy{_on_seeds(best)}: {effect(best)}",
        f"price: {best.price}{offer}",
    ]
    others = [f"{r.name}: {_outcome(r)}" for r in remedies if r is not best]
    if others:
        lines.append(f"also tried: {'; '.join(others)}")
    return lines


def _is_for_begun_run(report: Report) -> bool:
    """Return whether the remedies are a choice for a run that has begun, enough or not."""
    choice = report.settings.get("remedies")
    if choice is not None:
        return bool(choice == "begun")

    # An older report does not say. Remedies for a begun run keep the function, and none is enough.
    keep_function = [remedy.keeps_function for remedy in report.remedies]
    sufficient = [remedy.sufficient for remedy in report.remedies]
    return any(keep_function) and not any(sufficient)


def _nearest(remedies: Sequence[RemedyRecord]) -> RemedyRecord:
    """Return the one that leaves the fewest rules, of these the smallest gain."""

    def distance(remedy: RemedyRecord) -> tuple[int, float]:
        # A gain that was not measured counts as the largest.
        interval = remedy.after.branch_norm
        upper = float("inf")
        if interval is not None:
            upper = interval[1]
        return len(remedy.after.fired), upper

    return min(remedies, key=distance)


def effect(remedy: RemedyRecord) -> str:
    """Return figures before and after, and the conditions after.

    For example "worst branch norm 23.2 to 24.1 → 1.05 to 1.10, both conditions met".
    """
    # 1. The worst branch.
    before, after = remedy.before, remedy.after
    effects = []
    if before.branch_norm is not None and after.branch_norm is not None:
        gains = f"{between(*before.branch_norm)} → {between(*after.branch_norm)}"
        effects.append(f"worst branch norm {gains}")

    # 2. The shortcut, if the remedy changes it.
    both_measured = before.norm_gain is not None and after.norm_gain is not None
    if both_measured and before.norm_gain != after.norm_gain:
        effects.append(f"norm gain {three(before.norm_gain)} → {three(after.norm_gain)}")

    # 3. The conditions.
    effects.append(_conditions(after))
    return ", ".join(effects)


def document(report: Report) -> str:
    """Return the remedies as Markdown: a table of all that were tried, and some as code.

    As code stand the recommended one, or all that a begun run can take, or the nearest, marked as
    not enough.

    Args:
        report: of either tier and state.
    """
    remedies = report.remedies
    if not remedies:
        return f"# Remedies\n\nNone was tried: {_why_none(report)}.\n"

    # 1. All in a table.
    sections = ["# Remedies", _table(remedies)]

    # 2. Those as code that are enough, or that a begun run can take.
    chosen = [remedy for remedy in remedies if remedy.recommended]
    if _is_for_begun_run(report):
        chosen = remedies
    for remedy in chosen:
        sections += _section(remedy, is_enough=True)

    # 3. Without any, the nearest.
    if not chosen and len(remedies) == 1:
        sections.append("One remedy was tried, and it was not enough. It is shown as code:")
    elif not chosen:
        sections.append(
            f"None of {len(remedies)} remedies was enough. The nearest as code, which is not "
            "enough:"
        )
    if not chosen:
        sections += _section(_nearest(remedies), is_enough=False)
    return "\n\n".join(sections) + "\n"


def _section(remedy: RemedyRecord, *, is_enough: bool) -> list[str]:
    """Return heading, effect and code of one remedy, as paragraphs."""
    # 1. Heading and effect.
    mark = ""
    if not is_enough:
        mark = ": not enough"
    result = _result(remedy, is_enough=is_enough)
    paragraphs = [
        f"## {remedy.title} ({remedy.name}){mark}",
        f"Tried on a copy{_on_seeds(remedy)}: {result}.",
    ]

    # 2. The change as code. A fence inside it would end the code block.
    for key, (title, language) in DIALECTS.items():
        if remedy.patches.get(key):
            code = remedy.patches[key].rstrip().replace("```", "")
            paragraphs.append(f"### {title}\n\n```{language}\n{code}\n```")
    return paragraphs


def _result(remedy: RemedyRecord, *, is_enough: bool) -> str:
    """Return what a remedy did, in the words that matter for its kind."""
    if remedy.keeps_function:
        return _effect_on_function(remedy)
    if is_enough:
        return effect(remedy)
    return _outcome(remedy)


def _why_none(report: Report) -> str:
    """Return why no remedy was tried: no finding asks for one, or one does and still none was."""
    # 1. Which findings ask for one.
    codes = aims(report)
    if not codes:
        return "no finding asks for one"
    verb = "ask"
    if len(codes) == 1:
        verb = "asks"
    request = f"{', '.join(codes)} {verb} for one"

    # 2. What prevented it: an option, the state of the model, or the model's code.
    if report.settings.get("remedies") == "none":
        return (
            f"{request}, but remedies are switched off (--remedies none); --remedies first tries "
            "them"
        )
    if report.state == "trained":
        return (
            f"{request}, but the model is trained; --remedies begun tries what a run that has "
            "begun can take"
        )
    reason = _noted_reason(report) or "none is known, or the model cannot be copied"
    return f"{request}, but {reason}"


def _noted_reason(report: Report) -> str:
    """Return the reason that the audit noted for trying no remedy; "" if it noted none."""
    for note in report.notes:
        if note.startswith(_NOT_TRIED):
            return note.removeprefix(_NOT_TRIED)
    return ""


def _table(remedies: Sequence[RemedyRecord]) -> str:
    """Return all remedies in a table, below the model as it is."""
    rows = [
        "| remedy | worst branch norm | norm gain | left | enough | price |",
        "|:---|---:|---:|:---|:---|:---|",
        _row("(as it is)", remedies[0].before, "", ""),
    ]
    for remedy in remedies:
        enough = "no"
        if remedy.sufficient:
            enough = "yes"
        rows.append(_row(remedy.name, remedy.after, enough, remedy.price))
    return "\n".join(rows)


def _row(name: str, figures: Outlook, enough: str, price: str) -> str:
    """Return a line of the table: figures after a remedy, and the rules that it leaves."""
    # 1. The figures that were measured.
    branch, gain = "-", "-"
    if figures.branch_norm is not None:
        branch = between(*figures.branch_norm)
    if figures.norm_gain is not None:
        gain = three(figures.norm_gain)

    # 2. The rules that still fire, or cannot decide.
    remaining = [*figures.fired, *_undecided(figures)]
    left = ", ".join(remaining) or "no warning or error"
    return f"| {name} | {branch} | {gain} | {left} | {enough} | {price} |"


def _undecided(figures: Outlook) -> list[str]:
    """Return the rules that cannot decide after a remedy."""
    return [f"{code} undecided" for code in figures.undecided]


def _outcome(remedy: RemedyRecord) -> str:
    """Return what a remedy does, and what it leaves."""
    left = remedy.after.fired or _undecided(remedy.after)
    remainder = "not on every seed"
    if remedy.sufficient:
        remainder = "enough"
    elif left:
        remainder = f"left {', '.join(left)}"
    return f"{effect(remedy)} ({remainder})"


def _conditions(figures: Outlook) -> str:
    """Return how the two conditions of the paper come out after a remedy."""
    # 1. A condition whose rule was not run says nothing.
    small = _condition_status(figures, "JD101", figures.small_sublayers)
    large = _condition_status(figures, "JD102", figures.large_shortcut)
    small_at = judged_words(figures.small_sublayers_judged)
    large_at = judged_words(figures.large_shortcut_judged)
    judged = []
    if small != _NOT_SELECTED:
        judged.append(f"small sub-layers {status_words(small)}{small_at}")
    if large != _NOT_SELECTED:
        judged.append(f"large shortcut {status_words(large)}{large_at}")

    # 2. Both of them alike, or each by itself.
    are_alike = small == large and small_at == large_at
    if are_alike and small not in (_NOT_SELECTED, "not applicable"):
        return f"both conditions {status_words(small)}{small_at}"
    if judged and not are_alike:
        return ", ".join(judged)

    # 3. A model that is not pre-norm, or a choice of rules, is judged by other rules alone.
    if not figures.fired:
        return "no warning or error left"
    if small == _NOT_SELECTED:
        return "the two conditions were not selected"
    return "the conditions do not apply"


def _condition_status(figures: Outlook, code: str, status: str) -> str:
    """Return how a condition came out; "not selected" if its rule was not run.

    Args:
        figures: after a remedy.
        code: of the rule that judges the condition.
        status: "unknown" is also that of a condition that nobody judged.
    """
    # 1. A status that says something.
    if status != "unknown":
        return status

    # 2. Else the rule came to no answer, or was not run.
    judged = [*figures.undecided, *figures.fired]
    if code in judged:
        return status
    return _NOT_SELECTED


def _effect_on_function(remedy: RemedyRecord) -> str:
    """Return whether a remedy leaves the model's function as it is."""
    if not remedy.keeps_function:
        return f"tried on a copy: {effect(remedy)}"

    # How far the outputs of the copy are from those of the model.
    difference = remedy.function_change
    if difference is None:
        return "meant to keep the function; that could not be measured"
    if difference == 0:
        return "the function stays, to the last bit"
    return f"the function stays (outputs differ by {difference:.1e} at most, relative)"


def _on_seeds(remedy: RemedyRecord) -> str:
    """Return the seeds that a remedy was tried on, if they are several; of sequences, if one."""
    # 1. One seed.
    seeds = remedy.seeds
    is_one = remedy.sequences == 1
    if len(seeds) <= 1:
        return ", on one sequence" if is_one else ""

    # 2. Several seeds.
    named = f"{seeds[0]} to {seeds[-1]}"
    if len(seeds) == 2:
        named = f"{seeds[0]} and {seeds[-1]}"
    return f", on seeds {named}" + (", one sequence each" if is_one else "")
