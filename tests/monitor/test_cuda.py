"""On a GPU: no wait for the device between logs, the right norms, the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from monitor.rig import T, V, adam, lines
from monitor.test_step_metrics import exact
from torch import nn

import jacdiag
from jacdiag.sources.gpt import build

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def train(
    folder: Path | None, steps: int = 20, fused: bool = False, **options: Any
) -> tuple[Any, list[float], Any]:
    torch.manual_seed(0)
    sizes = {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 64,
        "vocab_size": V,
        "block_size": T,
        "dropout": 0.1,
    }
    model = build("scaled-embed", **sizes).cuda().train()
    optimizer = adam(model, fused=fused)
    ids = torch.randint(V, (4, T + 1), device="cuda")
    norms: list[float] = []
    w = (
        None
        if folder is None
        else jacdiag.watch(model, optimizer, log_dir=folder, quiet=True, strict=True, **options)
    )
    for step in range(1, steps + 1):
        _, loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        norms.append(exact(p.grad for p in model.parameters()))
        if step > 1 and w is not None:
            torch.cuda.set_sync_debug_mode("error" if step % w.log_every else "default")
        try:
            optimizer.step()
            if w is not None:
                w.step(loss, grad_norm=norm)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        optimizer.zero_grad()
    if w is not None:
        w.close()
    return [p.detach().cpu() for p in model.parameters()], norms, w


@pytest.mark.parametrize("fused", [False, True])
def test_no_wait_for_the_device_between_logs(fused: bool, tmp_path: Path) -> None:
    plain = train(None, fused=fused)
    watched = train(tmp_path, fused=fused, every=20, stats_every=10, log_every=5)
    assert all(torch.equal(a, b) for a, b in zip(plain[0], watched[0], strict=True))
    rows = lines(tmp_path, "step")
    assert [row["grad_norm_post"] for row in rows] == pytest.approx(watched[1], rel=1e-5)
    assert lines(tmp_path, "end")[0]["host_syncs"] == 4  # one for every five steps
    assert [row["step"] for row in lines(tmp_path, "probe")] == [0, 20]


def test_the_debug_mode_sees_a_wait() -> None:
    """Proves that the test above can fail."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            float(torch.ones((), device="cuda") + 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("fused", [False, True])
def test_scaler_on_the_device(fused: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build("scaled-embed", n_layer=1, n_head=2, n_embd=64, vocab_size=V, block_size=T).cuda()
    optimizer, scaler = adam(model, fused=fused), torch.amp.GradScaler("cuda", init_scale=1024.0)
    ids = torch.randint(V, (4, T + 1), device="cuda")
    wanted = []
    with jacdiag.watch(
        model, optimizer, log_dir=tmp_path, every=None, log_every=4, strict=True, quiet=True
    ) as w:
        for step in range(1, 9):
            with torch.autocast("cuda", dtype=torch.float16):
                _, loss = model(ids[:, :-1], ids[:, 1:])
            scaler.scale(loss).backward()
            if step == 5:
                model.transformer["wte"].weight.grad[0, 0] = float("inf")
            wanted.append(exact(p.grad for p in model.parameters()) / scaler.get_scale())
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            w.step(loss)
    rows = lines(tmp_path, "step")
    assert [row["skipped"] for row in rows] == [step == 5 for step in range(1, 9)]
    for row, norm in zip(rows, wanted, strict=True):
        if row["step"] != 5:
            assert row["grad_norm_post"] == pytest.approx(norm, rel=1e-5)
