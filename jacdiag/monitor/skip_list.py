"""A list of bad batches: the watch writes it, and the next run of the loop leaves them out.

A batch is known by its place in the order in which the loader hands batches out, counted from 0
over all epochs, with those that are left out counted as well. So the places stay right however many
are skipped. Its content is noted, too: a place that has other content in another run is not
skipped.
"""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from jacdiag.errors import UsageError, one_line
from jacdiag.monitor.guards import logger
from jacdiag.records.run_log import Alert, plain
from jacdiag.sources.python_source import path_text
from jacdiag.trace.execution.precision import map_leaves

CODES = ("JD501", "JD502", "JD505")  # alerts about the loss and the gradient of single steps
SCHEMA = 1

_NAMES_BATCHES = frozenset({"positions", "from", "step"})  # keys, of which an entry needs one
_ELEMENTS = 4096  # of a tensor that its content is known by
_STEPS = 4096  # whose batches are remembered: an alert comes at most `log_every` steps late
_WAITING = 65536  # batches that no step has claimed, where nothing is watched in this process


@dataclass(frozen=True)
class Delivered:
    """A batch that the loop got.

    Attributes:
        position: its place in the order of the loader.
        content: a fingerprint; None if it is not in host memory.
    """

    position: int
    content: str | None


@dataclass
class _Ledger:
    """The batches that a loop got.

    Attributes:
        waiting: those since the last optimizer step.
        steps: step -> its batches.
        loader: id of the loader that has handed out batches in this run.
    """

    waiting: deque[Delivered] = field(default_factory=lambda: deque(maxlen=_WAITING))
    steps: deque[tuple[int, list[Delivered]]] = field(default_factory=lambda: deque(maxlen=_STEPS))
    loader: int | None = None


# by the path of the list: how a loop's loader and its watch find each other
_LEDGERS: dict[str, _Ledger] = {}


def _key(path: str) -> str:
    return str(Path(path).resolve())


def _ledger(path: str) -> _Ledger:
    return _LEDGERS.setdefault(_key(path), _Ledger())


# -- the watch writes ------------------------------------------------------------------------------
class SkipList:
    """A list of the batches of steps that an alert is about.

    Args:
        path: of the list. Lines are appended; each is one JSON object.
        run: the `log_dir` of the run, to find it again.
    """

    def __init__(self, path: str | os.PathLike[str], run: str = "") -> None:
        """Begin a ledger, which the loop's loader fills; see the class for the arguments."""
        self.path = path_text(path)
        self.run = run
        self._ledger = _Ledger()
        _LEDGERS[_key(self.path)] = self._ledger

    def step_ended(self, step: int) -> None:
        """Note that the batches since the last call belong to this step."""
        ledger = self._ledger
        ledger.steps.append((step, list(ledger.waiting)))
        ledger.waiting.clear()

    def rewind(self, base: int) -> None:
        """Forget which batches belong to steps after `base`: they are going to be done again."""
        ledger = self._ledger
        earlier = [entry for entry in ledger.steps if entry[0] <= base]
        ledger.steps.clear()
        ledger.steps.extend(earlier)

    def add(self, alert: Alert) -> None:
        """Append the batches of an alert's steps.

        Only alerts about the loss or the gradient of single steps count.

        Args:
            alert: whose steps are those from its `since` to its `step`.

        Raises:
            OSError: the list cannot be written.
        """
        if not alert.code.startswith(CODES):
            return
        # 1. The steps that the alert is about.
        since = alert.evidence.get("since")
        first = alert.step
        if isinstance(since, int):
            first = min(since, alert.step)

        # 2. Their batches.
        batches: list[Delivered] = []
        for step, batches_of_step in self._ledger.steps:
            if first <= step <= alert.step:
                batches += batches_of_step

        # 3. The line.
        entry = {
            "v": SCHEMA,
            "step": alert.step,
            "since": first,
            "positions": [batch.position for batch in batches],
            "contents": [batch.content for batch in batches],
            "code": alert.code,
            "what": alert.what,
            "run": self.run,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        append_line(self.path, entry)


def append_line(path: str, entry: Mapping[str, Any]) -> None:
    """Append one JSON line completely or not at all, whoever else writes to the file.

    Args:
        path: of the file. Its folder is made if it is not there.
        entry: the object.

    Raises:
        OSError: it cannot be written.
    """
    text = json.dumps(plain(entry), allow_nan=False, ensure_ascii=False)
    # a path may hold bytes that are no UTF-8
    line = text.encode(errors="backslashreplace") + b"\n"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        # 1. Begin a line of its own.
        fcntl.flock(handle, fcntl.LOCK_EX)
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            line = b"\n" + line  # a writer was killed in the middle of its line

        # 2. Write it, or leave the file as it was.
        try:
            remaining = line
            while remaining:
                remaining = remaining[os.write(handle, remaining) :]
            os.fsync(handle)
        except OSError:
            os.ftruncate(handle, size)
            raise
    finally:
        os.close(handle)


# -- the loop reads --------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class BadBatches:
    """What a list of bad batches holds.

    Attributes:
        positions: place -> the content that was seen there; None if that is not known.
        unplaced: steps of entries that name no place.
    """

    positions: dict[int, str | None] = field(default_factory=dict)
    unplaced: list[int] = field(default_factory=list)


def read_skip_list(
    path: str | os.PathLike[str],
    *,
    before: int = 0,
    after: int = 0,
    batches_per_step: int | None = None,
) -> BadBatches:
    """Read a list of bad batches.

    A list that is not there yet is empty. A line that was torn off is left out.

    Args:
        path: of the list. A line is a JSON object with `positions`, or with `from` and `to` for a
            range, or with a `step`; or it is a place by itself.
        before: how many places before each to take as well.
        after: how many places after each to take as well.
        batches_per_step: if a line has a step and no place, the places are those of that step,
            counted from 1.

    Raises:
        UsageError: the list cannot be read, or a line of it has no meaning.
    """
    # 1. Read the file.
    file = Path(path_text(path))
    lines = _read_lines(file)

    # 2. Take the places of each line.
    positions: dict[int, str | None] = {}
    unplaced: list[int] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        entry = _parse_entry(line, f"line {number} of '{file}'", last=number == len(lines))
        if entry is None:
            continue
        places, contents = _places(entry, batches_per_step)
        if not places:
            unplaced.append(int(entry.get("step", 0)))
        _add_places(positions, places, contents)

    # 3. Add the places around them.
    for position in list(positions):
        for near in range(max(position - before, 0), position + after + 1):
            positions.setdefault(near, None)
    return BadBatches(positions=positions, unplaced=unplaced)


def _read_lines(file: Path) -> list[bytes]:
    """Return the lines of a skip list with their ends; none if it is not there yet."""
    try:
        if not file.exists():
            return []
        return file.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise UsageError(f"cannot read the skip list '{file}'", got=error.strerror) from error


def _add_places(
    positions: dict[int, str | None], places: list[int], contents: list[str | None]
) -> None:
    """Add places with the content that was seen there; None where contents differ."""
    for position, content in zip(places, contents, strict=True):
        seen = positions.get(position, content)

        # Two runs may each have had a bad batch there, and not the same one.
        positions[position] = content if seen == content else None


def _parse_entry(line: bytes, where: str, *, last: bool) -> dict[str, Any] | None:
    """Return a line as an object; None for one that was torn off.

    Raises:
        UsageError: it has no meaning.
    """
    hint = 'such as {"positions": [1200, 1201]} or {"from": 1200, "to": 1400}'

    # 1. Read the line. One without its end was torn off by a kill.
    try:
        entry = json.loads(line)
    except ValueError as error:
        is_torn = last or not line.rstrip().endswith(b"}")
        if is_torn:
            return None
        raise UsageError(f"{where} is no JSON", got=one_line(error), hint=hint) from error

    # 2. A place by itself, as a list written by hand may have it.
    if isinstance(entry, int) and not isinstance(entry, bool):
        return {"positions": [entry]}

    # 3. An object that says which batches.
    if not isinstance(entry, dict) or _NAMES_BATCHES.isdisjoint(entry):
        text = line.decode(errors="replace").strip()
        raise UsageError(f"{where} names no batch", got=text[:80], hint=hint)
    version = entry.get("v")
    if isinstance(version, int) and version > SCHEMA:
        raise UsageError(f"{where} was written by a newer jacdiag", got=f"version {version}")
    return entry


def _places(
    entry: Mapping[str, Any], batches_per_step: int | None
) -> tuple[list[int], list[str | None]]:
    """Return the places of an entry and the contents that were seen there."""
    # 1. A range.
    if "from" in entry:
        first = int(entry["from"])
        last = int(entry.get("to", first))
        places = list(range(first, last + 1))
        return places, [None] * len(places)

    # 2. Places by themselves, with or without their contents.
    places = [int(position) for position in entry.get("positions") or []]
    has_only_step = not places and "step" in entry
    if batches_per_step is None or not has_only_step:
        contents = list(entry.get("contents") or [])
        if len(contents) != len(places):
            contents = [None] * len(places)
        return places, contents

    # 3. Steps, which are counted from 1.
    first_step = int(entry.get("since", entry["step"]))
    first = max((first_step - 1) * batches_per_step, 0)
    end = int(entry["step"]) * batches_per_step
    places = list(range(first, end))
    return places, [None] * len(places)


class Skipping:
    """A loader without the bad batches of a list; see `skipping`.

    Args:
        loader: the loader.
        path: of the list.
        bad: what the list holds.
        start: the place of the first batch.

    Attributes:
        position: the place of the next batch.
        skipped: places that were left out so far.
    """

    def __init__(self, loader: Iterable[Any], path: str, bad: BadBatches, start: int) -> None:
        """Begin before the first batch; see the class for the arguments."""
        self.loader = loader
        self.path = path
        self.bad = bad
        self.position = start
        self.skipped: list[int] = []
        self._alone = not _several_ranks()
        self._in_pass = 0  # batches of this pass over the loader so far
        self._forward = 0  # batches at the start of the next pass that an earlier run had
        self._contents = {content for content in bad.positions.values() if content is not None}
        self._warned = False

    def __len__(self) -> int:
        """Return the length of the loader, the bad batches included."""
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches that are not on the list."""
        # 1. Begin a pass. The batches that an earlier run had are read again, and not yielded.
        forward = self._forward
        self._forward = 0
        self._in_pass = 0
        self.position -= forward
        self._begin()

        for batch in self.loader:
            # 2. Count the batch, whether it is yielded or not.
            position = self.position
            self.position += 1
            self._in_pass += 1
            if self._in_pass <= forward:
                continue

            # 3. Leave it out, or hand it out and note that the loop has it.
            content = content_of(batch)
            if self._is_bad(position, content):
                self.skipped.append(position)
                logger.info(
                    "jacdiag.skipping: batch %d is on %s and is left out", position, self.path
                )
                continue
            _ledger(self.path).waiting.append(Delivered(position, content))
            yield batch

    def _begin(self) -> None:
        """Warn if this loader counts from 0 again, after another one in this run."""
        ledger = _ledger(self.path)
        is_another = ledger.loader not in (None, id(self))
        if is_another and self.position == 0:
            logger.warning(
                "jacdiag.skipping: a second loader reads %s, and its places begin at 0 again: "
                "make it once, before the loop over epochs, or pass start=",
                self.path,
            )
        ledger.loader = id(self)

    def _is_bad(self, position: int, content: str | None) -> bool:
        """Return whether a batch is on the list, by its place or by its content."""
        # 1. Compare the content with what was seen at that place. None is not known.
        is_listed = position in self.bad.positions
        seen = self.bad.positions.get(position)
        differs = seen is not None and content is not None and seen != content
        if differs:
            self._warn_of_other_content(position)

        # 2. Each rank has content of its own, and all of them have to leave out the same places.
        if not self._alone:
            return is_listed

        # 3. One process alone can tell by the content.
        if is_listed and not differs:
            return True
        return content in self._contents

    def _warn_of_other_content(self, position: int) -> None:
        """Say once that the data comes in another order than in the run that wrote the list."""
        if self._warned:
            return
        self._warned = True
        consequence = "skipped on every rank all the same"
        if self._alone:
            consequence = "not skipped"
        logger.warning(
            "jacdiag.skipping: batch %d has other content than the one on %s: the order of "
            f"the data has changed, and it is {consequence}",
            position,
            self.path,
        )

    # -- going on ----------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Return what to save with a checkpoint, so that the places go on."""
        state: dict[str, Any] = {"version": 1, "position": self.position, "in_pass": self._in_pass}
        if hasattr(self.loader, "state_dict"):
            state["loader"] = self.loader.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`.

        A loader that has a state of its own goes on by itself. Another one is read again up to
        there.

        Args:
            state: what `state_dict` returned.

        Raises:
            UsageError: the state is of another version.
        """
        if state.get("version") != 1:
            raise UsageError(
                "a skipping loader cannot go on from this state", got=f"{state.get('version')!r}"
            )
        self.position = int(state["position"])

        # Where the loader goes on: by itself, or after it was read again up to there.
        if "loader" in state and hasattr(self.loader, "load_state_dict"):
            self.loader.load_state_dict(state["loader"])
            self._forward = 0
        else:
            self._forward = int(state["in_pass"])


def skipping(
    loader: Iterable[Any],
    skip_list: str | os.PathLike[str],
    *,
    before: int = 0,
    after: int = 0,
    start: int = 0,
    batches_per_step: int | None = None,
) -> Skipping:
    """Iterate over a loader without the bad batches of a list.

    Make it once, before the loop over epochs, and let it be the outermost wrapper, so that a batch
    is handed out when the loop uses it. `jacdiag.watch(..., skip_list=FILE)` in the same loop
    writes to the list. The list is read here, once; what is added later is left out in the next
    run. With `torch.distributed` every rank has to call this: the list is that of rank 0, and all
    ranks leave out the same places.

    Args:
        loader: anything that yields batches, such as a DataLoader.
        skip_list: the file. One that is not there is an empty list.
        before: how many batches before each bad one to leave out as well.
        after: how many batches after each bad one to leave out as well.
        start: the place of the first batch, for a loader that goes on in the middle.
        batches_per_step: of an optimizer step. Needed for lines of a loop that had no `skipping`
            yet, which name steps and no places.

    Returns:
        An iterable over the batches, with `state_dict` and `load_state_dict`.

    Raises:
        UsageError: the list cannot be read, or an option has no meaning.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> path = Path(tempfile.mkdtemp()) / "skip.jsonl"
        >>> _ = path.write_text('{"positions": [1]}\\n{"from": 4, "to": 5}\\n')
        >>> list(skipping("abcdefg", path))
        ['a', 'c', 'd', 'g']
    """
    # 1. Check the options.
    for name, value in (("before", before), ("after", after), ("start", start)):
        if not isinstance(value, int) or value < 0:
            raise UsageError(f"{name} cannot be {value!r}", hint="a number of batches, 0 or more")
    path = path_text(skip_list)

    # 2. Read the list.
    listed = _read_for_all_ranks(path, before, after, batches_per_step)

    # 3. Warn of lines that leave nothing out.
    if listed.unplaced:
        text = (
            "%d lines of %s name a step and no batch, such as step %d: batches_per_step= tells "
            "which these are"
        )
        logger.warning(f"jacdiag.skipping: {text}", len(listed.unplaced), path, listed.unplaced[0])
    return Skipping(loader, path, listed, start)


def _read_for_all_ranks(
    path: str, before: int, after: int, batches_per_step: int | None
) -> BadBatches:
    """Return the list as rank 0 reads it; raise on every rank if it cannot."""
    # 1. Rank 0 reads it for all.
    results: list[BadBatches | UsageError | None] = [None]
    if not _several_ranks() or dist.get_rank() == 0:
        results = [_attempt(path, before, after, batches_per_step)]

    # 2. It sends the list, or its error, to the others.
    if _several_ranks():
        dist.broadcast_object_list(results, src=0)
    listed = results[0]
    if isinstance(listed, UsageError):
        raise listed
    assert isinstance(listed, BadBatches)
    return listed


def _attempt(
    path: str, before: int, after: int, batches_per_step: int | None
) -> BadBatches | UsageError:
    """Read the list; an error is returned, so that no rank waits for one that has raised."""
    try:
        return read_skip_list(path, before=before, after=after, batches_per_step=batches_per_step)
    except UsageError as error:
        return error


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def content_of(batch: Any) -> str | None:
    """Return a fingerprint of a batch; None if a tensor of it is not on the CPU.

    A device is not waited for. Of a large tensor a few thousand elements count, at equal distances.
    """
    digest = hashlib.blake2b(digest_size=8)
    on_device = False

    def take(leaf: Any) -> Any:
        nonlocal on_device
        # 1. Constants count by value, other objects by class.
        if isinstance(leaf, str | int | float | bool):
            digest.update(repr(leaf).encode())
            return leaf
        if not isinstance(leaf, Tensor):
            digest.update(type(leaf).__name__.encode())
            return leaf

        # 2. Tensors count by their elements.
        if leaf.device.type != "cpu":
            on_device = True
            return leaf
        flat = leaf.detach().reshape(-1)
        flat = flat[:: max(flat.numel() // _ELEMENTS, 1)].contiguous()
        digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().tobytes())
        return leaf

    map_leaves(take, dict(batch) if isinstance(batch, Mapping) else batch)
    if on_device:
        return None
    return digest.hexdigest()
