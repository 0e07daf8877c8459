"""`jacdiag diff`: one model under several names is the same model; a mutant parts where it was
changed.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jacdiag_cli.main import main
from render import synthetic
from torch import Tensor

import jacdiag
from benchmarks._families import CONFIGS, Subject, family, recipe
from jacdiag.comparison import compare
from jacdiag.measure.roles_by_name import read_names
from jacdiag.trace.discovery.weight_roles import uses_of


def audit(subject: Subject, **options: Any) -> Any:
    return jacdiag.audit(subject.model, subject.probe, **options)


def weights_only(tmp_path: Path, name: str, state: dict[str, Tensor]) -> Any:
    torch.save(state, tmp_path / name)
    return jacdiag.audit(str(tmp_path / name), state="init")


def as_megatron(state: dict[str, Tensor], core: bool) -> dict[str, Tensor]:
    """The reference GPT's weights under Megatron-LM's names: of its core, or of before."""
    words = {
        "transformer.wte": ("embedding.word_embeddings", "embedding.word_embeddings"),
        "transformer.wpe": ("embedding.position_embeddings", "embedding.position_embeddings"),
        "transformer.h.": ("decoder.layers.", "encoder.layers."),
        "attn.c_attn": ("self_attention.linear_qkv", "self_attention.query_key_value"),
        "attn.c_proj": ("self_attention.linear_proj", "self_attention.dense"),
        "mlp.c_fc": ("mlp.linear_fc1", "mlp.dense_h_to_4h"),
        "mlp.c_proj": ("mlp.linear_fc2", "mlp.dense_4h_to_h"),
        "ln_1": ("input_layernorm", "input_layernorm"),
        "ln_2": ("pre_mlp_layernorm", "post_attention_layernorm"),
        "transformer.ln_f": ("decoder.final_layernorm", "encoder.final_layernorm"),
    }
    made = {}
    for name, tensor in state.items():
        if not name.startswith("lm_head"):
            for old, new in words.items():
                name = name.replace(old, new[0] if core else new[1])
            made[name] = tensor
    return made


def hugging_face_twin(model: torch.nn.Module) -> Subject:
    """transformers' GPT-2 with the weights of the reference GPT: other names, its matrices the
    other way round.
    """
    twin = family("gpt2", 0)
    ours = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in twin.model.named_parameters():
            w = ours[name]
            p.copy_(
                w[: p.shape[0]] if "wpe" in name else w.T if p.dim() == 2 and ".h." in name else w
            )
    return twin


def test_transformers_and_nanogpt_names() -> None:
    ours = recipe("gpt2", 0)
    twin = hugging_face_twin(ours.model)
    ids = torch.randint(0, 256, (1, 16))
    a = jacdiag.audit(ours.model, ids)
    b = jacdiag.audit(twin.model, {"input_ids": ids})
    found = compare(a, b)
    assert found.first is None and len(found.pairs) == 4 * 4 + 8 * 4 + 2
    assert {p.part for p in found.pairs} == {
        "embedding",
        "positions",
        "W_QKV",
        "W_O",
        "W_1",
        "W_2",
        "attention",
        "mlp",
    }


@pytest.mark.parametrize("core", [True, False])
def test_diff_matches_megatron_names(tmp_path: Path, core: bool) -> None:
    model = recipe("gpt2", 0)
    state = {k: v.detach().clone() for k, v in model.model.named_parameters()}
    renamed = as_megatron(state, core)
    found = compare(audit(model, products=False), weights_only(tmp_path, "m.pt", renamed))
    assert found.first is None and len(found.pairs) == 18
    key = (
        "decoder.layers.2.mlp.linear_fc2.weight"
        if core
        else "encoder.layers.2.mlp.dense_4h_to_h.weight"
    )
    renamed[key] = renamed[key] * math.sqrt(8)
    found = compare(audit(model, products=False), weights_only(tmp_path, "m.pt", renamed))
    assert [(p.depth, p.part, p.a, p.b) for p in found.parted] == [
        (2, "W_2", "transformer.h.2.mlp.c_proj.weight", key)
    ]


def test_diff_matches_fused_with_separate_projections(tmp_path: Path) -> None:
    subject = family("llama", 0)
    fused = {}
    for name, w in subject.model.named_parameters():
        fused[name] = w.detach()
    for layer in range(4):
        stem = f"model.layers.{layer}"
        parts = [fused.pop(f"{stem}.self_attn.{x}_proj.weight") for x in "qkv"]
        fused[f"{stem}.self_attn.qkv_proj.weight"] = torch.cat(parts)
        both = [fused.pop(f"{stem}.mlp.{x}_proj.weight") for x in ("gate", "up")]
        fused[f"{stem}.mlp.gate_up_proj.weight"] = torch.cat(both)
    found = compare(audit(subject, products=False), weights_only(tmp_path, "f.pt", fused))
    assert found.first is None
    assert {p.part for p in found.pairs} == {
        "embedding",
        "W_QKV",
        "W_O",
        "W_gate_up",
        "W_2",
        "head",
    }


def test_diff_names_the_changed_weights() -> None:
    a, b = recipe("scaled-embed", 0), recipe("scaled-embed", 0)
    assert (
        compare(audit(a, products=False), audit(recipe("scaled-embed", 1), products=False)).first
        is None
    )
    with torch.no_grad():
        b.model.get_parameter("transformer.h.1.attn.c_proj.weight").mul_(3)
    first = compare(audit(a, tol=0.3), audit(b, tol=0.3)).first
    assert first is not None and (first.depth, first.part, first.figure) == (1, "W_O", "std")
    assert first.ratio == pytest.approx(3, rel=0.1)


def test_diff_lists_missing_layers() -> None:
    found = compare(
        audit(recipe("gpt2", 0), products=False), audit(recipe("gpt2", 0, layers=3), products=False)
    )
    missing = [p for p in found.parted if p.new is None]
    assert {p.depth for p in missing} == {3} and {p.b for p in missing} == {""}


def test_sub_layers_without_a_norm_are_named() -> None:
    whole = synthetic.clean(4)
    rows = [replace(row, branch_norm=None) for row in whole.sublayers]
    partly = replace(whole, sublayers=[*rows[:4], *whole.sublayers[4:]])
    assert compare(whole, whole).notes == ()
    assert compare(whole, partly).notes == (
        "not compared: branch norm of transformer.h.0.attn, transformer.h.0.mlp, "
        "transformer.h.1.attn and 1 more, not measured in B",
    )
    assert len(compare(partly, partly).notes) == 2

    # Of weights alone nothing was to be measured.
    assert compare(whole, replace(whole, sublayers=rows)).notes == ()


@pytest.mark.parametrize("name", CONFIGS)
def test_diff_by_names_equals_diff_by_dataflow(name: str) -> None:
    subject = family(name, 0)
    uses = uses_of(jacdiag.sites(subject.model, **subject.probe))
    named = read_names({name: tuple(p.shape) for name, p in subject.model.named_parameters()})
    wrong = {}
    for parameter, use in uses.items():
        said = named.weights[parameter]
        if said.role != use.role or (
            use.fan_in != use.fan_out and use.fan_in and said.fan_in != use.fan_in
        ):
            wrong[parameter] = (use, said)
    assert not wrong


@pytest.mark.check("comparison", "jacdiag diff")
def test_diff_command_exit_code_and_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 64, "block_size": 16}
    build = "jacdiag.sources.gpt:build"
    for recipe_name in ("gpt2", "xavier"):
        report = jacdiag.audit(build, model_args={"recipe": recipe_name, **sizes}, batch=1, seq=8)
        (tmp_path / f"{recipe_name}.json").write_text(report.to_json())
    assert main(["diff", "gpt2.json", "gpt2.json"]) == 0
    assert "differs beyond its interval" in capsys.readouterr().out
    assert main(["diff", "gpt2.json", "xavier.json"]) == 1
    assert "they differ first" in capsys.readouterr().out
    assert main(["diff", "gpt2.json", "xavier.json", "--format", "json"]) == 1
    assert json.loads(capsys.readouterr().out)["first"]["parts"] is True
    assert main(["diff", "gpt2.json", "xavier.json", "--format", "markdown"]) == 1
    assert capsys.readouterr().out.startswith("**they differ first")
    longer = jacdiag.audit(build, model_args={"recipe": "gpt2", **sizes}, batch=1, seq=16, seed=3)
    (tmp_path / "longer.json").write_text(longer.to_json())
    weights = [p for p in compare(longer, longer).pairs if p.figure == "std"]
    assert weights and compare(longer, longer).notes == ()
    for form, start in (
        ("pretty", "\nnote: "),
        ("markdown", "\nNote: "),
        ("json", '"notes": [\n    "'),
    ):
        main(["diff", "gpt2.json", "longer.json", "--format", form])
        out = capsys.readouterr().out
        assert (
            f"{start}the probes differ" in out
            and "1 x 8 random tokens, float32, seed 0 of A" in out
        )
    for text in ("{", "[]", '{"schema_version": null}', '{"schema_version": 1}', "[" * 99_999):
        (tmp_path / "bad.json").write_text(text)
        assert main(["diff", "gpt2.json", "bad.json"]) == 2
        assert "is no report" in capsys.readouterr().err
    (tmp_path / "newer.json").write_text('{"schema_version": 7}')
    assert main(["diff", "gpt2.json", "newer.json"]) == 2
    assert "written by a newer jacdiag" in capsys.readouterr().err
