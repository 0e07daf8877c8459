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
from jacdiag.monitor.optimizers import held_parameters
from jacdiag.monitor.square_sums import square_sums
from jacdiag.monitor.training_watch import Watch


class WatchCallback(Callback):
    """A callback that watches a `Trainer` with automatic optimization.

    The state of the watch goes into the Trainer's checkpoints.

    Lightning computes the gradients inside the optimizer's step, and clips them there. It calls
    callbacks in between. So if the Trainer clips, the norm before clipping is measured then. So is
    that of a Trainer with a loss scaler, which leaves out the steps whose norm is not finite.

    Of the strategies that shard, ModelParallelStrategy (FSDP2) is watched as any other. The norm
    before clipping is not known there. FSDPStrategy (FSDP1) is refused.

    Args:
        model: name of the submodule of the LightningModule to watch. If not given, it is the one
            that holds all the parameters that are trained. If none holds them all, it is the
            LightningModule itself. If that implements no `forward`, it is the submodule that holds
            most of them, with a warning.
        options: those of `jacdiag.watch`.

    Raises:
        UsageError: when the training starts, as `jacdiag.watch` does; or the strategy is
            FSDPStrategy.

    Example:
        >>> callback = WatchCallback(log_dir="runs/a", every=None)
        >>> Trainer(callbacks=[callback]).fit(module, data)        # doctest: +SKIP
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        """Keep the options until the training begins; see the class for the arguments."""
        self.submodule_name = model
        self.options = options
        self.watch: Watch | None = None
        self._state: Mapping[str, Any] | None = None
        self._losses: list[Tensor] = []
        self._norm: Tensor | None = None
        self._watched: set[int] = set()  # ids of the parameters that are watched
        self._needs_norm = False
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the watch, or go on with it from a checkpoint.

        Raises:
            UsageError: the strategy is FSDPStrategy, or as `jacdiag.watch` does.
        """
        # 1. The module to watch. The wrapper of FSDP1 is outside of the LightningModule.
        if isinstance(trainer.strategy, FSDPStrategy):
            raise UsageError(
                "Lightning's FSDPStrategy (FSDP1) is not supported: its parameters are flat shards",
                hint="ModelParallelStrategy with fully_shard (FSDP2) is",
            )
        if self.submodule_name:
            network = NetworkPart(pl_module.get_submodule(self.submodule_name))
        else:
            network = find_network(pl_module, trainer)

        # 2. Begin the watch.
        options = {"resume": self._state is not None, **self.options}
        self.watch = watch(network.module, trainer.optimizers, **options)
        if network.others:
            self.watch.record.warn("part", _others_text(pl_module, network))
        self._watched = {id(p) for p in network.module.parameters()}
        self._last_step = trainer.global_step

        # 3. Whether the Trainer or the module clips, or a loss scaler may leave steps out.
        clipping_method = type(pl_module).configure_gradient_clipping
        has_own_clipping = clipping_method is not LightningModule.configure_gradient_clipping
        clips = bool(trainer.gradient_clip_val) or has_own_clipping
        has_scaler = getattr(trainer.precision_plugin, "scaler", None) is not None
        self._needs_norm = clips or has_scaler

        # 4. Go on from a checkpoint.
        if self._state is not None:
            self.watch.load_state_dict(self._state)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        """Let the watch prepare, and measure the gradient norm before Lightning clips."""
        if self.watch is None:
            return
        self.watch.prepare()

        # Otherwise the watch reads the norm itself, at the optimizer's step.
        if not self._needs_norm:
            return

        # The norm of sharded gradients would need the other ranks.
        if self.watch.together.sharded:
            return
        self._norm = self._gradient_norm(optimizer)

    def _gradient_norm(self, optimizer: Any) -> Tensor | None:
        """Return the norm of the gradients that the optimizer uses; None if there are none."""
        gradients: list[Tensor] = []
        for parameter in held_parameters(optimizer):
            is_watched = id(parameter) in self._watched
            if is_watched and parameter.grad is not None:
                gradients.append(parameter.grad)
        if not gradients:
            return None
        return square_sums(gradients).sum().sqrt()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the loss of a micro-batch, and pass the step on to the watch if one was made."""
        # 1. The loss of the micro-batch.
        loss = outputs
        if isinstance(outputs, Mapping):
            loss = outputs.get("loss")
        if isinstance(loss, Tensor):
            self._losses.append(loss.detach())  # divided by the micro-batches already
        if trainer.global_step == self._last_step or self.watch is None:
            return

        # 2. The optimizer has made a step: all that was read belongs to it.
        self._last_step = trainer.global_step
        loss = sum(self._losses) if self._losses else None
        norm = self._norm
        self._losses = []
        self._norm = None
        self.watch.step(loss, grad_norm=norm, step=self._last_step)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Write the flight, and close the watch."""
        if self.watch is not None:
            self.watch.__exit__(type(exception), exception, exception.__traceback__)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the watch."""
        if self.watch is not None:
            self.watch.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the watch for the Trainer's checkpoint; empty without a watch."""
        if self.watch is None:
            return {}
        if self.watch.closed:
            return {}
        return self.watch.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a state of the watch until the training begins."""
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
    """Return the part of a LightningModule that its training step probably calls with the batch.

    That is the part that holds the parameters that are trained.

    Args:
        pl_module: the LightningModule.
        trainer: whose optimizers hold the parameters that are trained. A frozen teacher and a
            moving average are in none of them.
    """
    # 1. The parts with parameters that are trained.
    trained = _trained_parameters(trainer)
    sizes = _trained_sizes(pl_module, trained)
    if not sizes:
        return NetworkPart(pl_module)

    # 2. The largest, if it holds them all.
    largest = max(sizes, key=lambda name: sizes[name])
    module = pl_module.get_submodule(largest)
    in_largest = set(map(id, module.parameters()))
    in_module = set(map(id, pl_module.parameters()))
    holds_all = trained & in_module <= in_largest
    if holds_all:
        return NetworkPart(module, largest)

    # 3. Else the LightningModule, if it can be called.
    if implements_forward(pl_module):
        return NetworkPart(pl_module)

    # 4. Else the largest part, though others are trained as well.
    others = [name for name in sizes if name != largest]
    return NetworkPart(module, largest, tuple(others))


def implements_forward(module: nn.Module) -> bool:
    """Return whether a module can be called.

    ModuleList and many LightningModules have no forward of their own.
    """
    forward = getattr(type(module).forward, "__func__", type(module).forward)
    return forward not in (nn.Module.forward, LightningModule.forward)


def _trained_parameters(trainer: Any) -> set[int]:
    """Return the ids of the parameters that the optimizers of a trainer hold."""
    trained: set[int] = set()
    for optimizer in trainer.optimizers:
        trained.update(map(id, held_parameters(optimizer)))
    return trained


def _trained_sizes(module: nn.Module, trained: set[int]) -> dict[str, int]:
    """Return how many elements are trained in each part with a forward, if any are."""
    sizes: dict[str, int] = {}
    for name, part in _parts_with_forward(module):
        size = 0
        for parameter in part.parameters():
            if id(parameter) in trained:
                size += parameter.numel()

        # A frozen teacher has none.
        if size:
            sizes[name] = size
    return sizes


def _parts_with_forward(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost modules inside of one that can be called, with their names."""
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
