"""Lightning: a `Callback` that watches (extra `lightning`).

>>> from jacdiag.watching.lightning import WatchCallback         # doctest: +SKIP
>>> Trainer(callbacks=[WatchCallback(log_dir="runs/a")]).fit(module, data)                            # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor

from jacdiag.errors import UsageError
from jacdiag.watching.attach import watch
from jacdiag.watching.hook import Watch
from jacdiag.watching.norms import square_sums


class WatchCallback(Callback):
    """Watches a `Trainer` with automatic optimisation; the state goes into its checkpoints.

    Lightning makes the gradients inside the optimiser's step, clips them there, and tells callbacks in between: the
    norm before clipping is taken then, where the Trainer clips.

    Of the strategies that shard, ModelParallelStrategy (FSDP2) is watched as any other; there the norm before clipping
    is not known, and not guessed. FSDPStrategy (FSDP1) is refused.

    Args:
        model: which part of the LightningModule to watch, by attribute name; the whole of it if not given. The part
            that is called with the batch is what the probe can be kept from.
        options: those of `jacdiag.watch`.
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        self.part, self.options = model, options
        self.watch: Watch | None = None
        self._state: Mapping[str, Any] | None = None
        self._losses: list[Tensor] = []
        self._norm: Tensor | None = None
        self._seen = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.strategy, FSDPStrategy):  # its wrapper is outside of the LightningModule, and not seen
            raise UsageError("Lightning's FSDPStrategy (FSDP1) is not supported: its parameters are flat shards",
                             hint="ModelParallelStrategy with fully_shard (FSDP2) is")  # fmt: skip
        model = getattr(pl_module, self.part) if self.part else pl_module
        options = {"resume": self._state is not None, **self.options}
        self.watch = watch(model, trainer.optimizers, **options)
        self._seen = trainer.global_step
        if self._state is not None:
            self.watch.load_state_dict(self._state)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if self.watch is not None:
            self.watch.prepare()
        if trainer.gradient_clip_val and self.watch is not None and not self.watch.together.sharded:
            grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self._norm = square_sums(grads).sum().sqrt()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            self._losses.append(loss.detach())  # divided by the micro-batches already
        if trainer.global_step == self._seen or self.watch is None:
            return
        self._seen = trainer.global_step
        losses, self._losses = self._losses, []
        norm, self._norm = self._norm, None
        self.watch.step(sum(losses) if losses else None, grad_norm=norm)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.watch is not None:
            self.watch.__exit__(type(exception), exception, exception.__traceback__)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.watch is not None:
            self.watch.close()

    def state_dict(self) -> dict[str, Any]:
        return self.watch.state_dict() if self.watch is not None and not self.watch.closed else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict or None
