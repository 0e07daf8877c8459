"""Under the Trainers of Hugging Face, TRL and PEFT: their own figures, a flight after an exception,
nothing false.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from monitor.rig import T, V, lines
from monitor.test_integrations import OPTIONS, hf_data, hf_model
from torch import Tensor, nn

from jacdiag.monitor.integrations.huggingface import CoveredMethod, WatchCallback, find_trainer

transformers = pytest.importorskip("transformers")
needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="peft is not installed"
)
needs_trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="trl is not installed"
)
pytestmark = pytest.mark.usefixtures("deterministic")

# For what is logged at each step: no probe of the Jacobians, which takes most of the time.
WITHOUT_PROBES = {**OPTIONS, "every": None, "stats_every": None}

SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "seed": 3,
    "save_strategy": "no",
    "disable_tqdm": True,
}


def arguments(folder: Path, **more: Any) -> Any:
    return transformers.TrainingArguments(str(folder), **{"max_steps": 7, **SETTINGS, **more})


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_as_logged(folder: Path, trainer: Any, tolerance: float = 1e-4) -> None:
    """The figures of the watch are the Trainer's own."""
    rows = {row["step"]: row for row in lines(folder, "step")}
    logged = [row for row in trainer.state.log_history if "grad_norm" in row]
    assert len(rows) == len(logged)
    for own in logged:
        row = rows[own["step"]]
        assert row["grad_norm"] == pytest.approx(own["grad_norm"], rel=tolerance)
        assert row["loss"] == pytest.approx(own["loss"], rel=1e-3, abs=1e-4)
    assert not lines(folder, "fault")


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        r.getMessage()
        for r in caplog.records
        if r.name == "jacdiag.watch" and r.levelno >= logging.WARNING
    ]


@pytest.mark.parametrize("clip", [0.0, 0.3, 1e6])
def test_the_norm_before_clipping_is_the_trainers_own(
    clip: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without clipping, with clipping at each step, and with a bound that is never reached."""
    callback = WatchCallback(log_dir=tmp_path / "log", **WITHOUT_PROBES)
    args = arguments(tmp_path, max_grad_norm=clip, gradient_accumulation_steps=2, max_steps=6)
    trainer = transformers.Trainer(hf_model(), args, train_dataset=hf_data(), callbacks=[callback])
    trainer.train()
    assert_as_logged(tmp_path / "log", trainer)
    rows = lines(tmp_path / "log", "step")
    for row in rows:
        bound = min(clip, row["grad_norm"]) if clip else row["grad_norm"]
        assert row["grad_norm_post"] == pytest.approx(bound, rel=1e-3)
        assert row["clipped"] is (row["grad_norm"] > 1.01 * row["grad_norm_post"])
    assert not [text for text in messages(caplog) if "JD" not in text]
    assert all(not isinstance(value, CoveredMethod) for value in vars(trainer).values())
    assert not isinstance(vars(trainer.accelerator).get("clip_grad_norm_"), CoveredMethod)


class Broken(Exception):
    pass


@pytest.mark.parametrize("where", ["forward", "data", "optimizer", "evaluation", "callback"])
def test_an_exception_leaves_a_flight(where: str, tmp_path: Path) -> None:
    """Wherever it is raised; what was covered is given back."""
    model = hf_model()
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=5)

    class Stop(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if where == "callback" and state.global_step == 5:
                raise Broken

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if where == "optimizer" and state.global_step == 5:

                def step(*_: Any, **__: Any) -> None:
                    raise Broken

                kwargs["optimizer"].optimizer.step = step

    class Data(torch.utils.data.Dataset[Any]):
        def __init__(self) -> None:
            self.rows, self.asked = hf_data(), 0

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, index: int) -> Any:
            self.asked += 1
            if where == "data" and self.asked == 4 * 6:
                raise Broken
            return self.rows[index]

    class Trainer(transformers.Trainer):  # type: ignore[misc,name-defined]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            if where == "forward" and self.state.global_step == 5:
                raise Broken
            return super().compute_loss(*args, **kwargs)

        def evaluate(self, *args: Any, **kwargs: Any) -> Any:
            if where == "evaluation":
                raise Broken
            return {}

    callback = WatchCallback(log_dir=tmp_path / "log", **WITHOUT_PROBES)
    trainer = Trainer(
        model, args, train_dataset=Data(), eval_dataset=hf_data(8), callbacks=[callback, Stop()]
    )
    with pytest.raises(Broken):
        trainer.train()
    (flight,) = (tmp_path / "log").glob("flight-*")
    step = int(flight.name.removeprefix("flight-"))
    assert step == (4 if where == "data" else 5)  # the Trainer's loader fetches one batch ahead
    about = json.loads((flight / "about.json").read_text())
    assert about["why"] == "Broken" and (flight / "batch.pt").is_file()
    assert lines(tmp_path / "log")[-1]["type"] == "end"
    assert callback.watch is not None and callback.watch.closed
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert all(not isinstance(value, CoveredMethod) for value in vars(trainer).values())


def test_training_that_ends_leaves_no_flight_and_may_begin_again(tmp_path: Path) -> None:
    callback = WatchCallback(log_dir=tmp_path / "log", **OPTIONS)
    trainer = transformers.Trainer(
        hf_model(), arguments(tmp_path), train_dataset=hf_data(), callbacks=[callback]
    )
    trainer.train()
    assert not list((tmp_path / "log").glob("flight-*"))
    trainer.train()  # begins at step 0 again: the log says so and holds no step twice
    from jacdiag.records.run_log import read_run

    run = read_run(tmp_path / "log")
    assert (
        run.resumes == [0]
        and [row["step"] for row in run.steps] == list(range(1, 8))
        and not run.faults
    )


def test_a_compiled_model_has_its_loss_and_its_batches(tmp_path: Path) -> None:
    """The Trainer compiles the model after the callback's events have begun; its hooks are compiled
    along.
    """
    torch._dynamo.reset()
    args = arguments(tmp_path, torch_compile=True, torch_compile_backend="eager")
    callback = WatchCallback(log_dir=tmp_path / "log", **OPTIONS)
    trainer = transformers.Trainer(hf_model(), args, train_dataset=hf_data(), callbacks=[callback])
    trainer.train()
    assert_as_logged(tmp_path / "log", trainer)
    assert all(len(row["batches"]) == 1 for row in lines(tmp_path / "log", "step"))
    assert lines(tmp_path / "log", "probe")[0]["report"]["probe"]["tokens"] == "stream"


def test_without_a_trainer_the_loss_is_that_of_the_model(tmp_path: Path) -> None:
    """The events may be called by a loop of somebody's own."""
    from types import SimpleNamespace

    model = hf_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    callback = WatchCallback(log_dir=tmp_path / "log", **OPTIONS)
    args, state = SimpleNamespace(output_dir=str(tmp_path)), SimpleNamespace(global_step=0)
    assert find_trainer() is None
    callback.on_train_begin(args, state, None, model=model, optimizer=optimizer)
    losses = []
    for row in hf_data(5):
        loss = model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        state.global_step += 1
        callback.on_step_end(args, state, None)
    callback.on_train_end(args, state, None)
    rows = lines(tmp_path / "log", "step")
    assert [row["loss"] for row in rows] == pytest.approx(losses) and all(
        row["grad_norm"] is None for row in rows
    )
    assert not model._forward_hooks


def test_a_covered_method_goes_with_its_object() -> None:
    class Owner:
        def double(self, x: int) -> int:
            return 2 * x

    seen: list[int] = []
    owner = Owner()
    cover = CoveredMethod(owner, "double", returned=seen.append)
    assert owner.double(4) == 8 and seen == [8] and owner.double.__name__ == "double"
    later = CoveredMethod(owner, "double", returned=seen.append)  # somebody covers it once more
    cover.remove()
    assert owner.double(5) == 10 and seen == [8, 10]
    later.remove()
    assert owner.double(1) == 2 and seen == [8, 10]


# -- PEFT and TRL ----------------------------------------------------------------------------------
def lora(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, lora_dropout=0.1
    )
    adapted: nn.Module = get_peft_model(model, config)  # type: ignore[arg-type]
    return adapted


@needs_peft
def test_watched_lora_training_is_bitwise_identical(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runs = []
    for callbacks in ([], [WatchCallback(log_dir=tmp_path / "log", **OPTIONS)]):
        args = arguments(tmp_path, max_steps=12)
        trainer = transformers.Trainer(
            lora(hf_model()), args, train_dataset=hf_data(), callbacks=callbacks
        )
        trainer.train()
        runs.append(weights(trainer.model))
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())
    assert_as_logged(tmp_path / "log", trainer)
    probes = lines(tmp_path / "log", "probe")
    assert probes and all(len(row["report"]["sublayers"]) == 4 for row in probes)
    updates = [row["update"] for row in lines(tmp_path / "log", "step") if row["update"]]
    assert len({update["where"] for update in updates}) == 4
    # The frozen weights have no gradient: nothing is said of parameters that no optimizer holds.
    assert not [text for text in messages(caplog) if "JD" not in text]


def words() -> Any:
    from tokenizers import Tokenizer, models

    vocabulary = {f"t{number}": number for number in range(V)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="t0", pad_token="t1", unk_token="t0"
    )


@needs_trl
@pytest.mark.parametrize("adapted", [False, pytest.param(True, marks=needs_peft)])
def test_watched_trl_sft_training_is_bitwise_identical(
    adapted: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in hf_data()])
    runs = []
    for callbacks in ([], [WatchCallback(log_dir=tmp_path / "log", **OPTIONS)]):
        args = SFTConfig(str(tmp_path / "out"), max_steps=7, max_length=T, bf16=False, **SETTINGS)
        model = lora(hf_model()) if adapted else hf_model()
        trainer = SFTTrainer(
            model, args, train_dataset=data, processing_class=words(), callbacks=callbacks
        )
        trainer.train()
        runs.append(weights(trainer.model))
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())
    assert_as_logged(tmp_path / "log", trainer)
    assert all(len(row["report"]["sublayers"]) == 4 for row in lines(tmp_path / "log", "probe"))
    assert lines(tmp_path / "log", "probe")[0]["report"]["probe"]["tokens"] == "stream"
    assert not [text for text in messages(caplog) if "JD" not in text]
