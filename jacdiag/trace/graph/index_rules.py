"""What each torch operation does with the indices of its operands, one rule for each kind.

A rule returns the layout of a result (see `index_layout`). It may say less than is true, and never
more: a label that it keeps is a proof. An operation without a rule raises `UnclearError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.utils._pytree import tree_leaves

from jacdiag.trace.graph.arguments import Arguments, Operand
from jacdiag.trace.graph.index_layout import (
    Dimension,
    Layout,
    UnclearError,
    blank,
    broadcast,
    combined,
    labels_of,
    regrouped,
)
from jacdiag.trace.graph.ops import ACTIVATIONS, FUSED_MULTI_HEAD

_DIM = ("dim", "axis")  # the names of the argument that names a dimension


@dataclass
class IndexedCall:
    """One recorded call, as a rule sees it.

    Attributes:
        arguments: what it was given.
        shapes: of its operands.
        layouts: of those operands that depend on the source, by position.
        mixed: dimensions of the source over which a rule has found that the call sums.
    """

    arguments: Arguments
    shapes: Sequence[tuple[int, ...]]
    layouts: Mapping[int, Layout]
    mixed: set[int] = field(default_factory=set)

    def only_operand(self) -> tuple[Layout, tuple[int, ...]]:
        """Return layout and shape of the first operand.

        Raises:
            UnclearError: another operand depends on the source.
        """
        if set(self.layouts) != {0}:
            raise UnclearError("operands of which nothing is known depend on the source")
        return self.layouts[0], self.shapes[0]

    def mix(self, dimensions: Iterable[Dimension]) -> None:
        """Note that every result depends on all indices along some dimensions of an operand."""
        self.mixed |= labels_of(dimensions)

    def dimension(self, position: int, *names: str, default: Any = None) -> int:
        """Return the argument that names a dimension of the first operand, counted from 0."""
        dims = self.dimensions(position, *names, default=default)
        if len(dims) != 1:
            raise UnclearError("several dimensions where one is expected")
        return dims[0]

    def dimensions(self, position: int, *names: str, default: Any = None) -> list[int]:
        """Return the argument that names one dimension or several, counted from 0."""
        # 1. One number, or several.
        argument = self.arguments.get(position, *(names or _DIM), default=default)
        if _is_int(argument):
            argument = (argument,)
        if not _are_ints(argument):
            raise UnclearError("a dimension that is no number")

        # 2. A negative one counts from the end.
        rank = len(self.shapes[0])
        return [dim % rank for dim in argument]


Rule = Callable[[IndexedCall, tuple[int, ...]], Layout]


def layout_after(name: str, call: IndexedCall, shape: tuple[int, ...]) -> Layout:
    """Return the layout of a result of a call.

    Args:
        name: of the call, as recorded.
        call: what it read.
        shape: of the result.

    Raises:
        UnclearError: what the call does with indices is not known.
    """
    rule = _RULES.get(_plain_name(name))
    if rule is None:
        raise UnclearError(f"no rule for {name}")
    _check_order_of_names(call.arguments)
    try:
        return rule(call, shape)
    except (IndexError, ValueError, TypeError) as error:  # arguments that the rule does not expect
        raise UnclearError(str(error)) from error


# Operands are told apart by their position. Those that are given by name stand in this order.
_NAMED_OPERANDS = (
    "tensors input self condition query key value mat1 batch1 other mat2 batch2 weight bias "
    "running_mean running_var key_padding_mask attn_mask mask q_proj_weight k_proj_weight "
    "v_proj_weight"
).split()


def _check_order_of_names(arguments: Arguments) -> None:
    """Raise if a tensor is given by a name that is not known, or before one it comes after."""
    last = -1
    for name, value in arguments.named.items():
        # 1. Numbers are found by their names.
        if not _holds_operand(value):
            continue

        # 2. A tensor whose place is not known.
        if name not in _NAMED_OPERANDS:
            raise UnclearError(f"a tensor that is given as {name}")

        # 3. One that is out of order.
        place = _NAMED_OPERANDS.index(name)
        if place <= last:
            raise UnclearError(f"{name} after a tensor that it comes before")
        last = place


def _holds_operand(value: Any) -> bool:
    """Return whether an argument is a tensor, or a list that holds one."""
    leaves = tree_leaves(value)
    return any(isinstance(leaf, Operand) for leaf in leaves)


def _plain_name(name: str) -> str:
    """Return the name of an operation: "add" for `add_`, `__add__`, `__radd__` and `__iadd__`."""
    if not name.startswith("__"):
        return name.removesuffix("_")
    inner = name.strip("_")
    if inner in _RULES:
        return inner
    # Reversed, and in place. The order of operands counts in a matrix product alone.
    if inner[0] in "ri" and inner[1:] in _BY_ELEMENT:
        return inner[1:]
    return inner


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_ints(values: Any) -> bool:
    """Return whether a value is a tuple or a list of whole numbers."""
    if not isinstance(values, tuple | list):
        return False

    # A list may hold tensors.
    return all(map(_is_int, values))


# -- by element --------------------------------------------------------------------------------
def _by_element(call: IndexedCall, shape: tuple[int, ...]) -> Layout:
    """Every element of the result depends on the same element of each operand."""
    contributions = []
    for position, layout in call.layouts.items():
        if len(call.shapes[position]) > len(shape):
            raise UnclearError("an operand with more dimensions than the result")
        contributions.append(broadcast(layout, call.shapes[position], shape))
    return combined(contributions, shape)


# -- shapes ------------------------------------------------------------------------------------
def _reshape(call: IndexedCall, shape: tuple[int, ...]) -> Layout:
    layout, _ = call.only_operand()
    return regrouped(layout, shape)


def _permute(call: IndexedCall, shape: tuple[int, ...]) -> Layout:
    layout, _ = call.only_operand()
    # 1. `x.permute(0, 2, 1)` and `x.permute((0, 2, 1))`.
    listed = call.arguments.positional[1:]
    if len(listed) > 1 and _are_ints(listed):
        order = [dim % len(shape) for dim in listed]
    else:
        order = call.dimensions(1, "dims")

    # 2. Every dimension has a new place.
    if sorted(order) != list(range(len(layout))):
        raise UnclearError("a permutation that does not name every dimension")
    return tuple(layout[dim] for dim in order)


def _transpose(call: IndexedCall, shape: tuple[int, ...]) -> Layout:  # noqa: ARG001  (as every rule)
    layout, _ = call.only_operand()
    first = call.dimension(1, "dim0", "axis0")
    second = call.dimension(2, "dim1", "axis1")
    dimensions = list(layout)
    dimensions[first], dimensions[second] = dimensions[second], dimensions[first]
    return tuple(dimensions)


def _transpose_matrix(call: IndexedCall, shape: tuple[int, ...]) -> Layout:  # noqa: ARG001
    layout, _ = call.only_operand()
    return tuple(reversed(layout))


def _expand(call: IndexedCall, shape: tuple[int, ...]) -> Layout:
    """Also repeats a tensor: a dimension that grows has every element several times."""
    layout, own_shape = call.only_operand()
    return broadcast(layout, own_shape, shape)


def _view_as_complex(call: IndexedCall, shape: tuple[int, ...]) -> Layout:  # noqa: ARG001
    layout, _ = call.only_operand()
    return layout[:-1]


def _view_as_real(call: IndexedCall, shape: tuple[int, ...]) -> Layout:
    layout, _ = call.only_operand()
    return (*layout, blank(shape[-1]))


# -- cutting and joining -----------------------------------------------------------------------
def _cut(call: IndexedCall, shape: tuple[int, ...]) -> Layout:
    """Return the layout of a part: along the dimensions whose size changed nothing is known."""
    layout, own_shape = call.only_operand()
    if len(own_shape) != len(shape):
        raise UnclearError("a part with another number of dimensions")

    dimensions = []
    for dimension, whole, size in zip(layout, own_shape, shape, strict=True):
        is_whole = size == whole
        dimensions.append(dimension if is_whole else blank(size))
    return tuple(dimensions)


def _repeat_interleave(call: IndexedCall, shape: tuple[int, ...]) -> Layout:
    if not _is_int(call.arguments.get(1, "repeats")):
        raise UnclearError("a number of repetitions for each element")
    return _cut(call, shape)


def _pad(call: IndexedCall, shape: tuple[int, ...]) -> Layout:
    """Return the layout after padding, which may also shift: (1, -1) keeps the size."""
    layout, own_shape = call.only_operand()
    widths = call.arguments.get(1, "pad")
    if not isinstance(widths, tuple | list) or len(shape) != len(own_shape):
        raise UnclearError("padding that is not known")

    # Two widths for each dimension, the last dimension first.
    dimensions = list(layout)
    for number, width in enumerate(widths):
        dim = len(shape) - 1 - number // 2
        if width != 0:
            dimensions[dim] = blank(shape[dim])
    return tuple(dimensions)


def _take_out(call: IndexedCall, shape: tuple[int, ...]) -> Layout:
    """Return the layout at one index of a dimension, which is dropped."""
    layout, _ = call.only_operand()
    dim = call.dimension(1, default=0)
    if len(layout) != len(shape) + 1:
        raise UnclearError("not one dimension fewer")
    return layout[:dim] + layout[dim + 1 :]


def _index(call: IndexedCall, shape: tuple[int, ...]) -> Layout:
    """Return the layout of `x[...]` with numbers, slices, None and an ellipsis."""
    # 1. The index, with the ellipsis written out.
    layout, own_shape = call.only_operand()
    index = call.arguments.get(1, "index")
    items = list(index) if isinstance(index, tuple) else [index]
    consuming = sum(item is not None and item is not Ellipsis for item in items)
    missing = [slice(None)] * (len(own_shape) - consuming)
    if Ellipsis in items:
        place = items.index(Ellipsis)
        items[place : place + 1] = missing
    else:
        items += missing

    # 2. What each item leaves.
    dimensions: list[Dimension] = []
    dim = 0
    for item in items:
        if item is None:
            dimensions.append(())
            continue
        if isinstance(item, slice):
            dimensions.append(_sliced(layout[dim], own_shape[dim], item))
        elif not _is_int(item):
            raise UnclearError("an index that is a tensor or a list")
        dim += 1
    if len(dimensions) != len(shape):
        raise UnclearError("an index that was not understood")
    return tuple(dimensions)


def _sliced(dimension: Dimension, size: int, part: slice) -> Dimension:
    """Return what is known along a dimension after a slice."""
    # 1. Its ends.
    bounds = [bound for bound in (part.start, part.stop, part.step) if bound is not None]
    if not _are_ints(bounds):
        raise UnclearError("a slice whose ends are no numbers")

    # 2. What it leaves.
    chosen = range(size)[part]
    if chosen == range(size):
        return dimension
    return blank(len(chosen))


def _concatenate(call: IndexedCall, shape: tuple[int, ...]) -> Layout:
    """Return the layout of tensors side by side; an empty one (a new cache) is no part."""
    # 1. One tensor with elements is all that there is.
    filled = [own_shape for own_shape in call.shapes if 0 not in own_shape]
    if len(filled) == 1:
        (layout,) = call.layouts.values()
        return layout

    # 2. Several: along the dimension in which they are joined nothing is known.
    dim = _dimension_of(call, shape)
    contributions = []
    for layout in call.layouts.values():
        if len(layout) != len(shape):
            raise UnclearError("a part with another number of dimensions")
        contributions.append((*layout[:dim], blank(shape[dim]), *layout[dim + 1 :]))
    return combined(contributions, shape)


def _stack(call: IndexedCall, shape: tuple[int, ...]) -> Layout:
    dim = _dimension_of(call, shape)
    contributions = [
        (*layout[:dim], blank(shape[dim]), *layout[dim:]) for layout in call.layouts.values()
    ]
    return combined(contributions, shape)


def _dimension_of(call: IndexedCall, shape: tuple[int, ...]) -> int:
    """Return the dimension of the result along which operands are joined."""
    dim = call.arguments.get(1, *_DIM, default=0)
    if not _is_int(dim):
        raise UnclearError("a dimension that is no number")
    return int(dim) % len(shape)


# -- sums over a dimension ---------------------------------------------------------------------
def _along(position: int, default: Any = None) -> Rule:
    """Return the rule of an operation that mixes one dimension and keeps its size.

    Args:
        position: of the argument that names the dimension.
        default: the dimension if none is given.
    """

    def rule(call: IndexedCall, shape: tuple[int, ...]) -> Layout:
        layout, _ = call.only_operand()
        dimensions = list(layout)
        for dim in call.dimensions(position, default=default):
            call.mix([layout[dim]])
            dimensions[dim] = blank(shape[dim])
        return tuple(dimensions)

    return rule


def _reduction(position: int) -> Rule:
    """Return the rule of an operation that makes one number of all along some dimensions.

    Args:
        position: of the argument that names the dimensions.
    """

    def rule(call: IndexedCall, shape: tuple[int, ...]) -> Layout:
        # 1. The dimensions that are reduced: all, if none are named.
        layout, own_shape = call.only_operand()
        if call.arguments.get(position, *_DIM) is None:
            reduced = list(range(len(own_shape)))
        else:
            reduced = call.dimensions(position)
        call.mix(layout[dim] for dim in reduced)

        # 2. What is left, with dimensions of size 1 in their places or without.
        if len(shape) == len(own_shape):
            dimensions = list(layout)
            for dim in reduced:
                dimensions[dim] = ()
            return tuple(dimensions)
        left = tuple(layout[dim] for dim in range(len(layout)) if dim not in reduced)
        if len(left) != len(shape):
            raise UnclearError("a reduction that was not understood")
        return left

    return rule


def _extreme(call: IndexedCall, shape: tuple[int, ...]) -> Layout:
    """Return the layout of a maximum: of two tensors by element, or along dimensions."""
    if isinstance(call.arguments.get(1, "other"), Operand):
        return _by_element(call, shape)
    return _reduction(1)(call, shape)


def _batch_norm(call: IndexedCall, shape: tuple[int, ...]) -> Layout:
    """Return the layout after a batch norm by running statistics, which is a map by element."""
    layout, own_shape = call.only_operand()
    in_training = call.arguments.get(5, "training", default=False) is not False

    # In training every element depends on the entire batch.
    if in_training or own_shape != shape:
        raise UnclearError("a norm over the batch")
    return layout


def _norm_of_last(call: IndexedCall, shape: tuple[int, ...]) -> Layout:
    """Return the layout after a layer norm or an RMS norm of the last dimensions."""
    layout, _ = call.only_operand()
    normalised = call.arguments.get(1, "normalized_shape")
    if not isinstance(normalised, tuple | list):
        raise UnclearError("a norm whose dimensions are not known")
    first = len(shape) - len(normalised)
    call.mix(layout[first:])
    return (*layout[:first], *map(blank, shape[first:]))


# -- products ----------------------------------------------------------------------------------
def _linear(call: IndexedCall, shape: tuple[int, ...]) -> Layout:
    layout, _ = call.only_operand()
    call.mix(layout[-1:])
    return (*layout[:-1], blank(shape[-1]))


def _product(call: IndexedCall, shape: tuple[int, ...]) -> Layout:
    """Return the layout of a matrix product; with three operands, of a sum with the first."""
    # 1. A term that is added.
    contributions = []
    first = len(call.shapes) - 2
    if first not in (0, 1):
        raise UnclearError("a product of more than two matrices")
    if first == 1 and 0 in call.layouts:
        contributions.append(broadcast(call.layouts[0], call.shapes[0], shape))

    # 2. The factors.
    left, right = call.shapes[first], call.shapes[first + 1]
    if min(len(left), len(right)) < 2:
        raise UnclearError("a product with a vector")
    if first in call.layouts:
        layout = call.layouts[first]
        call.mix(layout[-1:])
        rows = (*broadcast(layout[:-2], left[:-2], shape[:-2]), layout[-2])
        contributions.append((*rows, blank(shape[-1])))
    if first + 1 in call.layouts:
        layout = call.layouts[first + 1]
        call.mix(layout[-2:-1])
        around = broadcast(layout[:-2], right[:-2], shape[:-2])
        contributions.append((*around, blank(shape[-2]), layout[-1]))
    return combined(contributions, shape)


def _einsum(call: IndexedCall, shape: tuple[int, ...]) -> Layout:
    # 1. The letters of each operand.
    equation = call.arguments.get(0, "equation")
    is_written_out = isinstance(equation, str) and "->" in equation and "..." not in equation
    if not is_written_out:
        raise UnclearError("an equation that is not written out")
    read, result = equation.replace(" ", "").split("->")
    letters = read.split(",")
    if len(letters) != len(call.shapes):
        raise UnclearError("operands that the equation does not name")

    # 2. A letter that the result has keeps its index; others are summed over.
    contributions = []
    for position, layout in call.layouts.items():
        own = letters[position]
        if len(set(own)) < len(own):
            raise UnclearError("a diagonal")
        by_letter = dict(zip(own, layout, strict=True))
        call.mix(by_letter[letter] for letter in own if letter not in result)
        sizes = zip(result, shape, strict=True)
        contributions.append(tuple(by_letter.get(letter) or blank(size) for letter, size in sizes))
    return combined(contributions, shape)


def _attention(call: IndexedCall, shape: tuple[int, ...]) -> Layout:
    """Return the layout of scaled dot-product attention: (..., L, E), (..., S, E), (..., S, E)."""
    contributions = []
    for position, layout in call.layouts.items():
        own_shape = call.shapes[position]
        around = broadcast(layout[:-2], own_shape[:-2], shape[:-2])
        # Queries and masks keep their position; keys and values are summed over.
        rows = layout[-2]
        if position in (1, 2):
            rows = blank(shape[-2])
            call.mix(layout[-2:-1])
        elif own_shape[-2] != shape[-2]:
            rows = blank(shape[-2])
        contributions.append((*around, rows, blank(shape[-1])))
    return combined(contributions, shape)


def _multi_head_attention(call: IndexedCall, shape: tuple[int, ...]) -> Layout:
    """Return the layout of torch's own attention: (L, N, E) for queries, keys and values."""
    # The first three operands are queries, keys and values; the weights do not depend on the input.
    own_shape = call.shapes[0]
    is_known = set(call.layouts) <= {0, 1, 2} and len(own_shape) == 3
    # The weights, (N, L, S), are another result: they must not be taken for the first.
    if not is_known or own_shape[0] == own_shape[1]:
        raise UnclearError("attention that is laid out in another way")
    if shape != own_shape:
        return tuple(map(blank, shape))
    contributions = []
    for position, layout in call.layouts.items():
        rows = layout[0]
        if position > 0:
            rows = blank(shape[0])
            call.mix(layout[:1])
        contributions.append((rows, layout[1], blank(shape[2])))
    return combined(contributions, shape)


def _convolution(call: IndexedCall, shape: tuple[int, ...]) -> Layout:
    """Return the layout of a convolution of (N, C, ...): along an axis, a kernel of 1 keeps it."""
    layout, own_shape = call.only_operand()
    if len(call.shapes) < 2 or len(own_shape) != len(call.shapes[1]):
        raise UnclearError("a convolution without a batch")
    # In groups, a channel does not reach all others.
    if call.arguments.get(6, "groups", default=1) == 1:
        call.mix(layout[1:2])
    strides = call.arguments.get(3, "stride", default=1)
    paddings = call.arguments.get(4, "padding", default=0)

    dimensions = [layout[0], blank(shape[1])]
    for axis, kernel in enumerate(call.shapes[1][2:]):
        dim = axis + 2
        is_plain = _on_axis(strides, axis) == 1 and _on_axis(paddings, axis) in _NO_PADDING
        if kernel == 1 and is_plain:
            dimensions.append(layout[dim])
        else:
            call.mix([layout[dim]])
            dimensions.append(blank(shape[dim]))
    return tuple(dimensions)


_NO_PADDING = (0, "valid", "same")  # of a kernel of 1


def _on_axis(value: Any, axis: int) -> Any:
    """Return an argument that is given for all axes of a convolution, or for each."""
    # 1. One for all.
    if not isinstance(value, tuple | list):
        return value

    # 2. Also in a list of one.
    is_for_all = len(value) == 1
    if is_for_all:
        return value[0]
    return value[axis]


_BY_ELEMENT = ACTIVATIONS | frozenset(
    """
    add sub mul div truediv divide multiply subtract true_divide pow neg negative abs square sqrt
    rsqrt reciprocal exp expm1 log log1p log2 sin cos tanh erf erfc sigmoid logsigmoid clamp
    clamp_min clamp_max clip maximum minimum where addcmul addcdiv lerp rsub xlogy fill masked_fill
    relu log_sigmoid nan_to_num floor ceil round sign softsign tanhshrink hardsigmoid threshold
    sinh cosh atan exp2 dropout alpha_dropout feature_dropout
    to float double half bfloat16 type type_as contiguous clone cpu cuda tril triu
    """.split()
)
_REDUCTIONS = "sum mean amax amin logsumexp var std var_mean std_mean".split()
_RESHAPES = "view reshape flatten unflatten squeeze unsqueeze view_as reshape_as ravel".split()

_RULES: dict[str, Rule] = {
    **dict.fromkeys(_BY_ELEMENT, _by_element),
    **dict.fromkeys(_RESHAPES, _reshape),
    **dict.fromkeys(("permute",), _permute),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _transpose),
    "t": _transpose_matrix,
    **dict.fromkeys(("expand", "expand_as", "broadcast_to", "repeat", "tile"), _expand),
    "view_as_complex": _view_as_complex,
    "view_as_real": _view_as_real,
    **dict.fromkeys(("chunk", "split", "split_with_sizes", "tensor_split", "narrow", "glu"), _cut),
    "repeat_interleave": _repeat_interleave,
    "pad": _pad,
    **dict.fromkeys(("unbind", "select"), _take_out),
    "getitem": _index,
    **dict.fromkeys(("cat", "concat", "concatenate"), _concatenate),
    "stack": _stack,
    **dict.fromkeys(("softmax", "log_softmax", "cumsum", "cumprod"), _along(1)),
    "normalize": _along(2, default=1),
    **dict.fromkeys(_REDUCTIONS, _reduction(1)),
    **dict.fromkeys(("norm", "linalg_vector_norm", "vector_norm"), _reduction(2)),
    **dict.fromkeys(("layer_norm", "rms_norm"), _norm_of_last),
    **dict.fromkeys(("max", "min"), _extreme),
    "batch_norm": _batch_norm,
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "addmm", "baddbmm"), _product),
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
    FUSED_MULTI_HEAD: _multi_head_attention,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
}
