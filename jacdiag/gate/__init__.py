"""The gate: a freshly initialised model over several seeds, every rule decided, compared with a
baseline.
"""

from jacdiag.comparison.baseline_file import read_baseline, write_baseline
from jacdiag.gate.run import Outcome, gate

__all__ = ["Outcome", "gate", "read_baseline", "write_baseline"]
