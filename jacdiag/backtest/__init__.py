"""Verdicts against outcomes: recorded runs, labelled, and how well figures and live rules foretold their ends."""

from jacdiag.backtest.analysis import backtest
from jacdiag.backtest.labels import label
from jacdiag.backtest.run import Run
from jacdiag.backtest.runs import read_runs

__all__ = ["Run", "backtest", "label", "read_runs"]
