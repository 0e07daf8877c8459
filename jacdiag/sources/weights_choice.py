"""Choice of the weights among the sets of tensors in a file: by key, by the model that they fit, or
by usual names.
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
from jacdiag.sources.tensor_sets import Candidate, Kind, count_numbers, is_second, is_usual

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
        key: its place in words of `--key`; "" for the whole file.
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
    found = next((c for c in candidates if c.key == key), None) or _below(candidates, key)
    if found is None:
        raise SourceError(
            f"'{path}' has nothing under the key '{printable(key)}'",
            got=_listed(candidates),
            hint=_key_hint(candidates),
        )
    if found.kind is Kind.OPTIMIZER:
        raise SourceError(
            f"'{printable(key)}' in '{path}' is the state of an optimizer, not weights",
            got=_listed(candidates),
            hint=_key_hint(candidates),
        )
    return found


def _below(candidates: Sequence[Candidate], key: str) -> Candidate | None:
    """Return the tensors whose names begin with what remains of the key after the key of their
    set.
    """
    for c in candidates:
        lead = f"{c.key}." if c.key else ""
        if not key.startswith(lead):
            continue
        prefix = f"{key[len(lead) :]}."
        inside = {
            name.removeprefix(prefix): entry
            for name, entry in c.entries.items()
            if name.startswith(prefix)
        }
        if inside:
            return Candidate(key, inside, c.kind, dotted=True, whole_module=c.whole_module)
    under = [c for c in candidates if c.key.startswith(f"{key}.") and c.kind is not Kind.OPTIMIZER]
    return under[0] if len(under) == 1 else None


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
    left = {name for name in entries if name == "n_averaged"}
    read = strip_wrappers({name: entry for name, entry in entries.items() if name not in left})
    return Choice(chosen, read, chosen.key, _others(candidates, chosen))


def _default(path: Path, candidates: Sequence[Candidate]) -> Candidate:
    weights = [c for c in candidates if c.kind is not Kind.OPTIMIZER]
    if not weights:
        raise SourceError(
            f"'{path}' holds the state of an optimizer only, and no weights",
            got=_listed(candidates),
            hint="the weights are in the file that the run saved next to it, or in an earlier save",
        )
    networks = [c for c in weights if c.kind is Kind.NETWORK]

    # 1. The top of the file, or a usual key.
    ranked = sorted(
        networks,
        key=lambda c: (c.key != "", not is_usual(c.key), is_second(c.key), _usual_place(c.key)),
    )
    if ranked and (ranked[0].key == "" or is_usual(ranked[0].key)):
        return ranked[0]

    # 2. The only network that is no copy of another one.
    first = [c for c in networks if not is_second(c.key)]
    if len(first) == 1:
        return first[0]
    if len(networks) == 1:
        return networks[0]
    if networks:
        raise _ambiguous(
            path, first or networks, candidates, "none of them under a usual key such as 'model'"
        )

    # 3. An average, or else whatever has most numbers.
    averages = [c for c in weights if c.kind is Kind.AVERAGE]
    return max(averages or weights, key=lambda c: count_numbers(c.entries))


def _usual_place(key: str) -> int:
    from jacdiag.sources.tensor_sets import USUAL_KEYS

    last = key.rpartition(".")[2]
    return USUAL_KEYS.index(last) if last in USUAL_KEYS else len(USUAL_KEYS)


def _ambiguous(
    path: Path, which: Sequence[Any], candidates: Sequence[Candidate], why: str
) -> SourceError:
    keys = [c.key for c in which]
    return SourceError(
        f"'{path}' holds {len(keys)} networks, and it is not known which one to read: "
        f"{clipped(', '.join(keys), 300)}",
        got=f"{why}; {_listed(candidates)}",
        hint=" or ".join(f"--key {key}" for key in keys[:3]),
    )


def _listed(candidates: Sequence[Candidate]) -> str:
    if not candidates:
        return "the file holds no tensors"
    shown = [c.describe() for c in candidates[:_LISTED]]
    more = f" and {len(candidates) - _LISTED} more" if len(candidates) > _LISTED else ""
    return f"the file holds {', '.join(shown)}{more}"


def _key_hint(candidates: Sequence[Candidate]) -> str | None:
    keys = [c.key for c in candidates if c.key and c.kind is not Kind.OPTIMIZER]
    if keys:
        return " or ".join(f"--key {key}" for key in keys[:3])
    heads = sorted(
        {name.partition(".")[0] for c in candidates for name in c.entries if "." in name}
    )
    return (
        f"leave --key out, or name the first part of the names: {clipped(', '.join(heads), 200)}"
        if heads
        else None
    )


def _others(candidates: Sequence[Candidate], chosen: Candidate) -> list[str]:
    """Return what a file holds besides the chosen set."""
    others = []
    for c in candidates:
        same = c is chosen or c.key == chosen.key
        above = chosen.key.startswith(f"{c.key}.") or (not c.key and chosen.key)
        only_scalars = c.kind is Kind.OTHER and count_numbers(c.entries) <= len(c.entries)
        if same or above or only_scalars:
            continue
        others.append(c.describe())
    return others[:_LISTED]


# -- by the model ----------------------------------------------------------------------------------


@dataclass
class _Fit:
    """One set of tensors, read with one prefix, compared with a model."""

    candidate: Candidate
    names: dict[str, str]  # name in the model, or an unexpected one -> name in the candidate
    prefix: str
    added: str
    missing: int
    unexpected: list[str]

    @property
    def key(self) -> str:
        return ".".join(part for part in (self.candidate.key, self.prefix.rstrip(".")) if part)

    @property
    def rank(self) -> tuple[bool, ...]:
        second = is_second(self.key) or self.candidate.kind in (Kind.AVERAGE, Kind.OTHER)
        return (
            self.missing > 0,
            bool(self.unexpected),
            second,
            bool(self.key) and not is_usual(self.key),
        )


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
    searched: Sequence[Candidate] = candidates
    if key is not None:
        searched = [select_key(path, candidates, key)]
    wanted = model.state_dict(keep_vars=True)
    fits = [fit for c in searched if c.kind is not Kind.OPTIMIZER for fit in _fits(c, wanted)]
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
    """Return the default set with its best prefix: the message that it does not fit then lists few
    names.
    """
    choice = choose_by_name(path, candidates, key)
    near = [
        fit
        for fit in fits
        if fit.candidate.key == choice.candidate.key and fit.prefix and not fit.added
    ]
    best = min(near, key=lambda fit: fit.missing, default=None)
    if best is not None and best.missing < len(best.names):
        choice.entries = {name: best.candidate.entries[old] for name, old in best.names.items()}
        choice.key = best.key
    return choice


def _same_tensors(one: _Fit, other: _Fit) -> bool:
    first = {id(one.candidate.entries[name]) for name in one.names.values()}
    second = {id(other.candidate.entries[name]) for name in other.names.values()}
    return first == second


def _fits(candidate: Candidate, wanted: Mapping[str, Tensor]) -> list[_Fit]:
    """Compare one set with a model, for every prefix under which names of the model occur."""
    names = _plain_names(candidate.entries, wanted)
    shapes = {plain: tuple(candidate.entries[old].shape) for plain, old in names.items()}
    # (prefix taken off, prefix added) -> names that then fit
    counts: Counter[tuple[str, str]] = Counter()
    counts[("", "")] = 0
    for name, shape in shapes.items():
        for prefix, rest in _splits(name):
            if rest in wanted and tuple(wanted[rest].shape) == shape:
                counts[(prefix, "")] += 1
    for name, tensor in wanted.items():
        for prefix, rest in _splits(name):
            if prefix and shapes.get(rest) == tuple(tensor.shape):
                counts[("", prefix)] += 1
    return [_compared(candidate, names, wanted, *way) for way, _ in counts.most_common(_TRIED)]


def _splits(name: str) -> list[tuple[str, str]]:
    """Return every way to cut a dotted name into a prefix, which may be empty, and a rest."""
    parts = name.split(".")
    cuts = []
    for place in range(len(parts)):
        prefix = "".join(f"{part}." for part in parts[:place])
        cuts.append((prefix, ".".join(parts[place:])))
    return cuts


def _plain_names(entries: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> dict[str, str]:
    """Return names without those of wrappers -> names in the file; `module` stays if the model has
    such a part.
    """
    names = {plain_name(printable(name)): name for name in entries}
    if any("module" in name.split(".") for name in wanted):
        return names
    shorter = {
        ".".join(part for part in name.split(".") if part != "module"): old
        for name, old in names.items()
    }
    return shorter if len(shorter) == len(names) else names


def _compared(
    candidate: Candidate,
    names: Mapping[str, str],
    wanted: Mapping[str, Tensor],
    prefix: str,
    added: str,
) -> _Fit:
    inside = {
        added + name.removeprefix(prefix): old
        for name, old in names.items()
        if name.startswith(prefix)
    }
    matched: set[int] = set()
    for name, tensor in wanted.items():
        if name in inside and tuple(candidate.entries[inside[name]].shape) == tuple(tensor.shape):
            matched.add(id(tensor))
    missing = {id(tensor) for tensor in wanted.values()} - matched

    # Names outside the model's own parts belong to something that was saved with it, such as a
    # criterion.
    heads = {name.partition(".")[0] for name in wanted}
    unexpected = [
        name
        for name in inside
        if name not in wanted and _belongs(name, heads) and not name.endswith(_COMPUTED)
    ]
    kept = {name: old for name, old in inside.items() if name in wanted or name in unexpected}
    return _Fit(candidate, kept, prefix, added, len(missing), unexpected)


def _belongs(name: str, heads: set[str]) -> bool:
    """Return whether an unexpected name lies inside the model: below one of its parts, or another
    number.
    """
    head = name.partition(".")[0]
    return head in heads or (head.isdecimal() and any(other.isdecimal() for other in heads))


def _chosen(fit: _Fit, candidates: Sequence[Candidate], complete: Sequence[_Fit]) -> Choice:
    c = fit.candidate
    entries = {name: c.entries[old] for name, old in fit.names.items()}
    read = set(fit.names.values())
    left = [printable(name) for name in c.entries if name not in read]
    notes = []

    # 1. How the names were changed.
    if fit.prefix and not left:
        notes.append(f"the prefix '{fit.prefix}' was taken off every name")
    elif fit.prefix:
        notes.append(f"the weights below '{fit.prefix}' were read, as they fit the model")
    if fit.added:
        notes.append(f"the prefix '{fit.added}' was put before every name")

    # 2. What was not read.
    if left:
        count = "1 tensor" if len(left) == 1 else f"{len(left)} tensors"
        notes.append(
            f"left out, as the model has no part of this name: {count}: "
            f"{clipped(', '.join(left), 160)}"
        )
    others = _others(candidates, c) + _groups(left)

    # 3. What would have fitted as well.
    twins = sorted(
        {other.key for other in complete if not other.unexpected and other.key != fit.key}
    )
    twins = [key for key in twins if key and not _overlaps(key, fit.key)]
    if twins:
        notes.append(f"also fits the model: {clipped(', '.join(twins), 160)} (--key chooses)")
    return Choice(c, entries, fit.key, others, notes)


def _overlaps(one: str, other: str) -> bool:
    return not other or f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _groups(left: Sequence[str]) -> list[str]:
    """Return the tensors of the same mapping that were left out, by the first part of their
    names.
    """
    counts = Counter(name.partition(".")[0] for name in left)
    groups = []
    for head, count in list(counts.items())[:_LISTED]:
        tensors = "1 tensor" if count == 1 else f"{count:,} tensors"
        groups.append(f"{head} ({tensors})")
    return groups
