"""Sets of tensors in a checkpoint file: where each lies, and whether it holds weights.

Other sets hold the state of an optimizer, or a moving average of the weights.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
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

# What the optimizers of torch and transformers store for each parameter, by their names for it.
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
_ROLES = frozenset(
    "generator discriminator actor critic policy value student teacher target".split()
)
_NOT_A_NETWORK = ("optim", "sched", "scaler", "rng", "loss", "criterion", "metric")
_SECOND_WORDS = frozenset(
    "ema swa shadow average averaged polyak teacher target reference ref frozen momentum".split()
)
_AVERAGE_WORDS = frozenset("ema swa shadow average averaged polyak".split())
_MOST_VISITS = 200_000  # a pickle of a few bytes can describe a tree without end
_MOST_ALIASES = 8  # places at which one container may stand
_DEEPEST = 40
_FEW_KEYS = 10_000  # of a mapping whose keys are listed to name a child


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

    candidates = []
    if weights:
        candidates.append(Candidate(key, weights, _kind(key, weights), dotted=True))
    if state:
        head = _common_head(state)
        place = f"{key}.{head}" if key else head
        candidates.append(Candidate(place, state, Kind.OPTIMIZER))
    return candidates


class _Search:
    """A walk through nested containers that counts its visits."""

    def __init__(self) -> None:
        self.visits = 0
        # Visits of each container by its id: the tree that it is in keeps it alive.
        self.seen: Counter[int] = Counter()

    def collect(self, node: Any, key: str, depth: int) -> list[Candidate]:
        """Return the sets in a node and below it.

        Args:
            node: a container, or a module.
            key: the keys above it, joined by dots.
            depth: how many there are.
        """
        if not self._may_enter(node, depth):
            return []

        # 1. A module is a set of weights as it stands.
        if isinstance(node, nn.Module):
            state = dict(node.state_dict())
            return [Candidate(key, state, _kind(key, state), dotted=True, module=node)]
        if is_pickled_module(node):
            state = dict(self._module_tensors(node, "", depth))
            if not state:
                return []
            return [Candidate(key, state, _kind(key, state), dotted=True, whole_module=True)]

        # 2. Sort what the container holds into tensors and further containers.
        children = _children(node)
        if isinstance(node, Mapping) and _is_optimizer(node):
            return [Candidate(key, _all_tensors(children), Kind.OPTIMIZER)]
        tensors: dict[str, Tensor] = {}
        inner: list[Candidate] = []
        for position, (name, child) in enumerate(children):
            if isinstance(child, Tensor) and name is not None:
                tensors[name] = _plain(child)
            elif isinstance(child, Mapping | list | tuple | Stub | nn.Module):
                step = _label(node, position) if name is None else printable(name)
                inner += self.collect(child, f"{key}.{step}" if key else step, depth + 1)

        # 3. Decide whether this container is one set, or holds several.
        return _combine(key, tensors, inner)

    def _may_enter(self, node: Any, depth: int) -> bool:
        """Count a visit, and return whether the node may be searched.

        Raises:
            SourceError: there were too many visits, or too many of a container with tensors.
        """
        self.visits += 1
        if self.visits > _MOST_VISITS:
            raise SourceError(
                "the checkpoint nests too many containers", got=f"more than {_MOST_VISITS:,}"
            )
        if depth > _DEEPEST:
            return False
        self.seen[id(node)] += 1
        if self.seen[id(node)] <= _MOST_ALIASES:
            return True
        if any(isinstance(child, Tensor) for _, child in _children(node)):
            raise SourceError(
                "the checkpoint nests too many containers", got="one of them comes again and again"
            )
        return False

    def _module_tensors(self, stub: Stub, prefix: str, depth: int) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of a module that was pickled with its class, by name."""
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
    """Return whether a stub stands for an nn.Module that was pickled with its class."""
    if not isinstance(value, Stub) or not isinstance(value.state, Mapping):
        return False
    return "_parameters" in value.state


def _mapping(value: Any) -> Mapping[Any, Any]:
    """Return a mapping, or an empty one in place of something else."""
    return value if isinstance(value, Mapping) else {}


def _children(node: Any) -> list[tuple[str | None, Any]]:
    """Return the children of a container with their names; None for a key that is no text."""
    if isinstance(node, Stub):
        node = node.entries or node.state
    if isinstance(node, Mapping):
        return [(key if isinstance(key, str) else None, value) for key, value in node.items()]
    if isinstance(node, list | tuple) and not isinstance(node, torch.Size):
        return [(None, value) for value in node]
    return []


def _label(node: Any, position: int) -> str:
    """Return how a child without a name is called: its key as text, or its place in a list."""
    if isinstance(node, Stub):
        node = node.entries or node.state
    if isinstance(node, Mapping) and len(node) < _FEW_KEYS:
        return printable(str(list(node)[position]))
    return str(position)


def _plain(tensor: Tensor) -> Tensor:
    """Return a tensor without its graph, dense."""
    tensor = tensor.detach()
    if tensor.layout == torch.strided:
        return tensor
    return tensor.to_dense()


def _is_optimizer(node: Mapping[Any, Any]) -> bool:
    """Return whether a mapping is the state of an optimizer, or of one parameter in it."""
    if isinstance(node.get("param_groups"), list | tuple):
        return True
    moments = [key for key in node if isinstance(key, str) and key in _MOMENTS]
    return any(isinstance(node[key], Tensor) for key in moments)


def _all_tensors(children: list[tuple[str | None, Any]]) -> dict[str, Any]:
    """Return tensors up to two levels below, by place: they are counted and never read."""
    tensors: dict[str, Any] = {}
    level = [(str(position), child) for position, (_, child) in enumerate(children)]
    for _ in range(3):
        below = []
        for name, child in level:
            if isinstance(child, Tensor):
                tensors[name] = child
            elif isinstance(child, Mapping):
                below += [(f"{name}.{place}", value) for place, value in enumerate(child.values())]
        level = below
    return tensors


def _combine(key: str, tensors: dict[str, Tensor], inner: list[Candidate]) -> list[Candidate]:
    """Return the sets that a container makes.

    Args:
        key: of the container.
        tensors: directly in it.
        inner: the sets of the containers below it.
    """
    if _is_of_optimizer(key, tensors, inner):
        merged: dict[str, Any] = {}
        for candidate in inner:
            for name, entry in candidate.entries.items():
                merged[f"{candidate.key}.{name}"] = entry
        return [Candidate(key, merged, Kind.OPTIMIZER)]

    networks = [c for c in inner if c.kind in (Kind.NETWORK, Kind.AVERAGE)]
    if _is_one_network(key, tensors, networks):
        return _merge_network(key, tensors, inner, networks)

    # Single tensors next to a state dict are losses, steps and random states, unless they are named
    # as weights are.
    like_weights = _has_matrix(tensors) or _has_dotted(tensors)
    are_weights = not networks or (like_weights and len(tensors) > len(networks))
    if not tensors or not are_weights:
        return inner
    own = split_flat(tensors, key)
    if not _has_dotted(tensors):
        own = [Candidate(c.key, c.entries, c.kind) for c in own]
    return own + inner


def _is_of_optimizer(key: str, tensors: dict[str, Tensor], inner: list[Candidate]) -> bool:
    """Return whether a container has optimizer states below it and nothing else.

    Its own tensors are then step counts.
    """
    if not key or not inner or any(c.kind is not Kind.OPTIMIZER for c in inner):
        return False
    return not _has_matrix(tensors) and not _has_dotted(tensors)


def _merge_network(
    key: str, tensors: dict[str, Tensor], inner: list[Candidate], networks: list[Candidate]
) -> list[Candidate]:
    """Return the one network of a container, and the optimizer states below it."""
    start = len(key) + 1 if key else 0
    others = [c for c in inner if c not in networks]
    entries: dict[str, Any] = dict(tensors)
    for candidate in [*networks, *(c for c in others if c.kind is Kind.OTHER)]:
        place = candidate.key[start:]
        for name, entry in candidate.entries.items():
            entries[f"{place}.{name}"] = entry
    return [*split_flat(entries, key), *(c for c in others if c.kind is Kind.OPTIMIZER)]


def _is_one_network(key: str, tensors: dict[str, Tensor], networks: list[Candidate]) -> bool:
    """Return whether nested mappings make up one network: {"encoder": {"w": ...}, "decoder": ...}.

    Args:
        key: of the mapping around them.
        tensors: directly in it.
        networks: the mappings.
    """
    if not networks or any(_stands_alone(network) for network in networks):
        return False
    if is_usual(key):
        return True
    if any(network.dotted for network in networks):
        return False
    return len(networks) > 1 or _has_matrix(tensors)


def _stands_alone(network: Candidate) -> bool:
    """Return whether a network is a model by itself, by its key or by how it was saved."""
    last = network.key.rpartition(".")[2]
    if is_usual(network.key) or last.isdecimal() or _words(last) & _ROLES:
        return True
    if network.module is not None or network.whole_module:
        return True
    return network.kind is Kind.AVERAGE


def _has_dotted(names: Iterable[str]) -> bool:
    """Return whether one of the names is dotted, as those of weights are."""
    return any("." in name for name in names)


def _has_matrix(entries: Mapping[str, Any]) -> bool:
    """Return whether one of the tensors has two dimensions or more."""
    return any(len(entry.shape) >= 2 for entry in entries.values())


def _kind(key: str, entries: Mapping[str, Any]) -> Kind:
    """Return what a set of tensors is, by its key and its shapes."""
    numbers = [entry for entry in entries.values() if entry.dtype != torch.bool]
    if not any(len(entry.shape) >= 2 for entry in numbers):
        return Kind.OTHER
    last = key.rpartition(".")[2].lower()
    if any(word in last for word in _NOT_A_NETWORK):
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

    # 1. The moments themselves, and the step counts next to them.
    names = set()
    for name in entries:
        owner, _, last = name.rpartition(".")
        if owner in owners and (last in _MOMENTS or last == "step"):
            names.add(name)

    # 2. What else stands under "optimizer." or "state.", if most of it is moments.
    for head in {name.partition(".")[0] for name in names}:
        below = [name for name in entries if name.startswith(f"{head}.")]
        moments = [name for name in below if name in names]
        if len(moments) > len(below) / 2:
            names.update(below)
    return names


def _common_head(entries: Mapping[str, Any]) -> str:
    """Return the first part that all names share, or words in its place."""
    heads = {name.partition(".")[0] for name in entries}
    if len(heads) > 1:
        return "moments of an optimizer"
    return heads.pop()


def count_numbers(entries: Mapping[str, Any]) -> int:
    """Return how many numbers a set of tensors holds."""
    return sum(math.prod(entry.shape) for entry in entries.values())
