"""The gate inside a test suite: `assert_stable_init`, and the pytest plugin."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from jacdiag.records import Report


def assert_stable_init(
    build: str | nn.Module | Callable[[], nn.Module],
    inputs: Any = None,
    *,
    fail_on: str = "error",
    baseline: str | Path | None = None,
    write_baseline: bool = False,
    seeds: int = 3,
    **options: Any,
) -> Report:
    """Assert that a model's initialization passes the gate.

    Args:
        build: a callable that returns a new model (it is called once per seed, with torch's
            generators seeded), a module, or a SOURCE string as for `jacdiag.audit`.
        inputs: the probe, as for `jacdiag.audit`; random token ids if not given.
        fail_on: the least level that fails: "info", "warning", "error".
        baseline: a file of recorded figures to compare with.
        write_baseline: write the figures into `baseline` instead of comparing with it.
        seeds: how many initializations.
        **options: of `jacdiag.gate.gate`: contract, select, ignore, thresholds, profile, products
            ...

    Returns:
        The report, for further assertions. Its verdict is "observed" for a trained model without a
        baseline: no rule can fail one, and a warning says that nothing was asserted.

    Raises:
        AssertionError: the gate failed, stayed undecided, or no rule applied. The message names the
            rule, the weights, what was expected and what was measured.
        JacdiagError: the gate cannot run.

    Example:
        >>> from functools import partial
        >>> from jacdiag.sources.gpt import build
        >>> sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 64, "block_size": 16}
        >>> tiny = partial(build, "gpt2", **sizes)
        >>> assert_stable_init(tiny, seeds=1, batch=1, contract={"W_O": "0.02/sqrt(2*N)"}).verdict
        'warn'
    """
    __tracebackhide__ = True  # pytest then shows the line of the test
    from jacdiag.gate import gate
    from jacdiag.gate import write_baseline as write
    from jacdiag.render.terminal.gate import render

    # 1. Run the gate, against the baseline or to write it.
    path = Path(baseline) if baseline is not None else None
    compared = None if write_baseline else path
    if write_baseline:
        options["decide"] = False
    outcome = gate(build, inputs, seeds=seeds, fail_on=fail_on, baseline=compared, **options)
    if write_baseline and path is not None:
        write(path, outcome.figures)

    # 2. Say what came out.
    if outcome.exit_code:
        raise AssertionError("the initialisation does not pass\n\n" + render(outcome.report))
    if outcome.report.verdict == "observed":
        message = (
            "jacdiag: the model is trained, and was compared with nothing: its "
            "initialisation was not asserted"
        )
        warnings.warn(message, stacklevel=2)
    return outcome.report


__all__ = ["assert_stable_init"]
