"""What a specimen is: a small model, and beside it, by explicit code, what is true of it.

The truth is written on the model's own modules, but never asks jacdiag anything: a body, the norms
around it, and how the shortcut enters the sum. From these follows all that a test compares with:
branch, core, residual map, gains.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._coverage.expected import Expected

Model = Any
Getter = Callable[[Model], Any]


@dataclass(frozen=True)
class Context:
    """What a branch reads besides its shortcut: the model's inputs, and what the specimen computed
    from them.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    extra: Any = None


Body = Callable[[Model, Tensor, Context], Tensor]


@dataclass(frozen=True)
class Norm:
    """A norm in the dataflow, computed by formula: `module` finds the module that holds eps, gain
    and bias.
    """

    module: Getter

    def gain(self, model: Model, x: Tensor) -> Tensor:
        """1 / sqrt(var + eps) per token (mean square for RMSNorm)."""
        norm = self.module(model)
        if hasattr(norm, "factor"):
            return norm.factor(x)
        base = x - x.mean(-1, keepdim=True) if centred(norm) else x
        return (base.square().mean(-1) + epsilon(norm, x)).rsqrt()

    def normalise(self, model: Model, x: Tensor) -> Tensor:
        """z: before the learned gain and bias."""
        base = x - x.mean(-1, keepdim=True) if centred(self.module(model)) else x
        return base * self.gain(model, x).unsqueeze(-1)

    def affine(self, model: Model, z: Tensor) -> Tensor:
        """The learned gain and bias."""
        norm = self.module(model)
        weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        z = z if weight is None else z * weight
        return z if bias is None else z + bias

    def __call__(self, model: Model, x: Tensor) -> Tensor:
        return self.affine(model, self.normalise(model, x))


def centred(norm: nn.Module) -> bool:
    return isinstance(norm, nn.LayerNorm) or getattr(norm, "centred", False)


def epsilon(norm: Any, x: Tensor) -> float:
    return torch.finfo(x.dtype).eps if norm.eps is None else norm.eps


@dataclass(frozen=True)
class SublayerTruth(Expected):
    """One sub-layer that must be found, and its maps.

    The name is None if no module holds the branch alone. Any name will do then.

    Attributes:
        body: (model, h, context) -> what lies between the norms; None where no truth is given.
        entry, exit, behind: the norm at the branch's beginning, at its end, after the sum.
        shortcut_gain: a; a number, (model) -> tensor for a learned diagonal, None where the way in
            is no diagonal.
        carry: the shortcut's way into the sum where it is no diagonal.
        after: what else happens to the sum before the next shortcut (an activation); not part of
            the residual map.
        layer: the depth; None where it has no clear meaning.
        start: begins a stream: (model, context) -> its first shortcut. The first one always has it.
    """

    body: Body | None = None
    entry: Norm | None = None
    exit: Norm | None = None
    behind: Norm | None = None
    shortcut_gain: float | Getter | None = 1.0
    carry: Body | None = None
    after: Callable[[Tensor], Tensor] | None = None
    layer: int | None = 0
    start: Callable[[Model, Context], Tensor] | None = None
    _: KW_ONLY
    token_wise: bool | None = True
    parallel: bool | None = False
    nested: bool | None = False

    def branch(self, model: Model, x: Tensor, context: Context) -> Tensor:
        """f(x), what is added to the shortcut."""
        return self.core(
            model, x if self.entry is None else self.entry.normalise(model, x), context, whole=True
        )

    def core(self, model: Model, z: Tensor, context: Context, *, whole: bool = False) -> Tensor:
        """What follows the input norm, its gain included; for a reordered norm, what precedes it
        (unless `whole`).
        """
        assert self.body is not None
        h = self.body(model, z if self.entry is None else self.entry.affine(model, z), context)
        return (
            h
            if self.exit is None or (self.placement == "reordered" and not whole)
            else self.exit(model, h)
        )

    def carried(self, model: Model, x: Tensor, context: Context) -> Tensor:
        """a x."""
        if self.carry is not None:
            return self.carry(model, x, context)
        gain = self.shortcut_gain
        assert gain is not None
        return x * (gain(model) if callable(gain) else gain)


@dataclass(frozen=True)
class Specimen:
    """A small model and the truth about it.

    Attributes:
        build: returns a fresh model in eval mode, the same bits every time.
        inputs: (args, kwargs) of its forward.
        expected: its sub-layers in the order of the stream, parallel ones side by side, nested ones
            anywhere.
        finish: (model, last stream value, context) -> the model's output, to check the truth
            against the model.
        prepare: (model, args, kwargs) -> Context.extra: an encoder's output and the like.
        casts: the model casts to float32 whatever its own dtype, so that float64 truth holds to
            1e-5 only.
        uncovered: parameters that belong to no sub-layer, embedding, head or norm.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    expected: Sequence[SublayerTruth]
    finish: Callable[[Model, Tensor, Context], Tensor] | None = None
    prepare: Callable[[Model, tuple[Any, ...], dict[str, Any]], Any] | None = None
    casts: bool = False
    uncovered: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name

    def arguments(
        self, dtype: torch.dtype = torch.float32
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs, floating tensors in `dtype`."""

        def cast(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_floating_point():
                return value.to(dtype)
            if type(value) in (list, tuple):
                return type(value)(cast(item) for item in value)
            return copy.deepcopy(value)  # a cache that a run writes to

        args, kwargs = self.inputs
        return tuple(cast(a) for a in args), {k: cast(v) for k, v in kwargs.items()}

    def context(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> Context:
        args, kwargs = self.arguments(dtype)
        extra = None if self.prepare is None else self.prepare(model, args, kwargs)
        return Context(args, kwargs, extra)

    def groups(self) -> list[list[SublayerTruth]]:
        """The sub-layers on the stream, parallel branches together."""
        groups: list[list[SublayerTruth]] = []
        for one in self.expected:
            if one.nested:
                continue
            if (
                one.parallel
                and groups
                and groups[-1][0].parallel
                and groups[-1][0].layer == one.layer
            ):
                groups[-1].append(one)
            else:
                groups.append([one])
        return groups

    def one_stream(self) -> bool:
        return sum(group[0].start is not None for group in self.groups()) == 1


def residual(group: Sequence[SublayerTruth], model: Model, x: Tensor, context: Context) -> Tensor:
    """The map from one shortcut to the next by the truth: a x + sum of branches, and the norm
    behind it.
    """
    y = group[0].carried(model, x, context) + sum(one.branch(model, x, context) for one in group)
    return y if group[0].behind is None else group[0].behind(model, y)


def stream(specimen: Specimen, model: nn.Module, context: Context) -> list[Tensor]:
    """The shortcut of every group by the truth, and the stream's end (of the last stream) at the
    end.
    """
    values: list[Tensor] = []
    x: Tensor | None = None
    for group in specimen.groups():
        if group[0].start is not None:
            x = group[0].start(model, context)
        assert x is not None, f"{specimen.name}: the first sub-layer has no start"
        values.append(x)
        x = residual(group, model, x, context)
        x = x if group[0].after is None else group[0].after(x)
    assert x is not None
    return [*values, x]
