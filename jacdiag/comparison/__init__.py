"""Two models compared: matched by role and depth, whatever the names of their modules are."""

from jacdiag.comparison.earlier_report import (
    check_has_norms,
    check_same_architecture,
    check_same_probe,
    compare_with_earlier,
    read_report,
)
from jacdiag.comparison.match import Comparison, Pair, compare

__all__ = [
    "Comparison",
    "Pair",
    "check_has_norms",
    "check_same_architecture",
    "check_same_probe",
    "compare",
    "compare_with_earlier",
    "read_report",
]
