"""Names of weights in a file, translated into those of transformers as `from_pretrained` does."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

_INDEX = re.compile(r"\.([0-9]{1,9})\.")
# What transformers renames in every family, for versions that keep it in no table.
_LEGACY = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))
# Buffer -> the pattern of its names in older files.
_COMPUTED_BUFFERS = {
    "rotary_emb.inv_freq": r"rotary_emb\.inv_freq",
    "position_ids": r"(^|\.)position_ids$",
}


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
        # 1. The layers of the files that the model uses, and what is in them.
        # Names that transformers ignores count here: its patterns meet real weights of such layers
        # too.
        layers = _layers(self.names)
        used = _layers(self.used).keys()
        used_kinds = {_LayerKind(layer.stack, layers[layer]) for layer in used}

        # 2. Other layers of the same kind, if one of their names is unexpected.
        unexpected = {_layer_of(name) for name in self.unexpected}
        extra = set()
        for layer, inside in layers.items():
            is_like_used = _LayerKind(layer.stack, inside) in used_kinds
            if layer not in used and layer in unexpected and is_like_used:
                extra.add(layer)
        return [name for name in self.names if _layer_of(name) in extra]


def is_of_transformers(model: nn.Module) -> bool:
    """Return whether a model's weights are named by the rules of transformers."""
    attributes = ("base_model_prefix", "_keys_to_ignore_on_load_unexpected")
    return all(hasattr(model, attribute) for attribute in attributes)


def match_names(model: Any, names: Iterable[str]) -> Naming:
    """Translate the names in a file into those of a model.

    Args:
        model: a PreTrainedModel.
        names: the names in the file.

    Returns:
        The translation, and what is left over on either side.
    """
    expected: dict[str, Tensor] = model.state_dict(keep_vars=True)
    # Some renamings of transformers depend on this order.
    naming = Naming(names=sorted(names, key=_natural))

    # 1. The names that find a place in the model.
    filled = _translate(naming, _Renamer(model, expected), expected)

    # 2. What is left over in the file.
    left_over = set(naming.unexpected)
    naming.used = [name for name in naming.names if name not in left_over]
    naming.unexpected = _without(naming.unexpected, _ignored_when_unexpected(model))

    # 3. What is left over in the model: a weight of the file is needed, or transformers sets it.
    filled |= _twins_of(expected, filled)
    open_names = [name for name in expected if name not in filled]
    needed = [name for name in open_names if not _is_computed(expected[name])]
    naming.missing = _without(needed, getattr(model, "_keys_to_ignore_on_load_missing", None) or ())
    missing = set(naming.missing)
    naming.initialised = [name for name in open_names if name not in missing]
    return naming


def _translate(naming: Naming, rename: _Renamer, expected: Mapping[str, Tensor]) -> set[str]:
    """Sort the names of a file by whether the model has a place for them.

    Args:
        naming: is given the names that are stored and those that are unexpected.
        rename: translates a name.
        expected: the tensors of the model by name.

    Returns:
        The names of the model that are filled.
    """
    filled: set[str] = set()
    for name in naming.names:
        translation = rename(name)
        placed = [target for target in translation.targets if target in expected]
        filled.update(placed)
        if not placed:
            naming.unexpected.append(name)
        elif translation.is_converted:
            naming.converted = True
        else:
            naming.stored[placed[0]] = name
    return filled


def _is_computed(tensor: Tensor) -> bool:
    """Return whether a tensor is computed and not trained.

    A frozen parameter is, such as a table of sinusoids: files of Pegasus and Marian leave it out.
    """
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad


@dataclass(frozen=True)
class _Translation:
    """The model's names for a name in a file, and whether its values are converted."""

    targets: list[str]
    is_converted: bool = False


class _Renamer:
    """A translation of one name at a time, with the tables of transformers if it has them.

    Args:
        model: a PreTrainedModel.
        expected: its tensors by name.
    """

    def __init__(self, model: Any, expected: Mapping[str, Tensor]) -> None:
        self.expected = expected
        self.prefix: str = getattr(model, "base_model_prefix", "") or ""
        # Older versions of transformers have no such tables.
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

    def __call__(self, name: str) -> _Translation:
        """Return the model's names for a name in the file."""
        if self.rename is None:
            return _Translation([self._by_prefix(name)])

        # 1. By the tables, unless they lead away from a name that the model has.
        renamed, pattern = self.rename(
            name, self.renamings, self.converters, self.prefix, self.expected
        )
        if renamed not in self.expected and name in self.expected:
            renamed, pattern = self.rename(name, [], [], self.prefix, self.expected)
        if pattern is None:
            return _Translation([renamed])

        # 2. A converter fills one name or several.
        converter = next(entry for entry in self.converters if pattern in entry.source_patterns)
        first = converter.target_patterns[0]
        targets = [renamed.replace(first, target) for target in converter.target_patterns]
        return _Translation(targets, is_converted=True)

    def _by_prefix(self, name: str) -> str:
        """Return a name with the prefix of the base model added or taken off, as it fits."""
        for old, new in _LEGACY:
            name = name.replace(old, new)
        if not self.prefix or name in self.expected:
            return name
        lead = f"{self.prefix}."
        for other in (name.removeprefix(lead), lead + name):
            if other in self.expected:
                return other
        return name


def _ignored_when_unexpected(model: Any) -> list[str]:
    """Return the patterns of names that `from_pretrained` drops without a word."""
    patterns = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    buffers = [name for name, _ in model.named_buffers()]
    # Older files hold buffers that the model now computes.
    for buffer, pattern in _COMPUTED_BUFFERS.items():
        if any(name.endswith(buffer) for name in buffers):
            patterns.append(pattern)
    return patterns


def _without(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """Return the names that match none of the patterns."""
    remaining = list(names)
    for pattern in patterns:
        compiled = re.compile(pattern)
        remaining = [name for name in remaining if not compiled.search(name)]
    return remaining


def _twins_of(expected: Mapping[str, Tensor], filled: Iterable[str]) -> set[str]:
    """Return the names of the same tensors as the filled ones."""
    tensors = {id(expected[name]) for name in filled}
    return {name for name, tensor in expected.items() if id(tensor) in tensors}


class _Layer(NamedTuple):
    """A layer by the name of its stack and its number in it, from 0."""

    stack: str
    number: int


class _LayerKind(NamedTuple):
    """What layers of one kind share: their stack, and the names inside of them."""

    stack: str
    inside: frozenset[str]


def _layer_of(name: str) -> _Layer | None:
    """Return the first layer in a name; None if it has no number."""
    # A name may begin with the number: "0.weight".
    dotted = f".{name}"
    number = _INDEX.search(dotted)
    if number is None:
        return None
    return _Layer(dotted[: number.start()], int(number[1]))


def _layers(names: Iterable[str]) -> dict[_Layer, frozenset[str]]:
    """Return the names inside of each layer."""
    inside: dict[_Layer, set[str]] = defaultdict(set)
    for name in names:
        layer = _layer_of(name)
        if layer is not None:
            lead = f"{layer.stack}.{layer.number}."
            inside[layer].add(f".{name}".removeprefix(lead))
    return {layer: frozenset(inner) for layer, inner in inside.items()}


def _natural(name: str) -> list[tuple[bool, str, int]]:
    """Return a key that sorts layer 2 before layer 10, as transformers does."""
    key = []
    for part in name.split("."):
        text = re.sub("[0-9]{1,9}$", "", part)
        digits = part[len(text) :]
        # a part without a number comes first
        number = int(digits) if digits else -1
        key.append((bool(text), text, number))
    return key
