"""Which sub-layers the figures of the entire network are about."""

from __future__ import annotations

from dataclasses import dataclass, field

from jacdiag.records.base import Record


@dataclass(frozen=True)
class StreamRange(Record):
    """The sub-layers that follow each other on the longest residual stream of a model.

    A model has several streams if it is an encoder and a decoder, or if a shortcut is missing.

    Attributes:
        first, last: names of the sub-layers at which the stream begins and ends.
        sublayers: how many lie on it. Those inside another sub-layer do not count.
        of: how many there are in the model.
        layers: how many layers these are in.
        gaps: pairs of names that follow each other on the stream. Between these two, calls that no
            sub-layer holds change the stream.
    """

    first: str
    last: str
    sublayers: int
    of: int
    layers: int
    gaps: list[list[str]] = field(default_factory=list)

    @property
    def is_partial(self) -> bool:
        """Whether some sub-layers of the model lie on another stream."""
        return self.sublayers < self.of

    @property
    def share(self) -> str:
        """How many of the sub-layers it holds, such as "7 of 11 sub-layers"."""
        return f"{self.sublayers} of {self.of} sub-layers"

    @property
    def words(self) -> str:
        """The range in words, such as "from h.0.attn to h.3.attn, 7 of 11 sub-layers"."""
        return f"from {self.first} to {self.last}, {self.share}"

    @property
    def gaps_in_words(self) -> str:
        """Where calls that no sub-layer holds change the stream; "" if nowhere."""
        # 1. The first place.
        if not self.gaps:
            return ""
        before, after = self.gaps[0]
        text = f"between {before} and {after}"

        # 2. How many more there are.
        more = len(self.gaps) - 1
        if more == 1:
            text += " and at 1 more place"
        elif more > 1:
            text += f" and at {more} more places"
        return text
