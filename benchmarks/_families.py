"""Small models at their own init: families of transformers, recipes of the paper, and schemes
written onto a Llama.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from jacdiag.sources import gpt

_SIZES = {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 256}
_GATED = {**_SIZES, "intermediate_size": 160, "num_key_value_heads": 2, "head_dim": 16}
_IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2Config",
        {"n_layer": 4, "n_embd": 64, "n_head": 4, "vocab_size": 256, "n_positions": 32},
    ),
    "llama": ("LlamaConfig", _GATED),
    "gpt_neox": ("GPTNeoXConfig", {**_SIZES, "intermediate_size": 256}),
    "opt": (
        "OPTConfig",
        {**_SIZES, "ffn_dim": 256, "max_position_embeddings": 64, "word_embed_proj_dim": 64},
    ),
    "bloom": ("BloomConfig", {"n_layer": 4, "hidden_size": 64, "n_head": 4, "vocab_size": 256}),
    "olmo2": ("Olmo2Config", {**_SIZES, "intermediate_size": 160}),
    "t5": (
        "T5Config",
        {
            "num_layers": 3,
            "d_model": 64,
            "d_kv": 24,
            "d_ff": 200,
            "num_heads": 4,
            "vocab_size": 256,
            "decoder_start_token_id": 0,
        },
    ),
    "gemma": ("GemmaConfig", _GATED),
}
RECIPES = ("vanilla", "xavier", "embed-detach", "embed-ln", "scaled-embed", "gpt2")


@dataclass(frozen=True)
class Subject:
    """A model and its probe."""

    model: nn.Module
    probe: dict[str, Any] | torch.Tensor


def family(name: str, seed: int, model_type: str | None = None) -> Subject:
    """A family of transformers, randomly initialised by transformers itself."""
    import transformers

    kind, sizes = CONFIGS[name]
    config = getattr(transformers, kind)(**{**_IDS, **sizes})
    torch.manual_seed(seed)
    if name == "t5":
        model = transformers.T5ForConditionalGeneration._from_config(
            config, attn_implementation="eager"
        )
    else:
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    ids = torch.randint(3, 256, (2, 24), generator=torch.Generator().manual_seed(seed))
    return Subject(
        model, {"input_ids": ids, "decoder_input_ids": ids} if name == "t5" else {"input_ids": ids}
    )


def recipe(name: str, seed: int, layers: int = 4, width: int = 64) -> Subject:
    """The reference GPT by a recipe of the paper."""
    torch.manual_seed(seed)
    model = gpt.build(name, n_layer=layers, n_embd=width, n_head=4, vocab_size=256, block_size=64)
    return Subject(
        model, torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(seed))
    )


Std = Callable[[str, int, torch.Tensor], float]


def _torchtitan(role: str, layer: int, w: torch.Tensor) -> float:
    if role in ("o_proj", "up_proj", "down_proj"):
        return 0.02 / math.sqrt(2 * (layer + 1))
    return {"embed_tokens": 1.0, "lm_head": w.shape[-1] ** -0.5}.get(role, 0.02)


def _pytorch(role: str, layer: int, w: torch.Tensor) -> float:
    return 1.0 if role == "embed_tokens" else 1 / math.sqrt(3 * w.shape[-1])


def _small_init(role: str, layer: int, w: torch.Tensor) -> float:
    s = math.sqrt(2 / (5 * 64))
    return s / math.sqrt(2 * 4) if role in ("o_proj", "down_proj") else s


def _neox(role: str, layer: int, w: torch.Tensor) -> float:
    return 2 / (4 * math.sqrt(64)) if role in ("o_proj", "down_proj") else math.sqrt(2 / (5 * 64))


def _xavier(role: str, layer: int, w: torch.Tensor) -> float:
    return math.sqrt(2 / sum(w.shape))


def _deepnorm(role: str, layer: int, w: torch.Tensor) -> float:
    gain = 1.0 if role in ("q_proj", "k_proj") else (8 * 4) ** -0.25
    return gain * math.sqrt(2 / sum(w.shape))


def _own(role: str, layer: int, w: torch.Tensor) -> float:
    return 0.013 / math.sqrt(2 * 4) if role in ("o_proj", "down_proj") else 0.013


SCHEMES: dict[str, Std] = {
    "torchtitan-depth": _torchtitan,
    "pytorch": _pytorch,
    "small-init": _small_init,
    "neox": _neox,
    "xavier": _xavier,
    "deepnorm": _deepnorm,
    "own-depth": _own,
}


def written(name: str, seed: int) -> Subject:
    """A Llama that says of itself no known family, with a scheme written onto it."""
    subject = family("llama", seed)
    subject.model.config.model_type = "of-nobody"  # type: ignore[union-attr]
    for parameter, weight in subject.model.named_parameters():
        if weight.dim() == 2:
            parts = parameter.split(".")
            layer = next((int(p) for p in parts if p.isdigit()), 0)
            draw(weight, SCHEMES[name](parts[-2], layer, weight), uniform=name == "pytorch")
    return subject


@torch.no_grad()
def draw(weight: torch.Tensor, std: float, uniform: bool = False) -> None:
    """Draws a weight anew."""
    if uniform:
        weight.uniform_(-math.sqrt(3) * std, math.sqrt(3) * std)
    else:
        weight.normal_(0.0, std)
