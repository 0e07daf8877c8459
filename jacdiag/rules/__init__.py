"""The rules: what they compare, why, and what to do about it. They read reports only."""

from jacdiag.rules.engine import EVERY, RULES, decision_points, evaluate, rule, selected
from jacdiag.rules.init.init_contract import deviations_of
from jacdiag.rules.init.scheme_deviations import Deviation
from jacdiag.rules.init.schemes import checked_contract
from jacdiag.rules.rule import Rule

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
