"""Sets of tensors in a checkpoint file: where each lies, and whether it holds weights or the state
of an optimizer.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from jacdiag.errors import SourceError, printable
from jacdiag.sources.formats.guard import Stub

USUAL_KEYS = (
    "state_dict",
    "model_state_dict",
    "model",
    "model_state",
    "module",
    "net",
    "network",
    "params",
    "weights",
)

# Names that torch's optimizers, and those of transformers, give to what they keep for each
# parameter.
_MOMENTS = frozenset(
    {
        "exp_avg",
        "exp_avg_sq",
        "max_exp_avg_sq",
        "momentum_buffer",
        "exp_avg_sq_row",
        "exp_avg_sq_col",
        "square_avg",
        "acc_delta",
        "exp_inf",
        "exp_avg_slow",
        "exp_avg_diff",
    }
)
_NOT_A_NETWORK = ("optim", "sched", "scaler", "rng", "loss", "criterion", "metric")
_SECOND_WORDS = frozenset(
    "ema swa shadow average averaged polyak teacher target reference ref frozen momentum".split()
)
_AVERAGE_WORDS = frozenset("ema swa shadow average averaged polyak".split())
_MOST_VISITS = 200_000  # a pickle of a few bytes can describe a tree without end
_MOST_ALIASES = 8  # places at which one container may stand
_DEEPEST = 40


class Kind(Enum):
    """What a set of tensors is."""

    NETWORK = "weights"
    AVERAGE = "moving average"
    OPTIMIZER = "optimizer state"
    OTHER = "other tensors"


@dataclass(frozen=True)
class Candidate:
    """A set of tensors that may be the weights.

    Attributes:
        key: the keys above it, joined by dots; "" at the top of the file.
        entries: tensors, or where they lie in the file, by name.
        kind: what it is.
        dotted: its own keys were names such as "layers.0.weight", as in a state dict.
        whole_module: it was pickled as a module, of which only the weights were read.
        module: the module itself, if the file's pickle is trusted.
    """

    key: str
    entries: Mapping[str, Any]
    kind: Kind
    dotted: bool = False
    whole_module: bool = False
    module: nn.Module | None = None

    def describe(self) -> str:
        """Return its key, kind and size in words."""
        count = len(self.entries)
        tensors = "1 tensor" if count == 1 else f"{count:,} tensors"
        return f"{self.key or 'the top of the file'} ({self.kind.value}, {tensors})"


def is_second(key: str) -> bool:
    """Return whether a key names a copy of the model, such as its average or its teacher."""
    return bool(_words(key) & _SECOND_WORDS)


def is_usual(key: str) -> bool:
    """Return whether the last part of a key is one under which the model is usually stored."""
    return key.rpartition(".")[2] in USUAL_KEYS


def find_candidates(tree: Any) -> list[Candidate]:
    """Find every set of tensors in what a file of torch.save held.

    Args:
        tree: nested mappings, lists and stubs.

    Returns:
        The sets in the order of the file.

    Raises:
        SourceError: the tree is too large to be a checkpoint.
    """
    return _Search().collect(tree, "", 0)


def split_flat(entries: Mapping[str, Any], key: str = "") -> list[Candidate]:
    """Split a file with one level of dotted names into weights and the state of an optimizer."""
    moments = _moment_names(entries)
    weights = {name: entry for name, entry in entries.items() if name not in moments}
    state = {name: entry for name, entry in entries.items() if name in moments}

    found = []
    if weights:
        found.append(Candidate(key, weights, _kind(key, weights), dotted=True))
    if state:
        head = _common_head(state)
        found.append(
            Candidate(".".join(part for part in (key, head) if part), state, Kind.OPTIMIZER)
        )
    return found


class _Search:
    """A walk through nested containers that counts its visits."""

    def __init__(self) -> None:
        self.visits = 0
        # of each container: the tree that it is in keeps it alive
        self.seen: Counter[int] = Counter()

    def collect(self, node: Any, key: str, depth: int) -> list[Candidate]:
        self.visits += 1
        if self.visits > _MOST_VISITS:
            raise SourceError(
                "the checkpoint nests too many containers", got=f"more than {_MOST_VISITS:,}"
            )
        if depth > _DEEPEST:
            return []
        self.seen[id(node)] += 1
        if self.seen[id(node)] > _MOST_ALIASES:
            if any(isinstance(child, Tensor) for _, child in _children(node)):
                raise SourceError(
                    "the checkpoint nests too many containers",
                    got="one of them comes again and again",
                )
            return []

        # 1. A module is a set of weights as it stands.
        if isinstance(node, nn.Module):
            state = dict(node.state_dict())
            return [Candidate(key, state, _kind(key, state), dotted=True, module=node)]
        if is_pickled_module(node):
            state = dict(self._module_tensors(node, "", depth))
            return (
                [Candidate(key, state, _kind(key, state), dotted=True, whole_module=True)]
                if state
                else []
            )

        # 2. Sort what the container holds into tensors and further containers.
        children = _children(node)
        tensors = {
            name: _plain(child)
            for name, child in children
            if isinstance(child, Tensor) and name is not None
        }
        if isinstance(node, Mapping) and _is_optimizer(node):
            return [Candidate(key, _all_tensors(children), Kind.OPTIMIZER)]
        inner: list[Candidate] = []
        for position, (name, child) in enumerate(children):
            if isinstance(child, Mapping | list | tuple | Stub | nn.Module):
                step = printable(name) if name is not None else str(_label(node, position))
                inner += self.collect(child, f"{key}.{step}" if key else step, depth + 1)

        # 3. Decide whether this container is one set, or holds several.
        return _combined(key, tensors, inner)

    def _module_tensors(self, stub: Stub, prefix: str, depth: int) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of a module that was pickled whole, by name."""
        self.visits += 1
        if self.visits > _MOST_VISITS or depth > _DEEPEST:
            return
        for part in ("_parameters", "_buffers"):
            for name, value in _mapping(stub.state.get(part)).items():
                if isinstance(value, Tensor):
                    yield f"{prefix}{name}", _plain(value)
        for name, value in _mapping(stub.state.get("_modules")).items():
            if is_pickled_module(value):
                yield from self._module_tensors(value, f"{prefix}{name}.", depth + 1)


def is_pickled_module(value: Any) -> bool:
    """Return whether a stub stands for an nn.Module that was pickled whole."""
    return (
        isinstance(value, Stub)
        and isinstance(value.state, Mapping)
        and "_parameters" in value.state
    )


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}


def _children(node: Any) -> list[tuple[str | None, Any]]:
    """Return the children of a container; None stands for the name of one that has no text as its
    key.
    """
    if isinstance(node, Stub):
        node = node.entries or node.state
    if isinstance(node, Mapping):
        return [(key if isinstance(key, str) else None, value) for key, value in node.items()]
    if isinstance(node, list | tuple) and not isinstance(node, torch.Size):
        return [(None, value) for value in node]
    return []


def _label(node: Any, position: int) -> Any:
    """Return how a child without a name is called: its key as text, or its place in a list."""
    if isinstance(node, Stub):
        node = node.entries or node.state
    if isinstance(node, Mapping):
        return printable(str(list(node)[position])) if len(node) < 10_000 else position
    return position


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def _is_optimizer(node: Mapping[Any, Any]) -> bool:
    """Return whether a mapping is the state of an optimizer, or of one parameter in it."""
    if isinstance(node.get("param_groups"), list | tuple):
        return True
    return any(
        isinstance(key, str) and key in _MOMENTS and isinstance(node[key], Tensor) for key in node
    )


def _all_tensors(children: list[tuple[str | None, Any]]) -> dict[str, Any]:
    """Return tensors up to two levels below, by place: they are counted and never read."""
    found: dict[str, Any] = {}
    level = [(str(position), child) for position, (_, child) in enumerate(children)]
    for _ in range(3):
        below = []
        for name, child in level:
            if isinstance(child, Tensor):
                found[name] = child
            elif isinstance(child, Mapping):
                below += [(f"{name}.{place}", value) for place, value in enumerate(child.values())]
        level = below
    return found


def _combined(key: str, tensors: dict[str, Tensor], inner: list[Candidate]) -> list[Candidate]:
    """Return the sets that a container with these tensors and inner sets makes."""
    networks = [c for c in inner if c.kind in (Kind.NETWORK, Kind.AVERAGE)]
    rest = [c for c in inner if c not in networks]

    # A container above optimizer states only is the optimizer's: its own tensors are step counts.
    only_moments = (
        bool(inner) and all(c.kind is Kind.OPTIMIZER for c in inner) and not _has_matrix(tensors)
    )
    if only_moments and key and not any("." in name for name in tensors):
        merged = {f"{c.key}.{name}": entry for c in inner for name, entry in c.entries.items()}
        return [Candidate(key, merged, Kind.OPTIMIZER)]

    if _is_one_network(key, tensors, networks):
        start = len(key) + 1 if key else 0
        whole: dict[str, Any] = dict(tensors)
        for c in networks + [c for c in rest if c.kind is Kind.OTHER]:
            whole.update({f"{c.key[start:]}.{name}": entry for name, entry in c.entries.items()})
        return [*split_flat(whole, key), *(c for c in rest if c.kind is Kind.OPTIMIZER)]

    # Single tensors next to a state dict are losses, steps and random states, unless they are named
    # as weights are.
    like_weights = _has_matrix(tensors) or any("." in name for name in tensors)
    if tensors and (not networks or (like_weights and len(tensors) > len(networks))):
        own = split_flat(tensors, key)
        if not any("." in name for name in tensors):
            own = [Candidate(c.key, c.entries, c.kind) for c in own]
        return own + inner
    return inner


def _is_one_network(key: str, tensors: dict[str, Tensor], networks: list[Candidate]) -> bool:
    """Return whether nested mappings are the parts of one network, such as {"encoder": {"w": ...},
    "decoder": ...}.
    """
    if not networks:
        return False
    for c in networks:
        last = c.key.rpartition(".")[2]
        if (
            is_usual(c.key)
            or c.kind is Kind.AVERAGE
            or c.module is not None
            or c.whole_module
            or last.isdecimal()
        ):
            return False
        if _words(last) & _ROLES:
            return False
    if is_usual(key):
        return True
    if any(c.dotted for c in networks):
        return False
    return len(networks) > 1 or _has_matrix(tensors)


_ROLES = frozenset(
    "generator discriminator actor critic policy value student teacher target".split()
)


def _has_matrix(entries: Mapping[str, Any]) -> bool:
    return any(len(entry.shape) >= 2 for entry in entries.values())


def _kind(key: str, entries: Mapping[str, Any]) -> Kind:
    last = key.rpartition(".")[2].lower()
    if not any(len(entry.shape) >= 2 and entry.dtype != torch.bool for entry in entries.values()):
        return Kind.OTHER
    if any(part in last for part in _NOT_A_NETWORK):
        return Kind.OTHER
    if "n_averaged" in entries or _words(key) & _AVERAGE_WORDS:
        return Kind.AVERAGE
    return Kind.NETWORK


def _words(key: str) -> set[str]:
    """Return the words of a key: "state_dict_ema" and "modelEma" both hold "ema"."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key)
    return set(re.split(r"[^a-z]+", spaced.lower()))


def _moment_names(entries: Mapping[str, Any]) -> set[str]:
    """Return the names that belong to an optimizer: its moments, and what stands next to them."""
    owners = {name.rpartition(".")[0] for name in entries if name.rpartition(".")[2] in _MOMENTS}
    if not owners:
        return set()

    found = set()
    for name in entries:
        owner, _, last = name.rpartition(".")
        if owner in owners and (last in _MOMENTS or last == "step"):
            found.add(name)

    # What else stands under "optimizer." or "state." is the optimizer's too, if most of it is
    # moments.
    for head in {name.partition(".")[0] for name in found}:
        below = [name for name in entries if name.startswith(f"{head}.")]
        if sum(name in found for name in below) > len(below) / 2:
            found.update(below)
    return found


def _common_head(entries: Mapping[str, Any]) -> str:
    heads = {name.partition(".")[0] for name in entries}
    return heads.pop() if len(heads) == 1 else "moments of an optimizer"


def count_numbers(entries: Mapping[str, Any]) -> int:
    """Return how many numbers a set of tensors holds."""
    return sum(math.prod(entry.shape) for entry in entries.values())
