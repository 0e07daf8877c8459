"""The watch inside other people's loops, with the real libraries: the same bits, the same norms."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from monitor.rig import (
    PROBE_EVERY,
    STATS_EVERY,
    STEPS,
    T,
    V,
    adam,
    assert_same_state,
    batch,
    lines,
    small,
    state_of,
    trained,
)
from monitor.test_step_metrics import exact
from torch import Tensor, nn

import jacdiag

OPTIONS: dict[str, Any] = {
    "every": 6,
    "stats_every": 3,
    "log_every": 4,
    "quiet": True,
    "strict": True,
}
pytestmark = pytest.mark.usefixtures("deterministic")
needs_lightning = pytest.mark.skipif(
    importlib.util.find_spec("lightning") is None, reason="lightning is not installed"
)


def same(make: Any, folder: Path, steps: int = STEPS, **more: Any) -> list[dict[str, Any]]:
    """Trains with and without; returns the steps of the log."""
    options = {k: v for k, v in OPTIONS.items() if k != "quiet"} | {
        "every": PROBE_EVERY,
        "stats_every": STATS_EVERY,
    }
    plain = trained(steps, None, make=make)
    watched = trained(steps, {**options, "log_dir": folder, **more}, make=make)
    assert plain[0] == watched[0] and plain[2] == watched[2]
    assert_same_state(plain[1], watched[1])
    assert not lines(folder, "fault")
    assert [row["step"] for row in lines(folder, "step")] == list(range(1, steps + 1))
    assert [row["step"] for row in lines(folder, "probe")] == list(range(0, steps + 1, PROBE_EVERY))
    assert all(len(row["report"]["sublayers"]) == 4 for row in lines(folder, "probe"))
    return lines(folder, "step")


# -- torch -----------------------------------------------------------------------------------------
COMPILED = [
    "whole, no graph breaks",
    "per block",
    # The same module, compiled by a method of its own; with another backend in
    # `test_compiled_forward.py`.
    pytest.param("in place", marks=pytest.mark.long),
    pytest.param("whole", marks=pytest.mark.long),
]


@pytest.mark.parametrize("how", COMPILED)
def test_compiled_model_trains_the_same_under_the_watch(how: str, tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch._dynamo.reset()
        model = small()
        if how == "in place":
            model.compile(backend="aot_eager", fullgraph=True)
        elif how == "per block":
            for k, block in enumerate(model.transformer["h"]):
                model.transformer["h"][k] = torch.compile(block, backend="aot_eager")
        else:
            return torch.compile(model, backend="aot_eager", fullgraph="no" in how)  # type: ignore[return-value]
        return model

    rows = same(make, tmp_path)
    groups = lines(tmp_path, "run")[0]["groups"]
    assert groups[:2] == ["transformer.h.0.attn", "transformer.h.0.mlp"]
    assert all(row["grad_norm_post"] > 0 for row in rows)


class Checkpointed(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        out: Tensor = checkpoint(self.block, x, use_reentrant=False)
        return out


# The wrapper of torch calls the same function.
@pytest.mark.parametrize("how", ["function", pytest.param("wrapper", marks=pytest.mark.long)])
def test_activation_checkpointing_trains_the_same_under_the_watch(how: str, tmp_path: Path) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    def make() -> nn.Module:
        model = small()
        for k, block in enumerate(model.transformer["h"]):
            model.transformer["h"][k] = (
                Checkpointed(block) if how == "function" else checkpoint_wrapper(block)
            )
        return model

    same(make, tmp_path)


def test_gradients_made_inside_the_step(tmp_path: Path) -> None:
    """optimizer.step(closure): before the step there are no gradients, or the last ones."""
    model = small(dropout=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = []
    with jacdiag.watch(model, optimizer, log_dir=tmp_path, **OPTIONS) as w:
        for step in range(1, 8):

            def closure(step: int = step) -> Tensor:
                optimizer.zero_grad()
                _, loss = model(*batch(step))
                loss.backward()
                norms.append(exact(p.grad for p in model.parameters()))
                return loss

            w.step(optimizer.step(closure))
    rows = lines(tmp_path, "step")
    assert [row["grad_norm_post"] for row in rows] == pytest.approx(norms, rel=1e-5)
    assert rows[0]["update"] is None  # nobody knew the sub-layers before the first step
    assert all(row["update"]["ratio"] > 0 for row in rows[1:])


# -- Hugging Face ----------------------------------------------------------------------------------
def hf_model() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": V, "n_positions": T}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def hf_data(rows: int = 64) -> list[dict[str, Tensor]]:
    ids = torch.randint(V, (rows, T), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def hf_train(
    folder: Path, callbacks: list[Any], resume: str | None = None, steps: int = 14, **more: Any
) -> Any:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Norms(TrainerCallback):
        """Norms of the gradients as the optimiser gets them, and losses as the model gives them."""

        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seen.append(exact(p.grad for p in kwargs["model"].parameters()))

    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        max_steps=steps,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        seed=3,
        save_steps=8 if steps < 20 else steps,
        disable_tqdm=True,
        **more,
    )
    norms = Norms()
    trainer = Trainer(hf_model(), args, train_dataset=hf_data(), callbacks=[*callbacks, norms])
    trainer.train(resume_from_checkpoint=resume)
    logged = {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}
    return trainer, state_of(trainer.model, trainer.optimizer), norms.seen, logged


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.long)])
def test_hugging_face_trainer_is_bitwise_identical_under_the_watch(
    accumulate: int, tmp_path: Path
) -> None:
    from jacdiag.monitor.integrations.huggingface import WatchCallback

    more = {"gradient_accumulation_steps": accumulate, "steps": 200 if accumulate == 2 else 14}
    plain = hf_train(tmp_path / "plain", [], **more)
    callback = WatchCallback(log_dir=tmp_path / "log", **OPTIONS | {"every": more["steps"] // 2})
    watched = hf_train(tmp_path / "watched", [callback], **more)
    assert_same_state(plain[1], watched[1])
    assert plain[3] == watched[3]
    rows = lines(tmp_path / "log", "step")
    assert [row["step"] for row in rows] == list(range(1, more["steps"] + 1))
    assert [row["grad_norm_post"] for row in rows] == pytest.approx(watched[2], rel=1e-5)
    logged = [row for row in watched[0].state.log_history if "grad_norm" in row]
    assert [row["grad_norm"] for row in rows] == pytest.approx(
        [row["grad_norm"] for row in logged], rel=1e-5
    )
    assert all(row["clipped"] for row in rows) == all(row["grad_norm"] > 1.01 for row in logged)
    for row in rows:
        assert row["loss"] == pytest.approx(watched[3][row["step"]], rel=1e-3)
    assert len(lines(tmp_path / "log", "probe")) == 3 and not lines(tmp_path / "log", "fault")
    assert not watched[0].model._forward_hooks and not watched[0].model._forward_pre_hooks


def test_hugging_face_learning_rates_are_those_of_the_step(tmp_path: Path) -> None:
    """The Trainer's scheduler steps before its callbacks are told of the step."""
    from transformers import TrainerCallback

    from jacdiag.monitor.integrations.huggingface import WatchCallback

    class Rates(TrainerCallback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seen.append(kwargs["optimizer"].param_groups[0]["lr"])

    rates = Rates()
    hf_train(
        tmp_path / "a", [WatchCallback(log_dir=tmp_path / "log", **OPTIONS), rates], warmup_steps=6
    )
    rows = lines(tmp_path / "log", "step")
    assert [row["lr"] for row in rows] == pytest.approx(rates.seen, rel=1e-6) and len(
        set(rates.seen)
    ) > 8
    assert all(len(row["lrs"]) == 2 for row in rows)  # with weight decay and without


def test_hugging_face_resume_appends_to_the_log_without_gaps(tmp_path: Path) -> None:
    from jacdiag.monitor.integrations.huggingface import WatchCallback
    from jacdiag.records.run_log import read_run

    hf_train(tmp_path / "a", [WatchCallback(log_dir=tmp_path / "log", **OPTIONS)])
    checkpoint = tmp_path / "a" / "checkpoint-8"
    assert (checkpoint / "jacdiag.pt").is_file()
    hf_train(
        tmp_path / "a", [WatchCallback(log_dir=tmp_path / "log", **OPTIONS)], resume=str(checkpoint)
    )
    run = read_run(tmp_path / "log")
    assert run.resumes == [8] and [row["step"] for row in run.steps] == list(range(1, 15))


# -- accelerate ------------------------------------------------------------------------------------
def accelerated(folder: Path | None, steps: int = STEPS) -> tuple[dict[str, Any], list[float]]:
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    torch.manual_seed(1)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = small()
    data = DataLoader([batch(k, 1)[0][0] for k in range(4 * steps)], batch_size=2)
    model, optimizer, data = accelerator.prepare(model, adam(model), data)
    options = OPTIONS | {
        "every": PROBE_EVERY,
        "stats_every": STATS_EVERY,
        "log_dir": folder,
    }
    w = jacdiag.watch(model, optimizer, **options) if folder is not None else None
    norms = []
    for ids in data:
        with accelerator.accumulate(model):
            _, loss = model(ids[:, :-1], ids[:, 1:])
            accelerator.backward(loss)
            norm = None
            if accelerator.sync_gradients:
                norms.append(exact(p.grad for p in model.parameters()))
                norm = accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        if w is not None and accelerator.sync_gradients:
            w.step(loss, grad_norm=norm)
    if w is not None:
        w.close()
    return state_of(model, optimizer.optimizer), norms


def test_accelerate_loop_is_bitwise_identical_under_the_watch(tmp_path: Path) -> None:
    plain, watched = accelerated(None), accelerated(tmp_path)
    assert_same_state(plain[0], watched[0])
    rows = lines(tmp_path, "step")
    assert len(rows) == STEPS and [row["grad_norm"] for row in rows] == pytest.approx(
        watched[1], rel=1e-5
    )
    for row in rows:
        assert row["grad_norm_post"] == pytest.approx(min(row["grad_norm"], 0.5), rel=1e-4)


# -- Lightning -------------------------------------------------------------------------------------
def lightning_run(
    folder: Path,
    callbacks: list[Any],
    clip: float | None,
    accumulate: int = 1,
    resume: Path | None = None,
    steps: int = 12,
) -> tuple[dict[str, Any], list[float], list[float], Any]:
    from lightning.pytorch import LightningModule, Trainer, seed_everything
    from torch.utils.data import DataLoader

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = small()
            self.norms: list[float] = []
            self.losses: list[float] = []

        def training_step(self, ids: Tensor, index: int) -> Tensor:
            _, loss = self.model(ids[:, :-1], ids[:, 1:])
            self.losses.append(float(loss.detach()))
            return loss

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.norms.append(exact(p.grad for p in self.parameters()))

        def configure_optimizers(self) -> Any:
            return adam(self)

    seed_everything(4, verbose=False)
    module = Module()
    data = DataLoader(
        [torch.cat([batch(k, 1)[0][0], batch(k, 1)[1][0][-1:]]) for k in range(200)], batch_size=4
    )
    trainer = Trainer(
        max_steps=steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        devices=1,
        gradient_clip_val=clip,
        accumulate_grad_batches=accumulate,
        default_root_dir=folder,
    )
    trainer.fit(module, data, ckpt_path=str(resume) if resume else None)
    return state_of(module, trainer.optimizers[0]), module.norms, module.losses, trainer


@needs_lightning
@pytest.mark.parametrize(
    ("clip", "accumulate", "steps"),
    [(None, 1, 12), (0.5, 1, 12), pytest.param(0.5, 2, 200, marks=pytest.mark.long)],
)
def test_lightning_trainer_is_bitwise_identical_under_the_watch(
    clip: float | None, accumulate: int, steps: int, tmp_path: Path
) -> None:
    from jacdiag.monitor.integrations.lightning import WatchCallback

    plain = lightning_run(tmp_path, [], clip, accumulate, steps=steps)
    callback = WatchCallback("model", log_dir=tmp_path / "log", **OPTIONS | {"every": steps // 2})
    watched = lightning_run(tmp_path, [callback], clip, accumulate, steps=steps)
    assert_same_state(plain[0], watched[0])
    assert plain[2] == watched[2]
    rows = lines(tmp_path / "log", "step")
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    means = [
        math.fsum(watched[2][k : k + accumulate]) / accumulate
        for k in range(0, len(watched[2]), accumulate)
    ]
    assert [row["loss"] for row in rows] == pytest.approx(means, rel=1e-5)
    if clip:
        assert [row["grad_norm"] for row in rows] == pytest.approx(watched[1], rel=1e-5)
        for row in rows:
            assert row["grad_norm_post"] == pytest.approx(min(row["grad_norm"], clip), rel=1e-4)
    else:
        assert [row["grad_norm_post"] for row in rows] == pytest.approx(watched[1], rel=1e-5)
    probes = lines(tmp_path / "log", "probe")
    assert [row["step"] for row in probes] == [0, steps // 2, steps] and not lines(
        tmp_path / "log", "fault"
    )
    assert probes[0]["report"]["state"] == "init"  # before the first update


@needs_lightning
def test_lightning_resume_appends_to_the_log_without_gaps(tmp_path: Path) -> None:
    from lightning.pytorch import Callback

    from jacdiag.monitor.integrations.lightning import WatchCallback
    from jacdiag.records.run_log import read_run

    class Save(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 6:
                trainer.save_checkpoint(tmp_path / "at.ckpt", weights_only=False)

    options = {"log_dir": tmp_path / "log", **OPTIONS}
    lightning_run(tmp_path, [WatchCallback("model", **options), Save()], None, steps=9)
    lightning_run(tmp_path, [WatchCallback("model", **options)], None, resume=tmp_path / "at.ckpt")
    run = read_run(tmp_path / "log")
    assert run.resumes == [6] and [row["step"] for row in run.steps] == list(range(1, 13))


@needs_lightning
def test_lightning_learning_rates_and_updates_of_two_optimizers(tmp_path: Path) -> None:
    """By hand in a loop of the module's own, in which the scheduler steps before the callback is
    told of the step.
    """
    from lightning.pytorch import LightningModule, Trainer
    from torch.utils.data import DataLoader

    from jacdiag.monitor.integrations.lightning import WatchCallback

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.model = small(dropout=0.0)
            self.rates: list[list[float]] = []
            self.moved: list[float] = []

        def training_step(self, ids: Tensor, index: int) -> Tensor:
            _, loss = self.model(ids[:, :-1], ids[:, 1:])
            self.manual_backward(loss)
            self.rates.append([o.param_groups[0]["lr"] for o in self.optimizers()])
            before = [p.detach().clone() for p in self.model.parameters()]
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()
            self.moved.append(
                exact(p - q for p, q in zip(self.model.parameters(), before, strict=True))
            )
            self.lr_schedulers().step()
            return loss.detach()

        def configure_optimizers(self) -> Any:
            matrices = [p for p in self.parameters() if p.dim() == 2]
            others = [p for p in self.parameters() if p.dim() != 2]
            first, second = torch.optim.SGD(matrices, lr=0.3), torch.optim.AdamW(others, lr=1e-3)
            return [first, second], [torch.optim.lr_scheduler.LinearLR(first, 0.01, 1.0, 10)]

    module = Module()
    data = DataLoader(
        [torch.cat([batch(k, 1)[0][0], batch(k, 1)[1][0][-1:]]) for k in range(48)], batch_size=4
    )
    trainer = Trainer(
        max_epochs=1,
        callbacks=[WatchCallback("model", log_dir=tmp_path / "log", **OPTIONS)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        devices=1,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, data)
    rows = lines(tmp_path / "log", "step")
    assert [row["lrs"] for row in rows] == [
        pytest.approx(rates, rel=1e-6) for rates in module.rates
    ]
    assert [row["step"] for row in rows] == list(range(2, 25, 2)), (
        "Lightning counts the steps of both optimizers"
    )
    assert all(
        0 < row["update"]["norm"] < moved for row, moved in zip(rows, module.moved, strict=True)
    )
    assert len({row["update"]["where"] for row in rows}) >= 5


@needs_lightning
def test_lightning_fsdp1_is_refused_by_name() -> None:
    from types import SimpleNamespace

    from lightning.pytorch.strategies import FSDPStrategy

    from jacdiag.errors import UsageError
    from jacdiag.monitor.integrations.lightning import WatchCallback

    trainer: Any = SimpleNamespace(strategy=FSDPStrategy.__new__(FSDPStrategy))
    with pytest.raises(UsageError, match="FSDPStrategy"):
        WatchCallback().on_train_start(trainer, small())  # type: ignore[arg-type]
