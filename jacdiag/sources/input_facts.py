"""What a model says about its own input: vocabulary, longest sequence, what its forward takes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from jacdiag.sources.module_wrappers import unwrap

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
    """The objects on which models keep their sizes: the model's config or args, and those of a text
    part.
    """
    model = unwrap(model)
    for name in ("config", "cfg", "args", "model_args", "params", "hparams"):
        found = _attribute(model, name)
        if found is not None and not callable(found):
            yield found
            inner = getattr(found, "text_config", None)
            if inner is not None:
                yield inner
    yield model


def _attribute(model: nn.Module, name: str) -> Any:
    """Return an attribute of a model; None if there is none, or if the model's own property
    raises.
    """
    try:
        return getattr(model, name, None)
    except Exception:
        return None


def _number(model: nn.Module, names: tuple[str, ...]) -> int | None:
    for config in configs(model):
        for name in names:
            value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def embedding(model: nn.Module) -> nn.Embedding | None:
    """The token embedding: what the model calls so, else the table of `vocab_size` rows, else the
    longest table.

    A table of positions or segments, by its name, comes last: it may be longer than a small
    vocabulary.
    """
    getter = getattr(unwrap(model), "get_input_embeddings", None)
    if callable(getter):
        try:
            found = getter()
        except (NotImplementedError, AttributeError):
            found = None
        if isinstance(found, nn.Embedding):
            return found
    named = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Embedding)]
    tables = [m for name, m in named if not _POSITIONS.search(name)] or [m for _, m in named]
    vocab = _number(model, _VOCABULARY)
    fitting = [m for m in tables if m.num_embeddings == vocab]
    return fitting[0] if fitting else max(tables, key=lambda m: m.num_embeddings, default=None)


def vocabulary(model: nn.Module) -> int | None:
    """Number of token ids that the model takes; None where it takes none."""
    table = embedding(model)
    said = _number(model, _VOCABULARY)
    if table is not None:
        return min(table.num_embeddings, said) if said else table.num_embeddings
    return said


def longest_sequence(model: nn.Module) -> int | None:
    """Longest sequence that the model says it takes."""
    return _number(model, _LENGTHS)


def position_rows(model: nn.Module) -> int | None:
    """Return how many rows the model's table of positions has; None if it has none that is known by
    its name.
    """
    rows = []
    for name, module in unwrap(model).named_modules():
        if isinstance(module, nn.Embedding) and _POSITION_TABLE.search(name.rpartition(".")[2]):
            rows.append(module.num_embeddings)
    for name, parameter in unwrap(model).named_parameters():
        if parameter.dim() in (2, 3) and _POSITION_TABLE.search(name.rpartition(".")[2]):
            rows.append(parameter.shape[-2])
    return min(rows, default=None)


def main_input(model: nn.Module) -> str:
    """What the first input is: "tokens", "pixels", or "unknown"."""
    said = getattr(unwrap(model), "main_input_name", None)
    if said == "pixel_values":
        return "pixels"
    if said == "input_ids" or vocabulary(model) is not None:
        return "tokens"
    return "unknown"


def takes(model: nn.Module, name: str) -> bool:
    """Whether the model's forward has a parameter of that name."""
    try:
        return name in inspect.signature(unwrap(model).forward).parameters
    except (TypeError, ValueError):
        return False


def special_ids(model: nn.Module) -> set[int]:
    """Ids that mark padding, beginning or end, as the model's config names them."""
    found: set[int] = set()
    for config in configs(model):
        for name in (
            "pad_token_id",
            "bos_token_id",
            "eos_token_id",
            "mask_token_id",
            "decoder_start_token_id",
        ):
            value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
            found |= {
                v
                for v in (value if isinstance(value, list | tuple) else [value])
                if isinstance(v, int)
            }
    return found
