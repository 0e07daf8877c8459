"""Check that a branch that is run alone has the Jacobian that it has within the model."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from jacdiag.devices.accelerators import in_float64
from jacdiag.devices.packed_download import download
from jacdiag.measure.linearization import Linearised, linearise, start_of_branch
from jacdiag.measure.model_run import ModelRun
from jacdiag.spectra.operator import Evaluated, gradient, shaped
from jacdiag.trace import Sites, Sublayer

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

    A recorded cache, or a value that reaches a branch past its shortcut, shows here alone. A branch
    is linearised by its graph in the run of the model where that is kept. One that is run by itself
    for that is compared by the Jacobian that its norms are measured with. If that rounds otherwise,
    or if a branch is not linearised, it is run by itself once more.

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
        self._graphs: dict[int, Evaluated] = {}

        # 2. Run the model.
        if chosen:
            run = ModelRun(sites, chosen, seed)
            run.run()
            self._pulled, self._graphs = run.pulled, run.graphs

    def linearise(self, site: Sublayer) -> Linearised:
        """Linearise a branch by its graph in the run of the model, or else by itself.

        Args:
            site: the sub-layer.
        """
        # 1. By the graph, if it is kept and right.
        linearised = self._by_graph(site)
        if linearised is not None:
            return linearised

        # 2. By itself.
        linearised = linearise(site, self._seed)
        self.compare(linearised)
        return linearised

    def release(self, site: Sublayer) -> None:
        """Free what is kept of a branch, which will not be linearised again."""
        self._graphs.pop(site.index, None)
        if site.index not in self._waiting:
            self._pulled.pop(site.index, None)

    def _by_graph(self, site: Sublayer) -> Linearised | None:
        """Linearise a branch by its graph; None if there is none, or if it was spoiled.

        Code that writes over what a graph needs, once the branch has run, spoils it. Mostly torch
        raises then. Else the product is not the one that was made at once.
        """
        graph = self._graphs.get(site.index)
        if graph is None:
            return None

        # 1. The Jacobian.
        try:
            linearised = linearise(site, self._seed, graph)
        except RuntimeError:
            del self._graphs[site.index]
            return None

        # 2. Whether it is right.
        error = self._error_of(linearised)
        if error <= REPLAY_TOLERANCE[self._sites.dtype]:
            self._note(site, error)
            return linearised
        linearised.release()
        del self._graphs[site.index]
        return None

    def compare(self, linearised: Linearised) -> None:
        """Compare the Jacobian of a branch that was linearised with the same seed.

        The product was made for the norms of the branch already.
        """
        site = linearised.site
        if site.index not in self._waiting or site.index not in self._pulled:
            return

        # More than rounding is an error of what is measured, whatever the branch itself gives.
        error = self._error_of(linearised)
        is_same = error <= REPLAY_TOLERANCE[self._sites.dtype]
        is_wrong = not error <= _BEYOND_ROUNDING
        if is_same or is_wrong:
            self._note(site, error)

    def _error_of(self, linearised: Linearised) -> float:
        """Return the relative error of J^T w of a branch.

        The norm at its beginning is in closed form there, which rounds otherwise.
        """
        site = linearised.site
        assert linearised.start is not None
        rows = linearised.branch.pull(linearised.start)
        return _relative(
            self._pulled[site.index], shaped(rows, linearised.dims, site.shortcut.shape)
        )

    def finish(self) -> dict[str, float]:
        """Compare the branches that are left; return name of each sub-layer -> relative error."""
        self._graphs.clear()
        for index in list(self._waiting):
            site = self._sites[index]
            expected = self._pulled.pop(index, None)
            error = math.inf  # the run of the model did not meet it
            if expected is not None:
                error = _relative(expected, _own_pull(site, start_of_branch(site, self._seed)))
            self._note(site, error)
        return self._errors

    def _note(self, site: Sublayer, error: float) -> None:
        """Note the error of a sub-layer, which need not be looked at again."""
        self._errors[site.name] = error
        self._waiting.pop(site.index, None)


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
