"""What must be equal on every rank before work is shared.

Versions, options, the model (to the bit) and the probe are compared.
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

_CHUNK = 1 << 18  # elements summed at once; bounds the memory that a checksum takes
# Element size in bytes -> the type that its bits are read as.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Attributes of modules that may differ between ranks.
_MAY_DIFFER = re.compile(r"(^|_)(rank|world_size|device|path)(_|$)")


@dataclass(frozen=True)
class Fingerprint(Record):
    """Plain data that two ranks can compare; each field maps names to values, as text.

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
        """Return the first difference to the fingerprint of another rank.

        Args:
            other: that fingerprint.

        Returns:
            The kind of the difference, its name, and both values in words; None if there is none.
        """
        for field in fields(self):
            own_values: dict[str, str] = getattr(self, field.name)
            other_values: dict[str, str] = getattr(other, field.name)
            for name in dict.fromkeys([*own_values, *other_values]):
                if own_values.get(name) == other_values.get(name):
                    continue

                # A name that one rank lacks has no value there.
                own = clipped(own_values.get(name, "not there"), 80)
                theirs = clipped(other_values.get(name, "not there"), 80)
                return _KINDS[field.name], name, f"{own}, against {theirs}"
        return None


# Field of a fingerprint -> what a difference in it is called.
_KINDS = {
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
    """Return the fingerprint of what this rank is about to measure.

    Args:
        root: the model's modules; None if there are only weights.
        tensors: parameters and buffers by name. Each is read once, so that weights may stay in
            their files.
        probe: the tensors of the input.
        options: of the audit.
        sublayers: name -> text on which the order of the jobs depends.
    """
    # A build such as "+cu121" may differ between machines.
    torch_version = torch.__version__.split("+")[0]
    config = {}
    if root is not None:
        config = _config(root)
    return Fingerprint(
        versions={"torch": torch_version, "jacdiag": __version__},
        options={name: str(value) for name, value in options.items()},
        config=config,
        weights={name: _describe(tensor) for name, tensor in tensors},
        probe={f"input {index}": _describe(tensor) for index, tensor in enumerate(probe)},
        sublayers=dict(sublayers),
    )


def checksum(tensor: Tensor) -> int:
    """Return a 64-bit checksum of a tensor's bits.

    It is the same on every device and for every order of summation, as it is integer arithmetic
    modulo 2^64. Elements are weighted by odd numbers. Any single element that differs changes the
    checksum for certain, and so does an exchange of two neighbours.

    Args:
        tensor: of any shape and dtype, with values.

    Example:
        >>> a = torch.arange(6.0)
        >>> checksum(a) == checksum(a.clone()), checksum(a) == checksum(a.flip(0))
        (True, False)
    """
    # 1. Read the bits as integers.
    values = tensor.detach()
    if values.is_complex():
        values = torch.view_as_real(values)
    flat = values.contiguous().flatten()
    bits = flat.view(_INTEGERS[flat.element_size()])

    # 2. Add them up chunk by chunk, weighted by 1, 3, 5, ...
    longest = min(_CHUNK, max(1, bits.numel()))
    weights = torch.arange(1, 2 * longest, 2, device=bits.device)
    total = 0
    for chunk in bits.split(_CHUNK):
        chunk_sum = int((chunk.long() * weights[: chunk.numel()]).sum())
        total = (total * 1_000_003 + chunk_sum) % 2**64
    return total


def _describe(tensor: Tensor) -> str:
    """Return shape, dtype and checksum of a tensor; no checksum on the meta device."""
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    content = "no values" if tensor.is_meta else f"checksum {checksum(tensor):016x}"
    return f"{shape} {str(tensor.dtype).removeprefix('torch.')}, {content}"


def _config(root: nn.Module) -> dict[str, str]:
    """Return classes and numbers by module, and the config object that many models have."""
    # 1. The class of each module, and the numbers among its attributes.
    config: dict[str, str] = {}
    for name, module in root.named_modules():
        config[name or "model"] = type(module).__name__
        prefix = f"{name}." if name else ""
        config |= _scalars(vars(module), prefix, (bool, int, float))

    # 2. The config of a Hugging Face model.
    to_dict = getattr(getattr(root, "config", None), "to_dict", None)
    if callable(to_dict):
        config |= _scalars(to_dict(), "config.", (bool, int, float, str))
    return config


def _scalars(table: Mapping[str, Any], prefix: str, kinds: tuple[type, ...]) -> dict[str, str]:
    """Return the public values of some types by prefixed name, without those that may differ."""
    scalars = {}
    for key, value in table.items():
        if not isinstance(value, kinds):
            continue

        # A private attribute may hold anything, such as a counter.
        is_private = key.startswith("_")
        if is_private or _MAY_DIFFER.search(key):
            continue
        scalars[f"{prefix}{key}"] = repr(value)
    return scalars
