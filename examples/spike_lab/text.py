"""Text that every machine has: the sources of Python's standard library, as bytes."""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 256


@cache
def corpus(least: int = 4_000_000) -> Tensor:
    """The bytes of the library's modules in the order of their names, at least `least` of them
    where there are as many.

    Returns:
        uint8, one dimension. The same for the same version of Python.
    """
    parts, size = [], 0
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        parts.append(file.read_bytes())
        size += len(parts[-1])
        if size >= least:
            break
    return torch.frombuffer(bytearray(b"\n".join(parts)), dtype=torch.uint8)


def batch(step: int, seed: int, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a step, each (rows, length): step and seed decide, so that a run can go
    on.
    """
    text = corpus()
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    starts = torch.randint(len(text) - length - 1, (rows,), generator=generator)
    taken = text[starts[:, None] + torch.arange(length + 1)].long()
    return taken[:, :-1], taken[:, 1:]
