"""The default inits of torch.nn, x-transformers and peft: models that nobody initialised by
hand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

WIDTH, HEADS, VOCABULARY, LENGTH = 64, 4, 256, 16


@dataclass(frozen=True)
class Fresh:
    """A model as its library left it, and the arguments of one forward."""

    model: nn.Module
    inputs: dict[str, Any] | Tensor | tuple[Tensor, ...]


def _ids(batch: int = 2) -> Tensor:
    return torch.randint(VOCABULARY, (batch, LENGTH))


# -- torch.nn --------------------------------------------------------------------------------------
class TokenEncoder(nn.Module):
    """Embedding, positions that start at zero, torch's own encoder, head."""

    def __init__(self, *, norm_first: bool, layers: int = 6, redraw: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(torch.zeros(1, 2 * LENGTH, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, batch_first=True, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        if redraw:  # nn.TransformerEncoder copies one layer, its weights included
            redraw_layers(self.encoder)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) * WIDTH**0.5 + self.position[:, : ids.shape[1]]
        return self.head(self.encoder(x))


class TokenDecoder(nn.Module):
    """Embedding, torch's own decoder with cross-attention to a memory, head."""

    def __init__(self, *, norm_first: bool, layers: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerDecoderLayer(
            WIDTH, HEADS, 4 * WIDTH, batch_first=True, norm_first=norm_first
        )
        self.decoder = nn.TransformerDecoder(layer, layers)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        redraw_layers(self.decoder)

    def forward(self, ids: Tensor, memory: Tensor) -> Tensor:
        return self.head(self.decoder(self.embedding(ids), memory))


class Translator(nn.Module):
    """Two embeddings, nn.Transformer, which draws every matrix from Xavier, head."""

    def __init__(self, *, norm_first: bool) -> None:
        super().__init__()
        self.source = nn.Embedding(VOCABULARY, WIDTH)
        self.target = nn.Embedding(VOCABULARY, WIDTH)
        self.transformer = nn.Transformer(
            WIDTH, HEADS, 3, 3, 4 * WIDTH, batch_first=True, norm_first=norm_first
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.head(self.transformer(self.source(source), self.target(target)))


class AttentionBlocks(nn.Module):
    """Blocks of nn.MultiheadAttention and an FFN, with the options of the attention."""

    def __init__(self, *, norm_first: bool, layers: int = 4, **options: Any) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.attentions = nn.ModuleList(
            nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options) for _ in range(layers)
        )
        self.ffns = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
            for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2 * layers))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.outer_width = options.get("kdim", WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for index, (attention, ffn) in enumerate(zip(self.attentions, self.ffns, strict=True)):
            first, second = self.norms[2 * index], self.norms[2 * index + 1]
            if self.norm_first:
                x = x + self._attend(attention, first(x))
                x = x + ffn(second(x))
            else:
                x = first(x + self._attend(attention, x))
                x = second(x + ffn(x))
        return self.head(x)

    def _attend(self, attention: nn.Module, x: Tensor) -> Tensor:
        memory = torch.cat([x, x], dim=-1)[..., : self.outer_width]
        return attention(x, memory, memory, need_weights=False)[0]


def redraw_layers(stack: nn.Module) -> None:
    """Draw every layer anew by the code that drew it first."""
    for module in stack.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
        elif isinstance(module, nn.MultiheadAttention):
            module._reset_parameters()


def _encoder(norm_first: bool) -> Fresh:
    return Fresh(TokenEncoder(norm_first=norm_first), _ids())


def _copied_encoder() -> Fresh:
    return Fresh(TokenEncoder(norm_first=True, redraw=False), _ids())


def _decoder(norm_first: bool) -> Fresh:
    return Fresh(TokenDecoder(norm_first=norm_first), (_ids(), torch.randn(2, LENGTH, WIDTH)))


def _translator(norm_first: bool) -> Fresh:
    return Fresh(Translator(norm_first=norm_first), (_ids(), _ids()))


def _attention(norm_first: bool, **options: Any) -> Fresh:
    return Fresh(AttentionBlocks(norm_first=norm_first, **options), _ids())


TORCH: dict[str, Callable[[], Fresh]] = {
    "encoder, pre-norm": lambda: _encoder(True),
    "encoder, post-norm": lambda: _encoder(False),
    "encoder, one layer copied": _copied_encoder,
    "decoder, pre-norm": lambda: _decoder(True),
    "decoder, post-norm": lambda: _decoder(False),
    "nn.Transformer, pre-norm": lambda: _translator(True),
    "nn.Transformer, post-norm": lambda: _translator(False),
    "attention, pre-norm": lambda: _attention(True),
    "attention, post-norm": lambda: _attention(False),
    "attention without bias": lambda: _attention(True, bias=False),
    "attention, keys of another width": lambda: _attention(True, kdim=96, vdim=96),
    "attention with bias_kv": lambda: _attention(True, add_bias_kv=True),
}


# -- x-transformers --------------------------------------------------------------------------------
def _decoder_of_x(**options: Any) -> Fresh:
    import x_transformers

    outer = {key: options.pop(key) for key in list(options) if key in _OUTER}
    layers = x_transformers.Decoder(dim=WIDTH, depth=4, heads=HEADS, attn_dim_head=16, **options)
    model = x_transformers.TransformerWrapper(
        num_tokens=VOCABULARY, max_seq_len=2 * LENGTH, attn_layers=layers, **outer
    )
    return Fresh(model.eval(), _ids())


def _vision_of_x() -> Fresh:
    import x_transformers

    layers = x_transformers.Encoder(dim=WIDTH, depth=4, heads=HEADS, attn_dim_head=16)
    model = x_transformers.ViTransformerWrapper(
        image_size=32, patch_size=8, num_classes=10, attn_layers=layers
    )
    return Fresh(model.eval(), torch.randn(2, 3, 32, 32))


def _pair_of_x() -> Fresh:
    import x_transformers

    sizes = {"num_tokens": VOCABULARY, "depth": 3, "heads": HEADS, "max_seq_len": 2 * LENGTH}
    options = {f"{side}_{key}": value for side in ("enc", "dec") for key, value in sizes.items()}
    return Fresh(x_transformers.XTransformer(dim=WIDTH, **options).eval(), (_ids(), _ids()))


_OUTER = {
    "tie_embedding",
    "scaled_sinu_pos_emb",
    "num_memory_tokens",
    "emb_frac_gradient",
    "post_emb_norm",
    "emb_dim",
    "use_abs_pos_emb",
    "l2norm_embed",
}
X_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "post-norm": {"pre_norm": False},
    "sandwich norm": {"sandwich_norm": True},
    "Llama-like": {"use_rmsnorm": True, "rotary_pos_emb": True, "ff_glu": True, "ff_swish": True},
    "zero branch outputs": {"zero_init_branch_output": True},
    "LayerScale": {"use_layerscale": True},
    "learned scale of the residual": {"scale_residual": True},
    "macaron": {"macaron": True},
    "grouped queries": {"attn_kv_heads": 2},
    "gated values": {"attn_gate_values": True},
    "tied embedding": {"tie_embedding": True},
    "memory tokens": {"num_memory_tokens": 4},
    "normalised embedding": {"l2norm_embed": True},
    "embedding of another width": {"emb_dim": 32},
    "alibi": {"alibi_pos_bias": True, "alibi_num_heads": 2},
    "relative positions": {"rel_pos_bias": True},
    "deep norm": {"pre_norm": False, "residual_attn": True},
    "qk norm": {"attn_qk_norm": True, "attn_qk_norm_dim_scale": True},
    "talking heads": {"attn_pre_talking_heads": True},
    "memory of keys and values": {"attn_num_mem_kv": 4},
    "swiglu without bias": {"ff_glu": True, "ff_swish": True, "ff_no_bias": True},
    "relu squared": {"ff_relu_squared": True},
}
X_TRANSFORMERS: dict[str, Callable[[], Fresh]] = {
    **{
        name: (lambda options=options: _decoder_of_x(**options))
        for name, options in X_OPTIONS.items()
    },
    "vision": _vision_of_x,
    "encoder and decoder": _pair_of_x,
}


# -- peft ------------------------------------------------------------------------------------------
def _adapted(name: str, **options: Any) -> Fresh:
    import peft
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=WIDTH,
        num_hidden_layers=4,
        num_attention_heads=HEADS,
        vocab_size=VOCABULARY,
        intermediate_size=160,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    base = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    targets = options.pop("target_modules", ["q_proj", "v_proj", "up_proj", "down_proj"])
    settings = getattr(peft, name)(target_modules=targets, **options)
    return Fresh(peft.get_peft_model(base, settings).eval(), {"input_ids": _ids()})


PEFT: dict[str, Callable[[], Fresh]] = {
    "LoRA": lambda: _adapted("LoraConfig", r=8),
    "LoRA, gaussian": lambda: _adapted("LoraConfig", r=8, init_lora_weights="gaussian"),
    "LoRA, every linear": lambda: _adapted("LoraConfig", r=8, target_modules="all-linear"),
    "DoRA": lambda: _adapted("LoraConfig", r=8, use_dora=True),
    "AdaLoRA": lambda: _adapted("AdaLoraConfig", total_step=10),
    "(IA)3": lambda: _adapted("IA3Config", feedforward_modules=["up_proj", "down_proj"]),
    "LoHa": lambda: _adapted("LoHaConfig", r=8),
    "VeRA": lambda: _adapted("VeraConfig", r=8, target_modules=["q_proj"]),
}

LIBRARIES: dict[str, dict[str, Callable[[], Fresh]]] = {
    "torch": TORCH,
    "x-transformers": X_TRANSFORMERS,
    "peft": PEFT,
}


def build(library: str, name: str, seed: int) -> Fresh:
    """Build one model of a library with a seed; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = LIBRARIES[library][name]()
    return Fresh(fresh.model.eval(), copy.deepcopy(fresh.inputs))
