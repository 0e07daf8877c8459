"""Write a remedy out for PyTorch, Hugging Face, Megatron-LM and torchtitan.

The lines for PyTorch are the very steps that were tried. Those for Hugging Face call them from a
subclass; Megatron-LM is spoken to by flags, torchtitan by `param_init`, as far as these can say it,
and else it is said that they cannot.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from torch import nn

from jacdiag.records import Report
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
from jacdiag.rules.schemes import INNER, RESIDUAL

DIALECTS = {
    "pytorch": "PyTorch",
    "huggingface": "Hugging Face transformers",
    "megatron": "Megatron-LM",
    "torchtitan": "torchtitan",
}


def patches(report: Report, model: nn.Module, remedy: Remedy) -> dict[str, str]:
    """The remedy in every dialect. Text only: nothing of it is run here."""
    kind = type(model)
    transformers = kind.__module__.startswith("transformers.")
    return {
        "pytorch": pytorch(remedy),
        "huggingface": huggingface(
            remedy,
            kind.__name__ if transformers else "YourModelForCausalLM",
            getattr(model, "config", None),
        ),
        "megatron": "\n".join(_megatron(report, remedy.changes)),
        "torchtitan": "\n".join(_torchtitan(report, remedy.changes)),
    }


# -- PyTorch ---------------------------------------------------------------------------------------
def pytorch(remedy: Remedy) -> str:
    """A module of Python with one function, `remedy(model)`."""
    body = [line for change in remedy.changes for line in change.lines()]
    text = "\n".join(body)
    imports = ["import math"] if "math." in text else []
    imports += ["from fnmatch import fnmatchcase", ""] if "fnmatchcase" in text else []
    imports += ["import torch"]
    imports += ["from torch import nn"] if "nn." in text or "Gain(" in text else []
    imports += ["from torch.nn.utils import parametrize"] if "parametrize." in text else []
    parts = ["\n".join(imports), *([GAIN_CODE.rstrip()] if "Gain(" in text else [])]
    ends = "return groups" if any(isinstance(c, Spare) for c in remedy.changes) else "return model"
    head = (
        f'@torch.no_grad()\ndef remedy(model):\n    """{remedy.title}. Once, after the '
        'model\'s own init."""\n'
    )
    parts.append(head + textwrap.indent(f"{text}\n{ends}", "    "))
    return "\n\n\n".join(parts) + "\n"


# -- Hugging Face ----------------------------------------------------------------------------------
def huggingface(remedy: Remedy, kind: str, config: object) -> str:
    """Write a subclass whose fresh models have the remedy.

    If a field of the config has the same effect, write the config instead.
    """
    lines = [f"# config: {line}" for line in _fields(remedy.changes, config)]
    if all(isinstance(change, Spare) for change in remedy.changes):
        names = [
            name for change in remedy.changes if isinstance(change, Spare) for name in change.names
        ]
        return "\n".join(
            [
                "from transformers import Trainer",
                "",
                "",
                "class NoDecayTrainer(Trainer):",
                "    def get_decay_parameter_names(self, model):",
                f"        spared = {sorted(names)!r}",
                "        return [n for n in super().get_decay_parameter_names(model) if n not in "
                "spared]",
                "",
            ]
        )
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


def _fields(changes: Iterable[Change], config: object) -> Iterable[str]:
    for change in changes:
        if (
            isinstance(change, ScaleOutput)
            and "sqrt(d)" in change.formula
            and hasattr(config, "scale_embedding")
        ):
            yield "scale_embedding = True says the same; then leave the hook out"
    drawn = {
        c.std for c in changes if isinstance(c, Draw) and c.weights.role in (*INNER, *RESIDUAL)
    }
    if len(drawn) == 1 and hasattr(config, "initializer_range"):
        yield (
            f"initializer_range = {plain(next(iter(drawn)))} draws every matrix so, the "
            "embedding and the head too"
        )


# -- Megatron-LM -----------------------------------------------------------------------------------
_BY_DEFAULT = (
    "# W_O and W_2 get init_method_std / sqrt(2 * num_layers) by default (output_layer_init_method)"
)


def _megatron(report: Report, changes: Iterable[Change]) -> Iterable[str]:
    found: list[str] = []
    changes = list(changes)
    table = _table_std(report, changes)
    inner = {c.std for c in changes if isinstance(c, Draw) and c.weights.role in INNER}
    for change in _without_scaled_tables(report, changes):
        match change:
            case Draw(std=std) if std in inner and change.weights.role in (
                "embedding",
                "positions",
                "head",
            ):
                found.append(f"# --init-method-std draws the {change.weights.role} too")
            case ScaleOutput(factor=factor, learned=False) if (
                _on_embedding(report, change) and table
            ):
                found.append(
                    "# no flag scales the embedding; a table of that std gives the same stream at "
                    "init"
                )
                found.append(_table_flags(table * factor))
            case Draw(std=std) if change.weights.role == "embedding":
                found += [_table_flags(std), "# it also spares the embedding weight decay"]
            case Draw(std=std) if change.weights.role in INNER:
                found.append(f"--init-method-std {plain(std)}")
            case Draw() | Scale() if change.weights.role in RESIDUAL:
                found.append(_BY_DEFAULT)
            case NormOutput():
                found.append(
                    "# no flag puts a norm on the embedding; Megatron-DeepSpeed: --embed-layernorm"
                )
            case Spare():
                found.append(
                    "# gains and biases are spared already; --embedding-init-method-std spares "
                    "the embedding"
                )
            case _:
                found.append(f"# no flag says this: {_words(change)}")
    return list(dict.fromkeys(found))


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


def _torchtitan(report: Report, changes: Iterable[Change]) -> Iterable[str]:
    lines: dict[str, None] = {}
    changes = list(changes)
    table, layers = _table_std(report, changes), max(report.model.layers, 1)
    stds = {w.parameter: w.std for w in (report.contract.weights if report.contract else [])}
    for change in _without_scaled_tables(report, changes):
        match change:
            case ScaleOutput(factor=factor, learned=False) if (
                _on_embedding(report, change) and table
            ):
                lines[
                    f"# param_init of tok_embeddings; the head must not be tied to it\n"
                    f'{{"weight": partial(nn.init.normal_, std={plain(table * factor)})}}'
                ] = None
            case Draw(std=std) if change.weights.role:
                lines[_param_init(change.weights.role, plain(std), change.formula)] = None
            case Scale() if change.weights.role in RESIDUAL and (
                base := stds.get(change.weights.names[0])
            ):
                formula = f"{plain(base)} / math.sqrt(2 * {layers})"
                told = "depth_scaled_std(std, layer_id) follows the layer"
                lines[_param_init(change.weights.role, formula, told)] = None
            case Fill(value=value):
                lines[
                    f'{{"weight": partial(nn.init.constant_, val={value!r})}}  # {_words(change)}'
                ] = None
            case _:
                lines[f"# no param_init says this: {_words(change)}"] = None
    head = ["import math"] if any("math." in line for line in lines) else []
    head += (
        ["from functools import partial", "from torch import nn"]
        if any("partial(" in x for x in lines)
        else []
    )
    return [*head, *lines]


def _param_init(role: str, std: str, formula: str) -> str:
    return (
        f"# param_init of {_TITAN.get(role, role)}: {formula}\n"
        f'{{"weight": partial(nn.init.normal_, std={std})}}'
    )


# -- shared ----------------------------------------------------------------------------------------
def _table_std(report: Report, changes: Iterable[Change]) -> float | None:
    """The std of the embedding, as it is or as it is drawn anew."""
    weights = report.contract.weights if report.contract is not None else []
    drawn = {name: c.std for c in changes if isinstance(c, Draw) for name in c.weights.names}
    stds = [drawn.get(w.parameter, w.std) for w in weights if w.role == "embedding" and w.std]
    return max(stds, default=None)


def _without_scaled_tables(report: Report, changes: Sequence[Change]) -> list[Change]:
    """Without the draws of an embedding whose output is scaled: a dialect says both by one std."""
    scaled = any(
        isinstance(c, ScaleOutput) and not c.learned and _on_embedding(report, c) for c in changes
    )
    return [
        c for c in changes if not (scaled and isinstance(c, Draw) and c.weights.role == "embedding")
    ]


def _on_embedding(report: Report, change: ScaleOutput) -> bool:
    weights = report.contract.weights if report.contract is not None else []
    owners = {w.parameter.rpartition(".")[0] for w in weights if w.role == "embedding"}
    return set(change.modules) <= owners


def _words(change: Change) -> str:
    match change:
        case ScaleOutput(modules=modules, factor=factor, learned=learned):
            return (
                f"{', '.join(modules[:3])} times {'a learned scalar' if learned else plain(factor)}"
            )
        case Reparametrise():
            return "W = gain * V with a learned gain"
        case Draw(std=std):
            return f"{change.weights.pattern or change.weights.names[0]} with std {plain(std)}"
        case Scale(factor=factor) | Fill(value=factor):
            return f"{change.weights.pattern or change.weights.names[0]} by {plain(factor)}"
        case NormOutput(module=module):
            return f"a LayerNorm on {module}"
        case _:
            return "parameter groups of the optimizer"
