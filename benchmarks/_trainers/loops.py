"""Trainers that are loops: one loop with its variations, and the optimizers of other libraries in
it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import jacdiag
from _trainers.checks import Plan, Result, Trainer
from _trainers.model import ByHand, Model, norm_of, rows_of

CLIP = 1.0
Loss = Callable[[Tensor, Tensor], Tensor]


def call_model(model: Any) -> Loss:
    return lambda ids, targets: model(ids, targets)


def own_file(plan: Plan) -> Path:
    """The checkpoint of this process: ranks that write to one file at a time spoil it."""
    return plan.checkpoint.with_name(f"{plan.checkpoint.name}-{os.environ.get('RANK', '0')}")


@dataclass(kw_only=True)
class Loop:
    """A training loop of the user's own, in which one thing or two are not plain.

    Attributes:
        optimizers: of a model; the watch gets them as `watched` gives them.
        build: makes the model.
        wrap: what the loop calls, made before the watch begins.
        wraps_first: the optimizers are made after it, of the parameters that it leaves.
        wrap_later: the same, made after the watch has begun.
        watched: what `jacdiag.watch` gets: the model and the optimizers.
        accumulate: micro-batches of a step.
        autocast: mixed precision with a loss scaler.
        closure: the optimizers compute gradients inside of their step.
        begin, end: called with the optimizers around the training.
        sync: context of a micro-batch, given whether it is the last of the step.
        rate: learning rate of the first parameter group.
        weight: gets the NaN.
    """

    optimizers: Callable[[nn.Module], list[Any]]
    build: Callable[[], nn.Module] = Model
    wrap: Callable[[nn.Module], Any] = lambda model: model
    wraps_first: bool = False
    wrap_later: Callable[[Any], Any] = lambda wrapped: wrapped
    watched: Callable[[Any, list[Any]], tuple[Any, Any]] = lambda wrapped, optimizers: (
        wrapped,
        optimizers,
    )
    loss: Callable[[Any], Loss] = call_model
    accumulate: int = 1
    autocast: bool = False
    closure: bool = False
    begin: Callable[[list[Any]], None] = lambda optimizers: None
    end: Callable[[list[Any]], None] = lambda optimizers: None
    sync: Callable[[Any, bool], Any] = lambda wrapped, last: nullcontext()
    rate: Callable[[list[Any]], float] = lambda optimizers: optimizers[0].param_groups[0]["lr"]
    weight: str = "blocks.1.mlp.up.weight"

    def __call__(self, plan: Plan) -> Result:
        """Train as the plan says."""
        torch._dynamo.reset()
        torch.manual_seed(0)
        # 1. Build everything, in the order of a user's program.
        model = self.build()
        wrapped = self.wrap(model) if self.wraps_first else None
        optimizers = self.optimizers(model)
        wrapped = self.wrap(model) if wrapped is None else wrapped
        saved: dict[str, Any] = {}
        first = 1
        if plan.resume:
            saved = torch.load(own_file(plan), weights_only=False)
            model.load_state_dict(saved["model"])
            for optimizer, state in zip(optimizers, saved["optimizers"], strict=False):
                optimizer.load_state_dict(state)
            first = saved["step"] + 1
        watch = None
        if plan.log_dir is not None:
            watch = jacdiag.watch(*self.watched(wrapped, optimizers), **plan.options)
            if plan.resume:
                watch.load_state_dict(saved["watch"])
        loss_of = self.loss(self.wrap_later(wrapped))
        # 2. Train.
        self.begin(optimizers)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=self.autocast)
        result = Result(by_hand=ByHand(model), clips=not self.closure)
        with watch if watch is not None else nullcontext():
            for step in range(first, plan.steps + 1):
                plan.put_nan(model.get_parameter(self.weight), step)
                loss, norm = self._step(
                    plan, step, loss_of, wrapped, model, optimizers, scaler, result
                )
                result.losses.append(float(loss))
                if watch is not None:
                    watch.step(loss, grad_norm=norm)
                plan.after_step(step)
                if step == plan.save_at:
                    states = [optimizer.state_dict() for optimizer in optimizers]
                    state = {"model": model.state_dict(), "optimizers": states, "step": step}
                    torch.save(
                        {**state, "watch": watch.state_dict() if watch is not None else {}},
                        own_file(plan),
                    )
        self.end(optimizers)
        result.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        return result

    def _step(
        self,
        plan: Plan,
        step: int,
        loss_of: Loss,
        wrapped: Any,
        model: nn.Module,
        optimizers: list[Any],
        scaler: Any,
        result: Result,
    ) -> tuple[Tensor, Any]:
        hand = result.by_hand
        assert hand is not None
        if self.closure:
            return self._step_with_closure(plan, step, loss_of, optimizers, hand), None
        # 1. Gradients of all micro-batches.
        total = torch.zeros(())
        for part in range(self.accumulate):
            ids = rows_of(self.accumulate * step + part, broken=plan.is_broken(step))
            last = part == self.accumulate - 1
            low = torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext()
            with self.sync(wrapped, last):
                with low:
                    loss = loss_of(ids[:, :-1], ids[:, 1:]) / self.accumulate
                scaler.scale(loss).backward()
            total += loss.detach()
        # 2. Clip, and step.
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        hand.note_before_clipping()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        hand.note_used()
        hand.begin_step(self.rate(optimizers))
        for optimizer in optimizers:
            scaler.step(optimizer)
        hand.end_step()
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
        return total, norm

    def _step_with_closure(
        self, plan: Plan, step: int, loss_of: Loss, optimizers: list[Any], hand: ByHand
    ) -> Tensor:
        ids = rows_of(step, broken=plan.is_broken(step))
        losses: list[Tensor] = []

        def closure() -> Tensor:
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = loss_of(ids[:, :-1], ids[:, 1:])
            loss.backward()
            losses.append(loss.detach())
            hand.last_gradient = norm_of(hand.gradients())
            return loss

        hand.begin_step(self.rate(optimizers))
        for optimizer in optimizers:
            optimizer.step(closure)
        hand.end_step()
        hand.used.append(hand.last_gradient)
        return losses[0]


# -- optimizers ------------------------------------------------------------------------------------
def one(make: Callable[[Any], Any]) -> Callable[[nn.Module], list[Any]]:
    return lambda model: [make(model.parameters())]


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-3)


def muon_and_adamw(model: nn.Module) -> list[Any]:
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "blocks" in name]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    return [torch.optim.Muon(matrices, lr=2e-2), torch.optim.AdamW(others, lr=3e-3)]


def lion(parameters: Any) -> Any:
    from lion_pytorch import Lion

    return Lion(parameters, lr=3e-4)


def from_pytorch_optimizer(name: str, **options: Any) -> Callable[[Any], Any]:
    def make(parameters: Any) -> Any:
        import pytorch_optimizer

        return getattr(pytorch_optimizer, name)(list(parameters), **options)

    return make


def prodigy(parameters: Any) -> Any:
    from prodigyopt import Prodigy

    return Prodigy(parameters, lr=1.0)


def schedule_free(parameters: Any) -> Any:
    from schedulefree import AdamWScheduleFree

    return AdamWScheduleFree(parameters, lr=3e-3, warmup_steps=5)


def eight_bit(parameters: Any) -> Any:
    from torchao.optim import AdamW8bit

    return AdamW8bit(list(parameters), lr=3e-3)


def lookahead(parameters: Any) -> Any:
    from pytorch_optimizer import Lookahead

    return Lookahead(adamw(parameters), k=3, alpha=0.5)


def sharpness_aware(parameters: Any) -> Any:
    from pytorch_optimizer import SAM

    return SAM(list(parameters), base_optimizer=torch.optim.AdamW, lr=3e-3)


def lbfgs(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters, lr=0.1, max_iter=3)


def titan_container(model: nn.Module) -> list[Any]:
    from _trainers.titan import optimizers_of

    return [optimizers_of(model)]


# -- models of other libraries ---------------------------------------------------------------------
def litgpt_model() -> nn.Module:
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    class WithLoss(GPT):
        def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
            logits: Tensor = super().forward(ids)
            if targets is None:
                return logits
            loss: Tensor = chunked_cross_entropy(logits, targets, chunk_size=0)
            return loss

    sizes = {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 32,
        "block_size": 16,
        "vocab_size": 64,
        "padded_vocab_size": 64,
    }
    return WithLoss(Config.from_name("pythia-14m", **sizes))


def litgpt_parts(where: str, names: list[str]) -> list[str]:
    """Parameters of a sub-layer and of the norm before it."""
    block, _, kind = where.rpartition(".")
    norm = {"attn": "norm_1", "mlp": "norm_2"}.get(kind, "")
    return [n for n in names if n.startswith((where + ".", f"{block}.{norm}."))] if norm else []


def x_transformers_model() -> nn.Module:
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    decoder = Decoder(dim=32, depth=2, heads=2, attn_dim_head=16)
    return AutoregressiveWrapper(
        TransformerWrapper(num_tokens=64, max_seq_len=17, attn_layers=decoder)
    )


def x_transformers_loss(model: Any) -> Loss:
    return lambda ids, targets: model(torch.cat([ids, targets[:, -1:]], dim=1))


def x_transformers_parts(where: str, names: list[str]) -> list[str]:
    """A sub-layer is named by its module, such as layers.N.1.ff, and its norm lies in
    layers.N.0.
    """
    before, layers, rest = where.partition(".layers.")
    number = rest.partition(".")[0]
    return [n for n in names if n.startswith(f"{before}{layers}{number}.")] if layers else []


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="aot_eager")


def compiled_in_place(model: Any) -> Any:
    model.compile(backend="aot_eager")
    return model


def is_training(optimizers: list[Any]) -> None:
    for optimizer in optimizers:
        optimizer.train()


def inside(wrapped: Any, optimizers: list[Any]) -> tuple[Any, Any]:
    """The container itself, as torchtitan holds it."""
    return wrapped, optimizers[0]


LOOPS = [
    Trainer(name="plain loop", library="torch", run=Loop(optimizers=one(adamw))),
    Trainer(
        name="gradient accumulation", library="torch", run=Loop(optimizers=one(adamw), accumulate=3)
    ),
    Trainer(
        name="AMP with a GradScaler",
        library="torch",
        run=Loop(optimizers=one(adamw), autocast=True),
    ),
    Trainer(
        name="compiled, then watched",
        library="torch",
        run=Loop(optimizers=one(adamw), wrap=compiled),
    ),
    Trainer(
        name="watched, then compiled",
        library="torch",
        run=Loop(optimizers=one(adamw), wrap_later=compiled),
    ),
    Trainer(
        name="watched, then model.compile()",
        library="torch",
        run=Loop(optimizers=one(adamw), wrap_later=compiled_in_place),
    ),
    Trainer(name="Muon + AdamW", library="torch", run=Loop(optimizers=muon_and_adamw)),
    Trainer(name="LBFGS", library="torch", run=Loop(optimizers=one(lbfgs), closure=True)),
    Trainer(
        name="SAM",
        library="pytorch_optimizer",
        run=Loop(optimizers=one(sharpness_aware), closure=True),
    ),
    Trainer(name="Lookahead", library="pytorch_optimizer", run=Loop(optimizers=one(lookahead))),
    Trainer(
        name="SOAP",
        library="pytorch_optimizer",
        run=Loop(optimizers=one(from_pytorch_optimizer("SOAP", lr=3e-3))),
    ),
    Trainer(
        name="Shampoo",
        library="pytorch_optimizer",
        run=Loop(optimizers=one(from_pytorch_optimizer("ScalableShampoo", lr=3e-3))),
    ),
    Trainer(name="Lion", library="lion_pytorch", run=Loop(optimizers=one(lion))),
    Trainer(name="Prodigy", library="prodigyopt", run=Loop(optimizers=one(prodigy))),
    Trainer(
        name="schedule-free",
        library="schedulefree",
        run=Loop(optimizers=one(schedule_free), begin=is_training),
    ),
    Trainer(name="torchao 8-bit AdamW", library="torchao", run=Loop(optimizers=one(eight_bit))),
    Trainer(
        name="torchtitan's optimizers",
        library="torchtitan",
        run=Loop(
            optimizers=titan_container,
            watched=inside,
            rate=lambda optimizers: optimizers[0].optimizers[0].param_groups[0]["lr"],
        ),
    ),
    Trainer(
        name="litgpt",
        library="litgpt",
        parts=litgpt_parts,
        run=Loop(optimizers=one(adamw), build=litgpt_model, weight="transformer.h.1.mlp.fc.weight"),
    ),
    Trainer(
        name="x-transformers",
        library="x_transformers",
        parts=x_transformers_parts,
        run=Loop(
            optimizers=one(adamw),
            build=x_transformers_model,
            loss=x_transformers_loss,
            weight="net.attn_layers.layers.1.1.ff.0.0.weight",
        ),
    ),
]
