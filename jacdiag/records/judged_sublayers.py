"""Which sub-layers a condition of the paper was judged at."""

from __future__ import annotations

from dataclasses import dataclass, field

from jacdiag.records.base import Record


@dataclass(frozen=True)
class JudgedSublayers(Record):
    """Which of the sub-layers on the stream the rule of a condition judged.

    Attributes:
        judged: how many it judged.
        of: how many there are.
        not_judged: a reason -> the names of the sub-layers that were not judged for it.
    """

    judged: int
    of: int
    not_judged: dict[str, list[str]] = field(default_factory=dict)

    @property
    def is_partial(self) -> bool:
        """Whether the rule judged some sub-layers and left out others."""
        return 0 < self.judged < self.of

    @property
    def share(self) -> str:
        """At how many it judged, such as "4 of 8 sub-layers"; "" if at all, or at none."""
        if self.is_partial:
            return f"{self.judged} of {self.of} sub-layers"
        return ""

    def without_names(self) -> JudgedSublayers:
        """Return the numbers alone."""
        return JudgedSublayers(self.judged, self.of)
