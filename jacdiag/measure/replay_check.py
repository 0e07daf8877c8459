"""Check that a branch that is run alone has the Jacobian that it has within the model."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from jacdiag.devices.accelerators import in_float64
from jacdiag.devices.packed_download import download
from jacdiag.measure.linearization import Linearised, start_of_branch
from jacdiag.spectra.operator import gradient, shaped
from jacdiag.trace import Sites, Sublayer
from jacdiag.trace.execution.tap import Spot, Where

# The largest relative error of J^T w of a branch that is run alone.
REPLAY_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
# Two ways to compute one product, such as a norm by autograd and in closed form, differ by less.
_BEYOND_ROUNDING = 0.01


def verify_replay(
    sites: Sites, seed: int = 0, only: Collection[int] | None = None
) -> dict[str, float]:
    """Compare J^T w of every branch with that of a re-run of the entire model.

    Args:
        sites: of one recorded forward.
        seed: of the cotangents; each sub-layer has its own.
        only: indices of the sub-layers to look at; all if not given.

    Returns:
        Name of each sub-layer -> relative error.
    """
    return ReplayCheck(sites, seed, only).finish()


class ReplayCheck:
    """Compares J^T w of every branch with that of a re-run of the entire model.

    In the run of the model each shortcut is a tensor to differentiate by, so that one forward and
    one backward through each branch suffice. A recorded cache, or a value that reaches the branch
    past its shortcut, shows here alone. A branch that is linearised for its norms is compared by
    that Jacobian. If it is not, or if that rounds otherwise, the branch is run by itself.

    Norms are not measured by the graph of this run, although that would save a forward: the check
    would compare this graph with itself.

    Args:
        sites: of one recorded forward.
        seed: of the cotangents; each sub-layer has its own.
        only: indices of the sub-layers to look at; all if not given.
    """

    def __init__(self, sites: Sites, seed: int = 0, only: Collection[int] | None = None) -> None:
        self._sites = sites
        self._seed = seed
        self._errors: dict[str, float] = {}

        # 1. A nested sub-layer is part of another one.
        chosen = [index for index, site in enumerate(sites) if not site.nested]
        if only is not None:
            chosen = [index for index in chosen if index in only]
        self._waiting = dict.fromkeys(chosen)
        self._pulled: dict[int, Tensor] = {}
        if not chosen:
            return

        # 2. Run the model, and again with gradients for the branches that it runs under no_grad.
        pulls = _ModelPulls(sites, chosen, seed)
        with torch.enable_grad(), sites.replayer.whole_graph():
            pulls.run()
            if pulls.cut_off:
                pulls.run(grad=True)
        self._pulled = pulls.pulled

    def compare(self, linearised: Linearised) -> None:
        """Compare the Jacobian of a branch that was linearised with the same seed.

        The product was made for the norms of the branch already.
        """
        site = linearised.site
        expected = self._pulled.get(site.index)
        if expected is None or site.index not in self._waiting:
            return

        # 1. The norm at its beginning is in closed form there, which rounds otherwise.
        assert linearised.start is not None
        rows = linearised.branch.pull(linearised.start)
        pulled = shaped(rows, linearised.dims, site.shortcut.shape)
        error = _relative(expected, pulled)

        # 2. More than rounding is an error of what is measured, whatever the branch itself gives.
        is_same = error <= REPLAY_TOLERANCE[self._sites.dtype]
        is_wrong = not error <= _BEYOND_ROUNDING
        if is_same or is_wrong:
            self._note(site, error)

    def finish(self) -> dict[str, float]:
        """Compare the branches that are left; return name of each sub-layer -> relative error."""
        for index in list(self._waiting):
            site = self._sites[index]
            expected = self._pulled.get(index)
            error = math.inf  # the run of the model did not meet it
            if expected is not None:
                error = _relative(expected, _own_pull(site, start_of_branch(site, self._seed)))
            self._note(site, error)
        return self._errors

    def _note(self, site: Sublayer, error: float) -> None:
        """Note the error of a sub-layer, which need not be looked at again."""
        self._errors[site.name] = error
        self._pulled.pop(site.index, None)
        del self._waiting[site.index]


class _ModelPulls:
    """J^T w of branches in a run of the entire model.

    Attributes:
        pulled: index of a sub-layer -> its J^T w.
        cut_off: sub-layers that the model runs under no_grad.
    """

    def __init__(self, sites: Sites, chosen: Sequence[int], seed: int) -> None:
        self.sites = sites
        self.seed = seed
        self.pulled: dict[int, Tensor] = {}
        self.cut_off: set[int] = set()
        self._leaves: dict[int, Tensor] = {}  # by value index of the shortcut

        # 1. The points to stop at: shortcuts by value index, ends of branches by sub-layer.
        replayer = sites.replayer
        shortcuts = [sites.raw[index].shortcut for index in chosen]
        self._starts = {value: replayer.spot_of(value, 0) for value in shortcuts}
        self._ends = {index: replayer.end_of(sites.raw[index], 0) for index in chosen}
        self._value_of = {id(spot): value for value, spot in self._starts.items()}
        self._sublayer_of = {id(spot): index for index, spot in self._ends.items()}
        self._inside = self._shortcuts_inside_branches(chosen)

        # 2. Shortcuts that are inputs of the model are replaced before it runs.
        self._replaced: dict[int, Tensor] = {}
        for value, spot in self._starts.items():
            if spot.where is Where.ARGUMENT:
                leaf = replayer.calls[0].tensors[value].detach().clone().requires_grad_()
                self._leaves[value] = leaf
                self._replaced[value] = leaf

    def _shortcuts_inside_branches(self, chosen: Sequence[int]) -> set[int]:
        """Return the shortcuts that lie on another's way into its branch.

        Such is a norm of the stream with a branch of its own.
        """
        calls: set[int] = set()
        for index in chosen:
            calls.update(self.sites.raw[index].cone)
        return {value for value in self._starts if self.sites.graph.values[value].node in calls}

    def run(self, grad: bool = False) -> None:
        """Run the model once; `grad` is that of `Replayer.tapped`."""
        spots = []
        for spot in (*self._starts.values(), *self._ends.values()):
            # Inputs of the model are replaced, and not met.
            is_input = spot.where is Where.ARGUMENT
            if not is_input:
                spots.append(spot)

        self.sites.replayer.tapped(spots, self._visit, replaced=self._replaced, grad=grad)

    def _visit(self, spot: Spot, tensor: Tensor) -> Tensor:
        """Pull back from the end of a branch, and put a leaf in the place of a shortcut."""
        index = self._sublayer_of.get(id(spot))
        if index is not None:
            # At once: code that adds in place spoils the graph a moment later.
            self._pull_back(index, tensor)
            return tensor

        # The graph of a branch begins at its shortcut, so that no more than one is held, unless
        # that is part of another's.
        value = self._value_of[id(spot)]
        is_part = value in self._inside and tensor.requires_grad
        leaf = tensor if is_part else tensor.detach().requires_grad_()
        self._leaves[value] = leaf
        return leaf.clone()

    def _pull_back(self, index: int, term: Tensor) -> None:
        """Pull the cotangent of one branch back to its shortcut."""
        # 1. A second run is for the branches alone that the first one cut off.
        leaf = self._leaves.get(self.sites.raw[index].shortcut)
        is_done = index in self.pulled and index not in self.cut_off
        if leaf is None or is_done:
            return

        # 2. The pull, and whether the branch ran under no_grad.
        cotangent = start_of_branch(self.sites[index], self.seed).reshape(term.shape)
        self.pulled[index] = gradient(term, leaf, cotangent)
        if term.requires_grad:
            self.cut_off.discard(index)
        else:
            self.cut_off.add(index)


def _own_pull(site: Any, cotangent: Tensor) -> Tensor:
    """Return J^T w of a branch that is run by itself."""
    with torch.enable_grad():
        x = site.shortcut.detach().clone().requires_grad_()
        return gradient(site.branch(x), x, cotangent.reshape(site.value.shape))


def _relative(a: Tensor, b: Tensor) -> float:
    """Return the norm of a difference, over the larger of the two norms."""
    numbers = download([_norm(a), _norm(b), _norm(a - b)])
    first, second, difference = (float(number) for number in numbers)
    scale = max(first, second)
    has_scale = scale > 0
    if not has_scale:
        return 0.0

    return difference / scale


def _norm(tensor: Tensor) -> Tensor:
    """Return the Euclidean norm in float64."""
    size: Tensor = torch.linalg.vector_norm(in_float64(tensor.detach()))
    return size
