"""Figures of the entire network say which part of the model they are about."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import jacdiag
from jacdiag.records import Report, StreamRange
from jacdiag.render.content.verdict import Line, verdict_lines

pytestmark = pytest.mark.check("measure")

WIDTH = 8
LAYERS = 3


class Net(nn.Module):
    """A stack of pre-norm MLPs, whose stream a subclass may change."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(16, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(LAYERS))
        self.up = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.down = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, 16)

    def branch(self, k: int, x: Tensor) -> Tensor:
        return self.down[k](torch.tanh(self.up[k](self.norms[k](x))))

    def layer(self, k: int, x: Tensor) -> Tensor:
        return x + self.branch(k, x)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for k in range(LAYERS):
            x = self.layer(k, x)
        return self.head(x)


class MissingShortcut(Net):
    """The last layer but one has no shortcut, and a layer more follows."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh())

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = self.layer(1, self.layer(0, x))
        x = self.extra(x)
        return self.head(self.layer(2, x))


class Between(Net):
    """What the stream passes between two layers is given."""

    def __init__(self, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def layer(self, k: int, x: Tensor) -> Tensor:
        y = super().layer(k, x)
        if k < LAYERS - 1:
            y = self.change(y, x)
        return y


class PostNorm(Net):
    """A norm stands after each sum."""

    def branch(self, k: int, x: Tensor) -> Tensor:
        return self.down[k](torch.tanh(self.up[k](x)))

    def layer(self, k: int, x: Tensor) -> Tensor:
        return self.norms[k](super().layer(k, x))


def audited(model: nn.Module) -> Report:
    ids = torch.arange(8).reshape(1, 8)
    return jacdiag.audit(model.double(), ids, state="init", remedies="none")


def line(report: Report, label: str) -> Line:
    return next(found for found in verdict_lines(report) if found.label == label)


def names(report: Report) -> list[str]:
    return [row.name for row in report.sublayers]


def stream_of(report: Report) -> StreamRange:
    assert report.network is not None and report.network.stream is not None
    return report.network.stream


def test_figures_of_all_sublayers_name_no_range() -> None:
    report = audited(Net())
    stream, found = stream_of(report), names(report)
    assert stream == StreamRange(found[0], found[-1], sublayers=3, of=3, layers=LAYERS)
    assert line(report, "whole network").text.endswith("first shortcut grows on its way to the top")
    assert " at the first shortcut, " in line(report, "gradient").text
    assert "part of network" not in [found.label for found in verdict_lines(report)]
    status = {rule.code: rule.status for rule in report.rules}
    assert status["JD104"] == "clean"


def test_figures_of_a_part_of_the_model_name_their_range() -> None:
    model = MissingShortcut()
    report = audited(model)
    stream, found = stream_of(report), names(report)
    assert stream == StreamRange(found[0], found[1], sublayers=2, of=3, layers=2)

    # 1. The gain is that of the first two layers.
    whole = torch.autograd.functional.jacobian(
        lambda x: model.layer(1, model.layer(0, x)), model.embed(torch.arange(8)).detach()
    )
    truth = torch.linalg.matrix_norm(whole.reshape(8 * WIDTH, 8 * WIDTH), 2)
    assert report.network is not None and report.network.end_to_end is not None
    assert float(truth) in report.network.end_to_end

    # 2. The lines say so, and none speaks of the entire network.
    lines = verdict_lines(report)
    assert "whole network" not in [found.label for found in lines]
    part = line(report, "part of network").text
    assert part.endswith(
        f"the largest factor by which a small change of the shortcut of {found[0]} grows on its "
        f"way to the sum of {found[1]}; these are 2 of 3 sub-layers, the others do not lie on this "
        "stream"
    )
    assert any(found.text.startswith("product of these sub-layers' gains") for found in lines)
    gradient = line(report, "gradient").text
    assert f"at the shortcut of {found[0]}, " in gradient
    assert f"at the sum of {found[1]} (" in gradient
    assert gradient.endswith("; between them lie 2 of 3 sub-layers")
    for text in (found.text for found in lines):
        assert "the top" not in text and "first shortcut" not in text

    # 3. The growth exponent is over the layers of that part.
    norms = report.network.gradient_norms
    assert norms is not None
    assert report.network.growth.gradient == pytest.approx(math.log(norms[0] / norms[-1]) / 2)

    # 4. A product of a part of the factors is no pass.
    [product] = [rule for rule in report.rules if rule.code == "JD104"]
    assert product.status == "not-applicable"
    assert (
        product.note
        == f"the product is known from {found[0]} to {found[1]}, 2 of 3 sub-layers alone"
    )


def test_a_product_over_which_the_stream_is_changed_is_no_bound() -> None:
    report = audited(Between(lambda y, x: 3.0 * y))
    stream, found = stream_of(report), names(report)
    assert stream.gaps == [[found[0], found[1]], [found[1], found[2]]]
    network = report.network
    assert network is not None and network.end_to_end is not None
    assert network.gain_product_log is not None

    # The product is below the gain that it would bound.
    assert math.exp(network.gain_product_log) < network.end_to_end.lower
    where = f"between {found[0]} and {found[1]} and at 1 more place"
    product = next(x.text for x in verdict_lines(report) if x.text.startswith("product of"))
    assert product.endswith(f", no bound: {where} the stream passes calls that no gain covers")
    assert network.predicted_gradient_norms is None
    [rule] = [rule for rule in report.rules if rule.code == "JD104"]
    assert rule.status == "not-applicable" and where in rule.note


@pytest.mark.parametrize(
    "change",
    [
        lambda y, x: y,
        lambda y, x: y.transpose(1, 2).contiguous().transpose(1, 2),
        lambda y, x: y.float().double(),
        lambda y, x: y + torch.ones(WIDTH, dtype=y.dtype),
        lambda y, x: torch.dropout(y, 0.5, False),
    ],
    ids=["nothing", "reshaped", "cast", "constant", "dropout"],
)
def test_a_product_is_a_bound_if_the_sum_is_the_next_shortcut(
    change: Callable[[Tensor, Tensor], Tensor],
) -> None:
    report = audited(Between(change))
    assert stream_of(report).gaps == []
    assert not any("no bound" in found.text for found in verdict_lines(report))


@pytest.mark.parametrize(
    "change",
    [
        lambda y, x: y / 2,
        lambda y, x: torch.add(torch.ones_like(y), y, alpha=2),
        lambda y, x: y + x,
    ],
    ids=["scaled", "scaled in a sum", "joined"],
)
def test_a_stream_that_is_changed_between_sublayers_has_gaps(
    change: Callable[[Tensor, Tensor], Tensor],
) -> None:
    report = audited(Between(change))
    assert len(stream_of(report).gaps) == 2


def test_the_gains_of_post_norm_include_the_norm_after_the_sum() -> None:
    report = audited(PostNorm())
    assert {row.placement for row in report.sublayers} == {"post"}
    assert stream_of(report).gaps == []
