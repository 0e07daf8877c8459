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
    Change,
    Draw,
    Fill,
    NormOutput,
    Reparametrise,
    Scale,
    ScaleOutput,
    Spare,
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
    """Return the remedy as text for every library; nothing of it is run here."""
    class_of_model = type(model)
    name = "YourModelForCausalLM"
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
    lines: list[str] = []
    for change in remedy.changes:
        lines += change.lines()
    body = "\n".join(lines)
    blocks = ["\n".join(_imports_of(body))]
    if "Gain(" in body:
        blocks.append(GAIN_CODE.rstrip())

    result = "model"
    if any(isinstance(change, Spare) for change in remedy.changes):
        result = "groups"
    head = (
        f'@torch.no_grad()\ndef remedy(model):\n    """{remedy.title}. Once, after the '
        'model\'s own init."""\n'
    )
    blocks.append(head + textwrap.indent(f"{body}\nreturn {result}", "    "))
    return "\n\n\n".join(blocks) + "\n"


def _imports_of(body: str) -> list[str]:
    """Return the imports that the body of a remedy needs."""
    has_gain = "Gain(" in body
    imports: list[str] = []
    # 1. The standard library.
    if "math." in body:
        imports.append("import math")
    if "fnmatchcase" in body:
        imports += ["from fnmatch import fnmatchcase", ""]

    # 2. torch.
    imports.append("import torch")
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


def _spared_names(changes: Iterable[Change]) -> list[str] | None:
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


def _config_fields(changes: Iterable[Change], config: object) -> Iterable[str]:
    """Yield the fields of a config that do what some of the changes do."""
    # 1. The scaled embedding.
    matrix_stds: set[float] = set()
    for change in changes:
        if _is_scaled_by_sqrt_d(change) and hasattr(config, "scale_embedding"):
            yield "scale_embedding = True says the same; then leave the hook out"
        if isinstance(change, Draw) and change.weights.role in (*INNER, *RESIDUAL):
            matrix_stds.add(change.std)

    # 2. One std for every matrix.
    if len(matrix_stds) == 1 and hasattr(config, "initializer_range"):
        yield (
            f"initializer_range = {plain(matrix_stds.pop())} draws every matrix so, the "
            "embedding and the head too"
        )


def _is_scaled_by_sqrt_d(change: Change) -> bool:
    return isinstance(change, ScaleOutput) and "sqrt(d)" in change.formula


# -- Megatron-LM -----------------------------------------------------------------------------------
_BY_DEFAULT = (
    "# W_O and W_2 get init_method_std / sqrt(2 * num_layers) by default (output_layer_init_method)"
)


def _megatron(report: Report, changes: Sequence[Change]) -> list[str]:
    """Return the flags of Megatron-LM, and comments for what none of them says; each once."""
    table_std = _table_std(report, changes)
    inner_stds: set[float] = set()
    for change in changes:
        if isinstance(change, Draw) and change.weights.role in INNER:
            inner_stds.add(change.std)

    lines: list[str] = []
    for change in _without_scaled_tables(report, changes):
        factor = _embedding_factor(report, change)
        if factor is not None and table_std:
            lines += [
                "# no flag scales the embedding; a table of that std gives the same stream at init",
                _table_flags(table_std * factor),
            ]
        else:
            lines += _flags_of(change, inner_stds)
    return list(dict.fromkeys(lines))


def _flags_of(change: Change, inner_stds: Container[float]) -> list[str]:
    """Return the flags of one change that is no scaled embedding.

    Args:
        change: of a remedy.
        inner_stds: that the same remedy draws the matrices with.
    """
    if isinstance(change, Draw):
        flags = _flags_of_draw(change, inner_stds)
        if flags:
            return flags
    if isinstance(change, Draw | Scale) and change.weights.role in RESIDUAL:
        return [_BY_DEFAULT]
    if isinstance(change, NormOutput):
        return ["# no flag puts a norm on the embedding; Megatron-DeepSpeed: --embed-layernorm"]
    if isinstance(change, Spare):
        return [
            "# gains and biases are spared already; --embedding-init-method-std spares "
            "the embedding"
        ]
    return [f"# no flag says this: {_words(change)}"]


def _flags_of_draw(draw: Draw, inner_stds: Container[float]) -> list[str]:
    """Return the flags of a draw of matrices inside sub-layers, or of tables; [] for others."""
    role = draw.weights.role
    if role in ("embedding", "positions", "head") and draw.std in inner_stds:
        return [f"# --init-method-std draws the {role} too"]
    if role == "embedding":
        return [_table_flags(draw.std), "# it also spares the embedding weight decay"]
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


def _torchtitan(report: Report, changes: Sequence[Change]) -> list[str]:
    """Return `param_init` of torchtitan, with imports, and comments for what it cannot say."""
    # 1. Each change, once.
    table_std = _table_std(report, changes)
    lines: list[str] = []
    for change in _without_scaled_tables(report, changes):
        factor = _embedding_factor(report, change)
        if factor is not None and table_std:
            lines.append(
                f"# param_init of tok_embeddings; the head must not be tied to it\n"
                f'{{"weight": partial(nn.init.normal_, std={plain(table_std * factor)})}}'
            )
        else:
            lines.append(_param_init_of(report, change))
    lines = list(dict.fromkeys(lines))

    # 2. What these lines import.
    imports: list[str] = []
    if any("math." in line for line in lines):
        imports.append("import math")
    if any("partial(" in line for line in lines):
        imports += ["from functools import partial", "from torch import nn"]
    return [*imports, *lines]


def _param_init_of(report: Report, change: Change) -> str:
    """Return `param_init` of one change that is no scaled embedding."""
    role = _role_of(change)
    if isinstance(change, Draw) and role:
        return _param_init(role, plain(change.std), change.formula)
    if isinstance(change, Scale) and role in RESIDUAL:
        base = _std_of(report, change.weights.names[0])
        if base:
            formula = f"{plain(base)} / math.sqrt(2 * {max(report.model.layers, 1)})"
            return _param_init(role, formula, "depth_scaled_std(std, layer_id) follows the layer")
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
def _weights_of(report: Report) -> list[WeightRecord]:
    """Return the weights of the init contract; [] without one."""
    if report.contract is None:
        return []
    return report.contract.weights


def _std_of(report: Report, parameter: str) -> float | None:
    """Return the std of a weight as it is."""
    for weight in _weights_of(report):
        if weight.parameter == parameter:
            return weight.std
    return None


def _role_of(change: Change) -> str:
    """Return the role of the weights that a change sets; "" if it sets none, or of mixed roles."""
    if isinstance(change, Draw | Scale | Fill | Reparametrise):
        return change.weights.role
    return ""


def _table_std(report: Report, changes: Iterable[Change]) -> float | None:
    """Return the std of the embedding, as it is or as it is drawn again."""
    drawn: dict[str, float] = {}
    for change in changes:
        if isinstance(change, Draw):
            drawn |= dict.fromkeys(change.weights.names, change.std)
    tables = [weight for weight in _weights_of(report) if weight.role == "embedding" and weight.std]
    return max((drawn.get(table.parameter, table.std or 0.0) for table in tables), default=None)


def _without_scaled_tables(report: Report, changes: Sequence[Change]) -> list[Change]:
    """Return the changes without draws of an embedding whose output is scaled.

    The other libraries say both by one std.
    """
    is_scaled = any(_embedding_factor(report, change) is not None for change in changes)
    if not is_scaled:
        return list(changes)
    remaining = []
    for change in changes:
        is_draw_of_table = isinstance(change, Draw) and change.weights.role == "embedding"
        if not is_draw_of_table:
            remaining.append(change)
    return remaining


def _embedding_factor(report: Report, change: Change) -> float | None:
    """Return the fixed factor on the output of embeddings; None if a change is something else."""
    if not isinstance(change, ScaleOutput) or change.learned:
        return None
    owners: set[str] = set()
    for weight in _weights_of(report):
        if weight.role == "embedding":
            owners.add(weight.parameter.rpartition(".")[0])
    if not set(change.modules) <= owners:
        return None
    return change.factor


def _words(change: Change) -> str:
    """Return a change in a few words."""
    match change:
        case ScaleOutput(modules=modules, factor=factor, learned=learned):
            scale = "a learned scalar" if learned else plain(factor)
            return f"{', '.join(modules[:3])} times {scale}"
        case Reparametrise():
            return "W = gain * V with a learned gain"
        case Draw(weights=weights, std=std):
            return f"{weights.pattern or weights.names[0]} with std {plain(std)}"
        case Scale(weights=weights, factor=factor) | Fill(weights=weights, value=factor):
            return f"{weights.pattern or weights.names[0]} by {plain(factor)}"
        case NormOutput(module=module):
            return f"a LayerNorm on {module}"
        case _:
            return "parameter groups of the optimizer"
