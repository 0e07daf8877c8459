"""Whether head and embedding are one tensor, compared with what the model says about it."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import torch
from torch import nn

from jacdiag.records.init_contract import WeightRecord
from jacdiag.records.structure import TieRecord
from jacdiag.trace.execution.skeleton import Skeleton

_FLAG = "tie_word_embeddings"
_INNER_CONFIGS = ("text_config", "decoder", "language_config", "llm_config")


def tie_of(
    model: nn.Module, skeleton: Skeleton, weights: Iterable[WeightRecord], tied: Iterable[str]
) -> TieRecord | None:
    """Return what a model says about its head and embedding, and what they are.

    Args:
        model: only its config and its accessors are read; nothing of it is run.
        skeleton: of the model.
        weights: records of its parameters; they show head and embedding if the model has no
            accessors.
        tied: embeddings that the head reads too.

    Returns:
        None if the model says nothing, or has no head and embedding of one shape.
    """
    # 1. What the model says, and of which two weights.
    said, by = declared_tie(model)
    if said is None:
        return None

    pair = _pair_by_accessors(model, skeleton)
    if pair is None:
        pair = _pair_by_roles(list(weights), list(tied))
    if pair is None:
        return None

    # 2. What the two are.
    head, embedding = pair
    first, second = skeleton.params[head], skeleton.params[embedding]
    if first.shape != second.shape:
        return None

    shared = head == embedding or first.data_ptr() == second.data_ptr()
    # A model of encoder and decoder has two tables: the head may share that of the decoder
    # (T5Gemma).
    names_of_head = list(skeleton.aliases.values()).count(head)
    if said and names_of_head > 1:
        shared = True
        embedding = head

    # 3. Numbers are compared only if memory does not tell.
    equal = shared or bool(torch.equal(first, second.to(first.device)))
    return TieRecord(said, by, head, embedding, shared, equal)


def declared_tie(model: nn.Module) -> tuple[bool | None, str]:
    """Return whether a model says that head and embedding are one tensor, and where.

    None if it does not say.

    A class of transformers that names no tied weights cannot tie them, whatever its config holds:
    nothing is said then. Nor is anything said by two configs, an outer and an inner one, that
    differ.
    """
    config = getattr(model, "config", None)
    can_be_tied = bool(getattr(model, "_tied_weights_keys", _FLAG))
    if config is None or not can_be_tied:
        return None, ""

    # 1. The flags of the config and of the configs in it.
    flags = {"config": _flag_of(config)}
    for name in _INNER_CONFIGS:
        inner = getattr(config, name, None)
        if inner is not None:
            flags[f"config.{name}"] = _flag_of(inner)
    stated = {place: flag for place, flag in flags.items() if flag is not None}

    # 2. They must agree.
    if len(set(stated.values())) != 1:
        return None, ""

    place, flag = next(iter(stated.items()))
    return flag, f"{place}.{_FLAG}"


def _flag_of(config: Any) -> bool | None:
    """Return whether a config ties head and embedding; None if it does not say."""
    if isinstance(config, dict):
        value = config.get(_FLAG)
    else:
        value = getattr(config, _FLAG, None)

    # Some configs hold None.
    if not isinstance(value, bool):
        return None

    return value


def _pair_by_accessors(model: nn.Module, skeleton: Skeleton) -> tuple[str, str] | None:
    """Return the names of the weights of `get_output_embeddings` and `get_input_embeddings`."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    pair = []
    for accessor in ("get_output_embeddings", "get_input_embeddings"):
        # 1. The module. A model may inherit an accessor that it does not implement.
        try:
            module = getattr(model, accessor)()
        except (AttributeError, NotImplementedError, TypeError):
            return None

        # 2. The name of its weight.
        name = names.get(id(getattr(module, "weight", None)), "")
        name = skeleton.aliases.get(name, name)
        if name not in skeleton.params:
            return None

        pair.append(name)

    head, embedding = pair
    return head, embedding


def _pair_by_roles(weights: list[WeightRecord], tied: list[str]) -> tuple[str, str] | None:
    """Return head and embedding by what the forward does with them."""
    # 1. A table that the head reads.
    if tied:
        return tied[0], tied[0]

    # 2. The first two of one shape.
    heads = [weight for weight in weights if weight.role == "head"]
    tables = [weight for weight in weights if weight.role == "embedding"]
    for head, table in product(heads, tables):
        if head.shape == table.shape:
            return head.parameter, table.parameter

    return None
