"""An audit on an accelerator says what it says on the CPU, in every digit."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import jacdiag
from accelerator.machine import machine
from accelerator.pretended import NAME, Counts, memory_in_use, pretended_device
from accelerator.specimens import Elsewhere, figures, ids, tiny
from jacdiag.gate import gate

FIRST, SECOND = f"{NAME}:0", f"{NAME}:1"
CHECKPOINT = Path(__file__).parents[2] / "examples" / "checkpoints" / "vanilla-step0.pt"


@pytest.fixture
def counts() -> Iterator[Counts]:
    """Let there be two devices. No operation may mix them, and no copy may be read too early."""
    with pretended_device(devices=2) as counts:
        yield counts
        assert counts.mixed == 0 and counts.races == 0


def audit(device: str, weights: torch.dtype = torch.float32, **options: Any) -> jacdiag.Report:
    model = tiny().to(weights).to(device)
    return jacdiag.audit(model, ids().to(device), **options)


# -- the same figures ------------------------------------------------------------------------------
@pytest.mark.parametrize("device", [pytest.param(FIRST, marks=pytest.mark.long), SECOND])
def test_an_audit_on_any_device_has_the_digits_of_the_cpu(counts: Counts, device: str) -> None:
    on_device = audit(device)
    assert figures(on_device) == figures(audit("cpu"))
    assert on_device.settings["device"] == device and counts.operations > 5_000


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float64", "decide": True},
        {"decide": True, "remedies": "first", "lr": 1e-3, "warmup": 10, "clip": 1.0},
        pytest.param({"decide": True, "probes": 2}, marks=pytest.mark.long),
    ],
    ids=["float64", "remedies", "two probes"],
)
def test_each_kind_of_audit_has_the_digits_of_the_cpu(
    counts: Counts, options: dict[str, Any]
) -> None:
    def run(device: str) -> jacdiag.Report:
        if "probes" in options:  # a random probe: it is drawn on the CPU and uploaded
            return jacdiag.audit(tiny, device=device, seq=8, **options)
        return audit(device, **options)

    assert figures(run(NAME)) == figures(run("cpu"))


def test_low_precision_is_raised_on_the_device(counts: Counts) -> None:
    on_device, on_cpu = (audit(name, torch.bfloat16, decide=True) for name in (NAME, "cpu"))
    assert figures(on_device) == figures(on_cpu)


@pytest.mark.long
def test_two_models_are_compared_on_the_device(counts: Counts) -> None:
    def run(device: str) -> jacdiag.Report:
        other = tiny("scaled-embed").to(device)
        return audit(device, decide=True, against=other)

    assert figures(run(NAME)) == figures(run("cpu"))


def test_weights_are_judged_on_the_device(counts: Counts) -> None:
    def run(device: str) -> jacdiag.Report:
        return jacdiag.audit(str(CHECKPOINT), device=device, products=False)

    assert figures(run(SECOND)) == figures(run("cpu"))
    assert machine().peak[0] == 0 < machine().peak[1]


def test_sub_layers_are_found_on_the_device(counts: Counts) -> None:
    def found(device: str) -> list[tuple[object, ...]]:
        sites = jacdiag.sites(tiny().to(device), ids().to(device))
        assert {site.shortcut.device for site in sites} == {torch.device(device)}
        return [(s.name, s.kind, s.placement, s.parameters, s.independent()) for s in sites]

    assert found(SECOND) == found("cpu") and len(found(SECOND)) == 2


def test_a_gate_over_three_seeds_passes_and_fails_alike(counts: Counts) -> None:
    for contract, code in ({}, 0), ({"W_2": "0.5"}, 1):
        outcomes = []
        for device in ("cpu", NAME):
            options = {"batch": 1, "seq": 8, "contract": contract, "select": ["JD2"]}
            outcomes.append(gate(tiny, device=device, **options))
        assert [outcome.exit_code for outcome in outcomes] == [code, code]
        assert outcomes[0].figures.sublayers == outcomes[1].figures.sublayers
        assert outcomes[0].figures.weights == outcomes[1].figures.weights


def test_a_function_has_the_spectral_norm_of_the_cpu(counts: Counts) -> None:
    matrix = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))

    def run(device: str, dtype: torch.dtype) -> Any:
        weight = matrix.to(device, dtype)
        point = torch.zeros(1, 16, device=device, dtype=dtype)
        return jacdiag.spectral_norm(lambda x: torch.tanh(x) @ weight, point, tol=1e-6)

    for dtype in (torch.float32, torch.float64):
        assert run(SECOND, dtype) == run("cpu", dtype)
    truth = torch.linalg.svdvals(matrix.double())[0].item()
    result = run(SECOND, torch.float64)
    assert result.lower <= truth <= result.upper


# -- models on several devices ---------------------------------------------------------------------
@pytest.mark.parametrize("second", [SECOND, "cpu"], ids=["two devices", "offloaded"])
def test_a_model_on_two_devices_has_the_digits_of_one(counts: Counts, second: str) -> None:
    def run(first: str, second: str) -> jacdiag.Report:
        model = tiny(n_layer=2)
        model.transformer["h"][1] = Elsewhere(model.transformer["h"][1])
        model.to(first)
        model.transformer["h"][1].to(second)
        return jacdiag.audit(model, ids().to(first), select=["JD1"], tol=0.3)

    report = run(FIRST, second)
    assert figures(report) == figures(run("cpu", "cpu"))
    assert report.network is not None and report.network.end_to_end is not None


# -- memory ----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama in bf16, whose weights are far larger than its activations."""
    sizes = {"hidden_size": 64, "intermediate_size": 512, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64}
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **heads, tie_word_embeddings=True))
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="50KB")
    return folder


def test_weights_that_stay_in_their_files_are_uploaded_one_block_at_a_time(
    counts: Counts, folder: Path
) -> None:
    def run(device: str) -> jacdiag.Report:
        options: dict[str, Any] = {"batch": 1, "seq": 2, "decide": True}
        return jacdiag.audit(str(folder), device=device, **options)

    on_device = run(SECOND)
    assert figures(on_device) == figures(run("cpu"))

    # The whole model in float32 was never there at once; nothing stays there.
    in_float32 = 2 * sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert 0 < machine().peak[1] < in_float32
    gc.collect()
    assert machine().live == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_audit_gives_back_all_memory(counts: Counts, dtype: torch.dtype) -> None:
    model, there = tiny().to(dtype).to(NAME), ids().to(NAME)
    before = memory_in_use()
    report = jacdiag.audit(model, there, decide=True)
    gc.collect()
    assert report.sublayers and memory_in_use() == before < machine().peak[0]


def test_too_little_memory_is_said_so_and_is_free_afterwards() -> None:
    with pretended_device(memory=25_000) as counts:
        model, there = tiny().to(NAME), ids().to(NAME)
        before = memory_in_use()
        with pytest.raises(torch.OutOfMemoryError, match="pretended out of memory"):
            jacdiag.audit(model, there)
        gc.collect()
        assert memory_in_use() == before and counts.mixed == 0
        assert not any(module._forward_hooks for module in model.modules())


# -- what is the user's own ------------------------------------------------------------------------
def test_random_numbers_of_the_device_stay_as_they_were(counts: Counts) -> None:
    module = torch.get_device_module(NAME)
    model = tiny(dropout=0.1).train().to(SECOND)
    torch.manual_seed(5)
    before = module.get_rng_state_all()
    jacdiag.audit(model, ids().to(SECOND), decide=True, remedies="first")
    assert all(map(torch.equal, before, module.get_rng_state_all()))


def test_model_stays_as_it_was(counts: Counts) -> None:
    model = tiny(dropout=0.1).train().to(SECOND)

    def state() -> list[Tensor]:
        return [torch.get_rng_state(), *(p.detach().cpu() for p in model.parameters())]

    before = state()
    report = jacdiag.audit(model, ids().to(SECOND), decide=True)
    assert report.sublayers and torch.accelerator.current_device_index() == 0
    assert model.training and all(map(torch.equal, before, state()))


@pytest.mark.long
def test_a_device_without_a_generator_of_its_own_gives_the_same_figures() -> None:
    with pretended_device(generator=False) as counts:
        assert figures(audit(NAME, decide=True)) == figures(audit("cpu", decide=True))
        assert counts.mixed == 0


# -- a device without float64 ----------------------------------------------------------------------
WITHOUT_FLOAT64: list[Callable[[str], jacdiag.Report]] = [
    lambda device: audit(device),
    lambda device: audit(device, decide=True, remedies="first", lr=1e-3),
    lambda device: jacdiag.audit(str(CHECKPOINT), device=device, products=False),
]


@pytest.mark.parametrize("run", WITHOUT_FLOAT64, ids=["plain", "remedies", "weights"])
def test_a_device_without_float64_runs_in_float32(run: Callable[[str], jacdiag.Report]) -> None:
    with pretended_device(float64=False) as counts:
        on_device, on_cpu = run(NAME), run("cpu")
        assert counts.mixed == 0 and on_device.verdict == on_cpu.verdict
        for ours, theirs in zip(on_device.sublayers, on_cpu.sublayers, strict=True):
            if theirs.branch_norm is not None:
                assert ours.branch_norm.estimate == pytest.approx(theirs.branch_norm.estimate)


def test_float64_is_refused_where_there_is_none() -> None:
    with pretended_device(float64=False), pytest.raises(jacdiag.JacdiagError, match="no float64"):
        audit(NAME, dtype="float64")


# -- weights that are kept elsewhere ---------------------------------------------------------------
def test_weights_that_accelerate_keeps_on_the_cpu_are_audited_on_the_device(counts: Counts) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tiny().to(FIRST)
    block = model.transformer["h"][0].to("cpu")
    accelerate.cpu_offload(block, execution_device=torch.device(FIRST))

    report = jacdiag.audit(model, ids().to(FIRST))
    (note,) = report.notes
    assert note.startswith("accelerate keeps 12 tensors elsewhere")
    assert report.settings["device"] == FIRST
    assert figures(replace(report, notes=[])) == figures(audit("cpu"))
