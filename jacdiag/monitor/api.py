"""`jacdiag.watch`, which a user adds to a training loop; all is checked before it is attached."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from jacdiag.distributed.training_group import Together, is_sharded
from jacdiag.errors import UsageError
from jacdiag.monitor.histograms import Histograms
from jacdiag.monitor.log.events import RunEvents
from jacdiag.monitor.log.sinks import AlertSink, Sink
from jacdiag.monitor.measurements import Measurements
from jacdiag.monitor.optimizers import check_belongs, check_supported, names_of, optimizer_tree
from jacdiag.monitor.schedule import Cadence
from jacdiag.monitor.skip_list import SkipList
from jacdiag.monitor.step_hooks import check_attachable
from jacdiag.monitor.training_watch import Watch
from jacdiag.rules.thresholds import load_thresholds
from jacdiag.sources.module_wrappers import unwrap
from jacdiag.sources.python_source import path_text

_WATCHED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Watch]] = weakref.WeakKeyDictionary()


def watch(
    model: nn.Module,
    optimizer: Any,
    *,
    log_dir: str | Path | None = None,
    every: int | str | None = "200, 1%",
    stats_every: int | str | None = "100, 1%",
    log_every: int = 10,
    on_alert: str | Callable[..., Any] = "log",
    strict: bool = False,
    probe: Any = None,
    resume: bool = False,
    updates: bool | int = True,
    recorder: int = 200,
    keep_batches: int | None = None,
    sinks: Iterable[str | Sink] = (),
    histograms_every: int | None = None,
    alerts_to: str | AlertSink | Iterable[str | AlertSink] = (),
    thresholds: Mapping[str, Any] | None = None,
    risk: str | Path | None = None,
    timeout: float = 60.0,
    quiet: bool = False,
    skip_list: str | Path | None = None,
) -> Watch:
    """Watch a training run; call `step(loss)` of the result once per optimizer step.

    The training is not changed by one bit.

    No `with` is needed. An exception that nobody catches, SIGTERM and Ctrl-C leave a flight, and
    the log is closed at the end of the program. `close()` or `with` end the watch earlier. See
    `docs/reference/flights.md`.

    Args:
        model: the module that the loop calls, wrapped or not.
        optimizer: one optimizer, a list of them, or a wrapper or container of them. It needs no
            torch class: `param_groups` and `step` are enough.
        log_dir: folder of `run.jsonl` and of what the flight recorder keeps; None writes nothing.
        every: cadence of the Jacobian probe: steps, a share of the training time such as "1%",
            both, or None. With "200, 1%" it runs every 200 steps. If steps are so short that this
            takes more than 1% of the time, it runs at a multiple of 200 steps that does not. With a
            share, the steps at which it runs depend on the machine.
        stats_every: cadence of shortcut and branch sizes, activations and attention logits: as
            `every`.
        log_every: steps between two looks at the device and two writes.
        on_alert: "log", "raise" (AlertRaised from `step`), or a function. It is called with the
            alert; one that takes two arguments also gets an `AlertMoment`: step, findings, model,
            optimizers and the folder of the flight.
        strict: raise a fault of the watch itself. If not set, what failed is switched off, with one
            warning.
        probe: what the probe runs on: token ids (B, T), a tuple of arguments or a dict of keyword
            arguments. The first sequences of the stream if not given.
        resume: go on with the log in `log_dir`.
        updates: measure the update norm of one sub-layer, in turn. That happens at every step until
            each sub-layer has ten of them, and at every fourth step from then on. Once a learning
            rate doubles within a step, or an update is far above the usual ones, it happens at each
            of the next 16 steps. A number N measures at every N-th step. False or 0 measures none.
            JD506, and JD501 for updates, need eight of each sub-layer.
        recorder: how many steps the flight recorder keeps; 0 for none.
        keep_batches: how many batches it keeps, with the random states, on their device. They are
            written once something happens. Live rules look every `log_every` steps. That many
            batches (times the micro-batches of a step) include the batch of any step that an alert
            can be about. If not given, the batches of that many steps are kept if they take at
            most 64 MB. 0 for none.
        sinks: "tensorboard", "wandb", "trackio", "mlflow", "openmetrics" (a text file for
            Prometheus, `jacdiag.prom` in `log_dir`), "openmetrics:FILE", or objects with
            write(step, figures) and close(). They get alerts too.
        alerts_to: addresses that alerts are sent to, such as a Slack webhook, or objects with
            alert(alert, moment). The training does not wait for them, and messages name no more of
            an address than its host.
        histograms_every: steps between two histograms of the weights and of the gradients that the
            optimizer gets, one of each per sub-layer, for the sinks "tensorboard" and "wandb"; None
            for none. Each looks at the device.
        thresholds: the user's own, see thresholds.toml.
        risk: a file of `jacdiag backtest --write-risk`, with the curves that JD105 uses at every
            learning rate. If not given, JD105 uses those that ship (models of width 32 to 128).
        timeout: seconds to wait for another rank.
        quiet: do not announce the price on stderr.
        skip_list: a file to which the batches of steps with an alert of the loss or the gradient
            are appended. Wrap the loader in `jacdiag.skipping(loader, FILE)`, which leaves them out
            in the next run.

    Returns:
        The watch. It runs until `close()` or the end of the program.

    Raises:
        UsageError: an option has a value that it cannot have. Or the model or the optimizer is of a
            kind that is not supported, does not belong to the other, or is watched already. Or the
            folder holds another run.

    Example:
        >>> import torch
        >>> from jacdiag.sources.gpt import build
        >>> model = build(n_layer=1, n_head=2, n_embd=16, vocab_size=32, block_size=8)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> w = watch(model, optimizer, every=None, quiet=True)
        >>> for it in range(401, 404):
        ...     ids = torch.randint(32, (2, 9))
        ...     _, loss = model(ids[:, :-1], ids[:, 1:])
        ...     loss.backward()
        ...     norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     w.step(loss, grad_norm=norm, step=it)
        >>> w.count
        403
        >>> w.close()
    """
    _check_options(log_every, updates, keep_batches, histograms_every, on_alert)
    probe_cadence = Cadence.of(every, "every")
    statistics_cadence = Cadence.of(stats_every, "stats_every")

    # 1. The model and its optimizers.
    check_supported(model)
    optimizers = optimizer_tree(optimizer)
    check_attachable(optimizers)
    names = names_of(model)
    unheld = check_belongs(optimizers.leaves, names)
    _check_unwatched(model)
    limits = load_thresholds(thresholds, risk)

    # 2. The log. Of several ranks the leading one writes it.
    together = Together(is_sharded(model), timeout)
    folder = Path(path_text(log_dir)) if log_dir is not None else None
    record = RunEvents(
        folder if together.lead else None,
        resume=resume,
        on_alert=on_alert,
        strict=strict,
        thresholds=limits,
        sinks=sinks if together.lead else (),
        recorder=recorder,
        quiet=quiet or not together.lead,
        warns=together.lead,
        alerts_to=alerts_to if together.lead else (),
    )
    if skip_list is not None and together.lead:
        record.skip_list = SkipList(skip_list, str(folder or ""))

    # 3. What is measured.
    measurements = Measurements(
        model,
        optimizers.leaves,
        names,
        together,
        record,
        probe=probe,
        thresholds=limits,
        probe_cadence=probe_cadence,
        statistics_cadence=statistics_cadence,
    )
    record.tiers = weakref.ref(measurements)

    # 4. What the user should know of these options.
    if unheld and len(unheld) < len(names):
        count = f"{len(unheld)} parameters are"
        if len(unheld) == 1:
            count = "1 parameter is"
        record.note(f"{count} in no optimizer, such as '{unheld[0]}'")
    batch_count = keep_batches or 0
    if record.recorder is not None and 0 < batch_count < log_every:
        record.warn(
            "keep",
            f"an alert may be about a step {log_every - 1} before it: keep_batches={log_every} "
            f"(times the micro-batches of a step) keeps its batch, keep_batches={keep_batches} "
            "may not",
        )

    # 5. Attach the watch.
    new_watch = Watch(
        model,
        optimizers,
        together,
        record,
        measurements,
        log_every=log_every,
        update_every=None if updates is True else int(updates),
        keep_batches=keep_batches,
        histograms=Histograms(histograms_every if together.lead else None),
    )
    _WATCHED[unwrap(model)] = weakref.ref(new_watch)
    return new_watch


def _check_options(
    log_every: Any, updates: Any, keep_batches: Any, histograms_every: Any, on_alert: Any
) -> None:
    """Raise UsageError if an option of `watch` has a value that it cannot have."""
    # 1. Steps between two events.
    if not _is_at_least(log_every, 1):
        raise UsageError(f"log_every cannot be {log_every!r}", hint="a number of steps, such as 10")
    if not _is_at_least(updates, 0):
        raise UsageError(
            f"updates cannot be {updates!r}", hint="True, False, or a number of steps, such as 10"
        )

    # 2. Options that None leaves to the watch, or switches off.
    if not _is_none_or_at_least(keep_batches, 0):
        raise UsageError(
            f"keep_batches cannot be {keep_batches!r}", hint="a number of batches, 0 for none"
        )
    if not _is_none_or_at_least(histograms_every, 1):
        raise UsageError(
            f"histograms_every cannot be {histograms_every!r}", hint="a number of steps, or None"
        )

    # 3. What happens at an alert.
    if not _is_alert_handling(on_alert):
        raise UsageError(
            f"on_alert cannot be {on_alert!r}", hint="'log', 'raise', or a function of the alert"
        )


def _is_at_least(value: Any, least: int) -> bool:
    return isinstance(value, int) and value >= least


def _is_none_or_at_least(value: Any, least: int) -> bool:
    return value is None or _is_at_least(value, least)


def _is_alert_handling(value: Any) -> bool:
    return value in ("log", "raise") or callable(value)


def _check_unwatched(model: nn.Module) -> None:
    """Raise UsageError if an open watch is on the model."""
    reference = _WATCHED.get(unwrap(model))
    if reference is None:
        return

    # A watch that was closed, or that nobody holds any more, has let go of the model.
    other = reference()
    if other is not None and not other.closed:
        raise UsageError("this model is watched already", hint="close() the other watch first")
