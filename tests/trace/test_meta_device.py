"""A model on the meta device has no values: its sub-layers are found by structure, and are those of
the real one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from menagerie import ALL, CORE, Specimen
from menagerie.traced import traced
from selection import every_third
from torch import Tensor, nn

import jacdiag
from jacdiag.errors import TraceError

# An attribute, a mask or a tensor inside a dict that is on the CPU; routing, which asks for the
# values.
WITH_VALUES = {
    "grouped queries with rotary",
    "projected positions, rotary, mask",
    "a dict of tensors",
    "MoE",
    "MoE with a shared expert",
    "router bias",
    "stacked parameters",
    "stacked parameters, unbound",
}

LEFT_OPEN = ("several streams", "BatchNorm in eval")


def on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    return type(value)(map(on_meta, value)) if type(value) in (list, tuple) else value


def records(sites: Any) -> list[tuple[Any, ...]]:
    return [(s.placement, s.parallel, s.nested, s.depth, s.parameters) for s in sites]


def asks_for_no_values(specimen: Specimen) -> bool:
    return specimen.name not in WITH_VALUES


@pytest.mark.parametrize(
    "specimen",
    every_third(ALL, always=CORE.__contains__, only=asks_for_no_values),
    ids=str,
)
def test_the_same_sublayers_as_with_values(specimen: Specimen) -> None:
    args, kwargs = specimen.arguments()
    real = traced(specimen.name, torch.float32)
    kwargs = {key: on_meta(value) for key, value in kwargs.items()}
    found = jacdiag.sites(specimen.build().to("meta"), *on_meta(args), **kwargs)
    assert records(found) == records(real)
    for one, other in zip(found, real, strict=True):  # what the operations leave open is not named
        left_open = one.token_wise is None and other.kind in ("mlp", "mixer")
        assert one.kind == "other" if left_open else one.kind == other.kind
    assert all(s.shortcut.is_meta and "meta device" in s.notes["placement"] for s in found)
    assert all(s.token_wise in (None, r.token_wise) for s, r in zip(found, real, strict=True))
    if not specimen.name.startswith(LEFT_OPEN):
        assert any(s.token_wise for s in found) or not any(
            r.token_wise for r in real if r.kind == "mlp"
        )


class AsksForValues(nn.Module):
    """Asks what it made itself (positions) and, if told to, what it was given."""

    def __init__(self, asks_input: bool) -> None:
        super().__init__()
        self.asks_input, self.up, self.down = asks_input, nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        if not bool((positions.diff() == 1).all()):
            return x
        if self.asks_input and bool((x > 0).all()):
            return x
        return x + self.down(self.up(x).relu())


def test_what_the_code_made_itself_has_values() -> None:
    x = torch.empty(1, 4, 8, device="meta")
    assert [s.kind for s in jacdiag.sites(AsksForValues(False).to("meta"), x)] == ["mlp"]
    with pytest.raises(TraceError, match="meta"):
        jacdiag.sites(AsksForValues(True).to("meta"), x)


def test_no_memory_for_weights() -> None:
    """Layers of 800 MB each: recording them would show if any were made."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(8192)
            self.up, self.down = (
                nn.Linear(8192, 24576, bias=False),
                nn.Linear(24576, 8192, bias=False),
            )

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(self.up(self.norm(x)).relu())

    with torch.device("meta"):
        model = nn.Sequential(*(Block() for _ in range(40)))
    sites = jacdiag.sites(model, torch.empty(1, 2048, 8192, device="meta"))
    assert [(s.kind, s.placement) for s in sites] == [("mlp", "pre")] * 40
