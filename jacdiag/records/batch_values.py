"""Values of a batch that are not finite, and whether earlier batches had such values."""

from __future__ import annotations

from dataclasses import dataclass, field

from jacdiag.records.base import Record


@dataclass(frozen=True)
class NonFiniteArgument(Record):
    """A tensor of a batch that holds NaN or inf.

    Attributes:
        name: the argument of the forward; a path such as `batch['image']` inside containers.
        counts: "NaN", "+inf" and "-inf" -> how many values, those of count 0 left out.
        size: how many values the tensor has.
        sequences: the places along the batch dimension that hold them; empty if the tensor has no
            such dimension.
        usual: the kinds of `counts` that an earlier batch had in the same argument.
    """

    name: str
    counts: dict[str, int]
    size: int
    sequences: list[int] = field(default_factory=list)
    usual: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class BatchValues(Record):
    """What of a batch is not finite.

    Attributes:
        arguments: the tensors with values that are not finite.
        earlier: how many earlier batches they were compared with.
        unread: how many tensors could not be looked at.
        rows: the size of the batch dimension.
    """

    arguments: list[NonFiniteArgument] = field(default_factory=list)
    earlier: int = 0
    unread: int = 0
    rows: int = 0

    @property
    def is_finite(self) -> bool:
        """Every value of every tensor was looked at and is finite."""
        return not self.arguments and not self.unread

    @property
    def unusual(self) -> list[NonFiniteArgument]:
        """The tensors with a value that a mask does not explain.

        NaN counts unless an earlier batch had it in the same argument. Inf counts only if there
        were earlier batches, and none of them had it there.
        """
        return [argument for argument in self.arguments if self.unusual_kinds(argument)]

    def unusual_kinds(self, argument: NonFiniteArgument) -> list[str]:
        """Return the kinds of values of a tensor that make it unusual.

        Args:
            argument: the tensor, with the kinds that an earlier batch had in it.
        """
        unusual = []
        for kind in argument.counts:
            # Without an earlier batch, inf may be what this model's mask holds.
            can_be_usual = kind != "NaN" and not self.earlier
            if can_be_usual or kind in argument.usual:
                continue
            unusual.append(kind)
        return unusual
