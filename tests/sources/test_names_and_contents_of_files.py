"""Files whose name says something else than their content, and what a failed download leaves."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from sources.rig import BUILD, SIZES, same, save, weights

from jacdiag.errors import SourceError
from jacdiag.records.report import Report
from jacdiag.records.run_log import read_run
from jacdiag.sources import load
from jacdiag.sources.checkpoint import open_checkpoint
from jacdiag.sources.flight import read_flight

DEEP = "[" * 100_000
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
NOT_UTF8 = os.fsdecode(b"w\xff")
GPT2: dict[str, Any] = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 96,
    "n_positions": 64,
}


def separate() -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in weights().items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of transformers with a small GPT-2."""
    hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


# -- the content decides ---------------------------------------------------------------------------
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "name", ["best.pth.tar", "m.pkl", "m.h5", "m.ts", "m.zip", "m", "m.PT", "m.safetensors"]
)
def test_a_file_of_torch_save_is_read_under_any_name(
    tmp_path: Path, name: str, zipped: bool
) -> None:
    path = save(tmp_path / name, weights(), _use_new_zipfile_serialization=zipped)
    assert same(open_checkpoint(path).state, weights())


@pytest.mark.parametrize("name", ["m.pt", "pytorch_model.bin", "m.gz", "m.SAFETENSORS"])
def test_safetensors_are_read_under_any_name(tmp_path: Path, name: str) -> None:
    save_file(separate(), tmp_path / name)
    assert same(open_checkpoint(tmp_path / name).state, separate())


@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_a_name_that_is_no_utf8(tmp_path: Path, kind: str) -> None:
    if kind == "torch":
        path = tmp_path / f"{NOT_UTF8}.pt"
        save(tmp_path / "w.pt", weights()).replace(path)
    else:
        save_file(separate(), tmp_path / "w.safetensors")
        path = tmp_path / f"{NOT_UTF8}.safetensors"
        (tmp_path / "w.safetensors").replace(path)
    assert same(open_checkpoint(path).state, separate())
    assert load(str(path), model=BUILD, model_args=SIZES).model is not None


@pytest.mark.parametrize("name", ["w.tar.gz", "w.zip", "w.tar"])
def test_archives_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x1f\x8b\x08" + bytes(99))
    with pytest.raises(SourceError, match="compressed file or an archive") as caught:
        load(str(tmp_path / name))
    assert "unpack it" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["m.pt2", "m.pt"])
def test_a_program_of_torch_export_and_its_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    program = torch.export.export(torch.nn.Linear(3, 3), (torch.zeros(2, 3),))
    torch.export.save(program, "program.pt2")
    Path("program.pt2").replace(name)
    with pytest.raises(SourceError, match=r"torch\.export") as caught:
        load(name)
    # The hint is code.
    if name == "m.pt2":
        exec(str(caught.value.hint).partition(", then")[0], {"torch": torch})
        assert set(open_checkpoint(Path("weights.pt")).state) == {"weight", "bias"}


# -- what a download leaves ------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors", "w.bin", "w"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (LFS, "Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>log in</html>", "a web page"),
        (b"<HTML><body>404</body>", "a web page"),
    ],
)
def test_notes_in_place_of_a_file(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=said):
        load(str(tmp_path / name))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_pointers_in_a_folder(folder: Path, name: str) -> None:
    (folder / name).write_bytes(LFS)
    with pytest.raises(SourceError, match="Git LFS pointer"):
        load(folder)


def test_weights_that_are_a_link_to_nothing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../blobs/0123")
    with pytest.raises(SourceError, match="link to a file that is not there") as caught:
        load(folder)
    assert "leads to ../blobs/0123" in str(caught.value.got)
    with pytest.raises(SourceError, match="no such file") as caught:
        load(folder / "model.safetensors")
    assert "it is a link to '../blobs/0123'" in str(caught.value.hint)


@pytest.mark.parametrize(
    "name", ["diffusion_pytorch_model.safetensors", "final.safetensors", "model.pt"]
)
def test_weights_under_another_name_and_the_hint(folder: Path, name: str) -> None:
    (folder / "model.safetensors").replace(folder / "w.safetensors")
    if name.endswith(".pt"):
        torch.save(load(str(folder / "w.safetensors")).state, folder / name)
        (folder / "w.safetensors").unlink()
    else:
        (folder / "w.safetensors").replace(folder / name)
    (folder / "training_args.bin").write_bytes(b"x")

    with pytest.raises(SourceError, match="not under a usual name") as caught:
        load(folder)
    assert caught.value.got == name

    # What the hint says works.
    file, model = str(caught.value.hint).split(" --model ")
    assert load(file, model=model).model is not None


def test_a_folder_without_weights_is_still_one(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "training_args.bin").write_bytes(b"x")
    with pytest.raises(SourceError, match="but no weights"):
        load(folder)


def test_a_name_of_the_hub_and_what_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError) as caught:
        load("openai-community/gpt2")
    assert "hf download openai-community/gpt2 --local-dir" in str(caught.value.hint)

    # a folder that is there is none of the Hub's
    (tmp_path / "runs").mkdir()
    for name in ("runs/gpt2", "gpt2", "/a/b", "a/b/c"):
        with pytest.raises(SourceError) as caught:
            load(name)
        assert "hf download" not in str(caught.value.hint)


# -- JSON ------------------------------------------------------------------------------------------
def test_a_byte_order_mark_in_a_config(folder: Path) -> None:
    config = folder / "config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    assert load(folder).model is not None


def test_brackets_without_end_are_no_bug(tmp_path: Path, folder: Path) -> None:
    readers: list[tuple[str, Callable[[Path], Any]]] = [
        ("config.json", lambda file: load(file.parent)),
        ("model.safetensors.index.json", lambda file: load(file.parent)),
        ("about.json", lambda file: read_flight(file.parent)),
        ("run.jsonl", lambda file: read_run(file)),
    ]
    (folder / "model.safetensors").unlink()
    for name, read in readers:
        (folder / name).write_text(DEEP + "\n")
        with pytest.raises(SourceError):
            read(folder / name)
        (folder / name).unlink()
        hf.GPT2Config(**GPT2).save_pretrained(folder)
    with pytest.raises(ValueError, match="too deep"):
        Report.from_json(DEEP)


def test_layers_without_end(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_layer": 10**12}))
    with pytest.raises(SourceError, match="not that of its weights") as caught:
        load(folder)
    assert "1,000,000,000,000 layers" in str(caught.value.got)


def test_a_kind_that_is_unknown_with_a_class_that_is_known(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "our-gpt"}))
    with pytest.raises(SourceError, match="does not know model_type 'our-gpt'") as caught:
        load(folder)
    assert """--model-args '{"model_type": "gpt2"}'""" in str(caught.value.hint)
    assert load(folder, model_args={"model_type": "gpt2"}).model is not None

    # Of a class that is not known, nothing can be said.
    config |= {"model_type": "our-gpt", "architectures": ["OurGPT"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError) as caught:
        load(folder)
    assert "model-args" not in str(caught.value.hint)


# -- numbers ---------------------------------------------------------------------------------------
def test_arrays_of_numpy_are_weights(tmp_path: Path) -> None:
    arrays = {name: tensor.numpy() for name, tensor in weights().items()}
    assert same(open_checkpoint(save(tmp_path / "w.pt", arrays)).state, weights())

    # Big-endian numbers are the same ones.
    swapped = {name: array.astype(">f4") for name, array in arrays.items()}
    path = save(tmp_path / "s.pt", {"params": swapped, "losses": np.ones(9)})
    assert same(open_checkpoint(path).state, weights())


def test_arrays_that_are_no_weights(tmp_path: Path) -> None:
    held = {"losses": np.ones(9), "state": np.zeros((3, 3), dtype=object), "seed": np.zeros(3, int)}
    with pytest.raises(SourceError, match="holds no weights"):
        open_checkpoint(save(tmp_path / "w.pt", held))


def test_complex_numbers_are_not_called_quantised(tmp_path: Path) -> None:
    complex_weights = {name: tensor.to(torch.complex64) for name, tensor in weights().items()}
    path = save(tmp_path / "c.pt", complex_weights)
    with pytest.raises(SourceError, match="holds complex numbers"):
        load(str(path))
    with pytest.raises(SourceError, match="complex numbers, those of the model are real"):
        load(str(path), model=BUILD, model_args=SIZES)

    # A table of rotations next to real weights is no reason.
    table = {"freqs_cis": torch.zeros(4, 2, dtype=torch.complex64)}
    assert load(str(save(tmp_path / "t.pt", {**weights(), **table}))).state


def test_integers_alone(tmp_path: Path) -> None:
    packed = {name: torch.zeros(4, 4, dtype=torch.uint8) for name in weights()}
    with pytest.raises(SourceError, match="no weights in floating point") as caught:
        open_checkpoint(save(tmp_path / "p.pt", packed))
    assert "packed weights" in str(caught.value.hint)

    state = {"cpu": torch.zeros(9, dtype=torch.uint8)}
    with pytest.raises(SourceError, match="holds no weights") as caught:
        open_checkpoint(save(tmp_path / "rng.pt", state))
    assert "packed" not in str(caught.value.hint)


@pytest.mark.parametrize("kind", [torch.float8_e5m2, torch.float8_e4m3fn])
def test_vectors_of_eight_bits(tmp_path: Path, kind: torch.dtype) -> None:
    path = save(tmp_path / "v.pt", {"norm.weight": torch.ones(8).to(kind)})
    with pytest.raises(SourceError, match="quantised weights"):
        open_checkpoint(path)


def test_packed_weights_without_scales_are_known_by_name(tmp_path: Path) -> None:
    held = {f"h.{i}.qweight": torch.zeros(4, 4, dtype=torch.int32) for i in range(2)}
    with pytest.raises(SourceError, match="GPTQ or AWQ"):
        open_checkpoint(save(tmp_path / "q.pt", held))


# -- adapters --------------------------------------------------------------------------------------
ADAPTERS = {
    "kohya": ["lora_unet_mid_{}.lora_up.weight", "lora_unet_mid_{}.alpha"],
    "diffusers": ["unet.mid.{}.processor.to_q_lora.up.weight", "unet.mid.{}.to_k_lora.down.weight"],
    "LoHa": ["base_model.model.h.{}.q.hada_w1_a", "base_model.model.h.{}.q.hada_w2_b"],
    "LoKr": ["base_model.model.h.{}.q.lokr_w1", "base_model.model.h.{}.q.lokr_w2_a"],
    "IA3": ["base_model.model.h.{}.k.ia3_l"],
    "VeRA": ["base_model.model.h.{}.k.vera_lambda_b", "base_model.model.h.{}.k.vera_lambda_d"],
    "prompt": ["prompt_embeddings.{}"],
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_of_every_kind(tmp_path: Path, kind: str) -> None:
    names = [name.format(i) for i in range(3) for name in ADAPTERS[kind]]
    with pytest.raises(SourceError, match="adapter, which changes a base model") as caught:
        open_checkpoint(save(tmp_path / "a.pt", {name: torch.ones(4, 2) for name in names}))
    is_lora = kind in ("kohya", "diffusers")
    assert ("a LoRA adapter" in str(caught.value)) == is_lora
    assert ("fuse_lora" in str(caught.value.hint)) == is_lora


def test_names_with_such_words_in_them_are_no_adapters(tmp_path: Path) -> None:
    held = {f"h.{i}.{part}.weight": torch.ones(4, 4) for i in range(2) for part in ("up", "alpha")}
    assert same(open_checkpoint(save(tmp_path / "w.pt", held)).state, held)
