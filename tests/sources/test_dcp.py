"""Folders of torch.distributed.checkpoint: what torch's own writer writes, in one process and
sharded over two.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from fork_server import fork_server
from jacdiag_cli.main import main
from sources.rig import BUILD, SIZES, tiny, weights, whole

import jacdiag
from jacdiag.errors import SourceError
from jacdiag.sources import load

IDS = torch.arange(8)[None]
SHARDED = """
import os, sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from jacdiag.sources import gpt
folder, store, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
model = gpt.build("vanilla", n_layer=2, n_embd=16, n_head=2, vocab_size=64, block_size=32)
torch.save(model.state_dict(), f"{folder}.pt")
mesh = init_device_mesh("cpu", (2,))
for block in model.transformer.h:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
dcp.save({"model": model.state_dict(), "step": 3}, checkpoint_id=folder)
dist.barrier()
os._exit(0)  # gloo's threads sometimes abort an orderly end
"""


def saved(folder: Path, state: Any) -> Path:
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", ["bare", "model", "app.model"])
def test_distributed_checkpoint_of_one_process_is_read(tmp_path: Path, shape: str) -> None:
    state: dict[str, Any] = dict(weights())
    if shape != "bare":
        state = {"model": state, "optimizer": {"exp_avg": torch.randn(99)}, "step": 12}
    if shape == "app.model":
        state = {"app": {"model": state["model"]}, "optimizer": state["optimizer"]}
    found = load(str(saved(tmp_path / "c", state)), model=BUILD, model_args=SIZES)
    assert found.weights is not None and found.info["format"] == "torch-distributed"
    assert torch.equal(whole(found)(IDS), tiny()(IDS))


@pytest.mark.filterwarnings("ignore")
def test_sharded_over_two_processes(tmp_path: Path) -> None:
    command = ["-c", SHARDED, tmp_path / "c", tmp_path / "store"]
    ranks = [fork_server().start([*command, str(rank)]) for rank in (0, 1)]
    for rank in ranks:
        _, said = rank.communicate(timeout=120)
        assert rank.returncode == 0, said
    assert len(list((tmp_path / "c").glob("*.distcp"))) == 2
    found = load(str(tmp_path / "c"), model=BUILD, model_args=SIZES)
    assert found.weights is not None
    expected = torch.load(tmp_path / "c.pt")
    assert {name: t.shape for name, t in found.weights.items()} == {
        n: t.shape for n, t in expected.items()
    }
    assert all(torch.equal(t, expected[name]) for name, t in found.weights.items())
    assert (
        main(
            [
                "audit",
                str(tmp_path / "c"),
                "--model",
                BUILD,
                "--model-args",
                str(SIZES).replace("'", '"'),
                "--seq",
                "8",
                "--fail-on",
                "never",
            ]
        )
        == 0
    )


@pytest.mark.filterwarnings("ignore")
def test_what_is_missing_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "c", {"model": dict(weights())})
    with pytest.raises(SourceError, match="holds weights only") as caught:
        load(str(folder))
    assert "--model" in (caught.value.hint or "")
    (data,) = folder.glob("*.distcp")
    good = data.read_bytes()
    data.write_bytes(good[: len(good) // 2])
    with pytest.raises(SourceError, match=r"shorter than \.metadata says"):
        load(str(folder), model=BUILD, model_args=SIZES)
    data.write_bytes(good[:200] + bytes(len(good) - 200))
    with pytest.raises(SourceError, match=r"reading .* failed"):
        broken = load(str(folder), model=BUILD, model_args=SIZES)
        jacdiag.sites(broken.model, IDS, weights=broken.weights)
    data.unlink()
    with pytest.raises(SourceError, match="1 of 1 files are missing"):
        load(str(folder), model=BUILD, model_args=SIZES)


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps({"a": 1}), pickle.dumps([1])])
def test_metadata_of_another_make(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(SourceError, match=r"\.metadata"):
        load(str(tmp_path), model=BUILD, model_args=SIZES)


class Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        import os

        return os.system, (f"touch {self.path}",)


def test_metadata_that_wants_to_run_code(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Attack(tmp_path / "ran")))
    with pytest.raises(SourceError, match=r"asks for `os\.system`.*Nothing was run"):
        load(str(tmp_path), model=BUILD, model_args=SIZES)
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_chunk_that_lies_elsewhere(tmp_path: Path) -> None:
    folder = saved(tmp_path / "c", {"model": dict(weights())})
    (data,) = folder.glob("*.distcp")
    metadata = (folder / ".metadata").read_bytes()
    name = data.name.encode()
    (folder / ".metadata").write_bytes(metadata.replace(name, b"../" + name[3:]))
    with pytest.raises(SourceError, match=r"not that of torch\.distributed\.checkpoint") as caught:
        load(str(folder), model=BUILD, model_args=SIZES)
    assert "outside the folder" in (caught.value.got or "")
