"""`make fuzz`: many damaged files, read in children that are watched; and outputs to paths of every
kind.

    python tests/hostile/fuzz.py --files 20000

A file must be read or refused with a message: no other exception, no death, nothing that takes over
10 s, no more than 1 GiB above its size, nothing started, written or connected to. What breaks that
is kept in tests/hostile/corpus. After every tenth file something is written to a device, a pipe, a
link, a full disk and so on: see outputs.py.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import random
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from hostile.outputs import verdict_on_output
from hostile.seeds import damaged, honest, honest_folders

CORPUS = Path(__file__).parent / "corpus"
FILES = ("zip.pt", "step.pt", "old.pt", "x.safetensors", "plain.bin")
SECONDS, MEMORY, BATCH = 10.0, 2**30, 250
START = 300.0  # seconds until the first file: imports, on a machine that has other work
OUTPUT_EVERY = 10  # files
RIGHT = ("read", "refused", "output written", "output refused")
_FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "subprocess.Popen",
    "socket.connect",
    "os.remove",
    "os.rename",
    "shutil.rmtree",
    "webbrowser.open",
    "ctypes.dlopen",
)


class Forbidden(BaseException):
    """Something that reading a file must never do."""


def watch(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook: what the interpreter is about to do on behalf of a file."""
    if _watching and event in _FORBIDDEN:
        raise Forbidden(event)
    if _watching and event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        raise Forbidden(f"open for writing: {args[0]!r}")


_watching = False


def _read(path: Path) -> None:
    """Reads a file or folder to the last number."""
    from jacdiag.sources import load
    from jacdiag.sources.formats import dcp

    if dcp.is_folder(path):
        tensors = [piece.read() for piece in dcp.chunked(path).values()]
    else:
        tensors = list(load(str(path)).state.values())
    for tensor in tensors:
        float(tensor.double().sum())


def verdict_on(path: Path) -> str:
    """Reads a file or folder as the command line would: "read", "refused", or what went wrong."""
    global _watching
    from jacdiag.errors import JacdiagError

    _watching = True
    try:
        _read(path)
        return "read"
    except JacdiagError:
        return "refused"
    except Forbidden as event:
        return f"forbidden: {event}"
    except BaseException as error:
        return f"crash: {type(error).__name__}: {str(error)[:120]}"
    finally:
        _watching = False


def child(folder: str, seed: int, count: int, pipe: Connection) -> None:
    """Reads `count` damaged files, and says before each which, after each how it went."""
    sys.addaudithook(watch)
    rng, root = random.Random(seed), Path(folder)
    seeds: dict[str, Any] = {**honest(root), **honest_folders(root)}
    for name, data in seeds.items():  # everything that is imported or allocated once
        said = verdict_on(written(root / f"warm-{name}", data))
        assert said == ("refused" if name in ("plain.bin", "hf") else "read"), (name, said)
    for k in range(count):
        name = rng.choice(sorted(seeds)) if rng.random() < 0.2 else rng.choice(FILES)
        data = seeds[name]
        if isinstance(data, dict):
            member = rng.choice(sorted(data))
            data = {**data, member: damaged(member, data[member], rng)}
        else:
            data = damaged(name, data, rng)
        path = written(root / f"{k}-{name}", data)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        pipe.send(("begin", str(path), ""))
        said = verdict_on(path)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        if grown > MEMORY:
            said = f"memory: {grown / 2**20:.0f} MiB"
        pipe.send(("end", str(path), said))
        if said in ("read", "refused"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if k % OUTPUT_EVERY == 0:
            pipe.send(("begin", str(root / "outputs"), ""))
            said = verdict_on_output(root, rng)
            pipe.send(
                (
                    "end",
                    str(root / "outputs"),
                    f"output {said}" if said in ("written", "refused") else said,
                )
            )
    pipe.send(("done", "", ""))


def written(path: Path, data: Any) -> Path:
    """Writes a file, or a folder of files."""
    if isinstance(data, dict):
        path.mkdir()
        for name, content in data.items():
            (path / name).write_bytes(content)
    else:
        path.write_bytes(data)
    return path


def batch(seed: int, count: int) -> Counter[str]:
    """One child, watched; a file that kills it or takes too long ends the batch, and is kept."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(
            target=child, args=(folder, seed, count, theirs)
        )
        process.start()
        theirs.close()
        at, wait = "", START
        while True:
            try:
                if not ours.poll(wait):
                    keep(Path(at), "hang", counts)
                    break
                kind, path, said = ours.recv()
            except EOFError:
                keep(Path(at), "death", counts)
                break
            if kind == "done":
                break
            at, wait = path, SECONDS
            if kind == "end" and said in RIGHT:
                counts[said] += 1
            elif kind == "end":
                keep(Path(path), said, counts)
        process.kill()
        process.join()
    return counts


def keep(path: Path, why: str, counts: Counter[str]) -> None:
    counts[why] += 1
    if not path.name or not path.exists():  # no name: it was over before the first file
        return
    CORPUS.mkdir(exist_ok=True)
    content = (
        b"".join(f.read_bytes() for f in sorted(path.rglob("*")))
        if path.is_dir()
        else path.read_bytes()
    )
    name = hashlib.sha256(content).hexdigest()[:12] + path.suffix
    with contextlib.suppress(OSError):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, CORPUS / name)
    print(f"{name}: {why}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    import torch
    import torch.distributed.checkpoint
    import transformers  # (loaded once, before the children are forked)

    import jacdiag.sources  # noqa: F401

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    begun, counts = time.perf_counter(), Counter[str]()
    for k in range(0, options.files, BATCH):
        counts += batch(options.seed * 1_000_003 + k, min(BATCH, options.files - k))
    seconds = time.perf_counter() - begun
    found = {key: n for key, n in counts.items() if key not in RIGHT}
    outputs = sum(n for key, n in counts.items() if key.startswith("output"))
    files = sum(counts.values()) - outputs
    print(
        f"{files} files in {seconds:.0f} s: {counts['read']} read, {counts['refused']} refused; "
        f"{outputs} outputs: "
        f"{counts['output written']} written, {counts['output refused']} refused; "
        f"{sum(found.values())} wrong "
        f"{found or ''}"
    )
    if options.json:
        result = {
            "files": files,
            "outputs": outputs,
            "counts": dict(counts),
            "seconds": round(seconds, 1),
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
