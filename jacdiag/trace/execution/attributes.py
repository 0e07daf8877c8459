"""Plain attributes of modules: copied with the modules, and put back after a run wrote to them."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
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

    # 1. What has a copy, modules and tensors.
    if isinstance(value, Tensor) and id(value) not in memo:
        memo[id(value)] = value.detach().clone()
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, nn.Module):
        return copy_module(value, memo)

    # 2. Containers.
    if type(value) in (list, tuple):
        return type(value)(again(item) for item in value)
    if type(value) is dict:
        return {key: again(item) for key, item in value.items()}

    # 3. Functions, and anything else.
    if isinstance(value, (types.MethodType, types.FunctionType, functools.partial)):
        return _copy_callable(value, memo, again)
    return _copy_or_share(value, memo)


def _copy_or_share(value: Any, memo: dict[int, Any]) -> Any:
    """Return a deep copy of an object, or the object itself if it refuses to be copied."""
    try:
        return copy.deepcopy(value, memo)
    except Exception:
        return value


def _copy_callable(value: Any, memo: dict[int, Any], again: Callable[[Any], Any]) -> Any:
    """Return a copy of a bound method, a partial or a function."""
    if isinstance(value, types.MethodType):
        return types.MethodType(again(value.__func__), again(value.__self__))
    if isinstance(value, functools.partial):
        function = again(value.func)
        args = [again(item) for item in value.args]
        return functools.partial(function, *args, **again(dict(value.keywords)))
    return _copy_function(value, memo, again)


def _copy_function(
    function: types.FunctionType, memo: dict[int, Any], again: Callable[[Any], Any]
) -> Any:
    """Return a copy of a function with a closure; one without is shared."""
    if not function.__closure__:
        return function

    # 1. The same code with cells of its own, still empty.
    cells = tuple(types.CellType() for _ in function.__closure__)
    clone = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, cells
    )
    clone.__kwdefaults__ = function.__kwdefaults__
    memo[id(function)] = clone  # before the cells are filled: a function may hold itself

    # 2. The contents of the cells, and the attributes.
    for new, old in zip(cells, function.__closure__, strict=True):
        try:
            new.cell_contents = again(old.cell_contents)
        except ValueError:  # an empty cell stays empty
            continue
    clone.__dict__.update(function.__dict__)
    if "__wrapped__" in function.__dict__:
        clone.__dict__["__wrapped__"] = again(function.__dict__["__wrapped__"])
    return clone


@dataclass(frozen=True)
class _Original:
    """A plain attribute as it was before any run.

    Attributes:
        value: the object that the module holds.
        fingerprint: what changes if that object is written to.
        pristine: a copy of it, to which nothing is written.
    """

    value: Any
    fingerprint: Any
    pristine: Any


class Attributes:
    """The plain attributes of a skeleton's modules as they were before any run.

    Models keep things on themselves (a cache, a counter, the last attention map). A run must not
    see what the one before left there: a key cache that is reused as it was gives the right value
    and a wrong Jacobian.
    """

    def __init__(self, root: nn.Module) -> None:
        self._originals: list[tuple[nn.Module, dict[str, _Original]]] = []
        for module in root.modules():
            originals: dict[str, _Original] = {}
            for name, value in vars(module).items():
                if name not in _OWN:
                    originals[name] = _Original(value, _fingerprint(value), _duplicate(value))
            self._originals.append((module, originals))

    def restore(self) -> list[str]:
        """Put back what was written to since; return the names of those attributes."""
        written: list[str] = []
        for module, originals in self._originals:
            attributes = vars(module)

            # 1. Attributes that a run added.
            added = [name for name in attributes if name not in originals and name not in _OWN]
            for name in added:
                del attributes[name]
            written += added

            # 2. Attributes that a run changed.
            for name, original in originals.items():
                is_same_object = name in attributes and attributes[name] is original.value
                if is_same_object and _fingerprint(original.value) == original.fingerprint:
                    continue
                fresh = _duplicate(original.pristine)
                attributes[name] = fresh
                originals[name] = _Original(fresh, _fingerprint(fresh), original.pristine)
                written.append(name)
        return written


def collect_attribute_tensors(value: Any, into: list[Tensor], depth: int = 5) -> None:
    """Append the tensors in a module's plain attributes, containers and objects included."""
    if isinstance(value, Tensor):
        into.append(value)
        return
    if not depth:
        return

    # What the value holds.
    items: Iterable[Any] = ()
    if isinstance(value, (list, tuple, set)):
        items = value
    elif isinstance(value, dict):
        items = value.values()
    elif _has_parts(value):
        items = (vars(value),)

    for item in items:
        collect_attribute_tensors(item, into, depth - 1)


def _has_parts(value: Any) -> bool:
    """Return whether a value is an object whose attributes may be looked at."""
    if isinstance(value, (nn.Module, _PLAIN)) or callable(value):
        return False
    if type(value).__name__.endswith("Config"):
        return False
    return hasattr(value, "__dict__")


def _fingerprint(value: Any, depth: int = 4) -> Any:
    """Return what changes when a value is written to: identities, lengths, versions."""
    # 1. Leaves.
    if isinstance(value, Tensor):
        version = 0 if value.is_inference() else value._version
        return id(value), version
    if isinstance(value, _PLAIN):
        return value
    if not depth:
        return id(value)

    # 2. What holds other values.
    contents: Any
    if isinstance(value, (list, tuple)):
        contents = tuple(_fingerprint(item, depth - 1) for item in value)
    elif isinstance(value, dict):
        contents = tuple((key, _fingerprint(item, depth - 1)) for key, item in value.items())
    elif _has_parts(value):
        contents = _fingerprint(vars(value), depth - 1)
    else:
        return id(value)
    return id(value), contents


def _duplicate(value: Any, depth: int = 4) -> Any:
    """Return a copy that a run may write to; modules, functions, configurations are shared."""
    # 1. Leaves.
    if isinstance(value, nn.Parameter):
        return value
    if isinstance(value, Tensor):
        return value.clone()
    if not depth or isinstance(value, _PLAIN):
        return value

    # 2. Containers.
    if type(value) in (list, tuple):
        return type(value)(_duplicate(item, depth - 1) for item in value)
    if type(value) is dict:
        return _duplicate_items(value, depth)

    # 3. Objects.
    return _duplicate_object(value, depth)


def _duplicate_object(value: Any, depth: int) -> Any:
    """Return a copy of an object with copies of its attributes; one that refuses is shared."""
    if not _has_parts(value):
        return value
    try:
        clone = copy.copy(value)
        vars(clone).update(_duplicate_items(vars(value), depth))
    except Exception:
        return value
    return clone


def _duplicate_items(items: dict[Any, Any], depth: int) -> dict[Any, Any]:
    """Return a dict with copies of the values, as `_duplicate` makes them."""
    return {key: _duplicate(item, depth - 1) for key, item in items.items()}
