"""The old name of the package keeps working, and says what the new one is."""

from __future__ import annotations

import importlib
import sys

import pytest


def test_the_old_package_has_the_same_names() -> None:
    import jacdiag.watching

    for name in jacdiag.watching.__all__:
        assert getattr(jacdiag.watching, name) is getattr(jacdiag.monitor, name)


@pytest.mark.parametrize("library", ["huggingface", "lightning"])
def test_the_old_module_of_a_callback_warns_and_gives_the_same_class(library: str) -> None:
    pytest.importorskip("transformers" if library == "huggingface" else "lightning")
    sys.modules.pop(f"jacdiag.watching.{library}", None)
    with pytest.warns(DeprecationWarning, match=f"jacdiag.monitor.integrations.{library}"):
        old = importlib.import_module(f"jacdiag.watching.{library}")
    new = importlib.import_module(f"jacdiag.monitor.integrations.{library}")
    assert old.WatchCallback is new.WatchCallback
