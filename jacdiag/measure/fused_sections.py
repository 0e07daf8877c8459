"""The sections of fused matrices: which outputs are queries, keys and values, and how each was
drawn.

The layout is read from sizes. A fused attention has as many queries as W_O reads; keys and values
share the rest. Heads may follow one another, each with its queries, keys and values: of the
layouts that fit the sizes, the values choose the one that explains them, if one does so clearly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
    if tensor.is_meta or not tensor.is_floating_point():
        return []
    dim = _output_dim(tensor, fan_out)
    if dim is None or fan_out is None:
        return []
    layout = _cut_layout(role, splits) if sum(splits) == fan_out else None
    is_cut = layout is not None
    layout = layout or _plain_layout(role, fan_out, heads_width)
    if layout is None:
        return []
    matrix = tensor.detach()
    if role == "W_QKV" and matrix.dim() == 2 and not is_cut:
        layout = _likeliest(matrix if dim == 0 else matrix.T, layout, head)
    return [_measure(matrix, dim, layout, index, role) for index, role in enumerate(layout.roles)]


def _output_dim(tensor: Tensor, fan_out: int | None) -> int | None:
    """Return the dimension of the outputs: the last but one as nn.Linear stores it, else the
    last.
    """
    if tensor.dim() not in (2, 3):
        return None
    for dim in (tensor.dim() - 2, tensor.dim() - 1):
        if tensor.shape[dim] == fan_out:
            return dim
    return None


def _cut_layout(role: str, splits: Sequence[int]) -> Layout | None:
    """Return the layout that the model's own cuts show.

    A block that computes attention and FFN from one matrix cuts more than the three: queries, keys
    and values stand at one end, and what is left belongs to the FFN.
    """
    if role != "W_QKV" or len(splits) < 3 or min(splits) < 1:
        return None
    names = FUSED[role]
    rest = ["W_1"] * (len(splits) - 3)
    if _are_heads(splits[:3]):
        return Layout((*names, *rest), tuple(splits))
    if _are_heads(splits[-3:]):
        return Layout((*rest, *names), tuple(splits))
    return None


def _are_heads(sizes: Sequence[int]) -> bool:
    """Return whether sizes may be those of queries, keys and values."""
    queries, keys, values = sizes
    return keys == values and queries % keys == 0


def _plain_layout(role: str, fan_out: int, heads_width: int | None) -> Layout | None:
    """Return the layout in which each role is one block, or None if the sizes do not allow it."""
    roles = FUSED[role]
    if role != "W_QKV":
        even = fan_out % 2 == 0
        return Layout(roles, (fan_out // 2, fan_out // 2)) if even else None
    queries = heads_width or fan_out // 3
    rest = fan_out - queries
    keys = rest // 2
    if keys < 1 or rest % 2 or queries % keys:
        return None
    return Layout(roles, (queries, keys, keys))


def _interleaved(plain: Layout, head: float | None) -> Iterator[Layout]:
    """Yield the layouts in which every group of heads holds its own queries, keys and values."""
    queries, keys, _ = plain.sizes
    widths = {int(head)} if head else set[int]()
    widths |= {2**power for power in range(2, 10)}
    for width in sorted(widths):
        groups = keys // width
        if groups > 1 and keys % width == 0:
            yield Layout(plain.roles, (queries // groups, width, width), groups)


def _likeliest(rows: Tensor, plain: Layout, head: float | None) -> Layout:
    """Return the layout whose sections are the most alike inside, the plain one unless another is
    clearly better.
    """
    squares = torch.cat([piece.double().square().mean(dim=1) for piece in rows.split(1024)])
    squares = squares.cpu()
    best, most = plain, _likelihood(squares, rows.shape[1], plain) + _CLEARLY
    for layout in _interleaved(plain, head):
        likelihood = _likelihood(squares, rows.shape[1], layout)
        if likelihood > most:
            best, most = layout, likelihood
    return best


def _likelihood(squares: Tensor, columns: int, layout: Layout) -> float:
    """Return the log-likelihood of normal draws with one std per section, up to a constant."""
    total = 0.0
    for index in range(len(layout.roles)):
        own = squares[layout.outputs_of(index)]
        variance = max(float(own.mean()), 1e-300)
        total -= 0.5 * columns * len(own) * math.log(variance)
    return total


def _measure(matrix: Tensor, dim: int, layout: Layout, index: int, role: str) -> SectionRecord:
    """Measure the outputs of one role."""
    if layout.groups == 1:
        start = sum(layout.sizes[:index])
        section = matrix.narrow(dim, start, layout.sizes[index])
    else:
        section = matrix.index_select(dim, layout.outputs_of(index).to(matrix.device))
    fan_out = layout.sizes[index] * layout.groups
    draw = draw_of(section)
    if draw is None:
        return SectionRecord(role, fan_out)
    return SectionRecord(
        role,
        fan_out,
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
    if table.is_meta or not table.is_floating_point() or table.dim() < 2:
        return False
    rows = table.detach().reshape(-1, table.shape[-1])
    sums = rows.double().square().sum(dim=1)
    drawn = sums[sums > 0]
    if len(drawn) < 2:
        return False
    half = rows.shape[1] / 2
    return bool(((drawn - half).abs() < 1e-2 * half).all())


def widths_of_heads(uses: Sequence[tuple[str, str, int | None]]) -> dict[str, int]:
    """Return how many features the only W_O of each sub-layer reads.

    Args:
        uses: (role, sub-layer, fan_in) of every weight.

    Example:
        >>> widths_of_heads([("W_QKV", "h.0.attn", 64), ("W_O", "h.0.attn", 64)])
        {'h.0.attn': 64}
    """
    found: dict[str, set[int]] = {}
    for role, sublayer, fan_in in uses:
        if role == "W_O" and fan_in:
            found.setdefault(sublayer, set()).add(fan_in)
    return {sublayer: min(widths) for sublayer, widths in found.items() if len(widths) == 1}
