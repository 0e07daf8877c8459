"""Remedies: the recipes of the paper and of the init contract, tried on a copy of the model and measured again."""

from jacdiag.remedies.patches import DIALECTS
from jacdiag.remedies.recipes import Remedy, aims, remedies_for
from jacdiag.remedies.trial import Bench, sufficient, tried

__all__ = ["DIALECTS", "Bench", "Remedy", "aims", "remedies_for", "sufficient", "tried"]
