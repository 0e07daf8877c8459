"""Computed tables of a model, such as rotary frequencies and masks, and what they hold."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from jacdiag.measure.init_distribution import TINY
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
        if buffer.is_meta or not buffer.numel() or buffer.numel() > _LARGEST:
            continue
        meaning = meaning_of(sites.graph, name, buffer)
        if buffer.is_floating_point() or buffer.is_complex() or meaning == "mask":
            records.append(table_of(name, buffer, meaning))
    return records


def meaning_of(graph: Graph, name: str, buffer: Tensor) -> str:
    """Return what a buffer is, "" if it is not known.

    What the model does with it comes first, then its name.
    """
    if buffer.is_floating_point() and enters_sine_and_cosine(graph, name):
        return "frequencies"

    # The buffer's own name counts, not that of its module: a module of positions may hold other
    # buffers.
    meaning = _meaning_by_name(name.rpartition(".")[2])
    if meaning == "mask":
        is_square = buffer.dim() >= 2 and buffer.shape[-1] == buffer.shape[-2] > 1
        return "mask" if is_square else ""
    if buffer.is_floating_point() or buffer.is_complex():
        return meaning
    return ""


def _meaning_by_name(own_name: str) -> str:
    for meaning, pattern in _NAMES:
        if pattern.search(own_name):
            return meaning
    return ""


def enters_sine_and_cosine(graph: Graph, name: str) -> bool:
    """Return whether products of a buffer with positions alone enter both a sine and a cosine."""
    waiting = [value.index for value in graph.values if value.node == STATE and value.name == name]
    seen: set[int] = set()
    periodic: set[str] = set()
    while waiting and len(seen) < _MOST_CALLS:
        value = waiting.pop(0)
        for number in graph.values[value].consumers:
            node = graph.nodes[number]
            call = node.name.strip("_")
            if call in _PERIODIC:
                periodic.add(call)
            elif number not in seen:
                seen.add(number)
                waiting += node.outputs
    return "polar" in periodic or {"cos", "sin"} <= periodic


def table_of(name: str, buffer: Tensor, meaning: str = "") -> TableRecord:
    """Return the record of one buffer.

    Example:
        >>> table = table_of("inv_freq", 10000.0 ** -torch.arange(0, 1, 0.125), "frequencies")
        >>> table.first, round(table.ratio, 3), table.rounded
        (1.0, 0.316, '')
    """
    values = torch.view_as_real(buffer.resolve_conj()) if buffer.is_complex() else buffer
    values = values.detach().flatten()
    numbers = values.double()
    finite = numbers[torch.isfinite(numbers)]
    close = (finite.abs() < TINY) & (finite != 0)
    record = TableRecord(
        name,
        list(buffer.shape),
        str(buffer.dtype).removeprefix("torch."),
        meaning,
        not_finite=numbers.numel() - finite.numel(),
        zeros=int((numbers == 0).sum()),
        tiny=int(close.sum()),
        least=float(finite.min()) if finite.numel() else None,
        most=float(finite.max()) if finite.numel() else None,
    )
    if buffer.dim() != 1 or record.not_finite or buffer.is_complex():
        return record
    first, ratio = _series_of(numbers)
    rounded = narrower_type(values) if meaning == "frequencies" else ""
    return TableRecord(**{**vars(record), "first": first, "ratio": ratio, "rounded": rounded})


def _series_of(numbers: Tensor) -> tuple[float | None, float | None]:
    """Return first element and ratio of a geometric series, else None twice.

    It must have at least three numbers, all positive.
    """
    if numbers.numel() < 3 or not bool((numbers > 0).all()):
        return None, None
    steps = numbers[1:].log() - numbers[:-1].log()
    ratio = float(steps.mean().exp())
    if float((steps - steps.mean()).abs().max()) > 1e-4:
        return None, None
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
    if values.dtype not in (torch.float32, torch.float64) or values.numel() < 3:
        return ""
    mantissas, _ = torch.frexp(values.double())
    is_long = (mantissas * 16) != (mantissas * 16).round()
    steps = values.double().diff()
    is_even = bool(torch.isclose(steps, steps[0], rtol=1e-3, atol=0).all())
    if int(is_long.sum()) < 2 or is_even:
        return ""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(values.to(dtype).to(values.dtype), values):
            return str(dtype).removeprefix("torch.")
    return ""
