"""One of two processes of Lightning's ModelParallelStrategy (FSDP2): python lightning_ranks.py RANK
PORT FOLDER.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

from monitor.rig import adam, batch, small, state_of

STEPS = 24
OPTIONS: dict[str, Any] = {
    "every": 12,
    "stats_every": 6,
    "log_every": 4,
    "quiet": True,
    "timeout": 20.0,
}


def run(folder: Path, watched: bool) -> tuple[dict[str, Any], list[float]]:
    from lightning.pytorch import LightningModule, Trainer, seed_everything
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard
    from torch.utils.data import DataLoader

    from jacdiag.monitor.integrations.lightning import WatchCallback

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model: nn.Module = nn.Identity()
            self.losses: list[float] = []

        def configure_model(self) -> None:
            if isinstance(self.model, nn.Identity):
                self.model = small()
                mesh = self.device_mesh["data_parallel"]
                for block in self.model.transformer["h"]:
                    fully_shard(block, mesh=mesh)
                fully_shard(self.model, mesh=mesh)

        def training_step(self, ids: Tensor, index: int) -> Tensor:
            logits = self.model(ids[:, :-1])
            logits = logits[0] if isinstance(logits, tuple) else logits
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            self.losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self) -> Any:
            return adam(self)

    seed_everything(4, verbose=False)
    module = Module()
    data = DataLoader(
        [torch.cat([batch(k, 1)[0][0], batch(k, 1)[1][0][-1:]]) for k in range(64)], batch_size=4
    )
    callbacks = [WatchCallback("model", log_dir=folder / "log", **OPTIONS)] if watched else []
    trainer = Trainer(
        max_steps=STEPS,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        devices=2,
        default_root_dir=folder,
        strategy=ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"
        ),
    )
    trainer.fit(module, data)
    state = state_of(module, trainer.optimizers[0])
    return {
        k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()
    }, module.losses


def main(rank: int, port: int, folder: Path) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    plain, watched = run(folder, watched=False), run(folder, watched=True)
    same = {
        "losses": plain[1] == watched[1] and len(plain[1]) == STEPS,
        "state": all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(watched[0][k]))
            for k, v in plain[0].items()
        ),
    }
    (folder / f"told-{rank}.json").write_text(
        json.dumps({"same": same, "losses": watched[1]}), encoding="utf-8"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
