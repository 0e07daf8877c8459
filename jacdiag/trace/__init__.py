"""What happens in one forward: record it, find the residual sub-layers, run parts of it again."""

from jacdiag.trace.sublayer import Sublayer
from jacdiag.trace.tracer import Sites, sites

__all__ = ["Sites", "Sublayer", "sites"]
