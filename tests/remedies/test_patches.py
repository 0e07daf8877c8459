"""The patches for Hugging Face, Megatron-LM and torchtitan: run where they can be, read where they
cannot.
"""

from __future__ import annotations

import math
import re
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import jacdiag
from jacdiag.records import RemedyRecord
from jacdiag.sources.factory import seeded

GPT2 = GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=128, n_positions=32)
LLAMA = LlamaConfig(
    num_hidden_layers=2,
    hidden_size=64,
    intermediate_size=128,
    num_attention_heads=2,
    vocab_size=128,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
CONFIGS: dict[Any, Any] = {GPT2LMHeadModel: GPT2, LlamaForCausalLM: LLAMA}
IDS = torch.arange(16)[None]
OPTIONS: dict[str, Any] = {"decide": True, "select": ["JD1"]}


def remedies(model: nn.Module, **options: Any) -> dict[str, RemedyRecord]:
    return {
        r.name: r
        for r in jacdiag.audit(model, IDS, **{**OPTIONS, "remedies": "all", **options}).remedies
    }


def loud(model: nn.Module) -> set[str]:
    return {
        f.code
        for f in jacdiag.audit(model, IDS, state="init", **OPTIONS).findings
        if f.level != "info"
    }


def fresh(cls: Any, config: Any) -> Any:
    with seeded(0):
        return cls(config)


@cache
def all_remedies(cls: Any) -> dict[str, RemedyRecord]:
    """Return every remedy for a fresh model of a class, tried once for the tests that read them."""
    return remedies(fresh(cls, CONFIGS[cls]))


@pytest.mark.parametrize(("cls", "config"), CONFIGS.items())
def test_the_subclass_for_transformers_draws_models_that_pass(
    cls: Any, config: Any, tmp_path: Any
) -> None:
    found = all_remedies(cls)
    (best,) = [r for r in found.values() if r.recommended]
    namespace: dict[str, Any] = {}
    exec(best.patches["pytorch"], namespace)
    exec(best.patches["huggingface"], namespace)
    stable = namespace[f"Stable{cls.__name__}"]
    with seeded(9):
        model = stable(config).eval()
    assert loud(fresh(cls, config)) == set(best.codes) and not loud(model)
    model.save_pretrained(tmp_path)
    again = stable.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits), "what is loaded is not scaled twice"


def test_megatron_patch_gives_the_embedding_std_as_a_flag() -> None:
    found = all_remedies(LlamaForCausalLM)
    scaled = found["scaled-embed"].patches["megatron"]
    std = float(re.search(r"--embedding-init-method-std ([\d.]+) --untie-embeddings", scaled)[1])  # type: ignore[index]
    assert std == pytest.approx(0.02 * math.sqrt(64), rel=0.02), (
        "a table of that std gives the same stream"
    )
    drawn = found["std-1-embed"].patches["megatron"]
    assert "--embedding-init-method-std 1.00 --untie-embeddings-and-output-weights" in drawn
    assert "Megatron-DeepSpeed: --embed-layernorm" in found["embed-ln"].patches["megatron"]


def test_param_init_of_torchtitan_is_python_that_draws_the_std() -> None:
    found = all_remedies(LlamaForCausalLM)
    text = found["std-1-embed"].patches["torchtitan"]
    *lines, entry = text.splitlines()
    namespace: dict[str, Any] = {}
    exec("\n".join(lines), namespace)
    weight = torch.empty(256, 64)
    with seeded(1):
        eval(entry, namespace)["weight"](weight)
    assert float(weight.std()) == pytest.approx(1.0, rel=0.03) and "tok_embeddings" in text
    assert "no param_init says this: a LayerNorm" in found["embed-ln"].patches["torchtitan"]


def test_patch_notes_what_a_framework_cannot_express() -> None:
    begun = remedies(fresh(GPT2LMHeadModel, GPT2), remedies="begun")
    for dialect in ("megatron", "torchtitan"):
        assert "says this: W = gain * V" in begun["reparametrise"].patches[dialect]
        assert "a learned scalar" in begun["learned-scale"].patches[dialect]


def test_no_decay_for_the_trainer_of_transformers() -> None:
    model = fresh(LlamaForCausalLM, LLAMA)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    (remedy,) = remedies(model, optimizer=optimizer, select=["JD207"]).values()
    namespace: dict[str, Any] = {}
    exec(remedy.patches["huggingface"], namespace)
    trainer = namespace["NoDecayTrainer"].__new__(namespace["NoDecayTrainer"])
    names = trainer.get_decay_parameter_names(model)
    assert names and not any("embed" in name or "norm" in name for name in names)
