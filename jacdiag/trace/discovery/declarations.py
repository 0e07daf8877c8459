"""Sub-layers that a user names, where a fused operation hides the addition; and what was hidden, by
name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from jacdiag.errors import TraceError, UsageError
from jacdiag.trace.discovery.detached import CutAddition, cut_additions, cut_off_parts
from jacdiag.trace.discovery.residual import Finder, Site
from jacdiag.trace.graph.additions import Term
from jacdiag.trace.graph.graph import Graph

if TYPE_CHECKING:
    from jacdiag.trace.site_list import Sites

_ENDS = ("in", "out")
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_MOST_CUTS = 3
_MOST_PATTERNS = 8


@dataclass(frozen=True)
class Declaration:
    """A sub-layer by the module boundaries that its shortcut and its branch cross. Made by
    `declare`.
    """

    shortcut: str
    branch: str


def declare(*, shortcut: str, branch: str) -> Declaration:
    """Names a sub-layer y = x + f(x) that the dataflow does not show: a fused add-norm, a kernel, a
    scripted function.

    The sum y need not be visible: the branch is the function from one tensor at a module boundary
    to another.

    Args:
        shortcut: where x is met: "PATH" or "PATH:in", the first floating tensor that the module is
            given; "PATH:out", the first that it returns.
        branch: where f(x) is met: "PATH" or "PATH:out", or "PATH:in". A "*" stands for one part of
            a path, and for the same one in both, so that "layers.*.norm1" and "layers.*.attn"
            declare a sub-layer in every layer.

    Example:
        >>> import torch, jacdiag
        >>> class Net(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.norm, self.ff = torch.nn.LayerNorm(4), torch.nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         return torch.stack((x, self.ff(self.norm(x)))).sum(0)  # no addition to be seen
        >>> len(jacdiag.sites(Net(), torch.randn(2, 3, 4)))
        0
        >>> mine = jacdiag.declare(shortcut="norm", branch="ff")
        >>> [site.name for site in jacdiag.sites(Net(), torch.randn(2, 3, 4), declared=[mine])]
        ['ff']

    The same in a configuration file:

        [tool.jacdiag.sites.attention]
        shortcut = "layers.*.norm1"
        branch = "layers.*.attn"
    """
    for which, text in (("shortcut", shortcut), ("branch", branch)):
        end = text.rpartition(":")[2] if ":" in text else "in"
        if not text.strip() or end not in _ENDS:
            raise UsageError(
                f"the {which} of a declaration is no module boundary",
                got=repr(text),
                hint="'PATH', 'PATH:in' or 'PATH:out', as in 'layers.*.norm1:in'",
            )
    if shortcut.count("*") != branch.count("*"):
        raise UsageError(
            "the '*' of a declaration must stand in both of its paths",
            got=f"{shortcut!r} and {branch!r}",
            hint="'layers.*.norm1' with 'layers.*.attn'",
        )
    return Declaration(shortcut, branch)


def declarations(
    given: Iterable[Declaration | Mapping[str, Any]] | Mapping[str, Any],
) -> list[Declaration]:
    """Reads declarations as a configuration file holds them: tables of `shortcut` and `branch`, by
    any name.
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise UsageError(
            "declared is a list of declarations", got=repr(given), hint="jacdiag.declare(...)"
        )
    named = (
        given.items()
        if isinstance(given, Mapping)
        else ((f"number {k + 1}", one) for k, one in enumerate(given))
    )
    found = []
    for name, one in named:
        if isinstance(one, Declaration):
            found.append(one)
            continue
        keys = set(one) if isinstance(one, Mapping) else set()
        if keys != {"shortcut", "branch"} or not all(isinstance(v, str) for v in one.values()):
            raise UsageError(
                f"site '{name}' cannot be used",
                got=repr(one),
                hint="a table with the strings `shortcut` and `branch`",
            )
        found.append(declare(**one))
    return found


def declared_sites(
    graph: Graph, finder: Finder, given: Sequence[Declaration], found: list[Site]
) -> list[Site]:
    """Makes the sites of declarations; one that was found anyway is not made twice.

    Raises:
        TraceError: a path that no module has, or a branch that does not depend on its shortcut.
    """
    known = {(s.shortcut, s.term.operand) for s in found}
    made: list[Site] = []
    for one in given:
        for x, f, where in _values(graph, one):
            if (x, f) in known:
                continue
            known.add((x, f))
            made.append(_site(graph, finder, x, f, where, group=len(found) + len(made)))
    return made


def _values(graph: Graph, one: Declaration) -> Iterable[tuple[int, int, str]]:
    starts, ends = _met(graph, one.shortcut, "in"), _met(graph, one.branch, "out")
    for key, values in starts.items():
        others = ends.get(key, [])
        where = f"shortcut '{one.shortcut}', branch '{one.branch}'" + (
            f", * = {', '.join(key)}" if key else ""
        )
        if len(values) != len(others):
            raise TraceError(
                "the two modules of a declaration did not run equally often",
                got=f"{len(values)} and {len(others)} times ({where})",
            )
        for x, f in zip(values, others, strict=True):
            yield x, f, where


def _met(graph: Graph, text: str, default: str) -> dict[tuple[str, ...], list[int]]:
    """The values at a boundary by what the stars stand for, in the order of the calls."""
    path, _, end = text.rpartition(":") if ":" in text else (text, "", default)
    pattern = re.compile(re.escape(path).replace(r"\*", r"([^.]+)"))
    found: dict[tuple[str, ...], list[int]] = {}
    for call in graph.invocations:
        match = pattern.fullmatch(call.module)
        if match:
            values = [
                v
                for v in (call.arguments if end == "in" else call.outputs)
                if graph.values[v].live and graph.values[v].is_float
            ]
            if not values:
                raise TraceError(
                    f"'{call.module}' {'is given' if end == 'in' else 'returns'} no tensor of the "
                    "stream",
                    got=f"declared: '{text}'",
                )
            found.setdefault(match.groups(), []).append(values[0])
    if not found:
        ran = list(dict.fromkeys(call.module for call in graph.invocations if call.module))
        close = get_close_matches(path, ran, n=3, cutoff=0.4)
        raise TraceError(
            f"no module '{path}' ran in this forward",
            got=f"declared: '{text}'",
            hint=f"closest: {', '.join(close)}" if close else None,
        )
    return found


def _site(graph: Graph, finder: Finder, x: int, f: int, where: str, group: int) -> Site:
    if graph.values[x].shape != graph.values[f].shape:
        raise TraceError(
            "a declared branch has another shape than its shortcut",
            got=f"{graph.values[f].shape} and {graph.values[x].shape} ({where})",
        )
    cone = finder.cone(x, (f,))
    if not cone:
        raise TraceError(
            "a declared branch does not depend on its shortcut",
            got=where,
            hint="the shortcut is what is read first: 'PATH' is the input of that module",
        )
    output = _sum_of(graph, x, f)
    last = graph.values[f].node
    return Site(
        last,
        0,
        Term((f,), f),
        x,
        (last, 0),
        False,
        cone,
        f if output is None else output,
        group,
        result=f,
        summed=output is not None,
    )


def _sum_of(graph: Graph, x: int, f: int) -> int | None:
    """The sum, if a call that adds reads both, seen by autograd or not."""
    for node in graph.values[f].consumers:
        record = graph.nodes[node]
        if record.terms is not None and {x, f} <= set(record.inputs) and record.outputs:
            return record.outputs[0]
    return None


def nothing_found(sites: Sites, frozen: Collection[str] | None = None) -> TraceError:
    """Return the error of a model without any sub-layer: what was looked for, and what may hide it.

    Args:
        sites: the record.
        frozen: names of the parameters that take no part in training. Without them, no parameter is
            said to miss its gradient.
    """
    cuts = cut_additions(sites.graph, sites.finder)
    lost = [] if frozen is None else _parameters_cut_off(sites, frozen)
    lines = [
        f"{len(sites.graph.nodes)} recorded calls, none of them an addition of a value and a "
        "function of it with a "
        "matrix product between",
        *(f"hidden: {line}" for line in sites.hidden),
        *_lines_of_cuts(cuts),
    ]
    if lost:
        which = _patterns(lost)
        lines.append(
            "every recorded way to the output passes a detach, so that no gradient arrives: "
            f"{which}"
        )
    hint = (
        "jacdiag looks for y = a x + f(x) in the dataflow; `jacdiag sites SOURCE` shows what was "
        "recorded, and "
        "jacdiag.declare (or [tool.jacdiag.sites]) names what a fused operation hides"
    )
    # A frozen branch behind a detach is meant, and then there is nothing to add.
    is_fault = bool(lost) or frozen is None or any(cut.operand == "shortcut" for cut in cuts)
    if cuts and is_fault:
        hint = (
            f"add the {cuts[0].operand} itself, without the detach; "
            "if the detach is meant, freeze what lies before it"
        )
    return TraceError(
        "no residual sub-layer was found", got="\n".join(lines), hint=hint, parameters=lost
    )


def _lines_of_cuts(cuts: Sequence[CutAddition]) -> list[str]:
    """Return a line for each detached operand, at most three of them."""
    lines = [
        (
            f"a detach at {cut.line} cuts the {cut.operand} of an addition in "
            f"{cut.module or 'the model'}"
        )
        for cut in cuts
    ]
    more = len(lines) - _MOST_CUTS
    return lines if more <= 0 else [*lines[:_MOST_CUTS], f"and {more} more"]


def _parameters_cut_off(sites: Sites, frozen: Collection[str]) -> list[str]:
    """Return the parameters in training that lie behind a detach; none if code that was not
    recorded ran too.
    """
    if sites.graph.foreign:
        return []
    trained = set(sites.skeleton.params) - set(frozen)
    return [name for part in cut_off_parts(sites.graph, trained) for name in part]


def _patterns(names: Iterable[str]) -> str:
    """Return names in a sentence, those that differ in numbers alone as one."""
    patterns = list(dict.fromkeys(_NUMBER.sub("*", name) for name in names))
    more = len(patterns) - _MOST_PATTERNS
    text = ", ".join(patterns[:_MOST_PATTERNS])
    return text if more <= 0 else f"{text} and {more} more"


def _boundary(graph: Graph, node: int, values: set[int], which: str) -> str | None:
    """The module call beside an addition that is given, or returns, one of some values first."""

    def holds(index: int) -> bool:
        return index >= 0 and graph.invocations[index].start <= node < graph.invocations[index].end

    beside = [
        i
        for i in graph.invocations
        if values & set(getattr(i, which)[:1]) and holds(i.parent) and not holds(i.index)
    ]
    deepest = max(beside, key=lambda i: len(list(graph.ancestors(i.index))), default=None)
    return deepest.module if deepest is not None else None


def hidden_lines(graph: Graph, finder: Finder, declared: Iterable[Site]) -> list[str]:
    """Says of every addition that a custom autograd.Function hides what it is, where, and how it is
    declared.
    """
    known = {site.output for site in declared}
    lines = [] if known else list(graph.foreign)
    for node, x, f in finder.hidden:
        record = graph.nodes[node]
        if known & set(record.outputs):
            continue
        start = _boundary(graph, node, set(finder.carriers(x)), "arguments")
        end = _boundary(graph, node, set(finder.carriers(f)), "outputs")
        how = (
            f'shortcut = "{start}", branch = "{end}"'
            if start and end
            else "its shortcut and branch"
        )
        what = (
            f"{record.function} (a custom autograd.Function) adds"
            if record.function
            else f"{record.name} gates"
        )
        line = record.line or f"{record.key[1]}:{record.key[2]}"
        lines.append(f"{what} at {line}; declare {how}")
    return lines
