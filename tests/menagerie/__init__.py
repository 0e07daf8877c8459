"""Small models with known sub-layers and known Jacobians: the outside truth of the tests.

`CORE` holds every placement, parallel branches and the usual kinds of sub-layers; `STYLES` holds
the ways in which people write a residual, and the traps that are none.
"""

from menagerie.additions import ADDITIONS
from menagerie.core import CORE
from menagerie.inputs import INPUTS
from menagerie.layouts import LAYOUTS
from menagerie.specimen import Context, Norm, Specimen, SublayerTruth, residual, stream
from menagerie.traps import TRAPS
from menagerie.wide import WIDE

STYLES = [*ADDITIONS, *LAYOUTS, *INPUTS, *TRAPS, *WIDE]
ALL = [*CORE, *STYLES]

__all__ = [
    "ALL",
    "CORE",
    "STYLES",
    "Context",
    "Norm",
    "Specimen",
    "SublayerTruth",
    "residual",
    "stream",
]
