"""Hugging Face: a `TrainerCallback` that watches (extra `hf`).

>>> from jacdiag.watching.huggingface import WatchCallback       # doctest: +SKIP
>>> Trainer(model, args, train_dataset=data, callbacks=[WatchCallback(log_dir="runs/a")]).train()     # doctest: +SKIP
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from jacdiag.report.runlog import RUN_FILE
from jacdiag.watching.attach import watch
from jacdiag.watching.guards import quietly
from jacdiag.watching.hook import Watch

STATE_FILE = "jacdiag.pt"


class WatchCallback(TrainerCallback):
    """Watches a `Trainer`; the state goes into its checkpoints.

    The Trainer tells callbacks neither the loss of a step nor the gradient norm before clipping: the loss is what the
    model returned (of all micro-batches), the gradient norm is the one after clipping, and labelled so.

    Args:
        options: those of `jacdiag.watch`.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.watch: Watch | None = None
        self._losses: list[Tensor] = []
        self._summed = False
        self._handle: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model: nn.Module = kwargs["model"]
        at = int(state.global_step)
        there = self.options.get("log_dir") is not None and (Path(self.options["log_dir"]) / RUN_FILE).exists()
        options = {"resume": bool(at and there), **self.options}
        self.watch = watch(model, kwargs["optimizer"], **options)
        self._handle = model.register_forward_hook(self._note, with_kwargs=True)
        if at:
            saved = Path(args.output_dir) / f"checkpoint-{at}" / STATE_FILE
            if saved.is_file():
                self.watch.load_state_dict(torch.load(saved, weights_only=True))
            else:
                self.watch.resume_at(at)

    def _note(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not module.training:
            return
        loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
        if isinstance(loss, Tensor):
            self._summed = kwargs.get("num_items_in_batch") is not None  # then micro-batches add up to the mean
            self._losses.append(loss.detach())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        losses, self._losses = self._losses, []
        if self.watch is None:
            return
        loss = torch.stack(losses).sum() if losses else None
        if loss is not None and not self._summed:
            loss = loss / len(losses)
        self.watch.step(loss, tokens=getattr(state, "num_input_tokens_seen", None) or None)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.watch is None:
            return
        saved = self.watch.state_dict()  # on every rank: figures are summed for it
        if self.watch.together.lead and folder.is_dir():
            torch.save(saved, folder / STATE_FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._handle is not None:
            quietly(self._handle.remove)
            self._handle = None
        if self.watch is not None:
            self.watch.close()
