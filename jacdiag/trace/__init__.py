"""What happens in one forward: record it, find the residual sub-layers, run parts of it again."""

from jacdiag.trace.declared import Declaration, declare
from jacdiag.trace.found import Sites
from jacdiag.trace.sublayer import Sublayer
from jacdiag.trace.tracer import sites

__all__ = ["Declaration", "Sites", "Sublayer", "declare", "sites"]
