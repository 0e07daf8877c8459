"""jacdiag: Jacobian and gradient-norm diagnostics for transformer pre-training.

>>> import jacdiag                                    # imports neither torch nor numpy
>>> report = jacdiag.audit("checkpoint.pt")           # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jacdiag._version import __version__

_HOMES = {
    "audit": "jacdiag.pipeline.audit",
    "declare": "jacdiag.trace",
    "sites": "jacdiag.trace",
    "skipping": "jacdiag.monitor",
    "spectral_norm": "jacdiag.spectra",
    # not jacdiag.watch: a package of that name would stand in the function's place
    "watch": "jacdiag.monitor",
    "Report": "jacdiag.records",
    "JacdiagError": "jacdiag.errors",
}
__all__ = [
    "JacdiagError",
    "Report",
    "__version__",
    "audit",
    "declare",
    "sites",
    "skipping",
    "spectral_norm",
    "watch",
]

if TYPE_CHECKING:
    from jacdiag.errors import JacdiagError
    from jacdiag.monitor import skipping, watch
    from jacdiag.pipeline.audit import audit
    from jacdiag.records import Report
    from jacdiag.spectra import spectral_norm
    from jacdiag.trace import declare, sites


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use (PEP 562), so that `import jacdiag` stays instant."""
    if name not in _HOMES:
        raise AttributeError(f"module 'jacdiag' has no attribute '{name}'")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
