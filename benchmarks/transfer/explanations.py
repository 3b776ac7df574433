"""What else than chosen experts and their blend the gain of π may come from, each beside an arm that has just that."""

from __future__ import annotations

EXPLANATIONS = (
    ("more steps on the target", "own-extra"),
    ("a better scale of the own expert", "own-rescaled"),
    ("more weights to tune", "full"),
    ("experts as they are, untuned", "soup"),
    ("weights for frozen experts", "pi-weights"),
    ("a start away from zero, in whatever direction", "pi-noise"),
    ("any experts, even the least similar", "pi-dissimilar"),
    ("any experts", "pi-random"),
    ("a single expert, tuned", "nearest-tuned"),
    ("the mean of a few, tuned", "soup-tuned"),
    ("the sources' data", "multitask-tuned"),
    ("the blend without reaching out further than a mean", "pi-mean"),
    ("the blend with equal weights", "pi-uniform"),
)
"""What would explain the gain, and the arm that would then do as well."""
