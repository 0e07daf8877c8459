"""The gate: a freshly initialised model over several seeds, compared with a baseline."""

from jacdiag.comparison.baseline_file import read_baseline, write_baseline
from jacdiag.gate.run import Outcome, gate, run_gate

__all__ = ["Outcome", "gate", "read_baseline", "run_gate", "write_baseline"]
