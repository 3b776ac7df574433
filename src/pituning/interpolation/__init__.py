"""Mixtures of experts in parameter and product space, and their fold into one expert."""

from pituning.interpolation.build import GRANULARITIES, build_mixture, group_names
from pituning.interpolation.coefficients import Coefficients
from pituning.interpolation.collapse import Collapsed, collapse
from pituning.interpolation.mixture import TRAIN_MODES, Mixture, ParameterMixture, ProductMixture

__all__ = [
    "GRANULARITIES",
    "TRAIN_MODES",
    "Coefficients",
    "Collapsed",
    "Mixture",
    "ParameterMixture",
    "ProductMixture",
    "build_mixture",
    "collapse",
    "group_names",
]
