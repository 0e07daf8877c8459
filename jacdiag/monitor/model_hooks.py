"""Hooks on a watched model that are left out when the model is copied, pickled or saved.

A forward hook lies in a dict of the module, and `torch.save(model)`, `copy.deepcopy(model)` and
`AveragedModel(model)` take that dict along. While a hook of the watch is on a module, `copyreg`
holds a function for the module's class, which `pickle` and `copy` call. It leaves these hooks out
and keeps the user's own.
"""

from __future__ import annotations

import copyreg
from collections import Counter, OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import nn

_PRE_HOOKS, _FORWARD_HOOKS = "_forward_pre_hooks", "_forward_hooks"
_PROTOCOL = 2  # of torch.save, the lowest of those in use; later ones read what it gives

Reduced = tuple[Any, ...]


class ModelHook:
    """A callable that a watch puts on a model; subclasses define `__call__`."""

    def __reduce__(self) -> Reduced:
        """Become a function that does nothing.

        This serves classes that copy their hooks by methods of their own.
        """
        return getattr, (nullcontext(), "__exit__")


class AttachedHook:
    """A hook on a module, until `remove`.

    Args:
        module: gets the hook.
        hook: called as torch calls hooks that take keyword arguments.
        after: a forward hook; else a forward pre-hook.
    """

    def __init__(self, module: nn.Module, hook: ModelHook, *, after: bool = False) -> None:
        """Put the hook on the module; see the class for the arguments."""
        self.module = module
        self.hook = hook
        self.after = after
        register: Any = module.register_forward_pre_hook
        if after:
            register = module.register_forward_hook
        self._handle: Any = register(hook, with_kwargs=True)
        _begin_to_leave_out(type(module))
        self._counted = True

    def suspend(self) -> None:
        """Take the hook off for a while."""
        self._hooks().pop(self._handle.id, None)

    def resume(self) -> None:
        """Put the hook back under its old key, so that code compiled with the hook stays valid."""
        self._hooks()[self._handle.id] = self.hook

    def remove(self) -> None:
        """Take the hook off for good."""
        self._handle.remove()
        if self._counted:
            self._counted = False
            _end_to_leave_out(type(self.module))

    def _hooks(self) -> dict[int, Any]:
        """Return the module's own dict of hooks of this kind."""
        name = _FORWARD_HOOKS if self.after else _PRE_HOOKS
        hooks: dict[int, Any] = getattr(self.module, name)
        return hooks


# The classes of modules that carry hooks of a watch: how many there are, and what `copyreg` held
# before.
_COUNTS: Counter[type] = Counter()
_EARLIER: dict[type, Callable[[Any], Any]] = {}


def _begin_to_leave_out(kind: type) -> None:
    """Count a hook on a module of a class, and register the class at the first one."""
    _COUNTS[kind] += 1
    if _COUNTS[kind] > 1:
        return

    # A function that somebody has registered before is called, and put back at the end.
    before = copyreg.dispatch_table.get(kind)
    if before is not None:
        _EARLIER[kind] = before
    copyreg.dispatch_table[kind] = reduce_without_hooks


def _end_to_leave_out(kind: type) -> None:
    """Stop counting a hook, and put back what was registered at the last one."""
    _COUNTS[kind] -= 1
    if _COUNTS[kind] > 0:
        return

    del _COUNTS[kind]
    before = _EARLIER.pop(kind, None)
    if copyreg.dispatch_table.get(kind) is not reduce_without_hooks:
        return  # somebody has registered a function of their own since
    if before is None:
        del copyreg.dispatch_table[kind]
    else:
        copyreg.dispatch_table[kind] = before


def reduce_without_hooks(module: nn.Module) -> str | Reduced:
    """Return what the module gives to `pickle` and `copy`, without the hooks of a watch."""
    # 1. What it would give without a watch.
    earlier = _EARLIER.get(type(module))
    reduced: str | Reduced
    if earlier is not None:
        reduced = earlier(module)
    else:
        reduced = module.__reduce_ex__(_PROTOCOL)

    # 2. Its third part is the state, if it has one.
    if isinstance(reduced, str) or len(reduced) < 3:
        return reduced
    return (*reduced[:2], _clean_state(reduced[2]), *reduced[3:])


def _clean_state(state: Any) -> Any:
    """Return the state of a module without the hooks of a watch.

    Args:
        state: the dict of the module, or a pair of its dict and its slots.
    """
    # 1. The dict of the module.
    if isinstance(state, tuple) and len(state) == 2:
        return _clean_state(state[0]), state[1]
    if not isinstance(state, dict):
        return state

    # 2. The keys of the hooks in it.
    keys = {*_hook_keys(state.get(_PRE_HOOKS)), *_hook_keys(state.get(_FORWARD_HOOKS))}
    if not keys:
        return state

    # 3. Other tables, such as _forward_hooks_with_kwargs, have the same keys as the hooks.
    clean = dict(state)
    for name, table in state.items():
        is_of_hooks = name.startswith((_PRE_HOOKS, _FORWARD_HOOKS))
        if is_of_hooks and isinstance(table, dict):
            clean[name] = _without_keys(table, keys)
    return clean


def _without_keys(table: dict[Any, Any], keys: set[int]) -> OrderedDict[Any, Any]:
    return OrderedDict((key, value) for key, value in table.items() if key not in keys)


def _hook_keys(hooks: Any) -> list[int]:
    """Return the keys of the hooks of a watch."""
    if not isinstance(hooks, dict):
        return []
    keys: list[int] = []
    for key, hook in hooks.items():
        if isinstance(hook, ModelHook):
            keys.append(key)
    return keys
