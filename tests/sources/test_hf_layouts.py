"""Hugging Face folders as published repositories have them: other names, more weights, fewer
weights, other folders.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from sources.rig import whole
from torch import Tensor

from jacdiag.errors import SourceError
from jacdiag.sources import load
from jacdiag.sources.factory import build, build_empty, seeded

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "intermediate_size": 48,
}
GPT2: dict[str, Any] = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 96,
    "n_positions": 64,
}
VIT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 3,
}
State = dict[str, Tensor]
BUILD = f"""
import transformers as hf

def gpt2():
    return hf.GPT2LMHeadModel(hf.GPT2Config(**{GPT2!r}))

def mixtral():
    sizes = dict({SIZES!r}, num_key_value_heads=2, num_local_experts=4)
    return hf.MixtralForCausalLM(hf.MixtralConfig(**sizes))

def without_pooler():
    return hf.BertModel(hf.BertConfig(**{SIZES!r}), add_pooling_layer=False)

class Own:
    folder = "saved"

def trained():
    return hf.GPT2LMHeadModel.from_pretrained(Own.folder)
"""


def new(kind: Any, config: Any, **options: Any) -> Any:
    with seeded(3):
        model = kind(config, **options).eval()
        for parameter in model.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
    return model


def gpt2() -> Any:
    return new(hf.GPT2LMHeadModel, hf.GPT2Config(**GPT2))


def saved(
    model: Any,
    folder: Path,
    edit: Callable[[State], State] | None = None,
    *,
    as_bin: bool = False,
    **config: Any,
) -> Path:
    """Save a model, change its weights, and set fields of its config (None removes one)."""
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    state = load_file(file)
    if edit is not None:
        state = edit(state)
    if as_bin:
        file.unlink()
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(
            {name: t.contiguous() for name, t in state.items()}, file, metadata={"format": "pt"}
        )
    data = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in data.items() if v is not None})
    )
    return folder


def with_masks(state: State) -> State:
    """As GPT-2's older files have them."""
    masks = {
        f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8)
        for i in range(2)
    }
    return (
        state
        | masks
        | {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    )


def with_pooler(prefix: str) -> Callable[[State], State]:
    return lambda state: state | {f"{prefix}.pooler.dense.weight": torch.ones(32, 32)}


def legacy(state: State) -> State:
    """As bert-base-uncased has it: gamma and beta, no decoder, position_ids."""
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): t
        for name, t in state.items()
        if "predictions.decoder" not in name
    }
    return renamed | {"bert.embeddings.position_ids": torch.arange(64)[None]}


def without_prefix(state: State) -> State:
    return {
        name.removeprefix("transformer."): t
        for name, t in state.items()
        if not name.startswith("lm_head")
    }


def with_more(**tensors: Tensor) -> Callable[[State], State]:
    return lambda state: state | {name.replace("__", "."): t for name, t in tensors.items()}


BERT = hf.BertConfig(**SIZES)
# title: the model that was saved, the change, the class that the config names, what a note says (""
# for none)
CASES: dict[str, tuple[Callable[[], Any], Callable[[State], State] | None, str, str]] = {
    "GPT-2 with masks": (gpt2, with_masks, "GPT2LMHeadModel", "attn.masked_bias"),
    "GPT-2 without prefix": (gpt2, without_prefix, "GPT2LMHeadModel", ""),
    "bert-base-uncased": (
        lambda: new(hf.BertForPreTraining, BERT),
        legacy,
        "BertForMaskedLM",
        "cls.seq_relationship",
    ),
    "BERT without its heads": (
        lambda: new(hf.BertForPreTraining, BERT),
        None,
        "BertModel",
        "cls.predictions",
    ),
    "RoBERTa with a pooler": (
        lambda: new(hf.RobertaForMaskedLM, hf.RobertaConfig(**SIZES)),
        with_pooler("roberta"),
        "RobertaForMaskedLM",
        "left out, as RobertaForMaskedLM has no place for them: 1 weight "
        "(roberta.pooler.dense.weight)",
    ),
    "ALBERT with a pooler": (
        lambda: new(hf.AlbertForPreTraining, hf.AlbertConfig(**SIZES, embedding_size=16)),
        None,
        "AlbertForMaskedLM",
        "albert.pooler",
    ),
    "ViT with a pooler": (
        lambda: new(hf.ViTForImageClassification, hf.ViTConfig(**VIT)),
        with_pooler("vit"),
        "ViTForImageClassification",
        "vit.pooler",
    ),
    "Llama with rotary tables": (
        lambda: new(hf.LlamaForCausalLM, hf.LlamaConfig(**SIZES)),
        with_more(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4)),
        "LlamaForCausalLM",
        "",
    ),
    "experts that are stacked": (
        lambda: new(
            hf.MixtralForCausalLM,
            hf.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4),
        ),
        with_more(extra=torch.ones(2)),
        "MixtralForCausalLM",
        "extra",
    ),
    "positions that are computed": (
        lambda: new(
            hf.PegasusForConditionalGeneration,
            hf.PegasusConfig(
                d_model=32,
                vocab_size=96,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=48,
                decoder_ffn_dim=48,
                max_position_embeddings=64,
            ),
        ),
        lambda state: {name: t for name, t in state.items() if "embed_positions" not in name},
        "PegasusForConditionalGeneration",
        "not in the files, set by transformers: 2 weights (",
    ),
}


@pytest.mark.parametrize("as_bin", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("title", list(CASES))
def test_published_hugging_face_layouts_load_the_same_weights(
    tmp_path: Path, title: str, as_bin: bool
) -> None:
    make, edit, opened, said = CASES[title]
    folder = saved(make(), tmp_path, edit, as_bin=as_bin, architectures=[opened])
    expected = getattr(hf, opened).from_pretrained(folder, dtype=torch.float32).state_dict()

    source = load(str(folder))
    assert source.info["architecture"] == opened
    ours = whole(source).state_dict()
    assert ours.keys() == expected.keys() and all(
        torch.equal(ours[name], t) for name, t in expected.items()
    )
    about = [note for note in source.notes if note.startswith(("left out", "not in the files"))]
    assert bool(about) == bool(said) and all(said in note for note in about)


def test_a_long_list_of_leftovers_is_cut(tmp_path: Path) -> None:
    more = {f"extra{i}": torch.ones(1) for i in range(9)}
    source = load(str(saved(gpt2(), tmp_path, with_more(**more))))
    assert source.notes == [
        (
            "left out, as GPT2LMHeadModel has no place for them: 9 weights (extra0, extra1, "
            "extra2, "
            "extra3, extra4 ...)"
        )
    ]


# -- configs that do not say which model it is -----------------------------------------------------
@pytest.mark.parametrize(
    ("make", "edit", "fields", "opened", "by"),
    [
        (gpt2, None, {"model_type": None}, "GPT2LMHeadModel", "architectures (GPT2LMHeadModel)"),
        (
            gpt2,
            None,
            {"model_type": None, "architectures": None},
            "GPT2LMHeadModel",
            "the names of the weights",
        ),
        (
            gpt2,
            without_prefix,
            {"model_type": None, "architectures": None},
            "GPT2LMHeadModel",
            "the names of",
        ),
        (
            lambda: new(hf.BertForMaskedLM, BERT),
            None,
            {"model_type": None, "architectures": None},
            "BertForMaskedLM",
            "the names of the weights",
        ),
        (
            lambda: new(hf.BertForPreTraining, BERT),
            None,
            {"architectures": None},
            "BertForPreTraining",
            "",
        ),
        (lambda: new(hf.BertModel, BERT), None, {"architectures": None}, "BertModel", ""),
    ],
)
def test_the_kind_of_model_is_inferred(
    tmp_path: Path, make: Any, edit: Any, fields: dict[str, Any], opened: str, by: str
) -> None:
    source = load(str(saved(make(), tmp_path, edit, **fields)))
    assert type(source.model).__name__ == opened
    assert any(f"was inferred from {by}" in note for note in source.notes) == bool(by)


def test_the_kind_of_model_is_asked_for_by_name(tmp_path: Path) -> None:
    llama = new(hf.LlamaForCausalLM, hf.LlamaConfig(**SIZES))
    folder = saved(llama, tmp_path, model_type=None, architectures=None)
    with pytest.raises(SourceError, match="it has no model_type") as refused:
        load(str(folder))
    assert '--model-args \'{"model_type":' in str(refused.value.hint)
    found = load(str(folder), model_args={"model_type": "llama"})
    assert type(found.model) is hf.LlamaForCausalLM


def test_the_names_of_several_kinds_are_named_in_the_hint(tmp_path: Path) -> None:
    folder = saved(new(hf.BertModel, BERT), tmp_path, model_type=None, architectures=None)
    with pytest.raises(SourceError, match="may be of bert or roberta") as refused:
        load(str(folder))
    assert '{"model_type": "bert"}' in str(refused.value.hint)
    assert type(load(str(folder), model_args={"model_type": "bert"}).model) is hf.BertModel


# -- weights that do not fit, and hints that work --------------------------------------------------
@pytest.mark.parametrize(
    ("make", "fields", "got", "change"),
    [
        (gpt2, {"n_layer": 3}, "12 missing", {"n_layer": 2}),
        (gpt2, {"n_layer": 1}, "12 unexpected", {"n_layer": 2}),
        (
            lambda: new(hf.BertForMaskedLM, BERT),
            {"architectures": ["BertModel"]},
            "2 missing: pooler",
            {"architectures": ["BertForMaskedLM"]},
        ),
        (
            lambda: new(hf.BertModel, BERT),
            {"architectures": ["BertForMaskedLM"]},
            "missing: cls.",
            {"architectures": ["BertModel"]},
        ),
    ],
)
def test_a_hint_that_was_tried(
    tmp_path: Path, make: Any, fields: dict[str, Any], got: str, change: dict[str, Any]
) -> None:
    folder = saved(make(), tmp_path, **fields)
    with pytest.raises(SourceError) as refused:
        load(str(folder))
    assert got in str(refused.value.got) and json.dumps(change) in str(refused.value.hint)
    assert load(str(folder), model_args=change).model is not None


def test_a_file_without_the_pooler(tmp_path: Path) -> None:
    folder = saved(new(hf.BertModel, BERT, add_pooling_layer=False), tmp_path / "bert")
    (tmp_path / "build.py").write_text(BUILD)
    with pytest.raises(SourceError, match=r"2 missing: pooler.*") as refused:
        load(str(folder))
    assert "BertModel(config, add_pooling_layer=False)" in str(refused.value.hint)
    assert load(str(folder), model=f"{tmp_path}/build.py:without_pooler").model is not None


def test_the_config_of_another_model(tmp_path: Path) -> None:
    llama = hf.LlamaConfig(**SIZES).to_dict()
    folder = saved(gpt2(), tmp_path, **{**llama, "architectures": ["LlamaForCausalLM"]})
    with pytest.raises(SourceError, match="does not fit LlamaForCausalLM"):
        load(str(folder))


@pytest.mark.parametrize(
    "fields",
    [
        {"architectures": 5},
        {"architectures": "GPT2LMHeadModel"},
        {"architectures": [None]},
        {"model_type": ["gpt2"]},
        {"model_type": 5},
        {"auto_map": 3},
        {"quantization_config": 3},
    ],
)
def test_config_fields_of_unexpected_type(tmp_path: Path, fields: dict[str, Any]) -> None:
    folder = saved(gpt2(), tmp_path, **fields)
    try:
        assert type(load(str(folder)).model) is hf.GPT2LMHeadModel
    except SourceError as error:
        assert "transformers cannot read the config" in error.what


def test_a_number_in_a_name_is_no_number_of_layers(tmp_path: Path) -> None:
    """A model of that many layers would never be built."""
    more = {"transformer.h.99999999.x": torch.ones(1), "a." + "9" * 5000: torch.ones(1)}
    folder = saved(gpt2(), tmp_path, lambda state: state | more, n_layer=3)
    with pytest.raises(SourceError, match="12 missing") as refused:
        load(str(folder))
    assert "layers" not in str(refused.value.hint)


# -- --model with a folder or a file of it ---------------------------------------------------------
@pytest.mark.parametrize("as_bin", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("of_file", [False, True], ids=["folder", "file"])
@pytest.mark.parametrize("spec", ["build.py:gpt2", "hf:config", "hf:config/config.json"])
def test_model_with_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, of_file: bool, as_bin: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    model = gpt2()
    folder = saved(model, tmp_path / "folder", with_masks, as_bin=as_bin)
    (tmp_path / "config").mkdir()
    (folder / "config.json").rename(tmp_path / "config" / "config.json")
    (tmp_path / "build.py").write_text(BUILD)

    name = "pytorch_model.bin" if as_bin else "model.safetensors"
    source = load(f"folder/{name}" if of_file else "folder", model=spec)
    ours = whole(source).state_dict()
    assert all(torch.equal(ours[name], t) for name, t in model.state_dict().items())
    assert any("attn.masked_bias" in note for note in source.notes)
    assert source.info["factory"] == spec


def test_model_with_experts_that_are_stacked(tmp_path: Path) -> None:
    config = hf.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4)
    model = new(hf.MixtralForCausalLM, config)
    saved(model, tmp_path / "folder")
    (tmp_path / "build.py").write_text(BUILD)
    for spec in (f"{tmp_path}/build.py:mixtral", f"hf:{tmp_path}/folder"):
        ours = whole(load(str(tmp_path / "folder"), model=spec)).state_dict()
        assert all(torch.equal(ours[name], t) for name, t in model.state_dict().items())


def test_a_factory_that_loads_its_own_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(gpt2(), tmp_path / "saved")
    (tmp_path / "build.py").write_text(BUILD)
    loaded: Any = load("build.py:trained").model
    assert torch.equal(loaded.lm_head.weight, gpt2().lm_head.weight)


def test_a_config_builds_like_a_factory(tmp_path: Path) -> None:
    saved(gpt2(), tmp_path)
    assert type(build(f"hf:{tmp_path}")) is hf.GPT2LMHeadModel
    empty = build_empty(f"hf:{tmp_path}", {"n_layer": 1})
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_a_folder_without_weights_for_the_model(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds no weights for the model"):
        load(str(tmp_path), model="jacdiag.sources.gpt:build")


# -- other folders ---------------------------------------------------------------------------------
def test_the_step_of_a_trainer(tmp_path: Path) -> None:
    folder = saved(gpt2(), tmp_path)
    assert load(str(folder)).step is None
    (folder / "trainer_state.json").write_text('{"global_step": 500}')
    source = load(str(folder))
    assert source.step == 500 and source.info["step"] == 500
    (folder / "trainer_state.json").write_text('{"global_step": "many"}')
    assert load(str(folder)).step is None


def files(contents: dict[str, str]) -> Callable[[Path], None]:
    """Files by their names in the folder."""

    def write(folder: Path) -> None:
        for name, text in contents.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

    return write


def bare(*names: str) -> Callable[[Path], None]:
    """Weights without a config, next to other files."""

    def write(folder: Path) -> None:
        saved(gpt2(), folder)
        (folder / "config.json").unlink()
        for name in names:
            (folder / name).write_text("x")

    return write


def quantised(method: str, **tensors: Tensor) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        saved(gpt2(), folder, with_more(**tensors), quantization_config={"quant_method": method})

    return write


@pytest.mark.parametrize(
    ("make", "what", "hint"),
    [
        (
            files({"checkpoint-500/config.json": "{}", "checkpoint-1000/config.json": "{}"}),
            "a folder of checkpoints",
            "checkpoint-1000",
        ),
        (
            files({"config.json": '{"model_type": "gpt2"}', "checkpoint-9/config.json": "{}"}),
            "a folder of checkpoints",
            "checkpoint-9",
        ),
        (
            files(
                {
                    "adapter_config.json": '{"base_model_name_or_path": "a/b"}',
                    "adapter_model.safetensors": "x",
                }
            ),
            "PEFT adapter",
            "merge_and_unload",
        ),
        (
            bare("optimizer.bin", "scheduler.bin"),
            "a state that accelerate",
            "--model FACTORY or --model hf:CONFIG",
        ),
        (bare(), "a folder without a model", "--model FACTORY or --model hf:CONFIG"),
        (files({"model.gguf": "x", "config.json": '{"model_type": "gpt2"}'}), "GGUF", "folder"),
        (files({"model.gguf": "x"}), "GGUF", "folder"),
        (
            files({"onnx/model.onnx": "x", "config.json": '{"model_type": "gpt2"}'}),
            "ONNX",
            "PyTorch model",
        ),
        (
            files({"tf_model.h5": "x", "config.json": '{"model_type": "gpt2"}'}),
            "TensorFlow",
            "save_pretrained",
        ),
        (
            files({"latest": "global_step5", "global_step5/mp_rank_00_model_states.pt": "x"}),
            "DeepSpeed",
            "zero_to_fp32.py",
        ),
        (files({"pytorch_model_fsdp_0/.metadata": "x"}), "sharded weights", "pytorch_model_fsdp_0"),
        (
            files({"params.json": "{}", "consolidated.00.pth": "x"}),
            "authors' own layout",
            "consolidated.00.pth",
        ),
        (
            files({"snapshots/abc/config.json": "{}"}),
            "the folders inside of it have",
            "snapshots/abc",
        ),
        (
            quantised("gptq", h__qweight=torch.ones(2, 2, dtype=torch.int32)),
            "quantised",
            "dequantised",
        ),
        (quantised("fp8", h__weight_scale_inv=torch.ones(1)), "quantised", "dequantised"),
        (
            quantised("bitsandbytes", h__weight=torch.ones(2, 2, dtype=torch.int8)),
            "quantised",
            "dequantised",
        ),
    ],
)
def test_folders_that_hold_no_model(
    tmp_path: Path, make: Callable[[Path], None], what: str, hint: str
) -> None:
    make(tmp_path)
    with pytest.raises(SourceError) as refused:
        load(str(tmp_path))
    assert what in refused.value.what and hint in str(refused.value.hint)


def test_quantised_by_the_config_alone(tmp_path: Path) -> None:
    """A copy that was dequantised keeps the field in its config."""
    source = load(str(saved(gpt2(), tmp_path, quantization_config={"quant_method": "gptq"})))
    assert any(
        "quantization_config (gptq)" in note and "floating point" in note for note in source.notes
    )


def test_an_adapter_next_to_a_whole_model(tmp_path: Path) -> None:
    folder = saved(gpt2(), tmp_path)
    assert not load(str(folder)).notes
    (folder / "adapter_config.json").write_text("{}")
    assert load(str(folder)).notes == ["the folder holds an adapter too, which was not applied"]


@pytest.mark.parametrize("name", ["pytorch_model.bin.index.json", "flax_model.msgpack.index.json"])
def test_the_index_of_files_in_another_format(tmp_path: Path, name: str) -> None:
    folder = saved(gpt2(), tmp_path)
    (folder / name).write_text('{"weight_map": {"a": "not-here.bin"}}')
    assert load(str(folder)).info["files"] == ["model.safetensors"]


def test_shards_without_an_index(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors.index.json").unlink()
    assert load(str(tmp_path)).model is not None
    sorted(tmp_path.glob("model-*"))[0].unlink()
    with pytest.raises(SourceError, match="is incomplete"):
        load(str(tmp_path))
