"""The key-value store that the ranks of one job share, and plain data in it."""

from __future__ import annotations

import itertools
import json
import os
import time
import zlib
from datetime import timedelta
from functools import cache
from typing import Any

import torch.distributed as dist

from jacdiag.errors import RankError, one_line

_PIECE = 4 << 20  # the store's server refuses messages of more than 8 MiB
_ANSWER = timedelta(seconds=30)
_joined = itertools.count()


def in_environment() -> bool:
    """Return whether this process was started as one rank of several.

    torchrun sets the variables that are looked at; other launchers may set the same ones.
    """
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(os.environ.get(name) for name in needed) and os.environ["WORLD_SIZE"] != "1"


def connect(rank: int, size: int, patience: float) -> Store:
    """Connects to the store at MASTER_ADDR:MASTER_PORT: torchrun's own, or one that rank 0 serves.

    Raises:
        RankError: nobody answers there for `patience` seconds.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serve = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    prefix, until = f"jacdiag/{attempt}/{next(_joined)}", time.monotonic() + patience
    while True:  # in short tries: Ctrl-C is not seen inside one
        try:
            return Store(dist.PrefixStore(prefix, _open(address, port, size, serve)), serve)
        except (RuntimeError, OSError) as error:
            if time.monotonic() > until or serve:
                raise RankError(
                    f"rank {rank} of {size} cannot reach the others at {address}:{port}",
                    got=one_line(error),
                    hint="the same MASTER_ADDR and MASTER_PORT on every node; "
                    "WORLD_SIZE=1 in front for an audit in this process alone",
                ) from error


@cache
def _open(address: str, port: int, size: int, serve: bool) -> dist.TCPStore:
    """Open the one connection of this process.

    A store that is served here must outlive one audit of several.
    """
    raw = dist.TCPStore(
        address, port, size, serve, timedelta(seconds=5), wait_for_workers=False, multi_tenant=True
    )
    raw.set_timeout(_ANSWER)
    return raw


class Store:
    """Plain data by key. Nothing here waits: who waits must look after the living meanwhile.

    Args:
        raw: of torch.distributed.
        serves: the store lives in this process and ends with it.
    """

    def __init__(self, raw: Any, serves: bool = False) -> None:
        self.raw, self.serves = raw, serves

    def put(self, key: str, data: Any) -> None:
        """Writes JSON, compressed and in pieces."""
        packed = zlib.compress(json.dumps(data).encode(), 1)
        pieces = [packed[k : k + _PIECE] for k in range(0, len(packed), _PIECE)]
        for k, piece in enumerate(pieces):
            self.raw.set(f"{key}/{k}", piece)
        self.raw.set(key, str(len(pieces)))

    def put_first(self, key: str, data: Any) -> bool:
        """Writes it unless somebody has; says whether it was written."""
        if int(self.raw.add(f"{key}/taken", 1)) != 1:
            return False
        self.put(key, data)
        return True

    def has(self, key: str) -> bool:
        return bool(self.raw.check([key]))

    def get(self, key: str) -> Any:
        """Reads what `put` wrote; the key must be there."""
        pieces = int(self.raw.get(key))
        return json.loads(
            zlib.decompress(b"".join(self.raw.get(f"{key}/{k}") for k in range(pieces)))
        )

    def next(self, key: str) -> int:
        """0, 1, 2, ...: each number to one rank only."""
        return int(self.raw.add(key, 1)) - 1
