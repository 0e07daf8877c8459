"""Draws of weights, and rules that say which parameter gets which draw."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

Draw = Callable[[Tensor], object]
Rule = tuple[str, Draw]


@torch.no_grad()
def draw(model: nn.Module, *rules: Rule) -> None:
    """Draw each parameter by the first rule whose pattern occurs in its name.

    Args:
        model: the model whose parameters are overwritten.
        rules: pairs of a regular expression and a draw. A parameter that no rule matches keeps its
            value.
    """
    for name, parameter in model.named_parameters():
        for pattern, fill in rules:
            if re.search(pattern, name):
                fill(parameter)
                break


def names_of(model: nn.Module, pattern: str) -> list[str]:
    """Return the names of parameters and buffers in which a pattern occurs."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, _ in tensors if re.search(pattern, name)]


# -- draws ----------
def normal(std: float) -> Draw:
    """N(0, std)."""
    return lambda weight: nn.init.normal_(weight, 0.0, std)


def truncated(std: float, cut: float = 3.0) -> Draw:
    """N(0, std), cut at `cut` standard deviations."""
    return lambda weight: nn.init.trunc_normal_(weight, 0.0, std, -cut * std, cut * std)


def uniform(bound: float) -> Draw:
    """U(-bound, bound)."""
    return lambda weight: nn.init.uniform_(weight, -bound, bound)


def constant(value: float) -> Draw:
    """Every element the same."""
    return lambda weight: nn.init.constant_(weight, value)


zeros = constant(0.0)
ones = constant(1.0)


def xavier_uniform(gain: float = 1.0) -> Draw:
    """Glorot's uniform draw."""
    return lambda weight: nn.init.xavier_uniform_(weight.flatten(1), gain)


def xavier_normal(gain: float = 1.0) -> Draw:
    """Glorot's normal draw."""
    return lambda weight: nn.init.xavier_normal_(weight.flatten(1), gain)


def fan_in_normal(gain: float = 1.0) -> Draw:
    """N(0, gain / sqrt(fan_in)); `gain` is 1 for LeCun and sqrt(2) for He."""
    return lambda weight: nn.init.normal_(weight, 0.0, gain / math.sqrt(weight[0].numel()))


def fan_out_normal(gain: float = 1.0) -> Draw:
    """N(0, gain / sqrt(fan_out)), where fan_out counts the receptive field of a convolution."""

    def fill(weight: Tensor) -> object:
        fan_out = weight.shape[0] * weight[0, 0].numel()
        return nn.init.normal_(weight, 0.0, gain / math.sqrt(fan_out))

    return fill


def linear_default(weight: Tensor) -> object:
    """What `nn.Linear` and `nn.Conv2d` draw: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    return nn.init.kaiming_uniform_(weight, a=math.sqrt(5))


def bias_default(model: nn.Module) -> None:
    """Draw the biases of linear layers as `nn.Linear` does."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            bound = 1 / math.sqrt(module.in_features)
            nn.init.uniform_(module.bias, -bound, bound)


# -- memory that nothing wrote ----------
def leftover(seed: int, *, wide: bool = False) -> Draw:
    """Fill a tensor with what freed heap memory holds: zeros and 64-bit addresses, read as floats.

    The upper half of an address reads as about 4.6e-41. The lower half reads as about 1e-22 if all
    addresses are of one arena, and as anything if they are not.

    Args:
        seed: of the addresses, so that a case is the same in every run.
        wide: whether the lower halves take any value, up to 1e38.
    """

    @torch.no_grad()
    def fill(weight: Tensor) -> object:
        generator = torch.Generator().manual_seed(seed)
        count = weight.numel() // 2 + 1
        arena = 0x7F3C_0000_0000 if wide else 0x7F3C_1A00_0000
        size = 0x7F00_0000 if wide else 0x0100_0000
        addresses = arena + 16 * torch.randint(size // 16, (count,), generator=generator)
        is_empty = torch.rand(count, generator=generator) < 0.5
        words = torch.where(is_empty, torch.zeros_like(addresses), addresses).view(torch.float32)
        return weight.copy_(words[: weight.numel()].view(weight.shape))

    return fill
