"""Configs of transformers: read, completed with the kind of model, and turned into a class."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from jacdiag.errors import SourceError
from jacdiag.sources.foreign_code import own_frames
from jacdiag.sources.formats.json_files import read_json

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
        path: a folder, a JSON file, or a kind of model, whose default config is taken.
        trust: whether code that the folder brings may run.
        overrides: fields to change; `model_type` names the kind of model.
        names: of the weights, from which the kind of model is inferred where the config does not
            name it.

    Returns:
        The config, and what was inferred.

    Raises:
        SourceError: it cannot be read, or the kind of model is not known.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.exists() and is_kind(transformers, str(path)):
        data = {"model_type": str(path)}
    else:
        data = _json_of(file)
    changes = dict(overrides or {})

    # 1. The kind of model: as asked for, as written, or inferred.
    notes = _set_kind(transformers, data, changes.pop("model_type", None), names, file)
    _check_known(transformers, data, path, trust)

    # 2. What is quantised is refused by the tensors, which a config can be wrong about.
    quantised = data.pop("quantization_config", None)

    # 3. The config itself, and the fields to change.
    try:
        config = _config_of(transformers, data, path, trust)
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


def is_kind(transformers: Any, name: str) -> bool:
    """Return whether a name is that of a kind of model, such as "gpt2" or "llama"."""
    return name in transformers.CONFIG_MAPPING


def _set_kind(
    transformers: Any, data: dict[str, Any], requested: Any, names: Collection[str], file: Path
) -> list[str]:
    """Set the kind of model in a config, if it has none or another one is requested.

    Args:
        transformers: the module.
        data: the config as JSON, changed in place.
        requested: the kind that the caller named, or None.
        names: of the weights.
        file: that held the config.

    Returns:
        Notes on what was inferred.
    """
    # 1. The caller knows best.
    if requested is not None:
        data["model_type"] = str(requested)
        return []

    # 2. The config.
    written = data.get("model_type")
    if isinstance(written, str) and written:
        return []

    # 3. The classes that it names, or the weights.
    data["model_type"], why = _infer(transformers, data, names, file)
    return [f"{file.name} has no model_type: '{data['model_type']}' was inferred from {why}"]


def _config_of(transformers: Any, data: Mapping[str, Any], path: Path, trust: bool) -> Any:
    """Return the config of transformers, from JSON or, if it brings its own code, from its files.

    Args:
        transformers: the module.
        data: the config as JSON.
        path: a folder or a JSON file.
        trust: whether code that the folder brings may run.
    """
    kind = data["model_type"]
    brings_code = trust and "auto_map" in data
    if kind in transformers.CONFIG_MAPPING and not brings_code:
        return transformers.CONFIG_MAPPING[kind].from_dict(data)
    return transformers.AutoConfig.from_pretrained(
        path, local_files_only=True, trust_remote_code=trust
    )


def _json_of(file: Path) -> dict[str, Any]:
    """Return the content of a JSON file.

    Raises:
        SourceError: it cannot be read, or holds something else than an object.
    """
    data = read_json(file)
    if not isinstance(data, dict):
        raise SourceError(
            f"'{file}' is no config of transformers", got=f"a JSON {type(data).__name__}"
        )
    return data


def _method(quantization: Any) -> str:
    """Return the name of a quantisation method as a config spells it; "" if there is none."""
    if not isinstance(quantization, dict) or not quantization:
        return ""
    method = quantization.get("quant_method")
    if method:
        return f"quantization_config ({method})"

    # Older configs of bitsandbytes do not name it.
    for bits in ("load_in_4bit", "load_in_8bit"):
        if quantization.get(bits):
            return f"quantization_config (bitsandbytes, {bits})"
    return "quantization_config (unnamed)"


def _check_known(transformers: Any, data: Mapping[str, Any], path: Path, trust: bool) -> None:
    """Raise if the kind of model is neither one of transformers nor brings code that may run."""
    kind = data["model_type"]
    if kind in transformers.CONFIG_MAPPING or trust:
        return
    if "auto_map" in data:
        raise SourceError(
            f"the model in '{path}' brings its own code",
            hint="--trust-pickle lets it run; or give --model FACTORY",
        )
    hint = "a newer transformers, or --model FACTORY"
    # The class may be one that is known, under a name of the folder's own for its kind.
    by_class = _kind_by_class(transformers, data)
    if by_class is not None:
        change = json.dumps({"model_type": by_class.kind})
        hint = f"if {by_class.name} is its class, --model-args '{change}'; else {hint}"
    raise SourceError(
        f"transformers {transformers.__version__} does not know model_type '{kind}'", hint=hint
    )


class _KindByClass(NamedTuple):
    """A kind of model, and the class of it that a config names."""

    kind: str
    name: str


def _kind_by_class(transformers: Any, data: Mapping[str, Any]) -> _KindByClass | None:
    """Return the kind of the first class that a config names and transformers knows."""
    for name in _names_in(data.get("architectures")):
        cls = getattr(transformers, name, None)
        config_class = getattr(cls, "config_class", None)
        kind = getattr(config_class, "model_type", "")
        if kind:
            return _KindByClass(kind, name)
    return None


def _infer(
    transformers: Any, data: Mapping[str, Any], names: Collection[str], file: Path
) -> tuple[str, str]:
    """Return the kind of model, and what it was inferred from."""
    # 1. The classes that the config names.
    by_class = _kind_by_class(transformers, data)
    if by_class is not None:
        return by_class.kind, f"architectures ({by_class.name})"

    # 2. The names of the weights, if only one kind has such names.
    fitting = _kinds_by_names(names)
    if len(fitting) == 1:
        return fitting[0], "the names of the weights"
    raise _unknown_kind(file, fitting)


def _unknown_kind(file: Path, fitting: Sequence[str]) -> SourceError:
    """Return the error for a config whose kind of model cannot be inferred.

    Args:
        file: that held the config.
        fitting: the kinds that the weights may be of.
    """
    got = "it has no model_type, and no architectures that this transformers knows"
    change = """--model-args '{"model_type": "KIND"}'"""
    hint = f"name the kind as transformers does, {change}; or --model FACTORY"
    if fitting:
        first = fitting[0]
        got = f"it has no model_type, and the weights may be of {' or '.join(fitting)}"
        change = change.replace("KIND", first)
        hint = f"name it, {change} if it is {first}; or --model FACTORY"
    return SourceError(
        f"'{file}' is no config of transformers that says its kind of model", got=got, hint=hint
    )


def _names_in(architectures: Any) -> list[str]:
    """Return the names in a config's list of classes; a config may hold anything there."""
    # 1. One class.
    if isinstance(architectures, str):
        return [architectures]

    # 2. A list of them, of which only the texts count.
    if not isinstance(architectures, list | tuple):
        return []
    return [name for name in architectures if isinstance(name, str)]


def _kinds_by_names(names: Iterable[str]) -> list[str]:
    """Return the kinds of model that have weights of such names."""
    names = list(names)
    fitting = []
    for kind, patterns in _BY_NAMES.items():
        has_all = all(_any_matches(pattern, names) for pattern in patterns)
        if has_all and not _any_matches(_NOT_WITH.get(kind), names):
            fitting.append(kind)
    return fitting


def _any_matches(pattern: str | None, names: Iterable[str]) -> bool:
    """Return whether one of the names matches a pattern; no pattern is matched by none."""
    if pattern is None:
        return False

    return any(re.search(pattern, name) for name in names)


def named_class(transformers: Any, config: Any) -> Any:
    """Return the class of transformers that the config's `architectures` name, or None."""
    for name in _names_in(getattr(config, "architectures", None)):
        # A class of the code that a folder brings is not in transformers.
        cls = getattr(transformers, name, None)
        is_model = isinstance(cls, type) and hasattr(cls, "_from_config")
        if is_model:
            return cls
    return None


def default_class(transformers: Any, config: Any) -> Any:
    """Return the language model of a config's type, else the bare model.

    Of an encoder-decoder it is the one with both. Its causal language model is the decoder alone.
    """
    # 1. A class of transformers.
    kind = type(config)
    mappings = [transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_MAPPING]
    if getattr(config, "is_encoder_decoder", False):
        mappings.insert(0, transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING)
    for mapping in mappings:
        if kind in mapping:
            return _first(mapping[kind])

    # 2. A class in the code that the folder brings.
    auto_map = getattr(config, "auto_map", None)
    if isinstance(auto_map, dict) and "AutoModelForCausalLM" in auto_map:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModel


def candidate_classes(transformers: Any, config: Any) -> list[Any]:
    """Return the classes that transformers registers for a config, with or without a head."""
    classes = []
    for task in _TASKS:
        # Versions of transformers differ in what they register.
        mapping = getattr(transformers, task, None)
        if mapping is None or type(config) not in mapping:
            continue
        cls = _first(mapping[type(config)])
        if cls not in classes:
            classes.append(cls)
    return classes


def _first(entry: Any) -> Any:
    """Return a class, or the first one of several that are registered together."""
    if not isinstance(entry, tuple | list):
        return entry
    # the usual class of the kind
    return entry[0]
