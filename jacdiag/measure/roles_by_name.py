"""Roles of weights by their names, for a state dict whose model is not known.

This is the only place that reads a role from a name. The table of sub-layers, the init contract
and the bound of Eq. 15 all use it. It works on names and shapes alone, in five steps:

1. Find the sub-layer that a name lies in: the module path and a word such as `self_attn`, `mlp`
   or `mixer`.
2. Give each weight of a sub-layer a role: the first rule of a table that matches its name and
   those of its siblings.
3. Number the layers, as the measured tier does.
4. Find the width: the size that most matrices of a layer share.
5. Give weights outside all sub-layers a role, and every matrix its fan-in and fan-out.

A name that no rule knows has the role "". Nothing is guessed from it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal

from jacdiag.records.report import Kind
from jacdiag.trace.discovery.weight_roles import ParameterUse

Shape = tuple[int, ...]
SublayerKind = Literal["attention", "cross-attention", "mlp", "moe", "mixer", "conv"]


@dataclass(frozen=True)
class RoleRule:
    """A name inside a sub-layer, and the role that it stands for.

    Attributes:
        role: as `jacdiag.trace.discovery.weight_roles.ParameterUse.role`.
        words: regular expression of the entire name inside the sub-layer, without ".weight" and
            expert numbers.
        sibling: regular expression; if given, the rule holds only where a weight of the same
            sub-layer matches it.
    """

    role: str
    words: str
    sibling: str = ""

    def matches(self, inner: str, siblings: Iterable[str]) -> bool:
        """Return whether the rule holds for a name among its siblings."""
        if re.fullmatch(self.words, inner) is None:
            return False
        # The name alone is enough.
        if not self.sibling:
            return True

        return any(re.fullmatch(self.sibling, name) for name in siblings)


# -- The data: names and what they mean ------------------------------------------------------------
# Modules that hold one sub-layer. BERT's `crossattention`, T5's `EncDecAttention`, torch's
# `multihead_attn`, diffusers' `attn2`.
_CROSS_MODULE = re.compile(
    r"(?i)cross_?(attn|attention)|encdecattention|encoder_(attn|attention)|"
    r"src_attn|multihead_attn|attn2|xattn"
)
_ATTENTION_MODULE = re.compile(r"(?i)(?!post_)\w*(attn|attention)s?_?\d*|mha|att")
_MLP_MODULE = re.compile(
    r"(?i)(shared_|dense_|block_sparse_|layernorm_)?"
    r"(mlp|ffn|ff|feed_?forward|densereludense|moe)s?_?\d*(_block|_layer)?|"
    r"net|experts?|shared_experts?"
)
# Mamba, Jamba, Qwen3-Next, RecurrentGemma, LFM2.
_MIXER_MODULE = re.compile(
    r"(?i)mixer|mamba\d*|ssm|linear_attn|temporal_block|time_mix\w*|short_conv|conv|self_mamba"
)
# The first that matches decides: `linear_attn` is a mixer, and `crossattention` no self-attention.
_MODULES: tuple[tuple[SublayerKind, re.Pattern[str]], ...] = (
    ("cross-attention", _CROSS_MODULE),
    ("mixer", _MIXER_MODULE),
    ("mlp", _MLP_MODULE),
    ("attention", _ATTENTION_MODULE),
)
# Weights that only a recurrent or convolutional mixer has, whatever its module is called
# (RWKV's is `attention`).
_MIXER_SIGN = (
    r"receptance|x_proj|dt_proj|A_log|conv_?1d|time_decay|in_proj_(qkvz|ba)|dwconv(\.\w+)?|"
    r"time_mix_\w+|time_mixing\.\w+"
)
# A stack of experts: `experts.3`, `experts.expert_3`, `experts.mlp` (DBRX), `shared_experts`
# (DeepSeek).
_EXPERT = re.compile(
    r"experts|expert_\d+|local_experts|shared_experts?|shared_mlp|deepspeed_(moe|experts)"
)
# BERT's `attention.self.query`, GPT-Neo's `attn.attention.q_proj`.
_SELF = r"(\w*(self|attention|attn)\.)?"
_MAP = r"(to_|linear_|w|W)?_?"

_ATTENTION_RULES = (
    # One fused matrix. GPT-2's cross-attention holds keys and values in `c_attn` and the query
    # in `q_attn`.
    RoleRule("W_KV", r"c_attn", sibling=r"q_attn"),
    RoleRule("W_QKV", r"c_attn|att_proj|attn"),  # GPT-2, OLMo, litgpt
    # timm, Phi-3, MPT, Megatron-core, x-transformers.
    RoleRule("W_QKV", r"(to_|linear_|layernorm_|c_|w|W)?_?qkv(_proj|_mat|_lin)?"),
    # BLOOM, Falcon, NeoX; Baichuan; torch, DeBERTa.
    RoleRule("W_QKV", r"query_key_value|W_pack|(self\.)?in_proj"),
    # Low-rank factors of DeepSeek's latent attention: "_a" reads the stream.
    RoleRule("W_Q_a", r"q_a_proj|wq_a|(linear_)?q_down_proj"),
    RoleRule("W_KV_a", r"kv_a_proj(_with_mqa)?|wkv_a|(linear_)?kv_down_proj"),
    RoleRule("W_Q", r"q_b_proj|wq_b|(linear_)?q_up_proj"),
    RoleRule("W_KV", r"kv_b_proj|wkv_b|(linear_)?kv_up_proj"),
    RoleRule("W_KV", r"(to_|linear_|c_|w|W)?_?kv(_proj)?|key_value(_proj)?"),
    # Separate matrices: Llama, BART, DistilBERT (`q_lin`), T5 (`q`), x-transformers (`to_q`);
    # BERT.
    RoleRule("W_Q", rf"{_SELF}{_MAP}q(_proj|_lin|_head|_attn)?"),
    RoleRule("W_K", rf"{_SELF}{_MAP}k(_proj|_lin|_head)?"),
    RoleRule("W_V", rf"{_SELF}{_MAP}v(_proj|_lin|_head)?"),
    RoleRule("W_Q", rf"{_SELF}(query(_proj)?|projection_query)"),
    RoleRule("W_K", rf"{_SELF}(key(_proj)?|projection_key)"),
    RoleRule("W_V", rf"{_SELF}(value(_proj)?|projection_value)"),
    # The output: Llama, BART, GPT-2, timm, BERT and NeoX (`dense`), XLM, Megatron-core.
    RoleRule("W_O", rf"{_SELF}(w|W)?_?o(_proj|_net|_lin)?"),
    RoleRule("W_O", rf"{_SELF}(out_proj|c_proj|proj|dense|out_lin|linear_proj|out|linear_out)"),
    # x-transformers, BERT, OLMo, Funnel, SqueezeBERT.
    RoleRule("W_O", r"to_out(\.\d+)?|output(\.dense)?|attn_out|linear_o|post_proj"),
    RoleRule("W_O", r"post_attention\.conv1d"),
    RoleRule("positions", r"(\w+\.)?relative_attention_bias"),
    # JetMoE: experts of an attention.
    RoleRule("W_Q", r"input_linear", sibling=r"expert .*"),
    RoleRule("W_O", r"output_linear", sibling=r"expert .*"),
    RoleRule("router", r"router(\.layer)?"),
)
_MLP_RULES = (
    # A `gate` next to experts chooses between them (Mixtral, Qwen-MoE); next to `up` it is the
    # gated factor.
    RoleRule("router", r"(gate|wg)(\.(wg|weight|gate|linear))?", sibling=r"expert .*"),
    RoleRule("router", r"\w*router(\.(classifier|layer|linear))?|shared_expert_gate"),
    RoleRule("W_gate_up", r"gate_up(_proj)?|gate_and_up(_proj)?|w12|weights_in"),
    # Qwen-1: c_proj(w1(x) * silu(w2(x))). Meta-Llama and Mixtral: w2(silu(w1(x)) * w3(x)); DBRX
    # calls w3 v1.
    RoleRule("W_gate", r"w2", sibling=r"c_proj"),
    RoleRule("W_gate", r"w1", sibling=r"w3|v1"),
    # litgpt: proj(silu(fc_1(x)) * fc_2(x)); timm: fc2(silu(fc1_g(x)) * fc1_x(x)).
    RoleRule("W_gate", r"fc_1", sibling=r"proj"),
    RoleRule("W_1", r"fc_2", sibling=r"proj"),
    RoleRule("W_gate", r"gate_proj|wi_0|gate|w_gate|gate_lin|linear_gate|fc1_g"),
    # GPT-2, Llama, NeoX, litgpt, BART, GPT-J, timm, DistilBERT, torch, XLNet, Meta-Llama, DBRX.
    RoleRule("W_1", r"c_fc|up_proj|dense_h_to_4h|fc|fc_?1|fc_in|fc1_x|lin_?1|linear_?1|layer_1"),
    RoleRule("W_1", r"w_?1|w3|v1|pwconv1"),
    # Megatron-core, T5, ModernBERT, ALBERT, OLMo, BERT, SqueezeBERT, Granite.
    RoleRule("W_1", r"linear_fc1|[Ww]i|wi_1|up|ffn|ff_proj|intermediate(\.(dense|conv1d))?"),
    RoleRule("W_1", r"input_linear"),
    # The same code bases, in the same order.
    RoleRule("W_2", r"c_proj|down_proj|dense_4h_to_h|fc_?2|fc_out|lin_?2|linear_?2|layer_2"),
    RoleRule("W_2", r"w_?2|[Ww]o|proj|pwconv2"),
    RoleRule("W_2", r"linear_fc2|down|ffn_output|ff_out|output(\.(dense|conv1d))?"),
    RoleRule("W_2", r"output_linear"),
)
# Everything inside a state-space mixer passes a non-linearity and multiplies: the gated factor.
_MIXER_RULES = (
    RoleRule("W_O", r"out_proj|linear_out|output|fc2|pwconv2"),
    RoleRule("W_gate", r"in_proj(_\w+)?|x_proj|dt_proj|conv_?1d|linear_y|receptance|gate"),
    # RWKV: in its time mixing `output` ends the branch, in its channel mixing `value` does.
    RoleRule("W_1", r"value", sibling=r"output"),
    RoleRule("W_O", r"value"),
    RoleRule("W_1", r"key|linear_x|fc1|pwconv1|dwconv(\.\w+)?"),
)
_RULES: dict[str, tuple[RoleRule, ...]] = {
    "attention": _ATTENTION_RULES,
    "cross-attention": _ATTENTION_RULES,
    "mlp": _MLP_RULES,
    "moe": _MLP_RULES,
    "mixer": _MIXER_RULES,
    "conv": (),
}
# Names that say which sub-layer they belong to without a module of their own: BART's `fc1`,
# BERT's `output.dense`.
_BARE_NAMES: tuple[tuple[SublayerKind, re.Pattern[str]], ...] = (
    ("mixer", re.compile(r"[dp]wconv\d?")),
    ("conv", re.compile(r"conv\d|convolution|conv\d\.conv")),
    (
        "attention",
        re.compile(
            r"(to_|w|W)?qkv(_proj)?|to_(q|k|v|kv|out)(\.\d+)?|[qkvo]_proj|w[qkvo]|att_proj|"
            r"attn_out|c_attn|query_key_value|(self\.)?(query|key|value)|in_proj|out_proj|"
            r"post_attention\.conv1d"
        ),
    ),
    (
        "mlp",
        re.compile(
            r"fc_?[12]|fc_in|fc_out|lin(ear)?_?[12]|intermediate\.(dense|conv1d)|"
            r"output\.(dense|conv1d)|ff_proj|ff_out|ffn|ffn_output|gate_proj|up_proj|down_proj|"
            r"gate_up_proj|c_fc|dense_h_to_4h|dense_4h_to_h|w_?[123]|wi(_[01])?|linear_fc[12]"
        ),
    ),
)
# Tables and maps outside all sub-layers: the first that matches a name without ".weight".
# `_END` says that the word is the weight's own module, or a list of such modules
# (`classifier.1`, adaptive embeddings).
_START, _END = r"(?:^|\.)", r"(?:\.\d+)*$"
_ANYWHERE_RULES = (
    ("positions", rf"{_START}(wpe|pos_?emb\w*|\w*positions?_?emb\w*|embed_positions){_END}"),
    (
        "positions",
        rf"{_START}(positions_embed|positional_emb\w*|relative_attention_bias){_END}",
    ),
    ("positions", rf"{_START}(token_type_emb\w*|segment_emb\w*){_END}"),
    ("projection", rf"{_START}(patch_emb\w*|embeddings?)\.(\w+\.)*proj(ection)?$"),
)
_OUTSIDE_RULES = (
    ("cls", rf"{_START}(cls|class|dist\w*)_token$"),
    ("projection", rf"{_START}(patch_emb\w*|conv_proj|conv_stem)(\.|$)"),
    ("projection", rf"{_START}(embedding_hidden_mapping_in|embedding_transformation)$"),
    ("projection", rf"{_START}(transform|pooler|pre_classifier|vocab_transform)(\.|$)"),
    ("projection", rf"{_START}(project_in|project_out|emb_projs){_END}"),
    ("projection", rf"{_START}(lm_head|head|\w*predictions|classifier)\.dense$"),
    (
        "projection",
        rf"{_START}embed_tokens\.embeddings\.\d+\.1$",
    ),  # fairseq: adaptive embeddings
    ("embedding", rf"{_START}(wte|(tok|word|token|input)_?emb\w*|embed_in|tokens_embed){_END}"),
    ("embedding", rf"{_START}(embed_tokens(\.embeddings)?|shared|emb_layers){_END}"),
    ("embedding", rf"{_START}(embed|emb|embedding|embeddings|w){_END}"),
    ("head", rf"{_START}(lm_head|head|heads|embed_out|output|output_layer){_END}"),
    ("head", rf"{_START}(output_projection|unembed\w*|score|classifier|decoder){_END}"),
    ("head", rf"{_START}(qa_outputs|vocab_projector|classifier\.out_proj){_END}"),
    ("head", rf"{_START}(generator_lm_head|pred_layer\.proj){_END}"),
)
# Weights inside a state-space mixer, which neither read nor write the stream.
_INNER = re.compile(r"x_proj|dt_proj|conv_?1d|A_log|\.D$|q_b_proj|kv_b_proj")
_EMBEDDING_MODULE = re.compile(r"(?i)embed|emb($|_)")
_WRAPPERS = {"fn", "module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_NUMBERED = re.compile(r"(?i)\d+|(encoder_|decoder_)?(layer|block|stage)s?_?\d+")
_GAIN = re.compile(r"norm|(?:^|[._])ln(?:[._]|$|_?\w)", re.I)
_SCALE = re.compile(r"layer_?scale|(?:^|[._])(gamma|lambda|ls)_?\d?(?:[._]|$)", re.I)
# Masks and tables of angles that a module keeps as buffers: no weights.
_BUFFER = re.compile(
    r"(?:^|\.)(bias|masked_bias|inv_freq|position_ids|attn_mask|mask|freqs_cis|cos|sin)(_cached)?$"
)


# -- What the names say ----------------------------------------------------------------------------
@dataclass(frozen=True)
class NamedWeight:
    """Description of one parameter by its name.

    Attributes:
        role: as `jacdiag.trace.discovery.weight_roles.ParameterUse.role`; "" where the name
            does not say.
        layer: number of its layer, counted over all stacks; None outside all layers.
        stack: module path of the list of layers, such as "model.decoder.layers"; "" outside.
        kind: of the sub-layer that it lies in; "" outside.
        sublayer: name of that sub-layer; "" outside.
        fan_in, fan_out: sizes of the linear map that it makes, whichever way it is stored; None
            for a vector.
    """

    role: str
    layer: int | None = None
    stack: str = ""
    kind: SublayerKind | Literal[""] = ""
    sublayer: str = ""
    fan_in: int | None = None
    fan_out: int | None = None

    @property
    def use(self) -> ParameterUse:
        """Return what the init contract reads of it."""
        return ParameterUse(self.role, self.layer, self.sublayer, self.fan_in, self.fan_out)


@dataclass
class NamedSublayer:
    """Sub-layer that names show.

    Attributes:
        name: module path that its matrices share.
        stack: module path of the list of layers.
        numbers: the numbers in the path of its layer, outer first.
        kind: attention, cross-attention, mlp, moe, mixer or conv.
        layer: number of its layer, counted over all stacks.
        roles: matrix name -> role.
    """

    name: str
    stack: str
    numbers: tuple[int, ...]
    kind: SublayerKind
    layer: int = 0
    roles: dict[str, str] = field(default_factory=dict)

    @property
    def report_kind(self) -> Kind:
        """Return the kind as a report has it, where cross-attention is an attention."""
        return "attention" if self.kind == "cross-attention" else self.kind


@dataclass(frozen=True)
class NamedModel:
    """Description of a model by the names and shapes of its state dict.

    Attributes:
        weights: every parameter, in the order of the state dict.
        sublayers: in the order of the stream.
        width: features of the stream; None where the shapes do not agree on one.
    """

    weights: dict[str, NamedWeight]
    sublayers: list[NamedSublayer]
    width: int | None

    @property
    def layers(self) -> int:
        """Return the number of layers, counted over all stacks."""
        return len({sublayer.layer for sublayer in self.sublayers})

    def with_role(self, role: str) -> list[str]:
        """Return the names of all weights of a role."""
        return [name for name, weight in self.weights.items() if weight.role == role]


def read_names(shapes: Mapping[str, Sequence[int]]) -> NamedModel:
    """Return the sub-layers, roles, layers and width that a state dict's names and shapes show.

    Args:
        shapes: shape of every floating tensor, by name.

    Example:
        >>> model = read_names({"h.0.mlp.c_fc.weight": (64, 16), "h.0.mlp.c_proj.weight": (16, 64),
        ...                     "h.0.ln.weight": (16,)})
        >>> model.width, [weight.role for weight in model.weights.values()]
        (16, ['W_1', 'W_2', 'norm_gain'])
        >>> model.weights["h.0.mlp.c_proj.weight"].fan_in
        64
    """
    sizes = {name: tuple(map(int, shape)) for name, shape in shapes.items()}
    # 1. and 2. Sub-layers, and the roles inside them.
    sublayers = []
    for group in _group_by_sublayer(find_places(sizes)):
        sublayer = _build_sublayer(group, sizes)
        if sublayer is not None:
            sublayers.append(sublayer)

    # 3. Layers.
    sublayers = _in_stream_order(sublayers)
    _number_layers(sublayers)

    # 4. Width, and what only shows once it is known.
    width = find_width(sublayers, sizes)
    for sublayer in sublayers:
        _mark_fused_gates(sublayer, sizes, width)

    # 5. Every weight.
    weights = _describe_weights(sizes, sublayers, width)
    return NamedModel(weights, sublayers, width)


# -- Step 1: the sub-layer that a name lies in -----------------------------------------------------
@dataclass(frozen=True)
class Place:
    """Where a parameter lies.

    Attributes:
        parameter: its name.
        block: module path down to the innermost numbered module around the sub-layer.
        module: path of the sub-layer's own module, the block's path where it has none.
        kind: as the module's name or the parameter's own says.
        inner: its name inside the sub-layer, without ".weight", wrappers and numbers of
            experts.
        expert: one of several experts, or shared by all tokens next to them.
    """

    parameter: str
    block: str
    module: str
    kind: SublayerKind
    inner: str
    expert: bool = False


def find_places(sizes: Mapping[str, Shape]) -> list[Place]:
    """Return the place of every parameter that lies in a sub-layer, as far as its name says."""
    places = _places_of(sizes, anywhere=False)
    has_numbered_layers = any(place.block for place in places)
    if has_numbered_layers:
        return places

    # A single layer on its own has no numbers in its names.
    return _places_of(sizes, anywhere=True)


def _places_of(names: Iterable[str], anywhere: bool) -> list[Place]:
    """Return the places of parameters; `anywhere` reads names without a number too."""
    places = [_place_of(name, anywhere) for name in names]
    return [place for place in places if place is not None]


def _place_of(name: str, anywhere: bool) -> Place | None:
    """Return the place of one parameter; `anywhere` reads names without a number too."""
    # 1. Drop what says nothing: wrappers, and the name of the parameter in its own module.
    tokens = _meaningful_tokens(name)
    if "bottleneck" in tokens:
        return None  # MobileBERT: maps between the stream and a narrower layer

    # 2. A module on the path may be the sub-layer.
    module = _module_of(tokens)
    if module is None:
        return _place_by_bare_name(name, tokens, anywhere)

    position, kind_of_module = module
    if _is_part_of_embedding(tokens[:position]):
        return None

    return _place_in_module(name, tokens, position, kind_of_module)


def _place_by_bare_name(name: str, tokens: Sequence[str], anywhere: bool) -> Place | None:
    """Return the place of a parameter whose own name says which sub-layer it belongs to.

    Args:
        name: of the parameter.
        tokens: its path, without wrappers.
        anywhere: read names without a number too.
    """
    end = _end_of_block(tokens)
    is_in_block = end > 0
    if not is_in_block and not anywhere:
        return None

    # 1. The kind that it says.
    block, inner = ".".join(tokens[:end]), ".".join(tokens[end:])
    kind = _kind_of_bare_name(inner)
    if kind is None:
        return None

    # 2. ResNet: `layers.0.layer.1.convolution` is the second of one branch.
    if kind == "conv" and re.search(r"\.layer\.\d+$", block):
        block = block.rpartition(".layer.")[0]
    return Place(name, block, block, kind, inner)


def _meaningful_tokens(name: str) -> list[str]:
    """Return the tokens of a name without wrappers and without ".weight" or ".bias"."""
    tokens = [token for token in name.split(".") if token not in _WRAPPERS]
    own_name = tokens.pop()
    if own_name in ("weight", "bias", "gamma", "beta"):
        return tokens

    # A parameter that its module names itself, such as `in_proj_weight`.
    tokens.append(re.sub(r"_(weight|bias)$", "", own_name))
    return tokens


def _kind_of_bare_name(inner: str) -> SublayerKind | None:
    """Return the kind of sub-layer that a parameter's own name says; None if it says none."""
    for kind, words in _BARE_NAMES:
        if words.fullmatch(inner) is not None:
            return kind

    # Most likely a vector.
    return None


def _is_part_of_embedding(path: Sequence[str]) -> bool:
    """Return whether a path leads into an embedding and not into a layer.

    Examples are `pos_embed.mlp` and `time_embedder.mlp`.
    """
    is_in_layer = _first_numbered(path) is not None
    if is_in_layer:
        return False

    return any(_EMBEDDING_MODULE.search(token) for token in path)


def _module_of(tokens: Sequence[str]) -> tuple[int, SublayerKind] | None:
    """Return the position and the kind of the module that is the sub-layer."""
    # 1. Modules on the path whose name is that of a sub-layer.
    modules = _modules_on_path(tokens)
    first_number = _first_numbered(tokens)

    # 2. Those inside the numbered module, which is the layer.
    inside = modules
    if first_number is not None:
        inside = [module for module in modules if module[0] > first_number]
    if not inside:
        return _listed_module(modules, first_number)

    # 3. An MLP inside a cross-attention layer (Perceiver) is a sub-layer of its own; experts of
    #    an attention are not.
    outer_position, outer_kind = inside[0]
    next_position = outer_position + 1
    has_nested_mlp = "attention" in outer_kind and (next_position, "mlp") in inside
    if has_nested_mlp and not _EXPERT.fullmatch(tokens[next_position]):
        return next_position, "mlp"

    return inside[0]


def _modules_on_path(tokens: Sequence[str]) -> list[tuple[int, SublayerKind]]:
    """Return position and kind of the modules whose name is that of a sub-layer, outer first."""
    modules: list[tuple[int, SublayerKind]] = []
    # The last token is the parameter's own name.
    for position, token in enumerate(tokens[:-1]):
        kind = _kind_of_module(token)
        if kind is not None:
            modules.append((position, kind))

    return modules


def _first_numbered(tokens: Sequence[str]) -> int | None:
    """Return the position of the first numbered module of a path."""
    for position, token in enumerate(tokens):
        if _NUMBERED.fullmatch(token) is not None:
            return position

    # A layer on its own, or a parameter outside all layers.
    return None


def _listed_module(
    modules: Sequence[tuple[int, SublayerKind]], first_number: int | None
) -> tuple[int, SublayerKind] | None:
    """Return the module that is a list of sub-layers, as in XLM's `attentions.0.q_lin`."""
    for position, kind in modules:
        is_list = position + 1 == first_number
        if is_list:
            return position, kind

    return None


def _kind_of_module(token: str) -> SublayerKind | None:
    """Return the kind of sub-layer that a module's own name says; None if it says none."""
    for kind, words in _MODULES:
        if words.fullmatch(token) is not None:
            return kind

    return None


def _place_in_module(name: str, tokens: Sequence[str], position: int, kind: SublayerKind) -> Place:
    """Return the place of a parameter whose sub-layer is the module at a position of its path.

    Args:
        name: of the parameter.
        tokens: its path, without wrappers.
        position: of the sub-layer's module on that path.
        kind: of the sub-layer.
    """
    # 1. The path of the block, that of the sub-layer's module, and what follows them.
    end_of_block = _end_of_block(tokens[: position + 1])
    end_of_module = position + 1
    after = tokens[end_of_module:]

    # 2. `attentions.0.q_lin`: the number of the sub-layer is that of its layer.
    begins_with_number = len(after) > 1 and after[0].isdigit()
    is_list = end_of_block == 0 and begins_with_number
    if is_list:
        end_of_module += 1
        end_of_block = end_of_module
        after = after[1:]

    # 3. Experts without a module around them and their router.
    if _EXPERT.fullmatch(tokens[position]):
        end_of_module = position
        after = tokens[position:]

    # 4. The place, without what numbers and names an expert.
    is_expert = any(_EXPERT.fullmatch(token) for token in tokens[position:])
    return Place(
        parameter=name,
        block=".".join(tokens[:end_of_block]),
        module=".".join(tokens[:end_of_module]),
        kind=kind,
        inner=".".join(_without_experts(after)),
        expert=is_expert,
    )


def _without_experts(tokens: Sequence[str]) -> list[str]:
    """Drop what numbers and names an expert: `experts.3.w1` becomes `w1`."""
    remaining: list[str] = []
    in_expert = False
    for token in tokens:
        if _EXPERT.fullmatch(token):
            in_expert = True
            continue

        # Outside experts, these are names of their own.
        if not in_expert or not _names_an_expert(token):
            remaining.append(token)

    return remaining


def _names_an_expert(token: str) -> bool:
    """Return whether a token inside experts says which one it is, or that it is an MLP."""
    return token.isdigit() or _MLP_MODULE.fullmatch(token) is not None


def _end_of_block(tokens: Sequence[str]) -> int:
    """Return how many tokens lead to the innermost numbered module.

    A number that ends a path is that of a weight in a list, such as `to_out.0`.
    """
    # 1. The path without numbers at its end. The last token is never that of a layer.
    last = max(len(tokens) - 1, 0)
    while last > 0 and tokens[last].isdigit():
        last -= 1

    # 2. The innermost numbered module on it.
    for position in reversed(range(last)):
        if _NUMBERED.fullmatch(tokens[position]):
            return position + 1

    return 0


# -- Step 2: roles inside a sub-layer --------------------------------------------------------------
_GroupKey = tuple[str, str, str]  # block, kind and module


def _group_by_sublayer(places: Sequence[Place]) -> list[list[Place]]:
    """Return the places of each sub-layer: those of its module, and loose names of its block."""
    # 1. By block, kind and module.
    groups: dict[_GroupKey, list[Place]] = {}
    keys_of_kind: dict[tuple[str, str], list[_GroupKey]] = {}
    for place in places:
        key: _GroupKey = (place.block, place.kind, place.module)
        if key not in groups:
            groups[key] = []
            keys_of_kind.setdefault(key[:2], []).append(key)
        groups[key].append(place)

    # 2. Join what belongs to the only other group of its block and kind.
    merged: dict[_GroupKey, list[Place]] = {}
    for key, members in groups.items():
        target = key
        others = [other for other in keys_of_kind[key[:2]] if other != key]
        if len(others) == 1 and _belongs_to_another(key, members):
            target = others[0]
        merged.setdefault(target, []).extend(members)

    return list(merged.values())


def _belongs_to_another(key: _GroupKey, members: Sequence[Place]) -> bool:
    """Return whether a group is part of another one of its block and kind.

    SqueezeBERT's `post_attention.conv1d` ends the attention. Granite's `shared_mlp` is added to
    its experts.
    """
    block, _, module = key
    has_no_module = module == block
    if has_no_module:
        return True

    # Experts next to a shared MLP.
    has_experts = any(place.expert for place in members)
    _, _, own_name = module.rpartition(".")
    return has_experts and _EXPERT.fullmatch(own_name) is not None


def _build_sublayer(group: Sequence[Place], sizes: Mapping[str, Shape]) -> NamedSublayer | None:
    """Return a sub-layer with the roles of its matrices; None where no name in it is known."""
    matrices = [place for place in group if is_matrix(place.parameter, sizes[place.parameter])]
    if not matrices:
        return None

    # 1. Roles by name, or by order of use.
    kind = _kind_of_group(group)
    roles = _roles_by_name(kind, group, matrices)
    has_roles = any(roles.values())
    if not has_roles and kind in ("mlp", "moe"):
        roles |= _roles_in_sequence(matrices, sizes)
        has_roles = any(roles.values())

    # 2. Without any role it is no sub-layer. Kernels of convolutions need none.
    if not has_roles and kind != "conv":
        return None

    # 3. The sub-layer's name and the numbers in its path.
    block = list(filter(None, group[0].block.split(".")))
    stack, numbers = _stack_and_numbers(block)
    name = _shared_path([place.parameter for place in matrices])
    return NamedSublayer(name, stack, numbers, kind, roles=roles)


def _roles_by_name(
    kind: SublayerKind, group: Sequence[Place], matrices: Sequence[Place]
) -> dict[str, str]:
    """Return the role of each matrix of a sub-layer, by its name and those of its siblings."""
    # 1. Siblings that lie in an expert are marked, for rules that look at them.
    siblings = set()
    for place in group:
        siblings.add(place.inner)
        if place.expert:
            siblings.add(f"expert {place.inner}")

    # 2. The role of each.
    roles = {}
    for place in matrices:
        roles[place.parameter] = _role_of(kind, place.inner, siblings)

    return roles


def _kind_of_group(group: Sequence[Place]) -> SublayerKind:
    """Return the kind of a sub-layer by the names of all its parameters."""
    has_mixer_sign = any(re.fullmatch(_MIXER_SIGN, place.inner) for place in group)
    if has_mixer_sign:
        return "mixer"

    # An MLP with experts, or with what chooses one.
    kind = group[0].kind
    if kind == "mlp" and any(_shows_experts(place) for place in group):
        return "moe"

    return kind


def _shows_experts(place: Place) -> bool:
    """Return whether a parameter lies in an expert or in a router."""
    return place.expert or "router" in place.inner


def _role_of(kind: SublayerKind, inner: str, siblings: Iterable[str]) -> str:
    """Return the role of the first rule that holds, "" if none does."""
    for rule in _RULES[kind]:
        if rule.matches(inner, siblings):
            return rule.role

    # A name of its author's own.
    return ""


def _roles_in_sequence(matrices: Sequence[Place], sizes: Mapping[str, Shape]) -> dict[str, str]:
    """Return the roles of two matrices in an `nn.Sequential`, which numbers by order of use."""
    if len(matrices) != 2:
        return {}

    # 1. Numbers give the order.
    are_numbered = all(_numbers_in(place.inner) for place in matrices)
    if not are_numbered:
        return {}

    # 2. The second must read what the first makes.
    first, second = sorted(matrices, key=lambda place: _numbers_in(place.inner))
    first_shape, second_shape = sizes[first.parameter], sizes[second.parameter]
    are_maps = len(first_shape) == 2 and len(second_shape) == 2
    share_a_size = not set(first_shape).isdisjoint(second_shape)
    if not are_maps or not share_a_size:
        return {}

    return {first.parameter: "W_1", second.parameter: "W_2"}


def _numbers_in(text: str) -> tuple[int, ...]:
    """Return the numbers in a name, in order."""
    return tuple(int(number) for number in re.findall(r"\d+", text))


def _stack_and_numbers(block: Sequence[str]) -> tuple[str, tuple[int, ...]]:
    """Return the path of a block's list of layers, and the numbers in the block's path."""
    # 1. The numbered modules.
    positions = [position for position, token in enumerate(block) if _NUMBERED.fullmatch(token)]
    if not positions:
        return "", ()

    # 2. The list that holds the outermost. Lists of attentions and of MLPs share a stack.
    end = positions[0]
    is_list_of_sublayers = end > 0 and _kind_of_module(block[end - 1]) is not None
    if is_list_of_sublayers:
        end -= 1
    numbers = tuple(_numbers_in(block[position])[-1] for position in positions)
    return ".".join(block[:end]), numbers


def _shared_path(names: Sequence[str]) -> str:
    """Return the module path that all parameters of a sub-layer share."""
    paths = [_module_path(name) for name in names]
    shared: list[str] = []
    for tokens in zip(*paths, strict=False):
        is_shared = len(set(tokens)) == 1
        if not is_shared:
            break

        shared.append(tokens[0])

    return ".".join(shared)


def _module_path(name: str) -> list[str]:
    """Return the path of the module around the one that holds a parameter."""
    tokens = name.split(".")
    # A parameter of another name belongs to the module itself.
    if tokens[-1] != "weight":
        return tokens[:-1]

    return tokens[:-2]


def is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Return whether a tensor is the weight of a linear map: no vector, bias or mask."""
    is_vector = len(shape) < 2
    if is_vector or name.endswith("bias"):
        return False

    return _BUFFER.search(name) is None


# -- Step 3: layers --------------------------------------------------------------------------------
_RANK_IN_LAYER = {
    "attention": 0,
    "mixer": 0,
    "conv": 0,
    "cross-attention": 1,
    "mlp": 2,
    "moe": 2,
}


def _in_stream_order(sublayers: Sequence[NamedSublayer]) -> list[NamedSublayer]:
    """Return the sub-layers by stack, layer and kind.

    The order in the file says little: many files are sorted by name.
    """
    stacks = list(dict.fromkeys(sublayer.stack for sublayer in sublayers))

    def position(sublayer: NamedSublayer) -> tuple[bool, int, tuple[int, ...], int]:
        is_decoder = "decoder" in sublayer.stack.split(".")
        return (
            is_decoder,
            stacks.index(sublayer.stack),
            sublayer.numbers,
            _RANK_IN_LAYER[sublayer.kind],
        )

    # Two of one name are told apart by their kinds.
    ordered = sorted(sublayers, key=position)
    counts = Counter(sublayer.name for sublayer in ordered)
    for sublayer in ordered:
        if counts[sublayer.name] > 1:
            sublayer.name = f"{sublayer.name}:{sublayer.report_kind}"

    return ordered


def _number_layers(sublayers: Sequence[NamedSublayer]) -> None:
    """Number the layers as `jacdiag.trace.discovery.naming.depths_of` does for a model that runs.

    A layer is a module at the level of numbers at which most modules hold two sub-layers or
    more. Where none does (a list of attentions and one of MLPs), a layer is one period of the
    repeating kinds.
    """
    if not sublayers:
        return

    # 1. The level at which most modules hold several sub-layers; the outermost of equal ones.
    keys_by_level = []
    for level in range(3):
        keys_by_level.append([_key_of_layer(sublayer, level) for sublayer in sublayers])
    keys = max(keys_by_level, key=_count_repeated)

    # 2. No module holds several: the kinds repeat.
    if _count_repeated(keys) == 0:
        keys = _keys_by_period(keys, [sublayer.report_kind for sublayer in sublayers])

    # 3. Number the keys in the order of the stream.
    in_order = dict.fromkeys(keys)
    numbers = {key: layer for layer, key in enumerate(in_order)}
    for sublayer, key in zip(sublayers, keys, strict=True):
        sublayer.layer = numbers[key]


def _count_repeated(keys: Iterable[tuple[object, ...]]) -> int:
    """Return how many different keys occur twice or more."""
    counts = Counter(keys)
    return sum(count >= 2 for count in counts.values())


def _key_of_layer(sublayer: NamedSublayer, level: int) -> tuple[object, ...]:
    """Return what the sub-layers of one layer share, if layers are numbered at a level."""
    # 1. A layer on its own.
    if not sublayer.numbers:
        return (sublayer.name.rpartition(".")[0],)

    # 2. A module in a list, which may be one of attentions or of MLPs alone.
    depth_of_stack = len(sublayer.stack.split("."))
    after_stack = sublayer.name.split(".")[depth_of_stack]
    own_list = ""
    if _kind_of_module(after_stack) is not None:
        own_list = sublayer.kind
    return (sublayer.stack, own_list, sublayer.numbers[: level + 1])


def _keys_by_period(
    keys: list[tuple[object, ...]], kinds: Sequence[str]
) -> list[tuple[object, ...]]:
    """Return keys of layers from the shortest pattern that the kinds repeat.

    Args:
        keys: of the sub-layers, if no pattern repeats.
        kinds: of the same sub-layers.
    """
    # 1. All in one layer, or each in a layer of its own.
    count = len(kinds)
    different = len(set(kinds))
    if different == count:
        return [("layer", 0)] * count
    if different == 1:
        return keys

    # 2. The shortest pattern that is repeated at least twice.
    for period in range(2, count // 2 + 1):
        if _repeats_after(kinds, period):
            return [("layer", index // period) for index in range(count)]

    return keys


def _repeats_after(kinds: Sequence[str], period: int) -> bool:
    """Return whether kinds are a pattern of some length, repeated as a whole."""
    repetitions, remainder = divmod(len(kinds), period)
    if remainder:
        return False

    return list(kinds) == list(kinds[:period]) * repetitions


# -- Step 4: the width, and what it shows ----------------------------------------------------------
def find_width(sublayers: Sequence[NamedSublayer], sizes: Mapping[str, Shape]) -> int | None:
    """Return the width at the first layer: the size that most of its matrices have.

    Every matrix that reads or writes the stream has the width as one of its two sizes. An
    embedding may be narrower (ALBERT) or in several parts (adaptive), so that it only decides
    where two sizes are equally frequent.

    Args:
        sublayers: with their roles and layers.
        sizes: shape of every tensor, by name.
    """
    # MobileBERT: most matrices of a layer are narrower than the stream.
    has_bottleneck = any("bottleneck" in name.split(".") for name in sizes)
    if has_bottleneck:
        return None

    # 1. Matrices of the first layer vote for their two sizes.
    first_layer = [sublayer for sublayer in sublayers if sublayer.layer == 0]
    leaders = _most_frequent(_votes_of_matrices(first_layer, sizes))
    if len(leaders) == 1:
        return leaders[0]

    # 2. A tie: what else has the width decides.
    leaders = _most_frequent(_votes_of_others(first_layer, sizes, leaders))
    if len(leaders) == 1:
        return leaders[0]

    return None


def _votes_of_matrices(
    sublayers: Iterable[NamedSublayer], sizes: Mapping[str, Shape]
) -> Counter[int]:
    """Return how many matrices that may touch the stream have each size as one of their two."""
    votes: Counter[int] = Counter()
    for sublayer in sublayers:
        for name in _outer_matrices(sublayer):
            shape = sizes[name]
            # Its sizes are those of a head.
            if not _is_split_by_heads(sublayer, shape):
                votes.update(set(_sides(shape)))

    return votes


def _outer_matrices(sublayer: NamedSublayer) -> list[str]:
    """Return the matrices with a role that may touch the stream."""
    names = [name for name, role in sublayer.roles.items() if role]
    return [name for name in names if _INNER.search(name) is None]


def _votes_of_others(
    sublayers: Iterable[NamedSublayer], sizes: Mapping[str, Shape], candidates: Collection[int]
) -> Counter[int]:
    """Return how many tensors in or around a layer have each candidate as their last size.

    Gains of norms and biases of outputs have the width, and so has an embedding.

    Args:
        sublayers: of the layer.
        sizes: shape of every tensor, by name.
        candidates: the sizes to count.
    """
    # 1. The modules of the layer.
    paths = set[str]()
    for name in chain.from_iterable(sublayer.roles for sublayer in sublayers):
        paths.update(_numbered_paths(name))

    # 2. Tensors in these modules, or outside all layers.
    votes: Counter[int] = Counter()
    for name, shape in sizes.items():
        own_paths = _numbered_paths(name)
        is_in_other_layer = bool(own_paths) and paths.isdisjoint(own_paths)
        if is_in_other_layer or _INNER.search(name):
            continue

        # 3. Their last size. A scalar has none.
        votes.update(shape[-1:])

    return Counter({size: votes[size] for size in votes if size in candidates})


def _most_frequent(votes: Counter[int]) -> list[int]:
    """Return the sizes with the most votes."""
    most = max(votes.values(), default=0)
    return [size for size, count in votes.items() if count == most]


def _is_split_by_heads(sublayer: NamedSublayer, shape: Shape) -> bool:
    """Return whether a matrix of an attention is stored by heads: XLNet's (d, H, d_head)."""
    return len(shape) == 3 and "attention" in sublayer.kind


def _sides(shape: Shape) -> tuple[int, int]:
    """Return the two sizes of a linear map: (out, in) as `nn.Linear` and `nn.Conv*d` store it.

    For a stack of experts these are the sizes of one of them.
    """
    # 1. A matrix, or a stack of them.
    if not _is_kernel(shape):
        return shape[-2], shape[-1]

    # 2. The kernel of a convolution. A depthwise one makes as many channels as it reads.
    is_depthwise = shape[1] == 1
    if is_depthwise:
        return shape[0], shape[0]

    return shape[0], shape[1]


def _is_kernel(shape: Shape) -> bool:
    """Return whether a tensor is the kernel of a convolution."""
    if len(shape) >= 4:
        return True

    # One over a sequence is short, and a stack of matrices is not.
    return len(shape) == 3 and shape[-1] <= 4 < shape[0]


def _mark_fused_gates(
    sublayer: NamedSublayer, sizes: Mapping[str, Shape], width: int | None
) -> None:
    """Turn W_1 into W_gate_up where it makes twice the features that W_2 reads (Megatron)."""
    # 1. A gate of its own leaves nothing to fuse.
    outputs = _names_of(sublayer, "W_2")
    if width is None or not outputs:
        return
    if _names_of(sublayer, "W_gate"):
        return

    # 2. How many features W_2 reads.
    hidden = _other_side(sizes[outputs[0]], width)
    for name in _names_of(sublayer, "W_1"):
        if _other_side(sizes[name], width) == 2 * hidden:
            sublayer.roles[name] = "W_gate_up"


def _names_of(sublayer: NamedSublayer, role: str) -> list[str]:
    """Return the matrices of a sub-layer that have a role."""
    return [name for name in sublayer.roles if sublayer.roles[name] == role]


def _other_side(shape: Shape, width: int) -> int:
    """Return the size of a matrix that is not the width; the width for a square one."""
    rows, columns = _sides(shape)
    if rows == width:
        return columns

    return rows


# -- Step 5: every weight --------------------------------------------------------------------------
def _describe_weights(
    sizes: Mapping[str, Shape], sublayers: Sequence[NamedSublayer], width: int | None
) -> dict[str, NamedWeight]:
    """Return the description of every weight, by name."""
    # 1. The sub-layer of each matrix that lies in one.
    sublayer_of: dict[str, NamedSublayer] = {}
    for sublayer in sublayers:
        sublayer_of |= dict.fromkeys(sublayer.roles, sublayer)

    # 2. Every weight.
    layer_of_path = _layers_by_path(sublayers)
    weights = {}
    for name, shape in sizes.items():
        if name in sublayer_of:
            weights[name] = _describe_inside(name, shape, sublayer_of[name], width)
        else:
            weights[name] = _describe_outside(name, shape, layer_of_path, width)

    return weights


def _describe_inside(
    name: str, shape: Shape, sublayer: NamedSublayer, width: int | None
) -> NamedWeight:
    """Return the description of a matrix of a sub-layer."""
    role = sublayer.roles[name]
    fan_in, fan_out = fans_of(role, shape, width)
    # The sizes of a head are neither.
    if _is_split_by_heads(sublayer, shape):
        fan_in, fan_out = None, None
    return NamedWeight(
        role,
        layer=sublayer.layer,
        stack=sublayer.stack,
        kind=sublayer.kind,
        sublayer=sublayer.name,
        fan_in=fan_in,
        fan_out=fan_out,
    )


def _describe_outside(
    name: str, shape: Shape, layer_of_path: Mapping[str, tuple[int, str]], width: int | None
) -> NamedWeight:
    """Return the description of a vector, or of a matrix outside all sub-layers."""
    layer, stack = _layer_around(name, layer_of_path)
    role = role_outside(name, shape, layer is not None)
    fan_in, fan_out = None, None
    if is_matrix(name, shape):
        fan_in, fan_out = fans_of(role, shape, width)
    return NamedWeight(role, layer, stack, fan_in=fan_in, fan_out=fan_out)


def _layers_by_path(sublayers: Sequence[NamedSublayer]) -> dict[str, tuple[int, str]]:
    """Return the layer and the stack of every numbered module path that lies in one layer only."""
    # 1. All layers that each path leads to.
    layers_of_path: dict[str, set[tuple[int, str]]] = {}
    for sublayer in sublayers:
        layer = (sublayer.layer, sublayer.stack)
        paths = chain.from_iterable(map(_numbered_paths, sublayer.roles))
        for path in paths:
            layers_of_path.setdefault(path, set()).add(layer)

    # 2. The path of a stack leads to several.
    only_layer = {}
    for path, layers in layers_of_path.items():
        if len(layers) == 1:
            only_layer[path] = layers.pop()

    return only_layer


def _layer_around(
    name: str, layer_of_path: Mapping[str, tuple[int, str]]
) -> tuple[int | None, str]:
    """Return the layer and the stack of the innermost module around a parameter that is known."""
    for path in reversed(_numbered_paths(name)):
        if path in layer_of_path:
            return layer_of_path[path]

    # Outside all layers.
    return None, ""


def _numbered_paths(name: str) -> list[str]:
    """Return the paths of the numbered modules that a parameter lies in, outer first."""
    tokens = name.split(".")
    paths = []
    for position, token in enumerate(tokens[:-1]):
        if _NUMBERED.fullmatch(token):
            path = tokens[: position + 1]
            paths.append(".".join(path))

    return paths


def role_outside(name: str, shape: Shape, in_layer: bool) -> str:
    """Return the role of a vector, or of a matrix outside all sub-layers.

    Args:
        name: of the parameter.
        shape: as stored.
        in_layer: whether it lies in a module of a layer.
    """
    if len(shape) < 2:
        return _role_of_vector(name)
    if not is_matrix(name, shape):
        return ""

    # 1. Embeddings, heads and projections lie outside all numbered modules.
    path = name.removesuffix(".weight")
    is_numbered = in_layer or _end_of_block(path.split(".")) > 0
    rules = list(_ANYWHERE_RULES)
    if not is_numbered:
        rules += _OUTSIDE_RULES

    # 2. The first rule that holds.
    for role, words in rules:
        if re.search(words, path):
            return role

    return ""


def _role_of_vector(name: str) -> str:
    """Return the role of a vector: bias, scale, norm_gain, or "" if its name says none."""
    if name.endswith(("bias", "beta")):
        return "bias"

    # A norm may call its gain a scale.
    is_of_norm = _GAIN.search(name) is not None
    if is_of_norm and name.endswith(("weight", "gamma", "scale", ".g")):
        return "norm_gain"

    if not is_of_norm and _SCALE.search(name):
        return "scale"

    return ""


def fans_of(role: str, shape: Shape, width: int | None) -> tuple[int | None, int | None]:
    """Return fan-in and fan-out. The role says which is which: a matrix may be stored either way.

    Args:
        role: of the matrix.
        shape: as stored.
        width: features of the stream.

    Example:
        >>> fans_of("W_2", (16, 64), 16), fans_of("W_2", (64, 16), 16)
        ((64, 16), (64, 16))
    """
    # 1. What is no linear map, or a table.
    if not role or len(shape) < 2:
        return None, None
    if role in ("embedding", "positions"):
        return shape[-2], shape[-1]

    # 2. Without one side that is the width, the order is that of `nn.Linear`.
    rows, columns = _sides(shape)
    one_side_is_width = (rows == width) != (columns == width)
    if width is None or not one_side_is_width:
        return columns, rows

    # 3. The width is where a matrix reads or writes the stream.
    other = _other_side(shape, width)
    writes_stream = role in ("W_O", "W_2")
    if writes_stream:
        return other, width

    return width, other
