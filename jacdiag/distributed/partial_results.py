"""What one rank, or one job, has found: plain data, and how the parts become one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields

from jacdiag.measure.gradients import GradientProfile
from jacdiag.records.base import Record
from jacdiag.records.report import Interval, SublayerRecord
from jacdiag.records.signal_propagation import DeadPath


@dataclass(frozen=True)
class Use(Record):
    """What a rank did.

    Jobs done, seconds from verification to the last job, peak memory, and the device.
    """

    rank: int
    host: str
    device: str
    jobs: int
    seconds: float
    peak_memory_mb: float


@dataclass(frozen=True)
class Share(Record):
    """A part of what is measured.

    Attributes:
        records: of sub-layers. `products` counts those spent on them (an interval that two fields
            share counts once, which plain data no longer shows).
        errors: of the check of replay, by sub-layer.
        profile, through: figures of the whole network; `why` they are missing.
        dead: parts that no gradient reaches; None if that was not looked at.
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
    """One share of all; sub-layers in the order of the stream."""
    parts = list(shares)
    by_name = {f.name: [getattr(part, f.name) for part in parts] for f in fields(Share)}
    return Share(
        records=sorted(
            (r for records in by_name["records"] for r in records), key=lambda record: record.index
        ),
        products=sum(by_name["products"]),
        errors={name: e for errors in by_name["errors"] for name, e in errors.items()},
        profile=next((p for p in by_name["profile"] if p is not None), None),
        through=next((i for i in by_name["through"] if i is not None), None),
        dead=next((d for d in by_name["dead"] if d is not None), None),
        why={name: text for why in by_name["why"] for name, text in why.items()},
        uses=[use for uses in by_name["uses"] for use in uses],
    )
