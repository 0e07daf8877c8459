"""The runs that are forked: a plain loop, the Hugging Face Trainer, and Lightning."""

from __future__ import annotations

import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from detect import LENGTH, ROWS, VOCABULARY, Run, Training
from torch import Tensor

import jacdiag
from _faults.trials import LAYERS, LONGEST, PROBE, STATISTICS, Target, Trainscope, Trials

WIDTH, HEADS, STEPS = 48, 4, 10_000
CADENCE: dict[str, Any] = {
    "every": PROBE,
    "stats_every": STATISTICS,
    "log_every": 5,
    "quiet": True,
    "strict": True,
}
HAS_TRAINSCOPE = importlib.util.find_spec("trainscope") is not None


def result_of(trials: Trials, last: int, alerts: Iterable[Any]) -> dict[str, Any]:
    """What a run gave: its trials, and what was said of the healthy run itself."""
    result = {"steps": last, "false": [str(alert) for alert in alerts], "trials": trials.results}
    if trials.scope is not None:
        result["trainscope_false"] = trials.scope.alerts
    return result


def plain_loop(name: str, seed: int, data: Tensor, positions: frozenset[int]) -> dict[str, Any]:
    """A loop as nanoGPT's."""
    training = Training(Run(name, layers=LAYERS, width=WIDTH, seed=seed), STEPS, data)
    last = max(positions) + LONGEST

    def set_factor(factor: float) -> None:
        training.factor = factor

    scope = Trainscope(training.model, training.optimizer) if HAS_TRAINSCOPE else None
    watch = jacdiag.watch(training.model, training.optimizer, **CADENCE)
    trials = Trials(name, positions, Target(training.model, set_factor), lambda: watch, scope)
    for step in range(1, last + 1):
        ids = trials.begin_step(step, training.batch())
        training.before_update = (
            (lambda loss, at=step: scope.step(at, float(loss))) if scope is not None else None
        )
        loss, norm = training.step(step, ids)
        watch.step(loss, grad_norm=norm)
        trials.end_step(step, float(loss))
    watch.flush()
    alerts = watch.alerts
    watch.close()
    return result_of(trials, last, alerts)


class Rows(torch.utils.data.Dataset[Any]):
    """Sequences of the text at places that the index decides."""

    def __init__(self, data: Tensor, count: int, seed: int = 0) -> None:
        self.data = data
        generator = torch.Generator().manual_seed(seed)
        self.starts = torch.randint(len(data) - LENGTH - 1, (count,), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.data[self.starts[index] : self.starts[index] + LENGTH]
        return {"input_ids": row, "labels": row}


def gpt2() -> Any:
    """A GPT-2 of transformers, as small as that of the plain loop."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_embd": WIDTH,
        "vocab_size": VOCABULARY,
        "n_positions": LENGTH,
    }
    dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropout, bos_token_id=0, eos_token_id=0)).train()


def hugging_face(name: str, seed: int, data: Tensor, positions: frozenset[int]) -> dict[str, Any]:
    """The Trainer of transformers, with its scheduler and its clipping."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from jacdiag.monitor.integrations.huggingface import WatchCallback

    model, last = gpt2(), max(positions) + LONGEST
    watcher = WatchCallback(**CADENCE)

    def raise_rate(factor: float) -> None:
        scheduler = trainer.lr_scheduler
        scheduler.base_lrs = [factor * rate for rate in scheduler.base_lrs]
        for group in trainer.optimizer.param_groups:
            group["lr"] *= factor

    trials = Trials(name, positions, Target(model, raise_rate), lambda: watcher.watch)

    class Forked(Trainer):
        """Hands each batch to the trials before it is trained on."""

        loss = 0.0

        def training_step(
            self, model: Any, inputs: dict[str, Tensor], *rest: Any, **options: Any
        ) -> Tensor:
            ids = trials.begin_step(self.state.global_step + 1, inputs["input_ids"])
            loss: Tensor = super().training_step(
                model, {"input_ids": ids, "labels": ids}, *rest, **options
            )
            self.loss = float(loss)
            return loss

    class Ends(TrainerCallback):
        """Calls trainscope where it asks for it, and ends the steps of the trials."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if HAS_TRAINSCOPE:
                trials.scope = Trainscope(model, kwargs["optimizer"])

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if trials.scope is not None:
                trials.scope.step(state.global_step + 1, trainer.loss)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trials.end_step(state.global_step, trainer.loss)
            control.should_training_stop = state.global_step >= last

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=ROWS,
            max_steps=STEPS,
            learning_rate=1e-3,
            warmup_steps=100,
            lr_scheduler_type="cosine",
            max_grad_norm=1.0,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=seed,
            adam_beta2=0.95,
            dataloader_num_workers=0,
        )
        rows = Rows(data, ROWS * (last + 1), seed)
        trainer = Forked(model, settings, train_dataset=rows, callbacks=[watcher, Ends()])
        trainer.train()
    assert watcher.watch is not None
    return result_of(trials, last, watcher.watch.alerts)


def lightning(name: str, seed: int, data: Tensor, positions: frozenset[int]) -> dict[str, Any]:
    """Lightning with automatic optimisation, clipping by the Trainer, and a module without a
    forward of its own.
    """
    from lightning.pytorch import Callback, LightningModule, Trainer

    from jacdiag.monitor.integrations.lightning import WatchCallback

    training = Training(Run(name, layers=LAYERS, width=WIDTH, seed=seed), STEPS, data)
    model, last = training.model, max(positions) + LONGEST
    watcher = WatchCallback(**CADENCE)

    def set_factor(factor: float) -> None:
        training.factor = factor

    trials = Trials(name, positions, Target(model, set_factor), lambda: watcher.watch)

    class Module(LightningModule):
        """The model, its loss and its learning rate."""

        loss = 0.0

        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            step = self.global_step + 1
            ids = trials.begin_step(step, batch["input_ids"])
            for group in self.trainer.optimizers[0].param_groups:
                group["lr"] = training.rate(step)
            loss: Tensor = self.net(ids[:, :-1], ids[:, 1:])[1]
            self.loss = float(loss.detach())
            return loss

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if trials.scope is not None:
                trials.scope.step(self.global_step + 1, self.loss)

        def configure_optimizers(self) -> Any:
            if HAS_TRAINSCOPE:
                trials.scope = Trainscope(model, training.optimizer)
            return training.optimizer

    class Ends(Callback):
        """Ends the steps of the trials."""

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            trials.end_step(trainer.global_step, module.loss)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            max_steps=last,
            callbacks=[watcher, Ends()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
            devices=1,
            gradient_clip_val=1.0,
            default_root_dir=folder,
        )
        loader = torch.utils.data.DataLoader(Rows(data, ROWS * (last + 1), seed), batch_size=ROWS)
        trainer.fit(Module(), loader)
    assert watcher.watch is not None
    return result_of(trials, last, watcher.watch.alerts)
