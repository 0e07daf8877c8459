"""The error of a model in which no residual sub-layer was found."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from jacdiag.errors import TraceError
from jacdiag.trace.discovery.detached import CutAddition, cut_additions, cut_off_parts
from jacdiag.trace.discovery.weight_roles import NUMBER
from jacdiag.trace.site_list import Sites

_MOST_CUTS = 3  # detached operands that are listed
_MOST_PATTERNS = 8  # names of parameters that are listed


def nothing_found(sites: Sites, frozen: Collection[str] | None = None) -> TraceError:
    """Return the error of a model without any sub-layer, with what may hide one.

    Args:
        sites: the record.
        frozen: names of the parameters that take no part in training. Without them, no parameter is
            said to miss its gradient.
    """
    # 1. What was recorded, and what may hide a sum.
    cuts = cut_additions(sites.graph, sites.finder)
    lost: list[str] = []
    if frozen is not None:
        lost = _parameters_cut_off(sites, frozen)
    lines = [
        f"{len(sites.graph.nodes)} recorded calls, none of them an addition of a value and a "
        "function of it with a matrix product between",
        *(f"hidden: {line}" for line in sites.hidden),
        *_lines_of_cuts(cuts),
    ]
    if lost:
        lines.append(
            "every recorded way to the output passes a detach, so that no gradient arrives: "
            f"{_patterns(lost)}"
        )

    # 2. What to do next.
    hint = (
        "jacdiag looks for y = a x + f(x) in the dataflow; `jacdiag sites SOURCE` shows what was "
        "recorded, and jacdiag.declare (or [tool.jacdiag.sites]) names what a fused operation hides"
    )

    # A frozen branch before a detach is meant, and then there is nothing to add.
    cuts_a_shortcut = any(cut.operand == "shortcut" for cut in cuts)
    is_meant = frozen is not None and not lost and not cuts_a_shortcut
    if cuts and not is_meant:
        hint = (
            f"add the {cuts[0].operand} itself, without the detach; "
            "if the detach is intended, freeze what lies before it"
        )
    return TraceError(
        "no residual sub-layer was found", got="\n".join(lines), hint=hint, parameters=lost
    )


def _lines_of_cuts(cuts: Sequence[CutAddition]) -> list[str]:
    """Return a line for each detached operand, at most three of them."""
    lines: list[str] = []
    for cut in cuts[:_MOST_CUTS]:
        # The model itself has no name.
        module = cut.module or "the model"
        lines.append(f"a detach at {cut.line} cuts the {cut.operand} of an addition in {module}")

    # How many are not listed.
    more = len(cuts) - _MOST_CUTS
    if more > 0:
        lines.append(f"and {more} more")
    return lines


def _parameters_cut_off(sites: Sites, frozen: Collection[str]) -> list[str]:
    """Return the parameters in training that lie before a detach.

    The list is empty if code that was not recorded ran too, since it may read them.
    """
    if sites.graph.foreign:
        return []

    # Those of every part that a detach cuts off.
    trained = set(sites.skeleton.params) - set(frozen)
    names: list[str] = []
    for part in cut_off_parts(sites.graph, trained):
        names += part
    return names


def _patterns(names: Iterable[str]) -> str:
    """Return names in a sentence, those that differ in numbers alone as one."""
    patterns = list(dict.fromkeys(NUMBER.sub("*", name) for name in names))
    more = len(patterns) - _MOST_PATTERNS
    text = ", ".join(patterns[:_MOST_PATTERNS])

    # A long list is cut off.
    if more <= 0:
        return text
    return f"{text} and {more} more"
