"""Two runs are one: what a model keeps on itself, what it draws, and what a caller has switched on
change nothing.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from menagerie.core import Pre
from menagerie.parts import MLP, Attention, D, Decoder, MoE, floats, seeded, tokens
from test_model_stays_unchanged import unchanged
from torch import Tensor, nn
from torch.nn import functional as F

import jacdiag
from jacdiag.errors import JacdiagError
from jacdiag.measure.replay_check import verify_replay
from jacdiag.trace.execution.skeleton import Skeleton


def trace(model: nn.Module, **options: Any) -> Any:
    return jacdiag.sites(model, tokens(), **{"dtype": torch.float64, **options})


def decoder(**parts: Any) -> nn.Module:
    return seeded(lambda: Decoder(lambda: Pre(**parts)), seed=3)


# -- caches ----------------------------------------------------------------------------------------
class Cached(Attention):
    """Keeps keys and values on itself and reuses them: the value of a second run is right, its
    Jacobian wrong.
    """

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.kept, self.store = how, None, {}

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        k = self.k(x)
        if self.how == "attribute":
            self.kept = k if self.kept is None else self.kept
            k = self.kept
        elif self.how == "dict":
            k = self.store.setdefault("k", k)
        elif self.how == "appended":
            self.store.setdefault("all", []).append(k)
            k = torch.stack(self.store["all"]).mean(0) * len(self.store["all"])
        q, v = self.q(x), self.v(x)
        return self.o(torch.softmax(q @ k.mT, -1) @ v)


class Uncached(Cached):
    def __init__(self) -> None:
        super().__init__("not at all")


@pytest.mark.parametrize("how", ["attribute", "dict", "appended"])
def test_a_cache_that_a_model_keeps_is_not_seen_by_the_next_run(how: str) -> None:
    model, plain = decoder(attn=lambda: Cached(how)), decoder(attn=Uncached)
    mine, wanted = trace(model), trace(plain)
    assert mine.deterministic and max(verify_replay(mine).values()) < 1e-12
    for a, b in zip(mine, wanted, strict=True):
        assert torch.equal(a.value, b.value)
        x, w = a.shortcut.clone().requires_grad_(), torch.ones_like(a.value)
        with torch.enable_grad():
            one, other = (torch.autograd.grad(s.branch(x), x, w)[0] for s in (a, b))
        assert torch.equal(one, other)
    assert model.blocks[0].attn.kept is None and not model.blocks[0].attn.store


def test_replay_check_catches_a_stale_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trap: with a recorded cache the value is equal to the bit and J is wrong."""
    found = trace(decoder(attn=lambda: Cached("attribute")))
    right = verify_replay(found)
    monkeypatch.setattr(Skeleton, "restore", lambda self: None)
    found[0].branch(found[0].shortcut)  # leaves its keys behind
    kept = found.skeleton.module("blocks.0.attn").kept
    assert kept is not None and torch.equal(found[0].branch(found[0].shortcut), found[0].value)
    monkeypatch.undo()
    wrong = {}
    original = Skeleton.restore

    def stale(self: Skeleton) -> None:
        original(self)
        if not wrong:
            return
        self.module("blocks.0.attn").kept = kept

    monkeypatch.setattr(Skeleton, "restore", stale)
    site = found[0]
    branch = site.branch

    def recorded(x: Tensor) -> Tensor:
        wrong["now"] = True
        try:
            return branch(x)
        finally:
            wrong.clear()

    site.branch = recorded
    assert torch.equal(site.branch(site.shortcut), site.value)
    assert verify_replay(found)["blocks.0.attn"] > 1e-2 > max(right.values())


# -- draws -----------------------------------------------------------------------------------------
class Dropped(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5, training=True)


class Routed(MoE):
    def weights(self, flat: Tensor) -> Tensor:
        return super().weights(flat + torch.randn_like(flat))


class Noisy(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + random.random())


class NumpyNoise(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + float(np.random.rand()))  # noqa: NPY002


@pytest.mark.parametrize(
    ("mlp", "call"),
    [
        (Dropped, "dropout draws random numbers"),
        (Routed, "randn_like draws random numbers"),
        (Noisy, "add"),
        (NumpyNoise, "add"),
    ],
)
def test_a_model_that_draws_is_caught_before_any_product(mlp: Any, call: str) -> None:
    model = decoder(mlp=mlp)
    state = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    reports: list[Any] = []

    def run() -> None:
        try:
            reports.append(jacdiag.audit(model, tokens()))
        except JacdiagError as error:
            reports.append(error)

    unchanged(model, run)
    assert state[0] == random.getstate() and (state[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    (report,) = reports
    if isinstance(report, JacdiagError):  # random routing may change the calls that are made
        said = str(report)
        assert "two runs on the same input" in said
        assert "model.eval()" not in said and "the model ran in eval mode" in said
    else:
        (finding,) = [f for f in report.findings if f.code == "JD905"]
        said = finding.what
        assert finding.level == "error" and not report.sublayers and report.cost.products == 0
    assert call in said and "'blocks.0.mlp'" in said and "test_repeatability.py:" in said


def test_draws_that_do_not_matter_change_no_stream() -> None:
    class Harmless(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0 * torch.rand(())

    model, reports = decoder(mlp=Harmless), []
    unchanged(model, lambda: reports.append(jacdiag.audit(model, tokens())))
    assert reports[0].sublayers and not any(f.code == "JD905" for f in reports[0].findings)


# -- the caller ------------------------------------------------------------------------------------
def test_records_do_not_depend_on_the_batch() -> None:
    model = decoder()
    both = jacdiag.sites(model, tokens(), dtype=torch.float64)
    alone = jacdiag.sites(model, tokens()[:1], dtype=torch.float64)
    for a, b in zip(both, alone, strict=True):
        for field in ("name", "kind", "placement", "depth", "token_wise", "parameters"):
            assert getattr(a, field) == getattr(b, field)
        assert torch.allclose(a.value[:1], b.value, rtol=1e-12, atol=1e-14)


def test_two_audits_are_equal_whatever_the_mode() -> None:
    model, wanted = decoder(), None
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        for train in (False, True):
            torch.manual_seed(random.randrange(1000))
            with mode():
                data = jacdiag.audit(model.train(train), tokens()).to_dict()
            kept = [{k: v for k, v in row.items() if k != "seconds"} for row in data["sublayers"]]
            wanted = wanted or (kept, data["network"])
            assert (kept, data["network"]) == wanted


def test_a_default_dtype_of_the_caller_stays() -> None:
    model, wanted = decoder(), trace(decoder())
    torch.set_default_dtype(torch.float64)
    try:
        again = trace(model)
        assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert [s.name for s in again] == [s.name for s in wanted]


class Batched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.body = nn.BatchNorm1d(D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(self.norm(x))


def test_batch_norm_in_train_mode_is_measured_in_eval_mode_and_keeps_its_statistics() -> None:
    model, x = seeded(Batched), floats(6, D)
    (wanted,) = jacdiag.sites(model, x)
    model.train()
    found: list[Any] = []
    unchanged(model, lambda: found.extend(jacdiag.sites(model, x)))
    assert torch.equal(found[0].value, wanted.value) and found[0].token_wise
