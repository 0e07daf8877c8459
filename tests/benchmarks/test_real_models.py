"""The benchmark of trained models: its list and its references, on tiny models."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import jacdiag

ROOT = Path(__file__).parents[2]
DATA = ROOT / "benchmarks" / "_real_models"

# Only while it is imported: the folder holds modules that are called as folders of tests are.
sys.path.insert(0, str(ROOT / "benchmarks"))
try:
    from _real_models import page, reference
    from _real_models.branches import BUILDERS
finally:
    sys.path.remove(str(ROOT / "benchmarks"))

TABLE = tomllib.loads((DATA / "models.toml").read_text())
TOKENS = torch.tensor([[3, 7, 1, 9, 4]])


@pytest.mark.parametrize("entry", TABLE["models"], ids=lambda entry: entry["name"])
def test_every_entry_of_the_list_is_complete(entry: dict[str, Any]) -> None:
    assert entry["package"] in TABLE["packages"]
    assert entry["architecture"] in BUILDERS
    assert len(set(entry["references"])) == 3
    assert max(entry["references"]) < entry["sublayers"]
    for key in ("factory", "inputs"):
        if key in entry:
            file, function = entry[key].split(":")
            assert f"def {function}(" in (DATA / file).read_text()
    assert ("inputs" in entry) != ("tokens" in entry)


def test_every_package_is_pinned_by_its_hash() -> None:
    for pin in TABLE["packages"].values():
        assert len(pin["sha256"]) == 64
        assert pin["version"]


def test_make_bench_leaves_the_downloads_out() -> None:
    command = ["make", "-n", "bench"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    printed = result.stdout
    assert "benchmarks/audit.py" in printed
    assert "real_models.py" not in printed


def tiny_transformers(name: str) -> nn.Module:
    """Build the body of a model of transformers with random weights."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    inner = {"intermediate_size": 12, "max_position_embeddings": 16}
    if name == "bert":
        config = transformers.BertConfig(**sizes, **inner)
        model = transformers.BertModel(config)
    elif name == "albert":
        config = transformers.AlbertConfig(**sizes, **inner, embedding_size=6)
        model = transformers.AlbertModel(config)
    else:
        config = transformers.GPT2Config(
            vocab_size=16, n_embd=8, n_layer=2, n_head=2, n_positions=16
        )
        model = transformers.GPT2Model(config)
    model.set_attn_implementation("eager")
    return model


def tiny_roberta() -> nn.Module:
    """Build fairseq's RoBERTa with random weights."""
    from _real_models.fairseq_roberta import Roberta

    return Roberta(vocabulary=16, positions=16, layers=2, width=8, inner=12, heads=2)


ARCHITECTURES = ["albert", "bert", "fairseq_roberta", "gpt2", "torch_encoder"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_references_lie_in_the_intervals_of_an_audit(architecture: str) -> None:
    torch.manual_seed(0)
    probe = TOKENS
    if architecture == "fairseq_roberta":
        model = tiny_roberta()
    elif architecture == "torch_encoder":
        model = reference.call_factory("sceptr_bert.py:build")
        probe = reference.call_factory("sceptr_bert.py:inputs")
    else:
        model = tiny_transformers(architecture)
    model = model.double().eval()

    report = jacdiag.audit(model, probe, dtype="float64", decide=False, remedies="none")
    for index, sublayer in enumerate(report.sublayers):
        branch = BUILDERS[architecture](model, lambda: model(probe), index)
        dense = reference.largest_singular_value(branch)
        norm = sublayer.branch_norm
        assert norm.lower * (1 - 1e-9) <= dense <= norm.upper * (1 + 1e-9), sublayer.name
        assert norm.upper < 1.2 * dense, sublayer.name


def test_the_page_says_what_failed() -> None:
    row = {
        "name": "Model",
        "package": "package 1.0",
        "factory": None,
        "counted": 2,
        "counted_from": "1 layer",
        "listed": 3,
        "seconds": 1.0,
        "peak_mb": 100,
        "norms": [],
        "problems": ["3 sub-layers, counted by hand 2"],
        "status": "failed",
    }
    versions = {"torch": "2", "transformers": "5"}
    failing = page.write([row], [], versions)
    assert "0 of 1 models pass" in failing
    assert "- Model: 3 sub-layers, counted by hand 2" in failing

    passing = page.write([row | {"problems": [], "status": "ok"}], [], versions)
    assert "1 of 1 models pass" in passing
    assert "What failed" not in passing
