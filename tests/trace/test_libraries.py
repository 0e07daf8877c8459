"""Other people's libraries: the sub-layers that their options promise, replayed to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import jacdiag
from jacdiag.measure.replay_check import verify_replay
from jacdiag.trace import Sites, declare

IDS = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(0))
Rows = list[tuple[str, str]]


def checked(model: nn.Module, *args: Any, **kwargs: Any) -> Sites:
    """Traces in float64 and checks replay, the whole-model J^T w, the adjoint and the coverage of
    every sub-layer.
    """
    found = jacdiag.sites(model, *args, dtype=torch.float64, **kwargs)
    assert found.deterministic and not found.coverage.uncovered and not found.notes
    assert max(verify_replay(found).values(), default=0) < 1e-9
    for site in found:
        assert torch.equal(site.branch(site.shortcut), site.value), site.name
        u, w = (
            torch.randn(t.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
            for k, t in enumerate((site.shortcut, site.value))
        )
        slope = (
            site.branch(site.shortcut + 1e-6 * u) - site.branch(site.shortcut - 1e-6 * u)
        ) / 2e-6
        with torch.enable_grad():
            x = site.shortcut.clone().requires_grad_()
            (pulled,) = torch.autograd.grad(site.branch(x), x, w)
        error = abs(float((slope * w).sum() - (u * pulled).sum()))
        assert error <= 1e-5 * float(slope.norm() * w.norm() + u.norm() * pulled.norm()), site.name
    return found


def rows(found: Sites) -> Rows:
    return [(site.kind, site.placement) for site in found]


# -- torch.nn --------------------------------------------------------------------------------------
@pytest.mark.parametrize("first", [True, False], ids=["norm first", "norm last"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer_layers_of_torch(first: bool, batch_first: bool) -> None:
    """In eval mode and without gradient torch takes one fused call for the whole layer, which would
    hide both sums.
    """
    torch.manual_seed(0)
    options: dict[str, Any] = {"norm_first": first, "batch_first": batch_first, "dropout": 0.3}
    place = "pre" if first else "post"
    layer = nn.TransformerEncoderLayer(8, 2, 16, **options)
    x, memory = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    for model in (layer, layer.eval()):
        found = checked(model, x)
        assert rows(found) == [("attention", place), ("mlp", place)]
        assert {site.depth for site in found} == {0}
    stack = nn.TransformerEncoder(
        layer, 3, norm=nn.LayerNorm(8) if first else None, enable_nested_tensor=False
    )
    assert rows(checked(stack.eval(), x)) == [("attention", place), ("mlp", place)] * 3
    triple = [("attention", place), ("attention", place), ("mlp", place)]
    decoder = nn.TransformerDecoderLayer(8, 2, 16, **options).eval()
    assert rows(checked(decoder, x, memory)) == triple
    assert rows(checked(nn.TransformerDecoder(decoder, 2), x, memory)) == triple * 2
    both = nn.Transformer(8, 2, 1, 1, 16, **options).eval()
    assert sorted(rows(checked(both, x, memory))) == sorted(
        [("attention", place), ("mlp", place), *triple]
    )


def test_padding_masks_and_nested_tensors_of_torch() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=False, batch_first=True)
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    found = checked(stack, torch.randn(2, 5, 8), src_key_padding_mask=mask)
    assert rows(found) == [("attention", "post"), ("mlp", "post")] * 2


# -- x-transformers --------------------------------------------------------------------------------
A, M = "attention", "mlp"


def decoder_of_x(**options: Any) -> nn.Module:
    x_transformers = pytest.importorskip("x_transformers")
    torch.manual_seed(0)
    layers = x_transformers.Decoder(dim=16, depth=2, heads=2, attn_dim_head=8, **options)
    return x_transformers.TransformerWrapper(
        num_tokens=32, max_seq_len=16, attn_layers=layers
    ).eval()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, [(A, "pre"), (M, "pre")] * 2),
        ({"pre_norm": False}, [(A, "post"), (M, "post")] * 2),
        ({"sandwich_norm": True}, [(A, "sandwich"), (M, "sandwich")] * 2),
        (
            {"use_rmsnorm": True, "rotary_pos_emb": True, "ff_glu": True, "ff_swish": True},
            [(A, "pre"), (M, "pre")] * 2,
        ),
        ({"scale_residual": True}, [(A, "pre"), (M, "pre")] * 2),
        ({"use_layerscale": True}, [(A, "pre"), (M, "pre")] * 2),
        ({"macaron": True}, [(M, "pre"), (A, "pre"), (M, "pre")] * 2),
        ({"sandwich_coef": 1}, [(A, "pre")] * 2 + [(M, "pre")] * 2),
        ({"num_residual_streams": 2}, [(A, "none"), (M, "none")] * 2),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_decoders_of_x_transformers(options: dict[str, Any], wanted: Rows) -> None:
    found = checked(decoder_of_x(**options), IDS)
    assert rows(found) == wanted and not found.hidden


def test_cross_attention_of_x_transformers() -> None:
    model = decoder_of_x(cross_attend=True)
    assert (
        rows(checked(model, IDS, context=torch.randn(2, 5, 16)))
        == [(A, "pre"), (A, "pre"), (M, "pre")] * 2
    )


def test_encoder_and_decoder_of_x_transformers() -> None:
    x_transformers = pytest.importorskip("x_transformers")
    torch.manual_seed(0)
    options = {
        f"{side}_{key}": value
        for side in ("enc", "dec")
        for key, value in {"num_tokens": 32, "depth": 1, "heads": 2, "max_seq_len": 16}.items()
    }
    model = x_transformers.XTransformer(dim=16, **options).eval()
    assert rows(checked(model, IDS, IDS)) == [
        (A, "pre"),
        (M, "pre"),
        (A, "pre"),
        (A, "pre"),
        (M, "pre"),
    ]


def test_a_gated_residual_of_x_transformers_is_no_sum_and_is_said_to_hide_one() -> None:
    """A GRU cell takes the place of the addition: named, with the way to declare the branch."""
    model = decoder_of_x(gate_residual=True)
    found = jacdiag.sites(model, IDS)
    assert len(found) == 0 and len(found.hidden) == 4
    assert all(line.startswith("gru_cell gates at") for line in found.hidden)
    assert (
        'shortcut = "attn_layers.layers.0.0.0", branch = "attn_layers.layers.0.1"'
        in found.hidden[0]
    )
    declared = [declare(shortcut="attn_layers.layers.*.0.0", branch="attn_layers.layers.*.1")]
    again = jacdiag.sites(model, IDS, declared=declared, dtype=torch.float64)
    assert rows(again) == [(A, "pre"), (M, "pre")] * 2
    assert all(".gru." in name for name in again.coverage.uncovered)
    assert max(verify_replay(again).values()) < 1e-9


# -- litgpt ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name", ["pythia-14m", "Llama-3.2-1B", "Gemma-2-2b", "phi-2", "OLMo-2-1124-7B"]
)
def test_litgpt_models_have_the_expected_sublayers(name: str) -> None:
    litgpt = pytest.importorskip(
        "litgpt", reason="it pins a huggingface-hub older than transformers needs"
    )
    torch.manual_seed(0)
    config = litgpt.Config.from_name(
        name,
        n_layer=2,
        n_embd=16,
        n_head=2,
        n_query_groups=1,
        head_size=8,
        intermediate_size=24,
        padded_vocab_size=32,
        block_size=16,
    )
    found = checked(litgpt.GPT(config).eval(), IDS)
    place = {"Gemma-2-2b": "sandwich", "OLMo-2-1124-7B": "reordered"}.get(name, "pre")
    assert rows(found) == [(A, place), (M, place)] * 2
    assert {site.parallel for site in found} == {name in ("pythia-14m", "phi-2")}


# -- peft ------------------------------------------------------------------------------------------
def test_adapters_of_peft_on_a_model_of_transformers() -> None:
    import transformers as hf

    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
    config = hf.LlamaConfig(
        **sizes,
        intermediate_size=24,
        num_key_value_heads=1,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
    )
    base = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    lora = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False
    )
    model = peft.get_peft_model(base, lora)
    model.base_model.model.gradient_checkpointing_enable()
    found = jacdiag.sites(model, input_ids=IDS)
    assert rows(found) == [(A, "pre"), (M, "pre")] * 2
    assert not any(site.nested for site in found) and not found.coverage.uncovered
    assert sum("lora_A" in name for name in found[0].parameters) == 2
    assert max(verify_replay(found).values()) < 1e-4
