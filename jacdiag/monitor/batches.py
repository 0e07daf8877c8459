"""What the model is called with: a few sequences kept for the probe, and the last batches for the
flight recorder.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from jacdiag.monitor.kept_batches import KeptBatches
from jacdiag.monitor.model_hooks import AttachedHook, ModelHook
from jacdiag.monitor.noise_scale import MicroBatches
from jacdiag.trace.execution.precision import map_leaves

_SEQUENCES, _LENGTH = 2, 128
_MOST_SIZES = 16  # sizes of a batch whose weights of a fingerprint are kept
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
        if torch.compiler.is_compiling():
            if not _is_exporting() and torch.is_grad_enabled():
                compiled = self.compiled
                compiled.args = args
                compiled.kwargs = kwargs
            return
        begun = time.perf_counter()
        self.batches.see(module, args, kwargs)
        self.batches.seconds += time.perf_counter() - begun


class Batches:
    """Looks at the arguments of the model's forward and changes nothing.

    Args:
        model: the module that the loop calls, wrapped or not.
        fingerprints: keep a fingerprint of every batch (two sums on its device, no look at it).
        keep: what keeps whole batches, with the random states they met; None keeps none.

    Attributes:
        first: a few sequences of the first batch: positional and keyword arguments.
        seen: forwards in train mode.
        in_eval: forwards in eval mode with gradients.
        in_compiled: steps whose batch is that of a compiled forward.
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
        self.prints: list[Tensor] = []  # of the micro-batches of the step at hand
        self.step = 1
        self.seen = self.in_eval = self.in_compiled = 0
        self.failed: Exception | None = None
        self.seconds = 0.0
        self._place_weights, self._signatures = PlaceWeights(), Signatures()
        self.compiled = CompiledCall()
        self._hook: AttachedHook | None = AttachedHook(model, BatchHook(self, self.compiled))

    def remove(self) -> None:
        """Take the hook off the model; what was kept stays."""
        hook, self._hook = self._hook, None
        if hook is not None:
            hook.remove()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Inside, the hook is not on the model: the audit's own runs are no batches of the
        training.
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
        if self.failed is not None or _is_being_recorded():
            return
        if not module.training:  # an evaluation inside the loop is no batch of the training
            self.in_eval += torch.is_grad_enabled()
            return
        self.seen += 1
        self._take(module, args, kwargs)
        if self.micro_batches is not None and self.failed is None:
            try:
                self.micro_batches.forward_begins(args, kwargs)
            except Exception as error:  # told by the watch at its next step
                self.failed = error

    def take_compiled(self) -> None:
        """Take the last call of a compiled forward, if there was one since the last call of this
        method.
        """
        args, kwargs = self.compiled.args, self.compiled.kwargs
        self.compiled.args, self.compiled.kwargs = None, {}
        if args is None or self.failed is not None:
            return
        self.in_compiled += 1
        self._take(self.model, args, kwargs)

    def _take(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            if self.first is None:
                self.first = _few(args, kwargs)
            if self.fingerprints:
                self.prints.append(fingerprint((args, kwargs), self._place_weights))
            if self.kept is not None:
                self.kept.add(self.step, named_arguments(module, args, kwargs, self._signatures))
        except Exception as error:  # told by the watch at its next step
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

    def next_step(self, step: int) -> list[Tensor]:
        """Return the fingerprints of the step that has ended; batches from now on belong to
        `step`.
        """
        self.take_compiled()
        if self.kept is not None:
            self.kept.stride = max(step - self.step, 1)
        prints, self.prints, self.step = self.prints, [], step
        only_first = not self.fingerprints and self.kept is None
        if only_first and self.first is not None and not self.in_compiled:
            self.remove()  # compiled code that holds the hook would be compiled again
        return prints


def _is_being_recorded() -> bool:
    """Whether the forward runs to be recorded, by jit, by make_fx, or into a CUDA graph: then it
    has no batch.
    """
    if torch.jit.is_tracing():
        return True
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    if get_proxy_mode() is not None:
        return True
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class PlaceWeights:
    """The weight of each place in a fingerprint, kept for the sizes that come again at every
    step.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, torch.device], Tensor] = {}

    def of(self, count: int, device: torch.device) -> Tensor:
        """Return the weights of some places, on a device."""
        weights = self._known.get((count, device))
        if weights is None:
            if len(self._known) >= _MOST_SIZES:
                self._known.clear()
            weights = torch.arange(1, count + 1, device=device) * 2654435761
            self._known[count, device] = weights
        return weights


def fingerprint(value: Any, weights: PlaceWeights | None = None) -> Tensor:
    """A number that tells batches apart, on their device: a sum of the elements weighted by their
    place, mod 2^61.

    Args:
        value: nested containers of tensors.
        weights: remembered from other batches.
    """
    places = weights if weights is not None else PlaceWeights()
    found: list[Tensor] = []

    def note(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.numel() and not leaf.is_complex():
            flat = leaf.detach().reshape(-1)
            flat = flat.long() if not flat.is_floating_point() else flat.double().view(torch.int64)
            weighted = (flat + 1) * places.of(flat.numel(), flat.device)
            found.append(weighted.sum() & 0x1FFFFFFFFFFFFFFF)
        return leaf

    map_leaves(note, value)
    if not found:
        return torch.zeros((), dtype=torch.int64)
    if len(found) == 1:
        return found[0]
    return torch.stack([f.to(found[0].device) for f in found]).sum() & 0x1FFFFFFFFFFFFFFF


class Signatures:
    """The signature of a class's forward, which is asked for at every batch."""

    def __init__(self) -> None:
        self._known: dict[type, tuple[Any, inspect.Signature]] = {}

    def of(self, kind: type[nn.Module]) -> inspect.Signature:
        """Return the signature of the forward that a class has now.

        Raises:
            TypeError, ValueError: it has none.
        """
        forward, signature = self._known.get(kind, (None, None))
        if signature is None or forward is not kind.forward:
            signature = inspect.signature(kind.forward)
            self._known[kind] = (kind.forward, signature)
        return signature


def named_arguments(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    signatures: Signatures | None = None,
) -> dict[str, Any]:
    """The arguments by name, as the module's own forward calls them; positions where it does not
    say.
    """
    from jacdiag.sources.module_wrappers import unwrap

    try:
        bound = (signatures or Signatures()).of(type(unwrap(module))).bind(None, *args, **kwargs)
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
    map_leaves(
        lambda leaf: tensors.append(leaf) if isinstance(leaf, Tensor) else None,
        (list(args), kwargs),
    )
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
