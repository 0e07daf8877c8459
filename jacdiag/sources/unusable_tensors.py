"""Tensors that are no weights as they stand: quantised, emptied by ZeRO-3, adapters, an optimizer's
part.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from jacdiag.errors import SourceError, clipped
from jacdiag.sources.lora_adapters import adapter_names
from jacdiag.sources.tensor_sets import Candidate, Kind

_SHOWN = 160
_GATHER = (
    "gather the weights with the zero_to_fp32.py that DeepSpeed put into the checkpoint's folder: "
    "python zero_to_fp32.py . OUTPUT (a folder, with older versions a file), then audit OUTPUT"
)
_DEEPSPEED = ("ds_version", "ds_config", "param_shapes")
_DEQUANTISE = "audit the checkpoint that was quantised, or dequantise it to bfloat16 and save that"
_INTEGERS = (torch.int8, torch.uint8, torch.int32, torch.int16)
_SCALES = re.compile(
    r"(^|[._])(weight_scale(_inv|_2)?|scale_inv|SCB|absmax|quant_state|quant_map|nested_absmax|qzeros|g_idx|zero_point"
    r"|zeros?|scales?|weight_shape|weight_global_scale)([._]|$)"
)


def check_contents(path: Path, candidates: Sequence[Candidate], top: Mapping[Any, Any]) -> None:
    """Raise if a file is a part of a checkpoint whose weights are elsewhere.

    Args:
        path: the file.
        candidates: the sets of tensors in it.
        top: its outermost mapping.

    Raises:
        SourceError: it is one rank's file of a ZeRO run, or the state of a scheduler.
    """
    _check_zero(path, candidates, top)
    if "base_lrs" in top and "last_epoch" in top and not _networks(candidates):
        raise SourceError(
            f"'{path}' is the state of a learning-rate scheduler, and holds no weights",
            hint="audit the file with the weights, which the run saved next to it",
        )


def check_chosen(path: Path, entries: Mapping[str, Any], *, fitted: bool) -> None:
    """Raise if the chosen tensors are no weights as they stand.

    Args:
        path: the file.
        entries: the chosen tensors by name.
        fitted: whether they are exactly the names of a model that is known.

    Raises:
        SourceError: they are quantised or empty, or belong to an adapter.
    """
    _check_empty(path, entries)
    check_quantised(path, entries)
    if not fitted:
        _check_adapter(path, entries)


def _networks(candidates: Sequence[Candidate]) -> list[Candidate]:
    return [c for c in candidates if c.kind in (Kind.NETWORK, Kind.AVERAGE)]


# -- DeepSpeed -------------------------------------------------------------------------------------


def _check_zero(path: Path, candidates: Sequence[Candidate], top: Mapping[Any, Any]) -> None:
    optimizer = top.get("optimizer_state_dict")
    if isinstance(optimizer, Mapping) and (
        "zero_stage" in optimizer or "partition_count" in optimizer
    ):
        stage = optimizer.get("zero_stage")
        stage = stage if isinstance(stage, int) else 1
        if stage >= 3:
            hint = _GATHER
        else:
            hint = "the weights are in mp_rank_00_model_states.pt of the same folder"
        raise SourceError(
            f"'{path}' is one rank's part of the optimizer in a DeepSpeed ZeRO-{stage} "
            "checkpoint, not its weights",
            hint=hint,
        )
    if not any(key in top for key in _DEEPSPEED):
        return
    for c in candidates:
        empty = [name for name, entry in c.entries.items() if tuple(entry.shape) == (0,)]
        if empty and c.kind is not Kind.OPTIMIZER:
            raise SourceError(
                f"'{path}' is one rank's file of a DeepSpeed ZeRO-3 checkpoint, and holds no "
                "whole weights",
                got=(
                    f"{len(empty)} of {len(c.entries)} tensors are empty: "
                    f"{clipped(', '.join(empty), _SHOWN)}"
                ),
                hint=_GATHER,
            )
    if isinstance(top.get("param_shapes"), list | tuple | Mapping) and not _networks(candidates):
        raise SourceError(
            f"'{path}' is one rank's file of a DeepSpeed ZeRO-3 checkpoint, and holds no weights",
            got="param_shapes, the shapes of weights that are shared out over the ranks",
            hint=_GATHER,
        )


def _check_empty(path: Path, entries: Mapping[str, Any]) -> None:
    empty = [name for name, entry in entries.items() if tuple(entry.shape) == (0,)]
    if len(empty) > len(entries) / 2:
        raise SourceError(
            f"'{path}' holds names and no weights, as a file that one rank of a ZeRO-3 run saved",
            got=(
                f"{len(empty)} of {len(entries)} tensors are empty: "
                f"{clipped(', '.join(empty), _SHOWN)}"
            ),
            hint=f"if it is a DeepSpeed run, {_GATHER}",
        )


# -- quantised -------------------------------------------------------------------------------------


def check_quantised(path: Path, entries: Mapping[str, Any]) -> None:
    """Raise if tensors are quantised weights: numbers of 8 bits or less that have no meaning
    without their scales.

    Args:
        path: where they are from.
        entries: tensors, or where they lie, by name.

    Raises:
        SourceError: they are; the message names the scheme where it can be told.
    """
    odd = list(_quantised_names(entries))
    if not odd:
        return
    kinds = sorted({str(entries[name].dtype).removeprefix("torch.") for name in odd})
    raise SourceError(
        f"'{path}' holds quantised weights ({_scheme(entries, odd)}), which jacdiag does not "
        "measure",
        got=(
            f"{len(odd)} of {len(entries)} tensors are {', '.join(kinds)}: "
            f"{clipped(', '.join(odd), _SHOWN)}"
        ),
        hint=_DEQUANTISE,
    )


def _quantised_names(entries: Mapping[str, Any]) -> Iterator[str]:
    scaled = any(_SCALES.search(name) for name in entries)
    for name, entry in entries.items():
        last = name.rpartition(".")[2]
        matrix = len(entry.shape) >= 2
        if entry.dtype.is_floating_point and entry.dtype.itemsize < 2:
            if matrix:
                yield name
        elif str(entry.dtype).startswith(("torch.qint", "torch.quint")):
            yield name
        elif matrix and entry.dtype in _INTEGERS:
            named = "weight" in last or last.endswith(("_blocks", "_packed"))
            if entry.dtype == torch.int8 or (scaled and named):
                yield name


def _scheme(entries: Mapping[str, Any], odd: Sequence[str]) -> str:
    """Return the name of the scheme, as far as names and types tell it."""
    lasts = {name.rpartition(".")[2] for name in entries}
    if "qweight" in lasts:
        return "GPTQ" if "g_idx" in lasts else "GPTQ or AWQ"
    if "SCB" in lasts:
        return "int8 of bitsandbytes"
    if lasts & {"absmax", "quant_map"} or any("quant_state" in name for name in entries):
        return "4-bit of bitsandbytes"
    if any(last.endswith("_blocks") for last in lasts):
        return "4-bit blocks with scales"
    if "weight_packed" in lasts:
        return "packed integers of compressed-tensors"
    types = {entries[name].dtype for name in odd}
    if any(dtype.is_floating_point for dtype in types):
        return "fp8"
    return "int8" if torch.int8 in types else "integers"


# -- adapters --------------------------------------------------------------------------------------


def _check_adapter(path: Path, entries: Mapping[str, Any]) -> None:
    lora = adapter_names(entries)
    if len(lora) <= len(entries) / 2:
        return
    raise SourceError(
        f"'{path}' holds a LoRA adapter, which changes a base model and is no model by itself",
        got=(
            f"{len(lora)} of {len(entries)} tensors are of the adapter: "
            f"{clipped(', '.join(lora), _SHOWN)}"
        ),
        hint="merge it first: peft.PeftModel.from_pretrained(base, "
        "ADAPTER_FOLDER).merge_and_unload()"
        ".save_pretrained('merged'), then audit the folder merged",
    )
