"""Builds a module without memory for its parameters; what it computes for itself (buffers) stays
real.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def empty_parameters() -> Iterator[None]:
    """Inside, every parameter that a module registers moves to the meta device at once, so that
    none is filled.

    Buffers are left alone: no file has the ones that are not persistent (rotary tables, causal
    masks).
    """
    register: Callable[..., None] = nn.Module.register_parameter

    def emptied(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        placed = module._parameters[name]
        # one that is has been here before: a tie keeps its object
        if placed is not None and not placed.is_meta:
            module._parameters[name] = _on_meta(placed)

    nn.Module.register_parameter = emptied  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _on_meta(param: nn.Parameter) -> nn.Parameter:
    made: Any = type(param)(param.detach().to("meta"), requires_grad=param.requires_grad)
    made.__dict__.update(param.__dict__)
    return made  # type: ignore[no-any-return]
