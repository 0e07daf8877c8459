"""Decide whether a model is freshly initialised or trained, and say why.

What is known counts first: the user's word, a step or an optimizer in the file, that the model was
built here. Weights are judged where nothing else is known, and where what is known says "init": a
factory may load weights, and a run may begin from trained ones.

Weights are judged by how many matrices are no draw of an init, never by one of them. Many models
hold a table that was computed, such as sines for positions. So at least a third of the matrices
must fail, and two. The level at which each is tested follows from that: by chance, as many would
fail at once in one of 10^9 fresh models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from scipy.special import betaincinv
from torch import Tensor, nn

from jacdiag.measure.independence_test import can_be_tested, examine_draws
from jacdiag.sources.training_history import Basis, History

State = Literal["init", "trained"]

FALSE_ALARMS = 1e-9  # of models
# one matrix of so many must fail. Of fresh models at most 1 in 15 does, of trained ones 7 in 15
SHARE = 3
MOST_MATRICES = 48  # are looked at, evenly over the model
_MOST_LEVEL = 1e-3  # of one matrix: further out, both laws are approximations


@dataclass(frozen=True, kw_only=True)
class WeightEvidence:
    """What the weights say.

    Attributes:
        tested: how many matrices were tested.
        failed: names of those that are no draw of an init.
        needed: how many must fail for the model to count as trained.
    """

    tested: int = 0
    failed: list[str] = field(default_factory=list)
    needed: int = 2

    @property
    def trained(self) -> bool:
        """Return whether enough matrices failed."""
        return len(self.failed) >= self.needed

    @property
    def words(self) -> str:
        """Return the evidence in words."""
        # 1. Too few to judge.
        if self.tested == 0:
            return "no matrix is wide enough to be judged"
        if self.tested == 1:
            return "only one matrix is wide enough to be judged"

        # 2. Those that decided.
        if self.trained:
            return f"{len(self.failed)} of {self.tested} matrices are no draw of an init"

        # 3. Too few failed to decide.
        passed = self.tested - len(self.failed)
        return f"{passed} of {self.tested} matrices can be draws of an init"


@dataclass(frozen=True, kw_only=True)
class StateDecision:
    """What was decided.

    Attributes:
        state: "init" or "trained".
        reason: in a few words.
        basis: what the reason rests on; "name" and "weights" are guesses.
        note: what is evidence against it; "" if nothing is.
    """

    state: State
    reason: str
    basis: Basis
    note: str = ""


def decide_state(
    given: State | None,
    history: History | None,
    judge: Callable[[], WeightEvidence],
    *,
    settled: bool = False,
    draws_again: Callable[[WeightEvidence], bool] | None = None,
) -> StateDecision:
    """Decide on the state of a model.

    Args:
        given: what the user said, or None.
        history: what the source says, or None.
        judge: looks at the weights; called only if they matter.
        settled: the caller knows that the model is fresh, as a gate does.
        draws_again: builds the model once more and returns whether its weights are other ones; None
            if it cannot be.

    Returns:
        The state and why.
    """
    # 1. What is known.
    if given is not None:
        return StateDecision(state=given, reason=f"as given: --state {given}", basis="given")
    if history is not None and history.state == "trained":
        return StateDecision(state="trained", reason=history.reason, basis=history.basis)

    # 2. Nothing is known: the weights decide.
    evidence = judge()
    if history is None and not settled:
        return _decided_by_weights(evidence)

    # 3. It should be fresh. Do the weights agree?
    reason = "a gate judges a fresh model"
    basis: Basis = "built"
    if history is not None:
        reason = history.reason
        basis = history.basis
    if not evidence.trained:
        return StateDecision(state="init", reason=reason, basis=basis)

    # 4. They do not. It is fresh all the same if building it again draws other weights.
    is_fresh = settled
    if not is_fresh and draws_again is not None:
        is_fresh = draws_again(evidence)
    if not is_fresh:
        reason = f"{reason}, but {evidence.words}"
        return StateDecision(state="trained", reason=reason, basis="weights")

    note = f"{reason}, but {evidence.words}: if it holds trained weights, pass --state trained"
    return StateDecision(state="init", reason=reason, basis=basis, note=note)


def _decided_by_weights(evidence: WeightEvidence) -> StateDecision:
    """Return the state of a model of which only the weights are known."""
    state: State = "init"
    if evidence.trained:
        state = "trained"
    return StateDecision(state=state, reason=evidence.words, basis="weights")


def judge_weights(
    parameters: Mapping[str, Tensor], outlines: Mapping[str, Tensor] | None = None
) -> WeightEvidence:
    """Count the matrices that are no draw of an init.

    Args:
        parameters: name -> tensor; each look at one may read a file.
        outlines: the same by shape, if they are read from a file.

    Returns:
        How many were tested, and which failed.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> fresh = {f"w{k}": torch.randn(64, 64) for k in range(6)}
        >>> judge_weights(fresh).words
        '6 of 6 matrices can be draws of an init'
        >>> judge_weights({name: w + torch.outer(w[0], w[1]) for name, w in fresh.items()}).trained
        True
    """
    # 1. Which matrices are looked at. Shapes alone need no file.
    if outlines is None:
        outlines = parameters
    names = spread_evenly(_names_to_test(outlines), MOST_MATRICES)

    # 2. Test each. A copy of a matrix is no second witness.
    results: dict[float, tuple[str, float]] = {}
    tests = examine_draws(parameters[name] for name in names)
    for name, result in zip(names, tests, strict=True):
        if result is not None:
            results.setdefault(result.largest, (name, result.probability))

    # 3. How many fail at the level that so many tests need.
    needed = max(2, math.ceil(len(results) / SHARE))
    level = level_of_one(len(results), needed)
    failed = [name for name, probability in results.values() if probability <= level]
    return WeightEvidence(tested=len(results), failed=failed, needed=needed)


def level_of_one(tested: int, needed: int) -> float:
    """Return the level for one matrix in a test of many.

    At this level, `needed` of `tested` fail by chance in FALSE_ALARMS of all models.

    The chance that at least k of n independent tests fail at the level x is the regularised
    incomplete beta function I_x(k, n - k + 1).

    >>> f"{level_of_one(4, 2):.1e}", level_of_one(48, 16)
    ('1.3e-05', 0.001)
    """
    if tested < needed:
        return 0.0

    return min(float(betaincinv(needed, tested - needed + 1, FALSE_ALARMS)), _MOST_LEVEL)


def _names_to_test(outlines: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the matrices that are wide enough to be judged."""
    names: list[str] = []
    for name, outline in outlines.items():
        if not outline.is_floating_point():
            continue
        if can_be_tested(outline.shape):
            names.append(name)

    return names


def spread_evenly(names: list[str], most: int) -> list[str]:
    """Return at most so many of the names, evenly over the list.

    >>> spread_evenly(list("abcdef"), 3)
    ['a', 'c', 'e']
    """
    count = len(names)
    if count <= most:
        return names

    return [names[index * count // most] for index in range(most)]


def same_weights(first: Mapping[str, Tensor], other: nn.Module, names: Iterable[str]) -> bool:
    """Return whether another module holds the same values under these names."""
    held = dict(other.named_parameters())
    for name in names:
        if name not in held:
            return False

        # Models may lie on different devices.
        if not torch.equal(held[name].detach().cpu(), first[name].cpu()):
            return False

    return True
