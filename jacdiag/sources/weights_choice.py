"""Choice of the weights among the sets of tensors in a file.

The choice is by key, by the model that they fit, or by usual names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from jacdiag.errors import SourceError, clipped, printable
from jacdiag.sources.module_wrappers import plain_name
from jacdiag.sources.tensor_sets import (
    USUAL_KEYS,
    Candidate,
    Kind,
    count_numbers,
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
    """
    names = [plain_name(printable(name)) for name in state]
    while names and all(name.startswith("module.") for name in names):
        names = [name.removeprefix("module.") for name in names]
    return dict(zip(names, state.values(), strict=True))


def select_key(path: Path, candidates: Sequence[Candidate], key: str) -> Candidate:
    """Return the set of tensors that `--key` names.

    Args:
        path: the file, for messages.
        candidates: what the file holds.
        key: a dotted path of keys, which may end in a prefix of names, such as "state_dict.model".

    Raises:
        SourceError: nothing has this key, or it is the state of an optimizer.
    """
    chosen = next((c for c in candidates if c.key == key), None) or _below(candidates, key)
    if chosen is None:
        raise SourceError(
            f"'{path}' has nothing under the key '{printable(key)}'",
            got=_listed(candidates),
            hint=_key_hint(candidates),
        )
    if chosen.kind is Kind.OPTIMIZER:
        raise SourceError(
            f"'{printable(key)}' in '{path}' is the state of an optimizer, not weights",
            got=_listed(candidates),
            hint=_key_hint(candidates),
        )
    return chosen


def _below(candidates: Sequence[Candidate], key: str) -> Candidate | None:
    """Return the set that a key names without being its key; None if there is none.

    Either the key ends in a prefix of names inside a set, or it is the first part of the key of one
    set only.
    """
    # 1. A prefix of names.
    for candidate in candidates:
        lead = f"{candidate.key}." if candidate.key else ""
        if not key.startswith(lead):
            continue
        prefix = f"{key[len(lead) :]}."
        inside = {
            name.removeprefix(prefix): entry
            for name, entry in candidate.entries.items()
            if name.startswith(prefix)
        }
        if inside:
            kind, whole_module = candidate.kind, candidate.whole_module
            return Candidate(key, inside, kind, dotted=True, whole_module=whole_module)

    # 2. A part of a key.
    below = [c for c in candidates if c.key.startswith(f"{key}.") and c.kind is not Kind.OPTIMIZER]
    if len(below) == 1:
        return below[0]
    return None


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
    weights = [c for c in candidates if c.kind is not Kind.OPTIMIZER]
    if not weights:
        raise SourceError(
            f"'{path}' holds the state of an optimizer only, and no weights",
            got=_listed(candidates),
            hint="the weights are in the file that the run saved next to it, or in an earlier save",
        )
    networks = [c for c in weights if c.kind is Kind.NETWORK]

    # 1. The top of the file, or a usual key.
    best = min(networks, key=_rank_of_key, default=None)
    if best is not None and (best.key == "" or is_usual(best.key)):
        return best

    # 2. The only network that is no copy of another one.
    originals = [c for c in networks if not is_second(c.key)]
    for only in (originals, networks):
        if len(only) == 1:
            return only[0]
    if networks:
        why = "none of them under a usual key such as 'model'"
        raise _ambiguous(path, originals or networks, candidates, why)

    # 3. An average, or else whatever has most numbers.
    averages = [c for c in weights if c.kind is Kind.AVERAGE]
    return max(averages or weights, key=lambda c: count_numbers(c.entries))


def _rank_of_key(candidate: Candidate) -> tuple[bool, bool, bool, int]:
    """Return the rank of a network by its key, the best first."""
    key = candidate.key
    last = key.rpartition(".")[2]
    place = USUAL_KEYS.index(last) if last in USUAL_KEYS else len(USUAL_KEYS)
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
        hint=" or ".join(f"--key {key}" for key in keys[:3]),
    )


def _listed(candidates: Sequence[Candidate]) -> str:
    """Return what a file holds, in words."""
    if not candidates:
        return "the file holds no tensors"
    shown = [c.describe() for c in candidates[:_LISTED]]
    more = f" and {len(candidates) - _LISTED} more" if len(candidates) > _LISTED else ""
    return f"the file holds {', '.join(shown)}{more}"


def _key_hint(candidates: Sequence[Candidate]) -> str | None:
    """Return what to pass to --key; None if nothing in the file has a key."""
    keys = [c.key for c in candidates if c.key and c.kind is not Kind.OPTIMIZER]
    if keys:
        return " or ".join(f"--key {key}" for key in keys[:3])
    names = [name for c in candidates for name in c.entries if "." in name]
    heads = sorted({name.partition(".")[0] for name in names})
    if not heads:
        return None
    return f"leave --key out, or name the first part of the names: {clipped(', '.join(heads), 200)}"


def _others(candidates: Sequence[Candidate], chosen: Candidate) -> list[str]:
    """Return what a file holds besides the chosen set, in words."""
    others = []
    for c in candidates:
        is_same = c is chosen or c.key == chosen.key
        is_above = chosen.key.startswith(f"{c.key}.") or (not c.key and chosen.key)
        only_scalars = c.kind is Kind.OTHER and count_numbers(c.entries) <= len(c.entries)
        if not is_same and not is_above and not only_scalars:
            others.append(c.describe())
    return others[:_LISTED]


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
    def key(self) -> str:
        """The place of the set and the prefix in it, in words of `--key`."""
        return ".".join(part for part in (self.candidate.key, self.prefix.rstrip(".")) if part)

    @property
    def rank(self) -> tuple[bool, ...]:
        """The rank among the fits, the best first."""
        is_copy = is_second(self.key) or self.candidate.kind in (Kind.AVERAGE, Kind.OTHER)
        unusual_key = bool(self.key) and not is_usual(self.key)
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
    for candidate in searched:
        if candidate.kind is not Kind.OPTIMIZER:
            fits += _fits(candidate, expected)

    # 2. Take the best one that has every name.
    complete = sorted((fit for fit in fits if not fit.missing), key=lambda fit: fit.rank)
    if not complete:
        return _nearest(path, candidates, fits, key)

    best = complete[0]
    equal = [fit for fit in complete if fit.rank == best.rank]
    if len(equal) > 1 and not all(_same_tensors(best, fit) for fit in equal[1:]):
        raise _ambiguous(path, equal, candidates, f"each of them fits {type(model).__name__}")
    return _chosen(best, candidates, complete)


def _nearest(
    path: Path, candidates: Sequence[Candidate], fits: list[_Fit], key: str | None
) -> Choice:
    """Return the default set with its best prefix.

    The message that it does not fit then lists few names.
    """
    choice = choose_by_name(path, candidates, key)
    of_set = [fit for fit in fits if fit.candidate.key == choice.candidate.key]
    near = [fit for fit in of_set if fit.prefix and not fit.added]
    best = min(near, key=lambda fit: fit.missing, default=None)
    if best is not None and best.missing < len(best.names):
        choice.entries = {name: best.candidate.entries[old] for name, old in best.names.items()}
        choice.key = best.key
    return choice


def _same_tensors(first: _Fit, second: _Fit) -> bool:
    """Return whether two fits read the same tensors of the file."""
    tensors = [
        {id(fit.candidate.entries[name]) for name in fit.names.values()} for fit in (first, second)
    ]
    return tensors[0] == tensors[1]


def _fits(candidate: Candidate, expected: Mapping[str, Tensor]) -> list[_Fit]:
    """Compare one set with a model, for every prefix under which names of the model occur.

    Args:
        candidate: the set.
        expected: the model's tensors by name.
    """
    names = _plain_names(candidate.entries, expected)
    shapes = {plain: tuple(candidate.entries[old].shape) for plain, old in names.items()}
    expected_shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}

    # (prefix taken off, prefix added) -> how many names then fit
    counts: Counter[tuple[str, str]] = Counter()
    counts[("", "")] = 0
    for name, shape in shapes.items():
        for prefix, tail in _splits(name):
            if expected_shapes.get(tail) == shape:
                counts[(prefix, "")] += 1
    for name, shape in expected_shapes.items():
        for prefix, tail in _splits(name):
            if prefix and shapes.get(tail) == shape:
                counts[("", prefix)] += 1
    tried = counts.most_common(_TRIED)
    return [_compare(candidate, names, expected, prefix, added) for (prefix, added), _ in tried]


def _splits(name: str) -> list[tuple[str, str]]:
    """Return every way to cut a dotted name into a prefix, which may be empty, and its tail."""
    parts = name.split(".")
    cuts = []
    for place in range(len(parts)):
        prefix = "".join(f"{part}." for part in parts[:place])
        cuts.append((prefix, ".".join(parts[place:])))
    return cuts


def _plain_names(entries: Mapping[str, Any], expected: Mapping[str, Tensor]) -> dict[str, str]:
    """Return names without those of wrappers -> names in the file.

    `module` stays if the model has such a part, or if two names would become one.
    """
    names = {plain_name(printable(name)): name for name in entries}
    if any("module" in name.split(".") for name in expected):
        return names
    shorter = {}
    for name, old in names.items():
        parts = [part for part in name.split(".") if part != "module"]
        shorter[".".join(parts)] = old
    if len(shorter) < len(names):
        return names
    return shorter


def _compare(
    candidate: Candidate,
    names: Mapping[str, str],
    expected: Mapping[str, Tensor],
    prefix: str,
    added: str,
) -> _Fit:
    """Compare one set with a model, with one prefix taken off its names and one added.

    Args:
        candidate: the set.
        names: its names without wrappers -> names in the file.
        expected: the model's tensors by name.
        prefix: taken off the names.
        added: put before them.
    """
    inside = {
        added + name.removeprefix(prefix): old
        for name, old in names.items()
        if name.startswith(prefix)
    }

    # Tensors count, not names: one name of a tie is enough.
    matched: set[int] = set()
    for name, tensor in expected.items():
        old = inside.get(name)
        if old is not None and tuple(candidate.entries[old].shape) == tuple(tensor.shape):
            matched.add(id(tensor))
    missing = {id(tensor) for tensor in expected.values()} - matched

    # Names outside the model's own parts belong to something that was saved with it, such as a
    # criterion.
    heads = {name.partition(".")[0] for name in expected}
    extra = [name for name in inside if name not in expected]
    unexpected = [
        name for name in extra if _is_inside(name, heads) and not name.endswith(_COMPUTED)
    ]
    read = {name: old for name, old in inside.items() if name in expected or name in unexpected}
    return _Fit(candidate, read, prefix, added, len(missing), unexpected)


def _is_inside(name: str, heads: set[str]) -> bool:
    """Return whether an unexpected name is inside the model: below a part, or another number."""
    head = name.partition(".")[0]
    if head in heads:
        return True
    return head.isdecimal() and any(other.isdecimal() for other in heads)


def _chosen(fit: _Fit, candidates: Sequence[Candidate], complete: Sequence[_Fit]) -> Choice:
    """Return the choice of a fit, with notes on what was changed and what was left out.

    Args:
        fit: the chosen one.
        candidates: what the file holds.
        complete: all fits that have every name.
    """
    chosen = fit.candidate
    entries = {name: chosen.entries[old] for name, old in fit.names.items()}
    read = set(fit.names.values())
    left_out = [printable(name) for name in chosen.entries if name not in read]
    notes = []

    # 1. How the names were changed.
    if fit.prefix and not left_out:
        notes.append(f"the prefix '{fit.prefix}' was taken off every name")
    elif fit.prefix:
        notes.append(f"the weights below '{fit.prefix}' were read, as they fit the model")
    if fit.added:
        notes.append(f"the prefix '{fit.added}' was put before every name")

    # 2. What was not read.
    if left_out:
        count = "1 tensor" if len(left_out) == 1 else f"{len(left_out)} tensors"
        names = clipped(", ".join(left_out), 160)
        notes.append(f"left out, as the model has no part of this name: {count}: {names}")
    others = _others(candidates, chosen) + _groups(left_out)

    # 3. What would have fitted as well.
    keys = {other.key for other in complete if not other.unexpected and other.key != fit.key}
    twins = [key for key in sorted(keys) if key and not _overlap(key, fit.key)]
    if twins:
        notes.append(f"also fits the model: {clipped(', '.join(twins), 160)} (--key chooses)")
    return Choice(chosen, entries, fit.key, others, notes)


def _overlap(key: str, chosen: str) -> bool:
    """Return whether one of two keys is above the other, or the same; "" is above all."""
    if not chosen:
        return True
    return f"{key}.".startswith(f"{chosen}.") or f"{chosen}.".startswith(f"{key}.")


def _groups(left_out: Sequence[str]) -> list[str]:
    """Return the tensors that were left out, grouped by the first part of their names."""
    counts = Counter(name.partition(".")[0] for name in left_out)
    groups = []
    for head, count in list(counts.items())[:_LISTED]:
        tensors = "1 tensor" if count == 1 else f"{count:,} tensors"
        groups.append(f"{head} ({tensors})")
    return groups
