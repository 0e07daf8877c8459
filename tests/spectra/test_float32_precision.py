"""float32 products stay float32 where the process allows less, and the process gets its flags
back.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from fork_server import fork_server

from jacdiag.spectra.rounding import full_precision

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
