"""Name the mistake that turns an expected std into the one that was measured.

One matrix proves little. Where an FFN is four times as wide as the model, a factor of 2 is also the
root of fan_out over fan_in. So the cause of a wrong factor is named only on two conditions. The
formula, computed with that mistake, gives the std that was measured: a formula without fans cannot
be wrong because they were exchanged. And several matrices confirm it: all layers of one name, or
matrices of different sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from jacdiag.records import WeightRecord
from jacdiag.rules.init.depth_scaling import depth_factor, depth_mistake
from jacdiag.rules.init.mistaken_formulas import exchanged
from jacdiag.rules.init.scheme_fit import Mismatch, Yardstick, holds, variables
from jacdiag.rules.init.weight_facts import is_constant, is_zero

LINEAR_DEFAULT = "PyTorch's default for nn.Linear"
_PROJECTIONS = ("W_Q", "W_K", "W_V", "W_QK", "W_QV", "W_KV", "W_QKV")
_SIZES = frozenset({"fan_in", "fan_out", "d"})  # what a formula may read of the sizes of a matrix
_FEWEST = 2  # matrices that confirm a mistake


def find_mistakes(
    yardstick: Yardstick, mismatches: Sequence[Mismatch], count_of_pattern: Mapping[str, int]
) -> list[str]:
    """Return the mistake that each mismatch looks like; "" where none is known.

    Args:
        yardstick: What the weights were compared with.
        mismatches: All of one model.
        count_of_pattern: How many weights were compared that have the same name pattern.
    """
    # 1. What each may be, taken alone.
    suspicions = [_suspicions(yardstick, mismatch) for mismatch in mismatches]

    # 2. Who shares each suspicion.
    sharing: dict[str, list[Mismatch]] = {}
    for mismatch, mistakes in zip(mismatches, suspicions, strict=True):
        for mistake in mistakes:
            sharing.setdefault(mistake, []).append(mismatch)

    # 3. The first that is plain to see, or that others confirm.
    result = []
    for mismatch, mistakes in zip(mismatches, suspicions, strict=True):
        name = _plain_sign(yardstick, mismatch)
        for mistake in mistakes:
            if not name and _is_confirmed(mismatch, sharing[mistake], count_of_pattern):
                name = mistake

        # The default of nn.Linear may be a mistake of the formula, too, which says more.
        if not name and is_linear_default(mismatch.piece.weight):
            name = LINEAR_DEFAULT
        result.append(name)

    return result


def is_linear_default(weight: WeightRecord) -> bool:
    """Return whether a weight is a uniform draw between -1/sqrt(fan_in) and 1/sqrt(fan_in)."""
    fan_in = weight.fan_in
    if not fan_in or weight.family != "uniform":
        return False

    # The std of such a draw is its bound over the root of 3.
    return holds(weight, 1 / math.sqrt(3 * fan_in))


def _plain_sign(yardstick: Yardstick, mismatch: Mismatch) -> str:
    """Return what one weight alone shows; "" for nothing."""
    # 1. Weights without a std.
    weight = mismatch.piece.weight
    if is_zero(weight):
        return "all of it is zero"
    if _has_no_factor(mismatch):
        return ""

    # 2. The mistake of the entire model.
    if yardstick.looks:
        return yardstick.looks

    # 3. The default of a function.
    is_unit_std = holds(weight, 1.0)
    if is_unit_std and mismatch.value < 1.0:
        return "the default std of torch.nn.init.normal_ is 1"
    return ""


def _has_no_factor(mismatch: Mismatch) -> bool:
    """Return whether a weight is no multiple of what was expected: one of the two has no std."""
    return is_constant(mismatch.piece.weight) or mismatch.value <= 0


# -- what may be confirmed ------------------------------------------------------------------------
def _is_confirmed(
    mismatch: Mismatch, sharing: Sequence[Mismatch], count_of_pattern: Mapping[str, int]
) -> bool:
    """Return whether several matrices show the mistake that a mismatch may be.

    Args:
        mismatch: One of those that share the suspicion.
        sharing: All that share it.
        count_of_pattern: How many weights have the same name pattern.
    """
    # 1. Matrices of different sizes.
    sizes = set(map(_sizes_of, sharing))
    are_different = len(sizes) >= _FEWEST
    if are_different:
        return True

    # 2. One layer alone confirms nothing.
    count = count_of_pattern[mismatch.piece.weight.pattern]
    has_several_layers = count >= _FEWEST
    if not has_several_layers:
        return False

    # 3. All layers of its name.
    names = list(map(_name_of, sharing))
    return names.count(_name_of(mismatch)) == count


def _sizes_of(mismatch: Mismatch) -> tuple[int | None, int | None]:
    """Return the sizes of the linear map that a weight, or its section, makes."""
    weight = mismatch.piece.weight
    return weight.fan_in, weight.fan_out


def _name_of(mismatch: Mismatch) -> tuple[str, str]:
    """Return the name pattern of a weight, and its section."""
    return mismatch.piece.weight.pattern, mismatch.piece.section


def _suspicions(yardstick: Yardstick, mismatch: Mismatch) -> list[str]:
    """Return the mistakes with which a formula gives what was measured, the most specific first."""
    if _has_no_factor(mismatch):
        return []

    # 1. Each mistake that is known.
    factor = depth_factor(yardstick, mismatch)
    mistakes = [
        _scaled_by_head(yardstick, mismatch),
        depth_mistake(mismatch.piece.weight.role, factor),
        _squared(yardstick, mismatch),
        _fans_exchanged(yardstick, mismatch),
    ]

    # 2. Those that explain the weight.
    return [mistake for mistake in mistakes if mistake]


def _reads_sizes(mismatch: Mismatch) -> bool:
    """Return whether the expected value depends on the sizes of the matrix."""
    return not _SIZES.isdisjoint(mismatch.formula.names)


def _scaled_by_head(yardstick: Yardstick, mismatch: Mismatch) -> str:
    """Return that the std is that of an input as wide as one head; "" if it is not."""
    weight = mismatch.piece.weight
    head = yardstick.contract.sizes.get("d_head")
    if weight.role not in _PROJECTIONS or not head:
        return ""

    # 1. With one head there is nothing to confuse.
    known = variables(yardstick.contract, weight, yardstick.s)
    if known.get("fan_in") == head:
        return ""

    # 2. The formula, with the width of a head for that of the input.
    if not _reads_sizes(mismatch):
        return ""
    value = mismatch.formula.value({**known, "fan_in": head, "d": head})
    if not _explains(yardstick, mismatch, value):
        return ""
    return "scaled by the width of a head, not by that of its input"


def _squared(yardstick: Yardstick, mismatch: Mismatch) -> str:
    """Return that the std is the square of the expected one, or its root; "" if it is neither.

    Of a formula that reads the sizes, that is a variance in its place. A plain number may be the
    square of another by chance, so that only the number is said.
    """
    # 1. The square.
    value = mismatch.value
    if _explains(yardstick, mismatch, value * value):
        words = "about the square of that"

    # 2. The root.
    elif _explains(yardstick, mismatch, math.sqrt(value)):
        words = "about the square root of that"
    else:
        return ""

    # 3. What it means.
    if _reads_sizes(mismatch):
        return "std and variance confused"
    return words


def _fans_exchanged(yardstick: Yardstick, mismatch: Mismatch) -> str:
    """Return that the std is that of the transposed matrix; "" if it is not."""
    known = variables(yardstick.contract, mismatch.piece.weight, yardstick.s)
    value = exchanged(mismatch.formula, known)
    if not _explains(yardstick, mismatch, value):
        return ""
    return "fan_in and fan_out confused"


def _explains(yardstick: Yardstick, mismatch: Mismatch, value: float | None) -> bool:
    """Return whether a mistaken formula gives what was measured, and another value than the right.

    Args:
        yardstick: What the weight was compared with.
        mismatch: The weight.
        value: Of the mistaken formula; None if it has none.
    """
    # 1. A formula has no value if the model lacks one of its variables.
    if value is None:
        return False

    # 2. A mistake that changes nothing explains nothing.
    is_same = value == mismatch.value
    return not is_same and holds(mismatch.piece.weight, value, yardstick.spread)
