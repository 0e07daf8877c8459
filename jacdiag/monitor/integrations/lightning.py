"""Lightning: a `Callback` that watches (extra `lightning`).

>>> from jacdiag.monitor.integrations.lightning import WatchCallback         # doctest: +SKIP
>>> Trainer(callbacks=[WatchCallback(log_dir="runs/a")]).fit(module, data)   # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn

from jacdiag.errors import UsageError
from jacdiag.monitor.api import watch
from jacdiag.monitor.square_sums import square_sums
from jacdiag.monitor.training_watch import Watch


class WatchCallback(Callback):
    """Watches a `Trainer` with automatic optimisation; the state goes into its checkpoints.

    Lightning makes the gradients inside the optimiser's step, clips them there, and tells callbacks
    in between: the norm before clipping is taken then, where the Trainer clips.

    Of the strategies that shard, ModelParallelStrategy (FSDP2) is watched as any other; there the
    norm before clipping is not known, and not guessed. FSDPStrategy (FSDP1) is refused.

    Args:
        model: which part of the LightningModule to watch, by its name. If not given, it is the part
            that holds all the parameters that are trained. If no part holds them all, it is the
            LightningModule itself; where that implements no `forward`, it is the part that holds
            most of them, and that is said.
        options: those of `jacdiag.watch`.
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        self.part, self.options = model, options
        self.watch: Watch | None = None
        self._state: Mapping[str, Any] | None = None
        self._losses: list[Tensor] = []
        self._norm: Tensor | None = None
        self._watched: set[int] = set()  # ids of the parameters of the part that is watched
        self._clips = False
        self._seen = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # its wrapper is outside of the LightningModule, and not seen
        if isinstance(trainer.strategy, FSDPStrategy):
            raise UsageError(
                "Lightning's FSDPStrategy (FSDP1) is not supported: its parameters are flat shards",
                hint="ModelParallelStrategy with fully_shard (FSDP2) is",
            )
        network = (
            NetworkPart(pl_module.get_submodule(self.part))
            if self.part
            else find_network(pl_module, trainer)
        )
        options = {"resume": self._state is not None, **self.options}
        self.watch = watch(network.module, trainer.optimizers, **options)
        if network.others:
            self.watch.record.warn("part", _others_text(pl_module, network))
        self._watched = {id(p) for p in network.module.parameters()}
        own_clipping = (
            type(pl_module).configure_gradient_clipping
            is not LightningModule.configure_gradient_clipping
        )
        self._clips = bool(trainer.gradient_clip_val) or own_clipping
        self._seen = trainer.global_step
        if self._state is not None:
            self.watch.load_state_dict(self._state)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        if self.watch is not None:
            self.watch.prepare()
        if self._clips and self.watch is not None and not self.watch.together.sharded:
            parameters = [
                p
                for group in optimizer.param_groups
                for p in group["params"]
                if id(p) in self._watched
            ]
            grads = [p.grad for p in parameters if p.grad is not None]
            self._norm = square_sums(grads).sum().sqrt() if grads else None

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
        self.watch.step(sum(losses) if losses else None, grad_norm=norm, step=self._seen)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if self.watch is not None:
            self.watch.__exit__(type(exception), exception, exception.__traceback__)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.watch is not None:
            self.watch.close()

    def state_dict(self) -> dict[str, Any]:
        return self.watch.state_dict() if self.watch is not None and not self.watch.closed else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict or None


@dataclass(frozen=True)
class NetworkPart:
    """The part of a LightningModule that is watched.

    Attributes:
        module: the part.
        name: its name in the LightningModule; "" for the LightningModule itself.
        others: names of parts that are trained as well and are outside of it.
    """

    module: nn.Module
    name: str = ""
    others: tuple[str, ...] = ()


def find_network(pl_module: nn.Module, trainer: Any) -> NetworkPart:
    """Return the part of a LightningModule that its training step calls with the batch, as far as
    parameters tell.

    Args:
        pl_module: the LightningModule.
        trainer: whose optimizers hold the parameters that are trained. A frozen teacher and a
            moving average are in none of them.
    """
    trained = {
        id(p)
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }
    sizes: dict[str, int] = {}
    for name, part in _parts_with_forward(pl_module):
        size = sum(p.numel() for p in part.parameters() if id(p) in trained)
        if size:
            sizes[name] = size
    if not sizes:
        return NetworkPart(pl_module)
    largest = max(sizes, key=lambda name: sizes[name])
    module = pl_module.get_submodule(largest)
    inside = {id(p) for p in module.parameters()}
    if all(id(p) in inside for p in pl_module.parameters() if id(p) in trained):
        return NetworkPart(module, largest)
    if implements_forward(pl_module):
        return NetworkPart(pl_module)
    return NetworkPart(module, largest, tuple(name for name in sizes if name != largest))


def implements_forward(module: nn.Module) -> bool:
    """Return whether a module can be called: ModuleList and many LightningModules have no forward
    of their own.
    """
    forward = getattr(type(module).forward, "__func__", type(module).forward)
    return forward not in (nn.Module.forward, LightningModule.forward)


def _parts_with_forward(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules inside of one that can be called."""
    for name, child in module.named_children():
        if implements_forward(child):
            yield f"{prefix}{name}", child
        else:
            yield from _parts_with_forward(child, f"{prefix}{name}.")


def _others_text(pl_module: nn.Module, network: NetworkPart) -> str:
    names = ", ".join(f"'{name}'" for name in network.others[:3])
    more = ", ..." if len(network.others) > 3 else ""
    return (
        f"'{network.name}' of {type(pl_module).__name__} is watched, the part with the most "
        f"parameters. {names}{more} "
        "are trained as well and are not in the figures. WatchCallback(model=NAME) watches "
        "another part"
    )
