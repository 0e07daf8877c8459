"""The forms in which code adds: what the terms of an addition are, in the record and in a re-run.

Each form is one function from a call's arguments to its terms. Everything else in the tracer uses
terms only, so a new way of adding is one entry here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Term:
    """One term of an addition.

    Attributes:
        values: the values it is made of, by index.
        operand: the value itself if the term is a plain operand, else None (a product inside the
            call).
        product: a matrix product happens inside the term (addmm).
    """

    values: tuple[int, ...]
    operand: int | None
    product: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """A term before it has a value: the tensors it needs, and how to compute it from them."""

    tensors: tuple[Tensor, ...]
    compute: Callable[[], Tensor]
    plain: bool = False
    product: bool = False


def _plain(tensor: Any) -> Part | None:
    """Return an operand as a term, None if it is no tensor."""
    if isinstance(tensor, Tensor):
        return Part((tensor,), lambda: tensor, plain=True)

    # A number adds a constant.
    return None


def _scaled(tensor: Any, factor: Any) -> Part | None:
    """Return an operand times a number as a term, None if it is no tensor."""
    # A factor of 1 leaves the operand itself, which keeps its identity in the record.
    if factor == 1:
        return _plain(tensor)

    # A number adds a constant, however it is scaled.
    if not isinstance(tensor, Tensor):
        return None

    # Any other factor makes a new tensor of it.
    return Part((tensor,), lambda: tensor * factor)


# `out` is one of torch's own arguments: the sum is the same whether it is given or not.
def _add(
    a: Any, b: Any = None, *, other: Any = None, alpha: Any = 1, out: Any = None, **_: Any
) -> list[Part | None]:
    return [_plain(a), _scaled(b if b is not None else other, alpha)]


def _sub(
    a: Any, b: Any = None, *, other: Any = None, alpha: Any = 1, out: Any = None, **_: Any
) -> list[Part | None]:
    return [_plain(a), _scaled(b if b is not None else other, -alpha)]


def _rsub(a: Any, b: Any = None, *, other: Any = None, alpha: Any = 1) -> list[Part | None]:
    """Return the terms b and -alpha * a."""
    return [_plain(b if b is not None else other), _scaled(a, -alpha)]


def _addcdiv(a: Any, x: Any, y: Any, *, value: Any = 1, out: Any = None) -> list[Part | None]:
    """Return the terms a and value * x / y."""

    def quotient() -> Tensor:
        result: Tensor = x / y if value == 1 else value * x / y
        return result

    return [_plain(a), Part((x, y), quotient)]


def _addcmul(a: Any, x: Any, y: Any, *, value: Any = 1, out: Any = None) -> list[Part | None]:
    """Return the terms a and value * x * y."""

    def product() -> Tensor:
        result: Tensor = x * y if value == 1 else value * x * y
        return result

    return [_plain(a), Part((x, y), product)]


def _addmm(
    a: Any, x: Any, y: Any, *, beta: Any = 1, alpha: Any = 1, out: Any = None
) -> list[Part | None]:
    def product() -> Tensor:
        result: Tensor = x @ y if alpha == 1 else alpha * (x @ y)
        return result

    return [_scaled(a, beta), Part((x, y), product, product=True)]


def _lerp(a: Any, b: Any, weight: Any, *, out: Any = None) -> list[Part | None]:
    read_by_end = (b, weight) if isinstance(weight, Tensor) else (b,)
    return [Part((a,), lambda: a * (1 - weight)), Part(read_by_end, lambda: b * weight)]


def _index_add(
    a: Any, dim: int, index: Any, source: Any, *, alpha: Any = 1, **_: Any
) -> list[Part | None]:
    def added() -> Tensor:
        return torch.zeros_like(a).index_add(dim, index, source, alpha=alpha)

    return [_plain(a), Part((source,), added)]


def _scatter_add(a: Any, dim: int, index: Any, src: Any, **_: Any) -> list[Part | None]:
    def added() -> Tensor:
        return torch.zeros_like(a).scatter_add(dim, index, src)

    return [_plain(a), Part((src,), added)]


def _scatter_reduce(
    a: Any, dim: int, index: Any, src: Any, reduce: str = "", *, include_self: bool = True, **_: Any
) -> list[Part | None]:
    # Without its own values, or with a maximum, a scatter adds nothing to `a`.
    adds_to_a = reduce == "sum" and include_self
    if not adds_to_a:
        return []

    # A sum is what scatter_add makes.
    return _scatter_add(a, dim, index, src)


def _index_put(a: Any, indices: Any, values: Any, accumulate: bool = False) -> list[Part | None]:
    # Without `accumulate` the values replace those of `a`.
    if not accumulate or not isinstance(values, Tensor):
        return []

    def added() -> Tensor:
        return torch.zeros_like(a).index_put(indices, values, accumulate=True)

    return [_plain(a), Part((values,), added)]


FORMS: dict[str, Callable[..., list[Part | None]]] = {
    **dict.fromkeys(("add", "add_", "__add__", "__radd__", "__iadd__"), _add),
    **dict.fromkeys(("sub", "sub_", "subtract", "__sub__", "__isub__"), _sub),
    **dict.fromkeys(("rsub", "__rsub__"), _rsub),
    **dict.fromkeys(("addcmul", "addcmul_"), _addcmul),
    **dict.fromkeys(("addcdiv", "addcdiv_"), _addcdiv),
    **dict.fromkeys(("addmm", "addmm_", "baddbmm", "baddbmm_"), _addmm),
    **dict.fromkeys(("lerp", "lerp_"), _lerp),
    **dict.fromkeys(("index_add", "index_add_"), _index_add),
    **dict.fromkeys(("scatter_add", "scatter_add_"), _scatter_add),
    **dict.fromkeys(("index_put", "index_put_"), _index_put),
    **dict.fromkeys(("scatter_reduce", "scatter_reduce_"), _scatter_reduce),
}


# Keyword arguments of torch by the names that the forms give them.
_ARGUMENTS = {
    "input": "a",
    "tensor1": "x",
    "tensor2": "y",
    "mat1": "x",
    "mat2": "y",
    "batch1": "x",
    "batch2": "y",
    "end": "b",
}


def parts_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Part | None]:
    """Return the terms of a call in a fixed order, [] if the call adds nothing.

    None stands for a term that is no tensor.

    Args:
        name: of the call.
        args: its positional arguments.
        kwargs: its keyword arguments.
    """
    # 1. The form in which the call adds.
    form = FORMS.get(name)
    if form is None:
        return []

    # 2. Its terms. A call with arguments that the form does not know adds in another way.
    renamed = {_ARGUMENTS.get(key, key): value for key, value in kwargs.items()}
    try:
        return form(*args, **renamed)
    except TypeError:
        return []


def terms_of(
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    value_of: Callable[[Tensor], int | None],
) -> tuple[Term, ...] | None:
    """Return a call's terms by value index, None if it adds fewer than two tensors.

    Args:
        name: of the call.
        args: its positional arguments.
        kwargs: its keyword arguments.
        value_of: the value index of a tensor, None if the call did not read it.
    """
    parts = parts_of(name, args, kwargs)

    # A tensor and a number make no sum of two tensors.
    numbers_added = parts.count(None)
    if len(parts) - numbers_added < 2:
        return None

    # A number has a place among the terms, too.
    return tuple(_term(part, value_of) for part in parts)


def _term(part: Part | None, value_of: Callable[[Tensor], int | None]) -> Term:
    """Return a term by value index; one without values for a term that is no tensor."""
    if part is None:
        return Term((), None)

    # 1. The values that it is made of, as far as the call read them.
    values: list[int] = []
    for tensor in part.tensors:
        value = value_of(tensor)
        if value is not None:
            values.append(value)

    # 2. A plain operand is the only one of them.
    operand = None
    if part.plain and values:
        operand = values[0]
    return Term(tuple(values), operand, part.product)


def number_added(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    """Return the number that a call adds to a tensor, 0 if it adds none.

    Args:
        name: of the call.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Example:
        >>> number_added("__radd__", (torch.zeros(2), 1.0), {})
        1.0
    """
    # 1. The call adds or subtracts.
    form = FORMS.get(name)
    if form not in (_add, _sub):
        return 0.0

    # 2. One operand is a number, the other a tensor.
    operands = (*args[:2], kwargs.get("other"))
    numbers = [value for value in operands if _is_number(value)]
    if len(numbers) != 1:
        return 0.0

    # 3. Its size and sign.
    number = float(numbers[0] * kwargs.get("alpha", 1))
    if form is _sub:
        return -number
    return number


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def term_tensor(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], position: int) -> Tensor:
    """Compute the term at `position` of an addition about to run."""
    part = parts_of(name, args, kwargs)[position]
    assert part is not None
    value = part.compute()
    return value if isinstance(value, Tensor) else torch.as_tensor(value)
