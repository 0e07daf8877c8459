"""Hooks before and after the step of optimizers, whatever class they are of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from jacdiag.devices.accelerators import is_capturing
from jacdiag.errors import UsageError
from jacdiag.monitor.guards import logger
from jacdiag.monitor.optimizers import OptimizerTree

StepCallback = Callable[[Any, bool], None]

# Steps in a row whose hooks ran, after which a graph that was captured earlier is taken for unused.
# A loop that replays one makes a step without it now and then, as for the last batch of an epoch.
_EAGER_AGAIN = 10

_OF_A_METHOD = ("__func__", "__self__", "__name__", "__wrapped__")


class CompiledMark:
    """A mark that a compiled step ran.

    `torch.compile` keeps the assignment to it and nothing else of the hooks. Nothing of it is read
    while the step is traced. So no guard depends on it, and nothing is compiled again.
    """

    def __init__(self) -> None:
        """Begin before any step."""
        self.ran = False


class CapturedSteps:
    """The steps that were captured into a CUDA graph.

    The hooks run once, while the step is captured, and never when the graph is replayed. What they
    would launch then would become a part of the graph, and nothing of it would be computed. So they
    only note the step here.

    Attributes:
        rates: id of an optimizer -> the learning rate of each parameter group, as the graph holds
            it. None stands for a rate that lies on a device: the graph reads it at every replay.
    """

    def __init__(self) -> None:
        """Begin before any step."""
        self.rates: dict[int, list[float | None]] = {}
        self._seen_since = 0

    @property
    def may_be_replayed(self) -> bool:
        """Whether a step that no hook has seen may be the replay of a graph."""
        return bool(self.rates)

    def note(self, optimizer: Any) -> None:
        """Note that the step of an optimizer is captured; launches nothing."""
        groups = getattr(optimizer, "param_groups", ())
        self.rates[id(optimizer)] = [_rate_in_graph(group.get("lr")) for group in groups]
        self._seen_since = 0

    def step_seen(self) -> None:
        """Note a step whose hooks ran; after many in a row the graph is not used any more."""
        self._seen_since += 1
        if self._seen_since >= _EAGER_AGAIN:
            self.rates.clear()


class StepHooks:
    """Hooks that call `before` and `after` around the step of each optimizer, until `remove`.

    Each is called with the optimizer and whether the step was given a closure: then the gradients
    are computed inside the step. An optimizer whose class runs torch's own step hooks gets those.
    On any other, the attribute `step` of the object is covered by a `CoveredStep`. A step that is
    compiled, or captured into a CUDA graph, is only noted.

    Args:
        tree: the optimizers.
        before: called before a step.
        after: called after a step that raised nothing.

    Attributes:
        mark: of compiled steps.
        captured: the steps that were captured.

    Raises:
        UsageError: an optimizer allows neither hooks nor an attribute.
    """

    def __init__(self, tree: OptimizerTree, before: StepCallback, after: StepCallback) -> None:
        """Put the hooks on every optimizer, or on none; see the class for the arguments."""
        self.mark = CompiledMark()
        self.captured = CapturedSteps()
        self._removers: list[Callable[[], None]] = []
        try:
            for optimizer in tree.leaves:
                self._attach(optimizer, before, after, needed=True)
            for optimizer in tree.shells:
                self._attach(optimizer, before, after, needed=False)
        except Exception:
            self.remove()
            raise

    def _attach(
        self, optimizer: Any, before: StepCallback, after: StepCallback, *, needed: bool
    ) -> None:
        """Put hooks on one optimizer.

        Args:
            optimizer: gets the hooks.
            before: called before a step.
            after: called after a step that raised nothing.
            needed: raise if that is not possible.
        """
        mark, captured = self.mark, self.captured
        # 1. By torch's own hooks.
        if runs_torch_hooks(optimizer):

            def pre_hook(stepping: Any, args: Any, kwargs: Any) -> None:
                if torch.compiler.is_compiling():
                    mark.ran = True
                    return
                if is_capturing():
                    captured.note(stepping)
                    return
                before(stepping, _has_closure(args, kwargs))

            def post_hook(stepping: Any, args: Any, kwargs: Any) -> None:
                if torch.compiler.is_compiling():
                    return
                if is_capturing():
                    return
                after(stepping, _has_closure(args, kwargs))

            self._removers.append(optimizer.register_step_pre_hook(pre_hook).remove)
            self._removers.append(optimizer.register_step_post_hook(post_hook).remove)
            return

        # 2. By covering its `step`.
        cover = CoveredStep(optimizer, mark, captured, before, after)
        try:
            cover.attach()
        except (AttributeError, TypeError) as error:
            if not needed:  # the optimizers inside have hooks
                logger.debug(
                    "jacdiag.watch: the step of a %s cannot be covered", type(optimizer).__name__
                )
                return
            raise UsageError(
                f"the steps of a {type(optimizer).__name__} cannot be seen",
                got=(
                    "an object whose attribute `step` cannot be set, and that is no initialised "
                    "torch.optim.Optimizer"
                ),
                hint=(
                    "call super().__init__(params, defaults) in a subclass of torch.optim.Optimizer"
                ),
            ) from error
        self._removers.append(cover.remove)

    def remove(self) -> None:
        """Take everything off the optimizers."""
        for remove in self._removers:
            remove()
        self._removers.clear()


class CoveredStep:
    """A callable in the place of an object's `step`.

    It calls that step, and is pickled and copied as that step.

    Args:
        optimizer: the object.
        mark: set where the call is compiled.
        captured: takes note of a call that is captured.
        before: called before a step.
        after: called after a step that raised nothing.
    """

    def __init__(
        self,
        optimizer: Any,
        mark: CompiledMark,
        captured: CapturedSteps,
        before: StepCallback,
        after: StepCallback,
    ) -> None:
        """Note the step that is to be covered; `attach` covers it."""
        self.optimizer = optimizer
        self.mark = mark
        self.captured = captured
        self.before = before
        self.after = after
        self.step = optimizer.step
        # another library has covered it before
        self.own = "step" in getattr(optimizer, "__dict__", {})
        self.active = False

    def attach(self) -> None:
        """Cover the object's `step`.

        Raises:
            AttributeError: the object allows no attribute of that name.
            TypeError: the same, as some classes raise it.
        """
        self.optimizer.step = self
        self.active = True

    def remove(self) -> None:
        """Give the object its own `step` back.

        If another library has covered this one, it stays and only calls through.
        """
        self.active = False
        # Whoever still holds this does not hold the watch with it.
        self.before = _do_nothing
        self.after = _do_nothing
        if vars(self.optimizer).get("step") is not self:
            return
        if self.own:
            self.optimizer.step = self.step
        else:
            del self.optimizer.step

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Make a step, with the callbacks around it while the watch is open."""
        # 1. Inside torch.compile, or after the watch has ended, only call through.
        if torch.compiler.is_compiling():
            self.mark.ran = True
            return self.step(*args, **kwargs)
        if not self.active:
            return self.step(*args, **kwargs)
        if is_capturing():
            self.captured.note(self.optimizer)
            return self.step(*args, **kwargs)

        # 2. Call the callbacks around the step. It may itself end the watch.
        closure = _has_closure(args, kwargs)
        self.before(self.optimizer, closure)
        result = self.step(*args, **kwargs)
        if self.active:
            self.after(self.optimizer, closure)
        return result

    def __getattr__(self, name: str) -> Any:
        """Look everything else up on the covered step.

        Schedulers read its `__func__` and `__self__`.
        """
        # An object that is not initialised yet has no `step` to look things up on.
        if name == "step":
            raise AttributeError(name)
        is_special = name.startswith("__") and name not in _OF_A_METHOD
        if is_special:
            raise AttributeError(name)
        return getattr(self.step, name)

    def __reduce__(self) -> Any:
        return getattr, (self.optimizer, "step")


def check_attachable(tree: OptimizerTree) -> None:
    """Raise UsageError if the steps of an optimizer cannot be seen; leaves nothing on it."""
    StepHooks(tree, _do_nothing, _do_nothing).remove()


def runs_torch_hooks(optimizer: Any) -> bool:
    """Return whether the object's class runs torch's step hooks.

    A subclass may have left `super().__init__()` out.
    """
    if not isinstance(optimizer, Optimizer):
        return False
    is_initialised = "_optimizer_step_pre_hooks" in vars(optimizer)
    runs_hooks = bool(getattr(type(optimizer).step, "hooked", False))
    return is_initialised and runs_hooks


def _has_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a step got a closure; `args` may begin with the optimizer itself."""
    # 1. Passed by its name.
    if callable(kwargs.get("closure")):
        return True

    # 2. Passed by its place. An optimizer may be callable itself.
    others = [argument for argument in args if not isinstance(argument, Optimizer)]
    return any(map(callable, others))


def _rate_in_graph(rate: Any) -> float | None:
    """Return the learning rate that a graph holds; None if it reads the rate at every replay."""
    if rate is None:
        return None
    if isinstance(rate, Tensor) and rate.device.type != "cpu":
        return None
    return float(rate)


def _do_nothing(optimizer: Any, closure: bool) -> None:
    """Stand in for the callbacks of a watch that has ended."""
