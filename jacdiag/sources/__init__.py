"""Where a model comes from, and what it is probed with."""

from jacdiag.sources.probe import Probe, build_probe
from jacdiag.sources.source import Source, load

__all__ = ["Probe", "Source", "build_probe", "load"]
