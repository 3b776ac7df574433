"""Classification metrics; scikit-learn computes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

METRICS: Mapping[str, Callable[[Sequence[int], Sequence[int]], float]] = {
    "accuracy": lambda truth, found: float(accuracy_score(truth, found)),
    "F1": lambda truth, found: float(f1_score(truth, found, pos_label=1, zero_division=0.0)),  # of the second answer
    "macro-F1": lambda truth, found: float(f1_score(truth, found, average="macro", zero_division=0.0)),
    "Matthews": lambda truth, found: float(matthews_corrcoef(truth, found)),
}
