"""What a source says about the training of its weights: how they came about, not their values."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

from jacdiag.sources.source import Source

Basis = Literal["given", "built", "file", "name", "weights"]

_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".weights")
# File names that say nothing: the folder around the file has the name.
_PLAIN_NAME = re.compile(
    r"(pytorch_)?(model|weights|state_dict|checkpoint|ckpt|consolidated|adapter_model|mp_rank_\d+_model_states)"
    r"([-_.]?\d+(-of-\d+)?)?"
)
_COUNT = re.compile(
    r"(?:^|[^a-z0-9])(?:global_?)?(steps?|iter(?:ation)?s?|checkpoint|ckpt|epochs?)[-_=]?(\d+)(?![a-z0-9])"
)
_WORD = re.compile(r"[a-z]+")
_TRAINED = frozenset(
    "trained pretrained finetuned finetune tuned converged best final last".split()
)
_FRESH = frozenset("init initial initialised initialized untrained fresh random".split())


@dataclass(frozen=True, kw_only=True)
class History:
    """What a source says.

    Attributes:
        state: "init" or "trained".
        reason: in a few words, for the header of a report.
        basis: "built" here, a fact in the "file", or its "name".
    """

    state: Literal["init", "trained"]
    reason: str
    basis: Basis


def history_of(source: Source) -> History | None:
    """Return what a source says about the training of its weights; None if it says nothing.

    A fact in the file counts more than its name, and steps of an optimizer count more than a step
    of 0.

    Args:
        source: as it was loaded.
    """
    if source.info.get("format") in ("factory", "hf-config"):
        return History(
            state="init",
            reason=f"built here by {source.info.get('factory', source.name)}",
            basis="built",
        )
    if source.stepped:
        reason = "the file holds the state of an optimizer that has stepped"
        return History(state="trained", reason=reason, basis="file")
    if source.step is not None:
        reason = f"saved at step {source.step:,}"
        return History(state="trained" if source.step else "init", reason=reason, basis="file")
    path = source.info.get("path")
    if not path:
        return None
    return name_says(str(path))


def name_says(path: str) -> History | None:
    """Return what the name of a file or folder says; None if it says nothing, or both.

    Args:
        path: of the file or folder. A file with a plain name, such as `model.safetensors`, goes by
            its folder's name.

    Example:
        >>> name_says("runs/checkpoint-500/model.safetensors").reason
        "its name says 'checkpoint-500'"
        >>> name_says("vanilla-trained.pt").state, name_says("step0.pt").state
        ('trained', 'init')
        >>> name_says("xavier.pt") is None
        True
    """
    pure = PurePath(path)
    name = pure.stem if pure.suffix.lower() in _SUFFIXES else pure.name
    if _PLAIN_NAME.fullmatch(name.lower()):
        name = pure.parent.name
    lowered = name.lower()

    # 1. A count: of an epoch that is 0, nobody knows whether it is over.
    counts = [(word, int(number)) for word, number in _COUNT.findall(lowered)]
    exact = [number for word, number in counts if word.startswith(("step", "iter"))]
    trained = any(number for _, number in counts)
    fresh = bool(exact) and not trained

    # 2. Words.
    words = set(_WORD.findall(lowered))
    trained = trained or bool(words & _TRAINED)
    fresh = fresh or bool(words & _FRESH)
    if trained == fresh:
        return None
    return History(
        state="trained" if trained else "init", reason=f"its name says '{name}'", basis="name"
    )
