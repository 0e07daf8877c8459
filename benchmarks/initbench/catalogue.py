"""The catalogue: what a case is, and where its source is written down."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SOURCES = Path(__file__).parent / "sources.toml"
Probe = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a case comes from.

    Attributes:
        url: address of the issue, pull request, file or paper.
        title: its title.
        says: what it says of the init, in one sentence.
    """

    url: str
    title: str
    says: str


@dataclass(frozen=True, kw_only=True)
class Bug:
    """A bug of a public tracker as a pair of models.

    Attributes:
        name: of the case.
        kind: of the bug.
        build: builds the model, with the bug or without it.
        probe: builds the input.
        blames: patterns of the tensors that are wrong; a report must name all of them.
        allows: patterns of tensors that a report may name too.
        or_blames: patterns of another set of tensors that explains the same weights as well.
        one_is_enough: whether it is enough to name one of them, because every tensor is wrong.
        source: the issue or pull request.
    """

    name: str
    kind: str
    build: Callable[[bool], nn.Module]
    probe: Probe
    blames: tuple[str, ...]
    allows: tuple[str, ...]
    or_blames: tuple[str, ...]
    one_is_enough: bool
    source: Source


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A published init that must raise no alarm.

    Attributes:
        name: of the case.
        build: builds the model.
        probe: builds the input.
        source: the code or paper that publishes it.
    """

    name: str
    build: Callable[[], nn.Module]
    probe: Probe
    source: Source


BUGS: dict[str, Bug] = {}
RECIPES: dict[str, Recipe] = {}


def read_sources(section: str) -> dict[str, Source]:
    """Return the sources of a section of the data file by the names of their cases."""
    table = tomllib.loads(SOURCES.read_text(encoding="utf-8"))[section]
    return {name: Source(**entry) for name, entry in table.items()}


_BUG_SOURCES = read_sources("bugs")
_RECIPE_SOURCES = read_sources("recipes")


# -- probes ----------
def tokens() -> Tensor:
    """Return token ids of (2, 16)."""
    return torch.randint(1, 256, (2, 16), generator=torch.Generator().manual_seed(0))


def token_pairs() -> dict[str, Tensor]:
    """Return the inputs of an encoder-decoder."""
    generator = torch.Generator().manual_seed(0)
    names = ("input_ids", "decoder_input_ids")
    return {name: torch.randint(1, 256, (2, 12), generator=generator) for name in names}


def images(size: int) -> Probe:
    """Return a probe of two images."""
    return lambda: torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def features() -> Tensor:
    """Return vectors of (8, 32)."""
    return torch.randn(8, 32, generator=torch.Generator().manual_seed(0))


def noisy_patches() -> dict[str, Tensor]:
    """Return the inputs of a diffusion transformer."""
    generator = torch.Generator().manual_seed(0)
    return {"x": torch.randn(2, 12, 16, generator=generator), "t": torch.tensor([100.0, 700.0])}


# -- decorators ----------
def bug(
    kind: str,
    *,
    blames: tuple[str, ...],
    allows: tuple[str, ...] = (),
    or_blames: tuple[str, ...] = (),
    one_is_enough: bool = False,
    probe: Probe = tokens,
) -> Callable[[Callable[[bool], nn.Module]], Callable[[bool], nn.Module]]:
    """Add a function that builds a model with or without a bug; see `Bug` for the arguments."""

    def add(build: Callable[[bool], nn.Module]) -> Callable[[bool], nn.Module]:
        name = build.__name__
        BUGS[name] = Bug(
            name=name,
            kind=kind,
            build=build,
            probe=probe,
            blames=blames,
            allows=allows,
            or_blames=or_blames,
            one_is_enough=one_is_enough,
            source=_BUG_SOURCES[name],
        )
        return build

    return add


def recipe(
    *, probe: Probe = tokens
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Add a function that builds a model by a published recipe."""

    def add(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        name = build.__name__
        RECIPES[name] = Recipe(name=name, build=build, probe=probe, source=_RECIPE_SOURCES[name])
        return build

    return add


def load_cases() -> None:
    """Import every file of cases, so that the catalogue is complete."""
    from benchmarks.initbench import (  # noqa: F401
        bugs_drawn,
        bugs_gains,
        bugs_memory,
        bugs_structure,
        bugs_tables,
        bugs_vectors,
        recipes,
        recipes_tables,
    )
