"""Each residual sum is listed as a sub-layer or named as left out; other additions are neither."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from menagerie.message_passing import MPNN
from torch import Tensor, nn

import jacdiag

pytestmark = pytest.mark.check("trace")

D = 8


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 12), nn.GELU(), nn.Linear(12, D))


class SomePositions(nn.Module):
    """Only two positions of the stream get the branch."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.layers = nn.ModuleList([mlp() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.add(x.clone(), layer)
        return x

    def add(self, x: Tensor, layer: nn.Module) -> Tensor:
        rows = torch.tensor([0, 2])
        wide = rows[None, :, None].expand(x.shape[0], 2, D)
        branch = layer(x[:, rows])
        if self.how == "index_add":
            return x.index_add(1, rows, branch)
        if self.how == "index_add_":
            return x.index_add_(1, rows, branch)
        if self.how == "scatter_add":
            return x.scatter_add(1, wide, branch)
        if self.how == "scatter_reduce":
            return torch.scatter_reduce(x, 1, wide, branch, reduce="sum")
        if self.how == "index_put":
            batch = torch.arange(x.shape[0])[:, None]
            return x.index_put((batch, rows[None]), branch, accumulate=True)
        x[:, rows] += branch
        return x + layer(x)


class WideLayer(nn.Module):
    """A residual layer whose shortcut is projected where the width changes."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(before, 12), nn.GELU(), nn.Linear(12, after))
        self.project: nn.Module = nn.Identity()
        if before != after:
            self.project = nn.Sequential(nn.Linear(before, after), nn.LayerNorm(after))

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x) + self.branch(x)


class Widening(nn.Module):
    """Two layers of one width, one that widens, two of the new width, as a ResNet has stages."""

    def __init__(self) -> None:
        super().__init__()
        widths = [D, D, D, 2 * D, 2 * D, 2 * D]
        self.layers = nn.ModuleList(map(WideLayer, widths[:-1], widths[1:]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Reversible(nn.Module):
    """x1 + f(x2), then x2 + g(x1): the first sum's branch does not read its own shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.split = nn.Linear(D, 2 * D)
        self.first = nn.ModuleList([mlp() for _ in range(3)])
        self.second = nn.ModuleList([mlp() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.split(x).chunk(2, -1)
        for first, second in zip(self.first, self.second, strict=True):
            a = a + first(b)
            b = b + second(a)
        return torch.cat([a, b], -1)


class Towers(nn.Module):
    """Two streams; one of them gets a function of the other once."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.ModuleList([mlp() for _ in range(2)])
        self.right = nn.ModuleList([mlp() for _ in range(2)])
        self.across = mlp()

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.left[0](x)
        memory = memory + self.right[0](memory)
        x = x + self.across(memory)
        x = x + self.left[1](x)
        return x, memory + self.right[1](memory)


class DepthAttention(nn.Module):
    """Each layer reads a softmax-weighted sum of all earlier outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([mlp() for _ in range(3)])
        self.queries = nn.Parameter(torch.randn(3, D))

    def forward(self, x: Tensor) -> Tensor:
        outputs = [x]
        for index, layer in enumerate(self.layers):
            stack = torch.stack(outputs)
            weights = (stack @ self.queries[index]).softmax(0)
            mix = (weights.unsqueeze(-1) * stack).sum(0)
            outputs.append(mix + layer(mix))
        return outputs[-1]


class Highway(nn.Module):
    """A plain sub-layer, then one whose shortcut is gated; a mix of all outputs at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.ModuleList([mlp() for _ in range(2)])
        self.gated = nn.ModuleList([mlp() for _ in range(2)])
        self.gates = nn.ModuleList([nn.Linear(D, D) for _ in range(2)])
        self.weights = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        outputs = [x]
        for plain, gated, gate in zip(self.plain, self.gated, self.gates, strict=True):
            x = x + plain(x)
            open_share = torch.sigmoid(gate(x))
            x = x * (1 - open_share) + open_share * gated(x)
            outputs.append(x)
        return (torch.stack(outputs) * self.weights.softmax(0).view(3, 1, 1, 1)).sum(0)


class GatedInside(nn.Module):
    """The gate is inside the branch: it is measured as part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gate = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        open_share = torch.sigmoid(self.gate(x))
        hidden = self.inner(x)
        return x + (hidden * (1 - open_share) + open_share * hidden.tanh())


class PlainWithOtherAdditions(nn.Module):
    """Embedding sum, rotation, attention mask, bias and a hand-written GELU: none is a residual
    sum.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(D, D)
        self.position = nn.Parameter(torch.randn(5, D))
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.up, self.down = nn.Linear(D, 12), nn.Linear(12, D)
        self.bias = nn.Parameter(torch.randn(12))

    def rotate(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * 0.8 + torch.cat([-b, a], -1) * 0.6

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        for _ in range(2):
            scores = self.rotate(self.q(x)) @ self.rotate(self.k(x)).mT
            scores = scores + torch.zeros(5, 5).triu(1)
            x = x + self.o(scores.softmax(-1) @ self.v(x))
            h = self.up(x) + self.bias
            x = x + self.down(0.5 * h * (1 + torch.tanh(0.8 * (h + 0.045 * h**3))))
        return x


@pytest.mark.parametrize(
    "how", ["index_add", "index_add_", "scatter_add", "scatter_reduce", "index_put"]
)
def test_scatter_sums_are_listed_and_replayed(how: str) -> None:
    found = jacdiag.sites(SomePositions(how).eval(), torch.randn(2, 5, D))
    assert len(found) == found.layers == 3
    assert not found.left_out
    assert all(torch.equal(site.branch(site.shortcut), site.value) for site in found)
    # Positions that get no branch have a branch of zero.
    assert found[0].value[:, [1, 3, 4]].abs().max() == 0


def test_a_sum_written_back_to_some_positions_is_named() -> None:
    found = jacdiag.sites(SomePositions("setitem").eval(), torch.randn(2, 5, D))
    assert sum("a part of the stream" in item.reason for item in found.left_out) == 3
    assert all("test_left_out.py:" in item.line for item in found.left_out)


def test_reversible_couplings_are_all_listed_or_named() -> None:
    found = jacdiag.sites(Reversible().eval(), torch.randn(2, 5, D))
    assert len(found) + len(found.left_out) == 6
    assert any("does not read" in item.reason for item in found.left_out)


def test_a_branch_of_another_stream_is_named() -> None:
    found = jacdiag.sites(Towers().eval(), torch.randn(2, 5, D), torch.randn(2, 5, D))
    assert len(found) == 4
    assert [item.reason for item in found.left_out] == [
        "the branch does not read this sum's own shortcut"
    ]


def test_a_projected_shortcut_is_named() -> None:
    found = jacdiag.sites(Widening().eval(), torch.randn(2, 5, D))
    assert len(found) == 4
    reason = "a product with weights changes the shortcut on its way into the sum"
    assert [(item.module, item.reason) for item in found.left_out] == [("layers.2", reason)]


def test_a_mix_of_earlier_outputs_is_named() -> None:
    found = jacdiag.sites(DepthAttention().eval(), torch.randn(2, 5, D))
    assert len(found) == 3
    assert ["weighted sum" in item.reason for item in found.left_out] == [True, True]


def test_gated_shortcuts_and_a_last_mix_are_named() -> None:
    found = jacdiag.sites(Highway().eval(), torch.randn(2, 5, D))
    assert len(found) == 2
    assert ["gate" in item.reason for item in found.left_out] == [True, True, False]
    assert "weighted sum of 3" in found.left_out[-1].reason


def test_a_gate_inside_a_branch_is_not_named() -> None:
    found = jacdiag.sites(GatedInside().eval(), torch.randn(2, 5, D))
    assert len(found) == 1
    assert not found.left_out


def test_other_additions_are_not_named() -> None:
    found = jacdiag.sites(PlainWithOtherAdditions().eval(), torch.randn(2, 5, D))
    assert len(found) == 4
    assert found.left_out == []


def test_message_passing_lists_node_and_edge_streams() -> None:
    torch.manual_seed(0)
    positions, residues = torch.randn(2, 9, 3) * 5, torch.randint(0, 21, (2, 9))
    found = jacdiag.sites(MPNN().eval(), positions, residues)
    edges = [site for site in found if site.shortcut.dim() == 4]
    assert (len(found), found.layers, len(edges)) == (14, 6, 3)
    assert not found.left_out
    assert not any(site.nested for site in found)
    assert all(torch.equal(site.branch(site.shortcut), site.value) for site in found)


class PartOfTheStream(nn.Module):
    """Layers that add to a part of the stream, between layers that add to all of it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.plain = nn.ModuleList([mlp() for _ in range(3)])
        self.partial = nn.ModuleList([mlp() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.plain[0](x)
        for plain, partial in zip(self.plain[1:], self.partial, strict=True):
            x = self.add(x, partial(x))
            x = x + plain(x)
        return x

    def add(self, x: Tensor, branch: Tensor) -> Tensor:
        if self.how == "halves":
            first, second = x.chunk(2, dim=-1)
            return torch.cat([first + branch[..., : D // 2], second], dim=-1)
        if self.how == "joined":
            return torch.cat([x[:, :2] + branch[:, :2], x[:, 2:]], dim=1)
        y = x.clone()
        if self.how == "in place":
            y[:, 1:] += branch[:, 1:]
        else:
            y[:, 1:] = x[:, 1:] + branch[:, 1:]
        return y


@pytest.mark.parametrize("how", ["halves", "joined", "in place", "written"])
def test_sums_on_a_part_of_the_stream_are_named(how: str) -> None:
    found = jacdiag.sites(PartOfTheStream(how), torch.randn(2, 6, D))
    assert [site.name for site in found] == ["plain.0", "plain.1", "plain.2"]
    assert len(found.left_out) == 2
    assert all("a part of the stream only" in item.reason for item in found.left_out)


class Joined(nn.Module):
    """A table is added to a part of what is joined: no function of the stream is."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(2, D))
        self.plain = nn.ModuleList([mlp() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for plain in self.plain:
            x = torch.cat([x[:, :2] + self.table, x[:, 2:]], dim=1)
            x = x + plain(x)
        return x


def test_a_table_that_is_added_to_a_part_is_no_residual_sum() -> None:
    found = jacdiag.sites(Joined(), torch.randn(2, 6, D))
    assert len(found) == 2 and not found.left_out


class ChangedBranch(nn.Module):
    """Three layers; in the second one functions change shortcut and hidden value."""

    def __init__(
        self, hidden: Callable[[Tensor], Tensor], shortcut: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.up = nn.ModuleList([nn.Linear(D, 12) for _ in range(3)])
        self.down = nn.ModuleList([nn.Linear(12, D) for _ in range(3)])
        self.hidden = hidden
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        for k in range(3):
            hidden = torch.tanh(self.up[k](x))
            shortcut = x
            if k == 1:
                hidden = self.hidden(hidden)
                shortcut = self.shortcut(x)
            x = shortcut + self.down[k](hidden)
        return x


def same(x: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize(
    ("hidden", "shortcut", "reason"),
    [
        (
            torch.sign,
            same,
            "the branch reads this sum's own shortcut through sign in {} alone, and its derivative "
            "is zero there",
        ),
        (
            lambda x: x.detach(),
            same,
            "the branch reads this sum's own shortcut through detach in {} alone, and no gradient "
            "passes there",
        ),
        (
            lambda x: (x > 0).float(),
            same,
            "no gradient passes from the branch to this sum's own shortcut",
        ),
        (same, lambda x: x.detach(), "its shortcut passes detach in {}, which takes its gradient"),
    ],
    ids=["sign", "detach", "comparison", "detached shortcut"],
)
def test_a_sum_without_a_gradient_to_its_shortcut_says_what_takes_it(
    hidden: Callable[[Tensor], Tensor], shortcut: Callable[[Tensor], Tensor], reason: str
) -> None:
    found = jacdiag.sites(ChangedBranch(hidden, shortcut).eval(), torch.randn(2, 5, D))
    assert len(found) == 2
    [left_out] = found.left_out
    pattern = re.escape(reason).replace(r"\{\}", r"test_left_out\.py:\d+")
    assert re.fullmatch(pattern, left_out.reason), left_out.reason
