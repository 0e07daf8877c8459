"""The watch in a training on an accelerator: the same bits, the same rows, no mixed operation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from monitor.rig import adam, batch, lines, small
from monitor.test_integrations import hf_data, hf_model
from torch import Tensor

import jacdiag
from accelerator.pretended import NAME, Counts, pretended_device
from accelerator.training import train
from jacdiag.monitor.integrations import huggingface, lightning

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "foreach": {"optimizer": partial(adam, foreach=True)},
    "fused": {"optimizer": partial(adam, fused=True)},
    "sgd": {"optimizer": lambda model: torch.optim.SGD(model.parameters(), lr=0.1)},
    "accumulated": {"micro": 2},
    "autocast": {"autocast": True},
    "scaler": {"scaler": True},
}
QUIET: dict[str, Any] = {"every": None, "stats_every": None, "log_every": 5}
# What a row has on one kind of device only: clocks, and whether the weights were compared.
OTHERWISE = {"time", "weights_seen", "seconds", "step_seconds"}
LONG = ("foreach", "fused", "sgd")


@pytest.fixture
def counts() -> Iterator[Counts]:
    with pretended_device(devices=2) as counts:
        yield counts
        assert counts.mixed == 0 and counts.races == 0


def rows_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    rows = lines(folder, kind)
    return [{key: x for key, x in row.items() if key not in OTHERWISE} for row in rows]


@pytest.mark.parametrize(
    "how", [pytest.param(h, marks=pytest.mark.long) if h in LONG else h for h in OPTIMIZERS]
)
def test_training_and_rows_are_those_of_the_cpu(counts: Counts, how: str, tmp_path: Path) -> None:
    options = OPTIMIZERS[how]
    plain = train(NAME, None, **options)
    watched = train(NAME, tmp_path / "device", **options, watch=QUIET)
    on_cpu = train("cpu", tmp_path / "cpu", **options, watch=QUIET)
    assert all(map(torch.equal, plain, watched)) and all(map(torch.equal, watched, on_cpu))
    rows = rows_of(tmp_path / "device", "step")
    assert rows == rows_of(tmp_path / "cpu", "step") and len(rows) == 12
    assert not lines(tmp_path / "device", "fault")


def test_probes_and_statistics_are_those_of_the_cpu(counts: Counts, tmp_path: Path) -> None:
    options: dict[str, Any] = {"every": 6, "stats_every": 3, "log_every": 3}
    plain = train(f"{NAME}:1", None)
    watched = train(f"{NAME}:1", tmp_path / "device", watch=options)
    on_cpu = train("cpu", tmp_path / "cpu", watch=options)
    assert all(map(torch.equal, plain, watched)) and all(map(torch.equal, watched, on_cpu))
    assert rows_of(tmp_path / "device", "stats") == rows_of(tmp_path / "cpu", "stats")
    for on_device, other in zip(
        lines(tmp_path / "device", "probe"), lines(tmp_path / "cpu", "probe"), strict=True
    ):
        assert on_device["report"]["sublayers"] == other["report"]["sublayers"]


# -- trainers of other libraries -------------------------------------------------------------------
def test_the_trainer_of_hugging_face_trains_the_same_on_the_device(
    counts: Counts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    accelerate = pytest.importorskip("accelerate")

    def fit(device: str, *callbacks: Any) -> list[Tensor]:
        settings = {"max_steps": 6, "per_device_train_batch_size": 4, "report_to": [], "seed": 3}
        quiet = {"save_strategy": "no", "disable_tqdm": True, "logging_steps": 2}
        args = transformers.TrainingArguments(
            str(tmp_path), **settings, **quiet, use_cpu=True, gradient_accumulation_steps=2
        )
        # It knows its devices by name: this one is put in the place of the CPU.
        args.device  # noqa: B018
        monkeypatch.setitem(args.__dict__, "_setup_devices", torch.device(device))
        state = accelerate.PartialState._shared_state
        monkeypatch.setitem(state, "device", torch.device(device))
        model = hf_model()
        trainer = transformers.Trainer(
            model, args, train_dataset=hf_data(), callbacks=list(callbacks)
        )
        trainer.train()
        assert {p.device.type for p in model.parameters()} == {torch.device(device).type}
        return [p.detach().cpu() for p in model.parameters()]

    def watched(device: str) -> list[Tensor]:
        folder = tmp_path / torch.device(device).type
        options: dict[str, Any] = {"every": None, "stats_every": None, "log_every": 3}
        return fit(
            device, huggingface.WatchCallback(log_dir=folder, quiet=True, strict=True, **options)
        )

    on_device = watched(f"{NAME}:0")
    assert all(map(torch.equal, fit(f"{NAME}:0"), on_device))
    rows = lines(tmp_path / NAME, "step")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row["grad_norm_post"] > 0 for row in rows)
    assert not lines(tmp_path / NAME, "fault")


def test_lightning_trains_the_same_on_the_device(counts: Counts, tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.accelerators import CPUAccelerator
    from lightning.pytorch.strategies import SingleDeviceStrategy
    from torch.utils.data import DataLoader

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = small(n_layer=1, dropout=0.0)

        def training_step(self, ids: Tensor, index: int) -> Tensor:
            loss: Tensor = self.net(ids[:, :-1], ids[:, 1:])[1]
            return loss

        def configure_optimizers(self) -> Any:
            return adam(self)

    class Accelerator(CPUAccelerator):
        def setup_device(self, device: torch.device) -> None:
            assert device.type == NAME

    def fit(device: str | None, *callbacks: Any) -> list[Tensor]:
        torch.manual_seed(0)
        module = Module()
        rows = [torch.cat([batch(k, 1)[0][0], batch(k, 1)[1][0][-1:]]) for k in range(24)]
        strategy: Any = "auto"
        if device is not None:
            strategy = SingleDeviceStrategy(torch.device(device), accelerator=Accelerator())
        trainer = Trainer(
            max_steps=6,
            accelerator="cpu" if device is None else "auto",
            devices="auto" if device else 1,
            strategy=strategy,
            default_root_dir=tmp_path,
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(rows, batch_size=4))
        return [p.detach().cpu() for p in module.parameters()]

    options: dict[str, Any] = {"log_dir": tmp_path / "log", "quiet": True, "strict": True}
    watched = fit(f"{NAME}:1", lightning.WatchCallback(**options, every=3, stats_every=3))
    assert all(map(torch.equal, fit(f"{NAME}:1"), watched))
    assert all(map(torch.equal, fit(None), watched))
    assert [row["step"] for row in lines(tmp_path / "log", "step")] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in lines(tmp_path / "log", "probe")] == [0, 3, 6]
    assert not lines(tmp_path / "log", "fault")


# -- the flight recorder ---------------------------------------------------------------------------
def test_a_flight_of_the_device_is_replayed_on_either_device(
    counts: Counts, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = small(n_layer=1, dropout=0.0).to(NAME)
    optimizer = adam(model, lr=1e-3)
    with jacdiag.watch(
        model, optimizer, log_dir=tmp_path, keep_batches=12, quiet=True, strict=True, **QUIET
    ) as watch:
        for step in range(1, 40):
            ids, targets = (x.to(NAME) for x in batch(step % 4))
            if step == 36:
                ids, targets = targets.flip(1), ids.flip(0)
            _, loss = model(ids, targets)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            watch.step(loss, grad_norm=norm)
        watch.flush()
        watch.record.dump(36, "a flight of the test")
    (flight,) = tmp_path.glob("flight-36")

    def replayed(device: str) -> jacdiag.Report:
        sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 32, "block_size": 8}
        saved = {"model": model.state_dict(), "model_args": {**sizes, "embed_scale": 4.0}}
        torch.save({**saved, "step": 39}, tmp_path / "39.pt")
        return jacdiag.audit(str(tmp_path / "39.pt"), replay=flight, products=False, device=device)

    on_device, on_cpu = replayed(f"{NAME}:1").replay, replayed("cpu").replay
    assert on_device is not None and on_cpu is not None and on_device.batches
    assert replace(on_device, seconds=0.0) == replace(on_cpu, seconds=0.0)
