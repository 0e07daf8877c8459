"""What the tests of the command line share: a little model as a factory file, a made-up audit, what
a command left.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import textwrap
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from render import synthetic

from jacdiag.records import Report

MODEL = '''
"""A pre-norm transformer of two layers, vocabulary 64."""
import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x):
        b, t, d = x.shape
        parts = self.qkv(x).split(d, dim=2)
        q, k, v = (part.view(b, t, 2, d // 2).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, t, d))


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(d), Attention(d)
        self.ln_2 = nn.LayerNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Tiny(nn.Module):
    def __init__(self, d=16, layers=2, talk=False):
        super().__init__()
        if talk:
            print("number of parameters: some")
        self.wte, self.wpe = nn.Embedding(64, d), nn.Embedding(32, d)
        self.h = nn.ModuleList(Block(d) for _ in range(layers))
        self.ln_f, self.head = nn.LayerNorm(d), nn.Linear(d, 64, bias=False)
        self.spare = nn.Parameter(torch.zeros(3))

    def forward(self, ids):
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.h:
            x = block(x)
        return self.head(self.ln_f(x))


def build(**kwargs):
    return Tiny(**kwargs)


def no_residual():
    return nn.Sequential(nn.Embedding(64, 16), nn.Linear(16, 64))


def raises():
    class Broken(Tiny):
        def forward(self, ids):
            raise ValueError("the router lost its way")

    return Broken()


def leaves():
    raise SystemExit(0)


def returns_nothing():
    return None
'''


@dataclass
class Done:
    """What a command left: its exit code, and what it printed."""

    code: int
    out: str
    err: str


@dataclass
class Stub:
    """A made-up audit: gives a report or raises, and remembers what it was asked."""

    report: Report = field(default_factory=synthetic.vanilla)
    error: BaseException | None = None
    during: Callable[[dict[str, Any]], None] | None = None
    asked: dict[str, Any] = field(default_factory=dict)
    calls: int = 0

    def __call__(self, source: str, record: Any) -> Report:
        options = dict(vars(record))
        self.asked, self.calls = {"source": source, **options}, self.calls + 1
        if self.during is not None:
            self.during(options)
        if self.error is not None:
            raise self.error
        return self.report


def files(folder: Path) -> set[str]:
    """Everything in a folder, temporary files too."""
    return {path.name for path in folder.iterdir() if path.name != "__pycache__"}


ROOT = Path(__file__).parents[2]


def stubbed(*args: str, during: str = "", layers: int = 12) -> str:
    """Code for a process of its own that runs a command with a made-up audit, and something to do
    meanwhile.
    """
    return "\n".join(
        [
            "import os, signal, sys, types",
            f"sys.path[:0] = {[str(ROOT), str(ROOT / 'cli'), str(ROOT / 'tests')]!r}",
            "from render import synthetic",
            "from jacdiag_cli.main import main",
            "def run_audit(source, options):",
            textwrap.indent(textwrap.dedent(during), "    "),
            f"    return synthetic.vanilla({layers})",
            "sys.modules['jacdiag.pipeline.audit'] = types.SimpleNamespace(run_audit=run_audit)",
            # The real record of options imports torch, which takes longer than all the rest.
            "record = types.SimpleNamespace(AuditOptions=types.SimpleNamespace)",
            "sys.modules['jacdiag.pipeline.options'] = record",
            f"sys.exit(main({list(args)!r}))",
        ]
    )


def on_terminal(
    code: str, folder: Path, *, columns: int, stdout_too: bool = True, **env: str
) -> Done:
    """Runs code on a terminal of that width; `stdout_too=False` leaves stdout a pipe, as in
    `jacdiag ... | jq`.
    """
    ours, theirs = pty.openpty()
    piped = folder.parent / f"{folder.name}.stdout"
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    clean = {
        key: value
        for key, value in os.environ.items()
        if key not in ("NO_COLOR", "COLUMNS", "LINES")
    }
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=theirs,
        stdout=theirs if stdout_too else piped.open("wb"),
        stderr=theirs,
        cwd=folder,
        env={**clean, "TERM": "xterm-256color", **env},
    )
    os.close(theirs)
    killer = threading.Timer(60, process.kill)
    killer.start()
    shown = b""
    with contextlib.suppress(OSError):  # Linux says EIO when the last writer has gone
        while part := os.read(ours, 65536):
            shown += part
    code_left = process.wait()
    killer.cancel()
    os.close(ours)
    text = shown.decode().replace("\r\n", "\n")
    return Done(code_left, text, "") if stdout_too else Done(code_left, piped.read_text(), text)
