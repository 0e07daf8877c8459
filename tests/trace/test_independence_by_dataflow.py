"""Independence read off the recorded operations, against dense Jacobians in float64.

A dimension that is claimed must be independent. One that is not claimed costs nothing but time.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from menagerie import ALL, Specimen
from menagerie.traced import traced
from torch import Tensor, nn

import jacdiag
from jacdiag.measure.linearization import linearise
from jacdiag.trace.discovery.independence import independent_between, independent_by_dataflow
from jacdiag.trace.graph.arguments import Arguments
from jacdiag.trace.graph.index_layout import IndexPiece, UnclearError, regrouped, source_layout

pytestmark = pytest.mark.check("trace")
Map = Callable[[Any, Tensor], Tensor]  # of the model, for its weights, and x
SHAPE = (2, 4, 6)


class Net(nn.Module):
    """One sub-layer: x plus a function of a linear map of x."""

    def __init__(self, function: Map) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.over_tokens = nn.Parameter(torch.randn(4, 4))
        self.function = function

    def branch(self, x: Tensor) -> Tensor:
        return self.function(self, self.first(x))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def net_and_point(function: Map, shape: tuple[int, ...]) -> tuple[Net, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(function).double().eval(), torch.randn(shape, dtype=torch.float64)


def claimed(function: Map, shape: tuple[int, ...] = SHAPE) -> tuple[int, ...] | None:
    """The dimensions that the operations are said to show; None if they leave one open."""
    net, x = net_and_point(function, shape)
    sites = jacdiag.sites(net, x, dtype=torch.float64)
    [site] = [site for site in sites if not site.nested]
    raw = sites.raw[site.index]
    return independent_by_dataflow(sites.graph, raw, site.feature_dim, tuple(site.value.shape))


def true_dims(function: Map, shape: tuple[int, ...] = SHAPE) -> tuple[int, ...]:
    """The dimensions, but for the features, over which the dense Jacobian is block diagonal."""
    net, x = net_and_point(function, shape)
    jacobian = torch.autograd.functional.jacobian(net.branch, x).reshape(*shape, *shape)
    dims = []
    for dim in range(len(shape) - 1):
        blocks = jacobian.movedim((dim, len(shape) + dim), (0, 1)).flatten(2)
        off_diagonal = blocks[~torch.eye(shape[dim], dtype=torch.bool)]
        if not off_diagonal.any():
            dims.append(dim)
    return tuple(dims)


def attention(_net: Net, x: Tensor) -> Tensor:
    """Two heads with a causal mask, written out."""
    b, t, d = x.shape
    q, k, v = (x.view(b, t, 2, d // 2).transpose(1, 2) * scale for scale in (1.0, 0.7, 1.3))
    mask = torch.ones(t, t, dtype=torch.bool).tril()
    scores = (q @ k.transpose(-2, -1)) / math.sqrt(d // 2)
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
    return (weights @ v).transpose(1, 2).reshape(b, t, d)


def rotated(x: Tensor) -> Tensor:
    """A rotary embedding."""
    angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None]
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * angles.cos() + turned * angles.sin()


def grouped_attention(_net: Net, x: Tensor) -> Tensor:
    """One head of keys and values for two heads of queries."""
    b, t, _ = x.shape
    q = rotated(x.view(b, t, 2, 3).transpose(1, 2))
    k = x[..., :3].unsqueeze(1)
    k = k[:, :, None, :, :].expand(b, 1, 2, t, 3).reshape(b, 2, t, 3)
    return F.scaled_dot_product_attention(q, k, k, is_causal=True).transpose(1, 2).flatten(2)


def windows(_net: Net, x: Tensor) -> Tensor:
    """Mixes the tokens of each half of a sequence."""
    b, t, d = x.shape
    parts = x.view(b, 2, t // 2, d)
    return (parts + parts.mean(dim=2, keepdim=True)).view(b, t, d)


def norm_by_hand(_net: Net, x: Tensor) -> Tensor:
    mean = torch.mean(torch.square(x), axis=-1, keepdim=True)  # type: ignore[call-overload]
    return x / torch.sqrt(mean + 1e-6)


def written(_net: Net, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, 0] = x[:, 1]
    y[:, 1:] = x[:, :-1]
    return y


# What the operations prove or rule out without a product.
DECIDED: dict[str, tuple[Map, tuple[int, ...]]] = {
    "an MLP": (lambda net, x: F.gelu(x @ net.weight) @ net.weight.T, (0, 1)),
    "a gated MLP": (lambda net, x: F.silu(x @ net.weight) * (x @ net.weight.T), (0, 1)),
    "chunks of features": (
        lambda net, x: torch.cat([p.tanh() for p in x.chunk(2, -1)], -1),
        (0, 1),
    ),
    "tokens in one row": (
        lambda net, x: torch.addmm(net.weight[0], x.view(-1, 6), net.weight).view(x.shape),
        (0, 1),
    ),
    "cut and put together": (lambda net, x: x.reshape(4, 2, 3, 2).exp().reshape(SHAPE), (0, 1)),
    "a norm by hand": (norm_by_hand, (0, 1)),
    "a layer norm": (lambda net, x: F.layer_norm(x, (6,), eps=1e-5), (0, 1)),
    "a layer norm over a size": (lambda _, x: F.layer_norm(x, x.shape[-1:]), (0, 1)),
    "a layer norm of whole sequences": (lambda net, x: F.layer_norm(x, (4, 6)), (0,)),
    "softmax over features": (lambda net, x: torch.softmax(x, dim=-1), (0, 1)),
    "softmax over tokens": (lambda net, x: torch.softmax(x, dim=1), (0,)),
    "attention": (attention, (0,)),
    "grouped attention": (grouped_attention, (0,)),
    "a map over tokens": (
        lambda net, x: F.linear(x.transpose(1, 2), net.over_tokens).transpose(1, 2),
        (0,),
    ),
    "einsum over tokens": (lambda net, x: torch.einsum("btd,ts->bsd", x, net.over_tokens), (0,)),
    "einsum over features": (lambda net, x: torch.einsum("btd,de->bte", x, net.weight), (0, 1)),
    "the mean of a sequence": (lambda net, x: x - x.mean(1, keepdim=True), (0,)),
    "the mean of the batch": (lambda net, x: x - x.mean(0), (1,)),
    "a running sum": (lambda net, x: x.cumsum(1), (0,)),
    "a convolution": (
        lambda net, x: F.conv1d(x.transpose(1, 2), net.weight[:, :, None], padding=0).transpose(
            1, 2
        ),
        (0, 1),
    ),
    "a wide convolution": (
        lambda net, x: F.conv1d(
            x.transpose(1, 2).contiguous(), net.weight[:, :, None].expand(6, 6, 3), padding=1
        ).permute(0, 2, 1),
        (0,),
    ),
    "windows": (windows, (0,)),
}
# What they leave open: values have to show it.
OPEN: dict[str, Map] = {
    "a shift of tokens": lambda net, x: F.pad(x, (0, 0, 1, -1)),
    "a shift by a slice": lambda net, x: torch.cat([x[:, 1:], x[:, :1]], dim=1),
    "tokens in another order": lambda net, x: x[:, [1, 0, 3, 2]],
    "a swap of batch and tokens": lambda net, x: x.flip(1),
    "writes to a part": written,
}


@pytest.mark.parametrize("name", DECIDED)
def test_what_operations_decide(name: str) -> None:
    function, dims = DECIDED[name]
    assert true_dims(function) == dims
    assert claimed(function) == dims


@pytest.mark.parametrize("name", OPEN)
def test_what_operations_leave_open(name: str) -> None:
    function = OPEN[name]
    assert 1 not in true_dims(function)
    found = claimed(function)
    assert found is None or 1 not in found


STEPS: dict[str, Map] = {
    "gelu": lambda _net, x: F.gelu(x),
    "times features": lambda net, x: x @ net.weight,
    "times tokens": lambda net, x: net.over_tokens @ x,
    "norm": lambda net, x: F.layer_norm(x, (6,)),
    "softmax": lambda net, x: x.softmax(1),
    "rows": lambda net, x: (x.reshape(8, 6) @ net.weight).reshape(SHAPE),
    "other rows": lambda net, x: (x.reshape(4, 12) ** 2).reshape(SHAPE),
    "swap": lambda net, x: x.transpose(0, 1).reshape(SHAPE),
    "there and back": lambda net, x: (x.transpose(0, 1) + 1).transpose(0, 1),
    "heads": lambda net, x: x.view(2, 4, 3, 2).permute(0, 2, 1, 3).sin().transpose(1, 2).flatten(2),
    "mean": lambda net, x: x * x.mean((0, 2), keepdim=True),
    "largest": lambda net, x: x - x.amax(-1, keepdim=True),
    "pieces": lambda net, x: torch.cat(x.split(2, dim=1)[::-1], dim=1),
    "stack": lambda net, x: torch.stack([x, x.sin()], dim=0).sum(0),
    "unbind": lambda net, x: torch.stack(x.unbind(1), dim=1),
    "first token": lambda net, x: x + x[:, :1],
    "outer": lambda net, x: torch.einsum("bsd,btd->bst", x, x) @ x,
    "repeat": lambda net, x: x.repeat(1, 2, 1)[:, :4],
    "in place": lambda net, x: x.clone().mul_(2).add_(x),
    "attention": attention,
    "swapped heads": lambda net, x: x.view(2, 4, 2, 3).transpose(2, 3).reshape(SHAPE),
    "mixed sizes": lambda net, x: x.reshape(2, 2, 2, 6).flip(2).reshape(SHAPE),
}


@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_no_claim_is_false(names: list[str]) -> None:
    def function(net: Net, x: Tensor) -> Tensor:
        for name in names:
            x = STEPS[name](net, x)
        return x

    found = claimed(function)
    if found is not None:
        assert set(found) <= set(true_dims(function))


@pytest.mark.parametrize("specimen", ALL, ids=str)
def test_claims_agree_with_the_values(specimen: Specimen) -> None:
    sites = traced(specimen.name)
    for site, raw in zip(sites, sites.raw, strict=True):
        shape = tuple(site.value.shape)
        found = independent_by_dataflow(sites.graph, raw, site.feature_dim, shape)
        if found is None or not site.finite:
            continue

        kept, site.dims = site.dims, None
        try:
            assert set(found) <= set(site.independent(keep=False)), site.name
        finally:
            site.dims = kept


@torch.jit.script
def _scripted_shift(x: Tensor) -> Tensor:
    return x + x.roll(1, 1)


class Square(torch.autograd.Function):
    """A custom function: what its backward does is not in the record."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        return (2 * x * gradient).roll(1, 1)


def _mapped_shift(x: Tensor) -> Tensor:
    return torch.vmap(lambda sequence: sequence.roll(1, 0))(x)


def _gradient(x: Tensor) -> Tensor:
    result: Tensor = torch.func.grad(lambda z: (z.sum(1) ** 3).sum())(x)
    return result


_LIBRARY = torch.library.Library("jacdiag_tests", "DEF")
_LIBRARY.define("gelu(Tensor x) -> Tensor")
_LIBRARY.impl("gelu", lambda x: x.roll(1, 1), "CompositeImplicitAutograd")

HIDDEN: dict[str, Callable[[Tensor], Tensor]] = {
    "script": _scripted_shift,
    "function": Square.apply,
    "vmap": _mapped_shift,
    "grad": _gradient,
    "an operator with the name of another": lambda x: torch.ops.jacdiag_tests.gelu(x),
}


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("after", ["at once", "scaled", "a layer later"])
def test_hidden_code_proves_nothing(name: str, after: str) -> None:
    """Tokens that mix where no call is recorded are not taken for independent."""

    def function(net: Net, x: Tensor) -> Tensor:
        hidden = HIDDEN[name](x)
        if after == "scaled":
            hidden = hidden * 2
        if after == "a layer later":
            hidden = (hidden @ net.weight).relu()
        return x + hidden

    assert true_dims(function) == (0,)
    assert claimed(function) is None


BY_NAME: dict[str, Map] = {
    "matmul": lambda net, x: torch.matmul(other=x, input=net.over_tokens),
    "bmm": lambda net, x: torch.bmm(mat2=x, input=net.over_tokens.expand(2, 4, 4)),
    "values of attention": lambda net, x: F.scaled_dot_product_attention(
        value=x, query=net.weight[:4].expand(2, 4, 6), key=net.weight[2:].expand(2, 4, 6)
    ),
    "keys of attention": lambda net, x: F.scaled_dot_product_attention(
        key=x, query=net.weight[:4].expand(2, 4, 6), value=net.weight[2:].expand(2, 4, 6)
    ),
    "attention in order": lambda _net, x: F.scaled_dot_product_attention(query=x, key=x, value=x),
    "a mask of one dimension": lambda _net, x: F.scaled_dot_product_attention(
        x, x, x, attn_mask=x.mean((0, 2))
    ),
}


@pytest.mark.parametrize("name", BY_NAME)
def test_operands_that_are_given_by_name(name: str) -> None:
    found = claimed(BY_NAME[name])
    assert found is None or set(found) <= set(true_dims(BY_NAME[name]))
    assert (found == (0,)) == (name == "attention in order")


def test_a_container_that_is_not_understood_hides_the_arguments() -> None:
    tensor = torch.ones(2)
    assert Arguments.of(([tensor, (tensor, slice(tensor, 1))],), {"dim": 0}) is not None
    assert Arguments.of((deque([tensor]), tensor), {}) is None


def test_a_constant_that_no_module_holds_proves_nothing() -> None:
    factors = torch.rand(4, 1, dtype=torch.float64)
    assert claimed(lambda _net, x: x * factors) is None
    assert claimed(lambda _net, x: x * torch.full((4, 1), 2.0, dtype=torch.float64)) == (0, 1)


def test_no_product_is_spent_where_operations_decide() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True).eval()
    dims = []
    for site in jacdiag.sites(layer, torch.randn(2, 4, 8)):
        one = linearise(site)
        assert one.products == 1, "that of the start"
        dims.append(one.dims)
        one.release()
    assert dims == [(0,), (0, 1)]


def test_a_branch_of_zeros_is_not_taken_for_token_wise() -> None:
    """Its values show no mixing; its operations do."""

    class Attention(Net):
        def __init__(self) -> None:
            super().__init__(attention)
            self.last = nn.Linear(6, 6)
            nn.init.zeros_(self.last.weight)

        def branch(self, x: Tensor) -> Tensor:
            return self.last(super().branch(x))

    [site] = jacdiag.sites(Attention(), torch.randn(SHAPE))
    assert site.independent() == (0,)
    assert site.token_wise is False


@given(st.permutations([2, 2, 3, 4]), st.permutations([2, 2, 3, 4]))
@settings(max_examples=50, deadline=None)
def test_reshapes_keep_indices_where_they_are(first: list[int], second: list[int]) -> None:
    """A layout says the same of each element's place as the element's own number."""
    shapes = [(first[0] * first[1], first[2] * first[3]), tuple(second)]
    layout = source_layout(shapes[0])
    try:
        layout = regrouped(layout, shapes[1])
    except UnclearError:
        return
    numbers = torch.arange(48).reshape(shapes[1])
    places = torch.stack(torch.unravel_index(numbers, shapes[0]))
    for dim, pieces in enumerate(layout):
        for piece in pieces:
            assert isinstance(piece, IndexPiece)
        if len(pieces) == 1:
            (piece,) = pieces
            index = places[piece.source] // piece.stride % piece.size
            along = torch.arange(shapes[1][dim]).reshape([-1 if d == dim else 1 for d in range(4)])
            assert torch.equal(index, along.expand(shapes[1]))


class Stack(nn.Module):
    """Two sub-layers of any kind, one after the other."""

    def __init__(self, functions: list[Map]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Net(function) for function in functions)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


@pytest.mark.parametrize(
    ("names", "dims"),
    [
        (["gelu", "attention"], (0,)),
        (["gelu", "norm"], (0, 1)),
        (["mean", "gelu"], (1,)),
        (["attention", "outer"], (0,)),
    ],
)
def test_a_chain_of_sublayers(names: list[str], dims: tuple[int, ...]) -> None:
    model, x = Stack([STEPS[name] for name in names]).double().eval(), torch.randn(SHAPE).double()
    sites = jacdiag.sites(model, x, dtype=torch.float64)
    groups = sites.streams.groups
    assert independent_between(sites.finder, groups[0].shortcut, groups[-1].output, -1) == dims
