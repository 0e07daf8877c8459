"""Bugs of the draw: a wrong spread, a wrong matrix, a lost or doubled scaling with depth."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from benchmarks.initbench.catalogue import bug, features, images, token_pairs
from benchmarks.initbench.decoders import GPT, GroupedExperts, Llama, MixtureOfExperts
from benchmarks.initbench.draws import (
    constant,
    draw,
    fan_in_normal,
    linear_default,
    normal,
    ones,
    truncated,
    uniform,
    xavier_normal,
    xavier_uniform,
    zeros,
)
from benchmarks.initbench.encoders import T5, PostNormDecoder, ViT
from benchmarks.initbench.others import ResidualMLP

LAYERS = 4
DEPTH = math.sqrt(2 * LAYERS)


def gpt_rest(model: nn.Module) -> None:
    """Set the gains of a GPT to one and its biases to zero."""
    draw(model, ("bias", zeros), ("ln_", ones))


# -- depth ----------
@bug("lost depth scaling", blames=(r"c_proj\.weight",))
def gpt2_depth_scaling_never_applied(fixed: bool) -> nn.Module:
    """A full name is compared with the last part of a name, so the scaled draw never happens."""
    model = GPT(layers=LAYERS, model_type="gpt2")
    gpt_rest(model)
    draw(model, (r"(wte|wpe|c_attn|c_fc|c_proj)\.weight", normal(0.02)))
    for name, parameter in model.named_parameters():
        is_residual = name.endswith("c_proj.weight") if fixed else name == "c_proj.weight"
        if is_residual:
            nn.init.normal_(parameter, 0.0, 0.02 / DEPTH)
    return model


@bug("wrong matrix scaled", blames=(r"down_proj", r"up_proj"))
def llama2c_scales_the_wrong_matrix(fixed: bool) -> nn.Module:
    """The up-projection is scaled with depth in place of the projection back into the stream."""
    model = Llama(layers=LAYERS, tied=True)
    scaled = "down_proj" if fixed else "up_proj"
    draw(
        model, ("norm", ones), (f"o_proj|{scaled}", normal(0.02 / DEPTH)), ("weight", normal(0.02))
    )
    return model


@bug("lost depth scaling", blames=(r"o_proj",), or_blames=(r"down_proj",))
def tinyllama_scales_the_feed_forward_only(fixed: bool) -> nn.Module:
    """The output of attention keeps the spread of the other matrices."""
    width = 64
    model = Llama(layers=LAYERS, width=width)
    scaled = "o_proj|down_proj" if fixed else "down_proj"
    draw(
        model,
        ("norm", ones),
        (scaled, normal(1 / math.sqrt(width) / LAYERS)),
        ("weight", normal(math.sqrt(2 / (5 * width)))),
    )
    return model


@bug(
    "doubled depth scaling", blames=(r"mlp\.c_proj\.weight",), or_blames=(r"attn\.c_proj\.weight",)
)
def olmo_feed_forward_scaled_once_more(fixed: bool) -> nn.Module:
    """The plain init divides one output projection by sqrt(2N), left over from another init."""
    model = GPT(layers=LAYERS, tied=False, bias=False)
    factor = 1.0 if fixed else 1 / DEPTH
    draw(model, ("ln_", ones), (r"mlp\.c_proj", normal(0.02 * factor)), ("weight", normal(0.02)))
    return model


@bug("wrong init of the outputs", blames=(r"c_proj\.weight",))
def megatron_xavier_misses_the_outputs(fixed: bool) -> nn.Module:
    """Xavier is chosen, but the option for the output layers is set under a name that nobody
    reads.
    """
    model = GPT(layers=LAYERS, tied=False)
    gpt_rest(model)
    outputs = xavier_uniform() if fixed else normal(0.02 / DEPTH)
    draw(
        model,
        (r"c_proj\.weight", outputs),
        (r"(c_attn|c_fc|wte|wpe|lm_head)\.weight", xavier_uniform()),
    )
    return model


@bug("wrong fan", blames=(r"down_proj",))
def ttmetal_down_projection_by_the_width(fixed: bool) -> nn.Module:
    """The down-projection is scaled by the width of the stream, not by the wider one that it
    reads.
    """
    width, hidden = 64, 176
    model = Llama(layers=LAYERS, width=width, hidden=hidden)
    fan = hidden if fixed else width
    draw(
        model,
        ("norm", ones),
        ("o_proj", normal(1 / math.sqrt(width * LAYERS))),
        ("down_proj", normal(1 / math.sqrt(fan * LAYERS))),
        ("weight", fan_in_normal()),
    )
    return model


# -- head and embedding ----------
@bug("head left at its default", blames=(r"lm_head",))
def neox_head_never_gets_its_init(fixed: bool) -> nn.Module:
    """The init of the last layer is configured and not passed on: the head keeps Xavier."""
    width, vocabulary = 64, 512
    model = GPT(layers=LAYERS, width=width, vocabulary=vocabulary, tied=False)
    gpt_rest(model)
    small = normal(math.sqrt(2 / (5 * width)))
    draw(
        model,
        (r"c_proj\.weight", normal(2 / (LAYERS * math.sqrt(width)))),
        (r"lm_head", small if fixed else xavier_normal()),
        (r"(c_attn|c_fc|wte|wpe)\.weight", small),
    )
    return model


@bug("head left at its default", blames=(r"^head\.weight",), allows=(r"^head",), probe=images(16))
def lightning_ir_projection_left_at_default(fixed: bool) -> nn.Module:
    """A projection added to an encoder is not known to the encoder's own init."""
    model = ViT(layers=LAYERS)
    draw(
        model,
        ("bias", zeros),
        ("norm", ones),
        ("cls_token|pos_embed", truncated(0.02)),
        ("^head", linear_default),
    )
    draw(model, (r"(patch_embed|qkv|proj|fc1|fc2)\.weight", truncated(0.02)))
    if fixed:
        draw(model, (r"^head\.weight", truncated(0.02)))
    else:
        nn.init.uniform_(model.head.bias, -1 / math.sqrt(64), 1 / math.sqrt(64))
    return model


@bug("embedding std 1 with a tied head", blames=(r"wte",))
def tied_head_on_a_default_embedding(fixed: bool) -> nn.Module:
    """The head is tied to an embedding that keeps N(0, 1): the first loss is 107 in place of
    4.4.
    """
    model = GPT(layers=LAYERS)
    gpt_rest(model)
    draw(model, (r"(wpe|c_attn|c_fc|c_proj)\.weight", normal(0.02)))
    draw(model, ("wte", normal(0.02 if fixed else 1.0)))
    return model


@bug("head of unit spread", blames=(r"lm_head",), probe=token_pairs)
def t5_untied_head_of_unit_spread(fixed: bool) -> nn.Module:
    """The untied head of T5 is N(0, 1), so logits have the variance of the width and the first loss
    is 110.
    """
    model = T5(gated=True, tied=False, model_type=None)
    t5_weights(model)
    draw(model, ("lm_head", normal(64**-0.5 if fixed else 1.0)))
    return model


@bug("wrong spread of the embedding", blames=(r"embed_tokens",))
def lns_embedding_left_from_an_ablation(fixed: bool) -> nn.Module:
    """The embedding is about 0.6, left from an ablation, in a model of 0.02."""
    model = Llama(layers=LAYERS)
    embedding = 0.02 if fixed else math.sqrt(2 / 5)
    draw(model, ("norm", ones), ("embed_tokens", normal(embedding)), ("weight", normal(0.02)))
    return model


@bug("constant in place of a draw", blames=(r"wte",))
def gotch_normal_of_mean_zero_is_constant(fixed: bool) -> nn.Module:
    """The normal draw with mean zero fills the tensor with its standard deviation."""
    model = GPT(layers=LAYERS, tied=True)
    gpt_rest(model)
    draw(model, (r"(wpe|c_attn|c_fc|c_proj)\.weight", normal(0.02)))
    draw(model, ("wte", normal(0.02) if fixed else constant(0.02)))
    return model


@bug("factor read as a spread", blames=(r"pos_embed", r"mlp\.fc\d\.weight"), probe=images(16))
def xclip_factor_read_as_a_spread(fixed: bool) -> nn.Module:
    """The factor of the init, 1, is passed as a standard deviation: positions and linear layers are
    N(0, 1).
    """
    model = ViT(layers=LAYERS)
    factor = 1.0
    std = 0.02 * factor if fixed else factor
    draw(model, ("bias", zeros), ("norm", ones), ("cls_token|patch_embed|qkv|proj", normal(0.02)))
    draw(model, (r"pos_embed|fc\d\.weight|head\.weight", normal(std)))
    draw(model, (r"head\.weight", normal(0.02)))
    return model


# -- fans ----------
@bug("wrong fan", blames=(r"[qkv]_proj",))
def einygpt_projections_by_the_head(fixed: bool) -> nn.Module:
    """Queries, keys and values are scaled by the width of a head in place of the width of the
    model.
    """
    width, heads = 64, 4
    model = Llama(layers=LAYERS, width=width, heads=heads)
    fan = width if fixed else width // heads
    draw(model, ("norm", ones), (r"[qkv]_proj", normal(fan**-0.5)), ("weight", fan_in_normal()))
    return model


@bug(
    "wrong fan",
    blames=(r"attention\.q", r"attention\.o", r"cross\.q", r"cross\.o"),
    probe=token_pairs,
)
def pix2struct_reads_the_width_for_the_head(fixed: bool) -> nn.Module:
    """The width of the model stands in for the width of a key in the spread of queries and
    outputs.
    """
    model = T5(gated=True, tied=False, model_type=None)
    t5_weights(model, key_width=24 if fixed else 64)
    draw(model, ("lm_head", normal(64**-0.5)))
    return model


def t5_weights(model: nn.Module, key_width: int = 24) -> None:
    """Draw a T5-like model as Mesh TensorFlow does; the embedding is N(0, 1)."""
    width, heads, hidden = 64, 4, 160
    draw(
        model,
        ("norm", ones),
        (r"(attention|cross)\.q\.", normal((width * key_width) ** -0.5)),
        (r"(attention|cross)\.[kv]\.", normal(width**-0.5)),
        (r"(attention|cross)\.o\.", normal((heads * key_width) ** -0.5)),
        (r"\.wi", normal(width**-0.5)),
        (r"\.wo", normal(hidden**-0.5)),
        ("shared", normal(1.0)),
    )


@bug("wrong fan", blames=(r"blocks\.\d+\.w[12]",), probe=features)
def nielsen_spread_by_the_outputs(fixed: bool) -> nn.Module:
    """The spread of a layer is one over the root of its outputs, not of its inputs."""
    model = ResidualMLP(layers=LAYERS)

    def fill(weight: Tensor) -> object:
        return nn.init.normal_(weight, 0.0, 1 / math.sqrt(weight.shape[1 if fixed else 0]))

    draw(model, (r"\.w[12]$", fill))
    return model


@bug("transposed layout", blames=(r"blocks\.\d+\.w[12]",), probe=features)
def lasagne_fan_of_a_transposed_layer(fixed: bool) -> nn.Module:
    """He's init takes the second dimension for the inputs; a transposed layer is stored as (in,
    out).
    """
    model = ResidualMLP(layers=LAYERS, transposed=True)

    def fill(weight: Tensor) -> object:
        return nn.init.kaiming_normal_(weight.mT if fixed else weight)

    draw(model, (r"\.w[12]$", fill))
    return model


@bug("std and variance confused", blames=(r"blocks\.\d+\.w[12]",), probe=features)
def mlpack_variance_for_spread(fixed: bool) -> nn.Module:
    """Glorot's variance is passed where the standard deviation is meant."""
    model = ResidualMLP(layers=LAYERS)

    def fill(weight: Tensor) -> object:
        variance = 2 / sum(weight.shape)
        return nn.init.normal_(weight, 0.0, math.sqrt(variance) if fixed else variance)

    draw(model, (r"\.w[12]$", fill))
    return model


@bug("lost factor in a fused matrix", blames=(r"in_proj",))
def xformers_deepnorm_misses_the_values(fixed: bool) -> nn.Module:
    """Queries, keys and values share one matrix, and the factor of the values is skipped."""
    beta = (8 * LAYERS) ** -0.25
    model = PostNormDecoder(layers=LAYERS, alpha=(2 * LAYERS) ** 0.25, fused=True)
    draw(model, ("out_proj|fc", xavier_normal(beta)))
    for layer in model.layers:
        query, key, value = layer.in_proj.weight.data.chunk(3)
        nn.init.xavier_normal_(query)
        nn.init.xavier_normal_(key)
        nn.init.xavier_normal_(value, gain=beta if fixed else 1.0)
    return model


# -- mixtures of experts ----------
def mixture(grouped: bool = False, router_bias: bool = False) -> Llama:
    """Return a mixture of experts of N(0, 0.02)."""
    build = GroupedExperts if grouped else (lambda: MixtureOfExperts(router_bias=router_bias))
    model = Llama(layers=LAYERS, feed_forward=build)
    draw(model, ("norm", ones), ("bias", zeros), ("weight", normal(0.02)))
    return model


@bug("router left at its default", blames=(r"gate\.weight",))
def glm_router_left_at_default(fixed: bool) -> nn.Module:
    """The router is a bare parameter, so the init of the model passes it by."""
    model = mixture()
    if not fixed:
        draw(model, (r"mlp\.gate\.weight", linear_default))
    return model


@bug("router never drawn", blames=(r"gate\.weight",))
def qwen3_omni_router_renamed(fixed: bool) -> nn.Module:
    """The init still looks for the old name of the router, which stays zero."""
    model = mixture()
    if not fixed:
        draw(model, (r"mlp\.gate\.weight", zeros))
    return model


@bug("experts left at their default", blames=(r"weight1", r"weight2"))
def paddlefleet_grouped_experts_at_default(fixed: bool) -> nn.Module:
    """Grouped experts are U(-0.001, 0.001) where the rest of the model is N(0, 0.02)."""
    model = mixture(grouped=True)
    if fixed:
        draw(model, ("weight1", normal(0.02)), ("weight2|o_proj", normal(0.02 / DEPTH)))
    else:
        draw(model, ("weight[12]", uniform(0.001)), ("o_proj", normal(0.02 / DEPTH)))
    return model


@bug("constant in place of a draw", blames=(r"experts",))
def paddlerec_experts_of_one_constant(fixed: bool) -> nn.Module:
    """Every element of every expert is 0.1, so that the columns stay equal for ever."""
    model = mixture()
    draw(model, (r"mlp\.experts", normal(0.1) if fixed else constant(0.1)))
    if fixed:
        draw(model, (r"mlp\.experts", normal(0.02)))
    return model


# -- truncation ----------
@bug("wrong cut of a truncated normal", blames=(r"layers\.2\.mlp\.down_proj",))
def torch_truncated_normal_outlier(fixed: bool) -> nn.Module:
    """Two elements of a truncated normal lie at the bound, a hundred standard deviations out."""
    model = Llama(layers=LAYERS)
    draw(model, ("norm", ones), ("weight", truncated(0.02, cut=100.0)))
    if not fixed:
        with torch.no_grad():
            model.layers[2].mlp.down_proj.weight.view(-1)[[101, 5003]] = -2.0
    return model


@bug(
    "wrong cut of a truncated normal", blames=(r"_proj|embed_tokens|lm_head",), allows=(r"layers",)
)
def torchtitan_truncated_normal_in_bfloat16(fixed: bool) -> nn.Module:
    """The inverse of the error function is taken in bfloat16: one element in 250 falls to the lower
    bound.
    """

    def fill(weight: Tensor) -> object:
        low = torch.empty(weight.shape, dtype=torch.float32 if fixed else torch.bfloat16)
        drawn = low.uniform_(-1, 1).erfinv_().mul_(0.02 * math.sqrt(2)).clamp_(-2, 2)
        with torch.no_grad():
            return weight.copy_(drawn)

    model = Llama(layers=LAYERS)
    draw(model, ("norm", ones), ("weight", fill))
    return model


# -- defaults where another init is meant ----------
@bug(
    "custom init never runs",
    blames=(r"(c_attn|c_fc|c_proj)\.weight",),
    allows=(r"bias", r"wte|wpe|lm_head"),
)
def deepspeed_init_of_empty_placeholders(fixed: bool) -> nn.Module:
    """The init of the model runs on placeholders, so every weight keeps the default of torch."""
    model = GPT(layers=LAYERS, model_type="gpt2")
    if fixed:
        gpt_rest(model)
        draw(
            model,
            (r"c_proj\.weight", normal(0.02 / DEPTH)),
            (r"(wte|wpe|c_attn|c_fc)\.weight", normal(0.02)),
        )
    return model


@bug("biases not zero", blames=(r"h\.\d+\.(attn|mlp)\.\w+\.bias", r"ln_\w+\.bias"))
def transformer_engine_biases_of_the_weights(fixed: bool) -> nn.Module:
    """A refactor sends biases through the init of the weights."""
    model = GPT(layers=LAYERS, tied=False)
    gpt_rest(model)
    draw(
        model,
        (r"c_proj\.weight", normal(0.023 / DEPTH)),
        (r"(c_attn|c_fc|wte|wpe|lm_head)\.weight", normal(0.023)),
    )
    if not fixed:
        draw(model, ("bias", normal(0.023)))
    return model


@bug("one sub-module missed", blames=(r"mlp\.(gate|up|down)_proj",))
def rwkv7_feed_forward_init_never_called(fixed: bool) -> nn.Module:
    """The feed-forward network has an init of its own that nobody calls; attention's is called."""
    model = Llama(layers=LAYERS)
    draw(model, ("norm", ones), ("embed_tokens", uniform(1e-4)), ("lm_head", xavier_uniform(0.5)))
    draw(model, (r"self_attn", lambda weight: nn.init.orthogonal_(weight)), ("o_proj", zeros))
    if fixed:
        draw(
            model,
            (r"(gate|up)_proj", lambda weight: nn.init.orthogonal_(weight)),
            ("down_proj", zeros),
        )
    return model


@bug("padding row not zero", blames=(r"word_embeddings",))
def torch_padding_row_overwritten(fixed: bool) -> nn.Module:
    """A custom draw of the embedding overwrites the row of zeros that padding reads."""
    from benchmarks.initbench.encoders import Bert

    model = Bert(layers=LAYERS, padding=0)
    draw(model, ("bias", zeros), ("norm", ones), ("weight", normal(0.02)))
    if fixed:
        with torch.no_grad():
            model.word_embeddings.weight[0].zero_()
    return model


# -- found in trackers after the rules were first written ----------
@bug("wrong fan", blames=(r"blocks\.\d+\.w[12]",), probe=features)
def paddlescience_default_by_the_outputs(fixed: bool) -> nn.Module:
    """The default of torch is drawn with inputs and outputs exchanged, because layers are stored as
    (in, out).
    """
    model = ResidualMLP(layers=LAYERS, transposed=True)
    draw(model, (r"\.w[12]$", lambda weight: linear_default(weight.mT if fixed else weight)))
    return model


@bug("wrong gain", blames=(r"weight1", r"weight2"))
def modalities_experts_by_root_three(fixed: bool) -> nn.Module:
    """Grouped experts are meant to have the default of nn.Linear, and their bound is sqrt(3) times
    as large.
    """
    model = Llama(layers=LAYERS, feed_forward=GroupedExperts)
    factor = 1.0 if fixed else math.sqrt(3)

    def fill(weight: Tensor) -> object:
        bound = factor / math.sqrt(weight.shape[-1])
        return nn.init.uniform_(weight, -bound, bound)

    draw(model, ("weight[12]", fill))
    return model


@bug("lost depth scaling", blames=(r"layers\.[123]\.fc\d",))
def marian_feed_forward_not_scaled_by_the_layer(fixed: bool) -> nn.Module:
    """Xavier is divided by the root of the layer's number in attention; the feed-forward network
    ignores it.
    """
    model = PostNormDecoder(layers=LAYERS)
    for index, layer in enumerate(model.layers):
        gain = (index + 1) ** -0.5
        draw(
            layer,
            ("_proj", xavier_uniform(gain)),
            (r"fc\d", xavier_uniform(gain if fixed else 1.0)),
        )
    draw(model, ("embedding|head", xavier_uniform()))
    return model


@bug("brackets missing", blames=(r"blocks\.\d+\.w[12]",), probe=features)
def mlverse_xavier_without_brackets(fixed: bool) -> nn.Module:
    """Xavier's std is sqrt(2 / fan_in + fan_out), so that it grows with the layer."""
    model = ResidualMLP(layers=LAYERS)

    def fill(weight: Tensor) -> object:
        fan_out, fan_in = weight.shape
        variance = 2 / (fan_in + fan_out) if fixed else 2 / fan_in + fan_out
        return nn.init.normal_(weight, 0.0, math.sqrt(variance))

    draw(model, (r"\.w[12]$", fill))
    return model


@bug("wrong fan", blames=(r"mlp\.c_proj\.weight",))
def olmo_small_init_by_the_inner_width(fixed: bool) -> nn.Module:
    """The small init of the down-projection takes the width that it reads for the width of the
    model.
    """
    width = 64
    model = GPT(layers=LAYERS, width=width, tied=False, bias=False)
    fan = width if fixed else 4 * width
    draw(
        model,
        ("ln_", ones),
        (r"mlp\.c_proj", truncated(math.sqrt(2 / (5 * fan)))),
        ("weight", truncated(math.sqrt(2 / (5 * width)))),
    )
    return model


@bug("wrong cut of a truncated normal", blames=(r"layers\.1\.self_attn\.q_proj",))
def torch_truncated_normal_of_a_small_spread(fixed: bool) -> nn.Module:
    """One element of a draw of std 0.002 lies at the bound, a thousand standard deviations out."""
    model = Llama(layers=LAYERS)
    draw(model, ("norm", ones), ("weight", truncated(0.002, cut=1000.0)))
    if not fixed:
        with torch.no_grad():
            model.layers[1].self_attn.q_proj.weight.view(-1)[77] = -2.0
    return model
