"""Weights that stay in their files: read when asked for, kept while there is room, and every
failure named.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from jacdiag_cli.main import main
from safetensors.torch import load_file, save_file
from sources.rig import BUILD, SIZES, tiny, weights, whole
from torch import Tensor

import jacdiag
from jacdiag.errors import SourceError
from jacdiag.sources import load
from jacdiag.sources.formats import safetensors_file
from jacdiag.sources.lazy_tensors import StoredWeights

CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "tie_word_embeddings": True,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small Llama in bf16, in many shards."""
    torch.manual_seed(0)
    hf.LlamaForCausalLM(hf.LlamaConfig(**CONFIG)).to(torch.bfloat16).save_pretrained(
        tmp_path, max_shard_size="10KB"
    )
    return tmp_path


class Piece:
    """Counts its reads."""

    def __init__(self, size: int) -> None:
        self.shape, self.dtype, self.reads = (size,), torch.uint8, 0

    def read(self) -> Tensor:
        self.reads += 1
        return torch.zeros(self.shape, dtype=self.dtype)


def test_room_is_never_exceeded_and_the_last_ones_are_kept() -> None:
    pieces = {name: Piece(size) for name, size in {"a": 40, "b": 40, "c": 40, "large": 200}.items()}
    stored = StoredWeights(pieces, room=100)
    for name in "abab":
        stored[name]
    assert [pieces[n].reads for n in "ab"] == [1, 1]
    stored["c"]  # the one asked for longest ago, a, makes room
    stored["b"]
    stored["a"]
    assert [pieces[n].reads for n in "abc"] == [2, 1, 1]
    stored["large"], stored["large"]  # fits nowhere, and is not kept
    assert pieces["large"].reads == 2 and stored.read_bytes == 4 * 40 + 2 * 200


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES)
def test_spans_are_what_the_library_reads(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    saved = {"a": torch.randn(3, 5), "empty": torch.zeros(0, 4), "scalar": torch.ones(())}
    saved = {name: t.to(dtype) for name, t in saved.items()}
    save_file(saved, tmp_path / "w.safetensors", metadata={"step": "7"})
    found, metadata = safetensors_file.spans(tmp_path / "w.safetensors")
    assert metadata == {"step": "7"} and found.keys() == saved.keys()
    for name, tensor in load_file(tmp_path / "w.safetensors").items():
        assert torch.equal(found[name].read(), tensor) and found[name].dtype == tensor.dtype


def test_an_audit_from_files_is_that_of_the_model_in_memory(folder: Path) -> None:
    found = load(str(folder))
    assert found.weights is not None and found.model is not None
    assert all(p.is_meta for p in found.model.parameters())
    mine = jacdiag.audit(str(folder), seq=16)
    memory = hf.LlamaForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="eager")
    other = jacdiag.audit(memory, _random_ids(mine), state=mine.state)
    for a, b in zip(mine.sublayers, other.sublayers, strict=True):
        assert (
            a.branch_norm == b.branch_norm
            and a.core_norm == b.core_norm
            and a.residual_norm == b.residual_norm
        )
        assert a.weights == b.weights and a.shortcut_std == b.shortcut_std
    assert mine.network is not None and other.network is not None
    assert mine.network.gradient_norms == pytest.approx(other.network.gradient_norms, rel=1e-6)
    assert mine.network.end_to_end == other.network.end_to_end
    assert mine.model.parameters == other.model.parameters


def _random_ids(report: Any) -> Tensor:
    from jacdiag.sources import build_probe

    found = load(report.source["path"])
    ids = build_probe(
        found, batch=report.probe.batch, seq=report.probe.seq, seed=report.probe.seed
    ).token_ids
    assert ids is not None
    return ids


def test_experts_that_transformers_stacks_are_read_whole(tmp_path: Path) -> None:
    config = hf.MixtralConfig(**{**CONFIG, "tie_word_embeddings": False}, num_local_experts=2)
    hf.MixtralForCausalLM(config).save_pretrained(tmp_path)
    found = load(str(tmp_path))
    assert found.weights is None and any("read whole" in note for note in found.notes)


def test_a_bare_base_model_gets_the_prefix(tmp_path: Path) -> None:
    """A file of the bare model under the config of one with a head: GPT-2's first release."""
    torch.manual_seed(0)
    saved = hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=96, n_positions=64)
    )
    saved.config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {
        "architectures": ["GPT2LMHeadModel"]
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(
        {n: t.clone() for n, t in saved.transformer.state_dict().items()},
        tmp_path / "model.safetensors",
    )
    found = load(str(tmp_path))
    assert found.weights is not None and torch.equal(
        whole(found).lm_head.weight, saved.lm_head.weight
    )


# -- every failure: what, and exit code 2 ----------------------------------------------------------
def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(["audit", *args, "--seq", "8"]) == 2
    return " ".join(capsys.readouterr().err.split())


def test_missing_shard_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = sorted(folder.glob("model-*.safetensors"))[2]
    gone.unlink()
    said = refused(capsys, str(folder))
    assert "is incomplete: 1 of" in said and gone.name in said


def test_a_shard_of_the_wrong_shape(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = next(
        f
        for f in sorted(folder.glob("model-*.safetensors"))
        if any("q_proj" in k for k in load_file(f))
    )
    save_file(
        {k: t[:-1].contiguous() if "q_proj" in k else t for k, t in load_file(path).items()}, path
    )
    said = refused(capsys, str(folder))
    assert (
        "does not fit LlamaForCausalLM" in said
        and "q_proj.weight 31x32, the model has 32x32" in said
    )


def test_an_index_that_leads_elsewhere(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    first = next(iter(data["weight_map"]))
    data["weight_map"][first] = "../elsewhere.safetensors"
    index.write_text(json.dumps(data))
    assert "names a file outside its folder" in refused(capsys, str(folder))
    index.write_text("[]")
    assert "cannot read" in refused(capsys, str(folder))


def test_a_disk_that_fails_on_the_way(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: Iterator[int] = iter(range(10**6))
    good = os.preadv

    def failing(*args: Any) -> int:
        if next(reads) > 12:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return good(*args)

    monkeypatch.setattr(os, "preadv", failing)
    said = refused(capsys, str(folder), "--json", str(folder / "out.json"))
    assert "reading" in said and ".safetensors' failed" in said and "Input/output error" in said
    assert not list(folder.glob("*out.json*"))


def test_a_file_that_shrinks_on_the_way(folder: Path) -> None:
    found = load(str(folder))
    assert found.weights is not None
    name = next(n for n in found.weights if "layers.2" in n and "down_proj" in n)
    path = found.weights.pieces[name].path  # type: ignore[attr-defined]
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(SourceError, match="become shorter") as caught:
        jacdiag.sites(found.model, torch.zeros(1, 4, dtype=torch.long), weights=found.weights)
    assert path.name in caught.value.what


# -- one .safetensors, and the module that it belongs to -------------------------------------------
def test_a_file_and_a_factory(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({name: t.clone() for name, t in weights().items()}, path)
    found = load(str(path), model=BUILD, model_args=SIZES)
    assert (
        found.weights is not None
        and found.model is not None
        and all(p.is_meta for p in found.model.parameters())
    )
    ids = torch.arange(8)[None]
    plain, mine = jacdiag.sites(tiny(), ids), jacdiag.sites(found.model, ids, weights=found.weights)
    assert all(torch.equal(a.value, b.value) for a, b in zip(plain, mine, strict=True))


@pytest.mark.parametrize(
    "body",
    [
        "    with torch.device('meta'):\n        return gpt.build(**sizes)\n",
        "    model = gpt.build(**sizes)\n    assert float(model.transformer.wte.weight.std()) > "
        "0\n    return model\n",
    ],
    ids=["all on the meta device", "looks at its numbers"],
)
def test_factories_that_build_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    (tmp_path / "b.py").write_text(
        f"import torch\nfrom jacdiag.sources import gpt\ndef build(**sizes):\n{body}"
    )
    monkeypatch.chdir(tmp_path)
    save_file({name: t.clone() for name, t in weights().items()}, tmp_path / "w.safetensors")
    found = load("w.safetensors", model="b.py:build", model_args=SIZES)
    assert found.weights is not None and torch.equal(
        whole(found)(torch.arange(8)[None]), tiny()(torch.arange(8)[None])
    )


def test_a_tie_that_the_file_breaks(tmp_path: Path) -> None:
    state = {name: t.clone() for name, t in weights().items()}
    state["lm_head.weight"] = state["transformer.wte.weight"] + 1
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(SourceError, match="are one parameter in the model, but differ"):
        load(str(tmp_path / "w.safetensors"), model=BUILD, model_args=SIZES)
