"""Figures of one forward and one backward: residual stream, attention, gradients, dead paths."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jacdiag.records.base import Record

Cause = Literal["zero", "cut", "input", "unknown"]


@dataclass(frozen=True)
class AttentionRecord(Record):
    """Scores and weights of the attention calls of one sub-layer.

    Attributes:
        max_logit: largest score that enters a softmax, over heads, queries and visible keys.
        entropy: mean over heads and queries of -sum A ln A, in nats. Queries with one visible key
            are left out.
        entropy_share: that mean, divided by the mean of ln(visible keys) over the same queries. 1
            is uniform.
        lowest_head: the least mean entropy of a head. None where the calls do not keep heads apart.
        queries: number of (head, query) pairs that the means are taken over.
        head_logits: largest score of each head. None where the calls do not keep heads apart.
    """

    max_logit: float | None = None
    entropy: float | None = None
    entropy_share: float | None = None
    lowest_head: float | None = None
    queries: int = 0
    head_logits: list[float] | None = None


@dataclass(frozen=True)
class Peak(Record):
    """The largest absolute activation at one point of the stream.

    Attributes:
        value: its absolute value.
        median: median of the absolute activations at the same point.
        feature: its index along the features.
        sequence, position, token: where it is. `token` is its id, None where the input is not token
            ids.
    """

    value: float
    median: float
    feature: int
    sequence: int | None = None
    position: int | None = None
    token: int | None = None


@dataclass(frozen=True)
class ForwardRecord(Record):
    """The main residual stream over depth, one entry a point: each shortcut, then the stream's end.

    Attributes:
        points: name of the sub-layer that reads the stream there; "end" for the last.
        variance: population variance over features, averaged over tokens.
        peaks: the largest activation.
        token_cosine: mean cosine between the vectors of two different tokens.
        notes: field -> why it is missing.
    """

    points: list[str] = field(default_factory=list)
    variance: list[float] | None = None
    peaks: list[Peak] | None = None
    token_cosine: list[float] | None = None
    notes: dict[str, str] = field(default_factory=dict)


# The square of anything below vanishes in float32, and no init draws such numbers.
NEGLIGIBLE = 1e-19


@dataclass(frozen=True)
class DeadPath(Record):
    """A part of the model that no gradient of the loss reaches.

    Attributes:
        where: names of its sub-layers.
        stream: the residual stream itself gets none there; else only the parameters of one
            sub-layer.
        cause: "zero" for parameters, "cut" for calls without a derivative, "input" for a stream of
            zeros, "unknown" if nothing was proved.
        parameters: for "zero". Each is constant, or has only elements below `NEGLIGIBLE`, and with
            other values in them a gradient arrived; that was tried.
        values: the constants that they hold; below `NEGLIGIBLE`, the largest magnitude in a
            parameter.
        together: no single one of them is enough, only all of them.
        calls: for "cut", such as "detach in model.py:12".
        head: the only cause is the matrix of the output head.
        own_gradient: norm of the gradient of `parameters`. 0 means that no step changes them.
        elsewhere: all parameters of its sub-layers get a gradient all the same, where the model
            uses them again.
        frozen: all parameters of this part are frozen in the model that was passed
            (requires_grad=False).
        learned: none of `parameters` is a buffer, which no step changes.
        matrices_only: only the matrices of these sub-layers get no gradient. A gain or bias may.
    """

    where: list[str]
    stream: bool
    cause: Cause

    # The proof: what holds the zeros, or which call has no derivative.
    parameters: list[str] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    together: bool = False
    calls: list[str] = field(default_factory=list)
    head: bool = False

    # Whether training would change it.
    own_gradient: float | None = None
    elsewhere: bool = False
    frozen: bool = False
    learned: bool = True
    matrices_only: bool = False


@dataclass(frozen=True)
class CutShortcut(Record):
    """A residual addition whose shortcut carries no gradient: a call in it has no derivative.

    Attributes:
        where: the module that makes the addition, or its line if that is the model itself.
        call: such as "detach in model.py:12".
    """

    where: str
    call: str


@dataclass(frozen=True)
class DeadBranch(Record):
    """A branch that does not depend on its input: its Jacobian is exactly zero at the probe.

    Attributes:
        zero: its value is zero for every token as well; else it is a constant, such as a bias.
        parameters: parameters and buffers that are constant or next to zero. With other values in
            them the branch depended on its input; that was tried. They may lie outside the branch,
            where a gate is computed from a condition.
        values: the constants that they hold; below `NEGLIGIBLE`, the largest magnitude in a
            parameter.
        together: no single one of them is enough, only all of them.
        alike: each of them is zero, in every layer that has one.
        own_gradient: norm of the gradient of `parameters`; None if it was not measured.
        learned: none of `parameters` is a buffer, which no step changes.
        calls: calls whose derivative is zero, such as "round in model.py:12". Every way from the
            input to the value passes one of them.
    """

    zero: bool = True
    parameters: list[str] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    together: bool = False
    alike: bool = False
    own_gradient: float | None = None
    learned: bool = True
    calls: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class BackwardRecord(Record):
    """The gradients of the parameters after one backward of the loss.

    Attributes:
        embedding: the embedding whose gradient is compared.
        embedding_norm: norm of its gradient.
        others_median: median norm over the other matrices with a gradient.
        dead: parts that no gradient reaches. None if that was not looked at.
        not_finite: parameters and points of the stream whose gradient holds NaN or Inf.
        notes: field -> why it is missing.
        cut_shortcuts: residual additions whose shortcut carries no gradient.
    """

    # The embedding's gradient, and what it is compared with.
    embedding: str | None = None
    embedding_norm: float | None = None
    others_median: float | None = None

    # Where no gradient arrives, and where none can be trusted.
    dead: list[DeadPath] | None = None
    not_finite: list[str] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    cut_shortcuts: list[CutShortcut] = field(default_factory=list)

    @property
    def embedding_share(self) -> float | None:
        """Norm of the embedding's gradient, divided by the median of the others."""
        if self.embedding_norm is None:
            return None

        # Without another matrix, or with a median of 0, there is nothing to divide by.
        if not self.others_median:
            return None

        return self.embedding_norm / self.others_median
