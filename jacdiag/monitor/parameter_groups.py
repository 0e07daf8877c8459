"""Parameters by sub-layer: what the per-step figures are figures of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from jacdiag.monitor.optimizers import copies
from jacdiag.trace import Sites

EMBEDDING, HEAD, NORMS, OTHER = "(embedding)", "(head)", "(norms)", "(other)"


@dataclass(frozen=True)
class Member:
    """A parameter with its name, its group, and the share of its squares that this rank counts."""

    name: str
    parameter: Tensor
    group: int
    share: float


@dataclass(frozen=True)
class Groups:
    """The sub-layers, and where each parameter of the optimisers belongs.

    Attributes:
        labels: names of sub-layers in their order, then what lies outside them.
        members: every parameter that an optimiser holds, in the optimisers' order.
    """

    labels: tuple[str, ...]
    members: tuple[Member, ...]

    @cached_property
    def by_label(self) -> list[list[Member]]:
        """The members of each group, in the order of the labels."""
        found: list[list[Member]] = [[] for _ in self.labels]
        for member in self.members:
            found[member.group].append(member)
        return found

    def of(self, group: int) -> list[Member]:
        """Return the members of a group."""
        return self.by_label[group]


def by_sites(sites: Sites) -> dict[str, str]:
    """Parameter name -> group: its sub-layer (the first that reads it), or what it is outside of
    them.
    """
    found: dict[str, str] = {}
    for site in sites:
        for name in site.parameters:
            found.setdefault(name, site.name)
    coverage = sites.coverage
    for label, names in (
        (EMBEDDING, coverage.embedding),
        (HEAD, coverage.head),
        (NORMS, coverage.norms),
    ):
        for name in names:
            found.setdefault(name, label)
    return found


def by_names(names: Sequence[str]) -> dict[str, str]:
    """Parameter name -> the module that holds it; where no sub-layer was found."""
    return {name: name.rpartition(".")[0] or OTHER for name in names}


def grouped(
    parameters: Sequence[Tensor],
    names: Mapping[int, str],
    homes: Mapping[str, str],
    order: Sequence[str],
    world: int,
) -> Groups:
    """Builds the groups.

    Args:
        parameters: those of the optimisers.
        names: id -> name; parameters that the model does not know are left out.
        homes: name -> group.
        order: labels that come first, such as the sub-layers in depth order.
        world: how many ranks add their squares up; 1 where each holds all.
    """
    known = [(names[id(p)], p) for p in parameters if id(p) in names]
    used = {homes.get(name, OTHER) for name, _ in known}
    rest = sorted(used - set(order))
    labels = (*(label for label in order if label in used), *rest)
    place = {label: k for k, label in enumerate(labels)}
    members = tuple(
        Member(
            name, p, place[homes.get(name, OTHER)], 1.0 if world == 1 else 1.0 / copies(p, world)
        )
        for name, p in known
    )
    return Groups(labels, members)
