"""Lightning: which part of a LightningModule is watched, its figures, and a flight after an
exception.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from monitor.rig import adam, assert_same_state, batch, lines, small, state_of
from monitor.test_step_metrics import exact
from torch import Tensor, nn

pytest.importorskip("lightning")

from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader

from jacdiag.monitor.integrations.lightning import WatchCallback, find_network, implements_forward

pytestmark = pytest.mark.usefixtures("deterministic")
OPTIONS: dict[str, Any] = {
    "every": 6,
    "stats_every": 3,
    "log_every": 4,
    "quiet": True,
    "strict": True,
}


class NoForward(LightningModule):
    """The network is called in the training step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small(dropout=0.0)
        self.norms: list[float] = []

    def loss_of(self, ids: Tensor) -> Tensor:
        loss: Tensor = self.net(ids[:, :-1], ids[:, 1:])[1]
        return loss

    def training_step(self, ids: Tensor, index: int) -> Tensor:
        return self.loss_of(ids)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.norms.append(exact(p.grad for p in self.parameters() if p.grad is not None))

    def configure_optimizers(self) -> Any:
        return adam(self)


class WithForward(NoForward):
    """It has a forward, for inference, that the training step does not use."""

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.net(ids)[0]
        return logits


class Nested(NoForward):
    """The network lies in a container that cannot be called."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleDict({"main": self.net})
        del self.net
        self.teacher = small(n_embd=64, dropout=0.0).requires_grad_(False)

    def loss_of(self, ids: Tensor) -> Tensor:
        loss: Tensor = self.nets["main"](ids[:, :-1], ids[:, 1:])[1]
        return loss

    def configure_optimizers(self) -> Any:
        return adam(self.nets)


class TwoParts(NoForward):
    """A second part is trained as well."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(1, 1)

    def loss_of(self, ids: Tensor) -> Tensor:
        return super().loss_of(ids) + 30 * self.scale(torch.ones(1)).square().sum()


class OwnClipping(NoForward):
    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.5)


def fit(folder: Path, module: LightningModule, callbacks: list[Any], **more: Any) -> Trainer:
    seed_everything(4, verbose=False)
    rows = [torch.cat([batch(k, 1)[0][0], batch(k, 1)[1][0][-1:]]) for k in range(48)]
    settings = {"max_steps": 12, "accelerator": "cpu", "devices": 1, "default_root_dir": folder}
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        callbacks=callbacks, enable_model_summary=False, **{**settings, **quiet, **more}
    )
    trainer.fit(module, DataLoader(rows, batch_size=4))
    return trainer


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [
        r.getMessage()
        for r in caplog.records
        if r.name == "jacdiag.watch" and r.levelno >= logging.WARNING
    ]
    return [text for text in found if "JD" not in text]


@pytest.mark.parametrize("kind", [NoForward, WithForward, Nested])
def test_the_network_is_found_without_its_name(
    kind: type[NoForward], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    modules = [kind(), kind()]
    plain = fit(tmp_path, modules[0], [])
    watched = fit(tmp_path, modules[1], [WatchCallback(log_dir=tmp_path / "log", **OPTIONS)])
    assert_same_state(
        state_of(modules[0], plain.optimizers[0]), state_of(modules[1], watched.optimizers[0])
    )
    probes, steps = lines(tmp_path / "log", "probe"), lines(tmp_path / "log", "step")
    assert [row["step"] for row in probes] == [0, 6, 12] and len(
        probes[0]["report"]["sublayers"]
    ) == 4
    assert probes[0]["report"]["probe"]["tokens"] == "stream"
    assert [row["grad_norm_post"] for row in steps] == pytest.approx(modules[1].norms, rel=1e-5)
    assert all(len(row["batches"]) == 1 for row in steps)
    assert not messages(caplog)


@pytest.mark.parametrize("clip", [0.5, None])
def test_parts_outside_of_the_network_are_named(
    clip: float | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Their gradients are in the Trainer's norm, and not in the figures: the share of clipping is
    right.
    """
    module = TwoParts()
    fit(
        tmp_path,
        module,
        [WatchCallback(log_dir=tmp_path / "log", **OPTIONS)],
        gradient_clip_val=clip,
    )
    (text,) = messages(caplog)
    assert (
        "'net' of TwoParts is watched" in text
        and "'scale'" in text
        and "WatchCallback(model=NAME)" in text
    )
    for row, whole in zip(lines(tmp_path / "log", "step"), module.norms, strict=True):
        if clip is None:
            assert row["grad_norm"] is None and row["grad_norm_post"] < whole
        else:
            assert row["grad_norm"] < whole and row["clip_ratio"] == pytest.approx(
                max(whole / clip, 1.0), rel=1e-3
            )


def test_network_of_a_lightning_module_is_found() -> None:
    class Flat(LightningModule):
        """Layers of its own, and a forward over them."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 8)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.second(self.first(x))
            return out

    class FlatWithoutForward(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 8)

    def trainer(module: nn.Module) -> Any:
        from types import SimpleNamespace

        return SimpleNamespace(optimizers=[torch.optim.SGD(module.parameters())])

    flat, other, nested = Flat(), FlatWithoutForward(), Nested()
    found = find_network(flat, trainer(flat))
    assert found.module is flat and not found.others
    found = find_network(other, trainer(other))
    assert found.name == "second" and found.others == ("first",)
    found = find_network(nested, trainer(nested.nets))
    # the teacher is larger and is not trained
    assert found.name == "nets.main" and not found.others
    assert (
        implements_forward(flat)
        and not implements_forward(other)
        and not implements_forward(nested.nets)
    )


def test_clipping_of_the_modules_own_is_known(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = OwnClipping()
    fit(tmp_path, module, [WatchCallback(log_dir=tmp_path / "log", **OPTIONS)])
    rows = lines(tmp_path / "log", "step")
    assert [row["grad_norm"] for row in rows] == pytest.approx(module.norms, rel=1e-5)
    for row in rows:
        assert row["grad_norm_post"] == pytest.approx(min(row["grad_norm"], 0.5), rel=1e-4)
    assert not messages(caplog)


def test_a_loss_scaler_that_never_makes_a_step_alerts(tmp_path: Path) -> None:
    """Without clipping, too: only the norm says why the optimizer was not called."""

    class NeverFinite(NoForward):
        def on_after_backward(self) -> None:
            next(self.parameters()).grad.view(-1)[0] = math.nan  # type: ignore[union-attr]

    callback = WatchCallback(log_dir=tmp_path / "log", **OPTIONS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    precision = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    fit(tmp_path, NeverFinite(), [callback], plugins=[precision])
    rows = lines(tmp_path / "log", "step")
    assert {row["skipped_for"] for row in rows} == {"nan"}
    assert callback.watch is not None
    assert [(a.code, a.step) for a in callback.watch.alerts] == [("JD505", 10)]


def test_an_exception_leaves_a_flight(tmp_path: Path) -> None:
    class Broken(NoForward):
        def training_step(self, ids: Tensor, index: int) -> Tensor:
            if index == 5:
                raise ZeroDivisionError
            return super().training_step(ids, index)

    module = Broken()
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, module, [WatchCallback(log_dir=tmp_path / "log", **OPTIONS)])
    flight = tmp_path / "log" / "flight-5"
    assert json.loads((flight / "about.json").read_text())["why"] == "ZeroDivisionError"
    assert (flight / "batch.pt").is_file() and lines(tmp_path / "log")[-1]["type"] == "end"
    assert not module.net._forward_pre_hooks


def test_a_compiled_module_shows_its_batches(tmp_path: Path) -> None:
    """Lightning compiles the training step: the network inside is called in compiled code."""
    torch._dynamo.reset()
    module = NoForward()
    compiled: Any = torch.compile(module, backend="eager")
    fit(tmp_path, compiled, [WatchCallback(log_dir=tmp_path / "log", **OPTIONS)])
    assert all(len(row["batches"]) == 1 for row in lines(tmp_path / "log", "step"))
    assert lines(tmp_path / "log", "probe")[0]["report"]["probe"]["tokens"] == "stream"
