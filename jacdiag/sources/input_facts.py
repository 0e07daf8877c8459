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
        # A method of this name is no config.
        if config is None or callable(config):
            continue
        yield config
        # Models of images and text have a config for each part.
        text_config = getattr(config, "text_config", None)
        if text_config is not None:
            yield text_config
    yield model


def _attribute(model: nn.Module, name: str) -> Any:
    """Return an attribute of a model; None if it has none, or if its own property raises."""
    # a property is the model's own code, and may raise anything
    try:
        return getattr(model, name, None)
    except Exception:
        return None


def _value(config: Any, name: str) -> Any:
    """Return a value of a config, which may be a mapping or an object."""
    if isinstance(config, Mapping):
        return config.get(name)
    # A mapping has attributes too, such as its methods, so it comes first.
    return getattr(config, name, None)


def _number(model: nn.Module, names: tuple[str, ...]) -> int | None:
    """Return the first number above 0 that a config of the model has under one of the names."""
    for config in configs(model):
        for name in names:
            value = _value(config, name)
            if _is_size(value):
                return value
    return None


def _is_size(value: Any) -> bool:
    """Return whether a value is a whole number above 0."""
    if not isinstance(value, int):
        return False

    # True is a number of Python, and no size.
    return value is not True and value > 0


def embedding(model: nn.Module) -> nn.Embedding | None:
    """Return the token embedding of a model; None if it has no table.

    That is the one that the model names, else the table of `vocab_size` rows, else the longest
    table. A table of positions or segments, by its name, comes last: it may be longer than a small
    vocabulary.
    """
    # 1. The one that the model names.
    named = _named_embedding(model)
    if named is not None:
        return named

    # 2. The table of the right size.
    tables = _token_tables(model)
    vocab_size = _number(model, _VOCABULARY)
    for table in tables:
        if table.num_embeddings == vocab_size:
            return table

    # 3. The longest one.
    return max(tables, key=lambda table: table.num_embeddings, default=None)


def _named_embedding(model: nn.Module) -> nn.Embedding | None:
    """Return the table that a model names as models of transformers do; None if it names none."""
    getter = getattr(unwrap(model), "get_input_embeddings", None)
    if not callable(getter):
        return None
    # Base classes have the method, and not every model a table for it.
    table = None
    with contextlib.suppress(NotImplementedError, AttributeError):
        table = getter()
    return table if isinstance(table, nn.Embedding) else None


def _token_tables(model: nn.Module) -> list[nn.Embedding]:
    """Return the tables that may be those of tokens; all of them if none has such a name."""
    tables: list[nn.Embedding] = []
    others: list[nn.Embedding] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding):
            continue

        # positions and segments
        group = others if _POSITIONS.search(name) else tables
        group.append(module)
    return tables or others


def vocabulary(model: nn.Module) -> int | None:
    """Return the number of token ids that the model takes; None if it takes none."""
    table = embedding(model)
    vocab_size = _number(model, _VOCABULARY)
    if table is None:
        return vocab_size
    # A table may be padded to a round number of rows.
    if vocab_size is None:
        return table.num_embeddings
    return min(table.num_embeddings, vocab_size)


def longest_sequence(model: nn.Module) -> int | None:
    """Return the longest sequence that the model says it takes."""
    return _number(model, _LENGTHS)


def position_rows(model: nn.Module) -> int | None:
    """Return how many rows the model's table of positions has; None if no name is that of one."""
    rows = []
    inner = unwrap(model)

    # 1. Tables that are modules.
    for name, module in inner.named_modules():
        if isinstance(module, nn.Embedding) and _is_of_positions(name):
            rows.append(module.num_embeddings)

    # 2. Tables that are parameters, (T, d) or (1, T, d).
    for name, parameter in inner.named_parameters():
        if parameter.dim() in (2, 3) and _is_of_positions(name):
            rows.append(parameter.shape[-2])
    return min(rows, default=None)


def _is_of_positions(name: str) -> bool:
    """Return whether the last part of a name is one of tables of positions."""
    return _POSITION_TABLE.search(name.rpartition(".")[2]) is not None


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
    # A forward in C has no signature.
    try:
        parameters = inspect.signature(unwrap(model).forward).parameters
    except (TypeError, ValueError):
        return False
    return name in parameters


def special_ids(model: nn.Module) -> set[int]:
    """Return the ids that mark padding, beginning or end, as the model's config names them."""
    ids: set[int] = set()
    for config in configs(model):
        for name in _SPECIAL_IDS:
            ids |= _ids_in(_value(config, name))
    return ids


def _ids_in(value: Any) -> set[int]:
    """Return the ids in a value of a config, which may be anything."""
    # Some models have several ids for the end.
    if isinstance(value, list | tuple):
        return {item for item in value if isinstance(item, int)}
    if isinstance(value, int):
        return {value}

    # Most models have no such id.
    return set()
