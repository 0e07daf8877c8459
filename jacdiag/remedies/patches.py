"""Write a remedy out for PyTorch, Hugging Face, Megatron-LM and torchtitan.

The lines for PyTorch are the very steps that were tried. Those for Hugging Face call them from a
subclass. Megatron-LM has flags and torchtitan has `param_init`. A comment names each change that
these cannot express.
"""

from __future__ import annotations

import textwrap
from collections.abc import Container, Iterable, Sequence

from torch import nn

from jacdiag.records import Report, WeightRecord
from jacdiag.remedies.candidates import Remedy
from jacdiag.remedies.changes import (
    GAIN_CODE,
    Fill,
    ModelChange,
    NormOutput,
    Redraw,
    Reparametrise,
    Scale,
    ScaleOutput,
    Spare,
    Weights,
)
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.init.schemes import INNER, RESIDUAL

DIALECTS = {
    "pytorch": "PyTorch",
    "huggingface": "Hugging Face transformers",
    "megatron": "Megatron-LM",
    "torchtitan": "torchtitan",
}


def patches(report: Report, model: nn.Module, remedy: Remedy) -> dict[str, str]:
    """Return the remedy as text for every library; nothing of it is run here.

    Args:
        report: of the model as it is.
        model: gives the name of its class, and its config.
        remedy: to write out.

    Returns:
        Key of `DIALECTS` -> text.
    """
    name = "YourModelForCausalLM"
    class_of_model = type(model)
    if class_of_model.__module__.startswith("transformers."):
        name = class_of_model.__name__
    config = getattr(model, "config", None)
    return {
        "pytorch": pytorch(remedy),
        "huggingface": huggingface(remedy, name, config),
        "megatron": "\n".join(_megatron(report, remedy.changes)),
        "torchtitan": "\n".join(_torchtitan(report, remedy.changes)),
    }


# -- PyTorch ---------------------------------------------------------------------------------------
def pytorch(remedy: Remedy) -> str:
    """Return a module of Python with one function, `remedy(model)`."""
    # 1. The steps, and what they need.
    lines: list[str] = []
    for change in remedy.changes:
        lines += change.lines()
    body = "\n".join(lines)
    blocks = ["\n".join(_imports_of(body))]
    if "Gain(" in body:
        blocks.append(GAIN_CODE.rstrip())

    # 2. The function around them.
    result = "model"
    has_groups = any(isinstance(change, Spare) for change in remedy.changes)
    if has_groups:
        result = "groups"
    head = (
        f'@torch.no_grad()\ndef remedy(model):\n    """{remedy.title}. Once, after the '
        'model\'s own init."""\n'
    )
    blocks.append(head + textwrap.indent(f"{body}\nreturn {result}", "    "))
    return "\n\n\n".join(blocks) + "\n"


def _imports_of(body: str) -> list[str]:
    """Return the imports that the body of a remedy needs."""
    # 1. The standard library.
    imports: list[str] = []
    if "math." in body:
        imports.append("import math")
    if "fnmatchcase" in body:
        imports += ["from fnmatch import fnmatchcase", ""]

    # 2. torch. The class of a gain is a module.
    imports.append("import torch")
    has_gain = "Gain(" in body
    if "nn." in body or has_gain:
        imports.append("from torch import nn")
    if "parametrize." in body:
        imports.append("from torch.nn.utils import parametrize")

    return imports


# -- Hugging Face ----------------------------------------------------------------------------------
def huggingface(remedy: Remedy, kind: str, config: object) -> str:
    """Return a subclass whose fresh models have the remedy.

    Fields of the config that have the same effect stand above it.

    Args:
        remedy: to write out.
        kind: name of the model's class.
        config: of the model; its fields are looked at.
    """
    # 1. The optimizer alone changes: a Trainer, and no model.
    spared = _spared_names(remedy.changes)
    if spared is not None:
        return _trainer_without_decay(spared)

    # 2. A subclass that calls the function for PyTorch.
    lines = [f"# config: {line}" for line in _config_fields(remedy.changes, config)]
    lines += [
        f"from transformers import {kind}",
        "",
        "# remedy(model): the function for PyTorch. An override of `_init_weights` sees a module "
        "without its name, and",
        "# not those of a model inside the model.",
        "",
        "",
        f"class Stable{kind}({kind}):",
        "    def __init__(self, config):",
        "        super().__init__(config)  # draws the weights",
        "        remedy(self)",
    ]
    return "\n".join(lines) + "\n"


def _spared_names(changes: Iterable[ModelChange]) -> list[str] | None:
    """Return the parameters to spare weight decay; None if something else changes, too."""
    names: list[str] = []
    for change in changes:
        if not isinstance(change, Spare):
            return None

        names += change.names

    return names


def _trainer_without_decay(names: Iterable[str]) -> str:
    """Return a Trainer that spares some parameters weight decay."""
    lines = [
        "from transformers import Trainer",
        "",
        "",
        "class NoDecayTrainer(Trainer):",
        "    def get_decay_parameter_names(self, model):",
        f"        spared = {sorted(names)!r}",
        "        return [n for n in super().get_decay_parameter_names(model) if n not in spared]",
        "",
    ]
    return "\n".join(lines)


def _config_fields(changes: Sequence[ModelChange], config: object) -> Iterable[str]:
    """Yield the fields of a config that do what some of the changes do."""
    # 1. The scaled embedding.
    if hasattr(config, "scale_embedding"):
        for change in changes:
            if _is_scaled_by_sqrt_d(change):
                yield "scale_embedding = True says the same; then leave the hook out"

    # 2. One std for every matrix.
    stds = _stds_drawn(changes, (*INNER, *RESIDUAL))
    if len(stds) == 1 and hasattr(config, "initializer_range"):
        yield (
            f"initializer_range = {plain(stds.pop())} draws every matrix so, the "
            "embedding and the head too"
        )


def _stds_drawn(changes: Iterable[ModelChange], roles: Container[str]) -> set[float]:
    """Return the stds that weights of some roles are drawn with."""
    stds = set()
    for change in changes:
        # A draw of some rows says nothing of the others.
        if not isinstance(change, Redraw) or change.rows is not None:
            continue
        if change.weights.role in roles:
            stds.add(change.std)

    return stds


def _is_scaled_by_sqrt_d(change: ModelChange) -> bool:
    return isinstance(change, ScaleOutput) and "sqrt(d)" in change.formula


# -- Megatron-LM -----------------------------------------------------------------------------------
_BY_DEFAULT = (
    "# W_O and W_2 get init_method_std / sqrt(2 * num_layers) by default (output_layer_init_method)"
)


def _megatron(report: Report, changes: Sequence[ModelChange]) -> list[str]:
    """Return the flags of Megatron-LM, and comments for what none of them says; each once."""
    inner_stds = _stds_drawn(changes, INNER)
    lines: list[str] = []
    for change in _without_scaled_tables(report, changes):
        # A scaled embedding is the same as a table of a larger std.
        std = _std_of_scaled_table(report, changes, change)
        if std is None:
            lines += _flags_of(change, inner_stds)
        else:
            lines += [
                "# no flag scales the embedding; a table of that std gives the same stream at init",
                _table_flags(std),
            ]

    return list(dict.fromkeys(lines))


def _flags_of(change: ModelChange, inner_stds: Container[float]) -> list[str]:
    """Return the flags of one change that is no scaled embedding.

    Args:
        change: of a remedy.
        inner_stds: that the same remedy draws the matrices with.
    """
    # 1. What a flag sets.
    if isinstance(change, Redraw):
        flags = _flags_of_draw(change, inner_stds)
        if flags:
            return flags

    # 2. What Megatron-LM does by itself.
    if isinstance(change, Redraw | Scale) and change.weights.role in RESIDUAL:
        return [_BY_DEFAULT]
    if isinstance(change, Spare):
        return [
            "# gains and biases are spared already; --embedding-init-method-std spares "
            "the embedding"
        ]

    # 3. What no flag sets.
    if isinstance(change, NormOutput):
        return ["# no flag puts a norm on the embedding; Megatron-DeepSpeed: --embed-layernorm"]

    return [f"# no flag says this: {_words(change)}"]


def _flags_of_draw(draw: Redraw, inner_stds: Container[float]) -> list[str]:
    """Return the flags of a draw of matrices inside sub-layers, or of tables; [] for others."""
    role = draw.weights.role
    if draw.rows is not None:
        return []

    # 1. Tables. One flag draws them with the std of the matrices, unless another one is set.
    is_table = role in ("embedding", "positions", "head")
    if is_table and draw.std in inner_stds:
        return [f"# --init-method-std draws the {role} too"]
    if role == "embedding":
        return [_table_flags(draw.std), "# it also spares the embedding weight decay"]

    # 2. Matrices that read the stream.
    if role in INNER:
        return [f"--init-method-std {plain(draw.std)}"]

    return []


def _table_flags(std: float) -> str:
    return f"--embedding-init-method-std {plain(std)} --untie-embeddings-and-output-weights"


# -- torchtitan ------------------------------------------------------------------------------------
_TITAN = {
    "embedding": "tok_embeddings",
    "head": "output",
    "W_Q": "wq",
    "W_K": "wk",
    "W_V": "wv",
    "W_QKV": "wqkv",
    "W_O": "wo",
    "W_1": "w1",
    "W_gate": "w3",
    "W_2": "w2",
    "router": "gate",
}


def _torchtitan(report: Report, changes: Sequence[ModelChange]) -> list[str]:
    """Return `param_init` of torchtitan, with imports, and comments for what it cannot say."""
    # 1. Each change, once.
    lines: list[str] = []
    for change in _without_scaled_tables(report, changes):
        std = _std_of_scaled_table(report, changes, change)
        if std is None:
            lines.append(_param_init_of(report, change))
        else:
            lines.append(
                f"# param_init of tok_embeddings; the head must not be tied to it\n"
                f'{{"weight": partial(nn.init.normal_, std={plain(std)})}}'
            )
    lines = list(dict.fromkeys(lines))

    # 2. What these lines import.
    text = "\n".join(lines)
    imports: list[str] = []
    if "math." in text:
        imports.append("import math")
    if "partial(" in text:
        imports += ["from functools import partial", "from torch import nn"]
    return [*imports, *lines]


def _param_init_of(report: Report, change: ModelChange) -> str:
    """Return `param_init` of one change that is no scaled embedding."""
    role = _role_of(change)
    # 1. Draws.
    if isinstance(change, Redraw) and role and change.rows is None:
        formula = change.formula
        if change.weights.have_padding:
            formula += "; this draws the rows of padding too, which were zero"
        return _param_init(role, plain(change.std), formula)

    # 2. Scaling with depth, which needs the std as it is.
    if isinstance(change, Scale) and role in RESIDUAL:
        base = _std_of(report, change.weights.names[0])
        if base:
            formula = f"{plain(base)} / math.sqrt(2 * {max(report.model.layers, 1)})"
            return _param_init(role, formula, "depth_scaled_std(std, layer_id) follows the layer")

    # 3. Constants.
    if isinstance(change, Fill):
        init = f"partial(nn.init.constant_, val={change.value!r})"
        return f'{{"weight": {init}}}  # {_words(change)}'

    return f"# no param_init says this: {_words(change)}"


def _param_init(role: str, std: str, formula: str) -> str:
    return (
        f"# param_init of {_TITAN.get(role, role)}: {formula}\n"
        f'{{"weight": partial(nn.init.normal_, std={std})}}'
    )


# -- shared ----------------------------------------------------------------------------------------
def _weights_of(report: Report) -> Sequence[WeightRecord]:
    """Return the weights of the init contract; none without one."""
    contract = report.contract
    if contract is None:
        return ()

    return contract.weights


def _std_of(report: Report, parameter: str) -> float | None:
    """Return the std of a weight as it is; None if it is constant or unknown."""
    stds = {weight.parameter: weight.std for weight in _weights_of(report)}
    return stds.get(parameter)


def _role_of(change: ModelChange) -> str:
    """Return the role of the weights that a change sets; "" if it sets none, or of mixed roles."""
    role = ""
    if isinstance(change, Redraw | Scale | Fill | Reparametrise):
        role = change.weights.role
    return role


def _std_of_scaled_table(
    report: Report, changes: Iterable[ModelChange], change: ModelChange
) -> float | None:
    """Return the std of an embedding times the factor that a change puts on its output.

    Args:
        report: of the model.
        changes: all of the remedy, which may draw the table again.
        change: that may scale the output of the table.

    Returns:
        None if the change does something else, or the embedding is constant.
    """
    factor = _embedding_factor(report, change)
    if factor is None:
        return None

    table_std = _table_std(report, changes)
    if not table_std:
        return None

    return table_std * factor


def _table_std(report: Report, changes: Iterable[ModelChange]) -> float | None:
    """Return the std of the embedding, as it is or as it is drawn again; None without one."""
    # 1. What is drawn again.
    drawn: dict[str, float] = {}
    for change in changes:
        if isinstance(change, Redraw):
            drawn |= dict.fromkeys(change.weights.names, change.std)

    # 2. The largest std of the tables that are not constant.
    stds = []
    for weight in _weights_of(report):
        if weight.role == "embedding" and weight.std:
            stds.append(drawn.get(weight.parameter, weight.std))

    return max(stds, default=None)


def _without_scaled_tables(report: Report, changes: Sequence[ModelChange]) -> list[ModelChange]:
    """Return the changes without draws of an embedding whose output is scaled.

    The other libraries say both by one std.
    """
    factors = [_embedding_factor(report, change) for change in changes]
    is_scaled = any(factor is not None for factor in factors)
    if not is_scaled:
        return list(changes)

    return [change for change in changes if not _is_draw_of_table(change)]


def _is_draw_of_table(change: ModelChange) -> bool:
    """Return whether a change draws an embedding again."""
    return isinstance(change, Redraw) and change.weights.role == "embedding"


def _embedding_factor(report: Report, change: ModelChange) -> float | None:
    """Return the fixed factor on the output of embeddings; None if a change is something else."""
    if not isinstance(change, ScaleOutput):
        return None
    # A learned factor is no number to put into an init.
    if change.learned:
        return None

    # Other outputs are scaled, too: of a norm, or of a branch.
    if not _embedding_modules(report).issuperset(change.modules):
        return None

    return change.factor


def _embedding_modules(report: Report) -> set[str]:
    """Return the names of the modules that hold an embedding."""
    modules = set()
    for weight in _weights_of(report):
        if weight.role == "embedding":
            module, _, _ = weight.parameter.rpartition(".")
            modules.add(module)

    return modules


def _words(change: ModelChange) -> str:
    """Return a change in a few words."""
    match change:
        case ScaleOutput():
            return _scaled_output_in_words(change)
        case Reparametrise():
            return "W = gain * V with a learned gain"
        case Redraw():
            return _draw_in_words(change)
        case Scale(weights=weights, factor=value) | Fill(weights=weights, value=value):
            return f"{_named(weights)} by {plain(value)}"
        case NormOutput(module=module):
            return f"a LayerNorm on {module}"
        case _:
            return "parameter groups of the optimizer"


def _draw_in_words(draw: Redraw) -> str:
    """Return which weights, or which rows of them, are drawn, and with which std."""
    name = _named(draw.weights)
    if draw.rows is not None:
        name = f"the {draw.rows.role} rows of {name}"
    return f"{name} with std {plain(draw.std)}"


def _scaled_output_in_words(change: ScaleOutput) -> str:
    """Return which outputs are multiplied, and by what."""
    scale = plain(change.factor)
    if change.learned:
        scale = "a learned scalar"
    return f"{', '.join(change.modules[:3])} times {scale}"


def _named(weights: Weights) -> str:
    """Return the name pattern of weights, or the first of their names."""
    return weights.pattern or weights.names[0]
