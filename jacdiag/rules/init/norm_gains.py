"""Norm gains that are wrong by themselves, in whichever layer they stand."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from jacdiag.records import WeightRecord
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.grouping import group_by
from jacdiag.rules.init.layer_groups import MAJORITY
from jacdiag.rules.init.odd_parameter import Difference
from jacdiag.rules.init.weight_facts import has_spread, is_constant, mean_of, size_of, std_of

# Gains of one name, over all layers. Of fewer numbers a mean says little: around 0 or around 1 lie
# 8 errors apart only if the std is below 1/2, which a gain's is.
_LEAST_SIZE = 16
_ERRORS = 5  # standard errors that a mean may lie from that of its distribution
_LEAST = 3  # gains of a model: of two that differ nobody can say which is usual
# A factor. A gain of 1 + w is named if it is 2, so that is how far the size of a norm's output may
# be off.
_OFF = 2.0


def wrong_gains(gains: Sequence[WeightRecord]) -> Iterator[Difference]:
    """Yield the gains that no init means.

    They are 2 for 1, drawn around another number than 1, of a wrong length, or all zero.

    Args:
        gains: all norm gains of a model.
    """
    yield from _doubled(gains)
    yield from _not_around_one(gains)
    yield from _all_zero(gains)
    yield from _wrong_length(gains)


def gains_unlike_the_model(
    lonely: Sequence[WeightRecord], gains: Sequence[WeightRecord]
) -> Iterator[Difference]:
    """Yield gains unlike all others of the model: zero, or around another value.

    Only gains without their like in other layers are looked at.

    Args:
        lonely: gains of the model's width that were not compared over the layers.
        gains: all norm gains.
    """
    # 1. What is usual in this model. Of few gains, or of zeros, nothing is.
    if len(gains) < _LEAST:
        return

    usual = _usual_gain(gains)
    if not usual:
        return

    # 2. Zeros, and draws whose mean is not the usual value.
    others = f"two thirds or more of the model's gains are {plain(usual)}"
    for gain in lonely:
        is_zero_gain = _effective(gain) == 0
        if is_zero_gain or _is_drawn_off(gain, usual):
            yield Difference(gain, gain.pattern, 1, others, usual - gain.offset)


def _is_drawn_off(gain: WeightRecord, usual: float) -> bool:
    """Return whether a gain was drawn around another value than the usual one."""
    if is_constant(gain):
        return False

    # The mean of a draw is off by chance.
    return abs(_effective(gain) - usual) > error_of_mean(gain)


def _usual_gain(gains: Sequence[WeightRecord]) -> float | None:
    """Return the value that two thirds of the gains have; None if there is none."""
    constant = filter(is_constant, gains)
    values = list(map(_effective, constant))
    enough = MAJORITY * len(gains)

    # The first of them that enough others have.
    for value in values:
        alike = sum(math.isclose(value, other, rel_tol=1e-3) for other in values)
        if alike >= enough:
            return value

    return None


def _effective(gain: WeightRecord) -> float:
    """Return what a norm multiplies by: the mean of the gain, and 1 where the model adds it."""
    return gain.offset + mean_of(gain)


def error_of_mean(weight: WeightRecord) -> float:
    """Return how far the mean of a draw may lie from that of its distribution.

    The limit is five standard errors of the widest std.
    """
    widest = weight.upper or 0.0
    return _ERRORS * widest / math.sqrt(size_of(weight))


def _doubled(gains: Sequence[WeightRecord]) -> Iterator[Difference]:
    """Yield gains used as 1 + w whose w is 1."""
    others = "the model uses it as 1 + w, so that the gain is 2: a w of 0 is a gain of 1"
    for gain in gains:
        if _is_doubled(gain):
            yield Difference(gain, gain.pattern, _count_alike(gain, gains), others, 0.0)


def _is_doubled(gain: WeightRecord) -> bool:
    is_added_to_one = gain.offset == 1
    if not is_added_to_one or gain.family != "constant":
        return False

    return math.isclose(mean_of(gain), 1.0, rel_tol=1e-3)


def _not_around_one(gains: Sequence[WeightRecord]) -> Iterator[Difference]:
    """Yield gains that were drawn around another number than 1.

    They lie around 0 as a matrix does, or between 0 and 1.
    """
    # 1. The drawn gains by name; a model may use some of one name as w and others as 1 + w.
    drawn = filter(has_spread, gains)
    groups = group_by(drawn, lambda gain: (gain.pattern, gain.offset))

    # 2. Those whose mean over all layers cannot be that of a gain of 1.
    for (pattern, offset), members in groups.items():
        around = _other_center(members, offset)
        if not around:
            continue

        others = f"a gain starts at 1, or is drawn around 1; this one was drawn {around}"
        for gain in members:
            yield Difference(gain, pattern, _count_alike(gain, gains), others, 1.0 - offset)


def _other_center(members: Sequence[WeightRecord], offset: float) -> str:
    """Return around what gains of one name were drawn, in words; "" if that is 1."""
    # 1. Mean and std over all layers.
    count = sum(map(size_of, members))
    if count < _LEAST_SIZE:
        return ""

    mean = sum(size_of(gain) * mean_of(gain) for gain in members) / count
    variance = sum(size_of(gain) * std_of(gain) ** 2 for gain in members) / count
    error = _ERRORS * math.sqrt(variance) / math.sqrt(count)

    # 2. The mean compared with 1, then with 0.
    if abs(offset + mean - 1) <= error:
        return ""

    is_around_zero = abs(mean) <= error
    if offset == 0 and is_around_zero:
        return "around 0 as a matrix is"

    return f"around {plain(offset + mean)}"


def _all_zero(gains: Sequence[WeightRecord]) -> Iterator[Difference]:
    """Yield the gains of a model in which no norm has any other than zero.

    Every norm then returns its bias, or nothing.
    """
    if len(gains) < 2:
        return
    if not all(map(_is_zero_gain, gains)):
        return

    others = "every gain of the model is zero"
    for gain in gains:
        count = _count_alike(gain, gains)
        yield Difference(gain, gain.pattern, count, others, _ordinary_value(gain))


def _is_zero_gain(gain: WeightRecord) -> bool:
    return is_constant(gain) and _effective(gain) == 0


def _wrong_length(gains: Sequence[WeightRecord]) -> Iterator[Difference]:
    """Yield gains of one number in norms that divide by a length.

    Only those are yielded whose norm returns values far from a size of 1.
    """
    for gain in gains:
        if gain.norm_length is None or not is_constant(gain):
            continue

        # 1. The root mean square of what the norm returns.
        root = math.sqrt(gain.norm_length)
        size = abs(_effective(gain)) / root
        is_near_one = 1 / _OFF < size < _OFF
        if size == 0 or is_near_one:
            continue

        # 2. It is far from 1.
        others = (
            f"its norm divides by the length of {gain.norm_length} numbers, so that what it "
            f"returns has a root mean square of {plain(size)}: ScaleNorm starts at "
            f"√{gain.norm_length} = {plain(root)}"
        )
        count = _count_alike(gain, gains)
        yield Difference(gain, gain.pattern, count, others, _ordinary_value(gain))


def _ordinary_value(gain: WeightRecord) -> float:
    """Return what a gain holds if its norm returns numbers of a root mean square of 1."""
    usual = 1.0
    if gain.norm_length:
        usual = math.sqrt(gain.norm_length)
    return usual - gain.offset


def _count_alike(gain: WeightRecord, gains: Sequence[WeightRecord]) -> int:
    return sum(other.pattern == gain.pattern for other in gains)
