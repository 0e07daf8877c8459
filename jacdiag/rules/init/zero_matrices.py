"""Matrices that start at zero on purpose, and those that were drawn although the others are zero.

Branches that start at zero are an init of their own: the matrix that writes to the shortcut is
zero, and the matrices before it are drawn. So are matrices that start at zero next to another that
does their work, such as the modulation of adaLN-zero. If most layers start so, one that does not is
the odd one, and not the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from jacdiag.records import ContractRecord, WeightRecord
from jacdiag.rules.grouping import group_by
from jacdiag.rules.init.layer_groups import MAJORITY
from jacdiag.rules.init.schemes import INNER, MATRICES, RESIDUAL
from jacdiag.rules.init.weight_facts import is_zero, parameters_of, pattern_of, with_role


def zero_on_purpose(contract: ContractRecord) -> frozenset[str]:
    """Return the names of the matrices whose zeros are an init of their own.

    Such a matrix is zero in most layers, in sub-layers that are not all zero. It writes to the
    shortcut, so that the branch starts at zero; or it stands next to another of its role, so that
    the sub-layer works without it. An expert stands for itself.
    """
    names: set[str] = set()
    for group in _groups_that_start_at_zero(contract):
        names.update(parameters_of(filter(is_zero, group)))

    return frozenset(names)


def drawn_among_zeros(contract: ContractRecord) -> list[tuple[WeightRecord, int]]:
    """Return the matrices that were drawn although most layers hold zeros on purpose.

    Each comes with the number of matrices of its name.
    """
    result = []
    for group in _groups_that_start_at_zero(contract):
        for weight in group:
            if not is_zero(weight):
                result.append((weight, len(group)))

    return result


def _groups_that_start_at_zero(contract: ContractRecord) -> Iterator[list[WeightRecord]]:
    """Yield the matrices of each name of which most are zero, and all of those may be."""
    matrices = with_role(contract.weights, *MATRICES)
    drawn_roles = _drawn_roles_by_sublayer(matrices)
    for group in group_by(matrices, pattern_of).values():
        # 1. Most of them.
        zeros = list(filter(is_zero, group))
        if not zeros or len(zeros) < MAJORITY * len(group):
            continue

        # 2. Each in a sub-layer that works without it.
        if all(_may_be_zero(weight, drawn_roles[weight.sublayer]) for weight in zeros):
            yield group


def _drawn_roles_by_sublayer(matrices: Iterable[WeightRecord]) -> dict[str, set[str]]:
    """Return the roles of the matrices of each sub-layer that are not zero."""
    roles: dict[str, set[str]] = {}
    for weight in matrices:
        drawn = roles.setdefault(weight.sublayer, set())
        if not is_zero(weight):
            drawn.add(weight.role)

    return roles


def _may_be_zero(weight: WeightRecord, drawn_roles: set[str]) -> bool:
    """Return whether a matrix is zero in a sub-layer whose drawn matrices do its work."""
    if not is_zero(weight):
        return False

    # 1. An output matrix: any matrix that reads the stream shows that the sub-layer was drawn.
    if weight.role in RESIDUAL:
        return not drawn_roles.isdisjoint(INNER)

    # 2. Another matrix of its role does its work, but for an expert.
    is_expert = weight.kind == "moe"
    return weight.role in drawn_roles and not is_expert
