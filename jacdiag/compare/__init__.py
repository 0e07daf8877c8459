"""Two models beside each other: matched by role and depth, whatever their parts are called."""

from jacdiag.compare.match import Comparison, Pair, compare

__all__ = ["Comparison", "Pair", "compare"]
