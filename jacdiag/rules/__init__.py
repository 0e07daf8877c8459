"""The rules: what they compare, why, and what to do about it. They read reports only."""

from jacdiag.rules.engine import EVERY, RULES, decision_points, evaluate, rule, selected
from jacdiag.rules.rule import Rule

__all__ = ["EVERY", "RULES", "Rule", "decision_points", "evaluate", "rule", "selected"]
