"""What must be equal on every rank before work is shared.

Versions, options, the model to the bit, and the probe are compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from jacdiag._version import __version__
from jacdiag.errors import clipped
from jacdiag.records.base import Record

_CHUNK = 1 << 18
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ITS_OWN = re.compile(r"(^|_)(rank|world_size|device|path)(_|$)")  # what a rank may have for itself


@dataclass(frozen=True)
class Fingerprint(Record):
    """Plain data that two ranks can compare; each field maps a name to what it is, as text.

    Attributes:
        versions: of torch and jacdiag.
        options: of the audit.
        config: the model's classes, and the numbers that its modules keep (heads, eps).
        weights: parameters and buffers: shape, dtype and checksum.
        probe: the tensors of the input.
        sublayers: what the recorded forward showed.
    """

    versions: dict[str, str]
    options: dict[str, str]
    config: dict[str, str]
    weights: dict[str, str]
    probe: dict[str, str]
    sublayers: dict[str, str]

    def difference(self, other: Fingerprint) -> tuple[str, str, str] | None:
        """Return the first difference: its kind, its name, and both values.

        None if there is no difference.
        """
        for part in (f.name for f in fields(self)):
            mine, theirs = getattr(self, part), getattr(other, part)
            for name in dict.fromkeys([*mine, *theirs]):
                if mine.get(name) != theirs.get(name):
                    here, there = (
                        clipped(side.get(name, "not there"), 80) for side in (mine, theirs)
                    )
                    return _WORDS[part], name, f"{here}, against {there}"
        return None


_WORDS = {
    "versions": "other versions",
    "options": "other options",
    "config": "another model",
    "weights": "other weights",
    "probe": "another probe",
    "sublayers": "other sub-layers",
}


def fingerprint(
    root: nn.Module | None,
    tensors: Iterable[tuple[str, Tensor]],
    probe: Iterable[Tensor],
    options: Mapping[str, Any],
    sublayers: Mapping[str, str],
) -> Fingerprint:
    """Takes the fingerprint of what this rank is about to measure.

    Args:
        root: the model's modules; None where there are only weights.
        tensors: parameters and buffers by name; each is looked at once, so that weights may stay in
            their files.
        probe: the tensors of the input.
        options: of the audit.
        sublayers: name -> anything that the plan of the work rests on.
    """
    return Fingerprint(
        versions={"torch": torch.__version__.split("+")[0], "jacdiag": __version__},
        options={name: str(value) for name, value in options.items()},
        config={} if root is None else _config(root),
        weights={name: _print(t) for name, t in tensors},
        probe={f"input {k}": _print(t) for k, t in enumerate(probe)},
        sublayers=dict(sublayers),
    )


def checksum(tensor: Tensor) -> int:
    """Return a 64-bit checksum of a tensor's bits.

    It is the same on every device and for every order of summation.

    Integer arithmetic modulo 2^64. Bits are weighted by odd numbers: any one element that differs
    is seen for certain, and so is an exchange of two neighbours.

    Example:
        >>> a = torch.arange(6.0)
        >>> checksum(a) == checksum(a.clone()), checksum(a) == checksum(a.flip(0))
        (True, False)
    """
    flat = tensor.detach()
    flat = (torch.view_as_real(flat) if flat.is_complex() else flat).contiguous().flatten()
    bits = flat.view(_BITS[flat.element_size()])
    weight = torch.arange(1, 2 * min(_CHUNK, max(1, bits.numel())), 2, device=bits.device)
    total = 0
    for part in bits.split(_CHUNK):
        total = (total * 1_000_003 + int((part.long() * weight[: part.numel()]).sum())) % 2**64
    return total


def _print(tensor: Tensor) -> str:
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    content = "no values" if tensor.is_meta else f"checksum {checksum(tensor):016x}"
    return f"{shape} {str(tensor.dtype).removeprefix('torch.')}, {content}"


def _config(root: nn.Module) -> dict[str, str]:
    """Classes and numbers by module, and the config object that many models carry."""
    found: dict[str, str] = {}
    for name, module in root.named_modules():
        found[name or "model"] = type(module).__name__
        found |= _scalars(vars(module), f"{name}." if name else "", (bool, int, float))
    to_dict = getattr(getattr(root, "config", None), "to_dict", None)
    return found | (
        _scalars(to_dict(), "config.", (bool, int, float, str)) if callable(to_dict) else {}
    )


def _scalars(table: Mapping[str, Any], prefix: str, kinds: tuple[type, ...]) -> dict[str, str]:
    return {
        f"{prefix}{key}": repr(value)
        for key, value in table.items()
        if isinstance(value, kinds) and not key.startswith("_") and not _ITS_OWN.search(key)
    }
