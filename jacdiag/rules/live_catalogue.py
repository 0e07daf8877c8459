"""JD501 to JD508: what the rules of a running training are called. `jacdiag.detectors` decides them."""

from __future__ import annotations

from jacdiag.rules import live_texts
from jacdiag.rules.rule import NOT_APPLICABLE, Context, Outcome, Rule


def _of_a_run(_context: Context, _rule: Rule) -> Outcome:
    return NOT_APPLICABLE


RULES = tuple(
    Rule(code, name, level, **text, check=_of_a_run)  # type: ignore[arg-type]
    for code, name, level, text in (
        ("JD501", "joint-detector", "warning", live_texts.JOINT),
        ("JD502", "loss-spike", "warning", live_texts.LOSS_SPIKE),
        ("JD503", "gradient-spike", "info", live_texts.GRADIENT_SPIKE),
        ("JD504", "spectral-drift", "warning", live_texts.DRIFT),
        ("JD505", "non-finite-run", "error", live_texts.NON_FINITE),
        ("JD506", "update-jump", "info", live_texts.UPDATE_JUMP),
        ("JD507", "stable-rank-fall", "info", live_texts.STABLE_RANK),
        ("JD508", "written-weights", "warning", live_texts.WRITTEN),
    )
)
