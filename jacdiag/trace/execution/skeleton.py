"""A module's code without its weights: what every recording and every re-run executes.

A skeleton is a structural copy of a module whose parameters and buffers are empty meta tensors and
whose hooks are cleared. It is run with a *state*, a dict of tensors that may come from anywhere
(the model by reference, a raised copy of one block, a file). Nothing of the model is touched, no
memory is spent, and wrappers drop out of the picture.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from jacdiag.devices.packed_download import download
from jacdiag.sources.module_wrappers import plain_name, unwrap
from jacdiag.trace.execution.attributes import Attributes, collect_attribute_tensors, copy_attribute
from jacdiag.trace.execution.lazy_weights import Stored
from jacdiag.trace.execution.tensors import finite_flag
from jacdiag.trace.execution.wrappers import (
    is_code,
    original_class,
    skipped_attributes,
    whole_weights,
)

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


class Skeleton:
    """The structural copy of `module`, in eval mode, and the module's tensors by reference.

    Attributes:
        root: the copy. Its parameters and buffers are on the meta device.
        params: name -> the module's parameter, detached (same storage). One name per tie. Read on
            access if `stored`.
        outlines: the same by shape and dtype alone, for questions that need no values.
        stored: where parameters are read from that are not in memory, or None.
        buffers: name -> the buffer (same storage). A run that may write to it needs a clone.
        valueless: the module itself is on the meta device: shapes and no values.
        aliases: every name of a tied tensor -> the one name that stands in `params` or `buffers`.

    Args:
        module: the model, wrapped or not.
        keep_hooks: take the module's forward hooks along, bound to the copy.
        weights: name -> tensor, from which the parameters of a module on the meta device are read.
        device: where they are brought to.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        keep_hooks: bool = False,
        weights: Mapping[str, Tensor] | None = None,
        device: torch.device | None = None,
    ) -> None:
        # 1. The copy.
        module = unwrap(module)
        self._full_weights = whole_weights(module)
        self.root = _copy_module(module, {}, keep_hooks)
        self.root.eval()

        # 2. The tensors by name.
        self.aliases: dict[str, str] = {}
        parameters = self._collect(module.named_parameters(remove_duplicate=False))
        self.params: Mapping[str, Tensor] = parameters
        self.outlines = parameters
        self.buffers = self._collect(module.named_buffers(remove_duplicate=False))

        # 3. Weights that are read when a call needs them.
        self.stored: Stored | None = None
        if weights is not None:
            self.stored = Stored(weights, self.outlines, device or torch.device("cpu"))
            self.params = self.stored
        self.valueless = self.stored is None and any(t.is_meta for t in parameters.values())

        # 4. The state of the copy, to be restored after a run.
        self.names = _names_of_modules(self.root)
        self._attributes = Attributes(self.root)
        self._written: set[str] = set()

    def _collect(self, named: Any) -> dict[str, Tensor]:
        """Return tensors by name, one name for each tensor, and note every other name of it."""
        seen: dict[int, str] = {}
        tensors: dict[str, Tensor] = {}
        for raw_name, tensor in named:
            name = plain_name(raw_name)
            first = seen.setdefault(id(tensor), name)
            self.aliases[name] = first
            if first == name:
                tensors[name] = self._full_weights.get(id(tensor), tensor).detach()
        return tensors

    def fresh_state_of(self, prefix: str) -> dict[str, Tensor]:
        """Return the state of one module for one run, one name per tie.

        Buffers are cloned, since a forward may write to them. Parameters are the model's own
        memory, but for those that the code is known to write to.

        Args:
            prefix: name of the module, "" for all. Names of the state are relative to it.
        """
        start = f"{prefix}." if prefix else ""
        state: dict[str, Tensor] = {}
        seen: set[str] = set()
        for name, first in self.aliases.items():
            if not name.startswith(start) or first in seen:
                continue
            seen.add(first)

            # The first name inside the module stands for all names of the tensor.
            state[name.removeprefix(start)] = self._for_one_run(first)
        return state

    def _for_one_run(self, name: str) -> Tensor:
        """Return a tensor of the state: a copy of one that a run may write to."""
        # A forward may update its buffers.
        if name in self.buffers:
            return self.buffers[name].clone()

        # This code writes to a parameter.
        if name in self._written:
            return self.params[name].clone()

        # The model's own memory, or an outline that is filled when it is read.
        return self.outlines[name]

    def filled_state_of(self, prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the same with every floating tensor in memory and raised to `dtype`.

        Code that reads weights unseen by any mode needs it.

        Args:
            prefix: as in `fresh_state_of`.
            dtype: of the floating tensors.
        """
        state = self.fresh_state_of(prefix)
        for name, tensor in state.items():
            # 1. The weight itself in place of its outline.
            if self.stored is not None:
                tensor = self.stored.filled(tensor)

            # 2. Its precision. Positions and masks keep theirs.
            if tensor.is_floating_point():
                tensor = tensor.to(dtype)
            state[name] = tensor
        return state

    @property
    def light(self) -> bool:
        """Whether the weights take less memory than raised ones, which no graph should keep."""
        # Stored weights take no memory at all.
        if self.stored is not None:
            return True

        # Weights of 16 bits take half of what raised ones take.
        outlines = self.outlines.values()
        return any(_is_low(outline) for outline in outlines)

    def non_finite(self) -> list[str]:
        """Return the names of parameters with NaN or Inf in them."""
        # Stored parameters are not all read again for it.
        if self.stored is not None:
            return self.stored.non_finite()

        # The others are in memory.
        flags = download([finite_flag(tensor) for tensor in self.params.values()])
        names: list[str] = []
        for name, is_finite in zip(self.params, flags, strict=True):
            if not is_finite:
                names.append(name)
        return names

    def restore(self) -> None:
        """Undo what a run wrote to plain attributes (a cache, a counter)."""
        self._attributes.restore()

    def modules_written_to(self) -> frozenset[str]:
        """Return the names of the modules whose plain attributes the last run changed."""
        return frozenset(self.names[id(module)] for module in self._attributes.written_to())

    def unchanged_tensors(self) -> set[int]:
        """Return the ids of the tensors in plain attributes that the last run did not change."""
        return set(map(id, self._attributes.unchanged_tensors()))

    def attribute_tensors(self) -> set[int]:
        """Return the ids of the tensors that modules hold as plain attributes.

        They are constants, which no call of a run made.
        """
        tensors: list[Tensor] = []
        for module in self.root.modules():
            collect_attribute_tensors(vars(module), tensors)
        return set(map(id, tensors))

    def own(self, name: str) -> None:
        """Put a copy in place of a parameter that the code writes to, a fresh one for every run."""
        self._written.add(name)

    def settled(self) -> bool:
        """Return whether the last run left the structure as it was.

        Some code swaps its own modules when it first runs. The next runs then begin with what it
        made of itself.
        """
        names = _names_of_modules(self.root)
        is_same = names == self.names
        self.names = names
        if not is_same:
            self._attributes = Attributes(self.root)
        return is_same

    def module(self, name: str) -> nn.Module:
        """Return the copy's submodule of that name; "" is the root."""
        if not name:
            return self.root

        # By its path, as "layers.3.mlp".
        return self.root.get_submodule(name)


def _is_low(tensor: Tensor) -> bool:
    """Return whether a tensor holds floats of less than 32 bits."""
    return tensor.is_floating_point() and tensor.dtype.itemsize < 4


def _names_of_modules(root: nn.Module) -> dict[int, str]:
    """Return the name of every module by its id."""
    return {id(module): name for name, module in root.named_modules(remove_duplicate=True)}


def _copy_module(module: nn.Module, memo: dict[int, Any], keep_hooks: bool) -> nn.Module:
    """Copy the structure: first every registered module and tensor, then the plain attributes.

    In that order an attribute that refers to a module or a weight (bound methods, partials,
    closures, lists of layers) finds the copy in the memo, and nothing that holds memory is ever
    deep-copied.
    """
    # 1. Modules and tensors.
    clones: list[tuple[nn.Module, dict[str, Any]]] = []
    root = _copy_structure(module, memo, clones)

    def copied(value: Any) -> Any:
        return copy_attribute(
            value, memo, lambda other, memo: _copy_module(other, memo, keep_hooks)
        )

    # 2. Plain attributes, without hooks and compiled code.
    for original, attributes in clones:
        skipped = skipped_attributes(original)
        for name, value in original.__dict__.items():
            if name not in attributes and name not in skipped:
                attributes[name] = _copied_attribute(name, value, copied)

        # 3. The hooks that are to be run.
        for kind in ("_forward_pre_hooks", "_forward_hooks"):
            _copy_hooks(original, kind, attributes, copied, keep_hooks)
    return root


def _copied_attribute(name: str, value: Any, copied: Callable[[Any], Any]) -> Any:
    """Return the copy of a plain attribute; hooks are left out, and so is compiled code.

    Args:
        name: of the attribute.
        value: of the original.
        copied: copies any other value.
    """
    # Hooks that are to be run are copied later.
    if name in _HOOK_DICTS:
        return OrderedDict()

    # Compiled code would run the original.
    if name == "_compiled_call_impl":
        return None

    return copied(value)


def _copy_hooks(
    module: nn.Module, kind: str, attributes: dict[str, Any], copied: Any, keep_all: bool
) -> None:
    """Copy torch's own hooks that compute a weight, or all hooks with `keep_all`.

    Args:
        module: the original.
        kind: the dict of its hooks.
        attributes: of the copy.
        copied: returns a copy of a hook.
        keep_all: whether to copy hooks that are not torch's own, too.
    """
    for key, hook in getattr(module, kind).items():
        computes_weight = kind == "_forward_pre_hooks" and is_code(hook)
        if not keep_all and not computes_weight:
            continue
        attributes[kind][key] = copied(hook)

        # How torch calls the hook is noted apart.
        for flag in (f"{kind}_with_kwargs", f"{kind}_always_called"):
            is_set = key in getattr(module, flag, ())
            if is_set:
                attributes[flag][key] = True


def _copy_structure(module: nn.Module, memo: dict[int, Any], clones: list[Any]) -> nn.Module:
    """Copy modules, their parameters and buffers; the copies are appended to `clones`."""
    module = unwrap(module)
    if id(module) in memo:
        return memo[id(module)]

    # 1. An object of the class, without its constructor.
    cls = original_class(module)
    clone = cls.__new__(cls)
    memo[id(module)] = clone
    attributes: dict[str, Any] = {}
    object.__setattr__(clone, "__dict__", attributes)
    clones.append((module, attributes))

    # 2. Its tensors, and the modules in it.
    for kind in ("_parameters", "_buffers"):
        tensors = module.__dict__[kind]
        attributes[kind] = {name: _meta(tensor, memo) for name, tensor in tensors.items()}
    children: dict[str, nn.Module | None] = {}
    for name, child in module._modules.items():
        children[name] = None if child is None else _copy_structure(child, memo, clones)
    attributes["_modules"] = children
    return clone


def _meta(tensor: Tensor | None, memo: dict[int, Any]) -> Tensor | None:
    """Return the outline of a tensor: its shape and dtype on the meta device."""
    # 1. A name without a tensor, and a tensor with two names.
    if tensor is None:
        return None
    if id(tensor) in memo:
        return memo[id(tensor)]

    # 2. An outline of its own, a parameter for a parameter.
    outline = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    is_parameter = isinstance(tensor, nn.Parameter)
    if is_parameter:
        outline = nn.Parameter(outline, requires_grad=False)
    memo[id(tensor)] = outline
    return outline
