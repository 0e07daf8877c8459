"""The tensors of one call: what it read, what it made, and whether that is anything new."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from jacdiag.trace.record import collect, writes_in_place


def is_identity(name: str, result: Any, read: Any) -> bool:
    """Whether a call made nothing new: `x.to(x.dtype)`, dropout in eval mode."""
    if writes_in_place(name):
        return False
    made: list[Tensor] = []
    collect(result, made)
    given: list[Tensor] = []
    collect(read, given)
    ids = {id(t) for t in given}
    return all(id(t) in ids for t in made)


def operand_at(args: Any, kwargs: Any, position: int) -> Tensor:
    operands: list[Tensor] = []
    collect((args, kwargs), operands)
    return operands[position]


def pick(result: Any, read: Any, position: int) -> Tensor:
    tensors: list[Tensor] = []
    collect(result if position >= 0 else read, tensors)
    return tensors[position if position >= 0 else -1 - position]
