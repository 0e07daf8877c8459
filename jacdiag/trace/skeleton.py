"""A module's code without its weights: what every recording and every re-run executes.

A skeleton is a structural copy of a module whose parameters and buffers are empty meta tensors and whose hooks are
cleared. It is run with a *state*, a dict of tensors that may come from anywhere (the guest by reference, a raised copy
of one block, a file). Nothing of the guest is touched, no memory is spent, and wrappers drop out of the picture.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

_HOOK_DICTS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_WRAPPER_ATTRIBUTES = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def unwrap(module: nn.Module) -> nn.Module:
    """Returns the module that a wrapper (compile, FSDP, activation checkpointing, DDP, DataParallel) holds."""
    while True:
        inner = next((module._modules[a] for a in _WRAPPER_ATTRIBUTES if module._modules.get(a) is not None), None)
        if inner is None and isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = module.module
        if inner is None:
            return module
        module = inner


class Skeleton:
    """The structural copy of `module`, in eval mode, and the guest's tensors by reference.

    Attributes:
        root: the copy. Its parameters and buffers are on the meta device.
        params: name -> the guest's parameter, detached (same storage). One name per tie.
        buffers: name -> the guest's buffer (same storage); clone before a run that may write to it.
        valueless: the guest itself is on the meta device: shapes and no values.
        aliases: every name of a tied tensor -> the one name that stands in `params` or `buffers`.
    """

    def __init__(self, module: nn.Module) -> None:
        module = unwrap(module)
        memo: dict[int, Any] = {}
        self.root = _copy_module(module, memo)
        self.root.eval()
        self.aliases: dict[str, str] = {}
        self.params = self._collect(module.named_parameters(remove_duplicate=False))
        self.buffers = self._collect(module.named_buffers(remove_duplicate=False))
        self.valueless = any(t.is_meta for t in self.params.values())
        self.names = {id(m): name for name, m in self.root.named_modules(remove_duplicate=True)}

    def _collect(self, named: Any) -> dict[str, Tensor]:
        seen: dict[int, str] = {}
        out: dict[str, Tensor] = {}
        for raw_name, tensor in named:
            name = plain_name(raw_name)
            first = seen.setdefault(id(tensor), name)
            self.aliases[name] = first
            if first == name:
                out[name] = tensor.detach()
        return out

    def fresh_state_of(self, prefix: str) -> dict[str, Tensor]:
        """Returns the state under module `prefix` ("" for all) for one run, one name per tie, relative to `prefix`.

        Buffers are cloned, since a forward may write to them; parameters are the guest's own memory.
        """
        start = f"{prefix}." if prefix else ""
        state: dict[str, Tensor] = {}
        seen: set[str] = set()
        for name, first in self.aliases.items():
            if name.startswith(start) and first not in seen:
                seen.add(first)
                tensor = self.params.get(first)
                state[name[len(start) :]] = self.buffers[first].clone() if tensor is None else tensor
        return state

    def own(self, name: str) -> None:
        """Makes a copy stand in for a parameter that the code writes to: the guest's own memory is never written."""
        self.params[name] = self.params[name].clone()

    def settled(self) -> bool:
        """Whether the last run left the structure as it was; some code swaps its own modules when it first runs."""
        names = {id(m): name for name, m in self.root.named_modules(remove_duplicate=True)}
        same, self.names = names == self.names, names
        return same

    def module(self, name: str) -> nn.Module:
        """Returns the copy's submodule of that name ("" is the root)."""
        return self.root.get_submodule(name) if name else self.root


def plain_name(name: str) -> str:
    """Strips what wrappers leave in parameter names."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_ATTRIBUTES)


def _copy_module(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Copies the structure: first every registered module and tensor, then the plain attributes.

    In that order an attribute that refers to a module or a weight (bound methods, partials, lists of layers) finds the
    copy in the memo, and nothing that holds memory is ever deep-copied.
    """
    clones: list[tuple[nn.Module, dict[str, Any]]] = []
    root = _copy_structure(module, memo, clones)
    for original, attributes in clones:
        for name, value in original.__dict__.items():
            if name in attributes:
                continue
            if name in _HOOK_DICTS:
                attributes[name] = OrderedDict()
            elif name == "_compiled_call_impl":
                attributes[name] = None
            else:
                attributes[name] = _copy_attribute(value, memo)
    return root


def _copy_structure(module: nn.Module, memo: dict[int, Any], clones: list[Any]) -> nn.Module:
    module = unwrap(module)
    if id(module) in memo:
        return memo[id(module)]
    clone = memo[id(module)] = module.__class__.__new__(module.__class__)
    attributes: dict[str, Any] = {}
    object.__setattr__(clone, "__dict__", attributes)
    clones.append((module, attributes))
    for kind in ("_parameters", "_buffers"):
        attributes[kind] = {name: _meta(tensor, memo) for name, tensor in module.__dict__[kind].items()}
    attributes["_modules"] = {
        name: None if child is None else _copy_structure(child, memo, clones) for name, child in module._modules.items()
    }
    return clone


def _meta(tensor: Tensor | None, memo: dict[int, Any]) -> Tensor | None:
    if tensor is None:
        return None
    if id(tensor) not in memo:
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return memo[id(tensor)]


def _copy_attribute(value: Any, memo: dict[int, Any]) -> Any:
    """Deep-copies a plain attribute; what cannot be copied (locks, process groups, streams) is shared."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, nn.Module):
        return _copy_module(value, memo)
    if isinstance(value, Tensor):
        return memo.setdefault(id(value), value.detach().clone())
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_copy_attribute(item, memo) for item in value)
    if type(value) is dict:
        return {key: _copy_attribute(item, memo) for key, item in value.items()}
    try:
        return copy.deepcopy(value, memo)
    except Exception:
        return value
