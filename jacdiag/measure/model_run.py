"""One run of the entire model, in which every branch is met: its J^T w, and its graph.

Each shortcut is a tensor to differentiate by, so that one forward and one backward through each
branch suffice. If there is room, the graphs are kept: a branch whose graph is kept need not be run
by itself to be linearised.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jacdiag.devices.accelerators import free_device_memory
from jacdiag.devices.host_memory import free_host_memory
from jacdiag.measure.linearization import is_factored, start_of_branch
from jacdiag.spectra.operator import Evaluated, gradient
from jacdiag.trace import Sites, Sublayer
from jacdiag.trace.execution.routes import Endpoint
from jacdiag.trace.execution.tap import Spot, Where


class ModelRun:
    """J^T w of branches, and their graphs, in a run of the entire model.

    Attributes:
        pulled: index of a sub-layer -> J^T w of its cotangent.
        graphs: index of a sub-layer -> its graph, from z on if it begins with a norm. Empty if they
            are not kept.

    Args:
        sites: of one recorded forward.
        chosen: indices of the sub-layers.
        seed: of the cotangents; each sub-layer has its own.
    """

    def __init__(self, sites: Sites, chosen: Sequence[int], seed: int) -> None:
        self.sites = sites
        self.pulled: dict[int, Tensor] = {}
        self.graphs: dict[int, Evaluated] = {}
        self._seed = seed
        self._keeps_graphs = _has_room_for_graphs(sites)
        self._cut_off: set[int] = set()  # sub-layers that the model runs under no_grad
        self._leaves: dict[int, Tensor] = {}  # shortcuts, by value index
        self._normalised: dict[Endpoint, Tensor] = {}  # z

        # 1. The points to stop at: shortcuts by value index, ends of branches by sub-layer.
        replayer = sites.replayer
        shortcuts = [sites.raw[index].shortcut for index in chosen]
        self._starts = {value: replayer.spot_of(value, 0) for value in shortcuts}
        self._ends = {index: replayer.end_of(sites.raw[index], 0) for index in chosen}
        self._value_of = {id(spot): value for value, spot in self._starts.items()}
        self._sublayer_of = {id(spot): index for index, spot in self._ends.items()}
        self._inside = self._shortcuts_inside_branches(chosen)

        # 2. The norms at the beginning, if graphs are kept.
        self._norms: dict[Endpoint, Spot] = {}
        if self._keeps_graphs:
            endpoints = [_norm_to_begin_at(sites[index]) for index in chosen]
            self._norms = {
                endpoint: replayer.spot(endpoint, 0) for endpoint in endpoints if endpoint
            }
        self._norm_of = {id(spot): endpoint for endpoint, spot in self._norms.items()}

        # 3. Shortcuts that are inputs of the model are replaced before it runs.
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

    def run(self) -> None:
        """Run the model, and again with gradients for the branches that it runs under no_grad."""
        with torch.enable_grad(), self.sites.replayer.whole_graph():
            self._run()
            if self._cut_off:
                self._run(grad=True)
        self._leaves.clear()
        self._normalised.clear()

    def _run(self, grad: bool = False) -> None:
        """Run the model once; `grad` is that of `Replayer.tapped`."""
        spots = []
        for spot in (*self._starts.values(), *self._norms.values(), *self._ends.values()):
            # Inputs of the model are replaced, and not met.
            is_input = spot.where is Where.ARGUMENT
            if not is_input:
                spots.append(spot)

        self.sites.replayer.tapped(spots, self._visit, replaced=self._replaced, grad=grad)

    def _visit(self, spot: Spot, tensor: Tensor) -> Tensor:
        """Pull back from the end of a branch, and put a leaf in the place of a shortcut."""
        # 1. At once: code that adds in place spoils the graph a moment later.
        index = self._sublayer_of.get(id(spot))
        if index is not None:
            self._pull_back(index, tensor)
            return tensor

        # 2. The model may write to its value, but not to the one that is differentiated by. The
        # value of a fused norm is shown to nobody else.
        endpoint = self._norm_of.get(id(spot))
        if endpoint is not None:
            self._normalised[endpoint] = tensor
            is_fused = spot.where is Where.NORMALISED
            return tensor.view_as(tensor) if is_fused else tensor.clone()

        # 3. The graph of a branch ends at its shortcut, unless it is part of another's.
        value = self._value_of[id(spot)]
        is_part = value in self._inside and tensor.requires_grad
        leaf = tensor if is_part else tensor.detach().requires_grad_()
        self._leaves[value] = leaf
        return leaf.clone()

    def _pull_back(self, index: int, term: Tensor) -> None:
        """Pull the cotangent of one branch back to its shortcut, and keep its graph."""
        # 1. A second run is for the branches alone that the first one cut off.
        leaf = self._leaves.get(self.sites.raw[index].shortcut)
        is_done = index in self.pulled and index not in self._cut_off
        if leaf is None or is_done:
            return

        # 2. The pull, and whether the branch ran under no_grad.
        site = self.sites[index]
        cotangent = start_of_branch(site, self._seed).reshape(term.shape)
        self.pulled[index] = gradient(term, leaf, cotangent)
        if term.requires_grad:
            self._cut_off.discard(index)
        else:
            self._cut_off.add(index)

        # 3. The graph.
        if self._keeps_graphs:
            self._keep(site, leaf, term)

    def _keep(self, site: Sublayer, shortcut: Tensor, term: Tensor) -> None:
        """Keep the graph of a branch, if it is that of the recorded one."""
        # 1. Where it begins.
        point: Tensor | None = shortcut
        recorded = site.shortcut
        if is_factored(site):
            endpoint = _norm_to_begin_at(site)
            point = self._normalised.get(endpoint) if endpoint else None
            recorded = site.normalized
        if point is None or not point.requires_grad or not term.requires_grad:
            return

        # 2. A copy of its end has a graph of its own, which the model's code cannot write to.
        if _are_alike(point, recorded) and _are_alike(term, site.value):
            self.graphs[site.index] = Evaluated(point, term.clone())


def _norm_to_begin_at(site: Sublayer) -> Endpoint | None:
    """Return where z of a branch is met, if its graph can begin there."""
    norm = site.input_norm
    if norm is None or not is_factored(site):
        return None

    # A gain that comes before z is part of what is met there.
    return norm.endpoint if norm.gain_before is None else None


def _are_alike(tensor: Tensor, recorded: Tensor) -> bool:
    """Return whether a tensor has the shape, precision and device of a recorded one."""
    return (tensor.shape, tensor.dtype, tensor.device) == (
        recorded.shape,
        recorded.dtype,
        recorded.device,
    )


def _has_room_for_graphs(sites: Sites) -> bool:
    """Return whether the graphs of all branches may be kept while the sub-layers are measured."""
    # 1. They would hold copies of weights that are stored in less.
    if sites.skeleton.light or sites.skeleton.valueless:
        return False

    # 2. They hold no more than all values that depend on the input.
    held = 0
    for value in sites.graph.values:
        if value.live and value.is_float:
            held += torch.Size(value.shape).numel() * value.dtype.itemsize

    # 3. As much has to be left for the measurement.
    device = sites[0].shortcut.device
    free = free_host_memory() if device.type == "cpu" else free_device_memory(device)
    return free is not None and free >= 2 * held
