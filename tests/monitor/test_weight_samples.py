"""Samples of weights are read where the weights lie now, and never from memory that was freed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from jacdiag.monitor.parameter_groups import GroupMember
from jacdiag.monitor.weight_samples import HostReader, is_readable, sample_layout

CPU = torch.device("cpu")


def weight(rows: int = 24, columns: int = 16) -> nn.Parameter:
    return nn.Parameter(torch.arange(rows * columns, dtype=torch.float32).reshape(rows, columns))


def reader_of(parameter: nn.Parameter) -> HostReader:
    member = GroupMember("weight", parameter, 0, 1.0)
    assert is_readable(member, CPU)
    return HostReader([member], [0])


def sampled(parameter: Tensor) -> np.ndarray:
    count, stride = sample_layout(parameter.numel(), parameter.shape[-1])
    return parameter.detach().flatten()[::stride][:count].numpy()


def values(reader: HostReader) -> np.ndarray:
    return reader.as_tensor(reader.read()).numpy()


def test_a_sample_holds_elements_of_the_weight() -> None:
    parameter = weight()
    assert np.array_equal(values(reader_of(parameter)), sampled(parameter))


def test_a_weight_that_moved_is_read_at_its_new_place() -> None:
    parameter = weight()
    reader = reader_of(parameter)
    parameter.data = torch.full_like(parameter, 7.0)
    assert (values(reader) == 7.0).all()


def test_a_weight_whose_storage_was_freed_is_not_read() -> None:
    parameter = weight(256, 1024)
    reader = reader_of(parameter)
    reader.read()
    held = parameter.untyped_storage()
    size = held.nbytes()
    held.resize_(0)
    with pytest.raises(RuntimeError, match="weight has no memory"):
        reader.read()

    # The trainer fills it again.
    held.resize_(size)
    with torch.no_grad():
        parameter.fill_(3.0)
    assert (values(reader) == 3.0).all()
