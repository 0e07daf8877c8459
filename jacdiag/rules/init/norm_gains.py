"""Norm gains that are wrong by themselves, in whichever layer they stand."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from jacdiag.records import WeightRecord
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.init.layer_groups import DRAWN, MAJORITY, is_constant
from jacdiag.rules.init.odd_parameter import Difference

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
    # 1. What is usual in this model.
    usual = _usual_gain(gains)
    if usual is None or usual == 0:
        return
    if len(gains) < _LEAST:
        return

    # 2. Zeros, and draws whose mean is not the usual value.
    others = f"two thirds or more of the model's gains are {plain(usual)}"
    for gain in lonely:
        value = _effective(gain)
        is_off = not is_constant(gain) and abs(value - usual) > error_of_mean(gain)
        if value == 0 or is_off:
            yield Difference(gain, gain.pattern, 1, others, usual - gain.offset)


def _usual_gain(gains: Sequence[WeightRecord]) -> float | None:
    """Return the value that two thirds of the gains have; None if there is none."""
    values = [_effective(gain) for gain in gains if is_constant(gain)]
    enough = MAJORITY * len(gains)

    for value in values:
        alike = sum(math.isclose(value, other, rel_tol=1e-3) for other in values)
        if alike >= enough:
            return value
    return None


def _effective(gain: WeightRecord) -> float:
    """Return what a norm multiplies by: the mean of the gain, and 1 where the model adds it."""
    return gain.offset + (gain.mean or 0.0)


def error_of_mean(weight: WeightRecord) -> float:
    """Return how far the mean of a draw may lie from that of its distribution.

    The limit is five standard errors of the widest std.
    """
    return _ERRORS * (weight.upper or 0.0) / math.sqrt(math.prod(weight.shape))


def _doubled(gains: Sequence[WeightRecord]) -> Iterator[Difference]:
    """Yield gains used as 1 + w whose w is 1."""
    others = "the model uses it as 1 + w, so that the gain is 2: a w of 0 is a gain of 1"
    for gain in gains:
        if gain.offset != 1 or gain.family != "constant":
            continue
        is_one = math.isclose(gain.mean or 0.0, 1.0, rel_tol=1e-3)
        if is_one:
            yield Difference(gain, gain.pattern, _count_alike(gain, gains), others, 0.0)


def _not_around_one(gains: Sequence[WeightRecord]) -> Iterator[Difference]:
    """Yield gains that were drawn around another number than 1.

    They lie around 0 as a matrix does, or between 0 and 1.
    """
    # 1. The drawn gains by name; a model may use some of one name as w and others as 1 + w.
    by_pattern: dict[tuple[str, float], list[WeightRecord]] = {}
    for gain in gains:
        if gain.family in DRAWN and gain.std:
            by_pattern.setdefault((gain.pattern, gain.offset), []).append(gain)

    # 2. Those whose mean over all layers cannot be that of a gain of 1.
    for (pattern, offset), members in by_pattern.items():
        around = _other_center(members, offset)
        if not around:
            continue
        others = f"a gain starts at 1, or is drawn around 1; this one was drawn {around}"
        for gain in members:
            yield Difference(gain, pattern, _count_alike(gain, gains), others, 1.0 - offset)


def _other_center(members: Sequence[WeightRecord], offset: float) -> str:
    """Return around what gains of one name were drawn, in words; "" if that is 1."""
    # 1. Mean and std over all layers.
    sizes = [math.prod(gain.shape) for gain in members]
    count = sum(sizes)
    if count < _LEAST_SIZE:
        return ""
    pairs = list(zip(sizes, members, strict=True))
    mean = sum(size * (gain.mean or 0.0) for size, gain in pairs) / count
    std = math.sqrt(sum(size * (gain.std or 0.0) ** 2 for size, gain in pairs) / count)

    # 2. The mean compared with 1, then with 0.
    error = _ERRORS * std / math.sqrt(count)
    if abs(offset + mean - 1) <= error:
        return ""
    if offset == 0 and abs(mean) <= error:
        return "around 0 as a matrix is"
    return f"around {plain(offset + mean)}"


def _all_zero(gains: Sequence[WeightRecord]) -> Iterator[Difference]:
    """Yield the gains of a model in which no norm has any other than zero.

    Every norm then returns its bias, or nothing.
    """
    if len(gains) < 2:
        return
    are_zero = all(is_constant(gain) and _effective(gain) == 0 for gain in gains)
    if not are_zero:
        return

    others = "every gain of the model is zero"
    for gain in gains:
        count, usual = _count_alike(gain, gains), _ordinary_value(gain)
        yield Difference(gain, gain.pattern, count, others, usual)


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
        if size == 0 or 1 / _OFF < size < _OFF:
            continue

        # 2. It is far from 1.
        others = (
            f"its norm divides by the length of {gain.norm_length} numbers, so that what it "
            f"returns has a root mean square of {plain(size)}: ScaleNorm starts at "
            f"√{gain.norm_length} = {plain(root)}"
        )
        count, usual = _count_alike(gain, gains), _ordinary_value(gain)
        yield Difference(gain, gain.pattern, count, others, usual)


def _ordinary_value(gain: WeightRecord) -> float:
    """Return what a gain holds if its norm returns numbers of a root mean square of 1."""
    usual = math.sqrt(gain.norm_length) if gain.norm_length else 1.0
    return usual - gain.offset


def _count_alike(gain: WeightRecord, gains: Sequence[WeightRecord]) -> int:
    return sum(other.pattern == gain.pattern for other in gains)
