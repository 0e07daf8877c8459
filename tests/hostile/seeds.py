"""Honest little files of every format, and ways to damage them."""

from __future__ import annotations

import io
import json
import pickle
import random
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

WEIGHTS = {
    "wte.weight": torch.ones(8, 4),
    "h.0.fc.weight": torch.full((4, 4), 0.5),
    "h.0.fc.bias": torch.zeros(4),
}
INTERESTING = (
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    2**40,
    2**60,
    2**63 - 1,
    2**64 - 1,
)


def honest(folder: Path) -> dict[str, bytes]:
    """File name -> bytes; the suffix says the format."""
    made: dict[str, bytes] = {}
    step = {
        "model": WEIGHTS,
        "iter_num": 3,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(4)}}},
    }
    for name, zipped, held in (
        ("zip.pt", True, WEIGHTS),
        ("step.pt", True, step),
        ("old.pt", False, WEIGHTS),
    ):
        buffer = io.BytesIO()
        torch.save(held, buffer, _use_new_zipfile_serialization=zipped)
        made[name] = buffer.getvalue()
    save_file(WEIGHTS, folder / "x.safetensors", {"step": "3"})
    made["x.safetensors"] = (folder / "x.safetensors").read_bytes()
    made["plain.bin"] = pickle.dumps({"a": [1, 2], "b": "text"}, 2)
    return made


def honest_folders(folder: Path) -> dict[str, dict[str, bytes]]:
    """Folder name -> its files: one of torch.distributed.checkpoint, one of Hugging Face,
    sharded.
    """
    import torch.distributed.checkpoint as dcp

    dcp.save(dict(WEIGHTS), checkpoint_id=folder / "dcp", no_dist=True)
    made = {"dcp": {f.name: f.read_bytes() for f in (folder / "dcp").iterdir()}}
    config = {
        "model_type": "gpt2",
        "n_layer": 1,
        "n_embd": 4,
        "n_head": 1,
        "vocab_size": 8,
        "n_positions": 4,
        "architectures": ["GPT2LMHeadModel"],
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    save_file(WEIGHTS, folder / "one.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(WEIGHTS, "one.safetensors")}
    made["hf"] = {
        "config.json": json.dumps(config).encode(),
        "model.safetensors.index.json": json.dumps(index).encode(),
        "one.safetensors": (folder / "one.safetensors").read_bytes(),
    }
    return made


def damaged(name: str, data: bytes, rng: random.Random) -> bytes:
    """One to four damages; inside the pickle of a zip or the header of safetensors half of the
    time.
    """
    for _ in range(rng.randint(1, 4)):
        inner = _INSIDE.get(Path(name).suffix) if rng.random() < 0.5 else None
        try:
            data = inner(data, rng) if inner is not None else _bytes(data, rng)
        except Exception:  # too damaged to be opened by these
            data = _bytes(data, rng)
    return data


def _bytes(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return b"\x80\x02"
    at = rng.randrange(len(data))
    kind = rng.randrange(7)
    if kind == 0:
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    if kind == 2:
        return data[:at]
    if kind == 3:
        return data[:at] + data[at + rng.randint(1, 16) :]
    if kind == 4:
        return data[:at] + data[at : at + rng.randint(1, 32)] + data[at:]
    size = rng.choice((1, 2, 4, 8))
    value = rng.choice(INTERESTING) & (2 ** (8 * size) - 1)
    return data[:at] + value.to_bytes(size, rng.choice(("little", "big"))) + data[at + size :]


def _in_zip(data: bytes, rng: random.Random) -> bytes:
    """Damages one member, its checksum made right again."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(i.filename, archive.read(i)) for i in archive.infolist()]
    chosen = next((k for k, (n, _) in enumerate(members) if n.endswith("data.pkl")), 0)
    if rng.random() < 0.3:
        chosen = rng.randrange(len(members))
    name, content = members[chosen]
    members[chosen] = (name, _bytes(content, rng))
    if rng.random() < 0.1:
        members.append((rng.choice(["../../evil", "/etc/evil", name, "archive/data/0"]), b"x" * 9))
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as archive:
        warnings.simplefilter("ignore")  # of a name that comes twice: that is meant
        for n, c in members:
            archive.writestr(n, c)
    return buffer.getvalue()


def _in_header(data: bytes, rng: random.Random) -> bytes:
    """Changes one number, name or type of a safetensors header, its length made right again."""
    length = int.from_bytes(data[:8], "little")
    if length > len(data):
        raise ValueError(length)
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    kind = rng.randrange(5)
    if kind == 0:
        entry["shape"] = [rng.choice(INTERESTING) for _ in range(rng.randint(0, 4))]
    elif kind == 1:
        entry["data_offsets"][rng.randrange(2)] = rng.choice((*INTERESTING, -1, 4, 8))
    elif kind == 2:
        entry["dtype"] = rng.choice(["F64", "F8_E4M3", "BOOL", "X", None, 3])
    elif kind == 3:
        header[rng.choice(["__metadata__", "é\x00", "../a"])] = rng.choice(
            [{"step": "9" * 4000}, [], entry, None]
        )
    else:
        del entry[rng.choice(sorted(entry))]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


_INSIDE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".pt": _in_zip,
    ".safetensors": _in_header,
}
