"""Choice of the weights among the sets of tensors in a file.

The choice is by key, by the model that they fit, or by usual names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from jacdiag.errors import SourceError, clipped, printable
from jacdiag.sources.module_wrappers import plain_name
from jacdiag.sources.tensor_sets import (
    USUAL_KEYS,
    Candidate,
    TensorSetKind,
    count_numbers,
    count_tensors,
    is_second,
    is_usual,
)

_TRIED = 12  # prefixes of one set that are compared in full
_LISTED = 12

# Buffers that older versions of models saved, and that newer ones compute.
_COMPUTED = (
    "rotary_emb.inv_freq",
    "attn.masked_bias",
    "attention.masked_bias",
    "embeddings.position_ids",
)


@dataclass
class Choice:
    """The set of tensors that is read.

    Attributes:
        candidate: where it lies in the file.
        entries: the tensors by the names that the model is given.
        key: its place in words of `--key`; "" for the entire file.
        others: what else the file holds, in words.
        notes: how names were changed, and what was left out.
    """

    candidate: Candidate
    entries: dict[str, Any]
    key: str
    others: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def strip_wrappers(state: Mapping[str, Any]) -> dict[str, Any]:
    """Take the names that wrappers add off every key; `module.` only if all keys begin with it.

    A name is shown on terminals: what is not printable in it is written as an escape.

    Args:
        state: tensors by name.

    Returns:
        The same tensors by their names without wrappers.
    """
    names = [plain_name(printable(name)) for name in state]

    # Several wrappers may stand around each other. Without names, there is nothing to take off.
    while names and _all_begin_with("module.", names):
        names = [name.removeprefix("module.") for name in names]
    return dict(zip(names, state.values(), strict=True))


def _all_begin_with(prefix: str, names: Iterable[str]) -> bool:
    """Return whether all names begin with a prefix."""
    return all(name.startswith(prefix) for name in names)


def select_key(path: Path, candidates: Sequence[Candidate], key: str) -> Candidate:
    """Return the set of tensors that `--key` names.

    Args:
        path: the file, for messages.
        candidates: what the file holds.
        key: a dotted path of keys, which may end in a prefix of names, such as "state_dict.model".

    Raises:
        SourceError: nothing has this key, or it is the state of an optimizer.
    """
    chosen = _under_key(candidates, key)
    if chosen is None:
        raise SourceError(
            f"'{path}' has nothing under the key '{printable(key)}'",
            got=_listed(candidates),
            hint=_key_hint(candidates),
        )
    if chosen.is_optimizer:
        raise SourceError(
            f"'{printable(key)}' in '{path}' is the state of an optimizer, not weights",
            got=_listed(candidates),
            hint=_key_hint(candidates),
        )
    return chosen


def _under_key(candidates: Sequence[Candidate], key: str) -> Candidate | None:
    """Return the set that a key names, exactly or in part; None if there is none."""
    # 1. The key of a set.
    for candidate in candidates:
        if candidate.key == key:
            return candidate

    # 2. The key of a set and a prefix of the names in it.
    for candidate in candidates:
        inside = _below_prefix(candidate, key)
        if inside is not None:
            return inside

    # 3. The first part of the key of one set only.
    below = [c for c in _weights_of(candidates) if c.key.startswith(f"{key}.")]
    if len(below) == 1:
        return below[0]
    return None


def _weights_of(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the sets that are not the state of an optimizer."""
    return [candidate for candidate in candidates if not candidate.is_optimizer]


def _of_kind(candidates: Sequence[Candidate], kind: TensorSetKind) -> list[Candidate]:
    """Return the sets of one kind."""
    return [candidate for candidate in candidates if candidate.kind is kind]


def _below_prefix(candidate: Candidate, key: str) -> Candidate | None:
    """Return the part of a set whose names begin with the end of a key; None if it is empty."""
    lead = f"{candidate.key}." if candidate.key else ""
    if not key.startswith(lead):
        return None
    prefix = f"{key[len(lead) :]}."
    inside = {}
    for name, entry in candidate.entries.items():
        if name.startswith(prefix):
            inside[name.removeprefix(prefix)] = entry
    if not inside:
        return None
    # A module that was read with its code is the entire set, so the part is not one.
    return replace(candidate, key=key, entries=inside, dotted=True, module=None)


def choose_by_name(path: Path, candidates: Sequence[Candidate], key: str | None = None) -> Choice:
    """Choose the weights without a model.

    Args:
        path: the file, for messages.
        candidates: what the file holds.
        key: of `--key`.

    Raises:
        SourceError: the file holds no weights, or several networks and none under a usual key.
    """
    if key is not None:
        chosen = select_key(path, candidates, key)
    else:
        chosen = _default(path, candidates)
    entries = dict(chosen.entries)
    entries.pop("n_averaged", None)  # a counter, not a weight
    return Choice(chosen, strip_wrappers(entries), chosen.key, _others(candidates, chosen))


def _default(path: Path, candidates: Sequence[Candidate]) -> Candidate:
    """Return the set that is read if neither a key nor a model says which.

    Raises:
        SourceError: there are no weights, or several networks and none stands out.
    """
    weights = _weights_of(candidates)
    if not weights:
        raise SourceError(
            f"'{path}' holds the state of an optimizer only, and no weights",
            got=_listed(candidates),
            hint="the weights are in the file that the run saved next to it, or in an earlier save",
        )

    # 1. A network, if there is one.
    networks = _of_kind(weights, TensorSetKind.NETWORK)
    if networks:
        return _default_network(path, networks, candidates)

    # 2. An average, or else whatever has most numbers.
    averages = _of_kind(weights, TensorSetKind.AVERAGE)
    return max(averages or weights, key=lambda c: count_numbers(c.entries))


def _default_network(
    path: Path, networks: Sequence[Candidate], candidates: Sequence[Candidate]
) -> Candidate:
    """Return the network of a file that stands out by its key.

    Args:
        path: the file, for messages.
        networks: at least one.
        candidates: all that the file holds.

    Raises:
        SourceError: there are several networks, and none stands out.
    """
    # 1. The top of the file, or a usual key.
    best = min(networks, key=_rank_of_key)
    if best.key == "" or is_usual(best.key):
        return best

    # 2. The only network, or the only one that is no copy of another one.
    originals = [c for c in networks if not is_second(c.key)]
    if len(originals) == 1:
        return originals[0]
    if len(networks) == 1:
        return networks[0]
    why = "none of them under a usual key such as 'model'"
    raise _ambiguous(path, originals or networks, candidates, why)


def _rank_of_key(candidate: Candidate) -> tuple[bool, bool, bool, int]:
    """Return the rank of a network by its key, the best first."""
    key = candidate.key
    last = key.rpartition(".")[2]
    # keys that are not usual rank after those that are
    place = len(USUAL_KEYS)
    if last in USUAL_KEYS:
        place = USUAL_KEYS.index(last)
    return key != "", not is_usual(key), is_second(key), place


def _ambiguous(
    path: Path, which: Sequence[Any], candidates: Sequence[Candidate], why: str
) -> SourceError:
    """Return the error of several sets of which none stands out."""
    keys = [c.key for c in which]
    return SourceError(
        f"'{path}' holds {len(keys)} networks, and it is not known which one to read: "
        f"{clipped(', '.join(keys), 300)}",
        got=f"{why}; {_listed(candidates)}",
        hint=_options_for(keys),
    )


def _options_for(keys: Sequence[str]) -> str:
    """Return the `--key` options of the first keys, for a hint."""
    return " or ".join(f"--key {key}" for key in keys[:3])


def _listed(candidates: Sequence[Candidate]) -> str:
    """Return what a file holds, in words."""
    if not candidates:
        return "the file holds no tensors"

    # The first ones, and how many more there are.
    shown = ", ".join(c.describe() for c in candidates[:_LISTED])
    if len(candidates) > _LISTED:
        shown += f" and {len(candidates) - _LISTED} more"
    return f"the file holds {shown}"


def _key_hint(candidates: Sequence[Candidate]) -> str | None:
    """Return what to pass to --key; None if nothing in the file has a key."""
    # 1. The keys of the sets. The top of the file has none.
    keys = [c.key for c in _weights_of(candidates)]
    keys = list(filter(None, keys))
    if keys:
        return _options_for(keys)

    # 2. The first parts of the names in them.
    heads = sorted(_heads_of_dotted(candidates))
    if not heads:
        return None
    return f"leave --key out, or name the first part of the names: {clipped(', '.join(heads), 200)}"


def _heads_of_dotted(candidates: Sequence[Candidate]) -> set[str]:
    """Return what stands before the first dot of the names in all sets."""
    heads = set()
    for candidate in candidates:
        for name in candidate.entries:
            head, dot, _ = name.partition(".")
            if dot:
                heads.add(head)
    return heads


def _others(candidates: Sequence[Candidate], chosen: Candidate) -> list[str]:
    """Return what a file holds besides the chosen set, in words."""
    others = [c.describe() for c in candidates if _is_another(c, chosen)]
    return others[:_LISTED]


def _is_another(candidate: Candidate, chosen: Candidate) -> bool:
    """Return whether a set is worth naming next to the chosen one."""
    # 1. The same one, or one that the chosen one is a part of.
    if candidate is chosen or candidate.key == chosen.key:
        return False
    if candidate.key == "":
        return False
    if chosen.key.startswith(f"{candidate.key}."):
        return False

    # 2. Step counts and losses are one number each.
    if candidate.kind is not TensorSetKind.OTHER:
        return True
    return count_numbers(candidate.entries) > len(candidate.entries)


# -- by the model ----------------------------------------------------------------------------------


@dataclass
class _Fit:
    """One set of tensors, read with one prefix, compared with a model.

    Attributes:
        candidate: the set.
        names: name in the model, or an unexpected one -> name in the set.
        prefix: taken off the names of the set.
        added: put before them.
        missing: how many tensors of the model it lacks.
        unexpected: names that the model does not have.
    """

    candidate: Candidate
    names: dict[str, str]
    prefix: str
    added: str
    missing: int
    unexpected: list[str]

    @property
    def entries(self) -> dict[str, Any]:
        """The tensors by their names in the model."""
        return {name: self.candidate.entries[old] for name, old in self.names.items()}

    @property
    def tensor_ids(self) -> set[int]:
        """What identifies the tensors of the file that are read."""
        return {id(entry) for entry in self.entries.values()}

    @property
    def key(self) -> str:
        """The place of the set and the prefix in it, in words of `--key`."""
        # Either may be empty: at the top of the file, and for the names as they are.
        parts = [self.candidate.key, self.prefix.rstrip(".")]
        return ".".join(filter(None, parts))

    @property
    def rank(self) -> tuple[bool, ...]:
        """The rank among the fits, the best first."""
        # The model itself goes before a copy of it: its average, or its teacher.
        is_network = self.candidate.kind is TensorSetKind.NETWORK
        is_copy = is_second(self.key) or not is_network

        # The top of the file is as good as a usual key.
        unusual_key = self.key != "" and not is_usual(self.key)
        return self.missing > 0, bool(self.unexpected), is_copy, unusual_key


def choose_by_model(
    path: Path, candidates: Sequence[Candidate], model: nn.Module, key: str | None = None
) -> Choice:
    """Choose the set of tensors, and the prefix of its names, that fit a model.

    Args:
        path: the file, for messages.
        candidates: what the file holds.
        model: its names and shapes are compared.
        key: of `--key`.

    Returns:
        The only set with every name of the model; of several, the model rather than its average. If
        none has every name, the one that `choose_by_name` takes.

    Raises:
        SourceError: several sets fit equally well, or as for `choose_by_name`.
    """
    # 1. Compare every set with the model, with every prefix that may be taken off or added.
    searched: Sequence[Candidate] = candidates
    if key is not None:
        searched = [select_key(path, candidates, key)]
    expected = model.state_dict(keep_vars=True)
    fits: list[_Fit] = []
    for candidate in _weights_of(searched):
        fits += _fits(candidate, expected)

    # 2. Take the best one that has every name.
    complete = [fit for fit in fits if fit.missing == 0]
    if not complete:
        return _nearest(path, candidates, fits, key)
    best = min(complete, key=lambda fit: fit.rank)

    # 3. Another one that is as good must be the same tensors under another key.
    equal = [fit for fit in complete if fit.rank == best.rank]
    if any(fit.tensor_ids != best.tensor_ids for fit in equal):
        raise _ambiguous(path, equal, candidates, f"each of them fits {type(model).__name__}")
    return _chosen(best, candidates, complete)


def _nearest(
    path: Path, candidates: Sequence[Candidate], fits: list[_Fit], key: str | None
) -> Choice:
    """Return the default set with its best prefix.

    The message that it does not fit then lists few names.
    """
    # 1. The set that is read without a model, with every prefix that may be taken off.
    choice = choose_by_name(path, candidates, key)
    near = []
    for fit in fits:
        is_of_set = fit.candidate.key == choice.candidate.key
        if is_of_set and fit.prefix and not fit.added:
            near.append(fit)

    # 2. Its best prefix, if any name of the model then fits.
    best = min(near, key=lambda fit: fit.missing, default=None)
    if best is not None and best.missing < len(best.names):
        choice.entries = best.entries
        choice.key = best.key
    return choice


@dataclass(frozen=True)
class _Prefix:
    """A change of the names of a set: `removed` is taken off, `added` is put before them."""

    removed: str = ""
    added: str = ""


def _fits(candidate: Candidate, expected: Mapping[str, Tensor]) -> list[_Fit]:
    """Compare one set with a model, for every prefix under which names of the model occur.

    Args:
        candidate: the set.
        expected: the model's tensors by name.
    """
    # 1. Count how many names fit under each prefix, by their shapes.
    names = _plain_names(candidate.entries, expected)
    shapes = {plain: tuple(candidate.entries[old].shape) for plain, old in names.items()}
    expected_shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    counts = _count_matches(shapes, expected_shapes)

    # 2. Compare in full under those that fit most.
    fits = []
    for prefix, _ in counts.most_common(_TRIED):
        fits.append(_compare(candidate, names, expected, prefix))
    return fits


def _count_matches(
    shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> Counter[_Prefix]:
    """Return how many names fit under each prefix.

    Args:
        shapes: of the tensors in the file, by name.
        expected: of the tensors in the model, by name.
    """
    counts: Counter[_Prefix] = Counter()
    counts[_Prefix()] = 0  # the names as they are, even if none fits

    # 1. Prefixes in the file that the model does not have.
    for name, shape in shapes.items():
        for prefix, tail in _splits(name):
            if expected.get(tail) == shape:
                counts[_Prefix(removed=prefix)] += 1

    # 2. Prefixes in the model that the file does not have. The empty one is counted already.
    for name, shape in expected.items():
        for prefix, tail in _splits(name)[1:]:
            if shapes.get(tail) == shape:
                counts[_Prefix(added=prefix)] += 1
    return counts


def _splits(name: str) -> list[tuple[str, str]]:
    """Return every way to cut a dotted name into a prefix, the empty one first, and its tail."""
    parts = name.split(".")
    cuts = []
    for place in range(len(parts)):
        tail = ".".join(parts[place:])
        cuts.append((name.removesuffix(tail), tail))
    return cuts


def _plain_names(entries: Mapping[str, Any], expected: Mapping[str, Tensor]) -> dict[str, str]:
    """Return names without those of wrappers -> names in the file.

    `module` stays if the model has such a part, or if two names would become one.
    """
    names = {plain_name(printable(name)): name for name in entries}
    if _has_part(expected, "module"):
        return names

    # DataParallel adds the name wherever it stands in the model.
    shorter = {_without_part(name, "module"): old for name, old in names.items()}
    if len(shorter) < len(names):
        return names
    return shorter


def _has_part(names: Iterable[str], part: str) -> bool:
    """Return whether one of several dotted names has a part."""
    return any(part in name.split(".") for name in names)


def _without_part(name: str, part: str) -> str:
    """Return a dotted name without a part, wherever it stands."""
    return ".".join(other for other in name.split(".") if other != part)


def _compare(
    candidate: Candidate,
    names: Mapping[str, str],
    expected: Mapping[str, Tensor],
    prefix: _Prefix,
) -> _Fit:
    """Compare one set with a model, with one prefix taken off its names and one added.

    Args:
        candidate: the set.
        names: its names without wrappers -> names in the file.
        expected: the model's tensors by name.
        prefix: taken off the names, or put before them.
    """
    # 1. The names under this prefix, as the model would have them.
    inside = {}
    for name, old in names.items():
        if name.startswith(prefix.removed):
            inside[prefix.added + name.removeprefix(prefix.removed)] = old

    # 2. Count the model's tensors that are missing. One name of a tie is enough.
    matched: set[int] = set()
    for name, tensor in expected.items():
        if name not in inside:
            continue
        entry = candidate.entries[inside[name]]
        if tuple(entry.shape) == tuple(tensor.shape):
            matched.add(id(tensor))
    missing = {id(tensor) for tensor in expected.values()} - matched

    # 3. Leave out names that belong to something that was saved with the model.
    unexpected = _unexpected(inside, expected)
    left_out = inside.keys() - expected.keys() - set(unexpected)
    read = {name: old for name, old in inside.items() if name not in left_out}
    return _Fit(candidate, read, prefix.removed, prefix.added, len(missing), unexpected)


def _unexpected(names: Iterable[str], expected: Mapping[str, Tensor]) -> list[str]:
    """Return the names that the model should have and does not.

    Args:
        names: of a file, as the model would have them.
        expected: the model's tensors by name.
    """
    heads = {name.partition(".")[0] for name in expected}
    unexpected = []
    for name in names:
        # What the model has, or computes by itself.
        if name in expected or name.endswith(_COMPUTED):
            continue
        # Names outside the model's own parts belong to something that was saved with it, such as a
        # criterion.
        if _is_inside(name, heads):
            unexpected.append(name)
    return unexpected


def _is_inside(name: str, heads: set[str]) -> bool:
    """Return whether an unexpected name is inside the model: below a part, or another number."""
    head = name.partition(".")[0]
    if head in heads:
        return True

    # One more layer of an nn.Sequential, whose parts are numbers.
    if not head.isdecimal():
        return False
    return any(map(str.isdecimal, heads))


def _chosen(fit: _Fit, candidates: Sequence[Candidate], complete: Sequence[_Fit]) -> Choice:
    """Return the choice of a fit, with notes on what was changed and what was left out.

    Args:
        fit: the chosen one.
        candidates: what the file holds.
        complete: all fits that have every name.
    """
    # 1. What is not read.
    chosen = fit.candidate
    read = set(fit.names.values())
    left_out = [printable(name) for name in chosen.entries if name not in read]

    others = _others(candidates, chosen) + _groups(left_out)

    # 2. Notes on it, and on what would have fitted as well.
    notes = _notes_on_prefix(fit, is_partial=bool(left_out))
    if left_out:
        names = clipped(", ".join(left_out), 160)
        count = count_tensors(len(left_out))
        notes.append(f"left out, as the model has no part of this name: {count}: {names}")
    twins = _twin_keys(fit, complete)
    if twins:
        notes.append(f"also fits the model: {clipped(', '.join(twins), 160)} (--key chooses)")
    return Choice(chosen, fit.entries, fit.key, others, notes)


def _notes_on_prefix(fit: _Fit, *, is_partial: bool) -> list[str]:
    """Return notes on how the names were changed.

    Args:
        fit: the chosen one.
        is_partial: whether tensors of the set were left out.
    """
    notes = []
    # If all of the set was read, the prefix is only a matter of names.
    if fit.prefix and is_partial:
        notes.append(f"the weights below '{fit.prefix}' were read, as they fit the model")
    elif fit.prefix:
        notes.append(f"the prefix '{fit.prefix}' was taken off every name")

    if fit.added:
        notes.append(f"the prefix '{fit.added}' was put before every name")
    return notes


def _twin_keys(fit: _Fit, complete: Sequence[_Fit]) -> list[str]:
    """Return the keys of what would have fitted as well, in order.

    Args:
        fit: the chosen one.
        complete: all fits that have every name.
    """
    keys = set()
    for other in complete:
        # The top of the file has no key to choose it by.
        if other.unexpected or not other.key:
            continue
        if not _overlap(other.key, fit.key):
            keys.add(other.key)
    return sorted(keys)


def _overlap(key: str, chosen: str) -> bool:
    """Return whether one of two keys is above the other, or the same; "" is above all."""
    if not chosen:
        return True

    # The dot keeps "model" from being above "model_ema".
    is_below = f"{key}.".startswith(f"{chosen}.")
    is_above = f"{chosen}.".startswith(f"{key}.")

    return is_below or is_above


def _groups(left_out: Sequence[str]) -> list[str]:
    """Return the tensors that were left out, grouped by the first part of their names."""
    counts = Counter(name.partition(".")[0] for name in left_out)
    groups = []
    for head, count in counts.items():
        groups.append(f"{head} ({count_tensors(count)})")
    # a list that is longer helps nobody
    return groups[:_LISTED]
