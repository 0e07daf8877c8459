"""Sets of tensors in a checkpoint file: where each lies, and whether it holds weights.

Other sets hold the state of an optimizer, or a moving average of the weights.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
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

# What optimizers store for each parameter, by names that no weight has.
_MOMENTS = re.compile(
    r"(max_)?exp_(avg|inf|hessian)\w*|momentum_buffer|square_avg|acc_delta|mu_product"
)
# Names that a weight may have too. They are moments next to one of the companions.
# Adagrad, Rprop, RMSprop and ASGD of torch; its Adafactor; schedule-free; bitsandbytes.
_PLAIN_MOMENTS = frozenset(
    "sum prev step_size grad_avg ax eta mu row_var col_var variance z "
    "state1 state2 qmap1 qmap2 absmax1 absmax2".split()
)
_COMPANIONS = frozenset({"step", "qmap1"})
_ROLES = frozenset(
    "generator discriminator actor critic policy value student teacher target".split()
)
# Words of a key. As parts of words they mean nothing: "lossless", "parametric", "optimus".
_NOT_A_NETWORK = frozenset(
    "optim optims optimizer optimizers optimiser optimisers sched scheduler schedulers lrscheduler "
    "scaler scalers gradscaler rng loss losses criterion criteria criterions metric metrics".split()
)
_SECOND_WORDS = frozenset(
    "ema swa shadow average averaged polyak teacher target reference ref frozen momentum".split()
)
_AVERAGE_WORDS = frozenset("ema swa shadow average averaged polyak".split())
_MOST_VISITS = 200_000  # a pickle of a few bytes can describe a tree without end
_MOST_ALIASES = 8  # places at which one container may stand
_DEEPEST = 40
_FEW_KEYS = 10_000  # of a mapping whose keys are listed to name a child
_CONTAINERS = (Mapping, list, tuple, Stub, nn.Module)


class TensorSetKind(Enum):
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
    kind: TensorSetKind
    dotted: bool = False
    whole_module: bool = False
    module: nn.Module | None = None

    @property
    def is_optimizer(self) -> bool:
        """Whether it is the state of an optimizer."""
        return self.kind is TensorSetKind.OPTIMIZER

    @property
    def is_network(self) -> bool:
        """Whether it is the weights of a network, or an average of them."""
        return self.kind in (TensorSetKind.NETWORK, TensorSetKind.AVERAGE)

    def describe(self) -> str:
        """Return its key, kind and size in words."""
        place = self.key or "the top of the file"
        return f"{place} ({self.kind.value}, {count_tensors(len(self.entries))})"


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
    # 1. Sort the tensors.
    moments = _moment_names(entries)
    weights: dict[str, Any] = {}
    state: dict[str, Any] = {}

    for name, entry in entries.items():
        group = state if name in moments else weights
        group[name] = entry

    # 2. A set for each group that is not empty.
    candidates = []
    if weights:
        candidates.append(Candidate(key, weights, _kind(key, weights), dotted=True))
    if state:
        place = _joined(key, _common_head(state))
        candidates.append(Candidate(place, state, TensorSetKind.OPTIMIZER))
    return candidates


def _joined(key: str, step: str) -> str:
    """Return a key with one more step; "" is the top of the file."""
    if not key:
        return step
    # the top has no dot after it
    return f"{key}.{step}"


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
            return self._of_pickled_module(node, key, depth)

        # 2. So is the state of an optimizer.
        children = _children(node)
        if isinstance(node, Mapping) and _is_optimizer(node):
            return [Candidate(key, _all_tensors(children), TensorSetKind.OPTIMIZER)]

        # 3. Sort what another container holds into tensors and further containers.
        tensors: dict[str, Tensor] = {}
        inner: list[Candidate] = []
        for position, child in enumerate(children):
            if isinstance(child.value, Tensor) and child.name is not None:
                tensors[child.name] = _plain(child.value)
            elif isinstance(child.value, _CONTAINERS):
                step = _label(node, child, position)
                inner += self.collect(child.value, _joined(key, step), depth + 1)

        # Some programs save arrays in place of tensors.
        if not tensors:
            tensors = _tensors_of_arrays(children)

        # 4. Decide whether this container is one set, or holds several.
        return _combine(key, tensors, inner)

    def _of_pickled_module(self, stub: Stub, key: str, depth: int) -> list[Candidate]:
        """Return the set of a module that was pickled with its class; none if it is empty."""
        state = dict(self._module_tensors(stub, "", depth))
        if not state:
            return []
        return [Candidate(key, state, _kind(key, state), dotted=True, whole_module=True)]

    def _may_enter(self, node: Any, depth: int) -> bool:
        """Count a visit, and return whether the node may be searched.

        Raises:
            SourceError: there were too many visits, or too many of a container with tensors.
        """
        # 1. The limits of the entire search.
        self.visits += 1
        if self.visits > _MOST_VISITS:
            raise SourceError(
                "the checkpoint nests too many containers", got=f"more than {_MOST_VISITS:,}"
            )

        # No weights are so deep.
        if depth > _DEEPEST:
            return False

        # 2. The limit for one container, which may stand at several places.
        self.seen[id(node)] += 1
        if self.seen[id(node)] <= _MOST_ALIASES:
            return True

        # Without tensors of its own, it is left out.
        if any(isinstance(child.value, Tensor) for child in _children(node)):
            raise SourceError(
                "the checkpoint nests too many containers", got="one of them comes again and again"
            )
        return False

    def _module_tensors(self, stub: Stub, prefix: str, depth: int) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of a module that was pickled with its class, by name."""
        self.visits += 1
        if self.visits > _MOST_VISITS or depth > _DEEPEST:
            return

        # 1. Its own tensors.
        parameters = _mapping(stub.state.get("_parameters"))
        buffers = _mapping(stub.state.get("_buffers"))
        for name, value in (*parameters.items(), *buffers.items()):
            if isinstance(value, Tensor):
                yield f"{prefix}{name}", _plain(value)

        # 2. Those of the modules in it.
        for name, value in _mapping(stub.state.get("_modules")).items():
            if is_pickled_module(value):
                yield from self._module_tensors(value, f"{prefix}{name}.", depth + 1)


def is_pickled_module(value: Any) -> bool:
    """Return whether a stub stands for an nn.Module that was pickled with its class."""
    if not isinstance(value, Stub):
        return False
    # Every module has this attribute, even if it is empty.
    return isinstance(value.state, Mapping) and "_parameters" in value.state


def _mapping(value: Any) -> Mapping[Any, Any]:
    """Return a mapping, or an empty one in place of something else."""
    if isinstance(value, Mapping):
        return value
    # A pickle may hold anything under the names of a module's attributes.
    return {}


class _Child(NamedTuple):
    """What a container holds at one place; the name is None if its key is no text."""

    name: str | None
    value: Any


def _tensors_of_arrays(children: Iterable[_Child]) -> dict[str, Tensor]:
    """Return arrays of NumPy as tensors by name; none if no array is a matrix of weights.

    Random states and lists of losses are arrays too, of one dimension.
    """
    # 1. The arrays, of which one has to be a matrix of weights.
    arrays = {}
    for child in children:
        if child.name is not None and isinstance(child.value, np.ndarray):
            arrays[child.name] = child.value
    if not any(map(_is_matrix_of_floats, arrays.values())):
        return {}

    # 2. As tensors. Those of objects or of text are none.
    tensors = {}
    for name, array in arrays.items():
        tensor = _tensor_of_array(array)
        if tensor is not None:
            tensors[name] = tensor
    return tensors


def _is_matrix_of_floats(array: np.ndarray[Any, Any]) -> bool:
    """Return whether an array may be a matrix of weights, by its shape and dtype."""
    return array.ndim >= 2 and array.dtype.kind == "f"


def _tensor_of_array(array: np.ndarray[Any, Any]) -> Tensor | None:
    """Return an array as a tensor; None if torch has no such dtype."""
    is_numeric = array.dtype.kind in "fiub"
    if not is_numeric:
        return None

    # torch takes the byte order of this machine alone.
    native = array.astype(array.dtype.newbyteorder("="))
    try:
        return torch.from_numpy(np.ascontiguousarray(native))
    except TypeError:
        return None


def _contents(node: Any) -> Any:
    """Return what a stub was given in place of the stub; anything else as it is."""
    if not isinstance(node, Stub):
        return node

    # A dict or list of a class of its own was filled after it was made.
    if node.entries:
        return node.entries

    return node.state


def _children(node: Any) -> list[_Child]:
    """Return what a container holds; nothing for any other object."""
    # 1. Mappings.
    node = _contents(node)
    if isinstance(node, Mapping):
        return [_Child(_text_key(key), value) for key, value in node.items()]

    # 2. Sequences. A size is a tuple of numbers, not a container.
    if isinstance(node, torch.Size) or not isinstance(node, list | tuple):
        return []
    return [_Child(None, value) for value in node]


def _text_key(key: Any) -> str | None:
    """Return a key that is text; None for another one."""
    if isinstance(key, str):
        return key
    # optimizers number their parameters
    return None


def _label(node: Any, child: _Child, position: int) -> str:
    """Return the step of a key that leads to a child: its name, its key as text, or its place."""
    if child.name is not None:
        return printable(child.name)

    # A key that is no text. Listing all keys of a large mapping for each child would take long.
    node = _contents(node)
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
    # 1. The state of an optimizer of torch.
    if isinstance(node.get("param_groups"), list | tuple):
        return True

    # 2. The state of one parameter. The keys of a mapping may be of any type.
    names = set()
    for key, value in node.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            names.add(key)
    if any(map(_MOMENTS.fullmatch, names)):
        return True

    # 3. The same under plain names, with nothing else next to them.
    has_companion = not _COMPANIONS.isdisjoint(node)
    has_moment = not _PLAIN_MOMENTS.isdisjoint(names)
    return has_companion and has_moment and names <= _PLAIN_MOMENTS | _COMPANIONS


def _all_tensors(children: list[_Child]) -> dict[str, Any]:
    """Return tensors up to two levels below, by place: they are counted and never read."""
    tensors: dict[str, Any] = {}
    # state -> parameter -> moment
    level = {str(position): child.value for position, child in enumerate(children)}
    for _ in range(3):
        below: dict[str, Any] = {}
        for name, value in level.items():
            if isinstance(value, Tensor):
                tensors[name] = value
            elif isinstance(value, Mapping):
                below |= _by_place(name, value)
        level = below
    return tensors


def _by_place(name: str, mapping: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the values of a mapping by its name and their places in it."""
    return {f"{name}.{place}": value for place, value in enumerate(mapping.values())}


def _combine(key: str, tensors: dict[str, Tensor], inner: list[Candidate]) -> list[Candidate]:
    """Return the sets that a container makes.

    Args:
        key: of the container.
        tensors: directly in it.
        inner: the sets of the containers below it.
    """
    # 1. The state of one optimizer, parameter by parameter.
    if _is_of_optimizer(key, tensors, inner):
        return [Candidate(key, _merged(inner), TensorSetKind.OPTIMIZER)]

    # 2. The parts of one network.
    networks = [c for c in inner if c.is_network]
    if _is_one_network(key, tensors, networks):
        return _merge_network(key, tensors, inner)

    # 3. Sets that stand side by side, and perhaps one more of the container's own tensors.
    if not tensors or not _are_weights(tensors, networks):
        return inner
    return _own_sets(key, tensors) + inner


def _merged(candidates: list[Candidate]) -> dict[str, Any]:
    """Return the tensors of several sets, each name after the key of its set."""
    merged: dict[str, Any] = {}
    for candidate in candidates:
        # the key keeps names apart that occur in several sets
        for name, entry in candidate.entries.items():
            merged[f"{candidate.key}.{name}"] = entry
    return merged


def _are_weights(tensors: dict[str, Tensor], networks: list[Candidate]) -> bool:
    """Return whether tensors directly in a container are weights.

    Args:
        tensors: directly in the container.
        networks: the networks below it.
    """
    if not networks:
        return True

    # Single tensors next to a state dict are losses, steps and random states, unless they are named
    # as weights are.
    if not _look_like_weights(tensors):
        return False
    return len(tensors) > len(networks)


def _look_like_weights(tensors: dict[str, Tensor]) -> bool:
    """Return whether tensors have a matrix among them, or names as those of weights."""
    return _has_matrix(tensors) or _has_dotted(tensors)


def _own_sets(key: str, tensors: dict[str, Tensor]) -> list[Candidate]:
    """Return the sets of the tensors directly in a container."""
    own = split_flat(tensors, key)
    if _has_dotted(tensors):
        return own

    # Names without dots may be those of parts of one network, as an outer container has them.
    return [replace(candidate, dotted=False) for candidate in own]


def _is_of_optimizer(key: str, tensors: dict[str, Tensor], inner: list[Candidate]) -> bool:
    """Return whether a container has optimizer states below it and nothing else.

    Its own tensors are then step counts.
    """
    # The top of a file is never one: the file may hold other things.
    if not key or not inner:
        return False

    are_optimizers = all(candidate.is_optimizer for candidate in inner)
    return are_optimizers and not _look_like_weights(tensors)


def _merge_network(key: str, tensors: dict[str, Tensor], inner: list[Candidate]) -> list[Candidate]:
    """Return the one network of a container, and the optimizer states below it.

    Args:
        key: of the container.
        tensors: directly in it.
        inner: the sets of the containers below it.
    """
    # 1. Sort the sets. Small parts, such as the gains of a norm, belong to the network too.
    networks = [c for c in inner if c.is_network]
    small_parts = [c for c in inner if c.kind is TensorSetKind.OTHER]
    optimizers = [c for c in inner if c.is_optimizer]

    # 2. Name their tensors by the place below the container.
    lead = _joined(key, "")
    entries: dict[str, Any] = dict(tensors)
    for name, entry in _merged([*networks, *small_parts]).items():
        entries[name.removeprefix(lead)] = entry
    return split_flat(entries, key) + optimizers


def _is_one_network(key: str, tensors: dict[str, Tensor], networks: list[Candidate]) -> bool:
    """Return whether nested mappings make up one network: {"encoder": {"w": ...}, "decoder": ...}.

    Args:
        key: of the mapping around them.
        tensors: directly in it.
        networks: the mappings.
    """
    # 1. There is something, and all of it is a part.
    if not networks:
        return False
    if any(map(_stands_alone, networks)):
        return False

    # 2. The key says so.
    if is_usual(key):
        return True

    # 3. A mapping with dotted names is an entire state dict, not a part of one.
    if any(network.dotted for network in networks):
        return False
    return len(networks) > 1 or _has_matrix(tensors)


def _stands_alone(network: Candidate) -> bool:
    """Return whether a network is a model by itself, by its key or by how it was saved."""
    # 1. How it was saved.
    if network.module is not None or network.whole_module:
        return True
    if network.kind is TensorSetKind.AVERAGE:
        return True

    # 2. Its key: a usual one, a place in a list, or a role such as "generator".
    last = network.key.rpartition(".")[2]
    if is_usual(network.key) or last.isdecimal():
        return True
    return not _words(last).isdisjoint(_ROLES)


def _has_dotted(names: Iterable[str]) -> bool:
    """Return whether one of the names is dotted, as those of weights are."""
    return any("." in name for name in names)


def _has_matrix(entries: Mapping[str, Any]) -> bool:
    """Return whether one of the tensors has two dimensions or more."""
    return any(len(entry.shape) >= 2 for entry in entries.values())


def _kind(key: str, entries: Mapping[str, Any]) -> TensorSetKind:
    """Return what a set of tensors is, by its key and its shapes."""
    # 1. A network has matrices. Masks are no weights.
    numbers = {name: entry for name, entry in entries.items() if entry.dtype != torch.bool}
    if not _has_matrix(numbers):
        return TensorSetKind.OTHER

    # 2. The key may say that it is no network.
    last = key.rpartition(".")[2]
    if not _words(last).isdisjoint(_NOT_A_NETWORK):
        return TensorSetKind.OTHER

    # 3. Or an average. `torch.optim.swa_utils.AveragedModel` saves a counter.
    names_average = not _words(key).isdisjoint(_AVERAGE_WORDS)
    if names_average or "n_averaged" in entries:
        return TensorSetKind.AVERAGE
    return TensorSetKind.NETWORK


def _words(key: str) -> set[str]:
    """Return the words of a key: "state_dict_ema" and "modelEma" both hold "ema"."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key)
    return set(re.split(r"[^a-z]+", spaced.lower()))


def _moment_names(entries: Mapping[str, Any]) -> set[str]:
    """Return the names that belong to an optimizer: its moments, and what stands next to them."""
    owners = _owners_of_moments(entries)
    if not owners:
        return set()

    # 1. The moments themselves, and the step counts next to them.
    names = set()
    for name in entries:
        owner, _, last = name.rpartition(".")
        if owner in owners and _is_of_state(last):
            names.add(name)

    # 2. What else stands under "optimizer." or "state.", if most of it is moments.
    for head in _heads(names):
        below = {name for name in entries if name.startswith(f"{head}.")}
        if len(below & names) > len(below) / 2:
            names |= below
    return names


def _heads(names: Iterable[str]) -> set[str]:
    """Return what stands before the first dot of each name."""
    return {name.partition(".")[0] for name in names}


def _is_of_state(last: str) -> bool:
    """Return whether the last part of a name is a moment's, or that of what stands next to one."""
    if last in _PLAIN_MOMENTS or last in _COMPANIONS:
        return True
    return _MOMENTS.fullmatch(last) is not None


def _owners_of_moments(names: Collection[str]) -> set[str]:
    """Return the names of the parameters that have moments: "state.0" of "state.0.exp_avg"."""
    owners = set()
    for name in names:
        owner, _, last = name.rpartition(".")
        # 1. By a name that no weight has.
        if _MOMENTS.fullmatch(last):
            owners.add(owner)
        if last not in _PLAIN_MOMENTS or not owner:
            continue

        # 2. By a plain name, next to a companion.
        if any(f"{owner}.{companion}" in names for companion in _COMPANIONS):
            owners.add(owner)
    return owners


def _common_head(entries: Mapping[str, Any]) -> str:
    """Return the first part that all names share, or words in its place."""
    heads = _heads(entries)
    if len(heads) > 1:
        return "moments of an optimizer"
    return heads.pop()


def count_numbers(entries: Mapping[str, Any]) -> int:
    """Return how many numbers a set of tensors holds."""
    return sum(math.prod(entry.shape) for entry in entries.values())


def count_tensors(count: int) -> str:
    """Return a number of tensors in words, such as "1 tensor" or "1,200 tensors"."""
    if count == 1:
        return "1 tensor"
    return f"{count:,} tensors"
