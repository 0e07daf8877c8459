"""Trainers that have a loop of their own: Hugging Face, TRL, PEFT, Lightning, Fabric, Accelerate,
DDP and FSDP2.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import jacdiag
from _trainers.checks import SAVED, CrashError, Plan, Result, Trainer, folder
from _trainers.loops import CLIP, Loop, adamw, one
from _trainers.model import HEADS, LAYERS, LENGTH, VOCABULARY, WIDTH, ByHand, Model, rows_of

BATCH = 8


# -- Hugging Face, TRL, PEFT -----------------------------------------------------------------------
class Rows(torch.utils.data.Dataset[Any]):
    """The rows of all steps, in the order of the steps."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __len__(self) -> int:
        return BATCH * self.plan.steps

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        step = index // BATCH + 1
        row = rows_of(step, BATCH, broken=self.plan.is_broken(step))[index % BATCH, :-1]
        return {"input_ids": row, "labels": row}


def gpt2() -> Any:
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
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropout, bos_token_id=0, eos_token_id=0))


def gpt2_parts(where: str, names: list[str]) -> list[str]:
    """Parameters of a sub-layer and of the norm before it, adapters included."""
    block, _, kind = where.rpartition(".")
    norm = {"attn": "ln_1", "mlp": "ln_2"}.get(kind, "")
    return [n for n in names if n.startswith((where + ".", f"{block}.{norm}."))] if norm else []


def train_hugging_face(plan: Plan, model: nn.Module, make: Any, weight: str) -> Result:
    """Run one of the Trainers; `make` gets the arguments and the callbacks."""
    with folder() as scratch:
        output = plan.checkpoint if plan.save_at or plan.resume else scratch
        return train_into(output, plan, model, make, weight)


def train_into(output: Path, plan: Plan, model: nn.Module, make: Any, weight: str) -> Result:
    """Run it with a folder for what it writes."""
    from transformers import TrainerCallback

    from jacdiag.monitor.integrations.huggingface import WatchCallback

    result = Result(by_hand=ByHand(model))

    class Hand(TrainerCallback):
        """The figures of each step, the faults, and the exception."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            plan.put_nan(model.get_parameter(weight), state.global_step + 1)

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert result.by_hand is not None
            result.by_hand.note_used()
            result.by_hand.begin_step(kwargs["optimizer"].param_groups[0]["lr"])

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert result.by_hand is not None
            result.by_hand.end_step()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            plan.after_step(state.global_step)

    callbacks: list[Any] = [Hand()]
    if plan.log_dir is not None:
        options = {key: value for key, value in plan.options.items() if key != "resume"}
        callbacks.insert(0, WatchCallback(**options))
    settings = {
        "output_dir": str(output),
        "per_device_train_batch_size": BATCH,
        "max_steps": plan.steps,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": CLIP,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "steps" if plan.save_at else "no",
        "save_steps": plan.save_at or 500,
        "save_only_model": False,
        "logging_nan_inf_filter": False,
    }
    trainer = make(settings, callbacks)
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(
        trainer.train_dataset
    )
    trainer.train(
        resume_from_checkpoint=str(output / f"checkpoint-{SAVED}") if plan.resume else None
    )
    logged = [row for row in trainer.state.log_history if "loss" in row]
    result.losses = [row["loss"] for row in logged]
    assert result.by_hand is not None
    result.by_hand.before_clipping = [row["grad_norm"] for row in logged]  # the Trainer's own
    result.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return result


def hugging_face(plan: Plan) -> Result:
    from transformers import Trainer as HuggingFaceTrainer
    from transformers import TrainingArguments

    model = gpt2()

    def make(settings: dict[str, Any], callbacks: list[Any]) -> Any:
        return HuggingFaceTrainer(
            model, TrainingArguments(**settings), train_dataset=Rows(plan), callbacks=callbacks
        )

    return train_hugging_face(plan, model, make, "transformer.h.1.mlp.c_fc.weight")


def adapted() -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True
    )
    return get_peft_model(gpt2(), config)


def peft_lora(plan: Plan) -> Result:
    from transformers import Trainer as HuggingFaceTrainer
    from transformers import TrainingArguments

    model = adapted()

    def make(settings: dict[str, Any], callbacks: list[Any]) -> Any:
        return HuggingFaceTrainer(
            model, TrainingArguments(**settings), train_dataset=Rows(plan), callbacks=callbacks
        )

    return train_hugging_face(
        plan, model, make, "base_model.model.transformer.h.1.mlp.c_fc.lora_A.default.weight"
    )


def trl_sft(plan: Plan) -> Result:
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    vocabulary = {f"t{number}": number for number in range(VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    special = {"eos_token": "t0", "pad_token": "t0", "unk_token": "t0"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    rows = Rows(plan)
    data = Dataset.from_list(
        [{"input_ids": rows[index]["input_ids"].tolist()} for index in range(len(rows))]
    )
    model = gpt2()

    def make(settings: dict[str, Any], callbacks: list[Any]) -> Any:
        args = SFTConfig(**settings, max_length=LENGTH, bf16=False, shuffle_dataset=False)
        return SFTTrainer(
            model, args, train_dataset=data, processing_class=tokenizer, callbacks=callbacks
        )

    return train_hugging_face(plan, model, make, "transformer.h.1.mlp.c_fc.weight")


# -- Lightning -------------------------------------------------------------------------------------
def lightning_trainer(plan: Plan) -> Result:
    from lightning.pytorch import Callback, LightningModule
    from lightning.pytorch import Trainer as LightningTrainer

    from jacdiag.monitor.integrations.lightning import WatchCallback

    torch.manual_seed(0)
    model = Model()
    hand = ByHand(model)
    result = Result(by_hand=hand)

    class Module(LightningModule):
        """Has no forward of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def training_step(self, ids: Tensor, index: int) -> Tensor:
            plan.put_nan(model.get_parameter("blocks.1.mlp.up.weight"), self.global_step + 1)
            loss: Tensor = self.net(ids[:, :-1], ids[:, 1:])
            result.losses.append(float(loss.detach()))
            return loss

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            hand.note_before_clipping()

        def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
            self.clip_gradients(optimizer, gradient_clip_val=CLIP, gradient_clip_algorithm="norm")
            hand.note_used()
            hand.begin_step(optimizer.param_groups[0]["lr"])

        def configure_optimizers(self) -> Any:
            return adamw(self.parameters())

    class Ends(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            plan.after_step(trainer.global_step)
            if plan.save_at and trainer.global_step == plan.save_at:
                trainer.save_checkpoint(plan.checkpoint)

    class Moves(Callback):
        """Before the watch, whose work is no part of the step."""

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            hand.end_step()

    callbacks: list[Any] = [Moves()]
    if plan.log_dir is not None:
        options = {key: value for key, value in plan.options.items() if key != "resume"}
        callbacks.append(WatchCallback(**options))
    data = [rows_of(step, BATCH, broken=plan.is_broken(step)) for step in range(1, plan.steps + 1)]
    trainer = LightningTrainer(
        max_steps=plan.steps,
        callbacks=[*callbacks, Ends()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        devices=1,
        default_root_dir=str(plan.checkpoint.parent),
    )
    loader = torch.utils.data.DataLoader(data, batch_size=None)
    trainer.fit(
        Module(),
        loader,
        ckpt_path=str(plan.checkpoint) if plan.resume else None,
        weights_only=False,
    )
    result.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return result


# -- Fabric and Accelerate -------------------------------------------------------------------------
def fabric(plan: Plan) -> Result:
    from lightning.fabric import Fabric

    torch.manual_seed(0)
    api = Fabric(accelerator="cpu", devices=1)
    model = Model()
    wrapped, optimizer = api.setup(model, adamw(model.parameters()))

    def backward(loss: Tensor) -> None:
        api.backward(loss)

    def clip() -> Any:
        return api.clip_gradients(wrapped, optimizer, max_norm=CLIP, error_if_nonfinite=False)

    return wrapped_loop(plan, model, wrapped, optimizer, backward, clip)


def accelerate(plan: Plan) -> Result:
    from accelerate import Accelerator

    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model = Model()
    wrapped, optimizer = accelerator.prepare(model, adamw(model.parameters()))

    def clip() -> Any:
        return accelerator.clip_grad_norm_(wrapped.parameters(), CLIP)

    return wrapped_loop(plan, model, wrapped, optimizer, accelerator.backward, clip)


def wrapped_loop(
    plan: Plan, model: Model, wrapped: Any, optimizer: Any, backward: Any, clip: Any
) -> Result:
    """A loop around a model and an optimizer that a library has wrapped."""
    hand = ByHand(model)
    result = Result(by_hand=hand)
    saved: dict[str, Any] = torch.load(plan.checkpoint, weights_only=False) if plan.resume else {}
    if saved:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    watch = jacdiag.watch(wrapped, optimizer, **plan.options) if plan.log_dir is not None else None
    if saved and watch is not None:
        watch.load_state_dict(saved["watch"])
    try:
        for step in range(saved.get("step", 0) + 1, plan.steps + 1):
            plan.put_nan(model.get_parameter("blocks.1.mlp.up.weight"), step)
            ids = rows_of(step, BATCH, broken=plan.is_broken(step))
            loss = wrapped(ids[:, :-1], ids[:, 1:])
            backward(loss)
            hand.note_before_clipping()
            norm = clip()
            hand.note_used()
            hand.begin_step(optimizer.param_groups[0]["lr"])
            optimizer.step()
            hand.end_step()
            optimizer.zero_grad()
            result.losses.append(float(loss.detach()))
            if watch is not None:
                watch.step(loss, grad_norm=norm)
            plan.after_step(step)
            if step == plan.save_at and watch is not None:
                states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save({**states, "step": step, "watch": watch.state_dict()}, plan.checkpoint)
    except CrashError as error:
        if watch is not None:
            watch.__exit__(type(error), error, error.__traceback__)
        raise
    if watch is not None:
        watch.close()
    result.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return result


# -- several processes -----------------------------------------------------------------------------
def data_parallel(model: nn.Module) -> Any:
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


def no_sync(wrapped: Any, last: bool) -> Any:
    from contextlib import nullcontext

    return nullcontext() if last else wrapped.no_sync()


def sharded(model: nn.Module) -> Any:
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block)
    return fully_shard(model)


class Ranks:
    """A loop on two processes, each with its share of the rows; what is compared is that of the
    first.

    Args:
        kind: name of the loop in `RANK_LOOPS`.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, plan: Plan) -> Result:
        import tempfile

        with socket.socket() as free, tempfile.TemporaryDirectory() as place:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
            free.close()
            out = Path(place) / "result.pt"
            torch.multiprocessing.spawn(run_rank, (self.kind, plan, port, out), nprocs=2)
            saved = torch.load(out, weights_only=False)
        if saved["crashed"]:
            raise CrashError
        result: Result = saved["result"]
        return result


def run_rank(rank: int, kind: str, plan: Plan, port: int, out: Path) -> None:
    """One of the two processes."""
    import torch.distributed as dist

    from _trainers.checks import messages

    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": "2",
    }
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo")
    crashed, result = False, Result()
    with messages() as said:
        try:
            result = RANK_LOOPS[kind](plan)
        except CrashError:
            crashed = True
    result.said = said
    whole = {
        name: t.full_tensor() if hasattr(t, "full_tensor") else t
        for name, t in result.weights.items()
    }
    everybody: list[Any] = [None, None]
    dist.all_gather_object(everybody, said)
    if rank == 0:
        hand = result.by_hand
        if hand is not None:
            hand.model = Model()  # names are all that is asked for
        result.weights, result.said = whole, [text for texts in everybody for text in texts]
        torch.save({"result": result, "crashed": crashed}, out)
    dist.barrier()
    dist.destroy_process_group()


RANK_LOOPS = {
    "ddp": Loop(optimizers=one(adamw), wrap=data_parallel, accumulate=2, sync=no_sync),
    "fsdp2": Loop(optimizers=one(adamw), wrap=sharded, wraps_first=True),
}

LIBRARIES = [
    Trainer(
        name="Hugging Face Trainer", library="transformers", run=hugging_face, parts=gpt2_parts
    ),
    Trainer(name="PEFT LoRA", library="peft", run=peft_lora, parts=gpt2_parts),
    Trainer(name="TRL SFT", library="trl", run=trl_sft, parts=gpt2_parts),
    Trainer(name="Lightning", library="lightning", run=lightning_trainer),
    Trainer(name="Fabric", library="lightning", run=fabric),
    Trainer(name="Accelerate", library="accelerate", run=accelerate),
    Trainer(name="DDP, no_sync, find_unused", library="torch", run=Ranks("ddp")),
    Trainer(name="FSDP2", library="torch", run=Ranks("fsdp2")),
]
