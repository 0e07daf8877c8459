"""Weights from files are read one at a time, and figures on an accelerator share a wait."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Mapping

import pytest
import torch
from accelerator.pretended import NAME, pretended_device
from torch import Tensor

from jacdiag.measure.independence_test import examine_draw, examine_draws
from jacdiag.measure.init_distribution import Draws, draw_of

pytestmark = pytest.mark.check("measure")
COUNT = 5


class Files(Mapping[str, Tensor]):
    """Weights that are made whenever one is read, and how many of them were alive then."""

    def __init__(self) -> None:
        self.read: list[weakref.ref[Tensor]] = []
        self.alive: list[int] = []

    def __getitem__(self, name: str) -> Tensor:
        gc.collect()
        self.alive.append(sum(weight() is not None for weight in self.read))
        weight = torch.randn(40, 40, generator=torch.Generator().manual_seed(int(name)))
        self.read.append(weakref.ref(weight))
        return weight

    def __iter__(self) -> Iterator[str]:
        return map(str, range(COUNT))

    def __len__(self) -> int:
        return COUNT


def test_no_matrix_is_held_while_the_next_one_is_read() -> None:
    files = Files()
    results = examine_draws(files[name] for name in files)
    assert files.alive == [0] * COUNT and all(result is not None for result in results)

    files = Files()
    draws = Draws(files).of_all(dict.fromkeys(files, False))
    assert files.alive == [0] * COUNT
    assert {draw.family for draw in draws.values() if draw is not None} == {"normal"}


def matrices() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = {f"w{k}": torch.randn(40 + k, 40, generator=generator) for k in range(COUNT)}
    weights["outlier"] = 0.02 * torch.randn(64, 64, generator=generator)
    weights["outlier"][3, 5] = -2.0
    weights["narrow"] = torch.randn(40, 3, generator=generator)
    return weights


@pytest.mark.parametrize("most", [1, 1024])
def test_figures_from_an_accelerator_are_those_of_the_cpu(
    monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr("jacdiag.measure.init_distribution._MOST_FIGURES", most)
    monkeypatch.setattr("jacdiag.measure.independence_test._HELD", 64 * most)
    on_cpu = matrices()
    draws = {name: draw_of(weight) for name, weight in on_cpu.items()}
    tests = [examine_draw(weight) for weight in on_cpu.values()]
    assert draws["outlier"] is not None and draws["outlier"].outliers == 1 and tests[-1] is None
    with pretended_device() as counts:
        there = {name: weight.to(NAME) for name, weight in on_cpu.items()}
        counts.clear()
        assert examine_draws(iter(there.values())) == tests
        waits_of_tests = counts.waits
        assert Draws(there).of_all(dict.fromkeys(there, False)) == draws
    if most > 1:
        assert waits_of_tests == 1
