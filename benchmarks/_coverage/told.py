"""What a sub-layer is by the name of its class, to be held against what the tracer says from the
dataflow.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

# In this order: a class called SparseMoeBlock holds MLPs, an attention block may hold a
# convolution.
_KINDS = [
    ("moe", r"moe|sparse|expert"),
    (
        "mixer",
        r"mamba|mixer|rwkv|lstm|deltanet|recurrent|ssm|lightning|fourier|hyena|shortc"
        r"onv(?!ol)|kda|delta|linear_?attention|pooling",
    ),
    ("attention", r"attention|attn"),
    ("mlp", r"mlp|ffn|feed_?forward|intermediate|densereludense|gateddense|boomer|\bff\b"),
    ("conv", r"conv"),
]


def told_by_class(name: str, model: nn.Module, facts: dict[str, Any]) -> str | None:
    """Returns the kind that the class of a sub-layer's module tells, or None if it tells nothing
    clear.

    A name with a suffix (":mlp") belongs to a module that holds more than one sub-layer: its class
    tells nothing.
    """
    by_name = next(
        (kind for part, kind in facts.get("told", {}).items() if name.endswith(part)), None
    )
    if (
        by_name is not None
        or ":" in name
        or any(name.endswith(part) for part in facts.get("not_told", ()))
    ):
        return by_name
    try:
        module = model.get_submodule(name.split("@")[0])
    except AttributeError:
        return None
    if set(getattr(module, "kernel_size", ())) == {1}:
        return None  # a convolution by name, a linear map of each token by what it does
    cls = _without_family(type(module).__name__, type(model).__name__)
    told = [kind for kind, pattern in _KINDS if re.search(pattern, cls, re.I)]
    if re.search(r"layer$|block$|stage$|model$", cls, re.I) and told != ["moe"]:
        return None
    if told[:1] == ["mlp"] and any(
        re.search(r"router|expert", type(m).__name__, re.I) for m in module.modules()
    ):
        return "moe"
    return told[0] if told else None


def _without_family(cls: str, model: str) -> str:
    """'AfmoeAttention' of an 'AfmoeForCausalLM' is 'Attention': a family's name tells nothing."""
    family = re.split(r"For[A-Z]|LMHead|Model", model)[0]
    while family and not cls.startswith(family):
        family = family[:-1]
    return cls[len(family) :] or cls


def told_cross(name: str) -> bool:
    """Whether a module's name says cross-attention, in which the tokens of the shortcut do not meet
    each other.
    """
    return bool(re.search(r"encoder_?attn|cross|encdec", name, re.I))
