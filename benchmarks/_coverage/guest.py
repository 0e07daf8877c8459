"""Whether the guest is left as it was, and whether what is found depends on anything but the model
and its input.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

import jacdiag
from _coverage.build import Built, inputs_of

BATCH_CLOSE = 1e-4


def problems(built: Built, sites: Any) -> dict[str, str]:
    """Returns what went wrong, by check."""
    tests: dict[str, Callable[[], str]] = {
        "guest": lambda: _unchanged(built),
        "raises": lambda: _unchanged_by_an_error(built),
        "repeat": lambda: _repeat(built, sites),
        "batch": lambda: _batch(built, sites),
    }
    return failing(tests)


def failing(tests: dict[str, Callable[[], str]]) -> dict[str, str]:
    """Runs tests that say what is wrong, or nothing; an error counts as its text."""
    found = {}
    for name, test in tests.items():
        try:
            problem = test()
        except Exception as error:
            problem = f"{type(error).__name__}: {error} {getattr(error, 'got', '') or ''}"
        if problem:
            found[name] = problem[:300]
    return found


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything of a guest and of the process that a measurement must leave alone."""
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return {
        "tensors": [
            (n, t.data_ptr(), t._version, t.requires_grad, t.grad is None) for n, t in tensors
        ],
        "values": [t.detach().clone() for _, t in tensors],
        "modules": [(n, m.training, sorted(vars(m)), type(m)) for n, m in model.named_modules()],
        "hooks": [
            sum(len(v) for k, v in vars(m).items() if k.endswith("hooks")) for m in model.modules()
        ],
        "flags": (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_num_threads(),
            torch.is_autocast_enabled("cpu"),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
        ),
        "rng": (
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),  # noqa: NPY002
        ),
    }


def _differences(before: dict[str, Any], after: dict[str, Any]) -> str:
    same = all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) if a.is_floating_point() else torch.equal(a, b)
        for a, b in zip(before.pop("values"), after.pop("values"), strict=True)
    )
    changed = [] if same else ["values"]
    return ", ".join([*changed, *(key for key in before if before[key] != after[key])])


def _unchanged(built: Built) -> str:
    model = built.model.train()
    try:
        before = state_of(model)
        sites = jacdiag.sites(model, **built.inputs)
        for site in sites:
            site.branch(site.shortcut)
        return _differences(before, state_of(model))
    finally:
        model.eval()


class _HalfWay(Exception):
    pass


def _unchanged_by_an_error(built: Built) -> str:
    """A module in the middle raises: the same must hold, and nothing may be left behind."""
    leaves = [m for m in built.model.modules() if not list(m.children())]
    module = leaves[len(leaves) // 2]

    def raises(*_: Any, **__: Any) -> None:
        raise _HalfWay

    module.forward = raises  # an instance attribute travels into the structural copy
    try:
        before = state_of(built.model)
        with contextlib.suppress(jacdiag.JacdiagError):
            jacdiag.sites(built.model, **built.inputs)
        return _differences(before, state_of(built.model))
    finally:
        del module.forward


def _repeat(built: Built, sites: Any) -> str:
    """The same records and bits again, whatever the caller's grad mode and the model's train
    flag.
    """
    for mode in (torch.no_grad, torch.inference_mode):
        built.model.train(mode is torch.no_grad)
        with mode():
            again = jacdiag.sites(built.model, **built.inputs)
        built.model.eval()
        if [_record(s) for s in again] != [_record(s) for s in sites]:
            return f"other records under {mode.__name__}"
        pairs = zip(sites, again, strict=True)
        if not all(
            torch.equal(a.shortcut, b.shortcut) and torch.equal(a.value, b.value) for a, b in pairs
        ):
            return f"other values under {mode.__name__}"
    return ""


def _record(site: Any) -> tuple[Any, ...]:
    return (
        site.name,
        site.kind,
        site.placement,
        site.parallel,
        site.nested,
        site.depth,
        tuple(site.parameters),
    )


def _batch(built: Built, sites: Any) -> str:
    """Two sequences at once: the same sub-layers, and the first sequence's values."""
    if built.facts.get("batch") is False:
        return ""
    twice = jacdiag.sites(built.model, **inputs_of(built.model, built.config, built.facts, batch=2))
    if [_record(s)[:6] for s in twice] != [_record(s)[:6] for s in sites]:
        return "other sub-layers with two sequences"
    for one, two in zip(sites, twice, strict=True):
        if two.value.shape[0] == 2 * one.value.shape[0]:
            first = two.value[: one.value.shape[0]]
            gap = float((first - one.value).norm() / one.value.norm().clamp_min(1e-20))
            if not gap <= BATCH_CLOSE:
                return f"{one.name}: value off by {gap:.1e} with two sequences"
    return ""
