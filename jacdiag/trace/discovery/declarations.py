"""Sub-layers that a user declares because a fused operation hides the addition."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from jacdiag.errors import TraceError, UsageError
from jacdiag.trace.discovery.residual import Finder, Site
from jacdiag.trace.graph.additions import Term
from jacdiag.trace.graph.graph import Graph, Invocation

_ENDS = ("in", "out")


@dataclass(frozen=True)
class Declaration:
    """A sub-layer by the module boundaries that its shortcut and branch cross (see `declare`)."""

    shortcut: str
    branch: str


def declare(*, shortcut: str, branch: str) -> Declaration:
    """Declare a sub-layer y = x + f(x) that the dataflow does not show.

    Fused add-norms, kernels and scripted functions hide the sum. It need not be visible: the
    branch is the function from one tensor at a module boundary to another.

    Args:
        shortcut: where x is met: "PATH" or "PATH:in", the first floating tensor that the module is
            given; "PATH:out", the first that it returns.
        branch: where f(x) is met: "PATH" or "PATH:out", or "PATH:in". A "*" stands for one part of
            a path, and for the same one in both, so that "layers.*.norm1" and "layers.*.attn"
            declare a sub-layer in every layer.

    Returns:
        The declaration, to be passed to `jacdiag.sites` or `jacdiag.audit`.

    Raises:
        UsageError: a text is no module boundary, or the stars of the two do not agree.

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
    # 1. Each is a module boundary.
    for which, text in (("shortcut", shortcut), ("branch", branch)):
        end = "in"
        if ":" in text:
            _, _, end = text.rpartition(":")
        is_boundary = bool(text.strip()) and end in _ENDS
        if not is_boundary:
            raise UsageError(
                f"the {which} of a declaration is no module boundary",
                got=repr(text),
                hint="'PATH', 'PATH:in' or 'PATH:out', as in 'layers.*.norm1:in'",
            )

    # 2. A star stands for the same part of both.
    if shortcut.count("*") != branch.count("*"):
        raise UsageError(
            "the '*' of a declaration must stand in both of its paths",
            got=f"{shortcut!r} and {branch!r}",
            hint="'layers.*.norm1' with 'layers.*.attn'",
        )
    return Declaration(shortcut, branch)


def declarations(
    entries: Iterable[Declaration | Mapping[str, Any]] | Mapping[str, Any],
) -> list[Declaration]:
    """Return declarations from a list of them, or from tables as a configuration file holds them.

    Args:
        entries: declarations or tables of `shortcut` and `branch`; a mapping names each table.

    Returns:
        The declarations, in the order of the entries.

    Raises:
        UsageError: an entry is neither a declaration nor such a table.
    """
    # 1. Tables by name, as in a configuration file.
    if isinstance(entries, Mapping):
        return [_declaration(name, entry) for name, entry in entries.items()]

    # 2. A list of them. A text could be iterated over too.
    if isinstance(entries, str) or not isinstance(entries, Iterable):
        raise UsageError(
            "declared is a list of declarations", got=repr(entries), hint="jacdiag.declare(...)"
        )
    return [_declaration(f"number {k}", entry) for k, entry in enumerate(entries, start=1)]


def _declaration(name: str, entry: Any) -> Declaration:
    """Return a declaration from itself or from a table.

    Args:
        name: of the entry, for the message.
        entry: the declaration or the table.

    Raises:
        UsageError: it is neither.
    """
    if isinstance(entry, Declaration):
        return entry
    if not _is_table_of_texts(entry):
        raise UsageError(
            f"site '{name}' cannot be used",
            got=repr(entry),
            hint="a table with the strings `shortcut` and `branch`",
        )
    return declare(**entry)


def _is_table_of_texts(entry: Any) -> bool:
    """Return whether an entry has the keys of a declaration and texts for values."""
    # 1. A table with these keys and no others.
    if not isinstance(entry, Mapping):
        return False
    if set(entry) != {"shortcut", "branch"}:
        return False

    # 2. Both values are texts.
    return isinstance(entry["shortcut"], str) and isinstance(entry["branch"], str)


def declared_sites(
    graph: Graph, finder: Finder, declared: Sequence[Declaration], recognised: list[Site]
) -> list[Site]:
    """Return the sites of declarations, without those that were recognised anyway.

    Args:
        graph: what one forward did.
        finder: of the same graph.
        declared: the declarations.
        recognised: the sites that the dataflow shows.

    Raises:
        TraceError: a path that no module has, or a branch that does not depend on its shortcut.
    """
    known = {(site.shortcut, site.term.operand) for site in recognised}
    sites: list[Site] = []
    for declaration in declared:
        for x, f, where in _values(graph, declaration):
            # Two declarations may name one sub-layer.
            if (x, f) in known:
                continue
            known.add((x, f))

            # Each has a group of its own.
            group = len(recognised) + len(sites)
            sites.append(_site(graph, finder, x, f, where, group))
    return sites


def _values(graph: Graph, declaration: Declaration) -> Iterable[tuple[int, int, str]]:
    """Yield the values of shortcut and branch for every call, and how a message names the pair."""
    starts = _values_at(graph, declaration.shortcut, "in")
    ends = _values_at(graph, declaration.branch, "out")
    for stars, shortcuts in starts.items():
        # 1. How a message names the pair.
        branches = ends.get(stars, [])
        where = f"shortcut '{declaration.shortcut}', branch '{declaration.branch}'"
        if stars:
            where += f", * = {', '.join(stars)}"

        # 2. Pair the calls of the two modules.
        if len(shortcuts) != len(branches):
            raise TraceError(
                "the two modules of a declaration did not run equally often",
                got=f"{len(shortcuts)} and {len(branches)} times ({where})",
            )
        for x, f in zip(shortcuts, branches, strict=True):
            yield x, f, where


def _values_at(graph: Graph, text: str, default: str) -> dict[tuple[str, ...], list[int]]:
    """Return the values at a boundary by what the stars stand for, in the order of the calls.

    Args:
        graph: what one forward did.
        text: "PATH", "PATH:in" or "PATH:out".
        default: "in" or "out", for a path alone.
    """
    # 1. The path as a pattern, and the end of the module.
    path, end = text, default
    if ":" in text:
        path, _, end = text.rpartition(":")
    pattern = re.compile(re.escape(path).replace(r"\*", r"([^.]+)"))

    # 2. The values of the calls whose module it matches.
    values: dict[tuple[str, ...], list[int]] = {}
    for call in graph.invocations:
        match = pattern.fullmatch(call.module)
        if match:
            value = _stream_value(graph, call, end, text)
            values.setdefault(match.groups(), []).append(value)
    if not values:
        raise TraceError(
            f"no module '{path}' ran in this forward",
            got=f"declared: '{text}'",
            hint=_closest_modules(graph, path),
        )
    return values


def _closest_modules(graph: Graph, path: str) -> str | None:
    """Return which modules that ran have a name like a path; None if none has."""
    # The model itself has no name.
    modules_run = dict.fromkeys(call.module for call in graph.invocations)
    modules_run.pop("", None)

    # Those that a typing error may have meant.
    close = get_close_matches(path, modules_run, n=3, cutoff=0.4)
    if not close:
        return None
    return f"closest: {', '.join(close)}"


def _stream_value(graph: Graph, call: Invocation, end: str, text: str) -> int:
    """Return the first floating value that a module call is given ("in") or returns ("out")."""
    # 1. The values at that end of the call.
    if end == "in":
        candidates, verb = call.arguments, "is given"
    else:
        candidates, verb = call.outputs, "returns"

    # 2. Masks and positions are no values of the stream.
    for value in candidates:
        if graph.values[value].is_differentiable:
            return value
    raise TraceError(f"'{call.module}' {verb} no tensor of the stream", got=f"declared: '{text}'")


def _site(graph: Graph, finder: Finder, x: int, f: int, where: str, group: int) -> Site:
    """Return the site of a declared sub-layer.

    Args:
        graph: what one forward did.
        finder: of the same graph.
        x: value index of the shortcut.
        f: value index of the branch.
        where: how a message names the pair.
        group: index of the set of parallel branches.

    Raises:
        TraceError: the branch is no function of the shortcut, or has another shape.
    """
    # 1. The branch is a function of the shortcut, of the same shape.
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

    # 2. The sum. Without one, the branch's own last call stands for the addition.
    sum_of_both = _sum_of(graph, x, f)
    output = f if sum_of_both is None else sum_of_both
    last = graph.values[f].node
    return Site(
        addition=last,
        position=0,
        term=Term((f,), f),
        shortcut=x,
        carrier=(last, 0),
        scaled=False,
        cone=cone,
        output=output,
        group=group,
        result=f,
        summed=sum_of_both is not None,
    )


def _sum_of(graph: Graph, x: int, f: int) -> int | None:
    """Return the sum, if a call that adds reads both, seen by autograd or not."""
    for node in graph.values[f].consumers:
        # 1. The call adds.
        record = graph.nodes[node]
        if record.terms is None or not record.outputs:
            continue

        # 2. It adds these two. The branch may be added to something else before.
        reads_both = {x, f} <= set(record.inputs)
        if reads_both:
            return record.outputs[0]
    return None


def _boundary(graph: Graph, node: int, values: set[int], which: str) -> str | None:
    """Return the deepest module call next to an addition whose first value is one of some values.

    Args:
        graph: what one forward did.
        node: the addition.
        values: what the call is to be given, or to return, first.
        which: "arguments" or "outputs".
    """
    deepest = None
    depth = 0
    for call in graph.invocations:
        # 1. The module that calls it makes the addition, and the call itself does not.
        is_next_to = _holds(graph, call.parent, node) and not _holds(graph, call.index, node)
        if not is_next_to:
            continue

        # 2. Its first value is one of those.
        first_value = getattr(call, which)[:1]
        if values.isdisjoint(first_value):
            continue

        # 3. It is deeper than any before.
        depth_of_call = len(list(graph.ancestors(call.index)))
        if depth_of_call > depth:
            deepest = call.module
            depth = depth_of_call
    return deepest


def _holds(graph: Graph, invocation: int, node: int) -> bool:
    """Return whether a call stands inside a module call.

    Args:
        graph: what one forward did.
        invocation: the module call; below 0 there is none.
        node: the call.
    """
    if invocation < 0:
        return False
    module_call = graph.invocations[invocation]
    return module_call.start <= node < module_call.end


def hidden_lines(graph: Graph, finder: Finder, declared: Iterable[Site]) -> list[str]:
    """Return a line for every addition that autograd does not see: what, where, how to declare it.

    Args:
        graph: what one forward did.
        finder: of the same graph.
        declared: the sites of declarations, which are not listed.
    """
    # 1. Tensors that came in from code which was not recorded. A declaration explains them.
    declared_outputs = {site.output for site in declared}
    lines: list[str] = []
    if not declared_outputs:
        lines += graph.foreign

    # 2. Additions inside one call.
    for node, x, f in finder.hidden:
        record = graph.nodes[node]
        is_declared = not declared_outputs.isdisjoint(record.outputs)
        if is_declared:
            continue

        # 3. What it is, where it is, and how to declare it.
        event = f"{record.name} gates"
        if record.function:
            event = f"{record.function} (a custom autograd.Function) adds"

        # The declaration that makes it visible.
        declaration = _declaration_of_hidden(graph, finder, node, x, f)
        lines.append(f"{event} at {record.source_line}; declare {declaration}")
    return lines


def _declaration_of_hidden(graph: Graph, finder: Finder, node: int, x: int, f: int) -> str:
    """Return how to declare a hidden addition, by its modules if they show.

    Args:
        graph: what one forward did.
        finder: of the same graph.
        node: the addition.
        x: value index of its shortcut.
        f: value index of its branch.
    """
    # 1. The modules that are given the shortcut and return the branch.
    start = _boundary(graph, node, set(finder.carriers(x)), "arguments")
    end = _boundary(graph, node, set(finder.carriers(f)), "outputs")

    # 2. One of them is no module's first argument or result.
    if not start or not end:
        return "its shortcut and branch"
    return f'shortcut = "{start}", branch = "{end}"'
