"""Classification metrics; scikit-learn computes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from pituning.errors import unknown_name

_METRICS: dict[str, Callable[[Sequence[int], Sequence[int]], float]] = {
    "accuracy": lambda truth, found: float(accuracy_score(truth, found)),
    "macro-F1": lambda truth, found: float(f1_score(truth, found, average="macro", zero_division=0.0)),
    "Matthews": lambda truth, found: float(matthews_corrcoef(truth, found)),
}


def classification_metric(name: str, truth: Sequence[int], found: Sequence[int]) -> float:
    """Value of a metric by name, given label indices.

    >>> classification_metric("accuracy", [0, 1, 1], [0, 1, 0])  # doctest: +ELLIPSIS
    0.666...

    Raises:
        UnknownNameError: for another name.
    """
    if name not in _METRICS:
        raise unknown_name("metric", name, _METRICS)
    return _METRICS[name](truth, found)
