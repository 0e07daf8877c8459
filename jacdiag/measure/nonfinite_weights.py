"""Find the weights and buffers with NaN or Inf that matter.

A mask or a distance table may hold -inf on purpose.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from jacdiag.trace import Sites
from jacdiag.trace.discovery.coverage import parameters_of
from jacdiag.trace.execution.tensors import collect_deep, is_finite, is_float
from jacdiag.trace.graph.graph import STATE

_ATTENTION = "scaled_dot_product_attention"  # what it reads beside its operands is a mask
_TABLE = re.compile(r"mask|dist|alibi|causal|tril|triu", re.IGNORECASE)


@dataclass(frozen=True)
class NonFinite:
    """Tensors of a model that hold NaN or Inf.

    Attributes:
        names: those that break something; JD906 lists them.
        notes: sentences about the others.
    """

    names: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def non_finite_state(sites: Sites) -> NonFinite:
    """Return the parameters and buffers that break a recorded forward.

    A weight counts if a matrix product, a lookup or a norm reads it, or if an activation is not
    finite. A weight with Inf that is added (a mask) does not count while all activations are
    finite, nor does one that was not read.
    """
    skeleton, used = sites.skeleton, sites.graph.used_state
    # 1. What the forward does not read is a note.
    read = []
    unread = []
    for name in skeleton.non_finite():
        if name in used:
            read.append(name)
        else:
            unread.append(name)
    notes = []
    if unread:
        notes.append(
            f"NaN or Inf in weights that this forward does not read: {', '.join(unread[:5])}"
        )

    # 2. All activations are finite: only what is multiplied, or holds NaN, breaks something.
    if _activations_are_finite(sites):
        multiplied = _multiplied(sites)
        breaking = []
        for name in read:
            if name in multiplied or _has_nan(skeleton.params[name]):
                breaking.append(name)
        return NonFinite(breaking, notes)

    # 3. Something made NaN or Inf. What holds NaN is the first suspect; a mask with -inf the last.
    buffers = [name for name, buffer in _read_buffers(sites).items() if not is_finite(buffer)]
    with_nan = [name for name in buffers if _has_nan(skeleton.buffers[name])]
    return NonFinite([*read, *with_nan] or buffers, notes)


def non_finite_weights(state: Mapping[str, Tensor]) -> NonFinite:
    """Return the tensors of a state dict that hold NaN or Inf.

    What looks like a mask or a table is a note.

    Nothing was run, so that a mask is known by its values (Inf of one sign, and one other value) or
    by its name.
    """
    broken = [name for name, t in state.items() if not is_finite(t)]
    tables = [name for name in broken if _looks_like_table(name, state[name])]
    notes = []
    if tables:
        notes.append(
            f"Inf in {', '.join(tables[:5])} is taken for a mask or a table that holds it on "
            "purpose"
        )
    return NonFinite([name for name in broken if name not in tables], notes)


def _looks_like_table(name: str, t: Tensor) -> bool:
    """Return whether a tensor with Inf is a mask or a table, by its name or its values."""
    if _has_nan(t):
        return False
    if _TABLE.search(name):
        return True
    finite = t[torch.isfinite(t)]
    infinite = t[torch.isinf(t)]
    has_one_sign = bool((infinite == infinite[0]).all())
    if not has_one_sign or finite.numel() == 0:
        return False
    return bool((finite == finite[0]).all())


def _activations_are_finite(sites: Sites) -> bool:
    """Return whether shortcuts and branches are finite, and the output has no NaN.

    An output may hold -inf on purpose.
    """
    if any(not site.finite for site in sites):
        return False
    outputs: list[Tensor] = []
    collect_deep(sites.output, outputs)
    return not any(_has_nan(t) for t in outputs if not t.is_meta)


def _has_nan(t: Tensor) -> bool:
    return is_float(t) and bool(torch.isnan(t).any())


def _multiplied(sites: Sites) -> set[str]:
    """Return the names of the parameters that matrix products, lookups and norms read."""
    graph, finder = sites.graph, sites.finder
    readers = []
    for node in graph.nodes:
        looks_up = "embedding" in node.name or "norm" in node.name
        multiplies = finder.is_product(node.index) and node.name != _ATTENTION
        if looks_up or multiplies:
            readers.append(node.index)
    return set(parameters_of(graph, readers, sites.skeleton))


def _read_buffers(sites: Sites) -> dict[str, Tensor]:
    """Return the buffers that the recorded forward reads."""
    buffers = sites.skeleton.buffers
    read = {}
    for value in sites.graph.values:
        if value.node == STATE and value.name in buffers:
            read[value.name] = buffers[value.name]
    return read
