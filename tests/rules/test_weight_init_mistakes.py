"""Mistakes of a draw that no other weight of the model shows, and correct inits that look like
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacdiag
from benchmarks.initbench.catalogue import features, images, token_pairs, tokens
from benchmarks.initbench.decoders import GPT, Llama
from benchmarks.initbench.draws import (
    constant,
    draw,
    fan_in_normal,
    linear_default,
    normal,
    ones,
    truncated,
    xavier_normal,
    xavier_uniform,
    zeros,
)
from benchmarks.initbench.encoders import T5, ViT
from benchmarks.initbench.others import ResidualMLP
from jacdiag.measure.init_distribution import draw_of, find_outliers
from jacdiag.records import Finding, Report, WeightRecord
from jacdiag.records.init_contract import ContractRecord
from jacdiag.rules.init.never_drawn import find_no_draws
from jacdiag.sources import gpt

WIDTH = 64
DOWN = "layers.*.mlp.down_proj.weight"


def audit(model: nn.Module, inputs: Any = None) -> Report:
    inputs = tokens() if inputs is None else inputs
    return jacdiag.audit(
        model, inputs, products=False, state="init", select=["JD20"], remedies="none"
    )


def warnings_of(report: Report) -> list[Finding]:
    return [f for f in report.findings if f.code.startswith("JD2") and f.level != "info"]


def patterns(report: Report) -> set[str]:
    return {finding.evidence["pattern"] for finding in warnings_of(report)}


def note_of(report: Report) -> str:
    return next(rule.note for rule in report.rules if rule.code == "JD204")


def llama(*rules: tuple[str, Callable[[Tensor], object]], **options: Any) -> Llama:
    torch.manual_seed(0)
    model = Llama(layers=4, width=WIDTH, **options)
    draw(model, ("norm", ones), *rules)
    return model


def mlp(fill: Callable[[Tensor], object], **options: Any) -> ResidualMLP:
    torch.manual_seed(0)
    model = ResidualMLP(layers=4, **options)
    draw(model, (r"\.w[12]$", fill))
    return model


def record(shape: list[int], **figures: Any) -> WeightRecord:
    return WeightRecord(
        "w", shape, "W_1", "w", fan_in=shape[1], fan_out=shape[0], kind="mlp", **figures
    )


def no_draws(weight: WeightRecord) -> list[str]:
    return [one.sign for one in find_no_draws(ContractRecord("", {"d": 64}, [weight]))]


# -- one value -------------------------------------------------------------------------------------
def test_a_matrix_of_one_value_is_named() -> None:
    [finding] = warnings_of(audit(llama(("down_proj", constant(0.1)), ("weight", normal(0.02)))))
    assert finding.code == "JD204" and finding.evidence["pattern"] == DOWN
    assert "every number is 0.100, so that its units stay equal" in finding.what
    assert "(4 of 4)" in finding.what


def test_constant_matrix_in_a_published_family_is_named() -> None:
    rules = (("down_proj", constant(0.1)), ("weight", normal(0.02)))
    report = audit(llama(*rules, model_type="llama"))
    assert patterns(report) == {DOWN}
    assert {finding.code for finding in warnings_of(report)} == {"JD204"}


def test_zeros_and_a_single_column_are_no_such_matrix() -> None:
    assert not warnings_of(audit(llama(("down_proj|o_proj", zeros), ("weight", normal(0.02)))))
    assert not no_draws(record([64, 1], family="constant", mean=0.1))
    assert no_draws(record([64, 2], family="constant", mean=0.1))


# -- outliers --------------------------------------------------------------------------------------
def drawn(shape: tuple[int, int] = (64, 64), std: float = 0.02) -> Tensor:
    return std * torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_numbers_far_outside_are_counted() -> None:
    weight = drawn()
    weight.view(-1)[[5, 900]] = -2.0
    found = draw_of(weight)
    assert found is not None and found.outliers == 2
    assert found.core_std == pytest.approx(0.02, rel=0.05)


def test_the_limit_of_an_outlier() -> None:
    for spreads, count in ((18.0, 0), (22.0, 1)):
        weight = drawn((256, 256), 1.0)
        weight[3, 7] = spreads
        assert find_outliers(weight, spreads)[0] == count


def test_heavy_tails_mixtures_and_identities_have_no_outliers() -> None:
    laplace = torch.distributions.Laplace(0.0, 0.02)
    torch.manual_seed(0)
    heavy = laplace.sample((1000, 1000))
    identity = drawn((256, 256), 0.001) + torch.eye(256)
    mixture = drawn((256, 64))
    mixture[:4] = 50 * mixture[:4]
    sparse = torch.zeros(64, 64)
    sparse[0] = 1.0
    for weight in (heavy, identity, mixture, sparse, drawn()):
        assert find_outliers(weight, float(weight.abs().max())) == (0, None)


def test_the_sentence_says_how_far() -> None:
    model = llama(("weight", normal(0.02)))
    with torch.no_grad():
        model.layers[2].mlp.down_proj.weight[3, 5] = -2.0
    [finding] = warnings_of(audit(model))
    assert finding.evidence["parameters"] == ["layers.2.mlp.down_proj.weight"]
    assert (
        "1 number lies far outside the draw, up to 2.00 where the rest has std 0.0" in finding.what
    )


# -- std 1 and more --------------------------------------------------------------------------------
def test_matrices_larger_than_one() -> None:
    too_large = mlp(lambda weight: nn.init.normal_(weight, 0.0, math.sqrt(weight.shape[0])))
    found = warnings_of(audit(too_large, features()))
    assert {finding.evidence["pattern"] for finding in found} == {"blocks.*.w1", "blocks.*.w2"}
    assert "larger than any published init draws a matrix of 64 inputs" in found[0].what


def test_std_one_in_every_matrix_is_a_parametrisation_of_its_own() -> None:
    assert not warnings_of(audit(mlp(normal(1.0)), features()))
    figures = {"family": "normal", "std": 1.4, "lower": 1.3, "upper": 1.5}
    assert no_draws(record([64, 16], **figures))
    assert not no_draws(record([64, 8], **figures))  # Xavier with a gain has that std
    assert not no_draws(record([64, 16], **(figures | {"lower": 0.99})))


def test_the_default_of_normal_in_some_matrices_is_named_and_said() -> None:
    rules = (("mlp", normal(1.0)), ("weight", normal(0.02)))
    found = warnings_of(audit(llama(*rules)))
    assert {f.evidence["role"] for f in found} == {"W_1", "W_gate", "W_2"}
    assert all(f.what.endswith("the default std of torch.nn.init.normal_ is 1") for f in found)


def vit(positions: float, feed_forward: float) -> nn.Module:
    torch.manual_seed(0)
    model = ViT(layers=4)
    draw(model, ("bias", zeros), ("norm", ones), ("pos_embed", normal(positions)))
    draw(model, (r"fc\d\.weight", normal(feed_forward)))
    draw(model, (r"(qkv|proj|head|patch_embed)\.weight", normal(0.02)))
    return model


@pytest.mark.parametrize(
    ("positions", "feed_forward", "count"), [(1.0, 0.02, 0), (1.0, 1.0, 3), (0.02, 1.0, 2)]
)
def test_unit_positions_are_named_only_with_another_mistake(
    positions: float, feed_forward: float, count: int
) -> None:
    assert len(patterns(audit(vit(positions, feed_forward), images(16)()))) == count


@pytest.mark.parametrize(("embedding", "is_named"), [(1.0, False), (0.02, True)])
def test_default_positions_are_named_unless_the_embedding_has_the_default_too(
    embedding: float, is_named: bool
) -> None:
    torch.manual_seed(0)
    sizes = {"n_layer": 4, "n_embd": WIDTH, "n_head": 4, "vocab_size": 256, "block_size": 64}
    model = gpt.build("gpt2", **sizes)
    draw(model, ("wte", normal(embedding)), ("wpe", normal(1.0)))
    # The head is tied to the embedding, which JD206 judges.
    report = audit(model, torch.arange(64).reshape(2, 32))
    names = [f.evidence["pattern"] for f in warnings_of(report) if f.code == "JD204"]
    assert names == ["transformer.wpe.weight"] * is_named


# -- the head --------------------------------------------------------------------------------------
def t5(head: float, **options: Any) -> T5:
    torch.manual_seed(0)
    model = T5(gated=True, tied=False, **options)
    draw(
        model,
        ("norm", ones),
        (r"\.q\.", normal((64 * 24) ** -0.5)),
        (r"\.o\.", normal((4 * 24) ** -0.5)),
        (r"\.wo", normal(160**-0.5)),
        ("shared", normal(1.0)),
        ("lm_head", normal(head)),
        ("weight", normal(64**-0.5)),
    )
    return model


def test_a_head_of_unit_spread_is_named_where_its_logits_are_large() -> None:
    found = warnings_of(audit(llama(("lm_head", normal(1.0)), ("weight", normal(0.02)))))
    assert [f.evidence["parameters"] for f in found] == [["lm_head.weight"]]
    assert "logits of std" in found[0].what and "ln V + " not in found[0].what


def test_a_head_that_the_family_publishes_or_the_forward_scales_is_not() -> None:
    assert not warnings_of(audit(t5(1.0, model_type="t5"), token_pairs()))
    scaled = llama(("lm_head", normal(1.0)), ("weight", normal(0.02)))
    scaled.norm.weight.data.fill_(0.05)  # logits of std 0.4
    assert not any("logits" in f.what for f in warnings_of(audit(scaled)))


def test_t5_without_a_config_is_known_by_the_width_of_its_heads() -> None:
    report = audit(t5(64**-0.5, model_type=None), token_pairs())
    assert not warnings_of(report) and note_of(report).startswith("follows T5")
    assert report.contract is not None and report.contract.sizes["d_head"] == 24
    assert patterns(audit(t5(1.0, model_type=None), token_pairs())) == {"lm_head.weight"}


def test_a_head_that_alone_keeps_the_default_of_linear() -> None:
    [finding] = warnings_of(audit(llama(("lm_head", linear_default), ("weight", truncated(0.02)))))
    assert finding.evidence["parameters"] == ["lm_head.weight"]
    assert finding.what.endswith("PyTorch's default for nn.Linear")
    # A normal draw of that std was written by somebody; and where other matrices keep the default,
    # it is the init.
    alike = normal(1 / math.sqrt(3 * WIDTH))
    for rules in (
        (("lm_head", alike), ("weight", normal(0.02))),
        (("lm_head|_proj", linear_default), ("weight", normal(0.02))),
        (("lm_head|o_proj", linear_default), ("weight", xavier_uniform())),
    ):
        assert not any("for nn.Linear" in f.what for f in warnings_of(audit(llama(*rules))))


# -- one mistake in the entire model ---------------------------------------------------------------


def by_outputs(name: str) -> Callable[[Tensor], object]:
    if name == "PyTorch":
        return lambda weight: linear_default(weight.mT)
    gain = math.sqrt(2) if name == "He" else 1.0
    return lambda weight: nn.init.normal_(weight, 0.0, gain / math.sqrt(weight.shape[0]))


@pytest.mark.parametrize("name", ["LeCun", "He", "PyTorch"])
def test_fans_exchanged_in_every_matrix(name: str) -> None:
    found = warnings_of(audit(mlp(by_outputs(name)), features()))
    assert {f.evidence["pattern"] for f in found} == {"blocks.*.w1", "blocks.*.w2"}
    assert all(f.what.endswith("fan_in and fan_out confused") for f in found)
    assert all("the formula of literature expects" in f.what for f in found)


def test_right_fans_square_matrices_and_one_value_are_not_blamed() -> None:
    def variance(weight: Tensor) -> object:
        return nn.init.normal_(weight, 0.0, 2 / sum(weight.shape))

    assert not warnings_of(audit(mlp(fan_in_normal()), features()))
    assert not warnings_of(audit(mlp(by_outputs("LeCun"), hidden=64), features()))
    # Xavier's variance is one value in all layers: any std may be meant.
    assert not warnings_of(audit(mlp(variance), features()))


def test_a_variance_in_place_of_the_std_shows_in_two_values() -> None:
    found = warnings_of(audit(mlp(lambda w: nn.init.normal_(w, 0.0, 1 / w.shape[1])), features()))
    assert {f.evidence["pattern"] for f in found} == {"blocks.*.w1", "blocks.*.w2"}
    assert all(f.what.endswith("std and variance confused") for f in found)


# -- one formula for each role ---------------------------------------------------------------------
def test_queries_keys_and_values_by_the_width_of_a_head() -> None:
    found = warnings_of(
        audit(llama((r"[qkv]_proj", normal(16**-0.5)), ("weight", fan_in_normal())))
    )
    assert {f.evidence["role"] for f in found} == {"W_Q", "W_K", "W_V"}
    assert all("by the width of a head" in f.what for f in found)


def test_outputs_of_another_init_in_a_model_of_xavier() -> None:
    torch.manual_seed(0)
    model = GPT(layers=4, tied=False, bias=False)
    outputs = normal(0.02 / math.sqrt(8))
    draw(model, ("ln_", ones), (r"c_proj", outputs), ("weight", xavier_normal()))
    assert patterns(audit(model)) == {"h.*.attn.c_proj.weight", "h.*.mlp.c_proj.weight"}


def test_fairseq_attention_next_to_default_linear_is_a_known_init() -> None:
    for gain in (1.0, 1 / math.sqrt(2)):
        model = llama(
            (r"[qkv]_proj", xavier_uniform(gain)),
            ("o_proj", xavier_uniform()),
            ("embed_tokens", normal(WIDTH**-0.5)),
            ("weight", linear_default),
        )
        report = audit(model)
        assert not warnings_of(report) and note_of(report).startswith("follows PyTorch")


@pytest.mark.parametrize("name", ["q_proj", "v_proj"])
def test_one_projection_alone_by_another_variant_is_a_mistake(name: str) -> None:
    """Each of these inits exists, but no attention draws one projection by one of them and the rest
    by another.
    """
    for gain in (1.0, 1 / math.sqrt(2)):
        model = llama(
            (name, xavier_uniform(gain)), ("embed_tokens", normal(1.0)), ("weight", linear_default)
        )
        found = warnings_of(audit(model))
        assert {f.evidence["pattern"] for f in found} == {f"layers.*.self_attn.{name}.weight"}
        assert all(f.code == "JD204" for f in found)


def test_one_section_of_a_fused_attention_by_another_variant_is_a_mistake() -> None:
    def build(gain: float) -> nn.Module:
        torch.manual_seed(0)
        model = GPT(layers=4, tied=False, bias=False)
        draw(model, ("ln_", ones), ("wte", normal(1.0)), ("weight", linear_default))
        with torch.no_grad():
            for block in model.h:
                block.attn.c_attn.weight[2 * WIDTH :] *= gain
        return model

    assert not warnings_of(audit(build(1.0)))
    # 1/sqrt(3d) by the root of 3/2 is fairseq's 1/sqrt(2d).
    (finding,) = warnings_of(audit(build(math.sqrt(1.5))))
    assert finding.code == "JD204" and finding.evidence["parameters"] == [
        f"h.{k}.attn.c_attn.weight" for k in range(4)
    ]


def test_an_orthogonal_scheme_wants_orthogonal_draws() -> None:
    def orthogonal(weight: Tensor) -> object:
        return nn.init.orthogonal_(weight)

    def as_large(weight: Tensor) -> object:
        return nn.init.normal_(weight, 0.0, 1 / math.sqrt(max(weight.shape)))

    rest = (("down_proj|o_proj", zeros), ("embed_tokens|lm_head", normal(0.02)))
    report = audit(llama(*rest, ("weight", orthogonal)))
    assert not warnings_of(report) and note_of(report).startswith("follows orthogonal")
    assert not note_of(audit(llama(*rest, ("weight", as_large)))).startswith("follows orthogonal")


def test_a_scaling_by_the_layer_that_the_feed_forward_misses() -> None:
    model = llama(("embed_tokens", normal(1.0)), ("weight", xavier_uniform()))
    for index, layer in enumerate(model.layers):
        draw(layer, ("self_attn", xavier_uniform((index + 1) ** -0.5)))
    found = warnings_of(audit(model))
    assert {f.code for f in found} <= {"JD203", "JD205"}
    assert {f.evidence["role"] for f in found} == {"W_1", "W_gate", "W_2"}
    for index, layer in enumerate(model.layers):
        draw(layer, ("mlp", xavier_uniform((index + 1) ** -0.5)))
    assert not warnings_of(audit(model))
