"""Other people's hooks and patched code: followed where they compute, named where they cannot be,
never touched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from menagerie.core import Pre
from menagerie.parts import MLP, Attention, Decoder, seeded
from test_model_stays_unchanged import unchanged
from test_wrappers import assert_equal_sites, plain, sites_of
from torch import Tensor, nn

from jacdiag.measure.replay_check import verify_replay
from jacdiag.trace import Sites

pytestmark = pytest.mark.check("trace")


def test_hooks_that_look_on_are_left_alone() -> None:
    model, seen = plain(), []
    model.blocks[0].mlp.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    model.blocks[1].register_forward_pre_hook(lambda m, a: seen.append(a[0].dtype))
    unchanged(model, lambda: assert_equal_sites(model))
    assert set(seen) == {torch.float32}, "they saw the guest's own run, not a copy's"


def test_hooks_that_change_outputs_are_kept() -> None:
    def hooked(model: Decoder) -> Decoder:
        model.blocks[0].mlp.register_forward_hook(lambda m, a, out: 3 * out)
        model.blocks[1].attn.register_forward_pre_hook(lambda m, a: (0.5 * a[0],))
        model.blocks[1].mlp.register_forward_pre_hook(
            lambda m, a, k: ((2 * a[0],), k), with_kwargs=True
        )
        return model

    model = hooked(plain())
    found: list[Sites] = []
    unchanged(model, lambda: found.append(sites_of(model)))
    (mine,) = found
    assert any("hooks change the model's output" in note for note in mine.notes)
    double = hooked(plain()).double()
    b0, b1 = double.blocks
    for site, truth in zip(
        mine[1:],
        (
            lambda x: b0.mlp(b0.norm2(x)),
            lambda x: b1.attn(b1.norm1(x)),
            lambda x: b1.mlp(b1.norm2(x)),
        ),
        strict=True,
    ):
        assert torch.allclose(site.value, truth(site.shortcut), rtol=1e-9)
        assert torch.equal(site.branch(site.shortcut), site.value)
        x = site.shortcut.clone().requires_grad_()
        w = torch.randn(site.value.shape, dtype=torch.float64)
        want = torch.autograd.grad(truth(x), x, w)[0]
        with torch.enable_grad():
            assert torch.allclose(torch.autograd.grad(site.branch(x), x, w)[0], want, rtol=1e-9)
    assert max(verify_replay(mine).values()) < 1e-12


_SCALES: dict[int, float] = {}


class Global(Attention):
    """Looks itself up in a table by identity, so that no copy computes the same."""

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        return super().forward(x) * _SCALES.get(id(self), 1.0)


def test_a_module_that_cannot_be_copied_is_named_and_left_out() -> None:
    model = plain()
    model.blocks[1].attn.__class__ = Global
    _SCALES[id(model.blocks[1].attn)] = 5.0
    model.blocks[0].register_forward_hook(lambda *_: None)
    found = sites_of(model)
    assert any("'blocks.1.attn'" in note for note in found.notes)
    assert [s.name for s in found] == ["blocks.0.attn", "blocks.0.mlp", "blocks.1.mlp"]
    assert "blocks.1.attn.q.weight" in found.coverage.uncovered


# -- patched code ----------------------------------------------------------------------------------
def _closure(module: nn.Module) -> None:
    old = module.forward

    @functools.wraps(old)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return 2 * old(*args, **kwargs)

    module.forward = forward  # type: ignore[method-assign]


def _partial(module: nn.Module) -> None:
    module.forward = functools.partial(_doubled, module)  # type: ignore[method-assign]


def _method(module: nn.Module) -> None:
    module.forward = _doubled.__get__(module)  # type: ignore[method-assign]


def _doubled(module: nn.Module, *args: Any) -> Tensor:
    return 2 * type(module).forward(module, *args)


class Twice(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("patch", [_closure, _partial, _method])
def test_patched_forward_is_traced_as_it_computes(patch: Callable[[nn.Module], None]) -> None:
    model = plain()
    for block in model.blocks:
        patch(block.mlp)
    reference = seeded(lambda: Decoder(lambda: Pre(mlp=Twice)))
    unchanged(model, lambda: assert_equal_sites(model, reference))
