"""The residual stream: which sub-layers follow which, and where one ends and the next begins."""

from __future__ import annotations

from dataclasses import dataclass

from jacdiag.trace.discovery.norms import waists
from jacdiag.trace.discovery.residual import Finder, Site
from jacdiag.trace.graph.graph import Graph


@dataclass
class Group:
    """One sum on the stream: a shortcut and its one or more parallel branches.

    Attributes:
        sites: indices of the branches.
        shortcut, output: value indices of x and of the sum y.
        after: what the stream is once y has passed what carries no matrix product (a post-norm).
            Mostly it is y itself.
    """

    sites: list[int]
    shortcut: int
    output: int
    after: int
    following: int | None = None
    preceding: int | None = None


class Streams:
    """Links the sums of a record into streams; an encoder-decoder model has two."""

    def __init__(self, graph: Graph, finder: Finder, sites: list[Site]) -> None:
        self.graph, self.finder = graph, finder
        by_group: dict[int, list[int]] = {}
        for index, site in enumerate(sites):
            if not site.nested and site.summed:
                by_group.setdefault(site.group, []).append(index)
        self.groups = [
            Group(
                members,
                sites[members[0]].shortcut,
                sites[members[0]].output,
                sites[members[0]].output,
            )
            for members in by_group.values()
        ]
        self.groups.sort(key=lambda g: self.graph.values[g.output].node)
        self._link()
        self.main = self._longest()

    def _link(self) -> None:
        """Find for each sum the nearest earlier one that it continues with no product between."""
        for k, group in enumerate(self.groups):
            for j in range(k - 1, -1, -1):
                earlier = self.groups[j]
                if earlier.following is not None:
                    continue
                direct = earlier.output == group.shortcut
                if direct or self.finder.reaches(
                    earlier.output, (group.shortcut,), through_products=False
                ):
                    earlier.following, group.preceding = k, j
                    earlier.after = group.shortcut
                    break
        for group in self.groups:
            if group.following is None:
                group.after = self._end(group.output)

    def _end(self, output: int) -> int:
        """Return the last value before the first matrix product after the stream's last sum.

        It lies after the final norm, if there is one.
        """
        cone = self.finder.cone(output, self.graph.outputs)
        end = output
        shape = self.graph.values[output].shape
        for node in waists(self.graph, cone, output):
            output_value = self.graph.values[self.graph.nodes[node].outputs[0]]
            if self.finder.is_product(node) or sorted(output_value.shape) != sorted(shape):
                break
            # A norm of channels-first data works on a transposed sum.
            if output_value.shape == shape:
                end = output_value.index
        return end

    def _longest(self) -> list[int]:
        """Return the stream of most sums; of two as long, the one that ends later."""
        chains = [
            self._chain_from(k) for k, group in enumerate(self.groups) if group.preceding is None
        ]
        return max(chains, key=lambda chain: (len(chain), chain[-1]), default=[])

    def _chain_from(self, first: int) -> list[int]:
        """Return a sum and all that follow it."""
        chain = [first]
        while (following := self.groups[chain[-1]].following) is not None:
            chain.append(following)
        return chain


def owner_of(graph: Graph, innermost: int, first: int, last: int, value: int) -> int:
    """Return the innermost module call that holds calls and makes, or is given, a value.

    Args:
        graph: what one forward did.
        innermost: where the search begins.
        first: the first call to be held.
        last: the last one.
        value: the value.
    """
    maker = graph.values[value].node
    for index in graph.ancestors(innermost):
        call = graph.invocations[index]
        holds = call.start <= first and (call.end < 0 or last < call.end)
        if holds and (maker >= call.start or value in call.arguments):
            return index
    return 0
