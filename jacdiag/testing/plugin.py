"""The pytest plugin: `pytest --jacdiag` runs the tests that use the fixture `jacdiag_gate`.

It prints a summary of them. Without the option such tests are skipped: they take seconds, and are
meant for a job of their own. Importing this module loads neither torch nor the rest of jacdiag.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_LINES = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the plugin."""
    group = parser.getgroup("jacdiag", "jacdiag: gate on model initialisation")
    group.addoption(
        "--jacdiag", action="store_true", help="run tests that use the fixture jacdiag_gate"
    )
    group.addoption(
        "--jacdiag-write-baselines",
        action="store_true",
        help="write the baselines of jacdiag_gate instead of comparing with them",
    )
    group.addoption(
        "--jacdiag-seeds",
        type=int,
        default=None,
        help="initialisations per model (default: the test's)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Prepare the list of lines for the summary."""
    config.stash[_LINES] = []


@pytest.fixture
def jacdiag_gate(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Return a function like `jacdiag.testing.assert_stable_init`.

    A relative baseline lies in the folder of the test's file.

    Example:
        def test_init(jacdiag_gate):
            jacdiag_gate(build_model, input_ids, baseline="init.json")
    """
    config = request.config
    if not config.getoption("--jacdiag"):
        pytest.skip("needs --jacdiag")

    def run(build: Any, inputs: Any = None, **options: Any) -> Any:
        __tracebackhide__ = True
        from jacdiag.testing import assert_stable_init

        seeds = config.getoption("--jacdiag-seeds")
        if seeds is not None:
            options["seeds"] = seeds
        if options.get("baseline") is not None:
            options["baseline"] = Path(request.path).parent / options["baseline"]
            options.setdefault("write_baseline", config.getoption("--jacdiag-write-baselines"))
        started = time.perf_counter()
        result = "failed"
        try:
            report = assert_stable_init(build, inputs, **options)
            is_observed = report.verdict == "observed"
            result = "observed a trained model" if is_observed else "passed"
            return report
        finally:
            seconds = time.perf_counter() - started
            config.stash[_LINES].append(f"{request.node.nodeid}: {result} in {seconds:.1f} s")

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print one line for each gate that ran."""
    lines = config.stash[_LINES]
    if lines:
        terminalreporter.section("jacdiag gate")
        for line in lines:
            terminalreporter.line(line)
