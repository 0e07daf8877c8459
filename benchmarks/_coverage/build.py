"""A family's model and a probe for it, from its default config made tiny; nothing is downloaded."""

from __future__ import annotations

import contextlib
import copy
import inspect
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from _coverage.shrink import shrink

TASKS = {
    "causal-lm": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "AutoModelForCausalLM"),
    "masked-lm": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "AutoModelForMaskedLM"),
    "seq2seq": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "AutoModelForSeq2SeqLM"),
    "image": ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "AutoModelForImageClassification"),
}
TOKENS = 5
_FACTS = Path(__file__).with_name("families.toml")


class CannotBuild(Exception):
    """The family cannot be built or run here at all, whatever jacdiag does."""


@dataclass
class Built:
    """A model in eval mode, its config, the keyword arguments of one forward, and what the data
    file says of it.
    """

    model: Any
    config: Any
    inputs: dict[str, Any]
    facts: dict[str, Any]


def families() -> list[tuple[str, str]]:
    """(task, family) of everything that the installed transformers registers."""
    from transformers.models.auto import modeling_auto

    return [
        (task, family)
        for task, (names, _) in TASKS.items()
        for family in getattr(modeling_auto, names)
    ]


def facts_of(task: str, family: str) -> dict[str, Any]:
    """What the data file says: for the family, then for the family in this task."""
    table = tomllib.loads(_FACTS.read_text(encoding="utf-8"))
    lists = table.pop("placement")
    where = next(
        (where for where, names in lists.items() if {family, f"{family}:{task}"} & set(names)), None
    )
    placed = {} if where is None else {"placement": where}
    return {**placed, **table.get(family, {}), **table.get(f"{family}:{task}", {})}


def build(task: str, family: str, seed: int = 0, *, disturb: bool = True) -> Built:
    """Build a family's tiny model; raise CannotBuild with the reason.

    Args:
        task: A key of `TASKS`.
        family: A model type.
        seed: For the random weights.
        disturb: Replace parameters that the init left constant by random values. False keeps the
            family's own init.
    """
    facts = facts_of(task, family)
    if "unbuildable" in facts:
        raise CannotBuild(facts["unbuildable"])
    try:
        config = config_of(family, facts)
        with seeded(seed):
            model = model_of(task, family, config).eval()
            if disturb:
                _disturb(model)
        inputs = inputs_of(model, config, facts)
        with torch.no_grad(), seeded(seed):
            copy.deepcopy(model)(**inputs)  # a forward may leave caches behind
    except Exception as error:
        raise CannotBuild(f"{type(error).__name__}: {str(error).strip()[:200]}") from error
    return Built(model, config, inputs, facts)


def config_of(family: str, facts: dict[str, Any]) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    cls = CONFIG_MAPPING[family]
    given = facts.get("config", {})
    defaults = cls(**facts.get("start", {})).to_dict()
    small = shrink(defaults)
    return cls(**_merged(small, given))


def _merged(small: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    merged = dict(small)
    for name, value in given.items():
        nested = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merged(merged[name], value) if nested else value
    return {name: value for name, value in merged.items() if value != "default"}


def model_of(task: str, family: str, config: Any) -> Any:
    import transformers
    from transformers.models.auto import modeling_auto

    names = getattr(modeling_auto, TASKS[task][0])[family]
    cls = getattr(transformers, names if isinstance(names, str) else names[0])
    for attribute in ("is_decoder", "add_cross_attention"):
        if task == "causal-lm" and attribute == "is_decoder" and hasattr(config, attribute):
            config.is_decoder = True
    sub = getattr(cls, "config_class", None)
    if sub is not None and not isinstance(config, sub):
        config = next((c for c in vars(config).values() if isinstance(c, sub)), config)
    config._attn_implementation = "eager"
    return cls._from_config(config)


def _disturb(model: torch.nn.Module) -> None:
    """Gives every parameter that an init left constant (gains 1, biases and gates 0) values that a
    test can see.
    """
    for parameter in model.parameters():
        flat = parameter.detach().flatten()
        if (
            parameter.is_floating_point()
            and flat.numel()
            and bool((flat == flat[0]).all() | ~flat.isfinite().all())
        ):
            start = flat[0] if bool(flat[0].isfinite()) else flat.new_zeros(())
            with torch.no_grad():
                parameter.copy_(start + 0.1 * torch.randn_like(parameter))


def inputs_of(
    model: Any, config: Any, facts: dict[str, Any], batch: int = 1, tokens: int = 0
) -> dict[str, Any]:
    """The keyword arguments of a forward: token ids or pixels, and the decoder's where there is
    one.
    """
    tokens = tokens or facts.get("tokens", TOKENS)
    generator = torch.Generator().manual_seed(1)
    known = inspect.signature(model.forward).parameters
    made: dict[str, Any] = {}
    rows = facts.get("rows", 1)  # some read several rows of token ids as one sequence
    ids = torch.randint(10, 100, (4 * rows, tokens), generator=generator)[: batch * rows]
    if "pixel_values" in known and "input_ids" not in known:
        size = facts.get("image", getattr(config, "image_size", 32) or 32)
        height, width = (size, size) if isinstance(size, int) else size
        channels = getattr(config, "num_channels", 3)
        made["pixel_values"] = torch.randn((4, channels, height, width), generator=generator)[
            :batch
        ]
    elif "input_ids" in known or not known.keys() & {"inputs", "input_features", "input_values"}:
        made["input_ids"] = ids
    elif "inputs" in known:
        made["inputs"] = ids
    if "decoder_input_ids" in known:
        made["decoder_input_ids"] = torch.randint(10, 100, (4, 4), generator=generator)[:batch]
    if "use_cache" in known:
        made["use_cache"] = False
    for name, shape in facts.get("inputs", {}).items():
        made.update(_extra(name, shape, generator, batch))
    return {name: value for name, value in made.items() if value is not None}


def _extra(name: str, shape: Any, generator: torch.Generator, batch: int) -> dict[str, Any]:
    """An input that the data file asks for: a list is a shape of floats, behind the batch; "none"
    leaves it out.
    """
    if shape == "none":
        return {name: None}
    if isinstance(shape, list):
        return {name: torch.randn((4, *shape), generator=generator)[:batch]}
    if isinstance(shape, dict):
        size = (4, *shape["shape"])
        return {name: torch.full(size, shape["fill"])[:batch]}
    return {name: shape}


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
