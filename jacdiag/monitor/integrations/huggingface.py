"""Hugging Face: a `TrainerCallback` that watches (extra `hf`).

>>> from jacdiag.monitor.integrations.huggingface import WatchCallback       # doctest: +SKIP
>>> watch = WatchCallback(log_dir="runs/a")                                   # doctest: +SKIP
>>> Trainer(model, args, train_dataset=data, callbacks=[watch]).train()       # doctest: +SKIP
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from jacdiag.monitor.api import watch
from jacdiag.monitor.guards import quietly
from jacdiag.monitor.model_hooks import AttachedHook, ModelHook
from jacdiag.monitor.training_watch import Watch
from jacdiag.records.run_log import RUN_FILE

STATE_FILE = "jacdiag.pt"
# Methods of the Trainer's accelerator and of the Trainer that return a gradient norm. The second is
# called later in a step, so that its norm counts.
_NORM_OF_ACCELERATOR, _NORM_OF_TRAINER = "clip_grad_norm_", "_get_grad_norm"
_LOOPS = ("_run_epoch", "training_step", "get_batch_samples", "_maybe_log_save_evaluate")


class WatchCallback(TrainerCallback):
    """A callback that watches a `Trainer`, or one of TRL.

    The state of the watch goes into the Trainer's checkpoints.

    The Trainer gives its callbacks neither the loss of a step nor the gradient norm before
    clipping, and nothing at all if an exception ends it. The callback finds the Trainer that calls
    it and covers some of its methods during `train()`. The loss is that of `training_step`, summed
    over the micro-batches. The gradient norm is what the Trainer's own clipping returns. An
    exception leaves a flight. All methods are given back when the training ends.

    If no Trainer calls the callback, the loss is what the model returned. The gradient norm is then
    the one after clipping, and labelled so.

    Args:
        options: those of `jacdiag.watch`.

    Raises:
        UsageError: when the training begins, as `jacdiag.watch` does.

    Example:
        >>> callback = WatchCallback(log_dir="runs/a", every=None)
        >>> Trainer(model, args, train_dataset=data, callbacks=[callback])     # doctest: +SKIP
    """

    def __init__(self, **options: Any) -> None:
        """Keep the options until the training begins."""
        self.options = options
        self.watch: Watch | None = None
        self._losses: list[Tensor] = []
        self._norm: Any = None
        self._is_mean = False  # the losses of micro-batches are means of their own
        self._hook: AttachedHook | None = None
        self._covers: list[CoveredMethod] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the watch, or go on with it from a checkpoint."""
        model: nn.Module = kwargs["model"]
        step = int(state.global_step)
        self._end()  # of a training that was left in a way that nobody saw

        # 1. Begin the watch. A Trainer that trains again, or with a smaller batch, goes on with its
        # log.
        log_dir = self.options.get("log_dir")
        has_log = log_dir is not None and (Path(log_dir) / RUN_FILE).exists()
        trains_again = self.watch is not None
        options = {"resume": has_log and (step > 0 or trains_again), **self.options}
        self.watch = watch(model, kwargs["optimizer"], **options)

        # 2. Take the state of the checkpoint that the Trainer resumes from.
        saved = Path(args.output_dir) / f"checkpoint-{step}" / STATE_FILE
        if step and saved.is_file():
            self.watch.load_state_dict(torch.load(saved, weights_only=True))
        elif step or (trains_again and has_log):
            self.watch.resume_at(step)

        # 3. Read what callbacks are not given: the loss and the gradient norm.
        self._losses = []
        self._norm = None
        trainer = find_trainer()
        if trainer is not None:
            self._cover(trainer)
        else:
            self._hook = AttachedHook(model, LossHook(self), after=True)

    def _cover(self, trainer: Trainer) -> None:
        """Cover the methods of a Trainer that return what is needed, or that may raise."""
        # 1. What returns the gradient norm.
        for owner, name in (
            (trainer.accelerator, _NORM_OF_ACCELERATOR),
            (trainer, _NORM_OF_TRAINER),
        ):
            if hasattr(owner, name):
                self._covers.append(CoveredMethod(owner, name, returned=self._note_norm))

        # 2. What an exception leaves the loop through. One of them also returns the loss.
        for name in _LOOPS:
            if not hasattr(trainer, name):
                continue
            note = self._note_loss if name == "training_step" else None
            cover = CoveredMethod(trainer, name, returned=note, raised=self._note_error)
            self._covers.append(cover)

    def _note_norm(self, norm: Any) -> None:
        self._norm = norm

    def _note_loss(self, loss: Any) -> None:
        if isinstance(loss, Tensor):
            self._losses.append(loss.detach())  # divided by the micro-batches already

    def _note_error(self, error: BaseException) -> None:
        """Write the flight of an exception that leaves the Trainer, and end the watch."""
        # The watch may have been closed before, by the loop itself.
        if self.watch is not None and not self.watch.closed:
            quietly(self.watch.__exit__, type(error), error, error.__traceback__)
        self._end()

    def note_output(self, kwargs: Any, output: Any) -> None:
        """Take the loss that a model returned, if no Trainer was found."""
        if isinstance(output, dict):
            loss = output.get("loss")
        else:
            loss = getattr(output, "loss", None)
        if not isinstance(loss, Tensor):
            return

        # With the number of items in the batch, micro-batches add up to the mean.
        self._is_mean = kwargs.get("num_items_in_batch") is None
        self._losses.append(loss.detach())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Pass the step on to the watch, with what was read of it."""
        # 1. What was read since the last step.
        losses = self._losses
        norm = self._norm
        self._losses = []
        self._norm = None
        if self.watch is None or self.watch.closed:
            return

        # 2. The loss of the step, over all micro-batches.
        loss = None
        if losses:
            loss = torch.stack(losses).sum()
            if self._is_mean:
                loss = loss / len(losses)
        tokens = getattr(state, "num_input_tokens_seen", None) or None
        self.watch.step(loss, grad_norm=norm, tokens=tokens, step=state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the state of the watch with the Trainer's checkpoint."""
        if self.watch is None:
            return
        # On every rank: figures are summed for it.
        saved = self.watch.state_dict()
        if not self.watch.together.lead:
            return

        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if folder.is_dir():
            torch.save(saved, folder / STATE_FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the watch."""
        self._end()

    def _end(self) -> None:
        """Close the watch and take everything off the model and the Trainer."""
        # 1. The methods, in the reverse order: one may have been covered twice.
        covers = self._covers
        self._covers = []
        for cover in reversed(covers):
            quietly(cover.remove)

        # 2. The hook, and the watch.
        hook = self._hook
        self._hook = None
        if hook is not None:
            quietly(hook.remove)
        if self.watch is not None:
            self.watch.close()


class LossHook(ModelHook):
    """A forward hook that takes the loss from the model's output."""

    def __init__(self, callback: WatchCallback) -> None:
        """Note the callback that gets the loss."""
        self.callback = callback

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Pass the output of a forward in training on."""
        if not torch.compiler.is_compiling() and module.training:
            self.callback.note_output(kwargs, output)


class CoveredMethod:
    """A callable in the place of a method of one object.

    It calls the method and passes on what it returned or raised.

    Args:
        owner: the object.
        name: of the method.
        returned: called with what the method returned.
        raised: called with the exception that left the method.
    """

    def __init__(
        self,
        owner: Any,
        name: str,
        *,
        returned: Callable[[Any], None] | None = None,
        raised: Callable[[BaseException], None] | None = None,
    ) -> None:
        """Cover the method; see the class for the arguments."""
        self.owner = owner
        self.name = name
        self.returned = returned
        self.raised = raised
        self.method = getattr(owner, name)
        self.own = name in vars(owner)  # another library has covered it before
        setattr(owner, name, self)

    def remove(self) -> None:
        """Give the object its own method back.

        If another library has covered this one, it stays and only calls through.
        """
        self.returned = None
        self.raised = None
        if vars(self.owner).get(self.name) is not self:
            return
        if self.own:
            setattr(self.owner, self.name, self.method)
        else:
            delattr(self.owner, self.name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method, and pass on what it returns or raises."""
        try:
            result = self.method(*args, **kwargs)
        except BaseException as error:
            if self.raised is not None:
                self.raised(error)
            raise
        if self.returned is not None:
            self.returned(result)
        return result

    def __getattr__(self, name: str) -> Any:
        """Look everything else up on the covered method, such as its signature."""
        # 1. An object that is not initialised yet has nothing to look things up on.
        if name in ("method", "owner"):
            raise AttributeError(name)

        # 2. Special methods are its own, but for those that say which method it is.
        is_of_a_method = name in ("__func__", "__self__", "__name__")
        is_special = name.startswith("__") and not is_of_a_method
        if is_special:
            raise AttributeError(name)
        return getattr(self.method, name)

    def __reduce__(self) -> Any:
        return getattr, (self.owner, self.name)


def find_trainer() -> Trainer | None:
    """Return the Trainer that calls a callback.

    Callbacks are not given it, but it is among the callers.
    """
    frame = sys._getframe(1)
    while frame is not None:
        # The nearest caller comes first.
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller
        frame = frame.f_back  # type: ignore[assignment]
    return None
