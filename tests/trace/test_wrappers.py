"""Wrappers around a model: the same sub-layers, the same bits, and the model left unchanged."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fork_server import fork_server
from menagerie.core import Pre
from menagerie.parts import D, Decoder, V, seeded, tokens
from test_model_stays_unchanged import unchanged
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

import jacdiag
from jacdiag.measure.replay_check import verify_replay
from jacdiag.records import Report
from jacdiag.trace import Sites


def plain() -> Decoder:
    return seeded(lambda: Decoder(Pre))  # type: ignore[return-value]


def sites_of(model: nn.Module, **options: Any) -> Sites:
    return jacdiag.sites(model, tokens(), dtype=torch.float64, **options)


@cache
def sites_of_the_plain_model() -> Sites:
    return sites_of(plain())


def assert_equal_sites(model: nn.Module, reference: nn.Module | None = None) -> Sites:
    """Assert that the sub-layers are those of the reference, the plain model if none is given.

    Values are compared bit for bit, and J^T w with a run of the whole model.
    """
    mine = sites_of(model)
    wanted = sites_of_the_plain_model() if reference is None else sites_of(reference)
    assert len(mine) == len(wanted) == 4
    for a, b in zip(mine, wanted, strict=True):
        assert (a.kind, a.placement, a.depth) == (b.kind, b.placement, b.depth)
        assert torch.equal(a.shortcut, b.shortcut) and torch.equal(a.value, b.value)
        assert torch.equal(a.branch(a.shortcut), a.value)
    assert max(verify_replay(mine).values()) < 1e-12
    assert not mine.coverage.uncovered
    return mine


@contextmanager
def process_group(rank: int = 0, size: int = 1, port: int | None = None) -> Iterator[None]:
    if port is None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


# -- parallel and compiled -------------------------------------------------------------------------
def test_distributed_data_parallel_wrapper_has_the_same_sites() -> None:
    with process_group():
        model = nn.parallel.DistributedDataParallel(plain())
        unchanged(model, lambda: assert_equal_sites(model))


def test_data_parallel_wrapper_has_the_same_sites() -> None:
    assert_equal_sites(nn.DataParallel(plain()))


SHARDS_ON_THE_CPU = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7)


def _shard(rank: int, port: int, folder: str) -> None:
    """What each of two processes does with both kinds of sharding."""
    torch.set_num_threads(1)
    with process_group(rank, 2, port):
        if SHARDS_ON_THE_CPU:
            _fully_shard(f"{folder}/{rank}.pt")
        _shard_flat()
        (Path(folder) / f"flat-{rank}").touch()


def _fully_shard(path: str) -> None:
    from torch.distributed.fsdp import fully_shard

    model = plain()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    before = {n: p.to_local().clone() for n, p in model.named_parameters()}
    found = assert_equal_sites(model)
    report = jacdiag.audit(model, tokens(), batch=1)
    after = {n: p.to_local() for n, p in model.named_parameters()}
    assert all(torch.equal(before[n], after[n]) for n in before)
    model(tokens())  # the model runs on as it did
    torch.save([[s.value for s in found], report.sublayers[0].branch_norm.estimate], path)


def _shard_flat() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(plain(), device_id=torch.device("cpu"))
    with pytest.raises(jacdiag.JacdiagError, match="summon_full_params"):
        jacdiag.sites(model, tokens())
    with FullyShardedDataParallel.summon_full_params(model):
        assert_equal_sites(model)


SHARD_AS_A_RANK = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parent)!r}]
from test_wrappers import _shard
_shard(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
"""


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which two processes left what they found in sharded models."""
    folder = tmp_path_factory.mktemp("sharded")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = [
        fork_server().start(["-c", SHARD_AS_A_RANK, str(rank), str(port), folder])
        for rank in range(2)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors
    return folder


@pytest.mark.skipif(
    not SHARDS_ON_THE_CPU,
    reason=(
        "torch 2.6 itself cannot run fully_shard on the CPU: 'Stream' object has no attribute "
        "'record_event'"
    ),
)
def test_fully_sharded_in_two_processes(sharded: Path) -> None:
    """FSDP2: the weights are gathered, on every process the same."""
    (a, norm_a), (b, norm_b) = (torch.load(sharded / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert (
        norm_a
        == norm_b
        == jacdiag.audit(plain(), tokens(), batch=1).sublayers[0].branch_norm.estimate
    )


def test_flat_fsdp1_shards_are_refused_with_a_hint(sharded: Path) -> None:
    """FSDP1 keeps a slice of one flat tensor per process: refused by name; inside its own context
    all is there.
    """
    assert {path.name for path in sharded.glob("flat-*")} == {"flat-0", "flat-1"}


def test_a_model_that_is_partly_on_meta_is_refused_by_name() -> None:
    model = plain()
    model.embed.to("meta")
    with pytest.raises(jacdiag.JacdiagError, match=r"'embed\.weight' is on the meta device"):
        sites_of(model)


def test_compiled_modules_are_not_compiled_for_us() -> None:
    optimized = torch.compile(plain(), backend=_refuse)
    assert_equal_sites(optimized)
    in_place = plain()
    in_place.compile(backend=_refuse)
    unchanged(in_place, lambda: assert_equal_sites(in_place))
    inner = plain()
    inner.blocks[0].mlp = torch.compile(inner.blocks[0].mlp, backend=_refuse)
    assert_equal_sites(inner)


def _refuse(*_: Any) -> Any:
    raise AssertionError("jacdiag compiled somebody's model")


@torch.compile(backend=_refuse)
def _fused_add(x: Tensor, f: Tensor) -> Tensor:
    return x + f


class AddedByCompiled(Pre):
    def forward(self, x: Tensor) -> Tensor:
        x = _fused_add(x, self.attn(self.norm1(x)))
        return _fused_add(x, self.mlp(self.norm2(x)))


def test_an_addition_in_a_compiled_function() -> None:
    assert_equal_sites(seeded(lambda: Decoder(AddedByCompiled)))


# -- activation checkpointing ----------------------------------------------------------------------
class Checkpointed(Decoder):
    """Every block is recomputed in the backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__(Pre)
        self.reentrant = reentrant

    def forward(self, ids: Tensor) -> Tensor:
        x = self.begin(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.end(x)


class CheckpointedAdditions(Pre):
    """A function that adds is recomputed, not a module."""

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(lambda x: x + self.attn(self.norm1(x)), x, use_reentrant=False)
        return checkpoint(lambda x: x + self.mlp(self.norm2(x)), x, use_reentrant=True)


@cache
def report_of_the_plain_model() -> Report:
    return jacdiag.audit(plain(), tokens())


@pytest.mark.parametrize(
    "make",
    [
        lambda: Checkpointed(False),
        lambda: Checkpointed(True),
        lambda: Decoder(CheckpointedAdditions),
        lambda: Decoder(lambda: checkpoint_wrapper(Pre())),
    ],
    ids=["not reentrant", "reentrant", "around additions", "checkpoint_wrapper"],
)
def test_activation_checkpointing_has_the_same_sites_and_norms(
    make: Callable[[], nn.Module],
) -> None:
    assert_equal_sites(seeded(make))
    report = jacdiag.audit(seeded(make), tokens())
    wanted = report_of_the_plain_model()
    assert [r.branch_norm.estimate for r in report.sublayers] == [
        r.branch_norm.estimate for r in wanted.sublayers
    ]
    assert report.network.end_to_end.estimate == wanted.network.end_to_end.estimate


def test_checkpointing_works_again_afterwards() -> None:
    model = seeded(lambda: Checkpointed(False))
    sites_of(model)
    runs = []
    model.blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))
    model(tokens()).sum().backward()
    assert len(runs) == 2, "the block runs again in the backward"


# -- weights that are computed ---------------------------------------------------------------------
@pytest.mark.parametrize(
    "norm",
    [
        weight_norm,
        parametrizations.weight_norm,
        spectral_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
    ],
    ids=["weight_norm, old", "weight_norm", "spectral_norm, old", "spectral_norm", "orthogonal"],
)
def test_parametrized_weights_have_the_same_sites(norm: Callable[[nn.Module], nn.Module]) -> None:
    model = plain()
    for block in model.blocks:
        for name in ("up", "down"):
            norm(getattr(block.mlp, name))
    model.eval()
    found: list[Sites] = []
    unchanged(model, lambda: found.append(sites_of(model)))
    (mine,) = found
    assert [s.name for s in mine] == [
        "blocks.0.attn",
        "blocks.0.mlp",
        "blocks.1.attn",
        "blocks.1.mlp",
    ]
    assert not mine.coverage.uncovered
    double = model.double()
    assert torch.allclose(
        mine[1].value, double.blocks[0].mlp(double.blocks[0].norm2(mine[1].shortcut)), rtol=1e-6
    )
    assert max(verify_replay(mine).values()) < 1e-12


# -- libraries -------------------------------------------------------------------------------------
def test_low_rank_adapters_of_peft() -> None:
    peft = pytest.importorskip("peft")
    model = plain()
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q", "v", "up"], init_lora_weights=False)
    )
    found: list[Sites] = []
    unchanged(wrapped, lambda: found.append(sites_of(wrapped)))
    (mine,) = found
    assert [(s.kind, s.placement, s.nested) for s in mine] == [
        ("attention", "pre", False),
        ("mlp", "pre", False),
    ] * 2
    assert any("lora_A" in name for name in mine[0].parameters)
    assert not mine.coverage.uncovered
    double = wrapped.double().base_model.model
    assert torch.allclose(
        mine[1].value, double.blocks[0].mlp(double.blocks[0].norm2(mine[1].shortcut)), rtol=1e-9
    )


@pytest.mark.parametrize("how", ["aligned", "offloaded", "dispatched"])
def test_accelerate_hooks_have_the_same_sites(how: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = plain()
    if how == "aligned":
        for module in model.modules():
            add_hook_to_module(
                module, AlignDevicesHook(execution_device="cpu", io_same_device=True)
            )
    elif how == "offloaded":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert model.embed.weight.is_meta
    else:
        devices = {
            "embed": "cpu",
            "position": "cpu",
            "blocks.0": "disk",
            "blocks.1": "cpu",
            "final": "cpu",
            "head": "cpu",
        }
        model = accelerate.dispatch_model(
            model, devices, main_device="cpu", offload_dir=str(tmp_path)
        )
    found = assert_equal_sites(model)
    assert model(tokens()).shape == (*tokens().shape, V)
    assert found[0].shortcut.shape[-1] == D

    # An audit takes it, too.
    norms = [row.branch_norm for row in jacdiag.audit(model, tokens(), decide=True).sublayers]
    expected = [row.branch_norm for row in jacdiag.audit(plain(), tokens(), decide=True).sublayers]
    assert norms == expected
