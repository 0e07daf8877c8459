"""JD208 to JD211: gains, routers, copies and leftover memory; what must be named, what must not,
and the boundaries.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jacdiag
from benchmarks._families import family
from jacdiag.records import ContractRecord, Finding, WeightRecord
from jacdiag.rules.init.identical_layers import copies
from jacdiag.rules.init.init_contract import judge as judge_contract
from jacdiag.rules.init.leftover_memory import LARGEST, leftovers
from jacdiag.rules.init.routers import unlike_routers
from jacdiag.rules.init.small_parameters import differences

WIDTH = 64
Fill = Callable[[Tensor], object]


# -- a model ---------------------------------------------------------------------------------------
class Norm(nn.Module):
    """RMS norm whose gain is `weight`, or `1 + weight`."""

    def __init__(self, width: int = WIDTH, form: str = "plain") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width) if form == "plain" else torch.zeros(width))
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        match self.form:
            case "plain":
                return y * self.weight
            case "1 + w":
                return y * (1.0 + self.weight)
            case "w.add(1)":
                return y * self.weight.float().add(1.0)
            case "y + y w":
                return y + y * self.weight
            case "exp":
                return y * self.weight.exp()
            case _:
                return F.rms_norm(x, (len(self.weight),), self.weight + 1)


class Experts(nn.Module):
    """Two of four experts for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(
                nn.Linear(WIDTH, 96, bias=False), nn.GELU(), nn.Linear(96, WIDTH, bias=False)
            )
            for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        values, chosen = weights.topk(2, dim=-1)
        sparse = torch.zeros_like(weights).scatter(-1, chosen, values)
        return torch.stack(
            [sparse[..., k : k + 1] * expert(x) for k, expert in enumerate(self.experts)]
        ).sum(0)


class Block(nn.Module):
    """Pre-norm block with LayerScale on its second branch."""

    def __init__(self, mlp: Callable[[], nn.Module], form: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(form=form), Norm(form=form)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.mlp = mlp()
        self.scale = nn.Parameter(torch.full((WIDTH,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v))
        return x + self.scale * self.mlp(self.norm2(x))


class Model(nn.Module):
    """Blocks with matrices N(0, 0.02) and biases of zero."""

    def __init__(
        self, layers: int = 6, mlp: Callable[[], nn.Module] | None = None, form: str = "plain"
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, WIDTH)
        self.cls = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.layers = nn.ModuleList(Block(mlp or feed_forward, form) for _ in range(layers))
        self.norm = Norm(form=form)
        self.head = nn.Linear(WIDTH, 128, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, 0.0, 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def feed_forward() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 96), nn.GELU(), nn.Linear(96, WIDTH))


def build(seed: int = 0, **options: Any) -> Model:
    torch.manual_seed(seed)
    return Model(**options)


def judge(model: nn.Module, probe: Any = None, **options: Any) -> list[Finding]:
    """Return the findings of the four rules."""
    probe = (
        torch.randint(128, (2, 12), generator=torch.Generator().manual_seed(0))
        if probe is None
        else probe
    )
    codes = ["JD208", "JD209", "JD210", "JD211"]
    options = {"state": "init", "select": codes, **options}
    report = jacdiag.audit(model, probe, products=False, remedies="none", **options)
    return [finding for finding in report.findings if finding.code in codes]


def named(findings: list[Finding]) -> dict[str, set[str]]:
    """Return the parameters that each rule names."""
    result: dict[str, set[str]] = {}
    for finding in findings:
        result.setdefault(finding.code, set()).update(finding.evidence["parameters"])
    return result


@torch.no_grad()
def fill(model: nn.Module, how: Fill, *names: str) -> None:
    for name in names:
        how(model.get_parameter(name))


# -- JD208: vectors that differ --------------------------------------------------------------------
@pytest.mark.parametrize("seed", [0, *(pytest.param(k, marks=pytest.mark.long) for k in (1, 2))])
@pytest.mark.parametrize(
    "options", [{}, {"mlp": Experts}, {"form": "1 + w"}], ids=["dense", "experts", "1 + w"]
)
def test_a_correct_model_is_silent(options: dict[str, Any], seed: int) -> None:
    assert not judge(build(seed, **options))


@pytest.mark.parametrize("name", ["layers.2.norm2.weight", "norm.weight"])
@pytest.mark.parametrize("what", ["zero", "std 0.02", "another constant"])
def test_a_gain_unlike_the_others_is_named(name: str, what: str) -> None:
    model = build()
    how: dict[str, Fill] = {
        "zero": nn.init.zeros_,
        "std 0.02": lambda gain: nn.init.normal_(gain, 0.0, 0.02),
        "another constant": lambda gain: nn.init.constant_(gain, 0.5),
    }
    fill(model, how[what], name)
    found = judge(model)
    if name == "norm.weight" and what == "another constant":
        assert not found  # a last norm of its own size may be meant
        return
    assert named(found) == {"JD208": {name}} and found[0].level == "warning"
    assert found[0].fix == f"set {name} to 1"


def test_the_sentence_says_which_layer_what_it_holds_and_what_the_others_hold() -> None:
    model = build()
    fill(model, nn.init.zeros_, "layers.2.norm2.weight")
    [finding] = judge(model)
    assert finding.what == "layers.*.norm2 (1 of 6, in layer 2) holds 0; the others hold 1.00"
    assert finding.where == ["layers.2.mlp"]


@pytest.mark.parametrize("count", [2, 3, 6])
def test_two_thirds_of_the_layers_define_the_usual_value(count: int) -> None:
    model = build()
    names = {f"layers.{layer}.norm2.weight" for layer in range(count)}
    fill(model, nn.init.zeros_, *names)
    assert named(judge(model)) == ({"JD208": names} if count == 2 else {})


def test_two_layers_are_judged_by_the_other_gains_of_the_model() -> None:
    model = build(layers=2)
    fill(model, nn.init.zeros_, "layers.1.norm2.weight")
    assert named(judge(model)) == {"JD208": {"layers.1.norm2.weight"}}


@pytest.mark.parametrize("name", ["layers.4.proj.bias", "layers.4.scale"])
def test_biases_and_scales_are_compared_too(name: str) -> None:
    model = build()
    fill(model, lambda vector: nn.init.uniform_(vector, -0.1, 0.1), name)
    assert named(judge(model)) == {"JD208": {name}}


def test_a_cls_token_and_positions_may_be_anything_an_init_writes() -> None:
    for std in (0.0, 1e-6, 0.02, 1.0):
        model = build()
        fill(model, lambda token, std=std: nn.init.normal_(token, 0.0, std), "cls")
        assert not judge(model)


def gains_around_one(model: Model) -> None:
    fill(
        model,
        lambda gain: nn.init.normal_(gain, 1.0, 0.02),
        *(n for n, _ in model.named_parameters() if "norm" in n),
    )


def default_biases(model: Model) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.uniform_(module.bias, -(module.in_features**-0.5), module.in_features**-0.5)


def zero_last_gains(model: Model) -> None:
    fill(model, nn.init.zeros_, *(f"layers.{layer}.norm2.weight" for layer in range(6)))


def gains_by_depth(model: Model) -> None:
    for layer in range(6):
        value = (layer + 1) ** -0.5
        fill(
            model,
            lambda gain, value=value: nn.init.constant_(gain, value),
            f"layers.{layer}.norm1.weight",
        )


def layer_scale_by_depth(model: Model) -> None:
    for layer, value in enumerate((0.1, 0.1, 0.1, 0.1, 1e-5, 1e-6)):
        fill(
            model,
            lambda scale, value=value: nn.init.constant_(scale, value),
            f"layers.{layer}.scale",
        )


def zero_gates(model: Model) -> None:
    fill(model, nn.init.zeros_, *(f"layers.{layer}.scale" for layer in range(6)))


def decays_by_layer(model: Model) -> None:
    for layer in range(6):
        decay = -5 + 8 * torch.linspace(0, 1, WIDTH) ** (0.7 + 1.3 * layer / 5)
        fill(model, lambda scale, decay=decay: scale.copy_(decay), f"layers.{layer}.scale")


def slopes_by_head(model: Model) -> None:
    for layer in range(6):
        fill(
            model,
            lambda scale: scale.copy_(2.0 ** -torch.linspace(1, 8, WIDTH)),
            f"layers.{layer}.scale",
        )


PUBLISHED = [
    gains_around_one,
    default_biases,
    zero_last_gains,
    gains_by_depth,
    layer_scale_by_depth,
    zero_gates,
    decays_by_layer,
    slopes_by_head,
]


@pytest.mark.parametrize("change", PUBLISHED, ids=[change.__name__ for change in PUBLISHED])
@pytest.mark.parametrize("seed", [0, *(pytest.param(k, marks=pytest.mark.long) for k in (1, 2))])
def test_published_inits_are_silent(change: Callable[[Model], None], seed: int) -> None:
    model = build(seed)
    change(model)
    assert not judge(model)


def test_a_layer_scale_that_rises_in_one_layer_is_named() -> None:
    model = build()
    fill(model, nn.init.ones_, "layers.5.scale")
    assert named(judge(model)) == {"JD208": {"layers.5.scale"}}


@pytest.mark.parametrize("what", ["zero", "wider", "shifted"])
def test_a_layer_among_drawn_ones(what: str) -> None:
    model = build()
    default_biases(model)
    how: dict[str, Fill] = {
        "zero": nn.init.zeros_,
        "wider": lambda bias: bias.mul_(5),
        "shifted": lambda bias: bias.add_(1),
    }
    fill(model, how[what], "layers.3.qkv.bias")
    assert named(judge(model)) == {"JD208": {"layers.3.qkv.bias"}}


def test_one_slope_among_tables_that_are_alike() -> None:
    model = build()
    slopes_by_head(model)
    fill(model, lambda scale: scale.mul_(2), "layers.3.scale")
    assert named(judge(model)) == {"JD208": {"layers.3.scale"}}


FORMS = ["1 + w", "w.add(1)", "y + y w", "fused"]


@pytest.mark.parametrize("form", FORMS)
def test_gains_of_one_plus_w_that_hold_ones_are_named(form: str) -> None:
    model = build(layers=3, form=form)
    assert not judge(model)
    gains = {name for name, _ in model.named_parameters() if "norm" in name}
    fill(model, nn.init.ones_, *gains)
    found = judge(model)
    assert named(found) == {"JD208": gains}
    assert all(
        "the gain is 2" in finding.what and finding.fix.endswith(" to 0") for finding in found
    )


def test_ones_that_are_no_gain_of_two() -> None:
    model = build(layers=3, form="exp")
    fill(model, nn.init.ones_, *(name for name, _ in model.named_parameters() if "norm" in name))
    assert not judge(model)


@pytest.mark.parametrize("form", ["plain", "1 + w"])
def test_gains_drawn_around_zero(form: str) -> None:
    model = build(layers=3, form=form)
    gains = {name for name, _ in model.named_parameters() if "norm" in name}
    fill(model, lambda gain: nn.init.normal_(gain, 0.0, 0.02), *gains)
    # else they are around 1
    assert named(judge(model)) == ({"JD208": gains} if form == "plain" else {})


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (nn.init.uniform_, "drawn around 0."),  # what PyTorch before 1.2 drew for batch norms
        (lambda gain: nn.init.uniform_(gain, -0.05, 0.05), "around 0 as a matrix is"),
        (lambda gain: nn.init.normal_(gain, 0.5, 0.02), "drawn around 0."),
        (lambda gain: nn.init.normal_(gain, 1.0, 0.02), ""),  # DCGAN
        (lambda gain: nn.init.uniform_(gain, 0.5, 1.5), ""),
    ],
)
def test_gains_are_drawn_around_one_if_at_all(how: Fill, words: str) -> None:
    model = build(layers=3)
    gains = {name for name, _ in model.named_parameters() if "norm" in name}
    fill(model, how, *gains)
    found = judge(model)
    assert named(found) == ({"JD208": gains} if words else {})
    assert all(words in finding.what for finding in found)


def test_factors_that_were_computed_are_no_drawn_gains() -> None:
    """RWKV mixes a token with the one before by factors that rise over the channels, behind a
    norm.
    """
    model = build(layers=3)
    ascending = torch.linspace(0, 1, WIDTH)
    fill(
        model,
        lambda gain: gain.copy_(ascending**0.7),
        *(f"layers.{k}.norm1.weight" for k in range(3)),
    )
    assert not judge(model)
    gains = {f"layers.{k}.norm1.weight" for k in range(3)}
    fill(model, lambda gain: gain.copy_(ascending[torch.randperm(WIDTH)]), *gains)
    assert named(judge(model)) == {"JD208": gains}


@pytest.mark.parametrize(("layers", "is_named"), [(1, False), (2, True)])
def test_how_many_values_show_that_a_gain_was_not_drawn_around_one(
    layers: int, is_named: bool
) -> None:
    """Gains of 8 numbers: one layer is too few to say, two are 16."""
    gains = [
        WeightRecord(
            f"l.{k}.n.w",
            [8],
            "norm_gain",
            "l.*.n.w",
            k,
            family="uniform",
            mean=0.1,
            std=0.1,
            lower=0.05,
            upper=0.3,
        )
        for k in range(layers)
    ]
    assert bool(differences(judge_contract(ContractRecord("x", {}, gains)))[1]) is is_named


# -- JD208: norms that divide by a length ----------------------------------------------------------
class LengthNorm(nn.Module):
    """g x / |x|, written in one of several ways."""

    def __init__(self, value: float, form: str) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.tensor([value]))
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        match self.form:
            case "normalize":
                return F.normalize(x, dim=-1) * self.g
            case "clamp":
                return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-5) * self.g
            case "1 + g":
                return F.normalize(x, dim=-1) * (1 + self.g)
            case "root mean square":  # the factor makes it another norm
                return x / (x.norm(dim=-1, keepdim=True) * WIDTH**-0.5).clamp(min=1e-5) * self.g
            case _:
                return F.normalize(x, dim=-1) * WIDTH**0.5 * self.g


def with_length_norms(value: float, form: str) -> Model:
    model = build(layers=3)
    for layer in model.layers:
        layer.norm1, layer.norm2 = LengthNorm(value, form), LengthNorm(value, form)  # type: ignore[union-attr]
    model.norm = LengthNorm(value, form)  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("form", ["normalize", "clamp"])
@pytest.mark.parametrize(
    ("value", "is_named"), [(8.0, False), (1.0, True), (1 / 8, True), (4.1, False), (3.9, True)]
)
def test_a_scale_norm_starts_at_the_root_of_the_width(
    form: str, value: float, is_named: bool
) -> None:
    found = judge(with_length_norms(value, form))
    assert bool(found) is is_named
    for finding in found:
        assert finding.fix.endswith("to 8") and "√64 = 8.00" in finding.what


def test_the_root_mean_square_of_a_scale_norm_is_what_the_sentence_says() -> None:
    model = with_length_norms(1.0, "normalize")
    out = model.norm(torch.randn(5, WIDTH)).detach()
    assert float(out.square().mean().sqrt()) == pytest.approx(0.125)
    assert all("a root mean square of 0.125" in finding.what for finding in judge(model))


@pytest.mark.parametrize("form", ["root mean square", "factor"])
def test_a_norm_with_a_factor_of_its_own_is_no_scale_norm(form: str) -> None:
    assert not judge(with_length_norms(1.0, form))


def test_a_scale_norm_stored_around_one() -> None:
    assert not judge(with_length_norms(7.0, "1 + g"))
    assert all(finding.fix.endswith("to 7") for finding in judge(with_length_norms(0.0, "1 + g")))


# -- JD208: biases ---------------------------------------------------------------------------------
def biases_of(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.endswith("bias")}


def test_biases_that_were_drawn_as_the_matrices() -> None:
    model = build(layers=4)
    fill(model, lambda bias: nn.init.normal_(bias, 0.0, 0.02), *biases_of(model))
    found = judge(model)
    assert named(found) == {"JD208": biases_of(model)}
    assert all("that is the std of the matrices" in finding.what for finding in found)


def default_bias(bias: Tensor) -> object:
    return nn.init.uniform_(bias, -1 / math.sqrt(WIDTH), 1 / math.sqrt(WIDTH))


@pytest.mark.parametrize(
    "how",
    [
        lambda bias: nn.init.normal_(bias, 0.0, 1e-6),  # ViT
        default_bias,  # nn.Linear's, beside matrices that were drawn anew
        # of that std, but uniform
        lambda bias: nn.init.uniform_(bias, -0.02 * math.sqrt(3), 0.02 * math.sqrt(3)),
        lambda bias: nn.init.normal_(bias, 0.0, 0.05),
    ],
)
def test_biases_of_other_draws_are_not_named(how: Fill) -> None:
    model = build(layers=4)
    fill(model, how, *biases_of(model))
    assert not judge(model)


def test_torchs_own_biases_have_the_std_of_their_matrices_and_are_not_named() -> None:
    for seed in range(3):
        model = build(seed, layers=4)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        assert not judge(model)


def test_the_bias_of_one_router_may_be_drawn() -> None:
    model = build(layers=6, mlp=Experts)
    for layer in model.layers:
        layer.mlp.gate = nn.Linear(WIDTH, 4)  # type: ignore[union-attr]
        nn.init.normal_(layer.mlp.gate.weight, 0.0, 0.02)  # type: ignore[union-attr, arg-type]
        nn.init.normal_(layer.mlp.gate.bias, 0.0, 0.02)  # type: ignore[union-attr, arg-type]
    assert not judge(model)


def test_biases_drawn_around_another_number() -> None:
    model = build(layers=4)
    fill(model, lambda bias: nn.init.normal_(bias, -0.1, 0.1), *biases_of(model))
    found = judge(model)
    assert named(found) == {"JD208": biases_of(model)}
    assert all("drawn around -0." in finding.what for finding in found)
    one = build(layers=4)  # a layer whose bias has a meaning
    fill(
        one,
        lambda bias: nn.init.normal_(bias, -4.6, 1.2),
        *(f"layers.{k}.proj.bias" for k in range(4)),
    )
    assert not judge(one)


# -- JD208: padding --------------------------------------------------------------------------------
def padded(index: int = 0) -> Model:
    model = build(layers=3)
    model.embedding.padding_idx = index
    with torch.no_grad():
        model.embedding.weight[index].zero_()
    return model


def test_a_padding_row_is_zero() -> None:
    for index in (0, 5):
        model = padded(index)
        assert not judge(model)
        with torch.no_grad():
            model.embedding.weight[index].normal_(0.0, 0.02)
        [finding] = judge(model)
        assert named([finding]) == {"JD208": {"embedding.weight"}}
        assert (
            f"in row {index}" in finding.what
            and finding.fix == f"set row {index} of embedding.weight to 0"
        )
    assert not judge(build(layers=3))  # no padding_idx, no row of zeros


def test_torch_gives_a_padding_row_no_gradient() -> None:
    embedding = nn.Embedding(4, 3, padding_idx=1)
    nn.init.normal_(embedding.weight)
    embedding(torch.tensor([0, 1])).sum().backward()
    assert embedding.weight.grad is not None
    assert embedding.weight.grad[1].abs().max() == 0 and embedding.weight.grad[0].abs().max() == 1


def test_all_gains_zero_are_named_and_those_of_gemma_are_not() -> None:
    model = build(layers=3)
    gains = {name for name, _ in model.named_parameters() if "norm" in name}
    fill(model, nn.init.zeros_, *gains)
    assert named(judge(model)) == {"JD208": gains}
    subject = family("gemma", 0)
    assert not judge(subject.model, subject.probe)


def test_what_the_user_pinned_is_not_named() -> None:
    model = build()
    fill(model, nn.init.zeros_, "layers.2.norm2.weight")
    assert not judge(model, contract={"layers.2.norm2.weight": "0"})


def test_what_another_rule_names_is_named_once() -> None:
    subject = family("llama", 0)
    fill(subject.model, nn.init.zeros_, "model.layers.2.input_layernorm.weight")
    report = jacdiag.audit(
        subject.model, subject.probe, products=False, state="init", remedies="none"
    )
    assert [f.code for f in report.findings if f.code.startswith("JD2")] == ["JD205"]


# -- JD209: routers --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("how", "level", "words"),
    [
        (
            lambda w: nn.init.kaiming_uniform_(w, a=math.sqrt(5)),
            "warning",
            "uniform as nn.Linear leaves it, 3.5",
        ),
        (lambda w: nn.init.normal_(w, 0.0, 1.0), "warning", "as torch.randn leaves it"),
        (nn.init.zeros_, "warning", "all zero, so that every token gives an expert the same score"),
        (lambda w: nn.init.normal_(w, 0.0, 0.07), "info", "times that of the matrices"),
        (lambda w: nn.init.normal_(w, 0.0, 0.002), "info", "of that of the matrices"),
        (lambda w: nn.init.normal_(w, 0.0, 0.02), "", ""),
        (lambda w: nn.init.trunc_normal_(w, 0.0, 0.02, -0.04, 0.04), "", ""),
        (
            lambda w: nn.init.xavier_normal_(w, gain=0.02 / math.sqrt(2 / (WIDTH + 3 * WIDTH))),
            "",
            "",
        ),
    ],
)
def test_jd209_names_routers_with_an_unusual_init(how: Fill, level: str, words: str) -> None:
    model = build(mlp=Experts)
    gates = {f"layers.{layer}.mlp.gate.weight" for layer in range(6)}
    fill(model, how, *sorted(gates))
    found = judge(model)
    assert named(found) == ({"JD209": gates} if level else {})
    assert not level or (found[0].level == level and words in found[0].what)


def test_a_default_router_in_a_default_model_is_as_the_rest() -> None:
    model = build(mlp=Experts)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    assert not judge(model)


@pytest.mark.parametrize(
    "family", ["deepseek_v3", "kimi_k2", "switch_transformers", "afmoe", "somebody"]
)
@pytest.mark.parametrize(
    "how", [lambda w: nn.init.kaiming_uniform_(w, a=math.sqrt(5)), nn.init.zeros_]
)
def test_a_router_is_judged_alike_under_every_name(family: str, how: Fill) -> None:
    model = build(mlp=Experts)
    model.config = type("Config", (), {"model_type": family})()  # type: ignore[assignment]
    fill(model, how, *(f"layers.{layer}.mlp.gate.weight" for layer in range(6)))
    [finding] = judge(model)
    assert finding.code == "JD209" and finding.level == "warning"


def test_router_of_std_one_next_to_an_embedding_of_std_one() -> None:
    """Switch Transformers draws both so; with an embedding of another std the routers alone stand
    out.
    """
    model = build(mlp=Experts)
    fill(
        model,
        lambda w: nn.init.normal_(w, 0.0, 1.0),
        *(f"layers.{layer}.mlp.gate.weight" for layer in range(6)),
    )
    assert [finding.level for finding in judge(model)] == ["warning"]
    fill(model, nn.init.normal_, "embedding.weight")
    [finding] = judge(model)
    assert finding.level == "info" and finding.what.endswith("embedding.weight has that std too")


class BalancedExperts(Experts):
    """A bias per expert joins the scores for the choice, as in AFMoE and DeepSeek-V3."""

    def __init__(self) -> None:
        super().__init__()
        self.expert_bias = nn.Parameter(torch.zeros(4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).sigmoid()
        chosen = (weights + self.expert_bias).topk(2, dim=-1).indices
        sparse = torch.zeros_like(weights).scatter(-1, chosen, weights.gather(-1, chosen))
        return torch.stack(
            [sparse[..., k : k + 1] * expert(x) for k, expert in enumerate(self.experts)]
        ).sum(0)


def test_zero_routers_with_a_balancing_bias_are_an_info() -> None:
    model = build(mlp=BalancedExperts)
    fill(model, nn.init.zeros_, *(f"layers.{layer}.mlp.gate.weight" for layer in range(6)))
    [finding] = judge(model)
    assert finding.level == "info" and "expert_bias has one number for each expert" in finding.what


def test_one_router_is_a_layer_that_differs() -> None:
    model = build(mlp=Experts)
    fill(model, lambda w: nn.init.kaiming_uniform_(w, a=math.sqrt(5)), "layers.3.mlp.gate.weight")
    assert not judge(model)
    probe = torch.randint(128, (2, 12), generator=torch.Generator().manual_seed(0))
    report = jacdiag.audit(
        model, probe, state="init", select=["JD2"], products=False, remedies="none"
    )
    assert named(report.findings) == {"JD205": {"layers.3.mlp.gate.weight"}}


def test_a_pinned_router_is_the_users_own() -> None:
    model = build(mlp=Experts)
    for layer in model.layers:
        layer.mlp.gate.reset_parameters()  # type: ignore[union-attr, operator]
    assert not judge(model, contract={"router": "1/sqrt(3*fan_in)"})


def test_how_far_a_router_may_be_from_the_rest() -> None:
    """The boundary is where the sampling intervals part: the factor that sends 1,536 numbers beyond
    both.
    """
    for factor, is_named in ((1.02, False), (1.6, True)):
        contract = ContractRecord("x", {"d": 64.0, "N": 6.0}, [_router(0.02 * factor), _matrix()])
        assert bool(unlike_routers(judge_contract(contract))[1]) is is_named


def _router(std: float) -> WeightRecord:
    return WeightRecord(
        "l.0.gate.weight",
        [24, 64],
        "router",
        "l.*.gate.weight",
        0,
        "l.0",
        64,
        24,
        "normal",
        std,
        std * 0.92,
        std * 1.09,
        0.0,
        largest=4 * std,
    )


def _matrix() -> WeightRecord:
    return WeightRecord(
        "l.0.up.weight",
        [64, 64],
        "W_1",
        "l.*.up.weight",
        0,
        "l.0",
        64,
        64,
        "normal",
        0.02,
        0.019,
        0.0211,
        0.0,
        largest=0.08,
    )


# -- JD210: identical layers -----------------------------------------------------------------------
def test_layers_that_were_copied() -> None:
    model = build(layers=4)
    model.layers = nn.ModuleList(copy.deepcopy(model.layers[0]) for _ in range(4))
    [finding] = judge(model)
    assert finding.code == "JD210"
    assert finding.what == "layers: 1, 2, 3 bit-identical to 0, in 12 of their 12 drawn weights"


def test_partly_copied_layer_is_named() -> None:
    model = build(layers=4)
    model.layers[2].mlp.load_state_dict(model.layers[1].mlp.state_dict())
    [finding] = judge(model)
    assert finding.what == "layers: 2 bit-identical to 1, in 2 of their 4 drawn weights"
    assert named([finding]) == {"JD210": {"layers.2.mlp.0.weight", "layers.2.mlp.2.weight"}}


def test_a_number_that_differs_is_no_copy() -> None:
    model = build(layers=4)
    model.layers[2].load_state_dict(model.layers[1].state_dict())
    for parameter in model.layers[2].parameters():
        if parameter.dim() == 2:
            parameter.data[-1, -1] += 1e-3
    assert not judge(model)


def test_experts_that_were_copied() -> None:
    model = build(layers=3, mlp=Experts)
    for layer in model.layers:
        experts = layer.mlp.experts  # type: ignore[union-attr]
        experts[2].load_state_dict(experts[0].state_dict())  # type: ignore[index, union-attr, operator]
    [finding] = judge(model)
    assert (
        finding.what == "layers.*.mlp.experts: 2 bit-identical to 0, in 6 of their 6 drawn weights"
    )


class Stacked(nn.Module):
    """Every expert for every token, in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(0.02 * torch.randn(4, WIDTH, 96))
        self.down = nn.Parameter(0.02 * torch.randn(4, 96, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("btd,edf->ebtf", x, self.up).relu()
        return torch.einsum("ebtf,efd->btd", hidden, self.down)


def test_stacked_experts_and_shards_that_repeat() -> None:
    model = build(layers=3, mlp=Stacked)
    assert not judge(model)
    model.layers[1].mlp.up.data[3] = model.layers[1].mlp.up.data[1]  # type: ignore[union-attr, index]
    weight = model.layers[2].proj.weight  # type: ignore[union-attr]
    weight.data[32:] = weight.data[:32].clone()  # type: ignore[union-attr, index, operator]
    assert named(judge(model)) == {"JD210": {"layers.1.mlp.up", "layers.2.proj.weight"}}


def test_shared_layers_and_constant_ones_are_no_copies() -> None:
    shared = build(layers=4)
    shared.layers = nn.ModuleList([shared.layers[0]] * 4)
    assert not judge(shared)
    zero = build(layers=4)
    fill(zero, nn.init.zeros_, *(f"layers.{layer}.proj.weight" for layer in range(4)))
    assert not judge(zero)


class Encoder(nn.Module):
    """torch's own encoder, as built: its layers are copies."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 96, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


def test_torchs_encoder_copies_its_layer() -> None:
    torch.manual_seed(0)
    [finding] = judge(Encoder(), torch.randn(2, 5, WIDTH))
    assert finding.what == "encoder.layers: 1, 2 bit-identical to 0, in 8 of their 8 drawn weights"


def test_other_names_are_no_layers() -> None:
    weights = [
        WeightRecord(name, [8, 8], "W_1", name, 0, "a", family="normal", same_as=same)
        for name, same in (("online.0.w", ""), ("target.0.w", "online.0.w"), ("target.1.w", ""))
    ]
    assert copies(ContractRecord("x", {}, weights)) == (3, [])


@torch.no_grad()
def restart(model: nn.Module, scale: Callable[[str], float]) -> None:
    """Draw every matrix from a generator that starts at one seed."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.normal_(0.0, scale(name), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize(
    "scale", [lambda name: 0.02, lambda name: 0.01 if "proj" in name else 0.02]
)
def test_one_seed_before_every_draw(scale: Callable[[str], float]) -> None:
    model = build(layers=3)
    restart(model, scale)
    found = judge(model)
    matrices = {
        name for name, p in model.named_parameters() if name.startswith("layers") and p.dim() == 2
    }
    first = "layers.0.qkv.weight"  # the first of the stack keeps its numbers
    assert named(found) == {"JD210": matrices - {first}}
    assert any(
        f"repeat the random numbers of {first}, up to a factor" in finding.what for finding in found
    )


def test_one_matrix_that_repeats_another_of_its_layer() -> None:
    model = build(layers=3)
    with torch.no_grad():
        model.layers[1].proj.weight.copy_(2 * model.layers[1].qkv.weight[WIDTH : 2 * WIDTH])  # type: ignore[union-attr]
    assert not judge(model)  # a piece from the middle is no common start
    with torch.no_grad():
        model.layers[1].proj.weight.copy_(2 * model.layers[1].qkv.weight[:WIDTH])  # type: ignore[union-attr]
    assert named(judge(model)) == {"JD210": {"layers.1.proj.weight"}}


def test_low_precision_keeps_the_stream() -> None:
    model = build(layers=3)
    restart(model, lambda name: 0.02)
    assert "layers.0.proj.weight" in named(judge(model.bfloat16().float()))["JD210"]


def test_a_copy_in_another_stack_may_be_meant() -> None:
    weights = [
        WeightRecord(
            name,
            [8, 8],
            "W_1",
            name,
            0,
            "a",
            family="normal",
            std=1.0,
            same_as=same,
            stream_of=same,
        )
        for name, same in (
            ("student.0.q.w", ""),
            ("teacher.0.q.w", "student.0.q.w"),
            ("teacher.0.k.w", ""),
        )
    ]
    assert copies(ContractRecord("x", {}, weights)) == (3, [])


def test_matrices_of_one_number() -> None:
    model = build(layers=3)
    fill(
        model,
        lambda w: nn.init.constant_(w, 0.1),
        *(f"layers.{k}.mlp.{j}.weight" for k in range(3) for j in (0, 2)),
    )
    [finding] = judge(model)
    assert named([finding])["JD210"] == {
        f"layers.{k}.mlp.{j}.weight" for k in range(3) for j in (0, 2)
    }
    assert "hold 0.100 throughout" in finding.what
    out = model.layers[0].mlp[0](torch.randn(2, WIDTH))  # type: ignore[union-attr, index, operator]
    assert torch.allclose(out, out[:, :1].expand_as(out), atol=1e-6)


def test_an_embedding_of_equal_blocks() -> None:
    model = build(layers=3)
    with torch.no_grad():
        model.embedding.weight[64:] = model.embedding.weight[:64].clone()
    assert named(judge(model)) == {"JD210": {"embedding.weight"}}


# -- JD211: leftover memory ------------------------------------------------------------------------
def integers(tensor: Tensor) -> object:
    """Fill a tensor with the bits of small integers, as a freed index tensor leaves them."""
    return tensor.view(torch.int32).copy_(
        torch.arange(tensor.numel(), dtype=torch.int32).reshape(tensor.shape)
    )


@pytest.mark.parametrize(
    "name", ["layers.2.norm2.weight", "norm.weight", "cls", "layers.0.qkv.weight"]
)
@pytest.mark.parametrize(
    ("how", "words"),
    [
        (integers, "closer to it than 1e-30"),
        (lambda w: w.normal_(0.0, 1e-30), "closer to it than 1e-30"),
        (lambda w: w.normal_(0.0, 1e20), "numbers beyond 1.00e+06"),
    ],
)
def test_leftovers_are_named_once_and_alone(name: str, how: Fill, words: str) -> None:
    model = build()
    fill(model, how, name)
    found = judge(model, select=["JD2"])
    assert named(found) == {"JD211": {name}} and words in found[0].what


def test_the_numbers_of_a_piece_of_another_weight() -> None:
    model = build()
    piece = model.layers[0].qkv.weight.data.flatten()[100 : 100 + WIDTH]  # type: ignore[union-attr, operator]
    fill(model, lambda gain: gain.copy_(piece), "layers.2.norm1.weight")
    [finding] = judge(model)
    assert finding.code == "JD211" and "a piece of layers.0.qkv.weight" in finding.what


def test_a_model_on_the_meta_device_that_was_never_initialised() -> None:
    with torch.device("meta"):
        model = Model()
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        integers(model.layers[1].proj.weight)  # type: ignore[union-attr, arg-type]
    assert "layers.1.proj.weight" in named(judge(model))["JD211"]
    fill(model, nn.init.zeros_, "layers.1.proj.weight")
    assert named(judge(model))["JD211"] == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("tiny", "largest", "is_named"),
    [
        (0, LARGEST, False),
        (0, 1.01 * LARGEST, True),
        (1, 1.0, True),
        (0, 1.0, False),
        (0, None, False),
    ],
)
def test_the_boundaries_of_leftovers(tiny: int, largest: float | None, is_named: bool) -> None:
    weight = WeightRecord("w", [8], "bias", "w", tiny=tiny, largest=largest)
    assert bool(leftovers(ContractRecord("x", {}, [weight]))) is is_named


def test_a_mask_of_one_large_number_was_written() -> None:
    mask = WeightRecord("mask", [8], "bias", "mask", family="constant", mean=-1e9, largest=1e9)
    assert not leftovers(ContractRecord("x", {}, [mask]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_draws_of_any_precision_hold_no_leftovers(dtype: torch.dtype) -> None:
    assert not judge(build(layers=3).to(dtype).float())


# -- all of them -----------------------------------------------------------------------------------
def test_a_trained_model_is_not_judged() -> None:
    model = build()
    fill(model, nn.init.zeros_, "layers.2.norm2.weight")
    assert not judge(model, state="trained")


def test_reports_from_before_these_fields_are_read() -> None:
    weights = [
        WeightRecord(f"l.{k}.proj.b", [8], "bias", "l.*.proj.b", k, family="zero", mean=0.0)
        for k in range(4)
    ]
    data = ContractRecord("x", {"N": 4.0, "d": 8.0}, weights).to_dict()
    for weight in data["weights"]:
        for field in ("largest", "tiny", "same_as", "piece_of", "offset"):
            del weight[field]
    contract = ContractRecord.from_dict(data)
    assert (
        differences(judge_contract(contract)) == (4, [])
        and not leftovers(contract)
        and copies(contract) == (0, [])
    )


FAMILIES = ["gpt2", "llama", "gpt_neox", "opt", "bloom", "olmo2", "t5", "gemma"]


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_families_have_no_findings_on_vectors(name: str) -> None:
    subject = family(name, 7)
    assert not judge(subject.model, subject.probe)


# -- the fixes -------------------------------------------------------------------------------------
def is_in(name: str, words: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", words) is not None


@torch.no_grad()
def follow(fix: str, model: nn.Module) -> None:
    """Do what a fix says, each of its steps by itself."""
    for step in fix.replace("; after to_empty(), run the init of the whole model", "").split("; "):
        words = step.partition(", as ")[0]
        names = [name for name, _ in model.named_parameters() if is_in(name, words)]
        row = re.match(r"set row (\d+) of ", words)
        value = re.search(r" to (-?[\d.e-]+)$", words)
        std = re.search(r"std ([\d.e-]+)", words)
        mean = re.search(r"mean (-?[\d.e-]+)", words)
        assert names, step
        for name in names:
            parameter = model.get_parameter(name)
            if row:
                parameter[int(row[1])] = float(value[1])  # type: ignore[index]
            elif value:
                parameter.fill_(float(value[1]))
            else:
                parameter.normal_(float(mean[1]) if mean else 0.0, float(std[1]) if std else 0.02)


def uncut(finding: Finding) -> str:
    """Return the fix with all names, where the sentence counts the rest."""
    names = finding.evidence["parameters"]
    return re.sub(r"(\S+, ){2}\S+ and \d+ more", ", ".join(names), finding.fix)


def broken(kind: str) -> nn.Module:
    model: nn.Module = build(layers=4, mlp=Experts if "router" in kind else None)
    gates = [f"layers.{layer}.mlp.gate.weight" for layer in range(4)]
    match kind:
        case "gain of one layer":
            fill(model, nn.init.zeros_, "layers.2.norm2.weight")
        case "all gains":
            fill(
                model,
                nn.init.uniform_,
                *(name for name, _ in model.named_parameters() if "norm" in name),
            )
        case "drawn biases":
            fill(model, lambda bias: nn.init.normal_(bias, 0.0, 0.02), *biases_of(model))
        case "one drawn scale":
            fill(
                model,
                lambda scale: nn.init.normal_(scale, 0.5, 0.02),
                *(f"layers.{k}.scale" for k in range(4)),
            )
            fill(model, nn.init.zeros_, "layers.1.scale")
        case "scale norm":
            model = with_length_norms(1.0, "normalize")
        case "padding":
            model = padded()
            with torch.no_grad():
                model.embedding.weight[0].normal_(0.0, 0.02)  # type: ignore[union-attr, index, operator]
        case "router at its default":
            fill(model, lambda w: nn.init.kaiming_uniform_(w, a=math.sqrt(5)), *gates)
        case "router of zero":
            fill(model, nn.init.zeros_, *gates)
        case "copied layer":
            model.layers[2].load_state_dict(model.layers[1].state_dict())  # type: ignore[operator, union-attr, index]
        case "one seed":
            restart(model, lambda name: 0.02)
        case "one number":
            matrices = [
                f"layers.{layer}.mlp.{place}.weight" for layer in range(4) for place in (0, 2)
            ]
            fill(model, lambda w: nn.init.constant_(w, 0.1), *matrices)
        case "leftover gain":
            fill(
                model,
                integers,
                "layers.2.norm2.weight",
                "layers.2.proj.weight",
                "norm.weight",
                "layers.1.proj.bias",
            )
    return model


@pytest.mark.parametrize(
    "kind",
    [
        "gain of one layer",
        "all gains",
        "drawn biases",
        "one drawn scale",
        "scale norm",
        "padding",
        "router at its default",
        "router of zero",
        "copied layer",
        "one seed",
        "one number",
        "leftover gain",
    ],
)
def test_a_fix_that_is_followed_makes_the_finding_go_away(kind: str) -> None:
    model = broken(kind)
    found = judge(model)
    assert found and all(finding.fix for finding in found)
    torch.manual_seed(99)
    for finding in found:
        follow(uncut(finding), model)
    assert not judge(model)
