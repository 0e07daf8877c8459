"""Record one forward, find its residual sub-layers, and run pieces of it again."""

from jacdiag.trace.discovery.declarations import Declaration, declare
from jacdiag.trace.site_list import Sites
from jacdiag.trace.sublayer import Sublayer
from jacdiag.trace.tracer import sites

__all__ = ["Declaration", "Sites", "Sublayer", "declare", "sites"]
