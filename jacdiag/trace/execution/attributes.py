"""Plain attributes of modules: copied with the modules, and put back after a run wrote to them."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from jacdiag.trace.execution.tensors import version_of

CopyModule = Callable[[nn.Module, dict[int, Any]], nn.Module]
_OWN = frozenset(nn.Module().__dict__)  # parameters, buffers, modules, hooks: not plain
_CALLABLES = (types.MethodType, types.FunctionType, functools.partial)
_PLAIN = (int, float, complex, str, bytes, bool, type(None), type)


def copy_attribute(value: Any, memo: dict[int, Any], copy_module: CopyModule) -> Any:
    """Return a deep copy of a plain attribute; locks, process groups and streams are shared.

    A function is copied if its closure holds something that has a copy. A monkey-patched `forward`
    would otherwise go on to run the original module with the original's weights.

    Args:
        value: the attribute.
        memo: id of an original -> its copy.
        copy_module: copies a module.
    """
    # 1. What has a copy, modules and tensors.
    if isinstance(value, Tensor) and id(value) not in memo:
        memo[id(value)] = value.detach().clone()
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, nn.Module):
        return copy_module(value, memo)

    # 2. Containers, whose items are copied in the same way.
    again = functools.partial(copy_attribute, memo=memo, copy_module=copy_module)
    if type(value) in (list, tuple):
        return type(value)(map(again, value))
    if type(value) is dict:
        return {key: again(item) for key, item in value.items()}

    # 3. Functions, and anything else.
    if isinstance(value, _CALLABLES):
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
    # 1. A method of another object.
    if isinstance(value, types.MethodType):
        return types.MethodType(again(value.__func__), again(value.__self__))

    # 2. A function with arguments.
    if isinstance(value, functools.partial):
        function = again(value.func)
        args = [again(item) for item in value.args]
        return functools.partial(function, *args, **again(dict(value.keywords)))

    # 3. A function by itself.
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

    @classmethod
    def of(cls, value: Any) -> _Original:
        """Return an attribute as it is at present."""
        return cls(value, _fingerprint(value), _duplicate(value))

    def renewed(self) -> _Original:
        """Return the same attribute with a fresh object in place of one that was written to."""
        fresh = _duplicate(self.pristine)
        return _Original(fresh, _fingerprint(fresh), self.pristine)


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
            self._originals.append((module, originals))

            # Parameters, buffers, modules and hooks are put back in other ways.
            for name, value in vars(module).items():
                if name not in _OWN:
                    originals[name] = _Original.of(value)

    def restore(self) -> list[str]:
        """Put back what was written to since; return the names of those attributes."""
        written: list[str] = []
        for module, originals in self._originals:
            attributes = vars(module)
            for name in _names_written(attributes, originals):
                written.append(name)

                # 1. An attribute that a run added.
                if name not in originals:
                    del attributes[name]
                    continue

                # 2. One that a run changed, or put another object in place of: a fresh copy of
                # what it was.
                originals[name] = originals[name].renewed()
                attributes[name] = originals[name].value
        return written

    def written_to(self) -> list[nn.Module]:
        """Return the modules with an attribute that was written to since, and put nothing back."""
        modules: list[nn.Module] = []
        for module, originals in self._originals:
            if _names_written(vars(module), originals):
                modules.append(module)
        return modules

    def unchanged_tensors(self) -> list[Tensor]:
        """Return the tensors in attributes that were not written to since."""
        tensors: list[Tensor] = []
        for module, originals in self._originals:
            written = _names_written(vars(module), originals)
            for name, original in originals.items():
                if name not in written:
                    collect_attribute_tensors(original.value, tensors)
        return tensors


def _names_written(attributes: dict[str, Any], originals: dict[str, _Original]) -> list[str]:
    """Return the plain attributes of a module that were added or changed.

    Args:
        attributes: all attributes of the module.
        originals: its plain attributes as they were.
    """
    # 1. Attributes that a run added.
    names = [name for name in attributes if name not in originals and name not in _OWN]

    # 2. Attributes that it changed, or put another object in place of.
    for name, original in originals.items():
        is_same_object = name in attributes and attributes[name] is original.value
        if not is_same_object or _fingerprint(original.value) != original.fingerprint:
            names.append(name)
    return names


def collect_attribute_tensors(value: Any, into: list[Tensor], depth: int = 5) -> None:
    """Append the tensors in a module's plain attributes, containers and objects included.

    Args:
        value: the attributes.
        into: the list that is appended to.
        depth: how many levels of containers are looked into.
    """
    # 1. A tensor.
    if isinstance(value, Tensor):
        into.append(value)
        return

    # 2. What the value holds, if it is not too deep inside others.
    if depth > 0:
        for item in _items_of(value):
            collect_attribute_tensors(item, into, depth - 1)


def _items_of(value: Any) -> Iterable[Any]:
    """Return what a container holds, the attributes of an object, () for anything else."""
    # 1. Containers.
    if isinstance(value, (list, tuple, set)):
        return value
    if isinstance(value, dict):
        return value.values()

    # 2. The attributes of an object are a level of their own.
    if _has_parts(value):
        return (vars(value),)

    # 3. Numbers, texts, modules and functions.
    return ()


def _has_parts(value: Any) -> bool:
    """Return whether a value is an object whose attributes may be looked at."""
    # 1. A number, a text, a module or a function.
    if isinstance(value, (nn.Module, _PLAIN)) or callable(value):
        return False

    # 2. A configuration, which a forward only reads.
    if type(value).__name__.endswith("Config"):
        return False
    return hasattr(value, "__dict__")


def _fingerprint(value: Any, depth: int = 4) -> Any:
    """Return what changes when a value is written to: identities, lengths, versions."""
    # 1. Leaves.
    if isinstance(value, Tensor):
        return id(value), version_of(value)
    if isinstance(value, _PLAIN):
        return value
    if not depth:
        return id(value)

    # 2. Containers.
    if isinstance(value, (list, tuple)):
        items = tuple(_fingerprint(item, depth - 1) for item in value)
        return id(value), items
    if isinstance(value, dict):
        entries = tuple((key, _fingerprint(item, depth - 1)) for key, item in value.items())
        return id(value), entries

    # 3. Objects.
    if _has_parts(value):
        return id(value), _fingerprint(vars(value), depth - 1)
    return id(value)


def _duplicate(value: Any, depth: int = 4) -> Any:
    """Return a copy that a run may write to; modules, functions, configurations are shared."""
    # 1. Tensors. A parameter is the skeleton's own.
    if isinstance(value, nn.Parameter):
        return value
    if isinstance(value, Tensor):
        return value.clone()

    # 2. What is not looked into.
    if not depth or isinstance(value, _PLAIN):
        return value

    # 3. Containers.
    if type(value) in (list, tuple):
        return type(value)(_duplicate(item, depth - 1) for item in value)
    if type(value) is dict:
        return _duplicate_items(value, depth)

    # 4. Objects.
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
