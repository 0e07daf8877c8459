"""The batches that the model is called with, for the probe and for the flight recorder."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from jacdiag.devices.accelerators import is_capturing
from jacdiag.monitor.batch_fingerprints import PlaceWeights, Print
from jacdiag.monitor.kept_batches import KeptBatch, KeptBatches
from jacdiag.monitor.model_hooks import AttachedHook, ModelHook
from jacdiag.monitor.noise_scale import MicroBatches
from jacdiag.sources.module_wrappers import unwrap
from jacdiag.trace.execution.precision import map_leaves

_SEQUENCES, _LENGTH = 2, 128
_MOST_CALLS = 16  # ways to call a forward, of which the names are kept

Call = tuple[type[nn.Module], int, tuple[str, ...]]
# Without this function (torch before 2.7) code that is compiled cannot be told from code that is
# exported.
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


class CompiledCall:
    """The last call of a forward that was compiled together with the hook.

    `torch.compile` keeps the assignments to these attributes and nothing else of the hook. They are
    never read while the forward is traced, so that no guard depends on them and nothing is compiled
    again.
    """

    def __init__(self) -> None:
        self.args: tuple[Any, ...] | None = None
        self.kwargs: dict[str, Any] = {}


class BatchHook(ModelHook):
    """The forward pre-hook. It changes nothing.

    Args:
        batches: gets each call that is not compiled.
        compiled: gets the arguments of a call that is.
    """

    def __init__(self, batches: Batches, compiled: CompiledCall) -> None:
        self.batches, self.compiled = batches, compiled

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take a call of the forward, or keep its arguments if it is compiled."""
        # 1. A compiled call. An export, or a forward without gradients, has no batch of the run.
        if torch.compiler.is_compiling():
            has_batch = not _is_exporting() and torch.is_grad_enabled()
            if has_batch:
                compiled = self.compiled
                compiled.args = args
                compiled.kwargs = kwargs
            return

        # 2. Any other call. Its seconds are charged to the watch later.
        started = time.perf_counter()
        self.batches.see(module, args, kwargs)
        self.batches.seconds += time.perf_counter() - started


class Batches:
    """Looks at the arguments of the model's forward and changes nothing.

    Args:
        model: the module that the loop calls, wrapped or not.
        fingerprints: keep a fingerprint of every batch, without a look at its device.
        keep: what keeps entire batches, with the random states they met; None keeps none.

    Attributes:
        first: a few sequences of the first batch: positional and keyword arguments.
        seen: forwards in train mode.
        in_eval: forwards in eval mode with gradients.
        in_compiled: steps whose batch is that of a compiled forward.
        in_graph: forwards that were captured into a CUDA graph. A replay of it calls no hook.
        failed: what went wrong in the hook, for the watch to say.
        seconds: that the hook took since they were last charged.
    """

    def __init__(
        self, model: nn.Module, *, fingerprints: bool, keep: KeptBatches | None = None
    ) -> None:
        # looks at the gradients whenever a batch begins
        self.micro_batches: MicroBatches | None = None
        self.model, self.fingerprints = model, fingerprints
        self.kept = keep if keep is not None and keep.wanted else None
        self.first: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.prints: list[Print] = []  # of the micro-batches of the step at hand
        self.step = 1
        self.seen = self.in_eval = self.in_compiled = self.in_graph = 0
        self.failed: Exception | None = None
        self.seconds = 0.0
        self._place_weights, self._signatures = PlaceWeights(), Signatures()
        self.compiled = CompiledCall()
        self._hook: AttachedHook | None = AttachedHook(model, BatchHook(self, self.compiled))

    def remove(self) -> None:
        """Take the hook off the model; what was kept stays."""
        hook = self._hook
        self._hook = None
        if hook is not None:
            hook.remove()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Take the hook off the model for a while.

        The runs of the audit itself are no batches of the training.
        """
        hook = self._hook
        if hook is None:
            yield
            return
        hook.suspend()
        try:
            yield
        finally:
            hook.resume()

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take a call of the forward that is not compiled."""
        # 1. Leave out what is no batch of the training, such as an evaluation inside the loop.
        if self.failed is not None or _is_being_recorded():
            return
        if is_capturing():
            self.in_graph += 1
            return
        if not module.training:
            self.in_eval += torch.is_grad_enabled()
            return

        # 2. Keep what is needed of the batch.
        self.seen += 1
        self._take(module, args, kwargs)

        # 3. Read the gradients of the micro-batches before it.
        if self.micro_batches is None or self.failed is not None:
            return
        try:
            self.micro_batches.forward_begins(args, kwargs)
        except Exception as error:  # reported by the watch at its next step
            self.failed = error

    def take_compiled(self) -> None:
        """Take the last call of a compiled forward, if there was one since the last look."""
        args = self.compiled.args
        kwargs = self.compiled.kwargs
        self.compiled.args = None
        self.compiled.kwargs = {}
        if args is None or self.failed is not None:
            return
        self.in_compiled += 1
        self._take(self.model, args, kwargs)

    def _take(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            # 1. A few sequences of the first batch, for the probe.
            if self.first is None:
                self.first = _few(args, kwargs)

            # 2. A copy of the batch, for the flight recorder.
            batch: KeptBatch | None = None
            if self.kept is not None:
                batch = self.kept.add(
                    self.step, named_arguments(module, args, kwargs, self._signatures)
                )

            # 3. Its fingerprint. That of a copy is made later, many in a row.
            if not self.fingerprints:
                return
            if batch is not None:
                self.prints.append(Print.of(batch.arguments, self._place_weights))
                return
            print_now = Print.of((args, kwargs), self._place_weights)
            print_now.sum_now()
            self.prints.append(print_now)
        except Exception as error:  # reported by the watch at its next step
            self.failed = error

    def renumber(self, step: int) -> None:
        """Give the batches of the step at hand another number than was expected."""
        if self.kept is not None:
            self.kept.renumber(self.step, step)
        self.step = step

    def rewind(self, base: int) -> None:
        """Let go of the batches of steps that are going to be done again."""
        if self.kept is not None:
            self.kept.drop_between(base, self.step)

    def next_step(self, step: int) -> list[Print]:
        """Return the fingerprints of the step that has ended.

        Batches from now on belong to `step`.
        """
        # 1. Complete the step that has ended.
        self.take_compiled()
        if self.kept is not None:
            self.kept.stride = max(step - self.step, 1)
        prints = self.prints

        # 2. Begin the next one.
        self.prints = []
        self.step = step

        # 3. Take the hook off if it was for the first batch alone. Compiled code that holds the
        # hook would be compiled again.
        only_first = not self.fingerprints and self.kept is None
        if only_first and self.first is not None and not self.in_compiled:
            self.remove()
        return prints


def _is_being_recorded() -> bool:
    """Whether the forward runs to be recorded, by jit or by make_fx. Such a call has no batch."""
    if torch.jit.is_tracing():
        return True
    return _get_proxy_mode()() is not None  # by make_fx


@cache
def _get_proxy_mode() -> Callable[[], Any]:
    from torch.fx.experimental.proxy_tensor import (
        get_proxy_mode,  # takes a second, so not with this module
    )

    return get_proxy_mode


class Signatures:
    """How a class's forward calls its arguments, which is looked up at every batch."""

    def __init__(self) -> None:
        self._known: dict[Call, tuple[Any, dict[str, int | str]]] = {}

    def names_of(
        self, kind: type[nn.Module], count: int, keywords: tuple[str, ...]
    ) -> dict[str, int | str]:
        """Return the names of a call's arguments, each with its place or its keyword in the call.

        Args:
            kind: the class, with the forward that it has now.
            count: of the arguments that are passed by place.
            keywords: of the others.
        """
        call = (kind, count, keywords)
        forward, names = self._known.get(call, (None, {}))
        if forward is not kind.forward:
            if len(self._known) >= _MOST_CALLS:
                self._known.clear()
            names = _names_in_call(kind, count, keywords)
            self._known[call] = (kind.forward, names)
        return names


def named_arguments(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    signatures: Signatures | None = None,
) -> dict[str, Any]:
    """Return the arguments by the names of the module's own forward.

    An argument without a name has its position as its key.
    """
    # 1. Look up where each argument is in the call.
    if signatures is None:
        signatures = Signatures()
    kind = type(unwrap(module))
    names = signatures.names_of(kind, len(args), tuple(kwargs))

    # 2. Take it from there: by its keyword, or by its place.
    arguments: dict[str, Any] = {}
    for name, where in names.items():
        if isinstance(where, str):
            arguments[name] = kwargs[where]
        else:
            arguments[name] = args[where]
    return arguments


def _names_in_call(
    kind: type[nn.Module], count: int, keywords: tuple[str, ...]
) -> dict[str, int | str]:
    """Bind places and keywords in the stead of the arguments themselves."""
    # 1. Bind them. A call that does not fit has places for names.
    own: dict[str, int | str] = {keyword: keyword for keyword in keywords}
    try:
        bound = inspect.signature(kind.forward).bind(None, *range(count), **own)
    except (TypeError, ValueError):
        return {**{str(place): place for place in range(count)}, **own}

    # 2. Take what is bound to each name, without the module itself.
    names: dict[str, int | str] = {}
    for name, where in list(bound.arguments.items())[1:]:
        parameter = bound.signature.parameters[name].kind
        if parameter is inspect.Parameter.VAR_KEYWORD:
            names.update(where)
        elif parameter is inspect.Parameter.VAR_POSITIONAL:
            names.update({str(k): place for k, place in enumerate(where)})
        else:
            names[name] = where
    return names


def _copied(leaf: Any) -> Any:
    """Return a copy of a tensor; anything else as it is."""
    if isinstance(leaf, Tensor):
        return leaf.detach().clone()
    return leaf


def _few(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the first sequences of a batch, and their first tokens if all tensors are (B, T)."""
    # 1. Which dimensions all tensors share.
    sized = _tensors_with_dimensions(args, kwargs)
    has_one_batch = _share_size(sized, 0)
    has_one_length = has_one_batch and _may_be_tokens(sized) and _share_size(sized, 1)

    # 2. Cut the tensors along these.
    def cut(leaf: Any) -> Any:
        """Return a copy of the first sequences of a tensor; anything else as it is."""
        if not has_one_batch:
            return _copied(leaf)
        if not isinstance(leaf, Tensor) or leaf.dim() == 0:
            return _copied(leaf)
        leaf = leaf[:_SEQUENCES]
        if has_one_length:
            leaf = leaf[:, :_LENGTH]
        return _copied(leaf)

    return map_leaves(cut, args), map_leaves(cut, kwargs)


def _tensors_with_dimensions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors of a batch that are no single number."""
    tensors: list[Tensor] = []

    def note(leaf: Any) -> None:
        """Add a leaf, if it is such a tensor."""
        if isinstance(leaf, Tensor) and leaf.dim():
            tensors.append(leaf)

    map_leaves(note, (list(args), kwargs))
    return tensors


def _share_size(tensors: list[Tensor], dimension: int) -> bool:
    """Return whether all tensors have one size along a dimension; False if there is no tensor."""
    sizes = {tensor.shape[dimension] for tensor in tensors}
    return len(sizes) == 1


def _may_be_tokens(tensors: list[Tensor]) -> bool:
    """Return whether all tensors are tables of integers, as token ids and masks are."""
    for tensor in tensors:
        if tensor.dim() != 2:
            return False
        if tensor.is_floating_point():
            return False
    return True
