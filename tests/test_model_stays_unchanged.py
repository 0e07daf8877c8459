"""Nothing of the guest changes: not a bit of a parameter, no hook, no mode, no random stream, no
global flag.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from menagerie import CORE
from torch import nn

import jacdiag
from jacdiag.errors import JacdiagError
from jacdiag.sources import gpt


def state_of(model: nn.Module) -> dict[str, Any]:
    hooks = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_state_dict_hooks",
    )
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "tensors": {n: (id(t), t._version, t.detach().clone()) for n, t in tensors},
        "grads": {n: p.grad for n, p in model.named_parameters()},
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "hooks": {(n, h): list(getattr(m, h)) for n, m in model.named_modules() for h in hooks},
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
        "rng": torch.get_rng_state(),
        "flags": (
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.mkldnn.enabled,
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.is_inference_mode_enabled(),
        ),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert torch.equal(before.pop("rng"), after.pop("rng"))
    tensors, others = before.pop("tensors"), after.pop("tensors")
    assert tensors.keys() == others.keys()
    for name, (where, version, value) in tensors.items():
        assert others[name][:2] == (where, version), name
        assert torch.equal(others[name][2], value), name
    for key, value in before.items():
        assert after[key] == value, key


def unchanged(model: nn.Module, action: Callable[[], Any], *, raises: str | None = None) -> None:
    """The action leaves the model as it was, whether it succeeds or, as told, raises."""
    before = state_of(model)
    with contextlib.nullcontext() if raises is None else pytest.raises(JacdiagError, match=raises):
        action()
    assert_same(before, state_of(model))


def small() -> gpt.GPT:
    return gpt.build("vanilla", n_layer=2, n_head=2, n_embd=16, vocab_size=32, block_size=8)


@pytest.mark.parametrize("specimen", CORE, ids=str)
def test_sites_leave_every_specimen_as_it_was(specimen: Any) -> None:
    model = specimen.build()
    args, kwargs = specimen.arguments()
    unchanged(
        model,
        lambda: [site.branch(site.shortcut) for site in jacdiag.sites(model, *args, **kwargs)],
    )


@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_an_audit_leaves_the_model_as_it_was(mode: str) -> None:
    model = small().train(mode != "eval")
    if mode == "mixed":
        model.transformer["h"][1].eval()
    model.transformer["wte"].weight.requires_grad_(False)
    model.transformer["h"][0].register_forward_hook(lambda *_: None)
    ids = torch.randint(32, (2, 8))
    unchanged(model, lambda: jacdiag.audit(model, ids))


def test_audit_under_no_grad_leaves_the_model_and_gives_the_same_norm() -> None:
    model, ids = small(), torch.randint(32, (1, 8))
    wanted = jacdiag.audit(model, ids).sublayers[0].branch_norm.estimate
    with torch.no_grad():
        unchanged(model, lambda: jacdiag.audit(model, ids))
        assert jacdiag.audit(model, ids).sublayers[0].branch_norm.estimate == wanted


class RaisesHalfWay(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.a(self.norm(x))
        raise ValueError("half-way")


def test_a_forward_that_raises_half_way_changes_nothing_and_shows_its_own_error() -> None:
    model, x = RaisesHalfWay().train(), torch.randn(3, 4)
    unchanged(model, lambda: jacdiag.sites(model, x), raises="half-way")


def test_buffers_written_in_the_forward_keep_their_values() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)).train()

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.body(x)

    guest, x = Residual(), torch.randn(5, 4)
    unchanged(guest, lambda: jacdiag.audit(guest, x))


def test_repeated_tracing_leaks_no_tensors() -> None:
    import gc
    import weakref

    model, ids = small(), torch.randint(32, (1, 8))
    alive = []
    for _ in range(5):
        found = jacdiag.sites(model, ids)
        alive.append(weakref.ref(found[0].shortcut))
        del found
    gc.collect()
    assert not any(ref() is not None for ref in alive)
