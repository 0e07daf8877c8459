"""How every parameter was initialised, as plain data for the rules: role, family, std with its sampling interval."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from jacdiag.measure.draws import Draw, Draws, copies_of, pieces_of
from jacdiag.report.contract import ContractRecord, WeightRecord
from jacdiag.trace.found import Sites
from jacdiag.trace.uses import Use, pattern, tied_to_head, uses_of

TABLES = ("embedding", "positions")
_FROM_CONFIG = {  # variable -> what configs call it
    "initializer_range": ("initializer_range", "init_std"),
    "initializer_factor": ("initializer_factor",),
    "H": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "d_head": ("head_dim", "d_kv"),
}


def contract_of(
    sites: Sites, draws: Draws, model: nn.Module, layers: int, width: int, vocabulary: int | None,
    pinned: Mapping[str, str] | None = None, decayed: Iterable[str] | None = None,
) -> ContractRecord:  # fmt: skip
    """The record of a traced model; weights are read one at a time, wherever they lie.

    Args:
        sites: of the model.
        draws: of its weights, as far as they are known already.
        model: asked for its config and its class only.
        layers, width, vocabulary: N, d and V of formulas.
        pinned: the user's own contract, role or name pattern -> formula.
        decayed: names of the parameters that an optimizer lets decay.
    """
    outlines, first = sites.skeleton.outlines, sites.skeleton.aliases
    decay = None if decayed is None else {first.get(name, name) for name in decayed}
    uses = uses_of(sites)
    found = {name: draws.of(name, table=use.role in TABLES) for name, use in uses.items()}
    copies = copies_of(found, draws.params)
    pieces = pieces_of(_unexplained(uses, found), draws.params)
    weights = [
        replace(
            record_of(name, outlines[name].shape, use, found[name], decay),
            same_as=copies.get(name, ""),
            piece_of=pieces.get(name, ""),
        )
        for name, use in uses.items()
    ]
    return ContractRecord(
        family=family_of(model),
        sizes=sizes_of(model, layers, width, vocabulary),
        weights=weights,
        tied=sorted(tied_to_head(sites)),
        logits_std=_logits_std(sites.output, vocabulary),
        pinned=dict(pinned or {}),
    )


def record_of(
    name: str, shape: Sequence[int], use: Use, draw: Draw | None, decayed: set[str] | None = None
) -> WeightRecord:
    """The record of one parameter."""
    base = WeightRecord(
        name, list(shape), use.role, pattern(name) if use.layer is not None else name, use.layer, use.sublayer,
        use.fan_in, use.fan_out, decayed=None if decayed is None else name in decayed, offset=use.offset,
    )  # fmt: skip
    if draw is None:
        return base
    return WeightRecord(**{
        **vars(base), "family": draw.family, "std": draw.std, "lower": draw.lower, "upper": draw.upper,
        "mean": draw.mean, "truncation": draw.truncation, "zero_rows": draw.zero_rows,
        "largest": draw.largest, "tiny": draw.tiny,
    })  # fmt: skip


def _unexplained(uses: Mapping[str, Use], found: Mapping[str, Draw | None]) -> list[str]:
    """Return gains, scales and biases that are not constant, where most of their role are."""
    names: list[str] = []
    for role in ("norm_gain", "scale", "bias"):
        draws = {name: draw for name, use in uses.items() if use.role == role and (draw := found[name]) is not None}
        drawn = [name for name, draw in draws.items() if draw.family not in ("zero", "constant")]
        if len(drawn) < len(draws) / 2:
            names += drawn
    return names


def family_of(model: nn.Module) -> str:
    """The model type of a Hugging Face config, else the name of the class."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return kind if isinstance(kind, str) and kind else type(model).__name__


def sizes_of(model: nn.Module, layers: int, width: int, vocabulary: int | None) -> dict[str, float]:
    """The variables of formulas that a model has, in the order in which they are shown."""
    sizes: dict[str, float] = {"N": layers, "d": width}
    if vocabulary:
        sizes["V"] = vocabulary
    config = getattr(model, "config", None)
    for variable, names in _FROM_CONFIG.items():
        value = next((v for name in names if _is_number(v := _setting(config, name))), None)
        if value is not None:
            sizes[variable] = value
    if "H" in sizes and "d_head" not in sizes and sizes["H"] > 0:
        sizes["d_head"] = width / sizes["H"]
    return sizes


def _setting(config: Any, name: str) -> Any:
    """Return a number of a config; None where it has none, or one for each layer, which raises an error of its own."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def decayed_by(model: nn.Module, optimizer: Any) -> list[str]:
    """Names of the parameters in groups with weight decay.

    Args:
        optimizer: a torch optimizer, or its list of parameter groups.
    """
    groups = getattr(optimizer, "param_groups", optimizer)
    held = {id(p) for group in groups if group.get("weight_decay", 0) for p in group["params"]}
    return [name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in held]


def _logits_std(output: Any, vocabulary: int | None) -> float | None:
    found = getattr(output, "logits", output)
    found = found[0] if isinstance(found, tuple | list) and found else found
    if not isinstance(found, Tensor) or found.is_meta or not vocabulary or found.shape[-1:] != (vocabulary,):
        return None
    value = float(found.detach().double().std(correction=0)) if found.numel() > 1 else math.nan
    return value if torch.isfinite(torch.tensor(value)) else None
