"""SOURCE strings, end to end: what each becomes, with which model, and what the report is told."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sources.rig import BUILD, SIZES, lightning, save, tiny, weights, whole

import jacdiag
from jacdiag.errors import SourceError, UsageError
from jacdiag.sources import load

NANO = {"model_args": SIZES, "iter_num": 0, "config": {"lr": 1e-3}}
IDS = torch.arange(8)[None]


def runs_like_the_original(model: Any) -> bool:
    return torch.equal(model(IDS), tiny()(IDS))


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "_fsdp_wrapped_module.", "module._orig_mod.", "model."]
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_nanogpt_checkpoint_is_rebuilt_without_a_factory(
    tmp_path: Path, prefix: str, zipped: bool
) -> None:
    state = {prefix + name: t for name, t in weights().items()}
    path = save(
        tmp_path / "ckpt.pt", {"model": state, **NANO}, _use_new_zipfile_serialization=zipped
    )
    found = load(str(path))
    assert runs_like_the_original(found.model) and found.step == 0
    assert found.info["format"] == "nanogpt" and found.info["model_args"] == SIZES


def test_masks_of_older_nanogpt_files(tmp_path: Path) -> None:
    masks = {f"transformer.h.{k}.attn.bias": torch.ones(1, 1, 32, 32).tril() for k in range(2)}
    found = load(str(save(tmp_path / "ckpt.pt", {"model": {**weights(), **masks}, **NANO})))
    assert runs_like_the_original(found.model)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".ckpt"])
def test_a_factory_takes_the_weights(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        save_file({name: t.clone() for name, t in weights().items()}, path)
    else:
        save(
            path,
            lightning(weights())
            if suffix == ".ckpt"
            else {"model": weights(), "args": argparse.Namespace(a=1)},
        )
    found = load(str(path), model=BUILD, model_args=SIZES)
    assert runs_like_the_original(whole(found)) and found.info["factory"] == BUILD
    if suffix != ".safetensors":
        assert found.info["unread"] == ["argparse.Namespace"]
        assert any("argparse.Namespace" in note for note in found.notes)


def test_a_factory_on_the_meta_device_takes_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor of it has anything of its own; the mask buffer alone must be made."""
    (tmp_path / "b.py").write_text(
        "import torch\nfrom jacdiag.sources import gpt\n"
        "def build(**sizes):\n    with torch.device('meta'):\n        return gpt.build(**sizes)\n"
    )
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path / "w.pt", weights())
    assert runs_like_the_original(load(str(path), model="b.py:build", model_args=SIZES).model)


@pytest.mark.parametrize(
    "wrap", [lambda m: m, lambda m: {"model": m, "iter_num": 4}], ids=["bare", "in a dict"]
)
def test_a_whole_module_needs_trust(tmp_path: Path, wrap: Any) -> None:
    path = str(save(tmp_path / "m.pt", wrap(tiny())))
    careful, trusting = load(path), load(path, trust_pickle=True)
    assert careful.model is None and "--trust-pickle" in careful.why_weights
    assert runs_like_the_original(trusting.model)
    assert runs_like_the_original(load(path, model=BUILD, model_args=SIZES).model)
    assert runs_like_the_original(
        load(path, model=BUILD, model_args=SIZES, trust_pickle=True).model
    )


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model_args": {**SIZES, "colour": 1}}, "unknown size of the reference GPT: colour"),
        ({"model_args": {**SIZES, "n_head": 3}}, "n_embd must be a multiple of n_head"),
        ({"model_args": {**SIZES, "n_embd": "wide"}}, "are not nanoGPT's"),
        ({"model_args": argparse.Namespace(**SIZES)}, "not in a layout that is known"),
        ({}, "not in a layout that is known"),
    ],
)
def test_weights_without_a_model_say_why(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    found = load(str(save(tmp_path / "c.pt", {"model": weights(), **changes})))
    assert (
        found.model is None and why in found.why_weights and "--model FACTORY" in found.why_weights
    )
    assert found.state.keys() == weights().keys()


def test_model_args_that_do_not_belong_to_the_weights(tmp_path: Path) -> None:
    path = save(tmp_path / "c.pt", {"model": weights(), "model_args": {**SIZES, "n_layer": 3}})
    with pytest.raises(SourceError) as refused:
        load(str(path))
    assert "12 missing: transformer.h.2.ln_1.weight" in str(refused.value) and "--model" in (
        refused.value.hint or ""
    )


@pytest.mark.parametrize(
    ("source", "options"),
    [
        (BUILD, {"model": BUILD}),
        ("hf:config.json", {"model": BUILD}),
        ("w.pt", {"model_args": {}}),
        ("w.pt", {"model_args": {"a": 1}}),
    ],
)
def test_options_that_have_no_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, options: dict[str, Any]
) -> None:
    save(tmp_path / "w.pt", weights())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError):
        load(source, **options)


@pytest.mark.parametrize(
    "source", ["", ".", "a" * 5000, "a" * 5000 + ":f", "nothing-here", "b.pt:", ":f", "::"]
)
def test_strings_that_name_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError) as refused:
        load(source)
    assert refused.value.got or refused.value.hint


# -- the same figures from every form of one model -------------------------------------------------
def figures(source: str, **options: Any) -> list[float]:
    report = jacdiag.audit(source, batch=1, seq=8, dtype="float64", **options)
    return [row.branch_norm.estimate for row in report.sublayers if row.branch_norm]


@pytest.mark.parametrize("form", ["tied once", "views", "strided", "bf16", "fp16"])
def test_figures_do_not_depend_on_how_tensors_are_stored(tmp_path: Path, form: str) -> None:
    state = weights()
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(form)
    if low is not None:  # the reference: the same numbers, held in float32
        state = {name: t.to(low).float() for name, t in state.items()}
    reference = figures(str(save(tmp_path / "a.pt", {"model": state, **NANO})))
    if form == "tied once":
        del state["lm_head.weight"]
    elif form == "views":
        store = torch.cat([t.flatten() for t in state.values()])
        parts = store.split([t.numel() for t in state.values()])
        state = {
            name: part.view(t.shape) for (name, t), part in zip(state.items(), parts, strict=True)
        }
    elif form == "strided":
        state = {name: t.t().contiguous().t() if t.dim() == 2 else t for name, t in state.items()}
    elif low is not None:
        state = {name: t.to(low) for name, t in state.items()}
    found = figures(str(save(tmp_path / "b.pt", {"model": state, **NANO})))
    assert len(found) == 4 and found == pytest.approx(reference, rel=1e-9)
