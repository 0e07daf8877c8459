"""Two ranks whose gradients are the same or differ at the optimizer's step: what is said, and by
whom.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from monitor.rank_gradients import MODES
from monitor.test_ranks import both

SCRIPT = Path(__file__).with_name("rank_gradients.py")
CAUSES = {
    "inside": "the gradients are averaged inside the optimizer",
    "nobody": "nobody averages the gradients",
    "other weights": "the ranks hold different weights",
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The warnings of both ranks, by mode."""
    folder = tmp_path_factory.mktemp("gradients")
    both(SCRIPT, folder)
    return [
        json.loads((folder / f"said-{rank}.json").read_text(encoding="utf-8")) for rank in range(2)
    ]


@pytest.mark.parametrize("mode", MODES)
def test_gradients_that_differ_between_ranks_are_reported_with_the_cause(
    mode: str, said: list[Any]
) -> None:
    texts = [text for text in said[0][mode] if "gradients" in text]
    for other, cause in CAUSES.items():
        assert any(cause in text for text in texts) == (other == mode)
    assert len(texts) == (mode in CAUSES)


@pytest.mark.parametrize("mode", MODES)
def test_second_rank_reports_nothing(mode: str, said: list[Any]) -> None:
    """Not even that few batches are kept, which the first rank says."""
    assert said[1][mode] == []
    assert any("keep_batches" in text for text in said[0][mode])
