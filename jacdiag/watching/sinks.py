"""Where figures go besides the log: TensorBoard, Weights & Biases, or anything with `write(step, figures)`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from jacdiag.errors import UsageError
from jacdiag.watching.histograms import Histogram, moments


class Sink(Protocol):
    """Takes slash-named figures, such as {"jacdiag/gain/transformer.h.0.attn": 1.2}.

    One that has a method `write_histograms(step, shown)` gets histograms too, if `histograms_every` asks for them.
    """

    def write(self, step: int, figures: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Scalars for TensorBoard, through torch.utils.tensorboard (extra `tensorboard`)."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            hint = "pip install 'jacdiag[tensorboard]'"
            raise UsageError("the sink 'tensorboard' needs TensorBoard", hint=hint) from error
        self.writer = SummaryWriter(str(folder))

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def write_histograms(self, step: int, shown: Mapping[str, Histogram]) -> None:
        for name, histogram in shown.items():
            total, squares = moments(histogram)
            self.writer.add_histogram_raw(
                name,
                min=histogram.edges[0],
                max=histogram.edges[-1],
                num=sum(histogram.counts),
                sum=total,
                sum_squares=squares,
                bucket_limits=histogram.edges[1:],
                bucket_counts=histogram.counts,
                global_step=step,
            )

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """Figures for Weights & Biases: the run that is open, or one of its own, offline (extra `wandb`)."""

    def __init__(self, folder: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UsageError("the sink 'wandb' needs wandb", hint="pip install 'jacdiag[wandb]'") from error
        self.own = wandb.run is None
        if self.own:
            self.run: Any = wandb.init(project="jacdiag", dir=str(folder), mode="offline")
        else:
            self.run = wandb.run
        self.run.define_metric("jacdiag/step")
        self.run.define_metric("jacdiag/*", step_metric="jacdiag/step")  # the loop's own step counter stays its own

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self.run.log({"jacdiag/step": step, **figures})

    def write_histograms(self, step: int, shown: Mapping[str, Histogram]) -> None:
        import numpy as np
        import wandb

        pairs = {name: (np.array(histogram.counts), np.array(histogram.edges)) for name, histogram in shown.items()}
        panels = {name: wandb.Histogram(np_histogram=pair) for name, pair in pairs.items()}
        self.run.log({"jacdiag/step": step, **panels})

    def close(self) -> None:
        if self.own:
            self.run.finish()


BY_NAME = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def open_sinks(wanted: Iterable[str | Sink], folder: Path) -> list[tuple[str, Sink]]:
    """Opens sinks by name; objects with `write` and `close` are taken as they are.

    Raises:
        UsageError: an unknown name, or a library that is not installed.
    """
    if isinstance(wanted, str):
        wanted = (wanted,)
    if not isinstance(wanted, Iterable):
        raise UsageError("sinks is a list", got=f"type {type(wanted).__name__}", hint='sinks=["tensorboard"]')
    found: list[tuple[str, Sink]] = []
    for one in wanted:
        if isinstance(one, str):
            if one not in BY_NAME:
                raise UsageError(f"no sink is called '{one}'", hint=f"there are {', '.join(BY_NAME)}")
            found.append((one, cast(Sink, BY_NAME[one](folder))))
        elif callable(getattr(one, "write", None)):
            found.append((type(one).__name__, one))
        else:
            raise UsageError("a sink needs write(step, figures) and close()", got=f"a {type(one).__name__}")
    return found


def slashed(row: Mapping[str, Any], groups: Iterable[str]) -> dict[str, float]:
    """The figures of a step under slash-separated names."""
    found: dict[str, float] = {}
    for key in ("loss", "lr", "grad_norm", "grad_norm_post", "step_seconds", "noise_scale"):
        value = row.get(key)
        if isinstance(value, int | float):
            found[f"jacdiag/{key}"] = float(value)
    for name, value in zip(groups, row.get("grad") or [], strict=False):
        if isinstance(value, int | float):
            found[f"jacdiag/grad/{name}"] = float(value)
    for place, rate in enumerate(row.get("lrs") or []):
        if isinstance(rate, int | float):
            found[f"jacdiag/lr/{place}"] = float(rate)
    update = row.get("update")
    if update:
        found[f"jacdiag/update/{update['where']}"] = float(update["ratio"])
    return found


def slashed_series(series: Mapping[str, Mapping[str, float | None]]) -> dict[str, float]:
    """The figures of a probe or of the statistics under slash-separated names; branch_norm is the gain."""
    names = {"branch_norm": "gain", "core_norm": "core"}
    return {
        f"jacdiag/{names.get(figure, figure)}/{where}": float(value)
        for figure, values in series.items()
        for where, value in values.items()
        if value is not None
    }
