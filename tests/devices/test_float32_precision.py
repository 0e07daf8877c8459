"""float32 products stay float32 where the process allows less, and the process gets its flags
back.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_server import fork_server
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import jacdiag
from jacdiag.devices.float32_precision import full_precision, is_in_full_precision
from jacdiag.sources.gpt import build

LEGACY = """
torch.set_float32_matmul_precision(MODE)
torch.backends.cudnn.allow_tf32 = True
def state():
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
full = ("highest", False)
"""
PER_BACKEND = """
torch.backends.mkldnn.matmul.fp32_precision = "bf16"
torch.backends.cuda.matmul.fp32_precision = "tf32"
def state():
    b = torch.backends
    return b.mkldnn.matmul.fp32_precision, b.cuda.matmul.fp32_precision, b.cudnn.conv.fp32_precision
full = ("ieee", "ieee", "ieee")
"""
BODY = """
before = state()
seen = []
class Looks(torch.autograd.Function):
    @staticmethod
    def forward(x):
        seen.append(state())
        return x.clone()
    @staticmethod
    def setup_context(ctx, inputs, output):
        pass
    @staticmethod
    def backward(ctx, g):
        seen.append(state())
        return Looks.apply(g)
op = JacobianOperator(Looks.apply, torch.ones(2, 3))
built = len(seen)
op.pull(op.push(torch.ones(2, 3)))
op.pull_shaped(torch.ones(2, 3))
assert len(seen) >= built + 3, seen
assert set(seen) == {full}, seen
assert state() == before != full
try:
    JacobianOperator(lambda x: 1 / 0, torch.ones(2, 3))
except ZeroDivisionError:
    pass
assert state() == before
"""


def run(*setups: str) -> None:
    """Check each setting, one after the other, in a process of its own: the flags are those of
    the process.
    """
    code = "import torch\nfrom jacdiag.spectra import JacobianOperator\n"
    code += "".join(setup + BODY for setup in setups)
    process = fork_server().start(["-c", code])
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors


def test_products_are_float32_under_the_old_flags() -> None:
    run(*(LEGACY.replace("MODE", repr(mode)) for mode in ("high", "medium")))


def test_products_are_float32_under_the_flags_per_backend() -> None:
    run("if not hasattr(torch.backends, 'fp32_precision'):\n    raise SystemExit\n" + PER_BACKEND)


def test_advice_on_the_flags_is_kept_off_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.9 warns whenever the older flags are read or written; other warnings pass."""
    read = torch.get_float32_matmul_precision
    advice = "Please use the new API settings to control TF32 behavior, such as ..."

    def advise(text: str) -> str:
        warnings.warn(text, UserWarning, stacklevel=2)
        return read()

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: advise(advice))
        with full_precision():
            pass
        assert not seen
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: advise("something else"))
        with full_precision():
            pass
        assert [str(warning.message) for warning in seen] == ["something else"]


def test_full_precision_is_that_of_the_own_thread() -> None:
    """Another thread leaves it when it likes, and restores the flags."""
    entered, may_leave = threading.Event(), threading.Event()

    def compute() -> None:
        with full_precision():
            entered.set()
            may_leave.wait(60)

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        assert entered.wait(60) and not is_in_full_precision()
        with full_precision():
            assert is_in_full_precision()
            with torch.autocast("cpu"):
                assert not is_in_full_precision()
        assert not is_in_full_precision()
    finally:
        may_leave.set()
        thread.join()


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="one set of flags")
def test_the_newer_flags_are_those_of_before() -> None:
    """torch writes into the newer set when the older one is written."""
    backends = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul, torch.backends.cudnn.conv]
    before = [backend.fp32_precision for backend in backends]
    with full_precision():
        pass
    assert [backend.fp32_precision for backend in backends] == before


def test_the_last_to_leave_restores_the_flags() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        first, second = full_precision(), full_precision()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.get_float32_matmul_precision() == "highest"
        second.__exit__(None, None, None)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


class _ProductModes(TorchDispatchMode):
    """Note the mode in which each float32 product of an operation on tensors is made."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        products = ("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "convolution")
        if func.overloadpacket.__name__ in products and args[0].dtype is torch.float32:
            self.modes[torch.get_float32_matmul_precision()] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def product_modes() -> Iterator[_ProductModes]:
    """Allow TF32, and note in which mode products are made."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with _ProductModes() as modes:
            yield modes
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.fixture
def tiny_model() -> nn.Module:
    return build(n_layer=2, n_head=2, n_embd=16, vocab_size=32, block_size=8)


def test_every_product_of_an_audit_is_float32(
    product_modes: _ProductModes, tiny_model: nn.Module
) -> None:
    """Also those of the recorded forward, of the reorthogonalisation and of weights' norms."""
    report = jacdiag.audit(tiny_model, torch.randint(32, (2, 8)), remedies="first")
    assert report.sublayers
    assert set(product_modes.modes) == {"highest"}
    assert torch.get_float32_matmul_precision() == "high"


def test_every_product_of_finding_sublayers_is_float32(
    product_modes: _ProductModes, tiny_model: nn.Module
) -> None:
    assert jacdiag.sites(tiny_model, torch.randint(32, (2, 8)))
    assert set(product_modes.modes) == {"highest"}


def test_every_product_of_a_norm_is_float32(product_modes: _ProductModes) -> None:
    weight = torch.randn(8, 8)
    jacdiag.spectral_norm(lambda x: x @ weight, torch.randn(2, 8))
    assert set(product_modes.modes) == {"highest"}


def test_the_products_of_a_watch_are_float32_and_those_of_the_training_are_not(
    product_modes: _ProductModes, tiny_model: nn.Module, tmp_path: Path
) -> None:
    # 1. A step with a probe.
    ids = torch.randint(32, (2, 8))
    optimizer = torch.optim.SGD(tiny_model.parameters(), lr=1e-3)
    with jacdiag.watch(tiny_model, optimizer, every=1, log_dir=tmp_path) as watch:
        logits = tiny_model(ids)
        logits.square().mean().backward()
        training = product_modes.modes["high"]
        optimizer.step()
        watch.step(1.0)

    # 2. The training alone made products in TF32.
    assert training and product_modes.modes["high"] == training
    assert product_modes.modes["highest"]


def test_an_audit_inside_autocast_is_one_outside_of_it(tiny_model: nn.Module) -> None:
    """A trainer may call it in its own context."""
    ids = torch.randint(32, (2, 8))
    outside = jacdiag.audit(tiny_model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        inside = jacdiag.audit(tiny_model, ids)
        assert torch.is_autocast_enabled("cpu")
    assert outside.sublayers[0].branch_norm is not None
    assert inside.sublayers == outside.sublayers
    assert inside.findings == outside.findings


def test_a_norm_inside_autocast_is_one_outside_of_it() -> None:
    weight, x = torch.randn(8, 8), torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        norm = jacdiag.spectral_norm(lambda x: x @ weight, x)
    size = float(torch.linalg.matrix_norm(weight.double(), 2))
    assert bool((norm.lower <= size).all()) and bool((norm.upper >= size).all())
