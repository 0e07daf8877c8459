"""What a sub-layer is by the name of its class, to be held against what the tracer says from the dataflow."""

from __future__ import annotations

import re

from torch import nn

# In this order: a class called SparseMoeBlock holds MLPs, an attention block may hold a convolution.
_KINDS = [
    ("moe", r"moe|sparse|expert"),
    ("mixer", r"mamba|mixer|rwkv|lstm|deltanet|recurrent|ssm|lightning|fourier|hyena|shortconv|kda|pooling"),
    ("attention", r"attention|attn"),
    ("mlp", r"mlp|ffn|feed_?forward|intermediate|densereludense|gateddense|boomer|\bff\b"),
    ("conv", r"conv"),
]  # fmt: skip


def told_by_class(name: str, model: nn.Module) -> str | None:
    """Returns the kind that the class of a sub-layer's module tells, or None if it tells nothing clear.

    A name with a suffix (":mlp") belongs to a module that holds more than one sub-layer: its class tells nothing.
    """
    if ":" in name:
        return None
    try:
        module = model.get_submodule(name.split("@")[0])
    except AttributeError:
        return None
    cls = _without_family(type(module).__name__, type(model).__name__)
    told = [kind for kind, pattern in _KINDS if re.search(pattern, cls, re.I)]
    if re.search(r"layer$|block$|stage$|model$", cls, re.I) and told != ["moe"]:
        return None
    return told[0] if told else None


def _without_family(cls: str, model: str) -> str:
    """'AfmoeAttention' of an 'AfmoeForCausalLM' is 'Attention': a family's name tells nothing."""
    family = re.split(r"For[A-Z]|LMHead|Model", model)[0]
    while family and not cls.startswith(family):
        family = family[:-1]
    return cls[len(family) :] or cls


def told_cross(name: str) -> bool:
    """Whether a module's name says cross-attention, in which the tokens of the shortcut do not meet each other."""
    return bool(re.search(r"encoder_?attn|cross|encdec", name, re.I))
