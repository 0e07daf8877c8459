"""A batch norm whose gradient comes back in the strides of tokens: its backward must be given other
strides.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import jacdiag
from jacdiag.spectra import JacobianOperator


class PermutedGradient(torch.autograd.Function):
    """The identity, whose gradient has the strides that CvT's products over heads give it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(image: Tensor) -> Tensor:
        return image.clone()

    @staticmethod
    def setup_context(ctx: object, inputs: object, output: object) -> None:
        """Nothing is saved."""

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)


class ConvolutionalAttention(nn.Module):
    """Tokens from an image by a convolution and a batch norm, as CvT and LeViT make them."""

    def __init__(self, *, inplace: bool) -> None:
        super().__init__()
        self.project = nn.Conv2d(6, 6, 1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.inplace = inplace
        self.mix = nn.Linear(6, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, count, width = tokens.shape
        side = round(count**0.5)
        image = tokens.transpose(1, 2).reshape(batch, width, side, side)
        image = self.norm(self.project(image))
        image = image.relu_() if self.inplace else PermutedGradient.apply(image)
        return self.mix(image.flatten(2).transpose(1, 2))


class Block(nn.Module):
    def __init__(self, *, inplace: bool) -> None:
        super().__init__()
        self.attention = ConvolutionalAttention(inplace=inplace)

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.attention(tokens)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("inplace", [False, True], ids=["permuted gradient", "written in place"])
@pytest.mark.parametrize("batch", [1, 2])
def test_both_products_belong_to_one_matrix(batch: int, inplace: bool, train: bool) -> None:
    torch.manual_seed(0)
    model = Block(inplace=inplace).double().train(train).requires_grad_(False)
    for buffer in (model.attention.norm.running_mean, model.attention.norm.running_var):
        assert buffer is not None
        buffer.uniform_(0.5, 1.5)
    x = torch.randn(batch, 9, 6, dtype=torch.float64)
    (site,) = jacdiag.sites(model, x, dtype=torch.float64)
    assert torch.equal(site.branch(site.shortcut), site.value)

    op = JacobianOperator(site.branch, site.shortcut, ())
    basis = torch.eye(op.domain, dtype=torch.float64)
    by_columns = torch.stack([op.push(unit[None])[0] for unit in basis], 1)
    by_rows = torch.stack([op.pull(unit[None])[0] for unit in basis])
    step = 1e-6 * basis.view(-1, *site.shortcut.shape)
    differences = torch.stack(
        [
            (site.branch(site.shortcut + d) - site.branch(site.shortcut - d)).flatten() / 2e-6
            for d in step
        ],
        1,
    )
    assert torch.allclose(by_columns, differences, atol=1e-7)
    assert torch.allclose(by_rows, differences, atol=1e-7)


def test_the_model_itself_is_not_changed() -> None:
    model = Block(inplace=True).eval()
    x = torch.randn(1, 9, 6)
    before = model(x)
    jacdiag.sites(model, x)
    after = model(x)
    assert torch.equal(before, after)
    names = set()
    queue = [after.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None:
            names.add(node.name())
            queue.extend(following for following, _ in node.next_functions)
    assert not [name for name in names if "RegularGradient" in name]
