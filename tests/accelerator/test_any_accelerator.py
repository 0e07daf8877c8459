"""What jacdiag asks of an accelerator: random numbers, memory, the current device, precision."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacdiag
from accelerator.pretended import NAME, memory_in_use, pretended_device
from jacdiag.devices import accelerators
from jacdiag.devices.device_choice import pick
from jacdiag.errors import UsageError
from jacdiag.monitor import probe_memory
from jacdiag.pipeline.provenance import peak_memory_mb
from jacdiag.records.report import Report
from jacdiag.records.run_log import read_run
from jacdiag.sources.foreign_code import seeded
from jacdiag.sources.gpt import GPT, build
from jacdiag.spectra import spectral_norm
from jacdiag.spectra.interval import PAD, PAD_WITHOUT_FLOAT64
from jacdiag.trace.execution.rng_state import RandomState, another_draw, borrowed

DEVICE = torch.device(NAME, 0)


def tiny() -> GPT:
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 32, "block_size": 8}
    return build("vanilla", **sizes, dropout=0.0).eval()


def ids() -> Tensor:
    return torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(0))


def draw(device: torch.device | str) -> Tensor:
    return torch.rand(4, device=device).cpu()


# -- what is here ----------------------------------------------------------------------------------
def test_an_accelerator_without_float64_is_taken_if_it_is_named_only() -> None:
    with pretended_device():
        assert pick(None).type == pick(NAME).type == NAME
    with pretended_device(float64=False):
        assert pick(None).type == "cpu" and pick(NAME).type == NAME


def test_what_there_is_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 1)
    with pretended_device(devices=2):
        assert accelerators.present_names() == ["cpu", "xpu:0", f"{NAME}:0", f"{NAME}:1"]
    assert accelerators.present_names() == ["cpu", "xpu:0"]


# -- random numbers --------------------------------------------------------------------------------
def test_random_numbers_of_every_device_are_put_back() -> None:
    devices = (torch.device("cpu"), DEVICE, torch.device(NAME, 1))
    with pretended_device(devices=2):
        before = RandomState.now()
        with borrowed():
            another_draw()
            inside = [draw(device) for device in devices]
        assert RandomState.now().same_as(before)
        after = [draw(device) for device in devices]
        assert not RandomState.now().same_as(before)
        before.restore()
        again = [draw(device) for device in devices]
    assert all(map(torch.equal, after, again))
    assert not any(map(torch.equal, after, inside))


def test_a_fixed_seed_draws_the_same_on_a_device_and_leaves_its_numbers_alone() -> None:
    with pretended_device():
        before = RandomState.now()
        with seeded(3):
            first = draw(DEVICE)
        with seeded(3):
            second = draw(DEVICE)
        assert torch.equal(first, second) and RandomState.now().same_as(before)


def test_random_numbers_that_cannot_be_put_back_are_not_seeded() -> None:
    with pretended_device(generator=False):
        assert NAME not in RandomState.now().accelerators
        state = accelerators.module_of(NAME)
        assert state is not None
        seeds: list[int] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(state, "manual_seed_all", seeds.append)
            with borrowed():
                another_draw()
        assert seeds == []


def test_no_seed_is_left_for_a_device_that_is_started_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`torch.manual_seed` keeps its seed for a CUDA that has not been started."""
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    with borrowed():
        another_draw()
        assert seeds == []
        torch.manual_seed(1)
    assert seeds == [1]


def test_a_module_with_one_device_is_asked_without_a_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The functions of torch.mps take no device, and there is none for all devices."""
    states = [torch.zeros(3, dtype=torch.uint8)]
    waits: list[str] = []
    fake = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 1,
        get_rng_state=lambda: states[0],
        set_rng_state=lambda state: states.__setitem__(0, state),
        manual_seed=lambda seed: states.__setitem__(0, torch.full((3,), seed % 200).byte()),
        recommended_max_memory=lambda: 1000,
        current_allocated_memory=lambda: 300,
        synchronize=lambda: waits.append("wait"),
    )
    monkeypatch.setattr(torch, "mps", fake)
    monkeypatch.setattr(accelerators, "_is_built", lambda kind: kind == "mps")
    mps = torch.device("mps")

    before = RandomState.now()
    with borrowed():
        accelerators.seed_generators(7)
        assert not RandomState.now().same_as(before)
    assert RandomState.now().same_as(before) and list(before.accelerators) == ["mps"]
    assert probe_memory.available(mps) == 700
    with accelerators.made_current(mps):
        accelerators.wait_for(mps)
    assert waits == ["wait"]

    # Its allocator does not tell its peak, and its memory is that of the process.
    assert accelerators.peak_device_memory(mps) is None
    assert peak_memory_mb(mps) == pytest.approx(peak_memory_mb(), rel=0.01)


# -- memory, the current device, autocast ----------------------------------------------------------
def test_memory_is_that_of_the_device_that_is_meant() -> None:
    with pretended_device(devices=2, memory=10_000) as _:
        large = torch.zeros(1000, device=torch.device(NAME, 1))
        assert memory_in_use(1) == large.nbytes == 4000
        assert probe_memory.available(torch.device(NAME, 1)) == 6000
        assert probe_memory.available(DEVICE) == 10_000
        assert peak_memory_mb(torch.device(NAME, 1)) == 4000 / 2**20
        assert peak_memory_mb(DEVICE) == 0


def test_memory_that_cannot_be_read_is_not_taken_for_that_of_the_host() -> None:
    assert probe_memory.available(torch.device("hpu")) is None
    assert (probe_memory.available(torch.device("cpu")) or 0) > 0


def test_a_device_is_the_current_one_for_a_while() -> None:
    with pretended_device(devices=2):
        with accelerators.made_current(torch.device(NAME, 1)):
            assert torch.ones(1, device=NAME).device.index == 1
        assert torch.ones(1, device=NAME).device.index == 0


def test_nothing_is_cast_where_autocast_is_put_off() -> None:
    with pretended_device():
        x = torch.ones(2, 2, device=DEVICE)
        with torch.autocast(NAME, dtype=torch.bfloat16):
            with accelerators.without_autocast():
                assert (x @ x).dtype is torch.float32
            assert (x @ x).dtype is torch.bfloat16


# -- precision -------------------------------------------------------------------------------------
@cache
def of_cpu() -> tuple[Report, Report]:
    """Return the audits in float64 and in float32 on the CPU."""
    exact = jacdiag.audit(tiny().double(), ids(), state="init", tol=1e-4)
    return exact, jacdiag.audit(tiny(), ids(), state="init")


@pytest.mark.parametrize("float64", [True, False])
def test_an_audit_there_holds_the_norms_of_the_cpu(float64: bool) -> None:
    exact, here = of_cpu()
    with pretended_device(float64=float64) as counts:
        there = jacdiag.audit(tiny().to(NAME), ids().to(NAME), state="init")
    assert counts.mixed == 0

    says_so = [note for note in there.notes if "has no float64" in note]
    assert len(says_so) == (not float64)
    for truth, cpu, device in zip(exact.sublayers, here.sublayers, there.sublayers, strict=True):
        assert truth.branch_norm and cpu.branch_norm and device.branch_norm
        assert device.branch_norm.lower <= truth.branch_norm.estimate <= device.branch_norm.upper
        if float64:
            assert device.branch_norm == cpu.branch_norm
            continue

        # The pads that the note names.
        assert "0.05% (by 0.01% with float64)" in says_so[0]
        ratio = device.branch_norm.lower / cpu.branch_norm.lower
        wanted = (1 - PAD_WITHOUT_FLOAT64) / (1 - PAD["float32"])
        assert ratio == pytest.approx(wanted, abs=1e-5)


def test_norms_are_found_without_float64() -> None:
    matrix = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    norm = float(torch.linalg.svdvals(matrix.double())[0])
    with pretended_device(float64=False):
        moved = matrix.to(NAME)
        found = spectral_norm(lambda x: x @ moved.T, torch.ones(2, 4, device=NAME))
    assert all(low <= norm <= high for low, high in zip(found.lower, found.upper, strict=True))


def test_a_model_or_a_run_in_float64_is_refused_where_there_is_none() -> None:
    with pretended_device(float64=False):
        with pytest.raises(UsageError, match="PRETENDED has no float64"):
            jacdiag.sites(tiny().to(NAME), ids().to(NAME), dtype=torch.float64)
        with pytest.raises(UsageError, match="a model with float64 weights"):
            jacdiag.audit(lambda: tiny().double(), inputs=ids(), device=NAME)


# -- a watch ---------------------------------------------------------------------------------------
def watched(device: str, folder: Path) -> tuple[list[Any], list[Any]]:
    """Return the gradient norms and the intervals of a short watched run."""
    model, tokens = tiny().to(device).train(), ids().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    options: dict[str, Any] = {"every": 2, "stats_every": 1, "log_every": 2}
    with jacdiag.watch(
        model, optimizer, log_dir=folder, quiet=True, strict=True, **options
    ) as watch:
        for _ in range(3):
            _, loss = model(tokens, tokens)
            loss.backward()
            optimizer.step()
            watch.step(loss)
            optimizer.zero_grad()
    run = read_run(folder)
    sublayers = [row["report"]["sublayers"] for row in run.probes]
    return [row["grad_norm_post"] for row in run.steps], [s["core_norm"] for s in sublayers[-1]]


@pytest.mark.parametrize("float64", [True, False])
def test_a_watch_there_has_the_norms_of_the_cpu(float64: bool, tmp_path: Path) -> None:
    with pretended_device(float64=float64, generator=float64) as counts:
        on_cpu = watched("cpu", tmp_path / "cpu")
        there = watched(NAME, tmp_path / "there")
    assert counts.mixed == 0
    assert there[0] == pytest.approx(on_cpu[0], rel=1e-6)
    for ours, of_cpu in zip(there[1], on_cpu[1], strict=True):
        assert ours["lower"] == pytest.approx(of_cpu["lower"], rel=1e-3)
        assert ours["lower"] <= of_cpu["estimate"] <= ours["upper"]


def test_an_outline_says_on_which_kind_of_device_its_weight_is() -> None:
    model = tiny().to("meta")
    parameters = tiny().named_parameters(remove_duplicate=False)
    weights = {name: parameter.detach() for name, parameter in parameters}
    seen: dict[str, bool] = {}

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: Tensor) -> Any:
            weight = self.model.transformer["wte"].weight
            kinds = ("is_cpu", "is_cuda", "is_xpu", "is_mps", "is_sparse")
            seen.update({kind: getattr(weight, kind) for kind in kinds})
            return self.model(tokens)

    jacdiag.sites(Asks(), ids(), weights={f"model.{name}": w for name, w in weights.items()})
    assert seen == {
        "is_cpu": True,
        "is_cuda": False,
        "is_xpu": False,
        "is_mps": False,
        "is_sparse": False,
    }
