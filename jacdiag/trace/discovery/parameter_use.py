"""What the forward does with one parameter, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ParameterUse:
    """What the forward does with one parameter.

    Attributes:
        role: embedding, positions, W_Q, W_K, W_V, W_QKV, W_KV, W_O, W_1, W_gate, W_gate_up, W_2,
            router, head, projection, cls, norm_gain, scale, bias, or "" if the dataflow does not
            show it. A scale is a LayerScale, a gate or a temperature; cls is any token that joins
            those of the input.
        layer: depth of the sub-layer that reads it, None outside all.
        sublayer: its name, "" outside all.
        fan_in, fan_out: sizes of the linear map that it makes, whichever way it is stored; None for
            a vector.
        offset: the number that is added to a gain or a scale before it multiplies: 1 in `x * (1 +
            weight)`.
    """

    role: str
    layer: int | None = None
    sublayer: str = ""
    fan_in: int | None = None
    fan_out: int | None = None
    offset: float = 0.0
