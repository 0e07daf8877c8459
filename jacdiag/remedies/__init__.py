"""Try the recipes of the paper and of the init contract on copies of the model."""

from jacdiag.remedies.candidates import Remedy, remedies_for
from jacdiag.remedies.patches import DIALECTS
from jacdiag.remedies.trial import Bench, most_trials, sufficient, try_remedies
from jacdiag.rules.remedy_targets import aims

__all__ = [
    "DIALECTS",
    "Bench",
    "Remedy",
    "aims",
    "most_trials",
    "remedies_for",
    "sufficient",
    "try_remedies",
]
