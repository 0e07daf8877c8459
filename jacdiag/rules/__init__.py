"""The rules: what they compare, why, and what to do about it. They read reports only."""

from jacdiag.rules.engine import EVERY, RULES, decision_points, evaluate, rule, selected
from jacdiag.rules.rule import Rule
from jacdiag.rules.schemes import checked_contract

__all__ = ["EVERY", "RULES", "Rule", "checked_contract", "decision_points", "evaluate", "rule", "selected"]
