"""Measure the sections of fused matrices: queries, keys and values, and how each was drawn.

The layout is read from sizes. A fused attention has as many queries as W_O reads. Keys and values
share the other outputs. Heads may follow one another, each with its queries, keys and values. Of
the layouts that fit the sizes, the values choose the one that explains them, if one does so
clearly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from jacdiag.devices.accelerators import in_float64
from jacdiag.measure.init_distribution import draw_of
from jacdiag.records.init_contract import FUSED, SectionRecord

# Log-likelihood by which an interleaved layout must beat the plain one. Some twenty layouts are
# tried, and each gains about one by chance; e^-30 leaves no chance of it.
_CLEARLY = 30.0


@dataclass(frozen=True)
class Layout:
    """Which outputs of a fused matrix belong to which role.

    Attributes:
        roles: In order.
        sizes: Outputs of each role within one group.
        groups: How often the roles follow one another: 1 where each role is one block.
    """

    roles: tuple[str, ...]
    sizes: tuple[int, ...]
    groups: int = 1

    def outputs_of(self, index: int) -> Tensor:
        """Return the numbers of the outputs of one role."""
        group = sum(self.sizes)
        first = sum(self.sizes[:index])
        starts = torch.arange(self.groups) * group + first
        return (starts[:, None] + torch.arange(self.sizes[index])).flatten()


def sections_of(
    tensor: Tensor,
    role: str,
    fan_out: int | None,
    *,
    heads_width: int | None = None,
    head: float | None = None,
    splits: Sequence[int] = (),
) -> list[SectionRecord]:
    """Measure the sections of a fused matrix.

    Args:
        tensor: (out, in), (in, out), or a stack of either.
        role: A key of `FUSED`.
        fan_out: How many outputs it has.
        heads_width: How many features W_O reads: the width of all queries. A third of the outputs
            if it is not known.
        head: Width of one head, if known.
        splits: The sizes into which the model cuts the result, if it does so at once.

    Returns:
        One record per role, in order; [] if the sizes fit no known layout.

    Example:
        >>> sections = sections_of(torch.randn(96, 32), "W_QKV", 96)
        >>> [(section.role, section.fan_out) for section in sections]
        [('W_Q', 32), ('W_K', 32), ('W_V', 32)]
    """
    # 1. Which dimension holds the outputs.
    has_values = tensor.is_floating_point() and not tensor.is_meta
    if not has_values or fan_out is None:
        return []

    dim = _output_dim(tensor, fan_out)
    if dim is None:
        return []

    # 2. Which outputs belong to which role.
    matrix = tensor.detach()
    layout = _find_layout(matrix, dim, role, fan_out, heads_width, head, splits)
    if layout is None:
        return []

    return [_measure(matrix, dim, layout, index) for index in range(len(layout.roles))]


def _find_layout(
    matrix: Tensor,
    dim: int,
    role: str,
    fan_out: int,
    heads_width: int | None,
    head: float | None,
    splits: Sequence[int],
) -> Layout | None:
    """Return the layout of a fused matrix; None if the sizes fit no known one."""
    # 1. The model's own cuts, if they cover the matrix.
    if sum(splits) == fan_out:
        layout = _cut_layout(role, splits)
        if layout is not None:
            return layout

    # 2. One block for each role.
    layout = _plain_layout(role, fan_out, heads_width)
    if layout is None:
        return None

    # 3. Heads with their own queries, keys and values, if the values say so.
    may_be_interleaved = role == "W_QKV" and matrix.dim() == 2
    if not may_be_interleaved:
        return layout

    if dim == 1:
        matrix = matrix.T
    return _likeliest(matrix, layout, head)


def _output_dim(tensor: Tensor, fan_out: int) -> int | None:
    """Return the dimension of the outputs: the last but one as in nn.Linear, else the last."""
    if tensor.dim() not in (2, 3):
        return None

    # A square matrix is taken to be stored as nn.Linear does.
    last = tensor.dim() - 1
    for dim in (last - 1, last):
        if tensor.shape[dim] == fan_out:
            return dim

    return None


def _cut_layout(role: str, splits: Sequence[int]) -> Layout | None:
    """Return the layout that the model's own cuts show.

    A block that computes attention and FFN from one matrix cuts more than the three. Queries, keys
    and values stand at one end, and what is left belongs to the FFN.
    """
    has_three = len(splits) >= 3 and min(splits) >= 1
    if role != "W_QKV" or not has_three:
        return None

    # Attention stands at one end.
    attention = FUSED[role]
    ffn = ["W_1"] * (len(splits) - 3)
    if _are_heads(splits[:3]):
        return Layout((*attention, *ffn), tuple(splits))
    if _are_heads(splits[-3:]):
        return Layout((*ffn, *attention), tuple(splits))

    return None


def _are_heads(sizes: Sequence[int]) -> bool:
    """Return whether sizes may be those of queries, keys and values."""
    queries, keys, values = sizes
    # Every head of keys serves the same number of heads of queries.
    return keys == values and queries % keys == 0


def _plain_layout(role: str, fan_out: int, heads_width: int | None) -> Layout | None:
    """Return the layout in which each role is one block, or None if the sizes do not allow it."""
    roles = FUSED[role]
    # 1. Two roles have half of the outputs each.
    if role != "W_QKV":
        half, remainder = divmod(fan_out, 2)
        if remainder:
            return None
        return Layout(roles, (half, half))

    # 2. Of three, keys and values share what the queries leave.
    queries = heads_width or fan_out // 3
    keys, remainder = divmod(fan_out - queries, 2)
    if keys < 1 or remainder:
        return None

    sizes = (queries, keys, keys)
    if not _are_heads(sizes):
        return None

    return Layout(roles, sizes)


def _interleaved(plain: Layout, head: float | None) -> Iterator[Layout]:
    """Yield the layouts in which every group of heads holds its own queries, keys and values."""
    # 1. Widths that a head may have.
    widths = {2**power for power in range(2, 10)}
    if head:
        widths.add(int(head))

    # 2. Those that divide the keys into several groups.
    queries, keys, _ = plain.sizes
    for width in sorted(widths):
        groups, remainder = divmod(keys, width)
        if groups > 1 and remainder == 0:
            yield Layout(plain.roles, (queries // groups, width, width), groups)


def _likeliest(rows: Tensor, plain: Layout, head: float | None) -> Layout:
    """Return the layout whose sections are the most alike inside.

    It is the plain one unless another is clearly better.
    """
    # 1. The mean square of each output.
    squares = torch.cat([in_float64(piece).square().mean(dim=1) for piece in rows.split(1024)])
    squares = squares.cpu()

    # 2. The likeliest layout. The plain one has an advantage.
    best = plain
    best_likelihood = _likelihood(squares, rows.shape[1], plain) + _CLEARLY
    for layout in _interleaved(plain, head):
        likelihood = _likelihood(squares, rows.shape[1], layout)
        if likelihood > best_likelihood:
            best, best_likelihood = layout, likelihood

    return best


def _likelihood(squares: Tensor, columns: int, layout: Layout) -> float:
    """Return the log-likelihood of normal draws with one std per section, up to a constant."""
    total = 0.0
    for index in range(len(layout.roles)):
        own = squares[layout.outputs_of(index)]
        variance = max(float(own.mean()), 1e-300)
        total -= 0.5 * columns * len(own) * math.log(variance)

    return total


def _measure(matrix: Tensor, dim: int, layout: Layout, index: int) -> SectionRecord:
    """Measure the outputs of one role, by its index in the layout."""
    role = layout.roles[index]
    # 1. Take the section out of the matrix.
    start = sum(layout.sizes[:index])
    if layout.groups == 1:
        section = matrix.narrow(dim, start, layout.sizes[index])
    else:
        section = matrix.index_select(dim, layout.outputs_of(index).to(matrix.device))
    fan_out = layout.sizes[index] * layout.groups

    # 2. Measure how it was drawn.
    record = SectionRecord(role, fan_out, dim=dim, groups=layout.groups, start=start)
    draw = draw_of(section)
    if draw is None:
        return record

    return replace(
        record,
        family=draw.family,
        std=draw.std,
        lower=draw.lower,
        upper=draw.upper,
        mean=draw.mean,
        truncation=draw.truncation,
    )


def is_sinusoid(table: Tensor) -> bool:
    """Return whether every row of a table of positions is made of pairs (sin a, cos a).

    Then the squares of a row sum up to half of its width, exactly. Rows of zeros (padding) are
    left out.

    Example:
        >>> angle = torch.arange(8.0)[:, None] * torch.tensor([1.0, 0.1, 0.01])
        >>> is_sinusoid(torch.cat([angle.sin(), angle.cos()], dim=1))
        True
    """
    has_values = table.is_floating_point() and not table.is_meta
    if not has_values:
        return False
    if table.dim() < 2:
        return False

    # 1. The squares of each row that is no padding.
    rows = table.detach().reshape(-1, table.shape[-1])
    sums = in_float64(rows).square().sum(dim=1)
    sums_without_padding = sums[sums > 0]
    if len(sums_without_padding) < 2:
        return False

    # 2. They must be half of the width.
    half = rows.shape[1] / 2
    is_half = (sums_without_padding - half).abs() < 1e-2 * half
    return bool(is_half.all())


def widths_of_heads(uses: Sequence[tuple[str, str, int | None]]) -> dict[str, int]:
    """Return how many features the only W_O of each sub-layer reads.

    Args:
        uses: (role, sub-layer, fan_in) of every weight.

    Example:
        >>> widths_of_heads([("W_QKV", "h.0.attn", 64), ("W_O", "h.0.attn", 64)])
        {'h.0.attn': 64}
    """
    # 1. What each W_O reads.
    widths_of: dict[str, set[int]] = {}
    for role, sublayer, fan_in in uses:
        if role == "W_O" and fan_in:
            widths_of.setdefault(sublayer, set()).add(fan_in)

    # 2. Several of different widths say nothing.
    only_width = {}
    for sublayer, widths in widths_of.items():
        if len(widths) == 1:
            only_width[sublayer] = widths.pop()

    return only_width
