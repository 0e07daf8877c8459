"""Optimizer states inside checkpoint files: has the optimizer taken a step?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

_DEEPEST = 4  # levels of a file at which an optimizer may stand
_LONGEST = 16  # optimizers in a list


def optimizer_stepped(tree: Any, flat: Mapping[str, Any] | None = None) -> bool:
    """Return whether the contents of a file include an optimizer that has taken a step.

    Args:
        tree: nested mappings, as torch.save wrote them.
        flat: entries of the optimizer by dotted names, of a file with one level.

    Example:
        >>> groups = [{"params": [0]}]
        >>> optimizer_stepped({"opt": {"state": {0: {"step": 3}}, "param_groups": groups}})
        True
    """
    # 1. A file with one level. A count may be a scalar that is still in the file.
    for name, entry in (flat or {}).items():
        is_count = name.rpartition(".")[2] == "step"
        if is_count and _is_positive(entry):
            return True

    # 2. A tree, which may hold several optimizers. One that has stepped is enough.
    states = _optimizer_states(tree, 0)
    return any(map(_has_stepped, states))


def _optimizer_states(node: Any, depth: int) -> Iterator[Mapping[Any, Any]]:
    """Yield the states of all optimizers in a tree, parameter by parameter."""
    if not isinstance(node, Mapping) or depth > _DEEPEST:
        return

    # 1. An optimizer.
    state = node.get("state")
    has_groups = isinstance(node.get("param_groups"), list | tuple)
    if has_groups and isinstance(state, Mapping):
        yield state
        return

    # 2. A container that may hold some.
    for child in node.values():
        for item in _items_of(child):
            yield from _optimizer_states(item, depth + 1)


def _items_of(child: Any) -> Sequence[Any]:
    """Return the items of a short list, such as the optimizers of Lightning; else the child alone.

    A long list holds something else.
    """
    is_list = isinstance(child, list | tuple)
    if is_list and len(child) < _LONGEST:
        return child
    return [child]


def _has_stepped(state: Mapping[Any, Any]) -> bool:
    """Return whether one parameter has a step count above 0 or, without a count, momentum."""
    return any(_parameter_has_stepped(entry) for entry in state.values())


def _parameter_has_stepped(entry: Any) -> bool:
    """Return whether the state of one parameter is one after a step."""
    if not isinstance(entry, Mapping):
        return False
    if "step" in entry:
        return _is_positive(entry["step"])
    # SGD counts no steps.
    momentum = entry.get("momentum_buffer")
    if not isinstance(momentum, Tensor):
        return False
    return bool((momentum != 0).any())


def _is_positive(value: Any) -> bool:
    """Return whether a step count is above 0: a number, a tensor, or a scalar still in its file."""
    # 1. A count in a file is read only if it is a single number.
    if not isinstance(value, Tensor | int | float):
        reader = getattr(value, "read", None)
        if reader is None or tuple(value.shape):
            return False
        value = reader()

    # 2. Any other tensor is no count.
    if isinstance(value, Tensor) and value.numel() != 1:
        return False
    return float(value) > 0
