"""What a model says about its own input: vocabulary, longest sequence, what its forward takes."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from jacdiag.sources.module_wrappers import unwrap

_CONFIGS = ("config", "cfg", "args", "model_args", "params", "hparams")
_SPECIAL_IDS = (
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "mask_token_id",
    "decoder_start_token_id",
)
_VOCABULARY = ("vocab_size", "n_vocab", "num_embeddings", "padded_vocab_size")
_LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "block_size",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "n_ctx",
    "seq_len",
)

_POSITION_TABLE = re.compile(
    r"^(wpe|pos|pos_?emb\w*|pos_?embed\w*|position\w*|embed_positions)$", re.IGNORECASE
)
_POSITIONS = re.compile(r"pos|wpe|segment|token_type", re.IGNORECASE)


def configs(model: nn.Module) -> Iterator[Any]:
    """Yield the objects on which models keep their sizes: configs or args, and the model itself."""
    model = unwrap(model)
    for name in _CONFIGS:
        config = _attribute(model, name)
        if config is None or callable(config):
            continue
        yield config
        text_config = getattr(config, "text_config", None)
        if text_config is not None:
            yield text_config
    yield model


def _attribute(model: nn.Module, name: str) -> Any:
    """Return an attribute of a model; None if it has none, or if its own property raises."""
    try:
        return getattr(model, name, None)
    except Exception:
        return None


def _value(config: Any, name: str) -> Any:
    """Return a value of a config, which may be a mapping or an object."""
    if isinstance(config, Mapping):
        return config.get(name)
    return getattr(config, name, None)


def _number(model: nn.Module, names: tuple[str, ...]) -> int | None:
    """Return the first number above 0 that a config of the model has under one of the names."""
    for config in configs(model):
        for name in names:
            value = _value(config, name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def embedding(model: nn.Module) -> nn.Embedding | None:
    """Return the token embedding of a model; None if it has no table.

    That is the one that the model names, else the table of `vocab_size` rows, else the longest
    table. A table of positions or segments, by its name, comes last: it may be longer than a small
    vocabulary.
    """
    # 1. The one that the model names.
    getter = getattr(unwrap(model), "get_input_embeddings", None)
    if callable(getter):
        table = None
        with contextlib.suppress(NotImplementedError, AttributeError):
            table = getter()
        if isinstance(table, nn.Embedding):
            return table

    # 2. The table of the right size, or the longest one.
    by_name = {name: m for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    tables = [table for name, table in by_name.items() if not _POSITIONS.search(name)]
    if not tables:
        tables = list(by_name.values())
    vocab_size = _number(model, _VOCABULARY)
    for table in tables:
        if table.num_embeddings == vocab_size:
            return table
    return max(tables, key=lambda table: table.num_embeddings, default=None)


def vocabulary(model: nn.Module) -> int | None:
    """Return the number of token ids that the model takes; None if it takes none."""
    table = embedding(model)
    vocab_size = _number(model, _VOCABULARY)
    if table is None:
        return vocab_size
    if vocab_size is None:
        return table.num_embeddings
    return min(table.num_embeddings, vocab_size)


def longest_sequence(model: nn.Module) -> int | None:
    """Return the longest sequence that the model says it takes."""
    return _number(model, _LENGTHS)


def position_rows(model: nn.Module) -> int | None:
    """Return how many rows the model's table of positions has; None if no name is that of one."""
    rows = []
    for name, module in unwrap(model).named_modules():
        if isinstance(module, nn.Embedding) and _POSITION_TABLE.search(name.rpartition(".")[2]):
            rows.append(module.num_embeddings)
    for name, parameter in unwrap(model).named_parameters():
        if parameter.dim() in (2, 3) and _POSITION_TABLE.search(name.rpartition(".")[2]):
            rows.append(parameter.shape[-2])
    return min(rows, default=None)


def main_input(model: nn.Module) -> str:
    """Return what the first input is: "tokens", "pixels", or "unknown"."""
    name = getattr(unwrap(model), "main_input_name", None)
    if name == "pixel_values":
        return "pixels"
    if name == "input_ids" or vocabulary(model) is not None:
        return "tokens"
    return "unknown"


def takes(model: nn.Module, name: str) -> bool:
    """Return whether the model's forward has a parameter of that name."""
    try:
        return name in inspect.signature(unwrap(model).forward).parameters
    except (TypeError, ValueError):
        return False


def special_ids(model: nn.Module) -> set[int]:
    """Return the ids that mark padding, beginning or end, as the model's config names them."""
    ids: set[int] = set()
    for config in configs(model):
        for name in _SPECIAL_IDS:
            value = _value(config, name)
            values = value if isinstance(value, list | tuple) else [value]
            ids |= {item for item in values if isinstance(item, int)}
    return ids
