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

_PIECE = 4 << 20  # bytes; the store's server refuses messages of more than 8 MiB
_ANSWER = timedelta(seconds=30)
_connections = itertools.count()  # of this process, so that each audit has keys of its own


def in_environment() -> bool:
    """Return whether this process was started as one rank of several.

    torchrun sets the variables that are read; other launchers may set the same ones.
    """
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if not all(os.environ.get(name) for name in needed):
        return False
    return os.environ["WORLD_SIZE"] != "1"


def connect(rank: int, size: int, patience: float) -> Store:
    """Connect to the store at MASTER_ADDR:MASTER_PORT: torchrun's own, or one that rank 0 serves.

    Args:
        rank: of this process.
        size: how many ranks the job has.
        patience: in seconds.

    Raises:
        RankError: there is no answer for `patience` seconds.
    """
    # 1. Where the store is, and whether it lives in this process.
    address = os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    torchrun_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serve = rank == 0 and not torchrun_serves

    # 2. Keys of an earlier attempt of torchrun, or of an earlier audit, are not read.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    prefix = f"jacdiag/{attempt}/{next(_connections)}"

    # 3. Try again and again, each time briefly: Ctrl-C has no effect inside one try.
    deadline = time.monotonic() + patience
    while True:
        try:
            return Store(dist.PrefixStore(prefix, _open(address, port, size, serve)), serve)
        except (RuntimeError, OSError) as error:
            if time.monotonic() > deadline or serve:
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
    """Plain data by key.

    No method waits. A caller that waits for a key must notice meanwhile if a rank dies.

    Args:
        raw: a store of torch.distributed.
        serves: whether the store lives in this process and ends with it.
    """

    def __init__(self, raw: Any, serves: bool = False) -> None:
        self.raw = raw
        self.serves = serves

    def put(self, key: str, data: Any) -> None:
        """Write a value as JSON, compressed and in pieces.

        Args:
            key: its name, the same on every rank.
            data: plain JSON values.
        """
        # 1. The pieces.
        packed = zlib.compress(json.dumps(data).encode(), 1)
        starts = range(0, len(packed), _PIECE)
        for number, start in enumerate(starts):
            self.raw.set(f"{key}/{number}", packed[start : start + _PIECE])

        # 2. The key itself goes last: `has` sees it only when all pieces are there.
        self.raw.set(key, str(len(starts)))

    def put_first(self, key: str, data: Any) -> bool:
        """Write a value unless another rank has; return whether it was written.

        Args:
            key: its name, the same on every rank.
            data: plain JSON values.
        """
        if int(self.raw.add(f"{key}/taken", 1)) != 1:
            return False
        self.put(key, data)
        return True

    def has(self, key: str) -> bool:
        """Return whether a value of this key was written."""
        return bool(self.raw.check([key]))

    def get(self, key: str) -> Any:
        """Return what `put` wrote.

        Args:
            key: of a value that `has` has seen; for any other, the store waits until it times out.
        """
        count = int(self.raw.get(key))
        packed = b"".join(self.raw.get(f"{key}/{number}") for number in range(count))
        return json.loads(zlib.decompress(packed))

    def next(self, key: str) -> int:
        """Return the next number of a counter: 0, 1, 2, ..., each to one rank only."""
        return int(self.raw.add(key, 1)) - 1
