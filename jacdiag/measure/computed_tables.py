"""Computed tables of a model, such as rotary frequencies and masks, and what they hold."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from jacdiag.devices.accelerators import in_float64
from jacdiag.measure.moments import TINY
from jacdiag.records.structure import TableRecord
from jacdiag.trace import Sites
from jacdiag.trace.graph.graph import STATE, Graph

_MOST_CALLS = 24  # calls from a table of frequencies to its sine and cosine
_LARGEST = 2**24  # elements of the largest table that is read
_PERIODIC = ("cos", "sin", "polar")  # calls that make a rotation of an angle
# Names come second: the dataflow shows frequencies, but no call tells a slope from a mask.
_NAMES = (
    ("frequencies", re.compile(r"inv_?freq", re.IGNORECASE)),
    (
        "rotation",
        re.compile(r"(^|[._])(cos|sin)(_|$|cached|cache)|freqs_cis|rope_cache|cos_sin_cache"),
    ),
    ("slopes", re.compile(r"alibi|(^|[._])slopes?$", re.IGNORECASE)),
    ("variance", re.compile(r"(running|moving)_var(iance)?$")),
    (
        "sinusoid",
        re.compile(r"sinusoid|pos(ition(al|s)?)?_?(embed|encod|table)|(^|[._])pe$", re.IGNORECASE),
    ),
    (
        "mask",
        re.compile(
            r"causal|(^|[._])((attn|attention|look_ahead)_)?mask$|(^|[._])tri[lu]$", re.IGNORECASE
        ),
    ),
)


def tables_of(sites: Sites) -> list[TableRecord]:
    """Return the record of each buffer with numbers that are computed when a model is built.

    Buffers of integers are left out, and masks of bool are kept.

    Args:
        sites: of one recorded forward.
    """
    records = []
    for name, buffer in sites.skeleton.buffers.items():
        if not _can_be_read(buffer):
            continue

        meaning = meaning_of(sites.graph, name, buffer)
        # A mask may be of bool.
        if _holds_numbers(buffer) or meaning == "mask":
            records.append(table_of(name, buffer, meaning))

    return records


def _can_be_read(buffer: Tensor) -> bool:
    """Return whether a buffer has values, and not too many."""
    if buffer.is_meta:
        return False

    return 0 < buffer.numel() <= _LARGEST


def _holds_numbers(buffer: Tensor) -> bool:
    """Return whether a buffer holds floating or complex numbers."""
    return buffer.is_floating_point() or buffer.is_complex()


def meaning_of(graph: Graph, name: str, buffer: Tensor) -> str:
    """Return what a buffer is, "" if it is not known.

    What the model does with it comes first, then its name.

    Args:
        graph: of one recorded forward.
        name: of the buffer.
        buffer: its value.
    """
    # 1. What the model does with it.
    holds_frequencies = buffer.is_floating_point() and enters_sine_and_cosine(graph, name)
    if holds_frequencies:
        return "frequencies"

    # 2. Its own name, and not that of its module: a module of positions may hold other buffers.
    _, _, own_name = name.rpartition(".")
    meaning = _meaning_by_name(own_name)

    # 3. Whether its values can be that.
    can_mean_it = _holds_numbers(buffer)
    if meaning == "mask":
        can_mean_it = _is_square(buffer)
    if not can_mean_it:
        return ""

    return meaning


def _is_square(buffer: Tensor) -> bool:
    """Return whether the last two sides of a buffer are equal, and more than one."""
    return buffer.dim() >= 2 and buffer.shape[-1] == buffer.shape[-2] > 1


def _meaning_by_name(own_name: str) -> str:
    """Return what the name of a buffer says that it is; "" if it says nothing."""
    for meaning, pattern in _NAMES:
        if pattern.search(own_name) is not None:
            return meaning

    # A name of its author's own.
    return ""


def enters_sine_and_cosine(graph: Graph, name: str) -> bool:
    """Return whether products of a buffer with positions alone enter both a sine and a cosine.

    Args:
        graph: of one recorded forward.
        name: of the buffer.
    """
    periodic: set[str] = set()
    for call in _calls_reached_from(graph, name):
        if call in _PERIODIC:
            periodic.add(call)

    # A call of `polar` computes both.
    return "polar" in periodic or {"cos", "sin"} <= periodic


def _calls_reached_from(graph: Graph, name: str) -> Iterator[str]:
    """Yield the calls that a buffer leads to, breadth first, up to sines and cosines."""
    # 1. Where the buffer enters.
    waiting: list[int] = []
    for record in graph.values:
        is_buffer = record.node == STATE and record.name == name
        if is_buffer:
            waiting.append(record.index)

    # 2. From there on, call by call.
    seen: set[int] = set()
    while waiting and len(seen) < _MOST_CALLS:
        value = waiting.pop(0)
        for number in graph.values[value].consumers:
            node = graph.nodes[number]
            call = node.name.strip("_")
            yield call

            # What a sine is used for does not matter.
            if call not in _PERIODIC and number not in seen:
                seen.add(number)
                waiting += node.outputs


def table_of(name: str, buffer: Tensor, meaning: str = "") -> TableRecord:
    """Return the record of one buffer.

    Args:
        name: of the buffer.
        buffer: its value.
        meaning: what it is; "" if it is not known.

    Example:
        >>> table = table_of("inv_freq", 10000.0 ** -torch.arange(0, 1, 0.125), "frequencies")
        >>> table.first, round(table.ratio, 3), table.rounded
        (1.0, 0.316, '')
    """
    # 1. All numbers, and those that are finite.
    values = buffer
    if buffer.is_complex():
        values = torch.view_as_real(buffer.resolve_conj())
    values = values.detach().flatten()
    numbers = in_float64(values)
    finite = numbers[torch.isfinite(numbers)]
    least = most = None
    if finite.numel():
        least, most = float(finite.min()), float(finite.max())
    is_tiny = (finite.abs() < TINY) & (finite != 0)
    record = TableRecord(
        name,
        list(buffer.shape),
        str(buffer.dtype).removeprefix("torch."),
        meaning,
        not_finite=numbers.numel() - finite.numel(),
        zeros=int((numbers == 0).sum()),
        tiny=int(is_tiny.sum()),
        least=least,
        most=most,
    )

    # 2. A geometric series, as frequencies and slopes are.
    may_be_series = buffer.dim() == 1 and not buffer.is_complex()
    if record.not_finite or not may_be_series:
        return record

    first, ratio = _series_of(numbers)
    rounded = ""
    if meaning == "frequencies":
        rounded = narrower_type(values)
    return replace(record, first=first, ratio=ratio, rounded=rounded)


def _series_of(numbers: Tensor) -> tuple[float | None, float | None]:
    """Return first element and ratio of a geometric series, else None twice.

    It must have at least three numbers, all positive.
    """
    if numbers.numel() < 3:
        return None, None
    if not bool((numbers > 0).all()):
        return None, None

    # The steps of the logarithm must be even.
    steps = numbers[1:].log() - numbers[:-1].log()
    unevenness = float((steps - steps.mean()).abs().max())
    if unevenness > 1e-4:
        return None, None

    ratio = float(steps.mean().exp())
    return float(numbers[0]), ratio


def narrower_type(values: Tensor) -> str:
    """Return the 16-bit type to which wider numbers were rounded, "" if they were not.

    Numbers with short binary fractions (1, 0.5, 12, 0.375) are numbers of every type, and evenly
    spaced ones are of many. So at least two numbers need a fraction of more than four bits, and the
    steps between them must differ. A float32 that was not rounded is a bfloat16 with a chance of
    2^-16.

    Args:
        values: of one dimension.

    Example:
        >>> plain = 10000.0 ** -torch.arange(0, 1, 0.125)
        >>> narrower_type(plain), narrower_type(plain.bfloat16().float())
        ('', 'bfloat16')
        >>> narrower_type(torch.arange(64.0))
        ''
    """
    is_wide = values.dtype in (torch.float32, torch.float64)
    if not is_wide:
        return ""
    if values.numel() < 3:
        return ""

    # 1. At least two long fractions.
    mantissas, _ = torch.frexp(in_float64(values))
    is_long = (mantissas * 16) != (mantissas * 16).round()
    if int(is_long.sum()) < 2:
        return ""

    # 2. Steps that differ.
    steps = in_float64(values).diff()
    is_even = bool(torch.isclose(steps, steps[0], rtol=1e-3, atol=0).all())
    if is_even:
        return ""

    # 3. The type whose numbers they all are.
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(values.to(dtype).to(values.dtype), values):
            return str(dtype).removeprefix("torch.")

    return ""
