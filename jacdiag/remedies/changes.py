"""The steps of a remedy: what each does to a module, and the same as PyTorch code.

Each step works in place and draws from torch's global generator. Scaled and normed outputs are
forward hooks. Hooks need no change of the module's class, and the patch shows exactly what was
tried.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

ROOT3 = math.sqrt(3.0)


class ModelChange(Protocol):
    """One step of a remedy."""

    def apply(self, model: nn.Module) -> None:
        """Change a model in place."""

    def lines(self) -> list[str]:
        """Return the same as lines of PyTorch, for the body of a function of `model`."""


@dataclass(frozen=True)
class Weights:
    """Parameters by name, and the name pattern that a patch selects them by.

    Attributes:
        names: the parameters.
        pattern: a name pattern that matches these and no others; "" if there is none.
        role: what they are for; "" if unknown or mixed.
        have_padding: they are tables of which some rows are exactly zero.
    """

    names: tuple[str, ...]
    pattern: str = ""
    role: str = ""
    have_padding: bool = False

    @classmethod
    def of(
        cls, names: Sequence[str], pattern: str, everything: Iterable[str], role: str = ""
    ) -> Weights:
        """Return weights with a name pattern, if it matches these names and no others.

        Args:
            names: of the parameters.
            pattern: that may select them.
            everything: the names of all parameters of the model.
            role: what they are for.
        """
        matched = {name for name in everything if fnmatchcase(name, pattern)}
        is_exact = matched == set(names)
        # A pattern that selects others too would change them.
        if not is_exact:
            pattern = ""

        return cls(tuple(names), pattern, role)

    def tensors(self, model: nn.Module) -> list[Tensor]:
        """Return these parameters of a model."""
        return [model.get_parameter(name) for name in self.names]

    def loop(self, *body: str) -> list[str]:
        """Return lines of PyTorch that run some lines for each of these parameters, as `weight`."""
        # 1. A single parameter needs no loop.
        if len(self.names) == 1:
            return [f"weight = model.get_parameter({self.names[0]!r})", *body]

        # 2. Several, by name pattern if there is one.
        test = f"name in {sorted(self.names)!r}"
        if self.pattern:
            test = f"fnmatchcase(name, {self.pattern!r})"
        return [
            "for name, weight in model.named_parameters():",
            f"    if {test}:",
            *[f"        {line}" for line in body],
        ]


@dataclass(frozen=True)
class Scale:
    """Multiply weights by a number.

    Their family, their padding rows and what was drawn stay.
    """

    weights: Weights
    factor: float
    formula: str

    def apply(self, model: nn.Module) -> None:
        """Change a model in place."""
        with torch.no_grad():
            for weight in self.weights.tensors(model):
                weight.mul_(self.factor)

    def lines(self) -> list[str]:
        """Return the same as lines of PyTorch."""
        return self.weights.loop(f"weight.mul_({self.factor!r})  # {self.formula}")


@dataclass(frozen=True)
class Rows:
    """The rows of fused matrices that play one role, such as the keys.

    Attributes:
        role: such as "W_K".
        dim: the dimension of the outputs.
        groups: how often the roles follow one another along it: once, or once a head.
        start: where these rows begin in each group.
        size: how many there are in each group.
    """

    role: str
    dim: int
    groups: int
    start: int
    size: int

    def of(self, weight: Tensor) -> Tensor:
        """Return these rows of a weight, as a view."""
        if self.groups == 1:
            return weight.narrow(self.dim, self.start, self.size)

        grouped = weight.unflatten(self.dim, (self.groups, -1))
        return grouped.narrow(self.dim + 1, self.start, self.size)

    def code(self) -> str:
        """Return the expression of PyTorch for these rows of `weight`."""
        if self.groups == 1:
            return f"weight.narrow({self.dim}, {self.start}, {self.size})"

        grouped = f"weight.unflatten({self.dim}, ({self.groups}, -1))"
        return f"{grouped}.narrow({self.dim + 1}, {self.start}, {self.size})"


@dataclass(frozen=True)
class Redraw:
    """Draw weights again with a given std.

    A uniform weight stays uniform; any other becomes normal. Rows of zeros stay zero in tables of
    embeddings alone, where they stand for padding. In a matrix they are a part that was not drawn.

    Attributes:
        weights: the parameters.
        std: of the draw.
        formula: where the std comes from.
        uniform: whether the draw is uniform.
        rows: the rows that are drawn; None for entire weights.
    """

    weights: Weights
    std: float
    formula: str
    uniform: bool = False
    rows: Rows | None = None

    def apply(self, model: nn.Module) -> None:
        """Change a model in place."""
        with torch.no_grad():
            for weight in self.weights.tensors(model):
                if not self.weights.have_padding:
                    self._draw(weight)
                    continue

                # The same two lines as in the code that is printed.
                padding = (weight == 0).all(1)
                self._draw(weight)
                weight[padding] = 0.0

    def _draw(self, weight: Tensor) -> None:
        """Draw one weight, or its rows, in place."""
        part = weight
        if self.rows is not None:
            part = self.rows.of(weight)

        if self.uniform:
            edge = self.std * ROOT3
            part.uniform_(-edge, edge)
        else:
            part.normal_(0.0, self.std)

    def lines(self) -> list[str]:
        """Return the same as lines of PyTorch."""
        # 1. The draw of a weight, or of its rows.
        part = "weight"
        comment = f"std {self.formula}"
        if self.rows is not None:
            part = self.rows.code()
            comment = f"the {self.rows.role} rows, {comment}"
        call = f"{part}.normal_(0.0, {self.std!r})"
        if self.uniform:
            edge = self.std * ROOT3
            call = f"{part}.uniform_(-{edge!r}, {edge!r})"

        # 2. Without padding that is all.
        draw = f"{call}  # {comment}"
        if not self.weights.have_padding:
            return self.weights.loop(draw)

        # 3. Which rows are zero is not known any more after the draw.
        return self.weights.loop(
            "padding = (weight == 0).all(1)",
            draw,
            "weight[padding] = 0.0  # rows of zeros stay so: they stand for padding",
        )


@dataclass(frozen=True)
class Fill:
    """Set vectors (gains, biases, scales) to one value."""

    weights: Weights
    value: float

    def apply(self, model: nn.Module) -> None:
        """Change a model in place."""
        with torch.no_grad():
            for weight in self.weights.tensors(model):
                weight.fill_(self.value)

    def lines(self) -> list[str]:
        """Return the same as lines of PyTorch."""
        return self.weights.loop(f"weight.fill_({self.value!r})")


@dataclass(frozen=True)
class ScaleOutput:
    """Multiply what modules return by a number, which is fixed or learned from that value on.

    Attributes:
        modules: names; a learned factor becomes the parameter `scale` of each.
    """

    modules: tuple[str, ...]
    factor: float
    formula: str
    learned: bool = False

    def apply(self, model: nn.Module) -> None:
        """Change a model in place."""
        for name in self.modules:
            module = model.get_submodule(name)
            # 1. A fixed factor needs no parameter.
            if not self.learned:
                module.register_forward_hook(_Times(self.factor))
                continue

            # 2. A learned one, of the type and on the device of the module.
            like = next(module.parameters(), torch.empty(()))
            scale = nn.Parameter(torch.full((), self.factor).to(like))
            module.register_parameter("scale", scale)
            module.register_forward_hook(_times_parameter)

    def lines(self) -> list[str]:
        """Return the same as lines of PyTorch."""
        head = [f"for name in {list(self.modules)!r}:", "    module = model.get_submodule(name)"]
        # 1. A fixed factor.
        if not self.learned:
            hook = f"lambda module, args, output: output * {self.factor!r}"
            return [*head, f"    module.register_forward_hook({hook})  # {self.formula}"]

        # 2. A learned one.
        scale = f"nn.Parameter(torch.full((), {self.factor!r}).to(next(module.parameters())))"
        return [
            *head,
            f"    module.scale = {scale}",
            "    module.register_forward_hook(lambda module, args, output: output * module.scale)",
        ]


class _Times:
    """A forward hook that multiplies the output by a fixed number.

    It is a class and not a closure, so that a model can still be copied and pickled.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, _module: nn.Module, _args: object, output: Tensor) -> Tensor:
        return output * self.factor


def _times_parameter(module: Any, _args: object, output: Tensor) -> Tensor:
    # In an audit the weights stand in the module as plain tensors, which `get_parameter` refuses.
    return output * module.scale


@dataclass(frozen=True)
class NormOutput:
    """Put a LayerNorm on what a module returns, as its submodule `norm`."""

    module: str
    width: int

    def apply(self, model: nn.Module) -> None:
        """Change a model in place."""
        module = model.get_submodule(self.module)
        like = next(module.parameters())
        module.add_module("norm", nn.LayerNorm(self.width).to(like))
        module.register_forward_hook(_normed)

    def lines(self) -> list[str]:
        """Return the same as lines of PyTorch."""
        return [
            f"module = model.get_submodule({self.module!r})",
            f"module.norm = nn.LayerNorm({self.width}).to(next(module.parameters()))",
            "module.register_forward_hook(lambda module, args, output: module.norm(output))",
        ]


def _normed(module: nn.Module, _args: object, output: Tensor) -> Tensor:
    normed: Tensor = module.get_submodule("norm")(output)
    return normed


@dataclass(frozen=True)
class Reparametrise:
    """Replace W by gain * V with one learned gain per matrix (WeSaR, arXiv 2410.05052).

    V has a std near `base`. The gain begins as a power of two, so that W stays what it is to the
    last bit.
    """

    weights: Weights
    base: float

    def apply(self, model: nn.Module) -> None:
        """Change a model in place."""
        for name in self.weights.names:
            owner, _, attribute = name.rpartition(".")
            module = model.get_submodule(owner)
            weight = module.get_parameter(attribute)
            # A power of two: dividing by it changes no bit of the mantissa.
            gain = 2.0 ** round(math.log2(float(weight.detach().std()) / self.base))
            parametrize.register_parametrization(module, attribute, LearnedGain(gain, weight))

    def lines(self) -> list[str]:
        """Return the same as lines of PyTorch."""
        return [
            f"for name in {list(self.weights.names)!r}:",
            '    owner, _, attribute = name.rpartition(".")',
            "    module = model.get_submodule(owner)",
            "    weight = module.get_parameter(attribute)",
            f"    gain = 2.0 ** round(math.log2(float(weight.detach().std()) / {self.base!r}))  # "
            "W keeps its bits",
            "    parametrize.register_parametrization(module, attribute, Gain(gain, weight))",
        ]


class LearnedGain(nn.Module):
    """The parametrisation W = gain * V."""

    def __init__(self, gain: float, like: Tensor) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((), gain, dtype=like.dtype, device=like.device))

    def forward(self, direction: Tensor) -> Tensor:
        """Return W, given V."""
        return self.gain * direction

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return V, given W."""
        return weight / self.gain


# The same as `LearnedGain`, for a patch, which runs without this library.
GAIN_CODE = """\
class Gain(nn.Module):
    def __init__(self, gain, like):
        super().__init__()
        self.gain = nn.Parameter(torch.full((), gain, dtype=like.dtype, device=like.device))

    def forward(self, direction):
        return self.gain * direction

    def right_inverse(self, weight):
        return weight / self.gain
"""


@dataclass(frozen=True)
class Spare:
    """Take parameters out of weight decay.

    The groups of the optimizer change. The model stays as it is.
    """

    names: tuple[str, ...]

    def apply(self, model: nn.Module) -> None:
        """Change nothing: `jacdiag.remedies.trial` passes the names on to the audit."""

    def lines(self) -> list[str]:
        """Return the same as lines of PyTorch."""
        return [
            f"spared = {sorted(self.names)!r}",
            "groups = [",
            '    {"params": [p for n, p in model.named_parameters() if n not in spared]},',
            '    {"params": [p for n, p in model.named_parameters() if n in spared], '
            '"weight_decay": 0.0},',
            "]  # for the optimizer",
        ]
