"""Figures of a report and of a run, drawn with matplotlib."""
