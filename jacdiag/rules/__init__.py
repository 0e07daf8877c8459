"""The rules: what they compare, why, and what to do about it. They read reports only."""

from jacdiag.rules.engine import EVERY, RULES, decision_points, evaluate, rule, selected
from jacdiag.rules.init_contract import deviations_of
from jacdiag.rules.rule import Rule
from jacdiag.rules.scheme_deviations import Deviation
from jacdiag.rules.schemes import checked_contract

__all__ = [
    "EVERY",
    "RULES",
    "Deviation",
    "Rule",
    "checked_contract",
    "decision_points",
    "deviations_of",
    "evaluate",
    "rule",
    "selected",
]
