"""One figure of two models, in words: where it is, both values, and by which factor they differ."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jacdiag.comparison.match import Ends, Pair
from jacdiag.records.number_format import between, three
from jacdiag.render.content.columns import figure_words
from jacdiag.render.content.sentences import legible

PARTS = {"mlp": "FFN", "moe": "MoE"}  # what a kind of sub-layer is called in a sentence
OUTSIDE = "outside the layers"


# -- one figure ------------------------------------------------------------------------------------
def place_words(pair: Pair) -> str:
    """Return where a figure is: "layer 3 FFN".

    Args:
        pair: of one figure.
    """
    where = OUTSIDE
    if pair.depth is not None:
        where = f"layer {pair.depth}"
    words: str = legible(f"{where} {PARTS.get(pair.part, pair.part)}")
    return words


def ends_words(pair: Pair, ends: Ends, *, with_range: bool = True) -> str:
    """Return one figure of one model.

    A norm is written as its interval, a median with the range around it if that is wide.

    Args:
        pair: of the figure.
        ends: of one of the models.
        with_range: write the range around a median.
    """
    # 1. A norm.
    lower, middle, upper = ends
    if pair.figure.endswith("_norm"):
        return between(lower, upper)

    # 2. A median.
    is_wide = lower <= 0 or upper > lower * 1.1
    if is_wide and with_range:
        return f"{three(middle)} ({between(lower, upper)})"
    return three(middle)


def cell_words(pair: Pair, ends: Ends | None, name: str, *, with_range: bool = True) -> str:
    """Return one figure of one model, or that it has none.

    Args:
        pair: of the figure.
        ends: of the model; None without a figure.
        name: of the part in the model; "" if the model lacks it.
        with_range: write the range around a median.
    """
    if ends is not None:
        return ends_words(pair, ends, with_range=with_range)

    # 1. No figure, since the model lacks the part.
    if not name:
        return "missing"

    # 2. A sub-layer of one model alone has a pair without figures.
    if pair.figure == "sub-layer":
        return "present"

    # 3. No figure of a part that is there.
    return "not measured"


def change_words(pair: Pair) -> str:
    """Return both values of a figure: "5.80 to 6.05 -> 39.0 to 40.9".

    Args:
        pair: of one figure that both models have.
    """
    assert pair.old is not None and pair.new is not None
    return f"{ends_words(pair, pair.old)} -> {ends_words(pair, pair.new)}"


def factor_words(pair: Pair) -> str:
    """Return by which factor a figure changed: "6.73 times larger".

    Args:
        pair: of one figure that both models have.
    """
    # 1. Values without a ratio.
    ratio = pair.ratio
    if ratio is None:
        return "0 in A"
    if not math.isfinite(ratio):
        return "not finite in one model"
    if ratio == 0:
        return "0 in B"

    # 2. No factor that is 1 to three digits.
    if "1.00" in (three(ratio), three(1 / ratio)):
        return "less than 1% apart"

    # 3. The larger of the two over the smaller.
    if ratio >= 1:
        return f"{three(ratio)} times larger"
    return f"{three(1 / ratio)} times smaller"


def change_size(pair: Pair) -> float:
    """Return by how much a figure differs: the logarithm of its ratio, inf without one.

    Args:
        pair: of one figure.
    """
    ratio = pair.ratio
    if ratio is None:
        return math.inf

    # 0 and what is not finite have no logarithm.
    has_logarithm = 0 < ratio < math.inf
    if not has_logarithm:
        return math.inf
    return abs(math.log(ratio))


# -- all figures -----------------------------------------------------------------------------------
def verdict(pairs: Sequence[Pair]) -> str:
    """Return one sentence: which figure differs first, and how many do.

    Args:
        pairs: every pair of figures, in the order of depth.
    """
    if not pairs:
        return "nothing in one model has a counterpart in the other"

    # 1. The figures that differ. One that a model lacks, or was not measured, was not compared.
    different = [pair for pair in pairs if pair.parts]
    uncompared = 0
    for pair in pairs:
        is_in_both = pair.old is not None and pair.new is not None
        if not is_in_both and not pair.parts:
            uncompared += 1
    figures = len(pairs) - uncompared
    tail = ""
    if uncompared:
        tail = f"; {uncompared} more could not be compared"
    if not different:
        return f"{_without_difference(figures)}{tail}"

    # 2. The first of them, without control characters in its name.
    counts = _count_of_differences(len(different), figures)
    sentence: str = legible(f"{_first_difference(different[0])}; {counts}{tail}")
    return sentence


def _without_difference(figures: int) -> str:
    """Return that no figure differs, in words."""
    if not figures:
        return "no figure was compared"
    if figures == 1:
        return "the one figure does not differ beyond its interval"
    return f"none of {figures} figures differs beyond its interval"


def _count_of_differences(different: int, figures: int) -> str:
    """Return how many figures differ, in words."""
    if figures == 1:
        return "it is the only figure"
    if different == 1:
        return f"1 of {figures} figures differs"
    return f"{different} of {figures} figures differ"


def _first_difference(pair: Pair) -> str:
    """Return where two models differ first, with both values and the names in both."""
    # 1. Where.
    where = "outside the layers"
    if pair.depth is not None:
        where = f"in layer {pair.depth}"
    text = f"they differ first {where}: {pair.part} {figure_words(pair.figure)}"

    # 2. The values, unless neither has one.
    if pair.old or pair.new:
        text += f" {cell_words(pair, pair.old, pair.a)} and {cell_words(pair, pair.new, pair.b)}"
    return f"{text} ({_both_names(pair)})"


def _both_names(pair: Pair) -> str:
    """Return what both models call a part: one name if they agree."""
    # 1. One name.
    if pair.a == pair.b:
        return pair.a

    # 2. Two names, or one that the other model lacks.
    first = pair.a or "nothing"
    second = pair.b or "nothing"
    return f"{first} and {second}"
