"""Checkpoint files: every layout that people write, and every way in which a file can be no
checkpoint.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sources.rig import SIZES, lightning, same, save, tiny, weights
from torch import Tensor

from jacdiag.errors import SourceError
from jacdiag.sources.checkpoint import open_checkpoint, strip_wrappers
from jacdiag.sources.formats import safetensors_file

pytestmark = pytest.mark.check("sources")

NOISE = {
    "optimizer": {"state": {0: {"exp_avg": torch.ones(100_000)}}},
    "epoch": 3,
    "loss": torch.tensor(2.0),
}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_state_dict_file_is_read_with_every_suffix(
    tmp_path: Path, suffix: str, zipped: bool
) -> None:
    path = save(tmp_path / f"w{suffix}", weights(), _use_new_zipfile_serialization=zipped)
    found = open_checkpoint(path)
    assert same(found.state, weights())
    assert (found.format, found.where, found.module, found.unread) == ("torch-save", "", None, [])


@pytest.mark.parametrize("name", ["trained.weights", "model-000500", "params.torch"])
def test_a_file_of_another_suffix_is_known_by_its_content(tmp_path: Path, name: str) -> None:
    assert same(open_checkpoint(save(tmp_path / name, weights())).state, weights())
    separate = {key: t.clone() for key, t in weights().items()}
    save_file(separate, tmp_path / f"{name}.st")
    assert same(open_checkpoint(tmp_path / f"{name}.st").state, separate)


def test_a_file_of_another_suffix_and_content_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.weights").write_text("{ a story }")
    with pytest.raises(SourceError, match="no suffix that says"):
        open_checkpoint(tmp_path / "notes.weights")


@pytest.mark.parametrize(
    "key", ["model", "state_dict", "model_state_dict", "module", "my_own_name"]
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_weights_inside_a_training_checkpoint_are_found(
    tmp_path: Path, key: str, zipped: bool
) -> None:
    path = save(tmp_path / "c.pt", {**NOISE, key: weights()}, _use_new_zipfile_serialization=zipped)
    found = open_checkpoint(path)
    assert same(found.state, weights()) and found.where == key


def test_lightning_checkpoint_is_read(tmp_path: Path) -> None:
    found = open_checkpoint(save(tmp_path / "last.ckpt", lightning(weights())))
    assert same(found.state, {f"model.{name}": t for name, t in weights().items()})
    assert (found.where, found.step, found.unread) == ("state_dict", 77, ["argparse.Namespace"])


def test_nanogpt_checkpoint_is_read(tmp_path: Path) -> None:
    state = {f"_orig_mod.{name}": t for name, t in weights().items()}
    saved = {
        "model": state,
        "model_args": SIZES,
        "iter_num": torch.tensor(5),
        "best_val_loss": torch.tensor(1e9),
    }
    found = open_checkpoint(save(tmp_path / "ckpt.pt", saved))
    assert same(found.state, weights()) and found.model_args == SIZES and found.step == 5


def test_safetensors_file_is_read_with_its_step(tmp_path: Path) -> None:
    path, state = tmp_path / "w.safetensors", {name: t.clone() for name, t in weights().items()}
    save_file(state, path, metadata={"step": "12"})
    found = open_checkpoint(path)
    assert same(found.state, state) and (found.format, found.step) == ("safetensors", 12)


def test_safetensors_whose_metadata_is_null(tmp_path: Path) -> None:
    """The library reads such a file; so do we."""
    header = b'{"__metadata__":null,"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    found = open_checkpoint(path)
    assert list(found.state) == ["a"] and found.step is None


def one_tensor(path: Path, dtype: str, size: int) -> Path:
    """Write a safetensors file with one tensor of 4 x 4 values."""
    entry = {"dtype": dtype, "shape": [4, 4], "data_offsets": [0, size]}
    header = json.dumps({"blocks.0.weight": entry}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    return path


@pytest.mark.parametrize(
    ("dtype", "size"), [("F4", 8), ("F6_E2M3", 12), ("F6_E3M2", 12), ("F8_E8M0", 16)]
)
def test_safetensors_with_values_of_few_bits_is_quantised(
    tmp_path: Path, dtype: str, size: int
) -> None:
    with pytest.raises(SourceError, match="are quantised") as refused:
        open_checkpoint(one_tensor(tmp_path / "w.safetensors", dtype, size))
    assert dtype in (refused.value.got or "")
    assert "truncated" not in str(refused.value)


@pytest.mark.parametrize(
    ("dtype", "size"), [("U16", 32), ("U32", 64), ("U64", 128), ("F16", 32), ("F64", 128)]
)
def test_safetensors_of_every_dtype_of_torch_is_opened(
    tmp_path: Path, dtype: str, size: int
) -> None:
    path = one_tensor(tmp_path / "w.safetensors", dtype, size)
    spans, _ = safetensors_file.spans(path)
    assert tuple(spans["blocks.0.weight"].read().shape) == (4, 4)


def test_safetensors_of_a_dtype_that_the_library_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(SourceError) as refused:
        open_checkpoint(one_tensor(tmp_path / "w.safetensors", "F2", 4))
    assert "update safetensors" in (refused.value.hint or "")


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "_fsdp_wrapped_module.",
        "_checkpoint_wrapped_module.",
        "module._orig_mod.module.",
    ],
)
def test_wrapper_prefixes_are_stripped_from_names(prefix: str) -> None:
    assert same(strip_wrappers({prefix + name: t for name, t in weights().items()}), weights())


def test_wrapper_parts_inside_names_are_stripped() -> None:
    def wrapped(name: str) -> str:
        inner = name.replace(".h.0.", ".h.0._checkpoint_wrapped_module._orig_mod.")
        wrapped_inner = inner.replace("transformer.", "transformer._fsdp_wrapped_module.")
        return f"_fsdp_wrapped_module.{wrapped_inner}"

    assert same(strip_wrappers({wrapped(name): t for name, t in weights().items()}), weights())


def test_submodule_called_module_keeps_its_name() -> None:
    state = {"module.weight": torch.ones(2), "head.weight": torch.ones(2)}
    assert list(strip_wrappers(state)) == list(state)


# -- tensors of every kind -------------------------------------------------------------------------
def variants() -> dict[str, Callable[[], dict[str, Tensor]]]:
    big = torch.randn(40, generator=torch.Generator().manual_seed(1))
    return {
        "bf16": lambda: {name: t.bfloat16() for name, t in weights().items()},
        "fp16": lambda: {name: t.half() for name, t in weights().items()},
        "double": lambda: {name: t.double() for name, t in weights().items()},
        "views of one storage": lambda: {"a": big[:10].view(2, 5), "b": big[10:], "c": big[5:15]},
        "non-contiguous": lambda: {
            "a": big.view(5, 8).t(),
            "b": big[::3],
            "c": big[0].expand(3, 4),
        },
        "0-d, empty, integers": lambda: {
            "a": torch.tensor(3.0),
            "b": torch.empty(0, 4),
            "c": torch.arange(3),
        },
        "long and odd names": lambda: {
            "x" * 4000: big,
            "naïve.层.weight": big,
            "a b/c": big,
            "": big,
        },
        "parameters": lambda: {"a": torch.nn.Parameter(big.clone())},
    }


@pytest.mark.parametrize("name", list(variants()))
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_tensors_come_back_bit_for_bit(tmp_path: Path, name: str, zipped: bool) -> None:
    state = variants()[name]()
    found = open_checkpoint(
        save(tmp_path / "w.pt", {"model": state}, _use_new_zipfile_serialization=zipped)
    ).state
    assert same(found, {key: t.detach() for key, t in state.items()})
    assert not any(t.requires_grad for t in found.values())


def test_sparse_tensors_become_plain(tmp_path: Path) -> None:
    found = open_checkpoint(
        save(tmp_path / "w.pt", {"a": torch.eye(4).to_sparse(), "b": torch.ones(2)})
    ).state
    assert torch.equal(found["a"], torch.eye(4))


def test_names_cannot_write_to_a_terminal(tmp_path: Path) -> None:
    found = open_checkpoint(save(tmp_path / "w.pt", {"a\x1b[31m\tb": torch.ones(2)})).state
    assert list(found) == ["a\\x1b[31m\\tb"]


def test_symlinks_spaces_and_unicode(tmp_path: Path) -> None:
    real = save(tmp_path / "a b" / "modèle é.pt", weights())
    link = tmp_path / "link.pt"
    link.symlink_to(real)
    assert same(open_checkpoint(link).state, weights()) and same(
        open_checkpoint(real).state, weights()
    )


# -- foreign classes, whole modules ----------------------------------------------------------------
def test_harmless_classes_are_listed_and_the_tensors_load(tmp_path: Path) -> None:
    config = argparse.Namespace(lr=1e-3, inner=argparse.Namespace(depth=[1, {"a": (2,)}]))
    saved = {"model": OrderedDict(weights()), "args": config, "where": Path("x"), "name": "run"}
    found = open_checkpoint(save(tmp_path / "c.pt", saved))
    assert same(found.state, weights())
    assert found.unread[0] == "argparse.Namespace" and any(
        name.startswith("pathlib.") for name in found.unread
    )


@pytest.mark.parametrize(
    "wrap", [lambda m: m, lambda m: {"model": m, "epoch": 1}], ids=["bare", "in a dict"]
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pickled_module_is_read_if_trusted(
    tmp_path: Path, wrap: Callable[[Any], Any], zipped: bool, recwarn: Any
) -> None:
    path = save(tmp_path / "m.pt", wrap(tiny()), _use_new_zipfile_serialization=zipped)
    found = open_checkpoint(path)
    assert same(found.state, weights())
    assert found.whole_module and found.module is None and "jacdiag.sources.gpt.GPT" in found.unread
    trusted = open_checkpoint(path, trust_pickle=True)
    assert same(dict((trusted.module or torch.nn.Module()).state_dict()), weights())
    assert not recwarn.list


# -- what is no checkpoint -------------------------------------------------------------------------
def part(folder: Path, name: str, share: float, **how: Any) -> None:
    whole = save(folder / f"whole-{name}", weights(), **how).read_bytes()
    (folder / name).write_bytes(whole[: int(len(whole) * share)])


def garbage(folder: Path) -> None:
    (folder / "empty.pt").write_bytes(b"")
    (folder / "text.pt").write_text("a story\n")
    (folder / "text.safetensors").write_text("a story, twenty characters\n")
    (folder / "lfs.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (folder / "weights.npz").write_bytes(b"PK\x03\x04")
    part(folder, "cut.pt", 0.5)
    part(folder, "cut-early.pt", 0.01)
    part(folder, "cut-legacy.pt", 0.5, _use_new_zipfile_serialization=False)
    part(folder, "cut-legacy-early.pt", 0.003, _use_new_zipfile_serialization=False)
    save_file({"a": torch.ones(100)}, folder / "whole.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "whole.safetensors").read_bytes()[:-5])
    whole = bytearray((folder / "whole-cut.pt").read_bytes())
    at = whole.rindex(b"PK\x01\x02")
    whole[at : at + 4] = b"\0\0\0\0"
    (folder / "broken-directory.pt").write_bytes(whole)
    save(folder / "number.pt", 3)
    save(folder / "nothing.pt", {})
    save(folder / "integers.pt", {"a": torch.arange(3)})
    save(folder / "numbered.pt", {0: torch.ones(2), 1: torch.ones(2)})
    save(folder / "meta.pt", {"a": torch.ones(2, device="meta")})
    os.mkfifo(folder / "pipe.pt")
    (folder / "loop.pt").symlink_to("loop.pt")
    (folder / "dangling.pt").symlink_to("nowhere.pt")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing.pt", "no such file or folder"),
        ("dangling.pt", "no such file or folder"),
        ("loop.pt", "cannot read"),
        ("n" * 4000 + ".pt", "cannot read"),
        ("pipe.pt", "no plain file"),
        ("empty.pt", "is empty"),
        ("text.pt", "is no file of torch.save"),
        ("text.safetensors", "as safetensors"),
        ("lfs.bin", "Git LFS pointer"),
        ("weights.npz", "a file of NumPy"),
        ("cut.pt", "truncated"),
        ("cut-early.pt", "truncated"),
        ("cut-legacy.pt", "truncated"),
        ("cut-legacy-early.pt", "truncated"),
        ("cut.safetensors", "truncated"),
        ("broken-directory.pt", "broken"),
        ("number.pt", "holds no weights"),
        ("nothing.pt", "holds no weights"),
        ("integers.pt", "holds no weights"),
        ("numbered.pt", "holds no weights"),
        ("meta.pt", "names and shapes, no numbers"),
    ],
)
def test_files_that_are_no_checkpoint_are_refused_with_a_reason(
    tmp_path: Path, name: str, said: str
) -> None:
    garbage(tmp_path)
    with pytest.raises(SourceError) as refused:
        open_checkpoint(tmp_path / name)
    error = refused.value
    assert said in str(error) and (error.got or error.hint)


@pytest.mark.parametrize(
    ("name", "hint"), [("build.py", "build.py:CALLABLE"), ("config.json", "hf:")]
)
def test_the_neighbour_of_what_was_meant(tmp_path: Path, name: str, hint: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(SourceError) as refused:
        open_checkpoint(tmp_path / name)
    assert hint in (refused.value.hint or "")


def test_trusted_module_without_its_code_gets_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "of_elsewhere.py").write_text("from torch import nn\nclass Net(nn.Linear): pass\n")
    path = tmp_path / "whole.pt"
    with monkeypatch.context() as here:
        here.syspath_prepend(tmp_path)
        module = importlib.import_module("of_elsewhere")
        torch.save(module.Net(2, 2), path)
        here.delattr(module, "Net")
        with pytest.raises(SourceError, match="names and modules of when it was saved"):
            open_checkpoint(path, trust_pickle=True)
        here.delitem(sys.modules, "of_elsewhere")
    monkeypatch.delitem(sys.modules, "of_elsewhere", raising=False)
    with pytest.raises(SourceError, match="No module named 'of_elsewhere'") as refused:
        open_checkpoint(path, trust_pickle=True)
    hint = refused.value.hint or ""
    assert "PYTHONPATH=." in hint and "of_elsewhere" in hint and "--model FACTORY" in hint
    assert open_checkpoint(path).module is None, "its weights need no code"
