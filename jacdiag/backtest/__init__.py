"""Compare figures and live rules with how recorded runs ended."""

from jacdiag.backtest.analysis import backtest
from jacdiag.backtest.outcomes import label
from jacdiag.backtest.recorded_run import Run
from jacdiag.backtest.run_files import read_runs

__all__ = ["Run", "backtest", "label", "read_runs"]
