"""Parameters grouped by sub-layer: the metrics of single steps are given per group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from jacdiag.monitor.optimizers import copies
from jacdiag.trace import Sites

EMBEDDING, HEAD, NORMS, OTHER = "(embedding)", "(head)", "(norms)", "(other)"


@dataclass(frozen=True)
class GroupMember:
    """A parameter in its group.

    Attributes:
        name: of the parameter.
        parameter: the tensor.
        group: place of its group among the labels.
        share: of its squares that this rank counts, between 0 and 1.
    """

    name: str
    parameter: Tensor
    group: int
    share: float


@dataclass(frozen=True)
class SublayerGroups:
    """The sub-layers, and the group that each parameter of the optimizers belongs to.

    Attributes:
        labels: names of sub-layers in their order, then those of parameters outside of them.
        members: every parameter that an optimizer holds, in the optimizers' order.
    """

    labels: tuple[str, ...]
    members: tuple[GroupMember, ...]

    @cached_property
    def by_label(self) -> list[list[GroupMember]]:
        """The members of each group, in the order of the labels."""
        members: list[list[GroupMember]] = [[] for _ in self.labels]
        for member in self.members:
            members[member.group].append(member)
        return members

    def of(self, group: int) -> list[GroupMember]:
        """Return the members of a group."""
        return self.by_label[group]


def by_sites(sites: Sites) -> dict[str, str]:
    """Map parameter names to groups: the first sub-layer that reads them, or their role outside."""
    # 1. The sub-layers. A weight that several of them share belongs to the first.
    group_of: dict[str, str] = {}
    for site in sites:
        for name in site.parameters:
            group_of.setdefault(name, site.name)

    # 2. What is outside of them, by its role.
    coverage = sites.coverage
    for label, names in (
        (EMBEDDING, coverage.embedding),
        (HEAD, coverage.head),
        (NORMS, coverage.norms),
    ):
        for name in names:
            group_of.setdefault(name, label)
    return group_of


def by_names(names: Sequence[str]) -> dict[str, str]:
    """Map parameter names to the modules that hold them, for models without a sub-layer."""
    return {name: name.rpartition(".")[0] or OTHER for name in names}


def sort_labels(used: set[str], order: Sequence[str]) -> list[str]:
    """Return the labels in use: those in `order` as they come there, then all others by name."""
    first = [label for label in order if label in used]
    others = sorted(used - set(order))
    return [*first, *others]


def group_parameters(
    parameters: Sequence[Tensor],
    names: Mapping[int, str],
    group_of: Mapping[str, str],
    order: Sequence[str],
    world: int,
) -> SublayerGroups:
    """Group the parameters of the optimizers.

    Args:
        parameters: those of the optimizers.
        names: id of a parameter -> its name. Parameters that are not in it are left out.
        group_of: name of a parameter -> label of its group.
        order: labels that come first, such as the sub-layers in depth order.
        world: how many ranks add their squares up; 1 if each holds all.
    """
    # 1. The labels: those in order, then all others.
    named: list[tuple[str, Tensor]] = []
    for parameter in parameters:
        name = names.get(id(parameter))
        if name is not None:
            named.append((name, parameter))
    used = {group_of.get(name, OTHER) for name, _ in named}
    labels = sort_labels(used, order)
    place_of = {label: place for place, label in enumerate(labels)}

    # 2. The members.
    members: list[GroupMember] = []
    for name, parameter in named:
        share = 1.0
        if world != 1:
            share = 1.0 / copies(parameter, world)
        place = place_of[group_of.get(name, OTHER)]
        members.append(GroupMember(name, parameter, place, share))
    return SublayerGroups(tuple(labels), tuple(members))
