"""The rules that judge a training while it runs. `jacdiag.detectors` holds their code."""

from __future__ import annotations

from jacdiag.rules.rule import RuleInfo

RULES = (
    RuleInfo("JD501", "joint-detector", "warning"),
    RuleInfo("JD502", "loss-spike", "warning"),
    RuleInfo("JD503", "gradient-spike", "info"),
    RuleInfo("JD504", "spectral-drift", "warning"),
    RuleInfo("JD505", "non-finite-run", "error"),
    RuleInfo("JD506", "update-jump", "info"),
    RuleInfo("JD507", "stable-rank-fall", "info"),
    RuleInfo("JD508", "written-weights", "warning"),
)
