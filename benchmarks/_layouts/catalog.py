"""The layouts: what each published repository has that a freshly saved model has not.

They are imitated from what is known of the published files. No file was downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from _layouts.edits import Edit, Files, add, beside, cast, copy, drop, keep, rename

SAFE, BIN = Files(), Files(kind="bin")
SAFE_SHARDS, BIN_SHARDS = Files(shards=3), Files(kind="bin", shards=2)
F16, BF16 = cast(torch.float16), cast(torch.bfloat16)
LEGACY_NORMS = (
    rename(r"LayerNorm\.weight", "LayerNorm.gamma"),
    rename(r"LayerNorm\.bias", "LayerNorm.beta"),
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One published repository.

    Attributes:
        name: the repository.
        task, family: which tiny config of the coverage benchmark is used.
        saved: the class whose weights the files hold.
        opened: the class that the config names, where it is another one; "" where it names none.
        loaded_as: the class that must come out, where the config names none.
        edits: changes of the weights, in order.
        files: how they are stored.
        config: fields of the config to set; None removes one.
        note: what a note of the report must say, where something is left out.
        shows: what is special about the layout.
        others: files that lie next to the weights.
        count: the number of sub-layers, where the config does not tell it.
    """

    name: str
    task: str
    family: str
    saved: str
    opened: str | None = None
    loaded_as: str = ""
    edits: tuple[Edit, ...] = ()
    files: Files = SAFE
    config: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    shows: str = ""
    others: tuple[str, ...] = ()
    count: int | None = None


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A folder that cannot be opened as it is, and what the error must say."""

    name: str
    files: dict[str, str]
    edits: tuple[Edit, ...] = ()
    says: tuple[str, ...] = ()


def position_ids(name: str) -> Edit:
    return add(name, 1, 64, dtype=torch.int64)


MASKED = [
    Layout(
        name="bert-base-uncased",
        task="masked-lm",
        family="bert",
        saved="BertForPreTraining",
        opened="BertForMaskedLM",
        note="cls.seq_relationship",
        edits=(
            *LEGACY_NORMS,
            drop(r"predictions\.decoder"),
            position_ids("bert.embeddings.position_ids"),
        ),
        shows="norms called gamma and beta, two more heads, a pooler, position_ids, no decoder",
    ),
    Layout(
        name="bert-base-uncased (.bin)",
        task="masked-lm",
        family="bert",
        saved="BertForPreTraining",
        opened="BertForMaskedLM",
        note="bert.pooler",
        files=BIN,
        edits=LEGACY_NORMS,
        shows="the same as a pickle, the decoder stored too",
    ),
    Layout(
        name="bert-base-multilingual-cased, as BertModel",
        task="masked-lm",
        family="bert",
        saved="BertForPreTraining",
        opened="BertModel",
        note="cls.predictions",
        edits=LEGACY_NORMS,
        shows="a file with heads, opened without them",
    ),
    Layout(
        name="sentence-transformers/all-MiniLM-L6-v2",
        task="masked-lm",
        family="bert",
        saved="BertModel",
        edits=(position_ids("embeddings.position_ids"),),
        shows="no prefix of the base model, position_ids",
    ),
    Layout(
        name="bert (no model_type)",
        task="masked-lm",
        family="bert",
        saved="BertForPreTraining",
        opened="BertForMaskedLM",
        config={"model_type": None},
        edits=LEGACY_NORMS,
        note="no model_type",
        shows="a config from before model_type",
    ),
    Layout(
        name="roberta-base",
        task="masked-lm",
        family="roberta",
        saved="RobertaForMaskedLM",
        note="roberta.pooler",
        edits=(
            add("roberta.pooler.dense.weight", 32, 32),
            add("roberta.pooler.dense.bias", 32),
            position_ids("roberta.embeddings.position_ids"),
            drop(r"lm_head\.decoder"),
        ),
        shows="a pooler that the class lacks, no decoder",
    ),
    Layout(
        name="roberta-base (.bin)",
        task="masked-lm",
        family="roberta",
        saved="RobertaForMaskedLM",
        files=BIN,
        edits=(add("roberta.pooler.dense.weight", 32, 32), add("roberta.pooler.dense.bias", 32)),
        note="roberta.pooler",
        shows="tied decoder and bias stored twice",
    ),
    Layout(
        name="xlm-roberta-base",
        task="masked-lm",
        family="xlm-roberta",
        saved="XLMRobertaForMaskedLM",
        edits=(add("roberta.pooler.dense.weight", 32, 32), drop(r"lm_head\.decoder")),
        note="roberta.pooler",
        shows="a pooler that the class lacks",
    ),
    Layout(
        name="camembert-base",
        task="masked-lm",
        family="camembert",
        saved="CamembertForMaskedLM",
        files=BIN,
        edits=(position_ids("roberta.embeddings.position_ids"),),
        shows="a pickle with the prefix of another family",
    ),
    Layout(
        name="distilbert-base-uncased",
        task="masked-lm",
        family="distilbert",
        saved="DistilBertForMaskedLM",
        edits=(drop("vocab_projector.weight"),),
        shows="the tied projection absent",
    ),
    Layout(
        name="albert-base-v2",
        task="masked-lm",
        family="albert",
        saved="AlbertForPreTraining",
        opened="AlbertForMaskedLM",
        note="albert.pooler",
        shows="a pooler and a head more",
    ),
    Layout(
        name="google/electra-small-discriminator",
        task="masked-lm",
        family="electra",
        saved="ElectraForPreTraining",
        edits=(position_ids("electra.embeddings.position_ids"),),
        files=BIN,
        shows="a discriminator, position_ids",
    ),
    Layout(
        name="microsoft/deberta-base",
        task="masked-lm",
        family="deberta",
        saved="DebertaModel",
        opened="",
        loaded_as="DebertaModel",
        files=BIN,
        note="lm_predictions",
        edits=(rename("^", "deberta."), add("lm_predictions.lm_head.dense.weight", 32, 32)),
        shows="a config without architectures, a head of its own",
    ),
    Layout(
        name="microsoft/deberta-v3-base",
        task="masked-lm",
        family="deberta-v2",
        saved="DebertaV2Model",
        opened="",
        loaded_as="DebertaV2Model",
        files=BIN,
        note="mask_predictions",
        edits=(rename("^", "deberta."), add("mask_predictions.dense.weight", 32, 32), F16),
        shows="float16, no architectures",
    ),
    Layout(
        name="microsoft/mpnet-base",
        task="masked-lm",
        family="mpnet",
        saved="MPNetForMaskedLM",
        files=BIN,
        edits=(
            position_ids("mpnet.embeddings.position_ids"),
            add("mpnet.pooler.dense.weight", 32, 32),
        ),
        note="mpnet.pooler",
        shows="a pooler that the class lacks",
    ),
    Layout(
        name="answerdotai/ModernBERT-base",
        task="masked-lm",
        family="modernbert",
        saved="ModernBertForMaskedLM",
        edits=(drop(r"^decoder\.weight"),),
        shows="the tied decoder absent",
    ),
    Layout(
        name="xlnet-base-cased",
        task="causal-lm",
        family="xlnet",
        saved="XLNetLMHeadModel",
        files=BIN,
        shows="names with `loss` that are weights",
    ),
]

CAUSAL = [
    Layout(
        name="gpt2",
        task="causal-lm",
        family="gpt2",
        saved="GPT2LMHeadModel",
        edits=(
            drop("^lm_head"),
            rename(r"^transformer\.", ""),
            beside(r"attn\.c_attn\.weight$", "attn.bias", 1, 1, 64, 64),
        ),
        shows="no prefix, causal masks stored, no head",
    ),
    Layout(
        name="distilgpt2 (.bin)",
        task="causal-lm",
        family="gpt2",
        saved="GPT2LMHeadModel",
        files=BIN,
        edits=(
            beside(r"attn\.c_attn\.weight$", "attn.bias", 1, 1, 64, 64, dtype=torch.uint8),
            beside(r"attn\.c_attn\.weight$", "attn.masked_bias"),
        ),
        note="attn.masked_bias",
        shows="attn.bias in bytes and attn.masked_bias, the tied head stored",
    ),
    Layout(
        name="gpt2 (no model_type, no architectures)",
        task="causal-lm",
        family="gpt2",
        saved="GPT2LMHeadModel",
        opened="",
        loaded_as="GPT2LMHeadModel",
        config={"model_type": None},
        note="no model_type",
        edits=(drop("^lm_head"), rename(r"^transformer\.", "")),
        shows="a config that names nothing",
    ),
    Layout(
        name="microsoft/DialoGPT-small",
        task="causal-lm",
        family="gpt2",
        saved="GPT2LMHeadModel",
        files=BIN,
        edits=(F16, beside(r"attn\.c_attn\.weight$", "attn.bias", 1, 1, 64, 64)),
        shows="float16 with masks in float32",
    ),
    Layout(
        name="openai-gpt",
        task="causal-lm",
        family="openai-gpt",
        saved="OpenAIGPTLMHeadModel",
        edits=(drop("^lm_head"), rename(r"^transformer\.", "")),
        shows="no prefix, no head",
    ),
    Layout(
        name="facebook/opt-125m",
        task="causal-lm",
        family="opt",
        saved="OPTForCausalLM",
        files=BIN,
        edits=(F16,),
        shows="a pickle in float16, the tied head stored",
    ),
    Layout(
        name="facebook/opt-1.3b",
        task="causal-lm",
        family="opt",
        saved="OPTForCausalLM",
        files=BIN_SHARDS,
        edits=(F16, drop("^lm_head"), rename(r"^model\.", "")),
        shows="no prefix, two shards",
    ),
    Layout(
        name="bigscience/bloom-560m",
        task="causal-lm",
        family="bloom",
        saved="BloomForCausalLM",
        edits=(F16, drop("^lm_head"), rename(r"^transformer\.", "")),
        shows="no prefix, no head, float16",
    ),
    Layout(
        name="EleutherAI/gpt-neo-125m",
        task="causal-lm",
        family="gpt_neo",
        saved="GPTNeoForCausalLM",
        edits=(
            drop("^lm_head"),
            beside(
                r"attention\.q_proj\.weight$", "attention.bias", 1, 1, 64, 64, dtype=torch.uint8
            ),
            beside(r"attention\.q_proj\.weight$", "attention.masked_bias"),
        ),
        note="attn.attention.bias",
        shows="masks in bytes, masked_bias",
    ),
    Layout(
        name="EleutherAI/gpt-j-6b",
        task="causal-lm",
        family="gptj",
        saved="GPTJForCausalLM",
        files=BIN,
        edits=(
            F16,
            beside(r"attn\.q_proj\.weight$", "attn.bias", 1, 1, 64, 64, dtype=torch.bool),
            beside(r"attn\.q_proj\.weight$", "attn.masked_bias"),
        ),
        shows="masks as booleans, float16",
    ),
    Layout(
        name="EleutherAI/pythia-160m",
        task="causal-lm",
        family="gpt_neox",
        saved="GPTNeoXForCausalLM",
        edits=(
            F16,
            beside(r"attention\.dense\.weight$", "attention.rotary_emb.inv_freq", 4),
            beside(r"attention\.dense\.weight$", "attention.bias", 1, 1, 64, 64, dtype=torch.bool),
            beside(r"attention\.dense\.weight$", "attention.masked_bias"),
        ),
        shows="rotary tables and masks per layer",
    ),
    Layout(
        name="EleutherAI/gpt-neox-20b",
        task="causal-lm",
        family="gpt_neox",
        saved="GPTNeoXForCausalLM",
        files=SAFE_SHARDS,
        edits=(F16, beside(r"attention\.dense\.weight$", "attention.masked_bias")),
        shows="three shards with an index",
    ),
    Layout(
        name="Salesforce/codegen-350M-mono",
        task="causal-lm",
        family="codegen",
        saved="CodeGenForCausalLM",
        files=BIN,
        edits=(
            F16,
            beside(r"attn\.qkv_proj\.weight$", "attn.causal_mask", 1, 1, 64, 64, dtype=torch.uint8),
        ),
        shows="causal_mask per layer",
    ),
    Layout(
        name="meta-llama/Llama-2-7b-hf",
        task="causal-lm",
        family="llama",
        saved="LlamaForCausalLM",
        files=SAFE_SHARDS,
        edits=(F16, beside(r"self_attn\.o_proj\.weight$", "self_attn.rotary_emb.inv_freq", 4)),
        others=("pytorch_model.bin.index.json", "tf_model.h5.index.json"),
        shows="shards, rotary tables per layer, the index of files that are not there",
    ),
    Layout(
        name="huggyllama/llama-7b (.bin)",
        task="causal-lm",
        family="llama",
        saved="LlamaForCausalLM",
        files=BIN_SHARDS,
        edits=(F16, beside(r"self_attn\.o_proj\.weight$", "self_attn.rotary_emb.inv_freq", 4)),
        shows="two pickles with an index",
    ),
    Layout(
        name="meta-llama/Llama-3.2-1B",
        task="causal-lm",
        family="llama",
        saved="LlamaForCausalLM",
        config={"tie_word_embeddings": True},
        edits=(BF16, drop("^lm_head")),
        shows="tied, no head, bfloat16",
    ),
    Layout(
        name="mistralai/Mistral-7B-v0.1",
        task="causal-lm",
        family="mistral",
        saved="MistralForCausalLM",
        files=SAFE_SHARDS,
        edits=(BF16,),
        others=("consolidated.safetensors",),
        shows="shards next to the authors' own file",
    ),
    Layout(
        name="mistralai/Mixtral-8x7B-v0.1",
        task="causal-lm",
        family="mixtral",
        saved="MixtralForCausalLM",
        files=SAFE_SHARDS,
        edits=(BF16,),
        shows="experts one by one, in three shards",
    ),
    Layout(
        name="Qwen/Qwen2-0.5B",
        task="causal-lm",
        family="qwen2",
        saved="Qwen2ForCausalLM",
        config={"tie_word_embeddings": True},
        edits=(BF16, drop("^lm_head")),
        shows="tied, biases of Q, K and V",
    ),
    Layout(
        name="Qwen/Qwen2-7B",
        task="causal-lm",
        family="qwen2",
        saved="Qwen2ForCausalLM",
        files=SAFE_SHARDS,
        edits=(BF16,),
        shows="shards",
    ),
    Layout(
        name="Qwen/Qwen3-0.6B",
        task="causal-lm",
        family="qwen3",
        saved="Qwen3ForCausalLM",
        config={"tie_word_embeddings": True},
        edits=(BF16, copy("model.embed_tokens.weight", "lm_head.weight")),
        shows="tied, and the head stored too",
    ),
    Layout(
        name="google/gemma-2b",
        task="causal-lm",
        family="gemma",
        saved="GemmaForCausalLM",
        files=SAFE_SHARDS,
        edits=(BF16, drop("^lm_head")),
        shows="tied, shards",
    ),
    Layout(
        name="google/gemma-2-2b",
        task="causal-lm",
        family="gemma2",
        saved="Gemma2ForCausalLM",
        edits=(cast(torch.float32), drop("^lm_head")),
        shows="tied, four norms per layer",
    ),
    Layout(
        name="microsoft/phi-2",
        task="causal-lm",
        family="phi",
        saved="PhiForCausalLM",
        files=SAFE_SHARDS,
        edits=(F16,),
        shows="parallel branches, shards",
    ),
    Layout(
        name="microsoft/Phi-3-mini-4k-instruct",
        task="causal-lm",
        family="phi3",
        saved="Phi3ForCausalLM",
        config={"auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}},
        edits=(BF16,),
        shows="fused matrices, code of its own in auto_map",
    ),
    Layout(
        name="tiiuae/falcon-7b",
        task="causal-lm",
        family="falcon",
        saved="FalconForCausalLM",
        files=BIN_SHARDS,
        edits=(BF16,),
        config={"auto_map": {"AutoModel": "modeling_falcon.FalconModel"}},
        shows="pickles, code of its own in auto_map",
    ),
    Layout(
        name="mosaicml/mpt-7b",
        task="causal-lm",
        family="mpt",
        saved="MptForCausalLM",
        opened="MPTForCausalLM",
        loaded_as="MptForCausalLM",
        files=BIN_SHARDS,
        edits=(BF16, drop("^lm_head")),
        config={"auto_map": {"AutoModelForCausalLM": "modeling_mpt.MPTForCausalLM"}},
        shows="architectures names a class of its own code",
    ),
    Layout(
        name="stabilityai/stablelm-2-1_6b",
        task="causal-lm",
        family="stablelm",
        saved="StableLmForCausalLM",
        edits=(F16,),
        shows="float16",
    ),
    Layout(
        name="bigcode/starcoder2-3b",
        task="causal-lm",
        family="starcoder2",
        saved="Starcoder2ForCausalLM",
        edits=(drop("^lm_head"),),
        config={"tie_word_embeddings": True},
        shows="tied, float32",
    ),
    Layout(
        name="bigcode/starcoderbase-1b",
        task="causal-lm",
        family="gpt_bigcode",
        saved="GPTBigCodeForCausalLM",
        edits=(beside(r"attn\.c_attn\.weight$", "attn.bias", 64, 64, dtype=torch.bool),),
        note="attn.bias",
        shows="one key and value head, masks",
    ),
    Layout(
        name="state-spaces/mamba-130m-hf",
        task="causal-lm",
        family="mamba",
        saved="MambaForCausalLM",
        edits=(drop("^lm_head"),),
        shows="tied, no attention",
    ),
    Layout(
        name="allenai/OLMo-2-0425-1B",
        task="causal-lm",
        family="olmo2",
        saved="Olmo2ForCausalLM",
        files=SAFE_SHARDS,
        shows="norms after the branches, shards",
    ),
    Layout(
        name="deepseek-ai/DeepSeek-V2-Lite",
        task="causal-lm",
        family="deepseek_v2",
        saved="DeepseekV2ForCausalLM",
        files=SAFE_SHARDS,
        edits=(BF16,),
        shows="experts one by one, latent attention",
    ),
    Layout(
        name="CohereForAI/c4ai-command-r-v01",
        task="causal-lm",
        family="cohere",
        saved="CohereForCausalLM",
        files=SAFE_SHARDS,
        edits=(F16, drop("^lm_head")),
        shows="tied, parallel branches",
    ),
    Layout(
        name="ibm-granite/granite-3.0-2b-base",
        task="causal-lm",
        family="granite",
        saved="GraniteForCausalLM",
        config={"tie_word_embeddings": True},
        edits=(BF16, drop("^lm_head")),
        shows="multipliers, tied",
    ),
    Layout(
        name="facebook/xglm-564M",
        task="causal-lm",
        family="xglm",
        saved="XGLMForCausalLM",
        files=BIN,
        edits=(F16, add("model.embed_positions.weights", 66, 32)),
        note="embed_positions",
        shows="a table of positions that is computed",
    ),
]

SEQ2SEQ = [
    Layout(
        name="t5-small",
        task="seq2seq",
        family="t5",
        saved="T5ForConditionalGeneration",
        edits=(
            copy(
                "shared.weight",
                "encoder.embed_tokens.weight",
                "decoder.embed_tokens.weight",
                "lm_head.weight",
            ),
            add("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight", 32, 4),
        ),
        shows="one table under four names, a bias that no class has",
    ),
    Layout(
        name="google/flan-t5-small",
        task="seq2seq",
        family="t5",
        saved="T5ForConditionalGeneration",
        config={"tie_word_embeddings": False},
        files=BIN,
        edits=(
            copy("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
        ),
        shows="a head that is not tied",
    ),
    Layout(
        name="facebook/bart-base",
        task="seq2seq",
        family="bart",
        saved="BartModel",
        files=BIN,
        edits=(
            copy("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
        ),
        shows="no prefix, one table under three names",
    ),
    Layout(
        name="facebook/bart-large-cnn",
        task="seq2seq",
        family="bart",
        saved="BartForConditionalGeneration",
        edits=(copy("model.shared.weight", "model.encoder.embed_tokens.weight", "lm_head.weight"),),
        shows="final_logits_bias, a head",
    ),
    Layout(
        name="facebook/mbart-large-50",
        task="seq2seq",
        family="mbart",
        saved="MBartForConditionalGeneration",
        shows="norms before the branches",
    ),
    Layout(
        name="google/pegasus-xsum",
        task="seq2seq",
        family="pegasus",
        saved="PegasusForConditionalGeneration",
        files=BIN,
        edits=(drop("embed_positions"),),
        shows="tables of positions that are computed, not stored",
    ),
    Layout(
        name="Helsinki-NLP/opus-mt-en-de",
        task="seq2seq",
        family="marian",
        saved="MarianMTModel",
        files=BIN,
        shows="tables of positions that are computed, not stored",
    ),
]

IMAGE = [
    Layout(
        name="google/vit-base-patch16-224",
        task="image",
        family="vit",
        saved="ViTForImageClassification",
        note="vit.pooler",
        edits=(add("vit.pooler.dense.weight", 32, 32), add("vit.pooler.dense.bias", 32)),
        files=BIN,
        shows="a pooler that the class lacks",
    ),
    Layout(
        name="google/vit-base-patch16-224-in21k",
        task="image",
        family="vit",
        saved="ViTModel",
        shows="the bare model with its pooler",
    ),
    Layout(
        name="facebook/deit-base-distilled-patch16-224",
        task="image",
        family="deit",
        saved="DeiTForImageClassificationWithTeacher",
        shows="two heads",
    ),
    Layout(
        name="microsoft/swin-tiny-patch4-window7-224",
        task="image",
        family="swin",
        saved="SwinForImageClassification",
        shows="tables of relative positions",
    ),
    Layout(
        name="openai/clip-vit-large-patch14, text encoder",
        task="causal-lm",
        family="clip_text_model",
        saved="CLIPTextModel",
        edits=(F16, position_ids("text_model.embeddings.position_ids")),
        shows="position_ids",
        count=4,
    ),
]

LAYOUTS = [*MASKED, *CAUSAL, *SEQ2SEQ, *IMAGE]

_GPTQ = (
    keep("embed_tokens|norm"),
    add("model.layers.0.mlp.up_proj.qweight", 4, 8, dtype=torch.int32),
    add("model.layers.0.mlp.up_proj.scales", 1, 8),
    add("model.layers.0.mlp.up_proj.qzeros", 1, 1, dtype=torch.int32),
)


def quantised(method: str) -> dict[str, str]:
    """The config of a quantised model, as extra text for its config.json."""
    return {"quantization_config": method}


REFUSED = [
    Refused(
        name="TheBloke/Llama-2-7B-GPTQ",
        files=quantised("gptq"),
        edits=_GPTQ,
        says=("quantised", "gptq"),
    ),
    Refused(
        name="TheBloke/Llama-2-7B-AWQ",
        files=quantised("awq"),
        edits=_GPTQ,
        says=("quantised", "awq"),
    ),
    Refused(
        name="deepseek-ai/DeepSeek-V3 (fp8)",
        files=quantised("fp8"),
        says=("quantised", "fp8"),
        edits=(cast(torch.float8_e4m3fn), add("model.layers.0.mlp.up_proj.weight_scale_inv", 1, 1)),
    ),
    Refused(
        name="unsloth/llama-bnb-4bit",
        files=quantised("bitsandbytes"),
        says=("quantised", "bitsandbytes"),
        edits=(add("model.layers.0.mlp.up_proj.weight.absmax", 8),),
    ),
    Refused(
        name="a LoRA adapter",
        files={
            "adapter_config.json": '{"base_model_name_or_path": "meta-llama/Llama-2-7b-hf"}',
            "adapter_model.safetensors": "x",
        },
        says=("adapter", "merge_and_unload", "meta-llama/Llama-2-7b-hf"),
    ),
    Refused(
        name="an accelerate state",
        files={"optimizer.bin": "x", "random_states_0.pkl": "x", "model.safetensors": ""},
        edits=(cast(torch.float32),),
        says=("accelerate", "--model FACTORY"),
    ),
    Refused(
        name="a trainer's folder",
        files={"checkpoint-500/config.json": "{}", "checkpoint-1000/config.json": "{}"},
        says=("folder of checkpoints", "checkpoint-1000"),
    ),
    Refused(
        name="TheBloke/Llama-2-7B-GGUF",
        files={"llama-2-7b.Q4_K_M.gguf": "x", "config.json": '{"model_type": "llama"}'},
        says=("GGUF",),
    ),
    Refused(
        name="optimum/gpt2 (ONNX)",
        files={"decoder_model.onnx": "x", "config.json": '{"model_type": "gpt2"}'},
        says=("ONNX",),
    ),
    Refused(
        name="a Flax model",
        files={"flax_model.msgpack": "x", "config.json": '{"model_type": "gpt2"}'},
        says=("Flax",),
    ),
    Refused(
        name="meta-llama/Llama-2-7b (original)",
        files={"params.json": "{}", "consolidated.00.pth": "x"},
        says=("params.json", "consolidated.00.pth"),
    ),
    Refused(
        name="a hub cache",
        files={"snapshots/abc/config.json": "{}", "refs/main": "abc"},
        says=("snapshots/abc",),
    ),
]
