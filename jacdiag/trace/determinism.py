"""Whether two runs of a model are the same, and where they part if they are not."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jacdiag.trace.record import Node, Recorder, collect, collect_deep, user_line

_DRAWS = {"dropout", "dropout_", "rand", "randn", "randint", "randperm", "normal", "normal_", "uniform_", "bernoulli",
          "bernoulli_", "multinomial", "rand_like", "randn_like", "randint_like", "exponential_", "gumbel_softmax",
          "alpha_dropout", "feature_dropout", "rrelu", "poisson", "random_"}  # fmt: skip


@contextmanager
def random_streams_kept() -> Iterator[None]:
    """Gives back every random stream as it was: torch's on all devices, Python's, NumPy's."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def same_output(a: Any, b: Any) -> bool:
    """Whether two outputs of a model are equal bit for bit (NaN equals NaN)."""
    first: list[Tensor] = []
    second: list[Tensor] = []
    collect_deep(a, first)
    collect_deep(b, second)
    return len(first) == len(second) and all(same_tensor(x, y) for x, y in zip(first, second, strict=True))


def same_tensor(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and bool(torch.equal(torch.nan_to_num(x), torch.nan_to_num(y)))


class Fingerprints(Recorder):
    """A recorder that also keeps a checksum of every result, and the line of the model's code that asked for it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.prints: list[tuple[str, tuple[float, ...]]] = []
        self.lines: list[str] = []

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any, mutated: list[Tensor], key: Any) -> Any:
        before = len(self.nodes)
        out = super()._note(func, args, kwargs, result, mutated, key)
        if len(self.nodes) > before:
            with torch._C.DisableTorchFunction():
                made: list[Tensor] = []
                collect((result, mutated), made)
                self.prints.append((key[0], tuple(_checksum(t) for t in made)))
                self.lines.append(user_line(3))
        return out


def _checksum(t: Tensor) -> float:
    if t.is_meta or t.numel() == 0 or t.is_complex():
        return 0.0
    flat = torch.nan_to_num(t.detach().double()).flatten()
    return float((flat * torch.arange(1, flat.numel() + 1, dtype=flat.dtype, device=flat.device).sqrt()).sum())


def first_difference(a: Fingerprints, b: Fingerprints) -> str:
    """Names the first call whose results differ between two runs: what, in which module, on which line."""
    pairs = itertools.zip_longest(a.prints, b.prints)
    index = next((k for k, (x, y) in enumerate(pairs) if x != y), None)
    if index is None:
        return "two more runs agreed: it comes and goes"
    run = a if index < len(a.prints) else b
    node: Node = run.nodes[index]
    module = run.invocations[node.invocation].module if run.invocations else ""
    where = f"in '{module}', {run.lines[index]}" if module else run.lines[index]
    drawn = "draws random numbers" if node.name in _DRAWS else "gives another result"
    return f"{node.name} {drawn} ({where})"
