"""What changed between two models: by kind of figure, and what changed most in each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jacdiag.comparison.match import Pair
from jacdiag.render.content.columns import figure_words
from jacdiag.render.content.compared_figures import (
    OUTSIDE,
    PARTS,
    change_size,
    change_words,
    factor_words,
    place_words,
)
from jacdiag.render.content.sentences import legible, plural

_KINDS = ("branch_norm", "core_norm", "norm_gain", "shortcut_std", "std")
_KIND_WORDS = {"std": "weight std"}
_MOST_LAYERS = 12  # that a summary lists, one a line


@dataclass(frozen=True)
class KindSummary:
    """How one kind of figure changed.

    Attributes:
        kind: "branch norm", "weight std" or another one.
        text: how many grew and shrank, and which changed most.
    """

    kind: str
    text: str


@dataclass(frozen=True)
class LayerSummary:
    """The figure of one layer that changed most.

    Attributes:
        where: "layer 3".
        what: "FFN core norm".
        change: "0.36 to 0.38 -> 42.7 to 43.9".
        factor: "119 times larger".
    """

    where: str
    what: str
    change: str
    factor: str


@dataclass(frozen=True)
class ChangeSummary:
    """What changed between two models: a figure counts only if its intervals are apart.

    Attributes:
        kinds: one for each kind of figure that changed somewhere.
        layers: what changed most in each layer, in the order of depth.
        layers_left_out: how many further layers changed less.
        in_one_alone: how many sub-layers and weights one of the models lacks.
    """

    kinds: list[KindSummary]
    layers: list[LayerSummary]
    layers_left_out: int
    in_one_alone: int

    @property
    def lines(self) -> list[str]:
        """The summary as lines of plain text; none if nothing changed."""
        lines: list[str] = []
        # 1. By kind of figure.
        if self.kinds or self.in_one_alone:
            lines.append("what changed (both intervals are apart):")
        width = max((len(kind.kind) for kind in self.kinds), default=0)
        lines += [f"  {kind.kind:<{width}}  {kind.text}" for kind in self.kinds]
        if self.in_one_alone:
            lines.append(f"  in one model alone: {self.in_one_alone} sub-layers or weights")

        # 2. By layer.
        if self.layers:
            lines.append("what changed most in each layer:")
            lines += self._layer_lines()
        if self.layers_left_out:
            others = plural(self.layers_left_out, "further layer")
            lines.append(f"  {others} changed less; the table has them")
        return lines

    def _layer_lines(self) -> list[str]:
        """Return the layers, a line each, with their words below each other."""
        rows = [(layer.where, layer.what, layer.change) for layer in self.layers]
        widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
        lines = []
        for row, layer in zip(rows, self.layers, strict=True):
            cells = "  ".join(map(str.ljust, row, widths))
            lines.append(f"  {cells}  {layer.factor}")
        return lines


def summarize_changes(pairs: Sequence[Pair]) -> ChangeSummary:
    """Return what changed between two models, by kind of figure and by layer.

    Args:
        pairs: every pair of figures, in the order of depth.
    """
    # 1. The figures that both have, and those of them whose intervals are apart.
    in_both: list[Pair] = []
    in_one_alone = 0
    for pair in pairs:
        if pair.old and pair.new:
            in_both.append(pair)
        elif pair.parts and not (pair.a and pair.b):
            in_one_alone += 1
    changed = [pair for pair in in_both if pair.parts]

    # 2. By kind.
    kinds = []
    for figure in _KINDS:
        kind = _kind_summary(figure, in_both)
        if kind is not None:
            kinds.append(kind)

    # 3. By layer: those that changed most, in the order of depth.
    largest = _largest_by_layer(changed)
    by_size = sorted(range(len(largest)), key=lambda place: -change_size(largest[place]))
    places = sorted(by_size[:_MOST_LAYERS])
    return ChangeSummary(
        kinds=kinds,
        layers=[_layer_summary(largest[place]) for place in places],
        layers_left_out=len(largest) - len(places),
        in_one_alone=in_one_alone,
    )


def _kind_summary(figure: str, in_both: Sequence[Pair]) -> KindSummary | None:
    """Return how one kind of figure changed; None if none of it did.

    Args:
        figure: the kind.
        in_both: the figures that both models have.
    """
    # 1. How many there are of this kind, and those that changed.
    total = 0
    changed: list[Pair] = []
    for pair in in_both:
        if pair.figure != figure:
            continue
        total += 1
        if pair.parts:
            changed.append(pair)
    if not changed:
        return None

    # 2. In words.
    words = _KIND_WORDS.get(figure, figure_words(figure))
    return KindSummary(words, _kind_text(changed, total))


def _kind_text(changed: Sequence[Pair], total: int) -> str:
    """Return how many figures of a kind grew and shrank, and which changed most.

    Args:
        changed: those of the kind whose intervals are apart.
        total: how many of the kind both models have.
    """
    counts = " and ".join(_counts_by_direction(changed))
    most = max(changed, key=change_size)
    text = f"{counts}, of {total}; most: {place_words(most)} {change_words(most)}"
    return f"{text}, {factor_words(most)}"


def _counts_by_direction(changed: Sequence[Pair]) -> list[str]:
    """Return how many figures grew and how many shrank, each in words."""
    # 1. Count both.
    grew = 0
    shrank = 0
    for pair in changed:
        assert pair.old is not None and pair.new is not None
        _, old, _ = pair.old
        _, new, _ = pair.new
        grew += new > old
        shrank += new < old

    # 2. A figure that is NaN in one model has done neither.
    lost = len(changed) - grew - shrank

    # 3. Leave out what has not happened.
    counts = {"grew": grew, "shrank": shrank, "not a number in one model": lost}
    return [f"{count} {words}" for words, count in counts.items() if count]


def _largest_by_layer(changed: Sequence[Pair]) -> list[Pair]:
    """Return the pair of each layer that changed most, in the order of the pairs."""
    largest: dict[int | None, Pair] = {}
    for pair in changed:
        known = largest.setdefault(pair.depth, pair)
        is_larger = change_size(pair) > change_size(known)
        if is_larger:
            largest[pair.depth] = pair

    # A dict keeps the order in which the depths came.
    return list(largest.values())


def _layer_summary(pair: Pair) -> LayerSummary:
    """Return the line of a layer about the figure that changed most in it."""
    where = OUTSIDE
    if pair.depth is not None:
        where = f"layer {pair.depth}"
    what = f"{PARTS.get(pair.part, pair.part)} {figure_words(pair.figure)}"
    return LayerSummary(where, legible(what), change_words(pair), factor_words(pair))
