"""torchtitan's container of optimizers: two kinds, chosen by the names of parameters."""

from __future__ import annotations

from typing import Any

from torch import nn
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig


def optimizers_of(model: nn.Module) -> Any:
    """Return a container with Adam for the norms and AdamW for the rest."""
    groups = [
        ParamGroupConfig(pattern=r"norm", optimizer_name="Adam", optimizer_kwargs={"lr": 1e-3}),
        ParamGroupConfig(pattern=r".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 3e-3}),
    ]
    config = OptimizersContainer.Config(param_groups=groups, implementation="for-loop")
    return OptimizersContainer(config, model_parts=[model])
