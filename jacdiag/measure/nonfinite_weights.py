"""Find the weights and buffers with NaN or Inf that matter.

A mask or a distance table may hold -inf on purpose.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from jacdiag.trace import Sites
from jacdiag.trace.discovery.coverage import parameters_of
from jacdiag.trace.execution.tensors import collect_deep, is_finite, is_float
from jacdiag.trace.graph.graph import STATE, Node

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

    Args:
        sites: of one recorded forward.
    """
    # 1. What the forward does not read is a note.
    used = sites.graph.used_state
    broken = sites.skeleton.non_finite()
    read = [name for name in broken if name in used]
    unread = [name for name in broken if name not in used]
    notes = []
    if unread:
        notes.append(
            f"NaN or Inf in weights that this forward does not read: {', '.join(unread[:5])}"
        )

    # 2. All activations are finite: only what is multiplied, or holds NaN, breaks something.
    if _activations_are_finite(sites):
        return NonFinite(_breaking(sites, read), notes)

    # 3. Something made NaN or Inf. What holds NaN is the first suspect; a mask with -inf the last.
    buffers = _broken_buffers(sites)
    with_nan = [name for name in buffers if _has_nan(sites.skeleton.buffers[name])]
    suspects = [*read, *with_nan]
    return NonFinite(suspects or buffers, notes)


def _breaking(sites: Sites, names: Iterable[str]) -> list[str]:
    """Return the parameters that break something although all activations are finite."""
    multiplied = _multiplied(sites)
    breaking = []
    for name in names:
        # Inf alone may be added on purpose.
        if name in multiplied or _has_nan(sites.skeleton.params[name]):
            breaking.append(name)

    return breaking


def _broken_buffers(sites: Sites) -> list[str]:
    """Return the buffers with NaN or Inf that the recorded forward reads."""
    buffers = _read_buffers(sites)
    return [name for name, buffer in buffers.items() if not is_finite(buffer)]


def non_finite_weights(state: Mapping[str, Tensor]) -> NonFinite:
    """Return the tensors of a state dict that hold NaN or Inf.

    What looks like a mask or a table is a note.

    Nothing was run, so that a mask is known by its values (Inf of one sign, and one other value) or
    by its name.
    """
    # 1. Sort them into weights and tables.
    names: list[str] = []
    tables: list[str] = []
    for name, tensor in state.items():
        if is_finite(tensor):
            continue

        if _looks_like_table(name, tensor):
            tables.append(name)
        else:
            names.append(name)

    # 2. Tables are a note.
    notes = []
    if tables:
        notes.append(
            f"Inf in {', '.join(tables[:5])} is taken for a mask or a table that holds it on "
            "purpose"
        )
    return NonFinite(names, notes)


def _looks_like_table(name: str, t: Tensor) -> bool:
    """Return whether a tensor with Inf is a mask or a table, by its name or its values."""
    if _has_nan(t):
        return False
    if _TABLE.search(name):
        return True

    # A mask holds Inf of one sign, and one other value.
    finite = t[torch.isfinite(t)]
    infinite = t[torch.isinf(t)]
    return _holds_one_number(infinite) and _holds_one_number(finite)


def _holds_one_number(numbers: Tensor) -> bool:
    """Return whether all of at least one number are the same."""
    if numbers.numel() == 0:
        return False

    return bool((numbers == numbers[0]).all())


def _activations_are_finite(sites: Sites) -> bool:
    """Return whether shortcuts and branches are finite, and the output has no NaN."""
    are_finite = all(site.finite for site in sites)
    if not are_finite:
        return False

    # An output may hold -inf on purpose.
    outputs: list[Tensor] = []
    collect_deep(sites.output, outputs)
    for tensor in outputs:
        if not tensor.is_meta and _has_nan(tensor):
            return False

    return True


def _has_nan(t: Tensor) -> bool:
    """Return whether a floating tensor holds NaN."""
    return is_float(t) and bool(torch.isnan(t).any())


def _multiplied(sites: Sites) -> set[str]:
    """Return the names of the parameters that matrix products, lookups and norms read."""
    readers = []
    for node in sites.graph.nodes:
        # Names of torch's calls: embedding_bag, layer_norm, rms_norm and others.
        is_lookup_or_norm = "embedding" in node.name or "norm" in node.name
        if is_lookup_or_norm or _multiplies(sites, node):
            readers.append(node.index)

    names = parameters_of(sites.graph, readers, sites.skeleton)
    return set(names)


def _multiplies(sites: Sites, node: Node) -> bool:
    """Return whether a call multiplies all that it reads; a fused attention adds its mask."""
    if node.name == _ATTENTION:
        return False

    return sites.finder.is_product(node.index)


def _read_buffers(sites: Sites) -> dict[str, Tensor]:
    """Return the buffers that the recorded forward reads."""
    buffers = sites.skeleton.buffers
    read = {}
    for value in sites.graph.values:
        if value.node == STATE and value.name in buffers:
            read[value.name] = buffers[value.name]

    return read
