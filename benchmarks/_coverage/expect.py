"""How many sub-layers a config promises, and where their norms stand; nothing of this is asked from
the tracer.

The defaults need no table: a decoder or an encoder layer holds attention and an MLP, a decoder
layer behind an encoder also cross-attention. Only where a config needs interpretation does
`families.toml` say how to read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "num_layers",
    "n_layers",
    "encoder_layers",
    "num_blocks",
    "depth",
)
_DECODER = ("decoder_layers", "num_decoder_layers", "decoder_num_hidden_layers")
_ENCODER = ("encoder_layers", "num_encoder_layers", "num_layers", "num_hidden_layers")
_PLACEMENT = {"causal-lm": "pre", "masked-lm": "post", "seq2seq": "post", "image": "pre"}


@dataclass(frozen=True)
class FamilyFacts:
    """What a config tells of a whole family.

    Attributes:
        count: how many sub-layers stand on the stream.
        nested: how many stand inside another's branch.
        placement: of the norm, one for all or by kind and part of a name. None if nothing tells it.
    """

    count: int
    nested: int = 0
    placement: str | dict[str, str] | None = None

    def placement_of(self, site: Any, kind: str | None) -> str | None:
        """What the config or the class tells of one sub-layer; a table tells it by kind, or by a
        part of the name.
        """
        if not isinstance(self.placement, dict):
            return None if site.nested else self.placement
        by_name = next(
            (
                where
                for part, where in self.placement.items()
                if part == site.name or (part.endswith(".") and part in f".{site.name}.")
            ),
            None,
        )
        told = by_name or self.placement.get(kind or "") or self.placement.get("rest")
        return None if told == "unknown" else told


def family_facts(task: str, config: Any, facts: dict[str, Any]) -> FamilyFacts:
    """Count the sub-layers that one forward must show."""
    config = _text_part(task, config, facts)
    if "stacks" in facts:
        count = sum(_stack(config, stack) for stack in facts["stacks"])
    elif task in ("seq2seq", "masked-lm") and getattr(config, "is_encoder_decoder", False):
        count = 2 * _number(config, _ENCODER) + 3 * _number(config, _DECODER)
    else:
        count = _stack(
            config,
            {
                "per_layer": facts.get("per_layer", 2),
                "by": facts.get("by"),
                "layers": facts.get("layers"),
            },
            causal=task in ("causal-lm", "seq2seq"),
        )
    placement = facts.get("placement", _PLACEMENT[task])
    return FamilyFacts(
        count + facts.get("plus", 0),
        _nested(config, facts),
        None if placement == "unknown" else placement,
    )


def _text_part(task: str, config: Any, facts: dict[str, Any]) -> Any:
    """The part of a composite config that runs: token ids alone go through the text model."""
    usual = ("vision_config",) if task == "image" else ("text_config", "decoder")
    part = facts.get("part") or next((p for p in usual if hasattr(config, p)), None)
    two = hasattr(config, "encoder") or any(hasattr(config, name) for name in _DECODER)
    if part is None or not hasattr(config, part) or (task == "seq2seq" and two):
        return config
    return getattr(config, part)


def _stack(config: Any, stack: dict[str, Any], causal: bool = False) -> int:
    """layers x per_layer; with `by`, per_layer is a table from what that list of the config says to
    a number.
    """
    at = _dotted(config, stack["part"]) if "part" in stack else config
    per_layer, by = stack.get("per_layer", 2), stack.get("by")
    if by:
        return sum(per_layer[str(kind).lower()] for kind in _dotted(at, by))
    layers = stack.get("layers")
    if isinstance(layers, int):
        return layers * per_layer
    if layers:
        value = _dotted(at, layers)
        return per_layer * (sum(value) if isinstance(value, (list, tuple)) else value)
    return per_layer * _number(at, (*_DECODER, *_LAYERS) if causal else _LAYERS)


def _nested(config: Any, facts: dict[str, Any]) -> int:
    return _stack(config, facts["nested"]) if "nested" in facts else 0


def _number(config: Any, names: tuple[str, ...]) -> int:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    depths = getattr(config, "depths", None)
    if depths is not None:
        return sum(depths)
    raise ValueError(f"{type(config).__name__} has none of {', '.join(names)}")


def _dotted(config: Any, path: str) -> Any:
    for part in path.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config
