"""LoRA adapters that are saved together with their base model, as PEFT names them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from jacdiag.sources.tensor_sets import Candidate

# LoRA of PEFT, of diffusers and of kohya; then LoHa, LoKr, IA3, OFT, VeRA and prompts.
_LORA = re.compile(
    r"(^|\.)lora_(A|B|embedding_A|embedding_B|magnitude_vector|up|down|mid)(\.|$)"
    r"|(^|[._])lora\.(up|down)(\.|$)"
    r"|^lora_(unet|te\d?|transformer)_.*\.(alpha|dora_scale)$"
    r"|(^|\.)(hada_[wt][12]\w*|lokr_[wt][12]\w*|ia3_l|oft_[rR]|boft_[Rs]|vera_lambda_[bd])(\.|$)"
    r"|(^|\.)prompt_embeddings(\.|$)"
)
_BASE = ".base_layer."
_ORIGINAL = ".original_module."
_TRAINED = re.compile(r"\.modules_to_save\.[^.]+\.")
_PREFIX = "base_model.model."


def adapter_names(names: Iterable[str]) -> list[str]:
    """Return the names of tensors that belong to an adapter: LoRA, its relatives, or a prompt.

    Args:
        names: of tensors.

    Example:
        >>> adapter_names(["q_proj.lora_A.default.weight", "q_proj.base_layer.weight"])
        ['q_proj.lora_A.default.weight']
    """
    return list(filter(_LORA.search, names))


def holds_its_base(names: Iterable[str]) -> bool:
    """Return whether the base weights of an adapter are there too, under PEFT's names for them."""
    return any(_BASE in name for name in names)


def take_base_model(candidate: Candidate) -> tuple[Candidate, list[str]]:
    """Return the base model of a set of tensors that holds one together with a LoRA adapter.

    Args:
        candidate: a set of tensors by name.

    Returns:
        The base weights under the names of the model without PEFT, and a note; the candidate as it
        is and no note where it holds no adapter, or an adapter alone.
    """
    adapter = adapter_names(candidate.entries)
    if not adapter or not holds_its_base(candidate.entries):
        return candidate, []
    note = (
        f"the weights of a LoRA adapter ({len(adapter)} tensors) were not applied: the base model "
        "is measured; "
        "merge_and_unload() of PEFT merges them"
    )
    return replace(candidate, entries=_base_entries(candidate.entries, set(adapter))), [note]


def _base_entries(entries: Mapping[str, Any], adapter: set[str]) -> dict[str, Any]:
    """Return the weights of the base model under its own names.

    Args:
        entries: of the base model and the adapter, as PEFT names them.
        adapter: the names of the adapter.
    """
    base = {}
    for name, entry in entries.items():
        # 1. Leave out the adapter, and the copies of modules that were trained in full.
        if name in adapter or _ORIGINAL in name:
            continue

        # 2. The others have a name of PEFT inside of theirs.
        plain = _TRAINED.sub(".", name).replace(_BASE, ".")
        base[plain] = entry

    # 3. Take the prefix off, if all names have it.
    if not all(name.startswith(_PREFIX) for name in base):
        return base
    return {name.removeprefix(_PREFIX): entry for name, entry in base.items()}
