"""Plain attributes of modules: copied with the modules, and put back after a run wrote to them."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

CopyModule = Callable[[nn.Module, dict[int, Any]], nn.Module]
_OWN = frozenset(nn.Module().__dict__)  # parameters, buffers, modules, hooks: not plain
_PLAIN = (int, float, complex, str, bytes, bool, type(None), type)


def copy_attribute(value: Any, memo: dict[int, Any], copy_module: CopyModule) -> Any:
    """Return a deep copy of a plain attribute; locks, process groups and streams are shared.

    A function is copied if its closure holds something that has a copy. A monkey-patched `forward`
    would otherwise go on to run the original module with the original's weights.
    """
    again = functools.partial(copy_attribute, memo=memo, copy_module=copy_module)
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, nn.Module):
        return copy_module(value, memo)
    if isinstance(value, Tensor):
        return memo.setdefault(id(value), value.detach().clone())
    if type(value) in (list, tuple):
        return type(value)(again(item) for item in value)
    if type(value) is dict:
        return {key: again(item) for key, item in value.items()}
    if isinstance(value, types.MethodType):
        return types.MethodType(again(value.__func__), again(value.__self__))
    if isinstance(value, functools.partial):
        return functools.partial(
            again(value.func), *map(again, value.args), **again(dict(value.keywords))
        )
    if isinstance(value, types.FunctionType):
        return _copy_function(value, memo, again)
    try:
        return copy.deepcopy(value, memo)
    except Exception:
        return value


def _copy_function(
    function: types.FunctionType, memo: dict[int, Any], again: Callable[[Any], Any]
) -> Any:
    if not function.__closure__:
        return function
    cells = tuple(types.CellType() for _ in function.__closure__)
    clone = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, cells
    )
    clone.__kwdefaults__ = function.__kwdefaults__
    memo[id(function)] = clone  # before the cells are filled: a function may hold itself
    for new, old in zip(cells, function.__closure__, strict=True):
        try:
            new.cell_contents = again(old.cell_contents)
        except ValueError:  # an empty cell stays empty
            continue
    clone.__dict__.update(function.__dict__)
    if "__wrapped__" in function.__dict__:
        clone.__dict__["__wrapped__"] = again(function.__dict__["__wrapped__"])
    return clone


class Attributes:
    """The plain attributes of a skeleton's modules as they were before any run.

    Models keep things on themselves (a cache, a counter, the last attention map). A run must not
    see what the one before left there: a key cache that is reused as it was gives the right value
    and a wrong Jacobian.
    """

    def __init__(self, root: nn.Module) -> None:
        self._kept: list[tuple[nn.Module, dict[str, tuple[Any, Any, Any]]]] = []
        for module in root.modules():
            plain = {k: v for k, v in vars(module).items() if k not in _OWN}
            self._kept.append(
                (module, {k: (v, _print(v), _duplicate(v)) for k, v in plain.items()})
            )

    def restore(self) -> list[str]:
        """Put back what was written to since; return the names of those attributes."""
        written = []
        for module, kept in self._kept:
            now = vars(module)
            for name in [n for n in now if n not in kept and n not in _OWN]:
                del now[name]
                written.append(name)
            for name, (value, print_, pristine) in kept.items():
                if name not in now or now[name] is not value or _print(value) != print_:
                    fresh = _duplicate(pristine)
                    now[name] = fresh
                    kept[name] = (fresh, _print(fresh), pristine)
                    written.append(name)
        return written


def collect_attribute_tensors(value: Any, into: list[Tensor], depth: int = 5) -> None:
    """Append the tensors in a module's plain attributes, containers and objects included."""
    if isinstance(value, Tensor):
        into.append(value)
    elif depth and isinstance(value, (list, tuple, set)):
        for item in value:
            collect_attribute_tensors(item, into, depth - 1)
    elif depth and isinstance(value, dict):
        for item in value.values():
            collect_attribute_tensors(item, into, depth - 1)
    elif depth and _has_parts(value):
        collect_attribute_tensors(vars(value), into, depth - 1)


def _has_parts(value: Any) -> bool:
    """Return whether a value is an object whose attributes may be looked at."""
    if isinstance(value, (nn.Module, _PLAIN)) or callable(value):
        return False
    if type(value).__name__.endswith("Config"):
        return False
    return hasattr(value, "__dict__")


def _print(value: Any, depth: int = 4) -> Any:
    """Return what changes when a value is written to: identities, lengths, versions."""
    if isinstance(value, Tensor):
        version = 0 if value.is_inference() else value._version
        return id(value), version
    if isinstance(value, _PLAIN):
        return value
    if not depth:
        return id(value)
    if isinstance(value, (list, tuple)):
        return id(value), tuple(_print(v, depth - 1) for v in value)
    if isinstance(value, dict):
        return id(value), tuple((k, _print(v, depth - 1)) for k, v in value.items())
    if _has_parts(value):
        return id(value), _print(vars(value), depth - 1)
    return id(value)


def _duplicate(value: Any, depth: int = 4) -> Any:
    """Return a copy that a run may write to; modules, functions, configurations are shared."""
    if isinstance(value, Tensor):
        return value if isinstance(value, nn.Parameter) else value.clone()
    if not depth or isinstance(value, _PLAIN):
        return value
    if type(value) in (list, tuple):
        return type(value)(_duplicate(v, depth - 1) for v in value)
    if type(value) is dict:
        return {k: _duplicate(v, depth - 1) for k, v in value.items()}
    if not _has_parts(value):
        return value
    try:
        clone = copy.copy(value)
        vars(clone).update({k: _duplicate(v, depth - 1) for k, v in vars(value).items()})
    except Exception:  # an object that refuses is shared
        return value
    return clone
