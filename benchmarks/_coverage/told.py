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
    told = [kind for kind, pattern in _KINDS if re.search(pattern, type(module).__name__, re.I)]
    if re.search(r"layer$|block$|stage$|model$", type(module).__name__, re.I) and told != ["moe"]:
        return None
    return told[0] if told else None
