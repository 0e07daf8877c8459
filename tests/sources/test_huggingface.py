"""Hugging Face folders and configs, as transformers writes them, whole and broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from sources.rig import whole

from jacdiag.errors import SourceError
from jacdiag.sources import load
from jacdiag.sources.factory import seeded

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}
GATED = {"intermediate_size": 48, "num_key_value_heads": 2}
MODELS: dict[str, tuple[Any, Any]] = {
    "GPT-2": (
        hf.GPT2LMHeadModel,
        hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=64),
    ),
    "Llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**SIZES, **GATED)),
    "GPT-NeoX": (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig(**SIZES, intermediate_size=64)),
    "Mixtral": (hf.MixtralForCausalLM, hf.MixtralConfig(**SIZES, **GATED, num_local_experts=4)),
    "BERT": (hf.BertForMaskedLM, hf.BertConfig(**SIZES, intermediate_size=64)),
    "OLMo 2": (hf.Olmo2ForCausalLM, hf.Olmo2Config(**SIZES, **GATED, pad_token_id=0)),
}


def model(name: str = "GPT-2") -> Any:
    kind, config = MODELS[name]
    with seeded(3):
        return kind(config).eval()


def equal(found: torch.nn.Module, expected: torch.nn.Module) -> bool:
    ours, theirs = found.state_dict(), expected.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], t) for name, t in theirs.items()
    )


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("shards", ["5GB", "20KB"], ids=["one file", "sharded"])
def test_hugging_face_folder_is_loaded_whole_or_sharded(
    tmp_path: Path, name: str, shards: str
) -> None:
    saved = model(name)
    saved.save_pretrained(tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards != "5GB")
    found = load(str(tmp_path))
    assert type(found.model) is type(saved) and equal(whole(found), saved)
    assert found.info["architecture"] == type(saved).__name__ and not found.fresh


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
def test_folders_of_bin_files(tmp_path: Path, sharded: bool) -> None:
    saved = model("Llama")
    saved.config.save_pretrained(tmp_path)
    state = saved.state_dict()
    if sharded:
        names = sorted(state)
        parts = {
            "pytorch_model-00001-of-00002.bin": names[::2],
            "pytorch_model-00002-of-00002.bin": names[1::2],
        }
        for file, keys in parts.items():
            torch.save({key: state[key] for key in keys}, tmp_path / file)
        index = {
            "metadata": {"total_size": 1},
            "weight_map": {key: file for file, keys in parts.items() for key in keys},
        }
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(state, tmp_path / "pytorch_model.bin")
    assert equal(whole(load(str(tmp_path))), saved)


def test_the_precision_of_the_files_is_kept(tmp_path: Path) -> None:
    model("Llama").to(torch.bfloat16).save_pretrained(tmp_path)
    found = load(str(tmp_path)).model
    assert found is not None and {p.dtype for p in found.parameters()} == {torch.bfloat16}


def test_the_log_of_transformers_is_given_back(tmp_path: Path) -> None:
    from transformers.utils import logging

    model().save_pretrained(tmp_path)
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load(str(tmp_path))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


# -- folders that cannot be used -------------------------------------------------------------------
def without(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**data, **changes}))

    return change


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])


def evil(folder: Path) -> None:
    import os

    class Payload:
        def __reduce__(self) -> Any:
            return os.system, ("touch was-run",)

    (folder / "model.safetensors").unlink()
    torch.save({"a": Payload()}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("config.json"), "a folder without a model"),
        (without("model.safetensors"), "has a config.json but no weights"),
        (write("config.json", "{"), "cannot read"),
        (write("config.json", "[]"), "no config of transformers"),
        (write("config.json", "{}"), "has no model_type"),
        (config(model_type="never-heard-of"), "does not know model_type 'never-heard-of'"),
        (config(model_type="mine", auto_map={"AutoModel": "code.Mine"}), "brings its own code"),
        (config(n_layer=3), "12 missing: transformer.h.2."),
        (config(n_layer=1), " unexpected: transformer.h.1."),
        (config(vocab_size=90), "of another shape: "),
        (config(n_embd="wide"), "transformers cannot"),
        (cut, "truncated"),
        (evil, "`os.system`"),
    ],
)
def test_a_folder_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], said: str
) -> None:
    model().save_pretrained(tmp_path)
    change(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError) as refused:
        load(str(tmp_path))
    assert said in str(refused.value)
    assert not (tmp_path / "was-run").exists()


def test_missing_transformers_names_the_extra_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    model().save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SourceError, match=r"pip install 'jacdiag\[hf\]'"):
        load(str(tmp_path))


# -- a fresh model of a config ---------------------------------------------------------------------
@pytest.mark.parametrize("as_file", [True, False], ids=["file", "folder"])
def test_config_alone_builds_a_seeded_fresh_model(tmp_path: Path, as_file: bool) -> None:
    model("Llama").config.save_pretrained(tmp_path)
    if as_file:
        (tmp_path / "config.json").rename(tmp_path / "my config.json")
    spec = f"hf:{tmp_path / 'my config.json' if as_file else tmp_path}"
    one, same, other = (load(spec, seed=seed) for seed in (1, 1, 2))
    assert (
        one.fresh and one.model is not None and other.model is not None and same.model is not None
    )
    assert equal(one.model, same.model) and not equal(one.model, other.model)
    assert float(
        one.model.state_dict()["model.layers.0.mlp.up_proj.weight"].std()
    ) == pytest.approx(0.02, rel=0.1)


BART = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 96,
}


@pytest.mark.parametrize(
    ("config", "architectures", "name"),
    [
        (hf.BartConfig(**BART), None, "BartForConditionalGeneration"),
        (hf.BartConfig(**BART, is_encoder_decoder=False), None, "BartForCausalLM"),
        (hf.BartConfig(**BART), ["BartForCausalLM"], "BartForCausalLM"),
        (hf.BartConfig(**BART), ["BartModel"], "BartModel"),
        (
            hf.T5Config(d_model=32, d_kv=8, num_layers=1, d_ff=64),
            None,
            "T5ForConditionalGeneration",
        ),
        (hf.GPT2Config(n_embd=32, n_layer=1, n_head=4), None, "GPT2LMHeadModel"),
    ],
)
def test_an_encoder_decoder_is_built_with_both_unless_a_class_is_named(
    tmp_path: Path, config: Any, architectures: list[str] | None, name: str
) -> None:
    config.architectures = architectures
    config.save_pretrained(tmp_path)
    assert type(load(f"hf:{tmp_path}").model).__name__ == name


def test_fields_of_the_config_can_be_changed(tmp_path: Path) -> None:
    model().config.save_pretrained(tmp_path)
    found: Any = load(f"hf:{tmp_path}", model_args={"n_layer": 1}).model
    assert len(found.transformer.h) == 1


@pytest.mark.parametrize(
    ("spec", "args", "said"),
    [
        ("hf:", {}, "config"),
        ("hf:nowhere", {}, "no such config"),
        ("hf:gpt-2", {}, "no such config"),
        ("hf:some/model", {}, "no such config"),
        ("hf:empty", {}, "has no config.json"),
        ("hf:here", {"n_layers_of_mine": 2}, "has no 'n_layers_of_mine'"),
        ("hf:here", {"n_head": 5}, "transformers cannot build"),
    ],
)
def test_a_config_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, args: dict[str, Any], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    model().config.save_pretrained(tmp_path / "here")
    with pytest.raises(SourceError, match=said):
        load(spec, model_args=args)


SMALL = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 32}


def test_a_kind_of_model_is_built_with_its_default_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = load("hf:gpt2", model_args=SMALL)
    built: Any = loaded.model
    assert built.config.n_positions == hf.GPT2Config().n_positions
    assert built.config.n_layer == 1
    assert loaded.fresh
    assert "the default config of this kind of model" in loaded.notes[0]


def test_a_file_named_like_a_kind_of_model_is_read_before_the_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hf.GPT2Config(n_positions=77, **SMALL).save_pretrained(tmp_path / "gpt2")
    loaded = load("hf:gpt2")
    built: Any = loaded.model
    assert built.config.n_positions == 77
    assert loaded.notes == []


def test_a_config_of_the_hub_cache_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf.GPT2Config(n_positions=77, **SMALL).save_pretrained(tmp_path)
    asked = []

    def cached(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    loaded = load("hf:someone/a-model")
    built: Any = loaded.model
    assert built.config.n_positions == 77
    assert ("someone/a-model", "config.json") in asked
    assert "in the local Hub cache" in loaded.notes[0]


def test_a_kind_that_is_nearly_right_is_suggested() -> None:
    with pytest.raises(SourceError) as error:
        load("hf:lama")
    assert "hf:llama" in (error.value.hint or "")


def test_a_fresh_model_larger_than_the_free_memory_is_refused_before_it_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("jacdiag.sources.formats.huggingface.free_host_memory", lambda: 10_000)
    with pytest.raises(SourceError, match="does not fit into memory"):
        load("hf:gpt2", model_args=SMALL)
    monkeypatch.setattr("jacdiag.sources.formats.huggingface.free_host_memory", lambda: None)
    assert load("hf:gpt2", model_args=SMALL).model is not None
