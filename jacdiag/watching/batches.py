"""What the model is called with: a few sequences kept for the probe, and the last batches for the flight recorder."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from jacdiag.trace.precision import map_leaves
from jacdiag.trace.randomness import RandomState
from jacdiag.watching.noise_scale import MicroBatches

_SEQUENCES, _LENGTH = 2, 128


class Batches:
    """A forward pre-hook on the model that looks at its arguments and changes nothing.

    While `torch.compile` traces the model the hook is not there: it asks whether it is being compiled and returns.

    Args:
        model: the module that the loop calls, wrapped or not.
        fingerprints: keep a fingerprint of every batch (two sums on its device, no look at it).
        keep: how many whole batches to keep, with the random states they met.
    """

    def __init__(self, model: nn.Module, *, fingerprints: bool, keep: int) -> None:
        self.micro_batches: MicroBatches | None = None  # looks at the gradients whenever a batch begins
        self.model, self.fingerprints, self.keep = model, fingerprints, keep
        self.first: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.prints: list[Tensor] = []  # of the micro-batches of the step at hand
        self.kept: deque[tuple[int, dict[str, Any], RandomState]] = deque(maxlen=max(keep, 1))
        self.step = 1
        self.failed: Exception | None = None
        self._handle: Any = None
        self.attach()

    def attach(self) -> None:
        if self._handle is None:
            self._handle = self.model.register_forward_pre_hook(self._see, with_kwargs=True)

    def remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    @contextmanager
    def away(self) -> Iterator[None]:
        """Inside, the hook is not on the model: the audit's own runs are no batches of the training."""
        there = self._handle is not None
        self.remove()
        try:
            yield
        finally:
            if there:
                self.attach()

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or self.failed is not None:
            return
        try:
            if not module.training:  # an evaluation inside the loop is no batch of the training
                return
            if self.micro_batches is not None:
                self.micro_batches.forward_begins(args, kwargs)
            if self.first is None:
                self.first = _few(args, kwargs)
            if self.fingerprints:
                self.prints.append(fingerprint((args, kwargs)))
            if self.keep:
                batch = named_arguments(module, args, kwargs)
                self.kept.append((self.step, map_leaves(_copied, batch), RandomState.now()))
        except Exception as error:  # told by the watch at its next step
            self.failed = error

    def next_step(self, step: int) -> list[Tensor]:
        """The fingerprints of the step that has ended; batches from now on belong to `step`."""
        prints, self.prints, self.step = self.prints, [], step
        if self.first is not None and not self.fingerprints and not self.keep:
            self.remove()  # the first batch was all that was wanted
        return prints


def fingerprint(value: Any) -> Tensor:
    """A number that tells batches apart, on their device: a sum of the elements weighted by their place, mod 2^61."""
    found: list[Tensor] = []

    def note(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.numel() and not leaf.is_complex():
            flat = leaf.detach().reshape(-1)
            flat = flat.long() if not flat.is_floating_point() else flat.double().view(torch.int64)
            weights = torch.arange(1, flat.numel() + 1, device=flat.device) * 2654435761
            found.append(((flat + 1) * weights).sum() & 0x1FFFFFFFFFFFFFFF)
        return leaf

    map_leaves(note, value)
    if not found:
        return torch.zeros((), dtype=torch.int64)
    return torch.stack([f.to(found[0].device) for f in found]).sum() & 0x1FFFFFFFFFFFFFFF


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name, as the module's own forward calls them; positions where it does not say."""
    from jacdiag.sources.wrapped import unwrap

    try:
        bound = inspect.signature(type(unwrap(module)).forward).bind(None, *args, **kwargs)
    except (TypeError, ValueError):
        return {**{str(k): value for k, value in enumerate(args)}, **kwargs}
    named: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            named.update({str(k): item for k, item in enumerate(value)})
        else:
            named[name] = value
    return named


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _few(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The first sequences of a batch, their first tokens where all tensors are (B, T)."""
    tensors: list[Tensor] = []
    map_leaves(lambda leaf: tensors.append(leaf) if isinstance(leaf, Tensor) else None, (list(args), kwargs))
    sized = [t for t in tensors if t.dim()]
    one_batch = len({t.shape[0] for t in sized}) == 1
    flat = one_batch and all(t.dim() == 2 and not t.is_floating_point() for t in sized)
    one_length = flat and len({t.shape[1] for t in sized}) == 1

    def cut(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim() or not one_batch:
            return _copied(leaf)
        leaf = leaf[:_SEQUENCES]
        return _copied(leaf[:, :_LENGTH] if one_length else leaf)

    return map_leaves(cut, args), map_leaves(cut, kwargs)
