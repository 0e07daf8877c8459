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
    # 1. Weights that were drawn here.
    if source.info.get("format") in ("factory", "hf-config"):
        builder = source.info.get("factory", source.name)
        return History(state="init", reason=f"built here by {builder}", basis="built")

    # 2. Facts in the file.
    if source.stepped:
        reason = "the file holds the state of an optimizer that has stepped"
        return History(state="trained", reason=reason, basis="file")
    if source.step is not None:
        reason = f"saved at step {source.step:,}"
        return History(state=_state(source.step > 0), reason=reason, basis="file")

    # 3. Its name.
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
    name = _telling_name(PurePath(path))
    says_trained, says_fresh = _said_by_counts(name.lower())
    words = set(_WORD.findall(name.lower()))
    says_trained |= not words.isdisjoint(_TRAINED)
    says_fresh |= not words.isdisjoint(_FRESH)

    # A name that says both, or nothing, says nothing.
    if says_trained == says_fresh:
        return None
    return History(state=_state(says_trained), reason=f"its name says '{name}'", basis="name")


def _telling_name(path: PurePath) -> str:
    """Return the name of a file or folder without its suffix; of a plain one, its folder's name."""
    # 1. A folder may have a dot in its name: "gpt2-0.5".
    name = path.name
    if path.suffix.lower() in _SUFFIXES:
        name = path.stem

    # 2. Files of transformers have the same name in every folder.
    if _PLAIN_NAME.fullmatch(name.lower()):
        return path.parent.name
    return name


def _said_by_counts(name: str) -> tuple[bool, bool]:
    """Return whether the counts in a name say that it is trained, and that it is fresh.

    Args:
        name: in lower case, such as "step500" or "epoch_0".
    """
    words = []
    for word, number in _COUNT.findall(name):
        if int(number) > 0:
            return True, False
        words.append(word)

    # All are 0. Of an epoch that is 0, nobody knows whether it is over.
    steps = [word for word in words if word.startswith(("step", "iter"))]
    return False, bool(steps)


def _state(is_trained: bool) -> Literal["init", "trained"]:
    """Return how a report calls weights that are trained, or not."""
    if is_trained:
        return "trained"

    return "init"
