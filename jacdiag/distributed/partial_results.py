"""The results of one rank or one job, as plain data, and how to merge them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from jacdiag.measure.gradients import GradientProfile
from jacdiag.records.base import Record
from jacdiag.records.report import Interval, SublayerRecord
from jacdiag.records.signal_propagation import DeadPath

T = TypeVar("T")


@dataclass(frozen=True)
class Use(Record):
    """What one rank did.

    Attributes:
        rank, host, device: which rank, and where it ran.
        jobs: how many jobs it did.
        seconds: from the verification of the replay to the end of its last job.
        peak_memory_mb: peak memory.
    """

    rank: int
    host: str
    device: str
    jobs: int
    seconds: float
    peak_memory_mb: float


@dataclass(frozen=True)
class Share(Record):
    """Some of the measured results.

    Attributes:
        records: of sub-layers.
        products: products spent on them. An interval that two fields share counts once, so that
            the records alone do not give this number.
        errors: of the check of replay, by sub-layer.
        profile: gradient norms over depth; None if they were not measured here.
        through: the end-to-end norm; None if it was not measured here.
        dead: parts that no gradient reaches; None if they were not searched for.
        why: field -> why it is missing.
        uses: one per rank.
    """

    records: list[SublayerRecord] = field(default_factory=list)
    products: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    profile: GradientProfile | None = None
    through: Interval | None = None
    dead: list[DeadPath] | None = None
    why: dict[str, str] = field(default_factory=dict)
    uses: list[Use] = field(default_factory=list)


def merged(shares: Iterable[Share]) -> Share:
    """Return one share that holds all of several; sub-layers are in the order of the stream.

    Args:
        shares: what was measured. If several have a figure of the entire network, the first counts.
    """
    records: list[SublayerRecord] = []
    uses: list[Use] = []
    products = 0
    errors: dict[str, float] = {}
    why: dict[str, str] = {}
    profile: GradientProfile | None = None
    through: Interval | None = None
    dead: list[DeadPath] | None = None
    for share in shares:
        # 1. What every share has a part of.
        records += share.records
        uses += share.uses
        products += share.products
        errors |= share.errors
        why |= share.why

        # 2. What one share has measured for the entire network.
        profile = _first_measured(profile, share.profile)
        through = _first_measured(through, share.through)
        dead = _first_measured(dead, share.dead)
    records.sort(key=lambda record: record.index)
    return Share(records, products, errors, profile, through, dead, why, uses)


def _first_measured(first: T | None, second: T | None) -> T | None:
    """Return the first of two values that is not None."""
    if first is not None:
        return first
    return second
