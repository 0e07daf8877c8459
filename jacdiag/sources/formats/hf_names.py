"""Names of weights in a file, translated into those of transformers as `from_pretrained` does."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

_INDEX = re.compile(r"\.([0-9]{1,9})\.")
# What transformers renames in every family, for versions that keep it in no table.
_LEGACY = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))


@dataclass
class Naming:
    """How the names in a file meet those of a model.

    Attributes:
        stored: name in the model -> name in the file.
        unexpected: names in the file that the model has no place for, those left out that
            transformers ignores.
        missing: names of the model that no weight of the file fills, ties counted as filled.
        initialised: names like the missing ones, which transformers sets by itself.
        converted: some weights are stacked, split or transposed while transformers loads them.
        used: names in the file that fill something.
        names: all names in the file.
    """

    stored: dict[str, str] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)
    converted: bool = False
    used: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    @property
    def layers_left_over(self) -> list[str]:
        """The names of further layers like those of the model: its config has fewer of them."""
        # Names that transformers ignores count here: its patterns meet real weights of such layers
        # too.
        layers = _layers(self.names)
        used = _layers(self.used).keys()
        like = {(stack, layers[stack, index]) for stack, index in used}
        others = [key for key in layers if key not in used]
        extra: set[tuple[str, int] | None] = {
            key for key in others if (key[0], layers[key]) in like
        }
        extra &= {_layer_of(name) for name in self.unexpected}
        return [name for name in self.names if _layer_of(name) in extra]


def is_of_transformers(model: nn.Module) -> bool:
    """Return whether a model's weights are named by the rules of transformers."""
    return hasattr(model, "base_model_prefix") and hasattr(
        model, "_keys_to_ignore_on_load_unexpected"
    )


def match_names(model: Any, names: Iterable[str]) -> Naming:
    """Translate the names in a file into those of a model.

    Args:
        model: a PreTrainedModel.
        names: the names in the file.

    Returns:
        The translation, and what is left over on either side.
    """
    expected: dict[str, Tensor] = model.state_dict(keep_vars=True)
    rename = _Renamer(model, expected)
    naming = Naming()
    filled: set[str] = set()

    names = sorted(names, key=_natural)  # some renamings of transformers depend on this order
    for name in names:
        targets, converted = rename(name)
        placed = [target for target in targets if target in expected]
        filled.update(placed)
        if not placed:
            naming.unexpected.append(name)
        elif converted:
            naming.converted = True
        else:
            naming.stored[placed[0]] = name

    left_over = set(naming.unexpected)
    naming.names = names
    naming.used = [name for name in names if name not in left_over]
    naming.unexpected = _without(naming.unexpected, _ignored_when_unexpected(model))
    filled |= _twins_of(expected, filled)
    open_names = [name for name in expected if name not in filled]
    # A frozen parameter is computed, not trained: a table of sinusoids. Files of Pegasus and Marian
    # leave it out.
    trained = [
        name
        for name in open_names
        if expected[name].requires_grad or not isinstance(expected[name], nn.Parameter)
    ]
    naming.missing = _without(
        trained, getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    )
    naming.initialised = [name for name in open_names if name not in set(naming.missing)]
    return naming


class _Renamer:
    """A translation of one name at a time, with the tables of transformers if it has them."""

    def __init__(self, model: Any, wanted: Mapping[str, Tensor]) -> None:
        self.wanted = wanted
        self.prefix: str = getattr(model, "base_model_prefix", "") or ""
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import (
                WeightConverter,
                WeightRenaming,
                rename_source_key,
            )
        except ImportError:
            self.rename: Any = None
            return
        table = get_model_conversion_mapping(model)
        self.rename = rename_source_key
        self.renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in table if isinstance(entry, WeightConverter)]

    def __call__(self, name: str) -> tuple[list[str], bool]:
        """Return the model's names for a name in the file, and whether its values are converted."""
        if self.rename is None:
            return [self._by_prefix(name)], False
        renamed, pattern = self.rename(
            name, self.renamings, self.converters, self.prefix, self.wanted
        )
        if renamed not in self.wanted and name in self.wanted:
            renamed, pattern = self.rename(name, [], [], self.prefix, self.wanted)
        if pattern is None:
            return [renamed], False
        converter = next(entry for entry in self.converters if pattern in entry.source_patterns)
        first = converter.target_patterns[0]
        return [renamed.replace(first, target) for target in converter.target_patterns], True

    def _by_prefix(self, name: str) -> str:
        for old, new in _LEGACY:
            name = name.replace(old, new)
        lead = f"{self.prefix}."
        if name in self.wanted or not self.prefix:
            return name
        if name.removeprefix(lead) in self.wanted:
            return name.removeprefix(lead)
        return f"{lead}{name}" if f"{lead}{name}" in self.wanted else name


def _ignored_when_unexpected(model: Any) -> list[str]:
    """Return the patterns of names that `from_pretrained` drops without a word."""
    patterns = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    buffers = [name for name, _ in model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.append(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.append(r"(^|\.)position_ids$")
    return patterns


def _without(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    compiled = [re.compile(pattern) for pattern in patterns]
    return [name for name in names if not any(pattern.search(name) for pattern in compiled)]


def _twins_of(wanted: Mapping[str, Tensor], filled: Iterable[str]) -> set[str]:
    """Return the names of the same tensors as the filled ones."""
    tensors = {id(wanted[name]) for name in filled}
    return {name for name, tensor in wanted.items() if id(tensor) in tensors}


def _layer_of(name: str) -> tuple[str, int] | None:
    """Return the stack and the index of the first layer in a name."""
    index = _INDEX.search(f".{name}")  # GPT-2's base model begins with "h.0."
    return None if index is None else (f".{name}"[: index.start()], int(index[1]))


def _layers(names: Iterable[str]) -> dict[tuple[str, int], frozenset[str]]:
    """(stack, index) -> the names inside of that layer."""
    inside: dict[tuple[str, int], set[str]] = defaultdict(set)
    for name in names:
        layer = _layer_of(name)
        if layer is not None:
            stack, index = layer
            inside[layer].add(f".{name}".removeprefix(f"{stack}.{index}."))
    return {key: frozenset(rest) for key, rest in inside.items()}


def _natural(name: str) -> list[tuple[bool, str, int]]:
    """Return a key that sorts layer 2 before layer 10, as transformers does."""
    parts = []
    for part in name.split("."):
        text = re.sub("[0-9]{1,9}$", "", part)
        digits = part[len(text) :]
        parts.append((bool(text), text, int(digits) if digits else -1))
    return parts
