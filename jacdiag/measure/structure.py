"""What the init contract says of tables, time steps, ties, adapters and factors on the shortcut."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from jacdiag.measure.computed_tables import tables_of
from jacdiag.measure.low_rank_adapters import adapters_of
from jacdiag.measure.state_space_rates import rates_of
from jacdiag.measure.tied_weights import tie_of
from jacdiag.records.init_contract import ContractRecord
from jacdiag.records.report import SublayerRecord
from jacdiag.records.structure import ZeroShortcut
from jacdiag.trace import Sites
from jacdiag.trace.discovery.coverage import parameters_of
from jacdiag.trace.discovery.low_rank import find_low_rank_pairs
from jacdiag.trace.discovery.residual import Site


def with_structure(
    contract: ContractRecord, sites: Sites, model: nn.Module, records: Iterable[SublayerRecord]
) -> ContractRecord:
    """Return the contract with the records of tables, rates, adapters, the tie and zero shortcuts.

    Args:
        contract: of the weights.
        sites: of one recorded forward.
        model: only its config and accessors are read.
        records: figures of the sub-layers.
    """
    contract = replace(
        contract,
        tables=tables_of(sites),
        rates=rates_of(sites),
        zero_shortcuts=zero_shortcuts_of(sites, records),
    )
    # Weights that are read from a file are those of a checkpoint, not of an init.
    if sites.skeleton.stored is not None:
        return contract

    return replace(
        contract,
        adapters=adapters_of(sites.skeleton.params, find_low_rank_pairs(sites)),
        tie=tie_of(model, sites.skeleton, contract.weights, contract.tied),
    )


def zero_shortcuts_of(sites: Sites, records: Iterable[SublayerRecord]) -> list[ZeroShortcut]:
    """Return the sub-layers whose shortcut is multiplied by exactly zero.

    The zero parameters on its way are named.
    """
    zero_gains = _indices_with_zero_gain(records)
    shortcuts = []
    for site, raw in zip(sites, sites.raw, strict=True):
        if site.nested or site.index not in zero_gains:
            continue

        # A shortcut that is zero itself is no sign of a zero gain.
        has_signal = bool(site.shortcut.any())
        if has_signal:
            zero = _zero_parameters_on_shortcut(sites, raw)
            shortcuts.append(ZeroShortcut(site.name, zero))

    return shortcuts


def _indices_with_zero_gain(records: Iterable[SublayerRecord]) -> set[int]:
    """Return the indices of the sub-layers that were measured with a gain of zero."""
    indices: set[int] = set()
    for record in records:
        was_measured = record.branch_norm is not None
        if was_measured and record.shortcut_gain == 0:
            indices.add(record.index)

    return indices


def _zero_parameters_on_shortcut(sites: Sites, raw: Site) -> list[str]:
    """Return the parameters of zeros between a shortcut and the sum that it enters."""
    # 1. The calls from the shortcut to the term of the sum.
    node, place = raw.carrier
    terms = sites.graph.nodes[node].terms
    calls: Iterable[int] = ()
    if terms:
        calls = sites.finder.cone(raw.shortcut, terms[place].values)

    # 2. What they read.
    names = parameters_of(sites.graph, calls, sites.skeleton)
    return [name for name in names if not bool(sites.skeleton.params[name].any())]
