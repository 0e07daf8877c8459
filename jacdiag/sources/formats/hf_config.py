"""Configs of transformers: read, completed with the kind of model, and turned into a class."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jacdiag.errors import SourceError
from jacdiag.sources.foreign_code import own_frames

# Names of weights that belong to one kind of model only, bare or with the prefix of its heads.
# Names that several kinds share (Llama's and Mistral's, RoBERTa's and XLM-RoBERTa's) are not here.
_BY_NAMES = {
    "gpt2": (r"^(transformer\.)?h\.\d+\.attn\.c_attn\.weight$", r"^(transformer\.)?wpe\.weight$"),
    "gpt_neo": (r"^(transformer\.)?h\.\d+\.attn\.attention\.q_proj\.weight$",),
    "gptj": (
        r"^(transformer\.)?h\.\d+\.attn\.q_proj\.weight$",
        r"^(transformer\.)?h\.\d+\.mlp\.fc_in\.weight$",
    ),
    "gpt_neox": (r"^(gpt_neox\.)?layers\.\d+\.attention\.query_key_value\.weight$",),
    "bloom": (r"^(transformer\.)?word_embeddings_layernorm\.weight$",),
    "opt": (
        r"^(model\.)?decoder\.layers\.\d+\.fc1\.weight$",
        r"^(model\.)?decoder\.embed_positions\.weight$",
    ),
    "bert": (r"^(bert\.)?encoder\.layer\.\d+\.attention\.self\.query\.weight$",),
    # bare, it has the names of BERT
    "roberta": (r"^encoder\.layer\.\d+\.attention\.self\.query\.weight$",),
    "electra": (r"^electra\.encoder\.layer\.\d+\.attention\.self\.query\.weight$",),
    "distilbert": (r"^(distilbert\.)?transformer\.layer\.\d+\.attention\.q_lin\.weight$",),
    "albert": (r"^(albert\.)?encoder\.albert_layer_groups\.\d+\.albert_layers\.\d+\.ffn\.weight$",),
    "xlnet": (r"^(transformer\.)?layer\.\d+\.rel_attn\.q$",),
    "vit": (r"^vit\.encoder\.layer\.\d+\.attention\.attention\.query\.weight$",),
    "swin": (r"^swin\.encoder\.layers\.\d+\.blocks\.\d+\.attention\.self\.query\.weight$",),
    "mpt": (r"^transformer\.blocks\.\d+\.attn\.Wqkv\.weight$",),
}
# A name that rules a kind out, where its other names would do.
_NOT_WITH = {
    "opt": r"(^|\.)encoder\.layers\.",
    "swin": r"relative_position_bias_mlp|logit_scale",
}
_TASKS = (
    "MODEL_FOR_MASKED_LM_MAPPING",
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "MODEL_FOR_PRETRAINING_MAPPING",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "MODEL_MAPPING",
)


@dataclass
class HFConfig:
    """A config that was read.

    Attributes:
        value: the config of transformers.
        quantised: the method that its quantization_config names, which is taken off; "" where there
            is none.
        notes: what was inferred.
    """

    value: Any
    quantised: str = ""
    notes: list[str] = field(default_factory=list)


def read_config(
    transformers: Any,
    path: Path,
    trust: bool,
    overrides: Mapping[str, Any] | None = None,
    names: Collection[str] = (),
) -> HFConfig:
    """Read a config.json, or the one of a folder.

    Args:
        transformers: the module.
        path: a folder or a JSON file.
        trust: whether code that the folder brings may run.
        overrides: fields to change; `model_type` names the kind of model.
        names: of the weights, from which the kind of model is inferred where the config does not
            name it.

    Raises:
        SourceError: it cannot be read, or the kind of model is not known.
    """
    file = path / "config.json" if path.is_dir() else path
    data = _json_of(file)
    changes = dict(overrides or {})
    notes: list[str] = []

    # 1. The kind of model: as asked for, as written, or inferred.
    written = data.get("model_type")
    asked = changes.pop("model_type", None)
    if asked is not None:
        data["model_type"] = str(asked)
    elif not isinstance(written, str) or not written:
        data["model_type"], why = _infer(transformers, data, names, file)
        notes.append(
            f"{file.name} has no model_type: '{data['model_type']}' was inferred from {why}"
        )
    _check_known(transformers, data, path, trust)

    # 2. What is quantised is refused by the tensors, which a config can be wrong about.
    quantised = data.pop("quantization_config", None)

    # 3. The config itself, and the fields to change.
    try:
        brings_code = trust and "auto_map" in data
        if data["model_type"] in transformers.CONFIG_MAPPING and not brings_code:
            config = transformers.CONFIG_MAPPING[data["model_type"]].from_dict(data)
        else:
            config = transformers.AutoConfig.from_pretrained(
                path, local_files_only=True, trust_remote_code=trust
            )
    except Exception as error:
        raise SourceError(
            f"transformers cannot read the config '{file}'", got=own_frames(error)
        ) from error
    for key, value in changes.items():
        if not hasattr(config, key):
            hint = "--model-args changes fields of the config"
            raise SourceError(f"{type(config).__name__} has no '{key}'", hint=hint)
        setattr(config, key, value)
    return HFConfig(config, _method(quantised), notes)


def _json_of(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise SourceError(f"cannot read '{file}'", got=str(error)) from error
    if not isinstance(data, dict):
        raise SourceError(
            f"'{file}' is no config of transformers", got=f"a JSON {type(data).__name__}"
        )
    return data


def _method(quantization: Any) -> str:
    """Return the name of a quantisation method as a config spells it."""
    if not isinstance(quantization, dict) or not quantization:
        return ""
    bits = [name for name in ("load_in_4bit", "load_in_8bit") if quantization.get(name)]
    method = str(
        quantization.get("quant_method") or (f"bitsandbytes, {bits[0]}" if bits else "unnamed")
    )
    return f"quantization_config ({method})"


def _check_known(transformers: Any, data: Mapping[str, Any], path: Path, trust: bool) -> None:
    kind = data["model_type"]
    if kind in transformers.CONFIG_MAPPING or trust:
        return
    if "auto_map" in data:
        raise SourceError(
            f"the model in '{path}' brings its own code",
            hint="--trust-pickle lets it run; or give --model FACTORY",
        )
    raise SourceError(
        f"transformers {transformers.__version__} does not know model_type '{kind}'",
        hint="a newer transformers, or --model FACTORY",
    )


def _infer(
    transformers: Any, data: Mapping[str, Any], names: Collection[str], file: Path
) -> tuple[str, str]:
    """Return the kind of model, and what it was inferred from."""
    for name in _names_in(data.get("architectures")):
        cls = getattr(transformers, name, None)
        kind = getattr(getattr(cls, "config_class", None), "model_type", "")
        if kind:
            return kind, f"architectures ({name})"
    fitting = _kinds_by_names(names)
    if len(fitting) == 1:
        return fitting[0], "the names of the weights"
    got = "it has no model_type, and no architectures that this transformers knows"
    kind = """--model-args '{"model_type": "KIND"}'"""
    hint = f"name the kind as transformers does, {kind}; or --model FACTORY"
    if len(fitting) > 1:
        got = f"it has no model_type, and the weights may be of {' or '.join(fitting)}"
        named = f"""--model-args '{{"model_type": "{fitting[0]}"}}'"""
        hint = f"name it, {named} if it is {fitting[0]}; or --model FACTORY"
    raise SourceError(
        f"'{file}' is no config of transformers that says its kind of model",
        got=got,
        hint=hint,
    )


def _names_in(architectures: Any) -> list[str]:
    """Return the names in a config's list of classes; a config may hold anything there."""
    if isinstance(architectures, str):
        return [architectures]
    if not isinstance(architectures, list | tuple):
        return []
    return [name for name in architectures if isinstance(name, str)]


def _kinds_by_names(names: Iterable[str]) -> list[str]:
    names = list(names)
    fitting = []
    for kind, patterns in _BY_NAMES.items():
        has_all = all(any(re.search(pattern, name) for name in names) for pattern in patterns)
        without = _NOT_WITH.get(kind)
        ruled_out = without is not None and any(re.search(without, name) for name in names)
        if has_all and not ruled_out:
            fitting.append(kind)
    return fitting


def named_class(transformers: Any, config: Any) -> Any:
    """Return the class of transformers that the config's `architectures` name, or None."""
    for name in _names_in(getattr(config, "architectures", None)):
        cls = getattr(transformers, name, None)
        if isinstance(cls, type) and hasattr(cls, "_from_config"):
            return cls
    return None


def default_class(transformers: Any, config: Any) -> Any:
    """Return the causal language model of a config's type, else the bare model."""
    causal = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    mapping = causal if type(config) in causal else transformers.MODEL_MAPPING
    if type(config) in mapping:
        return _first(mapping[type(config)])
    auto_map = getattr(config, "auto_map", None)
    in_causal = isinstance(auto_map, dict) and "AutoModelForCausalLM" in auto_map
    return transformers.AutoModelForCausalLM if in_causal else transformers.AutoModel


def candidate_classes(transformers: Any, config: Any) -> list[Any]:
    """Return the classes that transformers registers for a config, with or without a head."""
    classes = []
    for task in _TASKS:
        mapping = getattr(transformers, task, None)
        if mapping is not None and type(config) in mapping:
            cls = _first(mapping[type(config)])
            if cls not in classes:
                classes.append(cls)
    return classes


def _first(entry: Any) -> Any:
    return entry[0] if isinstance(entry, (tuple, list)) else entry
