"""A segment is run by the module calls that it needs, and by all of its block where that is not
safe. It has the values and the Jacobian of the model's own code in both cases.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import jacdiag
from jacdiag.trace import Sites, Sublayer

WIDTH = 8
PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm}


class Products(TorchDispatchMode):
    """Counts the matrix products that are executed."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._overloadpacket in PRODUCTS
        return func(*args, **(kwargs or {}))


def products_of(function: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Return how many products one run of a function executes."""
    with torch.no_grad(), Products() as products:
        function(x)
    return products.count


def sites_of(model: nn.Module, *inputs: Any, **options: Any) -> Sites:
    """Return the sub-layers of a model, whose branches have the recorded values to the bit."""
    sites = jacdiag.sites(model, *inputs, **options)
    for site in sites:
        assert torch.equal(site.branch(site.shortcut), site.value)
        if site.has_input_norm:
            assert torch.equal(site.core(site.normalized), site.value)
    return sites


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the dense Jacobian of a branch, made by one backward for each output."""
    return torch.autograd.functional.jacobian(function, x)  # type: ignore[no-any-return]


def check_jacobian(site: Sublayer, reference: Callable[[Tensor], Tensor]) -> None:
    """Compare a branch with a function written by hand: its Jacobian, and its value elsewhere."""
    x = site.shortcut.detach().clone()
    expected = torch.func.jacrev(reference)(x)
    assert torch.allclose(jacobian(site.branch, x), expected, rtol=1e-10, atol=1e-12)
    elsewhere = x + torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
    assert torch.allclose(site.branch(elsewhere), reference(elsewhere), rtol=1e-10, atol=1e-12)


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 3, WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    """Mixes tokens, by five products."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.query(x) @ self.key(x).transpose(-1, -2)
        return weights.softmax(-1) @ self.value(x)


class Mlp(nn.Module):
    """Two products."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """A pre-norm block as in GPT-2. The FFN of kinds below is called in other ways."""

    def __init__(self, mlp: nn.Module | None = None) -> None:
        super().__init__()
        self.norm_1, self.attention = nn.LayerNorm(WIDTH), Attention()
        self.norm_2, self.mlp = nn.LayerNorm(WIDTH), mlp or Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.feed_forward(x)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm_2(x))


# Products of one run.
OF_ATTENTION, OF_MLP = 5, 2
OF_BLOCK = OF_ATTENTION + OF_MLP


def seeded(block: type[Block], *arguments: Any) -> Block:
    torch.manual_seed(0)
    return block(*arguments).double().eval()


# -- what is run -----------------------------------------------------------------------------------
def test_an_ffn_is_run_without_the_attention_before_it() -> None:
    block = seeded(Block)
    attention, ffn = sites_of(block, inputs())
    for function, x in [(ffn.branch, ffn.shortcut), (ffn.core, ffn.normalized)]:
        assert products_of(function, x) == OF_MLP
    assert products_of(attention.branch, attention.shortcut) == OF_ATTENTION
    check_jacobian(ffn, block.feed_forward)
    check_jacobian(attention, lambda x: block.attention(block.norm_1(x)))


def test_the_core_is_the_branch_after_its_norm() -> None:
    block = seeded(Block)
    _, ffn = sites_of(block, inputs())
    z = ffn.normalized
    expected = torch.func.jacrev(lambda z: block.mlp(z * block.norm_2.weight + block.norm_2.bias))(
        z
    )
    assert torch.allclose(jacobian(ffn.core, z), expected, rtol=1e-10, atol=1e-12)


class Sandwich(Block):
    """A block with a norm at both ends of its FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_3 = nn.LayerNorm(WIDTH)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.norm_3(super().feed_forward(x))


def test_a_branch_between_two_norms_is_run_by_three_modules() -> None:
    block = seeded(Sandwich)
    _, ffn = sites_of(block, inputs())
    assert ffn.placement == "sandwich" and ffn.before_output_norm is not None
    assert products_of(ffn.branch, ffn.shortcut) == OF_MLP
    assert products_of(ffn.before_output_norm, ffn.shortcut) == OF_MLP
    check_jacobian(ffn, block.feed_forward)


class CrossAttention(Attention):
    """An attention of two arguments, one of which does not depend on the stream."""

    def forward(self, x: Tensor, *, memory: Tensor) -> Tensor:
        weights = self.query(x) @ self.key(memory).transpose(-1, -2)
        return weights.softmax(-1) @ self.value(memory)


class Decoder(Block):
    """A block whose second sub-layer reads another input of the model, too."""

    def __init__(self) -> None:
        super().__init__(CrossAttention())

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.cross(x, memory)

    def cross(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.mlp(self.norm_2(x), memory=memory)


def test_an_argument_that_does_not_depend_on_the_source_keeps_its_value() -> None:
    block = seeded(Decoder)
    memory = inputs().flip(-1)
    _, cross = sites_of(block, inputs(), memory)
    assert products_of(cross.branch, cross.shortcut) == OF_ATTENTION
    check_jacobian(cross, lambda x: block.cross(x, memory))


class Parallel(Block):
    """Attention and FFN read the same norm."""

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm_2(x)
        return x + self.attention(normed) + self.mlp(normed)


def test_of_two_parallel_branches_one_is_run() -> None:
    block = seeded(Parallel)
    attention, ffn = sites_of(block, inputs())
    assert attention.parallel and ffn.parallel
    assert products_of(attention.branch, attention.shortcut) == OF_ATTENTION
    assert products_of(ffn.branch, ffn.shortcut) == OF_MLP
    check_jacobian(ffn, block.feed_forward)
    check_jacobian(attention, lambda x: block.attention(block.norm_2(x)))


class PostNorm(Block):
    """The norms follow the sums: the FFN reads the stream itself."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_1(x + self.attention(x))
        return self.norm_2(x + self.mlp(x))


def test_a_post_norm_ffn_is_run_alone() -> None:
    block = seeded(PostNorm)
    _, ffn = sites_of(block, inputs())
    assert ffn.placement == "post"
    assert products_of(ffn.branch, ffn.shortcut) == OF_MLP
    assert ffn.after is not None
    assert products_of(ffn.after, ffn.shortcut) == 0
    check_jacobian(ffn, block.mlp)


class Output(nn.Module):
    """Adds the shortcut, of which it is an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.norm = nn.Parameter(torch.randn(12, WIDTH)), nn.LayerNorm(WIDTH)

    def forward(self, hidden: Tensor, x: Tensor) -> Tensor:
        shortcut = x / 2
        return self.norm(hidden @ self.down + shortcut)


class Bert(Block):
    """A module begins the FFN, and another one ends it and adds."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.output = nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU()), Output()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_1(x + self.attention(x))
        return self.output(self.up(x), x)


def test_a_module_that_is_given_the_shortcut_for_its_sum_is_run_alone() -> None:
    block = seeded(Bert)
    _, ffn = sites_of(block, inputs())
    assert products_of(ffn.branch, ffn.shortcut) == 2
    check_jacobian(ffn, lambda x: block.up(x) @ block.output.down)


class ScaledSum(nn.Module):
    """Scales the branch and adds it in one call."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        return torch.addcmul(x, branch, self.gain)


class LayerScale(Block):
    def __init__(self) -> None:
        super().__init__()
        self.sum = ScaledSum()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return self.sum(x, self.mlp(self.norm_2(x)))


def test_a_branch_ends_inside_the_addition_that_scales_it() -> None:
    block = seeded(LayerScale)
    _, ffn = sites_of(block, inputs())
    assert products_of(ffn.branch, ffn.shortcut) == OF_MLP
    check_jacobian(ffn, lambda x: block.feed_forward(x) * block.sum.gain)


class Gated(Block):
    """The shortcut has a gain of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x * self.gain + self.feed_forward(x)


def test_the_way_of_a_scaled_shortcut_has_its_gain() -> None:
    block = seeded(Gated)
    _, ffn = sites_of(block, inputs())
    assert ffn.carry is not None
    assert torch.equal(ffn.carry(ffn.shortcut), ffn.shortcut * block.gain)
    assert products_of(ffn.branch, ffn.shortcut) == OF_MLP
    check_jacobian(ffn, block.feed_forward)


class Mixture(nn.Module):
    """Each token goes to one of two experts."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 2)
        self.experts = nn.ModuleList([Mlp(), Mlp()])

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight, choice = self.router(x).softmax(-1).max(-1)
        return weight, choice

    def mix(self, x: Tensor, weight: Tensor, choice: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            chosen = choice == index
            y[chosen] = expert(x[chosen]) * weight[chosen].unsqueeze(-1)
        return y

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x, *self.route(x))


class RoutedInside(Block):
    def __init__(self) -> None:
        super().__init__(Mixture())


def test_a_mixture_of_experts_is_run_with_its_router() -> None:
    block = seeded(RoutedInside)
    _, ffn = sites_of(block, inputs())
    assert products_of(ffn.branch, ffn.shortcut) == 1 + 2 * OF_MLP
    x = ffn.shortcut
    expected = torch.autograd.functional.jacobian(block.feed_forward, x)
    assert torch.allclose(jacobian(ffn.branch, x), expected, rtol=1e-10, atol=1e-12)


class Experts(Mixture):
    """Is given what a router outside of it has chosen."""

    def forward(self, x: Tensor, weight: Tensor, choice: Tensor) -> Tensor:
        return self.mix(x, weight, choice)


class RoutedOutside(Block):
    def __init__(self) -> None:
        super().__init__(Experts())

    def feed_forward(self, x: Tensor) -> Tensor:
        normed = self.norm_2(x)
        return self.mlp(normed, *self.mlp.route(normed))


def test_experts_that_are_given_a_choice_are_run_with_all_of_their_block() -> None:
    """Of two arguments that depend on the source, both have to change."""
    block = seeded(RoutedOutside)
    _, ffn = sites_of(block, inputs())
    assert products_of(ffn.branch, ffn.shortcut) == OF_ATTENTION + 1 + 2 * OF_MLP
    x = ffn.shortcut
    expected = torch.autograd.functional.jacobian(block.feed_forward, x)
    assert torch.allclose(jacobian(ffn.branch, x), expected, rtol=1e-10, atol=1e-12)
    assert torch.allclose(ffn.branch(-x), block.feed_forward(-x), rtol=1e-10, atol=1e-12)


# -- models of libraries ---------------------------------------------------------------------------
def small(kind: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=32,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind, of_ffn, of_attention", [("gpt2", 2, 4), ("llama", 3, 6)])
def test_blocks_of_transformers_are_not_run_for_their_ffn(
    kind: str, of_ffn: int, of_attention: int
) -> None:
    sites = sites_of(small(kind), torch.arange(6)[None])
    assert [site.kind for site in sites] == ["attention", "mlp"] * 2
    for site in sites:
        expected = of_ffn if site.kind == "mlp" else of_attention
        assert products_of(site.branch, site.shortcut) == expected
        assert products_of(site.core, site.normalized) == expected


def test_the_ffn_of_a_gpt2_has_its_jacobian() -> None:
    model = small("gpt2").double()
    sites = sites_of(model, torch.arange(3)[None])
    block = model.get_submodule("transformer.h.1")
    check_jacobian(sites[3], lambda x: block.mlp(block.ln_2(x)))


def test_the_ffn_of_a_llama_has_its_jacobian() -> None:
    # Its norm computes in float32.
    sites = sites_of(small("llama"), torch.arange(3)[None], dtype=torch.float64)
    block = small("llama").double().get_submodule("model.layers.1")

    def reference(x: Tensor) -> Tensor:
        norm = block.post_attention_layernorm
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
        return block.mlp(norm.weight * (x * scale))

    check_jacobian(sites[3], reference)


def test_the_cross_attention_of_torch_is_run_alone() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(WIDTH, 2, 12, norm_first=True, batch_first=True).double()
    layer.eval()
    memory = inputs().flip(-1)
    _, cross, _ = sites_of(layer, inputs(), memory)
    # Queries, keys and values, two in the attention itself, and the output.
    assert products_of(cross.branch, cross.shortcut) == 5

    def reference(x: Tensor) -> Tensor:
        attention, normed = layer.multihead_attn, layer.norm2(x)
        return attention(normed, memory, memory, need_weights=False)[0]

    with sdpa_kernel(SDPBackend.MATH):
        check_jacobian(cross, reference)


def test_the_ffn_of_an_encoder_layer_of_torch_is_run_by_the_layer() -> None:
    """Its activation is a call of the layer, which no module call inside it makes."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 12, norm_first=True, batch_first=True).double()
    layer.eval()
    attention, ffn = sites_of(layer, inputs())
    of_attention = products_of(attention.branch, attention.shortcut)
    assert products_of(ffn.branch, ffn.shortcut) == of_attention + 2
    check_jacobian(ffn, lambda x: layer._ff_block(layer.norm2(x)))


# -- what is left to the block ---------------------------------------------------------------------
class TwoArguments(nn.Module):
    """An FFN that is given the stream itself, too."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.gate = Mlp(), nn.Linear(WIDTH, WIDTH)

    def forward(self, normed: Tensor, x: Tensor) -> Tensor:
        return self.mlp(normed) * torch.sigmoid(self.gate(x))


class ReadsStreamToo(Block):
    def __init__(self) -> None:
        super().__init__(TwoArguments())

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm_2(x), x)


class Stateful(Mlp):
    """Reads what the block has left on it."""

    left: Any = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.left


class LeavesTensor(Block):
    """The module reads a value of the stream that is no argument."""

    def __init__(self) -> None:
        super().__init__(Stateful())

    def feed_forward(self, x: Tensor) -> Tensor:
        self.mlp.left = x.mean(-1, keepdim=True)
        return super().feed_forward(x)


class LeavesNumber(Block):
    """The module reads a number that the record does not know of."""

    def __init__(self) -> None:
        super().__init__(Stateful())

    def feed_forward(self, x: Tensor) -> Tensor:
        self.mlp.left = x.shape[-1] / 3
        return super().feed_forward(x)


class ReadsByClosure(Mlp):
    """Reads what only a function knows."""

    def __init__(self, read: Callable[[], Tensor]) -> None:
        super().__init__()
        self.read = read

    def forward(self, x: Tensor | None = None) -> Tensor:
        if x is None:
            return super().forward(self.read())
        return super().forward(x) * self.read()


class HandsOverNothing(Block):
    """The FFN has no argument at all."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = ReadsByClosure(lambda: self.normed)

    def feed_forward(self, x: Tensor) -> Tensor:
        self.normed = self.norm_2(x)
        return self.mlp()


class HidesConstant(Block):
    """The FFN reads a value that does not depend on the stream, and is no argument."""

    def __init__(self) -> None:
        super().__init__()
        self.constant = torch.ones(())
        self.mlp = ReadsByClosure(lambda: self.constant)

    def feed_forward(self, x: Tensor) -> Tensor:
        self.constant = torch.full((), 3.0, dtype=x.dtype)
        return super().feed_forward(x)


@torch.jit.script
def scripted_constant() -> Tensor:
    return torch.full((), 3.0, dtype=torch.float64)


class HidesUnrecorded(HidesConstant):
    """The value comes from code that is not recorded."""

    def feed_forward(self, x: Tensor) -> Tensor:
        self.constant = scripted_constant()
        return self.mlp(self.norm_2(x))


class WritesToArgument(Mlp):
    """Writes to what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(1.5))


class WritesInPlace(Block):
    def __init__(self) -> None:
        super().__init__(WritesToArgument())


class Scaled(Mlp):
    """Is given a factor."""

    def forward(self, x: Tensor, scale: float) -> Tensor:
        return super().forward(x) * scale


class ReadsNumber(Block):
    """A number that Python reads from the stream is an argument."""

    def __init__(self) -> None:
        super().__init__(Scaled())

    def feed_forward(self, x: Tensor) -> Tensor:
        normed = self.norm_2(x)
        return self.mlp(normed, float(x.detach().abs().max()))


class Tied(nn.Module):
    """Multiplies by a weight of another module, which it holds in a closure."""

    def __init__(self, weight: Callable[[], Tensor]) -> None:
        super().__init__()
        self.weight = weight
        self.down = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(x @ self.weight()))


class BorrowsWeight(Block):
    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.shared = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.mlp = Tied(lambda: self.shared)


class OwnGradient(torch.autograd.Function):
    """Twice its argument, which autograd sees as one step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


class TwiceNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return OwnGradient.apply(super().forward(x))


class FunctionBefore(Block):
    """What the FFN is given is made inside a custom autograd.Function."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_2 = TwiceNorm(WIDTH)


class TwiceMlp(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return OwnGradient.apply(super().forward(x))


class FunctionAtEnd(Block):
    """What the FFN returns is made there."""

    def __init__(self) -> None:
        super().__init__(TwiceMlp())


class Shifted(Mlp):
    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return super().forward(x + shift)


class WritesLater(Block):
    """A second argument is written to after the FFN: it would have to be copied."""

    def __init__(self) -> None:
        super().__init__(Shifted())

    def feed_forward(self, x: Tensor) -> Tensor:
        shift = torch.full((), 3.0, dtype=x.dtype)
        y = self.mlp(self.norm_2(x), shift)
        shift.zero_()
        return y


class ReturnsFloat32(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).type("torch.FloatTensor")


class UnderAutocast(Block):
    """The FFN runs in the precision that the code around it asks for."""

    def __init__(self) -> None:
        super().__init__(ReturnsFloat32())

    def feed_forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.mlp(self.norm_2(x))


class LowResult(Block):
    """The sum raises what the FFN returns."""

    def __init__(self) -> None:
        super().__init__(ReturnsFloat32())


# The block's class -> how many products it makes.
LEFT_TO_THE_BLOCK: dict[type[Block], int] = {
    ReadsStreamToo: OF_BLOCK + 1,
    LeavesTensor: OF_BLOCK,
    LeavesNumber: OF_BLOCK,
    HandsOverNothing: OF_BLOCK,
    HidesConstant: OF_BLOCK,
    HidesUnrecorded: OF_BLOCK,
    WritesInPlace: OF_BLOCK,
    ReadsNumber: OF_BLOCK,
    BorrowsWeight: OF_BLOCK,
    WritesLater: OF_BLOCK,
    FunctionBefore: OF_BLOCK,
    FunctionAtEnd: OF_BLOCK,
    LowResult: OF_BLOCK,
}


@pytest.mark.parametrize("kind", LEFT_TO_THE_BLOCK)
def test_an_ffn_that_may_not_be_run_alone_is_run_by_its_block(kind: type[Block]) -> None:
    block = seeded(kind)
    _, ffn = sites_of(block, inputs())
    assert products_of(ffn.branch, ffn.shortcut) == LEFT_TO_THE_BLOCK[kind]
    x = ffn.shortcut.detach().clone()
    expected = torch.autograd.functional.jacobian(block.feed_forward, x)
    assert torch.allclose(jacobian(ffn.branch, x), expected, rtol=1e-10, atol=1e-12)
    elsewhere = 3 * x
    expected = block.feed_forward(elsewhere.clone()).to(x.dtype)
    assert torch.allclose(ffn.branch(elsewhere), expected)


def test_an_ffn_under_autocast_is_run_under_autocast() -> None:
    torch.manual_seed(0)
    block = UnderAutocast().eval()
    _, ffn = sites_of(block, inputs(torch.float32))
    assert products_of(ffn.branch, ffn.shortcut) == OF_BLOCK
    assert not torch.allclose(ffn.value, block.mlp(block.norm_2(ffn.shortcut)), atol=1e-5)


# -- what does not stand in the way ----------------------------------------------------------------
class InPlaceSums(Block):
    """The stream itself is written to: what the norm was given is gone afterwards."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        x += self.mlp(self.norm_2(x))
        return x


def test_a_stream_that_is_written_to_later_is_kept_as_it_was() -> None:
    block = seeded(InPlaceSums)
    _, ffn = sites_of(block, inputs())
    assert products_of(ffn.branch, ffn.shortcut) == OF_MLP
    check_jacobian(ffn, block.feed_forward)


class InPlaceWithoutNorm(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        x += self.mlp(x)
        return x


def test_a_stream_that_is_written_to_later_is_copied_for_norms_alone() -> None:
    block = seeded(InPlaceWithoutNorm)
    _, ffn = sites_of(block, inputs())
    assert products_of(ffn.branch, ffn.shortcut) == OF_BLOCK
    check_jacobian(ffn, block.mlp)


class ErasesHidden(Sandwich):
    def feed_forward(self, x: Tensor) -> Tensor:
        hidden = self.mlp(self.norm_2(x))
        y = self.norm_3(hidden)
        hidden.zero_()
        return y


def test_a_value_that_is_written_to_later_is_not_handed_over() -> None:
    _, ffn = sites_of(seeded(ErasesHidden), inputs())
    assert products_of(ffn.branch, ffn.shortcut) == OF_BLOCK


class Noisy(Mlp):
    """Draws random numbers, as dropout in training does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.3, training=True))


class DrawsNumbers(Block):
    def __init__(self) -> None:
        super().__init__(Noisy())

    def forward(self, x: Tensor) -> Tensor:
        # The attention draws numbers before the FFN does.
        x = x + F.dropout(self.attention(self.norm_1(x)), 0.3, training=True)
        return x + self.feed_forward(x)


def test_random_numbers_are_those_of_the_recorded_run() -> None:
    block = seeded(DrawsNumbers)
    _, ffn = sites_of(block, inputs())
    assert products_of(ffn.branch, ffn.shortcut) == OF_MLP
    assert torch.equal(ffn.branch(ffn.shortcut), ffn.branch(ffn.shortcut))


def test_weights_of_lower_precision_are_raised() -> None:
    torch.manual_seed(0)
    block = Block().bfloat16().eval()
    _, ffn = sites_of(block, inputs().bfloat16(), dtype=torch.float64)
    assert products_of(ffn.branch, ffn.shortcut) == OF_MLP
    check_jacobian(ffn, block.double().feed_forward)


def test_weights_that_are_read_from_a_file() -> None:
    block = seeded(Block)
    weights = {name: tensor.detach().clone() for name, tensor in block.named_parameters()}
    reference = sites_of(block, inputs())[1]
    _, ffn = sites_of(seeded(Block).to("meta"), inputs(), weights=weights)
    assert products_of(ffn.branch, ffn.shortcut) == OF_MLP
    assert torch.equal(ffn.value, reference.value)
    check_jacobian(ffn, block.feed_forward)


class SharedActivation(Mlp):
    """Calls a module that is registered in another one."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = (activation,)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation[0](self.up(x)))


class CallsOutside(Block):
    def __init__(self) -> None:
        super().__init__()
        self.activation = nn.GELU()
        self.mlp = SharedActivation(self.activation)


def test_a_module_that_calls_one_from_outside_is_run_in_steps() -> None:
    """All weights of the model would have to be brought in place for it."""
    block = seeded(CallsOutside)
    sites = sites_of(block, inputs())
    assert products_of(sites[1].branch, sites[1].shortcut) == OF_MLP
    kept = {sites.graph.path(index) for index in sites.replayer.calls}
    assert kept >= {"norm_2", "mlp.up", "activation", "mlp.down"} and "mlp" not in kept
    check_jacobian(sites[1], block.feed_forward)


class HoldsConstant(Mlp):
    """Has a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = {"scale": torch.full((), 3.0, dtype=torch.float64)}

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factors["scale"]


class OwnConstant(Block):
    def __init__(self) -> None:
        super().__init__(HoldsConstant())


def test_a_constant_of_the_module_is_at_hand() -> None:
    block = seeded(OwnConstant)
    _, ffn = sites_of(block, inputs())
    assert products_of(ffn.branch, ffn.shortcut) == OF_MLP
    check_jacobian(ffn, block.feed_forward)


class Checkpointed(Block):
    def feed_forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.mlp, self.norm_2(x), use_reentrant=False)


def test_a_checkpointed_ffn_is_run_alone() -> None:
    block = seeded(Checkpointed)
    _, ffn = sites_of(block, inputs())
    assert products_of(ffn.branch, ffn.shortcut) == OF_MLP
    check_jacobian(ffn, lambda x: block.mlp(block.norm_2(x)))


class MlpWithoutGradient(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


class WithoutGradient(Block):
    def __init__(self) -> None:
        super().__init__(MlpWithoutGradient())


def test_an_ffn_under_no_grad_is_differentiated() -> None:
    block = seeded(WithoutGradient)
    _, ffn = sites_of(block, inputs())
    assert products_of(ffn.branch, ffn.shortcut) == OF_MLP
    mlp = block.mlp
    check_jacobian(ffn, lambda x: mlp.down(F.gelu(mlp.up(block.norm_2(x)))))


class Joined(nn.Module):
    """Writes what it is given into a tensor of its own."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[:, :] = x * 2
        return y


class WritesIntoZeros(Block):
    def __init__(self) -> None:
        super().__init__()
        self.join = Joined()

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.join(self.norm_2(x)))


def test_a_value_that_was_written_into_another_tensor_is_handed_over() -> None:
    block = seeded(WritesIntoZeros)
    _, ffn = sites_of(block, inputs())
    assert products_of(ffn.branch, ffn.shortcut) == OF_MLP
    check_jacobian(ffn, lambda x: block.mlp(2 * block.norm_2(x)))


class Half(nn.Module):
    """Returns a view whose memory has gaps."""

    def __init__(self) -> None:
        super().__init__()
        self.widen = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.widen(x)[..., :WIDTH]


STRIDES: list[tuple[int, ...]] = []


class NotesStrides(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        STRIDES.append(x.stride())
        return super().forward(x)


class Sliced(Block):
    def __init__(self) -> None:
        super().__init__(NotesStrides())
        self.first_half = Half()

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.first_half(self.norm_2(x)))


def test_a_value_between_two_module_calls_keeps_its_strides() -> None:
    """A product of a copy may round otherwise."""
    STRIDES.clear()
    block = seeded(Sliced)
    _, ffn = sites_of(block, inputs())
    assert products_of(ffn.branch, ffn.shortcut) == 1 + OF_MLP
    assert len(STRIDES) > 2 and set(STRIDES) == {(3 * 2 * WIDTH, 2 * WIDTH, 1)}
    check_jacobian(ffn, block.feed_forward)


# -- what is kept ----------------------------------------------------------------------------------
class Clones(TorchDispatchMode):
    """Counts the copies that are made."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.clone.default
        return func(*args, **(kwargs or {}))


def clones_of_capture(sites: Sites, calls: set[int]) -> int:
    with torch.no_grad(), Clones() as clones:
        sites.replayer.capture(calls, {}, {})
    return clones.count


def test_only_module_calls_that_are_run_again_are_kept_and_nothing_is_copied() -> None:
    sites = sites_of(seeded(Block), inputs())
    calls = set(sites.replayer.calls)
    kept = {sites.graph.path(index) for index in calls}
    assert kept == {"", "norm_1", "norm_2", "mlp"}
    assert clones_of_capture(sites, calls) == clones_of_capture(sites, {0})
