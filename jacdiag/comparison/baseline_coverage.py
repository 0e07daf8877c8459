"""What a comparison with a baseline does not cover, and what is lost when one is written again."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

from jacdiag.records import FiguresRecord

_SHOWN = 3  # names in a sentence; the others are counted


# -- the sizes of two models -----------------------------------------------------------------------
class ModelSize(Protocol):
    """The size of a model, as a baseline and a report hold it."""

    @property
    def layers(self) -> int:
        """The depth."""

    @property
    def width(self) -> int | None:
        """The width of the residual stream; None if it is not known."""

    @property
    def parameters(self) -> int:
        """How many parameters there are."""


def differs_in_size(now: ModelSize, before: ModelSize) -> bool:
    """Return whether two models have another depth or width, so that no figure can be compared.

    A scheme such as 0.02/sqrt(2*N) draws other weights for another depth, and every norm depends on
    the width.

    Args:
        now: the size of the model that is checked.
        before: that of the baseline.
    """
    if now.layers != before.layers:
        return True

    # A model whose width is not known may have any.
    is_known = now.width is not None and before.width is not None
    return is_known and now.width != before.width


def describe_size(size: ModelSize) -> str:
    """Return depth, width and parameters of a model in words.

    >>> describe_size(FiguresRecord(model="GPT", parameters=41856, layers=2, width=32, seeds=1))
    '2 layers, width 32, 41,856 parameters'
    """
    words = [_count(size.layers, "layer")]
    if size.width is not None:
        words.append(f"width {size.width}")
    words.append(f"{size.parameters:,} parameters")
    return ", ".join(words)


# -- what was not compared -------------------------------------------------------------------------
def describe_uncompared(
    now: FiguresRecord, before: FiguresRecord, *, is_traced: bool = True
) -> list[str]:
    """Return a sentence for each kind of figure that only one of two models has.

    Args:
        now: the figures of the model that is checked.
        before: those of the baseline.
        is_traced: whether the model ran. The tensors of a bare file may be buffers, so that their
            number is not that of the parameters.

    Returns:
        The sentences, without a full stop; [] if everything was compared.
    """
    # 1. Norms, if one side measured none at all.
    sentences = []
    has_norms_on_both_sides = bool(now.sublayers) and bool(before.sublayers)
    if before.sublayers and not now.sublayers:
        count = _count(len(before.sublayers), "sub-layer")
        sentences.append(
            f"the norms of {count} in the baseline were not compared: none was measured now"
        )
    if now.sublayers and not before.sublayers:
        sentences.append(
            "norms were not compared: the baseline holds weights alone; write it again without "
            "--contract-only"
        )

    # 2. Sub-layers and weights that only one side has.
    if has_norms_on_both_sides:
        sentences += _of_one_side_alone("sub-layer", now.sublayers, before.sublayers)
    sentences += _of_one_side_alone("weight", now.weights, before.weights)

    # 3. Figures that one side lacks, of what both have.
    missing = _missing_figures(now, before)
    if missing:
        sentences.append(f"measured on one side alone, and not compared: {_listed(missing)}")

    # 4. Weights of another shape were compared, which is worth knowing.
    reshaped = _reshaped(now, before)
    if reshaped:
        sentences.append(f"compared, although the shape differs: {_listed(reshaped)}")

    # 5. A baseline of an earlier version holds no shapes: then the count of parameters must do.
    has_other_count = is_traced and now.parameters != before.parameters
    if has_other_count and not sentences:
        sentences.append(
            f"the model has {now.parameters:,} parameters, that of the baseline "
            f"{before.parameters:,}; all names are in both"
        )

    # 6. The way out.
    has_other_names = now.weights.keys() != before.weights.keys()
    if has_other_names or has_other_count or reshaped:
        sentences.append("if the change is meant, --write-baseline records the model as it is now")
    return sentences


def _of_one_side_alone(noun: str, now: Collection[str], before: Collection[str]) -> list[str]:
    """Return a sentence about names that are new, and one about names that are gone.

    Args:
        noun: what has the names.
        now: the names of the model that is checked.
        before: those of the baseline.
    """
    sentences = []

    # 1. What is new has nothing to be compared with.
    added = [name for name in now if name not in before]
    if added:
        count = _count(len(added), noun)
        sentences.append(f"{count} not in the baseline, and not compared: {_listed(added)}")

    # 2. What is gone.
    gone = [name for name in before if name not in now]
    if gone:
        count = _count(len(gone), noun)
        sentences.append(f"{count} of the baseline not in the model: {_listed(gone)}")

    return sentences


def _missing_figures(now: FiguresRecord, before: FiguresRecord) -> list[str]:
    """Return the figures that one side lacks, of sub-layers that both have."""
    missing = []
    for name, figures in now.sublayers.items():
        earlier = before.sublayers.get(name)
        if earlier is None:
            continue

        # In the order in which they are written.
        for figure in dict.fromkeys([*earlier, *figures]):
            is_on_both_sides = figure in earlier and figure in figures
            if not is_on_both_sides:
                missing.append(f"{figure.replace('_', ' ')} of {name}")
    return missing


def _reshaped(now: FiguresRecord, before: FiguresRecord) -> list[str]:
    """Return the weights whose shape differs, with both shapes."""
    reshaped = []
    for name, weight in now.weights.items():
        # A baseline of an earlier version holds no shapes.
        new = weight.get("shape")
        old = before.weights.get(name, {}).get("shape")
        if not new or not old:
            continue

        if new != old:
            reshaped.append(f"{name} ({_size(old)} -> {_size(new)})")
    return reshaped


# -- a baseline that is written again --------------------------------------------------------------
def describe_losses(new: FiguresRecord, old: FiguresRecord) -> list[str]:
    """Return a sentence for each thing that a baseline had, and the one in its place has not.

    Args:
        new: the figures that are written.
        old: those that stood in the file.

    Returns:
        The sentences, without a full stop; [] if the new baseline checks as much as the old one.
    """
    losses = []

    # 1. The norms, which a baseline of weights alone has not.
    if old.sublayers and not new.sublayers:
        count = _count(len(old.sublayers), "sub-layer")
        losses.append(
            f"the norms of {count} are gone from it: none was measured; the same command without "
            "--contract-only measures them"
        )

    # 2. Seeds, which show how much a figure varies.
    if new.seeds < old.seeds:
        seeds = _count(new.seeds, "seed")
        losses.append(
            f"it holds {seeds} and held {old.seeds}: how much a figure varies is less well known; "
            f"--seeds {old.seeds} measures as many"
        )
    return losses


# -- words -----------------------------------------------------------------------------------------
def _listed(names: Sequence[str]) -> str:
    """Return the first of some names, and how many more there are."""
    text = ", ".join(names[:_SHOWN])
    more = len(names) - _SHOWN
    if more > 0:
        text += f" and {more} more"
    return text


def _size(shape: Iterable[int]) -> str:
    """Return a shape in words, such as "64 x 256"."""
    return " x ".join(map(str, shape))


def _count(number: int, noun: str) -> str:
    """Return a count with its noun."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}s"
