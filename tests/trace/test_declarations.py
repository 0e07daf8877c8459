"""Where a fused operation hides a sub-layer: it is named, and a declaration brings it back, the
same to the bit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from menagerie.core import Pre
from menagerie.parts import MLP, D, Decoder, seeded, tokens
from menagerie.wide import AddedByFunction
from torch import Tensor, nn

import jacdiag
from jacdiag.errors import JacdiagError
from jacdiag.measure.replay_check import verify_replay
from jacdiag.trace import Sites, declare
from jacdiag.trace.execution.skeleton import Skeleton
from jacdiag.trace.graph.graph import CONSTANT
from jacdiag.trace.graph.recorder import record

ATTN, MLPS = (
    declare(shortcut=f"blocks.*.norm{k}", branch=f"blocks.*.{b}")
    for k, b in ((1, "attn"), (2, "mlp"))
)
TABLES = {
    "attention": {"shortcut": "blocks.*.norm1:in", "branch": "blocks.*.attn:out"},
    "mlp": {"shortcut": "blocks.*.norm2", "branch": "blocks.*.mlp"},
}


class Stacked(Pre):
    """The sum by torch.stack: no addition is to be seen."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.stack((x, self.attn(self.norm1(x)))).sum(0)
        return torch.stack((x, self.mlp(self.norm2(x)))).sum(0)


def trace(block: Any, declared: Any = ()) -> Sites:
    return jacdiag.sites(
        seeded(lambda: Decoder(block)), tokens(), dtype=torch.float64, declared=declared
    )


def test_a_hidden_addition_is_named_with_the_way_to_declare_it() -> None:
    found = trace(AddedByFunction)
    assert len(found) == 0 and len(found.hidden) == 4
    assert (
        "AddFunction (a custom autograd.Function) adds at" in found.hidden[0]
        and "wide.py:" in found.hidden[0]
    )
    assert 'shortcut = "blocks.0.norm2", branch = "blocks.0.mlp"' in found.hidden[1]
    with pytest.raises(JacdiagError, match=r"(?s)hidden: AddFunction.*jacdiag\.declare"):
        jacdiag.audit(seeded(lambda: Decoder(AddedByFunction)), tokens())


@pytest.mark.parametrize("block", [AddedByFunction, Stacked], ids=["autograd.Function", "stack"])
@pytest.mark.parametrize("declared", [[ATTN, MLPS], TABLES], ids=["Python", "tables"])
def test_declared_sublayers_are_those_of_the_plain_model(block: Any, declared: Any) -> None:
    mine, plain = trace(block, declared), trace(Pre)
    assert not mine.hidden
    for a, b in zip(mine, plain, strict=True):
        for field in (
            "name",
            "kind",
            "placement",
            "depth",
            "parallel",
            "nested",
            "token_wise",
            "parameters",
        ):
            assert getattr(a, field) == getattr(b, field), field
        assert torch.allclose(a.shortcut, b.shortcut, rtol=1e-12)
        assert torch.equal(a.branch(a.shortcut), a.value)
        x = a.shortcut.clone().requires_grad_()
        w = torch.ones_like(x)
        with torch.enable_grad():
            one, other = (torch.autograd.grad(s.branch(x), x, w)[0] for s in (a, b))
        assert torch.allclose(one, other, rtol=1e-9)
    assert max(verify_replay(mine).values()) < 1e-12
    # the sum in a Function is seen, though not by autograd, and links the stream; one made by stack
    # is not
    assert len(mine.streams.main) == (4 if block is AddedByFunction else 0)


def test_an_audit_takes_declarations() -> None:
    options: dict[str, Any] = {"dtype": "float64", "batch": 1}
    mine = jacdiag.audit(
        seeded(lambda: Decoder(AddedByFunction)), tokens(), declared=TABLES, **options
    )
    plain = jacdiag.audit(seeded(lambda: Decoder(Pre)), tokens(), **options)
    for a, b in zip(mine.sublayers, plain.sublayers, strict=True):
        assert a.branch_norm.estimate == pytest.approx(b.branch_norm.estimate, rel=1e-9)
        assert a.core_norm.estimate == pytest.approx(b.core_norm.estimate, rel=1e-9)
        assert a.residual_norm.estimate == pytest.approx(b.residual_norm.estimate, rel=1e-9)
    assert mine.network.gain_product_log == pytest.approx(plain.network.gain_product_log, rel=1e-9)


def test_what_was_found_anyway_is_not_found_twice() -> None:
    assert [s.name for s in trace(Pre, TABLES)] == [s.name for s in trace(Pre)]


@pytest.mark.parametrize(
    ("shortcut", "branch", "words"),
    [
        (
            "blocks.*.norm1",
            "blocks.*.atn",
            r"no module 'blocks\.\*\.atn' ran.*closest: blocks\.\d\.attn",
        ),
        (
            "blocks.*.nrom1",
            "blocks.*.attn",
            r"no module 'blocks\.\*\.nrom1' ran.*closest: blocks\.\d\.norm1",
        ),
        ("blocks.*.norm1", "blocks.0.attn", r"'\*' of a declaration must stand in both"),
        ("blocks.0.norm1:at", "blocks.0.attn", r"no module boundary.*PATH:in"),
        ("", "blocks.0.attn", "no module boundary"),
        ("blocks.1.norm1", "blocks.0.attn", "does not depend on its shortcut"),
        ("blocks.0.norm1", "blocks.0.mlp.up", "another shape than its shortcut"),
        ("embed", "blocks.0.attn", "'embed' is given no tensor of the stream"),
    ],
)
def test_mistakes_are_answered_with_what_to_write(shortcut: str, branch: str, words: str) -> None:
    with pytest.raises(JacdiagError, match=f"(?s){words}"):
        trace(Stacked, [declare(shortcut=shortcut, branch=branch)])


@pytest.mark.parametrize(
    "table", [{"a": {"shortcut": "x"}}, {"a": "x"}, {"a": {"shortcut": 1, "branch": "y"}}, [3]]
)
def test_tables_that_say_something_else_are_refused(table: Any) -> None:
    with pytest.raises(JacdiagError, match="strings `shortcut` and `branch`"):
        trace(Pre, table)


# -- opaque calls ----------------------------------------------------------------------------------
class Once(torch.autograd.Function):
    """A kernel whose backward has no derivative, as flash attention's."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(h)
        return torch.tanh(h)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (h,) = ctx.saved_tensors
        return grad * (1 - torch.tanh(h) ** 2)


class OnceInContext(torch.autograd.Function):
    """The same as torch.func wants it; beside a second path, so that J u is too small and not
    zero.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor) -> Tensor:
        return torch.tanh(h)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (h,) = ctx.saved_tensors
        return grad * (1 - torch.tanh(h) ** 2)


@pytest.mark.parametrize(
    "act", [Once.apply, lambda h: OnceInContext.apply(h) + 0.1 * h], ids=["old", "setup_context"]
)
def test_a_backward_without_derivative_is_named(act: Any) -> None:
    """J u would come out too small in silence, and a wrong norm be certified."""
    model = seeded(lambda: Decoder(lambda: Pre(mlp=lambda: MLP(act=act))))
    report = jacdiag.audit(model, tokens(), batch=1)
    attn, mlp = report.sublayers[:2]
    assert attn.branch_norm is not None and attn.branch_norm.converged
    assert mlp.branch_norm is None and "Once" in mlp.notes["branch_norm"]
    assert "plain PyTorch" in mlp.notes["branch_norm"]


@torch.jit.script
def _scripted_add(x: Tensor, f: Tensor) -> Tensor:
    return x + f


class Scripted(Pre):
    def forward(self, x: Tensor) -> Tensor:
        x = _scripted_add(x, self.attn(self.norm1(x)))
        return _scripted_add(x, self.mlp(self.norm2(x)))


def test_a_scripted_function_is_named() -> None:
    found = trace(Scripted)
    assert any("torch.jit.script" in line and "PYTORCH_JIT=0" in line for line in found.hidden), (
        found.hidden
    )


def test_a_scripted_module_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(D, D), torch.jit.script(nn.Linear(D, D)))
    with pytest.raises(JacdiagError, match=r"'1' is a scripted module"):
        jacdiag.sites(model, torch.randn(2, D))


class Unseen(nn.Module):
    """Tensors that no recorded call made, each where a tensor of a recorded call has just been
    freed.
    """

    TIMES = 200

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for _ in range(self.TIMES):
            seen = self.map(x)
            del seen
            with torch._C.DisableTorchFunction():
                unseen = out * 0.5
            out = torch.relu(unseen)
        return out


def test_freed_memory_does_not_lend_its_history() -> None:
    model, x = Unseen(), torch.randn(2, D)
    graph, _ = record(Skeleton(model), (x,), {}, torch.float32)
    strangers = [v for v in graph.values if v.node == CONSTANT and v.shape == (2, D)]
    assert len(strangers) == Unseen.TIMES
