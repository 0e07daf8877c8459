"""A sub-layer: one (shortcut, branch) pair of a model, with its maps as functions of a tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from jacdiag.errors import TraceError
from jacdiag.records.report import Kind, Placement
from jacdiag.trace.discovery.norms import Norm

Map = Callable[[Tensor], Tensor]


@dataclass(eq=False)
class Sublayer:
    """One residual sub-layer y = a x + f(x), found in a recorded forward.

    Attributes:
        name: from the modules, e.g. "transformer.h.0.attn".
        index: position among all sub-layers; `depth`: layer number; `group`: parallel branches
            share it.
        kind: attention, mlp, moe, mixer, conv or other.
        placement: of the norm: pre, post, sandwich, reordered or none.
        parallel: shares its shortcut and sum with another branch.
        nested: lies inside another sub-layer's branch; left out of products over depth.
        shortcut: x, the residual stream where the branch reads it, as recorded.
        value: f(x), as recorded.
        branch: f as a function; `branch(shortcut)` equals `value` bit for bit, and to rounding the
            model's own where its attention is fused (it is run in its plain form).
        carry: the shortcut's way into the sum (a x); None where that is x itself.
        input_norm: the norm at the branch's beginning, if any; `core` is what follows it.
        output_norm, before_output_norm: the norm at the branch's end, and the branch up to it.
        heads: for attention after an input norm: z -> the concatenated heads that W_O reads (J^Z
            of Eq. 20).
        post_norm, after: the norm after the sum, and the map from the sum to the next shortcut.
        parameters: names of the parameters that the branch reads.
        products: names of the parameters of its matrix products, in order of use; `roles`: the same
            by role.
        activations: names of the elementwise non-linearities in it.
        functions: names of the custom autograd.Functions in it.
        feature_dim: which dimension of x holds the features; `stream_dim`: which separates
            parallel streams, if any.
        dims: what `independent` found, None before.
        valueless: recorded on the meta device.
        looks_token_wise: what the operations show, if there are no values or NaN among them.

    Example:
        >>> import torch, jacdiag
        >>> class Net(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.ff = torch.nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         return x + self.ff(x).tanh()
        >>> [site] = jacdiag.sites(Net(), torch.randn(2, 3, 4))
        >>> bool((site.branch(site.shortcut) == site.value).all())
        True
    """

    name: str
    index: int
    depth: int
    group: int
    kind: Kind
    placement: Placement
    parallel: bool
    nested: bool
    shortcut: Tensor
    value: Tensor
    branch: Map
    carry: Map | None
    input_norm: Norm | None
    core_of_norm: Map | None
    output_norm: Norm | None
    before_output_norm: Map | None
    heads: Map | None
    post_norm: Norm | None
    after: Map | None
    total: Tensor | None
    parameters: list[str]
    products: list[str]
    roles: dict[str, str]
    activations: list[str]
    feature_dim: int
    stream_dim: int | None = None
    functions: tuple[str, ...] = ()
    line: str = ""
    notes: dict[str, str] = field(default_factory=dict)
    dims: tuple[int, ...] | None = None
    valueless: bool = False
    looks_token_wise: bool | None = None
    norm_inside: bool = False

    def __str__(self) -> str:
        """Return one line: name, kind, norm, depth, shape of the shortcut, number of parameters."""
        # 1. Its norm.
        norm = f"{self.placement}-norm"
        if self.placement == "none":
            norm = "no norm"
        if self.placement == "none" and self.norm_inside:
            norm = "no norm found at either end"

        # 2. Its sizes.
        shape = " x ".join(map(str, self.shortcut.shape))
        count = len(self.parameters)
        parameters = f"{count} parameter tensors"
        if count == 1:
            parameters = "1 parameter tensor"
        return (
            f"{self.name}: {self.kind}, {norm}, depth {self.depth}, shortcut {shape}, {parameters}"
        )

    def __repr__(self) -> str:
        return f"<Sublayer {self}>"

    @property
    def has_input_norm(self) -> bool:
        """Whether the branch begins with a norm."""
        return self.input_norm is not None

    @property
    def normalized(self) -> Tensor:
        """z: the normalised shortcut before the learned gain, as recorded."""
        return self._norm.value

    def norm(self, x: Tensor) -> Tensor:
        """Return z of x: the input norm without its learned gain and bias.

        Args:
            x: of the shape of the shortcut.

        Raises:
            TraceError: the sub-layer has no norm at its beginning.
        """
        return self._norm.normalise(x)

    def core(self, z: Tensor) -> Tensor:
        """Return the branch after its input norm, the learned gain included.

        With it f(x) is core(norm(x)).

        Without an input norm it is the branch itself. For a reordered norm it is the branch before
        its output norm.

        Args:
            z: of the shape of the shortcut.
        """
        # 1. After the input norm.
        if self.core_of_norm is not None:
            return self.core_of_norm(z)

        # 2. Before the output norm.
        is_reordered = self.placement == "reordered"
        if is_reordered and self.before_output_norm is not None:
            return self.before_output_norm(z)

        # 3. All of it.
        return self.branch(z)

    def residual(self, x: Tensor) -> Tensor:
        """Return the next shortcut: a x + f(x), and for post-norm the norm of it.

        Args:
            x: of the shape of the shortcut.
        """
        # 1. The shortcut's part of the sum.
        carried = x
        if self.carry is not None:
            carried = self.carry(x)

        # 2. The sum, and what follows it.
        y = carried + self.branch(x)
        if self.after is None:
            return y
        return self.after(y)

    @cached_property
    def shortcut_gain(self) -> float | Tensor | None:
        """The gain a on the shortcut: a number, or a tensor for a learned diagonal gain.

        It is None if the shortcut enters the sum by anything but a diagonal.
        """
        if self.carry is None:
            return 1.0

        # 1. The diagonal that the shortcut's Jacobian would have.
        with torch.enable_grad():
            x = self.shortcut.detach().requires_grad_()
            y = self.carry(x)
            if y.shape != x.shape or y.is_meta:
                return None
            (diagonal,) = torch.autograd.grad(y.sum(), x, allow_unused=True)

        # 2. Whether it gives the shortcut's part of the sum.
        slack = 1e-6 * float(y.detach().abs().max())
        if diagonal is None:
            return None
        if not torch.allclose(diagonal * x, y, rtol=1e-5, atol=slack):
            return None

        # 3. A number, if all of it is the same.
        first = diagonal.flatten()[0]
        if bool((diagonal == first).all()):
            return float(first)
        return diagonal

    @cached_property
    def finite(self) -> bool:
        """Whether the shortcut and the branch are free of NaN and Inf; there have to be values."""
        are_finite = torch.isfinite(self.shortcut).all() & torch.isfinite(self.value).all()
        return bool(are_finite)

    @property
    def token_wise(self) -> bool | None:
        """Whether the branch treats tokens one by one; None if that is unknown.

        If it does, pulled cotangents of two tokens stay on their tokens.
        """
        # 1. Without values to measure, the operations have to do.
        can_be_measured = not self.valueless and self.finite
        if not can_be_measured:
            return self.looks_token_wise

        # 2. A vector has no tokens.
        if self.shortcut.dim() < 2:
            return None
        return self.splits_tokens(self.independent())

    def splits_tokens(self, dims: Iterable[int]) -> bool:
        """Return whether independent dimensions are all but the features' (and the streams').

        Args:
            dims: dimensions of x over which the branch's Jacobian is block diagonal.
        """
        rank = self.shortcut.dim()
        inner = {self.feature_dim % rank}
        if self.stream_dim is not None:
            inner.add(self.stream_dim % rank)
        return set(dims) >= set(range(rank)) - inner

    def independent(self, pull: Map | None = None, *, keep: bool = True) -> tuple[int, ...]:
        """Return the dimensions of x over which the branch's Jacobian is block diagonal.

        Args:
            pull: J^T w of the branch, or of its core, if there is one already; else one is built.
            keep: whether the result is stored, so that the next call makes no product.
        """
        if self.dims is not None:
            return self.dims
        from jacdiag.spectra import independent_dims

        x = self.shortcut
        generator = torch.Generator().manual_seed(0)
        if pull is None:
            pull = self._pull()
        dims = independent_dims(
            pull,
            x.shape,
            self.value.shape,
            self.feature_dim,
            x.dtype,
            x.device,
            generator,
        )
        if keep:
            self.dims = dims
        return dims

    def _pull(self) -> Map:
        """Return J^T w of the branch as a function of w."""
        with torch.enable_grad():
            x = self.shortcut.detach().clone().requires_grad_()
            y = self.branch(x)

        def pull(w: Tensor) -> Tensor:
            (g,) = torch.autograd.grad(y, x, w, retain_graph=True, allow_unused=True)
            if g is None:  # y does not depend on x
                return torch.zeros_like(x)
            return g

        return pull

    @property
    def _norm(self) -> Norm:
        if self.input_norm is None:
            raise TraceError(
                f"'{self.name}' has no norm at its beginning", got=f"placement '{self.placement}'"
            )
        return self.input_norm
