"""Optimizer states inside checkpoint files: has the optimizer taken a step?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    for name, entry in (flat or {}).items():
        if name.rpartition(".")[2] == "step" and _is_positive(entry):
            return True
    return any(_has_stepped(state) for state in _optimizer_states(tree, 0))


def _optimizer_states(node: Any, depth: int) -> Iterator[Mapping[Any, Any]]:
    """Yield the states of all optimizers in a tree, parameter by parameter."""
    if not isinstance(node, Mapping) or depth > _DEEPEST:
        return
    state = node.get("state")
    if isinstance(node.get("param_groups"), list | tuple) and isinstance(state, Mapping):
        yield state
        return
    for child in node.values():
        yield from _optimizer_states(child, depth + 1)
        # Lightning keeps a list of optimizers.
        if isinstance(child, list | tuple) and len(child) < _LONGEST:
            for item in child:
                yield from _optimizer_states(item, depth + 1)


def _has_stepped(state: Mapping[Any, Any]) -> bool:
    """Return whether one parameter has a step count above 0 or, without a count, momentum."""
    for entry in state.values():
        if not isinstance(entry, Mapping):
            continue
        if "step" in entry:
            if _is_positive(entry["step"]):
                return True
            continue
        momentum = entry.get("momentum_buffer")
        if isinstance(momentum, Tensor) and momentum.numel() and bool((momentum != 0).any()):
            return True
    return False


def _is_positive(value: Any) -> bool:
    """Return whether a step count is above 0: a number, a tensor, or a scalar still in its file."""
    if not isinstance(value, Tensor | int | float):
        reader = getattr(value, "read", None)
        if reader is None or tuple(value.shape):
            return False
        value = reader()
    if isinstance(value, Tensor) and value.numel() != 1:
        return False
    return float(value) > 0
