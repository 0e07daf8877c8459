"""Per-step figures against a recomputation in float64, before and after clipping, scaled and
skipped.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from monitor.rig import T, V, adam, batch, lines, plain_step, small
from torch import Tensor, nn

import jacdiag
from jacdiag.errors import UsageError
from jacdiag.monitor.forward_statistics import StableRanks, forward_figures
from jacdiag.monitor.optimizers import optimisers_of
from jacdiag.monitor.square_sums import read_square_sums, square_sums


def exact(tensors: Any) -> float:
    """The norm over tensors, in float64."""
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors))


def test_square_sums_of_many_kinds() -> None:
    torch.manual_seed(0)
    kinds = [
        torch.randn(3, 5000),
        torch.randn(70, 300).t(),
        torch.randn(10, 10)[::2],
        torch.randn(7).double(),
        torch.randn(9000).bfloat16(),
        torch.randn(5).half(),
        torch.zeros(0),
        torch.tensor(2.0),
        torch.randn(8, 4).to_sparse(),
        torch.randn(6, dtype=torch.complex64),
        torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last),
    ]
    found = square_sums([*kinds, None])
    for t, value in zip(kinds, found.tolist(), strict=False):
        t = t.to_dense() if t.is_sparse else t
        t = torch.view_as_real(t) if t.is_complex() else t
        assert value == pytest.approx(float(t.double().square().sum()), rel=1e-6)
    assert found[-1] == 0


def test_square_sums_keep_their_digits_where_one_float32_sum_does_not() -> None:
    t = torch.randn(20_000_000, generator=torch.Generator().manual_seed(0))
    truth = float(t.double().square().sum())
    assert float(square_sums([t])[0]) == pytest.approx(truth, rel=1e-7)


@pytest.mark.parametrize(
    "elements", [4 * 4096, 4 * 4096 + 1, 3 * 16384 + 5, 8 * 16384, 8 * 16384 + 1]
)
def test_square_sums_keep_their_digits_on_both_sides_of_every_cut(elements: int) -> None:
    t = torch.randn(elements, generator=torch.Generator().manual_seed(0))
    between = [torch.ones(2, 3), t, None, torch.full((5,), 2.0)]
    truth = [6.0, float(t.double().square().sum()), 0.0, 20.0]
    assert read_square_sums(between) == pytest.approx(truth, rel=1e-6)
    assert square_sums(between).tolist() == read_square_sums(between)


def test_square_sums_of_what_is_not_finite() -> None:
    assert math.isnan(float(square_sums([torch.tensor([1.0, float("nan")])])[0]))
    assert math.isinf(float(square_sums([torch.tensor([1.0, float("inf")])])[0]))


class Truth:
    """What each step should have logged, from the tensors themselves."""

    def __init__(self, model: nn.Module, groups: dict[str, str]) -> None:
        self.model, self.homes = model, groups
        self.rows: list[dict[str, Any]] = []

    def before_step(self, pre: float | None = None) -> None:
        grads = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        labels = {self.homes[n] for n in grads}
        by_group = {
            label: exact(g for n, g in grads.items() if self.homes[n] == label) for label in labels
        }
        self.old = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.rows.append({"post": exact(grads.values()), "pre": pre, "grad": by_group})

    def after_step(self) -> None:
        moved = {}
        for label in set(self.homes.values()):
            mine = [(n, p) for n, p in self.model.named_parameters() if self.homes[n] == label]
            moved[label] = exact(p - self.old[n] for n, p in mine) / exact(p for _, p in mine)
        self.rows[-1]["update"] = moved


def homes_of(model: nn.Module) -> dict[str, str]:
    """Groups of the reference GPT, by hand."""
    found = {}
    for name, _ in model.named_parameters():
        part = name.split(".")
        if part[1] == "h":
            kind = "attn" if part[3] in ("attn", "ln_1") else "mlp"
            found[name] = f"transformer.h.{part[2]}.{kind}"
        else:
            found[name] = "(norms)" if part[1].startswith("ln") else "(embedding)"
    return found


def assert_rows(folder: Path, truth: Truth) -> None:
    groups, rows = lines(folder, "run")[0]["groups"], lines(folder, "step")
    assert set(groups) == set(truth.homes.values())
    assert len(rows) == len(truth.rows)
    seen = set()
    for row, wanted in zip(rows, truth.rows, strict=True):
        assert row["grad_norm_post"] == pytest.approx(wanted["post"], rel=1e-5)
        for label, value in zip(groups, row["grad"], strict=True):
            assert value == pytest.approx(wanted["grad"][label], rel=1e-5)
        update = row["update"]
        assert update["ratio"] == pytest.approx(wanted["update"][update["where"]], rel=1e-5)
        seen.add(update["where"])
    assert seen == set(groups)  # in turn, each of them


def run(
    folder: Path, steps: int = 12, clip: float | None = None, give: bool = True, **options: Any
) -> Truth:
    model = small()
    optimizer = adam(model, **options)
    truth = Truth(model, homes_of(model))
    with jacdiag.watch(
        model, optimizer, log_dir=folder, every=None, log_every=5, strict=True, quiet=True
    ) as w:
        for step in range(1, steps + 1):
            _, loss = model(*batch(step))
            loss.backward()
            norm = exact(p.grad for p in model.parameters())
            told = torch.nn.utils.clip_grad_norm_(model.parameters(), clip) if clip else None
            truth.before_step(norm if clip else None)
            optimizer.step()
            truth.after_step()
            optimizer.zero_grad()
            w.step(loss, grad_norm=told if give else None, tokens=step * 32)
    return truth


def test_norms_of_every_sub_layer_and_its_updates(tmp_path: Path) -> None:
    truth = run(tmp_path)
    assert_rows(tmp_path, truth)
    for row in lines(tmp_path, "step"):
        assert row["grad_norm"] is None and row["clipped"] is None  # not given, not guessed
        assert row["lr"] == 3e-3 and row["tokens"] == row["step"] * 32 and not row["skipped"]


def test_norms_before_and_after_clipping_are_logged_separately(tmp_path: Path) -> None:
    truth = run(tmp_path, clip=0.5)
    assert_rows(tmp_path, truth)
    for row, wanted in zip(lines(tmp_path, "step"), truth.rows, strict=True):
        assert row["grad_norm"] == pytest.approx(wanted["pre"], rel=1e-5)
        assert row["clipped"] == (wanted["pre"] > 0.5)
        assert row["clip_ratio"] == pytest.approx(max(wanted["pre"] / 0.5, 1.0), rel=1e-5)
    assert lines(tmp_path, "end")[0]["clip_fraction"] == 1.0
    no_word = tmp_path / "b"
    run(no_word, clip=0.5, give=False)
    assert all(
        row["grad_norm"] is None and row["clipped"] is None for row in lines(no_word, "step")
    )


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("unscale", [False, True], ids=["scaler unscales", "loop unscales"])
def test_gradient_norms_under_amp_are_those_of_unscaled_gradients(
    fused: bool, unscale: bool, tmp_path: Path
) -> None:
    """Norms are those of unscaled gradients; a step that the scaler skips is one, and no error."""
    model = small()
    optimizer = adam(model, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    wanted: list[float] = []
    with jacdiag.watch(
        model, optimizer, log_dir=tmp_path, every=None, log_every=4, strict=True, quiet=True
    ) as w:
        for step in range(1, 13):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                _, loss = model(*batch(step))
            scaler.scale(loss).backward()
            scale = scaler.get_scale()
            if step == 6:
                model.transformer["wte"].weight.grad[0, 0] = float("inf")
            wanted.append(exact(p.grad for p in model.parameters()) / scale)
            if unscale:
                scaler.unscale_(optimizer)
            before = [p.detach().clone() for p in model.parameters()]
            scaler.step(optimizer)
            moved = any(
                not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)
            )
            assert moved == (step != 6)
            scaler.update()
            optimizer.zero_grad()
            w.step(loss)
    rows = lines(tmp_path, "step")
    assert [row["skipped"] for row in rows] == [step == 6 for step in range(1, 13)]
    for row, norm in zip(rows, wanted, strict=True):
        if row["step"] != 6:
            assert row["grad_norm_post"] == pytest.approx(norm, rel=1e-5)
    assert not lines(tmp_path, "alert")
    assert lines(tmp_path, "end")[0]["skipped"] == 1


class Wrapped:
    """A wrapper with the optimiser inside, as accelerate and Lightning have it."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer


class Container:
    def __init__(self, *optimizers: Any) -> None:
        self.optimizers = list(optimizers)


@pytest.mark.parametrize(
    "pack",
    [list, Wrapped, lambda pair: Container(*pair), lambda pair: dict(enumerate(pair))],
    ids=["list", "wrappers", "container", "dict"],
)
def test_several_optimizers_count_as_one_step(pack: Any, tmp_path: Path) -> None:
    model = small()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    pair = [torch.optim.SGD(matrices, lr=0.1), torch.optim.AdamW(vectors, lr=1e-3)]
    given = [Wrapped(Wrapped(o)) for o in pair] if pack is Wrapped else pack(pair)
    assert optimisers_of(given) == pair
    truth = Truth(model, homes_of(model))
    with jacdiag.watch(
        model, given, log_dir=tmp_path, every=None, log_every=3, strict=True, quiet=True
    ) as w:
        for step in range(1, 8):
            _, loss = model(*batch(step))
            loss.backward()
            truth.before_step()
            for o in pair:
                o.step()
            for o in pair:
                o.zero_grad()
            w.step(loss)
    for row, wanted in zip(lines(tmp_path, "step"), truth.rows, strict=True):
        assert row["grad_norm_post"] == pytest.approx(wanted["post"], rel=1e-5)


def test_gradient_norms_with_accumulation_are_those_of_the_whole_step(tmp_path: Path) -> None:
    model = small()
    optimizer = adam(model)
    wanted = []
    with jacdiag.watch(
        model, optimizer, log_dir=tmp_path, every=None, log_every=2, strict=True, quiet=True
    ) as w:
        for step in range(1, 6):
            total: Tensor | float = 0.0
            for micro in range(3):
                _, loss = model(*batch(10 * step + micro))
                (loss / 3).backward()
                total = total + loss.detach() / 3
            wanted.append((float(total), exact(p.grad for p in model.parameters())))
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            w.step(total)
    rows = lines(tmp_path, "step")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    for row, (loss, norm) in zip(rows, wanted, strict=True):
        assert row["loss"] == pytest.approx(loss) and row["grad_norm_post"] == pytest.approx(
            norm, rel=1e-5
        )
        assert len(row["batches"]) == 3


def test_statistics_and_norms_are_the_audits_own(tmp_path: Path) -> None:
    """The probe of step 0 sees the initial weights: an audit of the same model on the same tokens
    agrees.
    """
    model, reference = small("vanilla"), small("vanilla")
    ids = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(5))
    optimizer = adam(model)
    with jacdiag.watch(model, optimizer, log_dir=tmp_path, probe=ids, strict=True, quiet=True) as w:
        _, loss = model(*batch(1))
        loss.backward()
        optimizer.step()
        w.step(loss)
    report = jacdiag.audit(reference.eval(), ids, tol=0.01)
    (row,) = lines(tmp_path, "probe")
    assert row["report"]["state"] == "init" and row["step"] == 0
    (stats,) = lines(tmp_path, "stats")
    for record in report.sublayers:
        branch = row["figures"]["branch_norm"][record.name]
        assert record.branch_norm.lower * 0.95 <= branch <= record.branch_norm.upper
        core = row["figures"]["core_norm"][record.name]
        assert core == pytest.approx(record.core_norm.estimate, rel=0.05)
        assert stats["figures"]["shortcut_std"][record.name] == pytest.approx(
            record.shortcut_std.median, rel=1e-5
        )
    interval = row["report"]["sublayers"][0]["core_norm"]
    assert interval["lower"] <= report.sublayers[0].core_norm.estimate <= interval["upper"]


def test_attention_logits_against_the_definition() -> None:
    model = small("vanilla", n_layer=1, dropout=0.0).eval()
    ids, _ = batch(3)
    shown = forward_figures(jacdiag.sites(model, ids))
    block = model.transformer["h"][0]
    with torch.no_grad():
        x = model.transformer["wte"](ids) + model.transformer["wpe"](torch.arange(T))
        q, k, _ = (
            t.view(4, T, 2, 8).transpose(1, 2)
            for t in block.attn.c_attn(block.ln_1(x)).split(16, dim=2)
        )
        scores = (q @ k.transpose(-1, -2) / math.sqrt(8)).masked_fill(
            torch.ones(T, T).triu(1).bool(), -math.inf
        )
        weights = scores.softmax(-1)
    name = "transformer.h.0.attn"
    assert shown.figures["logit"] == {name: pytest.approx(float(scores.max()), rel=1e-5)}
    assert shown.heads == {name: pytest.approx(scores.amax(dim=(0, 2, 3)).tolist(), rel=1e-5)}
    entropy = (
        torch.special.entr(weights).sum(-1)[..., 1:].mean() / torch.arange(2, T + 1).log().mean()
    )
    assert shown.figures["attention_entropy"] == {name: pytest.approx(float(entropy), rel=1e-5)}


def test_stable_ranks_against_svd() -> None:
    model = small("vanilla")
    sites, ranks = jacdiag.sites(model, batch(0)[0]), StableRanks()
    for _ in range(20):
        found = ranks.look(sites)
    for name, value in found.items():
        w = dict(model.named_parameters())[name].detach().double()
        wanted = float(w.square().sum() / torch.linalg.matrix_norm(w, 2) ** 2)
        assert value == pytest.approx(wanted, rel=0.02), name


def test_update_norms_at_every_second_step_only(tmp_path: Path) -> None:
    model = small()
    optimizer = adam(model)
    with jacdiag.watch(
        model, optimizer, log_dir=tmp_path, every=None, stats_every=None, updates=2, quiet=True
    ) as w:
        for step in range(8):
            loss, norm = plain_step(model, optimizer, step)
            w.step(loss, grad_norm=norm)
    rows = lines(tmp_path, "step")
    assert [row["update"] is not None for row in rows] == [True, False] * 4
    # in turn, none left out
    assert len({row["update"]["where"] for row in rows if row["update"]}) == 4


@pytest.mark.parametrize("updates", [-1, "1%", 1.5, None])
def test_updates_is_yes_or_no_or_a_number_of_steps(updates: Any) -> None:
    model = small()
    with pytest.raises(UsageError, match="updates cannot be"):
        jacdiag.watch(model, adam(model), updates=updates)


def test_the_price_of_a_probe_is_that_of_the_probe_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first update may run under autocast, which no probe does."""
    from jacdiag.monitor.jacobian_probe import LiveProbe

    states: dict[str, bool] = {}

    def note_autocast(name: str) -> None:
        method = getattr(LiveProbe, name)

        def noting(self: LiveProbe, *args: Any) -> Any:
            states[name] = torch.is_autocast_enabled("cpu")
            return method(self, *args)

        monkeypatch.setattr(LiveProbe, name, noting)

    note_autocast("price")
    note_autocast("measure")
    model = small(n_layer=1)
    optimizer = adam(model)
    with (
        jacdiag.watch(model, optimizer, every=200, quiet=True, strict=True) as w,
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        _, loss = model(*batch(1))
        loss.backward()
        optimizer.step()
        w.step(loss.detach())
    assert states == {"price": False, "measure": False}
