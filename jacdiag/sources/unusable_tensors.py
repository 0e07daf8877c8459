"""Tensors that are no weights as they stand: quantised, emptied by ZeRO-3, or adapters."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from jacdiag.errors import SourceError, clipped
from jacdiag.sources.lora_adapters import adapter_names
from jacdiag.sources.tensor_sets import Candidate

_SHOWN = 160
_GATHER = (
    "gather the weights with the zero_to_fp32.py that DeepSpeed put into the checkpoint's folder: "
    "python zero_to_fp32.py . OUTPUT (a folder, with older versions a file), then audit OUTPUT"
)
_DEEPSPEED = ("ds_version", "ds_config", "param_shapes")
_DEQUANTISE = "audit the checkpoint that was quantised, or dequantise it to bfloat16 and save that"
# Names that diffusers and kohya's scripts give, and PEFT does not.
_FOR_DIFFUSERS = re.compile(r"(^|[._])lora[._](up|down|mid)(\.|$)|^lora_(unet|te\d?|transformer)_")
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
    is_scheduler = "base_lrs" in top and "last_epoch" in top
    if is_scheduler and not _has_network(candidates):
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


def _has_network(candidates: Sequence[Candidate]) -> bool:
    """Return whether one of the sets is the weights of a network, or an average of them."""
    return any(candidate.is_network for candidate in candidates)


# -- DeepSpeed -------------------------------------------------------------------------------------


def _check_zero(path: Path, candidates: Sequence[Candidate], top: Mapping[Any, Any]) -> None:
    """Raise if a file is one rank's part of a DeepSpeed ZeRO checkpoint."""
    # 1. A part of the optimizer.
    _check_zero_optimizer(path, top.get("optimizer_state_dict"))

    # Without these names the file is not one of DeepSpeed.
    if top.keys().isdisjoint(_DEEPSPEED):
        return

    # 2. The model, its weights emptied.
    for candidate in candidates:
        empty = _empty_tensors(candidate.entries)
        if empty and not candidate.is_optimizer:
            raise SourceError(
                f"'{path}' is one rank's file of a DeepSpeed ZeRO-3 checkpoint, and holds no "
                "whole weights",
                got=_count_of_empty(empty, candidate.entries),
                hint=_GATHER,
            )

    # 3. The model, its weights left out.
    lists_shapes = isinstance(top.get("param_shapes"), list | tuple | Mapping)
    if lists_shapes and not _has_network(candidates):
        raise SourceError(
            f"'{path}' is one rank's file of a DeepSpeed ZeRO-3 checkpoint, and holds no weights",
            got="param_shapes, the shapes of weights that are shared out over the ranks",
            hint=_GATHER,
        )


def _check_zero_optimizer(path: Path, optimizer: Any) -> None:
    """Raise if a file holds one rank's part of an optimizer that ZeRO shares out."""
    if not isinstance(optimizer, Mapping):
        return
    is_of_zero = "zero_stage" in optimizer or "partition_count" in optimizer
    if not is_of_zero:
        return

    # Without a number, it is taken for the first one.
    stage = optimizer.get("zero_stage")
    if not isinstance(stage, int):
        stage = 1

    # Stage 3 shares out the weights too.
    hint = "the weights are in mp_rank_00_model_states.pt of the same folder"
    if stage >= 3:
        hint = _GATHER

    raise SourceError(
        f"'{path}' is one rank's part of the optimizer in a DeepSpeed ZeRO-{stage} "
        "checkpoint, not its weights",
        hint=hint,
    )


def _empty_tensors(entries: Mapping[str, Any]) -> list[str]:
    """Return the names of tensors without numbers, as ZeRO-3 leaves them."""
    return [name for name, entry in entries.items() if tuple(entry.shape) == (0,)]


def _count_of_empty(empty: Sequence[str], entries: Mapping[str, Any]) -> str:
    """Return how many tensors are empty, and their names."""
    names = clipped(", ".join(empty), _SHOWN)
    return f"{len(empty)} of {len(entries)} tensors are empty: {names}"


def _check_empty(path: Path, entries: Mapping[str, Any]) -> None:
    """Raise if most tensors are empty."""
    empty = _empty_tensors(entries)
    # A model may have a few of its own.
    if len(empty) <= len(entries) / 2:
        return
    raise SourceError(
        f"'{path}' holds names and no weights, as a file that one rank of a ZeRO-3 run saved",
        got=_count_of_empty(empty, entries),
        hint=f"if it is a DeepSpeed run, {_GATHER}",
    )


# -- quantised -------------------------------------------------------------------------------------


def check_quantised(path: Path, entries: Mapping[str, Any]) -> None:
    """Raise if tensors are quantised weights.

    Those are numbers of 8 bits or less that have no meaning without their scales.

    Args:
        path: where they are from.
        entries: tensors, or where they lie, by name.

    Raises:
        SourceError: they are; the message names the scheme if it is known.
    """
    # 1. Find them.
    has_scales = any(map(_SCALES.search, entries))
    quantised = [name for name, entry in entries.items() if _is_quantised(name, entry, has_scales)]
    if not quantised:
        return

    # 2. Say what they are.
    types = {entries[name].dtype for name in quantised}
    count = sum(entry.dtype in types for entry in entries.values())
    kinds = sorted(str(dtype).removeprefix("torch.") for dtype in types)
    names = clipped(", ".join(quantised), _SHOWN)
    numbers = f"{count} of {len(entries)} tensors are {', '.join(kinds)}"
    scheme = _scheme(entries, quantised)
    raise SourceError(
        f"'{path}' holds quantised weights ({scheme}), which jacdiag does not measure",
        got=f"{numbers}, such as the weights {names}",
        hint=_DEQUANTISE,
    )


def _is_quantised(name: str, entry: Any, has_scales: bool) -> bool:
    """Return whether a tensor is a quantised weight.

    Args:
        name: of the tensor.
        entry: the tensor, or where it lies.
        has_scales: whether some tensor next to it is a scale by its name.
    """
    # 1. By its type alone.
    if str(entry.dtype).startswith(("torch.qint", "torch.quint")):
        return True

    # 2. Floating point of 8 bits. Single numbers may be counts.
    if entry.dtype.is_floating_point:
        return len(entry.shape) > 0 and bool(entry.dtype.itemsize < 2)

    # 3. A matrix of 8-bit integers. Zero points are vectors.
    if len(entry.shape) < 2:
        return False
    if entry.dtype == torch.int8:
        return True

    # 4. Other integers may be indices or masks: by their names, next to scales.
    if entry.dtype not in _INTEGERS:
        return False
    return _is_named_as_packed(name) or (has_scales and _is_named_as_weight(name))


def _is_named_as_packed(name: str) -> bool:
    """Return whether the last part of a name is one that only packed weights have."""
    return name.rpartition(".")[2] in ("qweight", "weight_packed")


def _is_named_as_weight(name: str) -> bool:
    """Return whether the last part of a name is one of packed weights."""
    last = name.rpartition(".")[2]
    return "weight" in last or last.endswith(("_blocks", "_packed"))


def _scheme(entries: Mapping[str, Any], quantised: Sequence[str]) -> str:
    """Return the name of the scheme, as far as names and types say it."""
    # 1. The names, which are those of one library.
    by_name = _scheme_by_name(entries)
    if by_name is not None:
        return by_name

    # 2. The types.
    types = {entries[name].dtype for name in quantised}
    if any(dtype.is_floating_point for dtype in types):
        return "fp8"
    return "int8" if torch.int8 in types else "integers"


def _scheme_by_name(entries: Mapping[str, Any]) -> str | None:
    """Return the scheme to which the names belong, by their ends; None if it is not known."""
    lasts = {name.rpartition(".")[2] for name in entries}

    # 1. Only GPTQ stores an order of the columns, and not every version of it.
    if "qweight" in lasts:
        return "GPTQ" if "g_idx" in lasts else "GPTQ or AWQ"

    # 2. bitsandbytes, whose 4-bit state is spread over several names.
    if "SCB" in lasts:
        return "int8 of bitsandbytes"
    has_state = any("quant_state" in name for name in entries)
    if has_state or not lasts.isdisjoint({"absmax", "quant_map"}):
        return "4-bit of bitsandbytes"

    # 3. Packed weights.
    if any(last.endswith("_blocks") for last in lasts):
        return "4-bit blocks with scales"
    if "weight_packed" in lasts:
        return "packed integers of compressed-tensors"
    return None


# -- adapters --------------------------------------------------------------------------------------


def _check_adapter(path: Path, entries: Mapping[str, Any]) -> None:
    """Raise if most tensors belong to an adapter."""
    lora = adapter_names(entries)
    # A base model with an adapter has more tensors of its own.
    if len(lora) <= len(entries) / 2:
        return
    names = clipped(", ".join(lora), _SHOWN)
    raise SourceError(
        f"'{path}' holds {_kind_of_adapter(lora)}, which changes a base model and is no model by "
        "itself",
        got=f"{len(lora)} of {len(entries)} tensors are of the adapter: {names}",
        hint=_way_to_merge(lora),
    )


def _kind_of_adapter(names: Sequence[str]) -> str:
    """Return what an adapter is, by the names of its tensors."""
    # Only LoRA has its own name in those of its tensors.
    if any("lora" in name for name in names):
        return "a LoRA adapter"
    return "an adapter"


def _way_to_merge(names: Sequence[str]) -> str:
    """Return how to make a model of an adapter and its base, by the library that saved it."""
    # 1. A prompt goes before the input, and changes no weight.
    if any("prompt_embeddings" in name for name in names):
        return "audit the base model: a learned prompt changes none of its weights"

    # 2. Files for diffusers and its tools.
    if any(map(_FOR_DIFFUSERS.search, names)):
        return (
            "merge it first: pipeline.load_lora_weights(FILE), pipeline.fuse_lora(), then save and "
            "audit the part of the pipeline that it changes"
        )

    # 3. PEFT.
    return (
        "merge it first: peft.PeftModel.from_pretrained(base, ADAPTER_FOLDER)"
        ".merge_and_unload().save_pretrained('merged'), then audit the folder merged"
    )
