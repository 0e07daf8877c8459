"""Whole audits of real models: transformers' own, saved as folders; the paper's recipes; the
checkpoints that ship.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf

import jacdiag
from jacdiag.rules import evaluate
from jacdiag.rules.thresholds import load_thresholds
from jacdiag.sources import gpt
from jacdiag.sources.factory import seeded

EXAMPLES = Path(__file__).parent.parent / "examples" / "checkpoints"
TOL = 0.2  # the intervals of most norms need not be narrower to be judged
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
LONG = {**SIZES, "max_position_embeddings": 64}
GATED = {"intermediate_size": 128, "num_key_value_heads": 2}

CAUSAL = {
    "GPT-2": hf.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=64),
    "Llama": hf.LlamaConfig(**LONG, **GATED),
    "Qwen3": hf.Qwen3Config(**LONG, **GATED, head_dim=16),
    "OLMo 2": hf.Olmo2Config(**LONG, **GATED, pad_token_id=0),
    "GPT-NeoX": hf.GPTNeoXConfig(**LONG, intermediate_size=256),
    "Mixtral": hf.MixtralConfig(**LONG, **GATED, num_local_experts=4),
    "BLOOM": hf.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=96),
    "OPT": hf.OPTConfig(**LONG, ffn_dim=128, word_embed_proj_dim=64),
}
OTHERS = {
    "T5": (
        hf.T5ForConditionalGeneration,
        hf.T5Config(
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            vocab_size=96,
            decoder_start_token_id=0,
        ),
    ),
    "BERT": (hf.BertForMaskedLM, hf.BertConfig(**LONG, intermediate_size=128)),
}
EXPECTED = {  # sub-layers, placement
    "GPT-2": (4, "pre"),
    "Llama": (4, "pre"),
    "Qwen3": (4, "pre"),
    "OLMo 2": (4, "reordered"),
    "GPT-NeoX": (4, "pre"),
    "Mixtral": (4, "pre"),
    "BLOOM": (4, "pre"),
    "OPT": (4, "pre"),
    "T5": (10, "pre"),
    "BERT": (4, "post"),
}


def build(name: str) -> torch.nn.Module:
    with seeded(0):
        if name in OTHERS:
            kind, config = OTHERS[name]
            return kind(config).eval()
        return hf.AutoModelForCausalLM.from_config(CAUSAL[name], attn_implementation="eager").eval()


# One decoder for each kind of norm, router or shortcut; the others are long.
LIKE_OTHERS = ("Llama", "GPT-NeoX", "BLOOM", "OPT")
FAMILIES = [
    pytest.param(name, marks=pytest.mark.long) if name in LIKE_OTHERS else name for name in EXPECTED
]


@pytest.mark.parametrize("name", FAMILIES)
def test_default_inits_get_no_error(name: str) -> None:
    report = jacdiag.audit(build(name), batch=2, seq=16, tol=TOL)
    count, placement = EXPECTED[name]
    assert len(report.sublayers) == count
    assert {row.placement for row in report.sublayers} == {placement}
    assert report.state == "init"
    assert report.verdict in ("pass", "warn") and not [
        f for f in report.findings if f.level == "error"
    ]
    assert all(row.branch_norm.converged for row in report.sublayers)
    assert report.network.end_to_end.converged and report.network.gradient_norms


# A decoder, one with experts and an encoder; the other decoders are long.
LONG_FOLDERS = [
    pytest.param(name, marks=pytest.mark.long) for name in ("Llama", "GPT-NeoX", "OLMo 2")
]
FOLDERS = ["GPT-2", "Mixtral", "BERT", *LONG_FOLDERS]


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_are_audited_like_the_model_in_memory(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path)
    options = {"batch": 1, "seq": 12, "dtype": "float64", "tol": TOL}
    saved, live = jacdiag.audit(str(tmp_path), **options), jacdiag.audit(model, **options)
    assert saved.source["format"] == "huggingface" and saved.state == "init"
    for a, b in zip(saved.sublayers, live.sublayers, strict=True):
        assert a.name == b.name
        assert a.branch_norm.estimate == pytest.approx(b.branch_norm.estimate, rel=1e-6)
    assert saved.model.uncovered == live.model.uncovered == []


@pytest.mark.parametrize(
    ("recipe", "fires", "small", "large"),
    [
        ("vanilla", {"JD102"}, "met", "not met"),
        pytest.param("embed-detach", {"JD102"}, "met", "not met", marks=pytest.mark.long),
        ("xavier", {"JD101", "JD102"}, "not met", "not met"),
        pytest.param("embed-ln", set(), "met", "met", marks=pytest.mark.long),
        ("scaled-embed", set(), "met", "met"),
    ],
)
def test_the_recipes_of_the_paper(recipe: str, fires: set[str], small: str, large: str) -> None:
    sizes = {"n_layer": 6, "n_embd": 128, "n_head": 4, "vocab_size": 256, "block_size": 32}
    with seeded(3):
        model = gpt.build(recipe, **sizes)
    report = jacdiag.audit(model, batch=1, tol=TOL)
    warned = {f.code for f in report.findings if f.level == "warning"}
    assert warned & {"JD101", "JD102"} == fires
    assert (report.conditions.small_sublayers, report.conditions.large_shortcut) == (small, large)
    assert report.verdict == ("warn" if fires else "pass")
    # The profile changes how the rules judge the same measurement.
    strict = evaluate(report, thresholds=load_thresholds(), profile="paper")
    assert strict.verdict == ("fail" if fires else "pass")


@pytest.mark.parametrize("name", ["vanilla", "scaled-embed"])
def test_shipped_checkpoints_have_the_documented_verdicts(name: str) -> None:
    fresh = jacdiag.audit(str(EXAMPLES / f"{name}-step0.pt"), batch=1, tol=TOL)
    assert (
        fresh.state == "init" and fresh.source["format"] == "nanogpt" and fresh.source["step"] == 0
    )
    assert fresh.conditions.large_shortcut == ("met" if name == "scaled-embed" else "not met")
    options = {"batch": 1, "tol": TOL, "tokens": str(EXAMPLES / "sample.txt")}
    trained = jacdiag.audit(str(EXAMPLES / f"{name}-trained.pt"), **options)
    assert trained.state == "trained" and not trained.probe.off_distribution
    assert {f.level for f in trained.findings} <= {"info"}
    assert all(row.bound is None and "trained" in row.notes["bound"] for row in trained.sublayers)


def test_a_trained_model_on_random_tokens_says_so() -> None:
    report = jacdiag.audit(str(EXAMPLES / "vanilla-trained.pt"), batch=1, tol=TOL)
    assert report.probe.off_distribution
    assert not [f for f in report.findings if f.level == "error"]


def test_a_profile_that_asks_for_errors_gets_them_in_any_state() -> None:
    report = jacdiag.audit(str(EXAMPLES / "vanilla-trained.pt"), batch=1, tol=TOL, profile="paper")
    assert report.conditions.small_sublayers == "not met"
    assert {f.code for f in report.findings if f.level == "error"} == {"JD101"}
