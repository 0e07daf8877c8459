"""Where the indices of a source are found in a tensor that was computed from it.

A reshape can make one dimension of several, such as batch times tokens. So the index along a
dimension is made of *pieces*, the outermost first. A piece may have a label: the dimension of the
source whose index it is. What stands at an index of the tensor then depends on the source at the
same index alone. Of a piece without a label nothing is known.

Reshapes cut pieces and join them. Transpositions move them. A call that sums over a dimension takes
its labels away. If the label of a dimension is found at the end of a branch, each call on the way
has kept the indices apart, and the Jacobian of the branch is block diagonal over that dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class UnclearError(Exception):
    """What a call does with indices is not known."""


@dataclass(frozen=True, slots=True)
class IndexPiece:
    """A factor of the index along one dimension of a tensor.

    Attributes:
        source: the dimension of the source whose index it is part of; None without a label.
        size: how many values it takes, more than 1.
        stride: how far one step of it goes along that dimension of the source; 1 without a label.
    """

    source: int | None
    size: int
    stride: int = 1

    def cut(self, size: int) -> tuple[IndexPiece, IndexPiece]:
        """Return the outer piece, of the given size, and the inner one."""
        inner = IndexPiece(self.source, self.size // size, self.stride)
        if self.source is None:
            return IndexPiece(None, size), inner
        return IndexPiece(self.source, size, inner.size * self.stride), inner

    def joined(self, inner: IndexPiece) -> IndexPiece | None:
        """Return this piece and the one inside it as one; None if they do not belong together."""
        # 1. Parts of two dimensions.
        if self.source != inner.source:
            return None

        # 2. Parts of one dimension, which have to follow each other.
        is_continued = self.stride == inner.size * inner.stride
        if self.source is not None and not is_continued:
            return None
        return IndexPiece(self.source, self.size * inner.size, inner.stride)


Dimension = tuple[IndexPiece, ...]  # outermost first; () for a dimension of size 1
Layout = tuple[Dimension, ...]


def source_layout(shape: Sequence[int]) -> Layout:
    """Return the layout of the source itself.

    Args:
        shape: of the source.

    Raises:
        UnclearError: it has no element.
    """
    if 0 in shape:
        raise UnclearError("a tensor without elements")

    # One piece for each dimension.
    return tuple(labelled(dim, size) for dim, size in enumerate(shape))


def labelled(source: int, size: int) -> Dimension:
    """Return a dimension that is a dimension of the source, all of it."""
    return () if size == 1 else (IndexPiece(source, size),)


def blank(size: int) -> Dimension:
    """Return a dimension of which nothing is known.

    Raises:
        UnclearError: it has no element.
    """
    if size == 0:
        raise UnclearError("a tensor without elements")
    return () if size == 1 else (IndexPiece(None, size),)


def labels_of(dimensions: Iterable[Dimension]) -> set[int]:
    """Return the dimensions of the source that have a piece among some dimensions."""
    return {piece.source for pieces in dimensions for piece in pieces if piece.source is not None}


def regrouped(layout: Layout, shape: Sequence[int]) -> Layout:
    """Return the layout after a reshape.

    Args:
        layout: before it.
        shape: after it, of as many elements.

    Raises:
        UnclearError: a dimension begins or ends inside a piece that cannot be cut there.

    Example:
        >>> tokens, features = source_layout((6, 4))
        >>> regrouped((tokens, features), (2, 12))[0]
        (IndexPiece(source=0, size=2, stride=3),)
        >>> regrouped(regrouped((tokens, features), (2, 3, 4)), (6, 4)) == (tokens, features)
        True
    """
    pieces_in_order = _joined([piece for pieces in layout for piece in pieces])
    remaining = list(reversed(pieces_in_order))
    if math.prod(shape) != math.prod(piece.size for piece in remaining):
        raise UnclearError("a reshape that changes the number of elements")

    dimensions = []
    for size in shape:
        pieces: list[IndexPiece] = []
        while size > 1:
            piece = remaining.pop()

            # 1. A piece that reaches beyond this dimension is cut.
            if piece.size > size:
                if piece.size % size:
                    raise UnclearError("a reshape that cuts an index unevenly")
                piece, inner = piece.cut(size)
                remaining.append(inner)

            # 2. It is the next factor of this dimension.
            if size % piece.size:
                raise UnclearError("a reshape that cuts an index unevenly")
            size //= piece.size
            pieces.append(piece)
        dimensions.append(_joined(pieces))
    return tuple(dimensions)


def _joined(pieces: Sequence[IndexPiece]) -> Dimension:
    """Return neighbouring pieces put together where they belong together."""
    result: list[IndexPiece] = []
    for piece in pieces:
        whole = None
        if result:
            whole = result[-1].joined(piece)
        if whole is None:
            result.append(piece)
        else:
            result[-1] = whole
    return tuple(result)


def broadcast(layout: Layout, shape: Sequence[int], to: Sequence[int]) -> Layout:
    """Return the layout after a broadcast.

    Along a new dimension every element depends on all that the operand depends on, so that it has
    no label.

    Args:
        layout: of the operand.
        shape: of the operand.
        to: the shape of the result.
    """
    missing = len(to) - len(shape)
    dimensions = []
    for dim, size in enumerate(to):
        own = dim - missing
        is_kept = own >= 0 and shape[own] == size
        dimensions.append(layout[own] if is_kept else blank(size))
    return tuple(dimensions)


def combined(contributions: Sequence[Layout], shape: Sequence[int]) -> Layout:
    """Return the layout of a result: a label stays where every operand has it.

    Args:
        contributions: for each operand, the layout of the result if it depended on it alone.
        shape: of the result.
    """
    dimensions = []
    for dim, size in enumerate(shape):
        alternatives = {layout[dim] for layout in contributions}
        do_agree = len(alternatives) == 1

        # What two operands hold in different places, the result holds in none.
        dimensions.append(alternatives.pop() if do_agree else blank(size))
    return tuple(dimensions)
