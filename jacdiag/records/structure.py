"""The structure of a model in the init contract: computed tables, time steps, ties, adapters."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from jacdiag.records.base import Record


@dataclass(frozen=True)
class TableRecord(Record):
    """A buffer that the model computes when it is built, by what its values tell.

    Attributes:
        name, shape, dtype: Of the buffer.
        meaning: frequencies (their products with positions enter a sine and a cosine), rotation (a
            table of sines or cosines), sinusoid, slopes (of ALiBi), mask, variance (running, of a
            norm), or "" if it is not known.
        not_finite: How many elements are NaN or Inf.
        zeros: How many are zero.
        tiny: How many are not zero and closer to it than 1e-30.
        least, most: Of the finite elements; None if there are none.
        first, ratio: For a table of one dimension that is a geometric series, its first element and
            the ratio of neighbours; None for other tables.
        rounded: The narrower type whose numbers all elements are, where chance does not explain it.
    """

    name: str
    shape: list[int]
    dtype: str
    meaning: str = ""

    # What its elements are.
    not_finite: int = 0
    zeros: int = 0
    tiny: int = 0
    least: float | None = None
    most: float | None = None
    first: float | None = None
    ratio: float | None = None
    rounded: str = ""

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class RateRecord(Record):
    """A parameter that sets the time steps or the decay rates of a state-space layer.

    Attributes:
        parameter: Its name.
        meaning: "time step" (its softplus is one) or "decay" (minus its exponential is one).
        least, most: Of the time steps or rates at a zero input; None if none is finite.
        usual: Share of the time steps between 0.0001 and 0.1; None for a decay.
        not_finite: How many elements of the parameter are NaN or Inf.
    """

    parameter: str
    meaning: str
    least: float | None = None
    most: float | None = None
    usual: float | None = None
    not_finite: int = 0


@dataclass(frozen=True)
class TieRecord(Record):
    """Whether head and embedding share one tensor, and what the model says about it.

    Attributes:
        said: Whether the model says that they do.
        by: Where it says so, such as "config.tie_word_embeddings".
        head, embedding: Names of the two tensors; one name where it is one tensor.
        shared: Whether it is one tensor.
        equal: Whether the values are the same.
    """

    said: bool
    by: str
    head: str
    embedding: str
    shared: bool
    equal: bool


@dataclass(frozen=True)
class AdapterRecord(Record):
    """The two factors of a low-rank addition to a weight.

    Attributes:
        first, second: Names of the factor that reads the input and of the one that writes the
            output.
        first_zero, second_zero: Whether every element is zero.
        decomposed: Whether the vectors of a factor stand at right angles, as those of a singular
            value decomposition of the weight do.
        zero_between: Name of a third factor that is zero in every element (AdaLoRA's lora_E); "" if
            there is none.
    """

    first: str
    second: str
    first_zero: bool
    second_zero: bool
    decomposed: bool = False
    zero_between: str = ""

    @property
    def zero_factors(self) -> list[str]:
        """Names of the factors that are zero: one is right, two never get a gradient."""
        # In the order in which the input passes them.
        zeros = []
        if self.first_zero:
            zeros.append(self.first)
        if self.zero_between:
            zeros.append(self.zero_between)
        if self.second_zero:
            zeros.append(self.second)
        return zeros


@dataclass(frozen=True)
class ZeroShortcut(Record):
    """A shortcut that is multiplied by zero on its way into the sum.

    Attributes:
        sublayer: Name of the sub-layer.
        parameters: Zero parameters on that way; empty if the zero is no parameter.
    """

    sublayer: str
    parameters: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class MissingShortcutRecord(Record):
    """A part of a layer that no shortcut leads around, as one does in other layers.

    Attributes:
        part: The module that holds its weights.
        like: The same of a layer that has a shortcut.
        parameters: That its matrix products read. They are in no sub-layer.
    """

    part: str
    like: str
    parameters: list[str] = field(default_factory=list)
