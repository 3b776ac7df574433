"""Classification metrics; scikit-learn computes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from pituning.errors import RefusedError


def binary_f1(truth: Sequence[int], found: Sequence[int]) -> float:
    """Harmonic mean of precision and recall of the second of two choices, 0 to 1; 0 where it is neither right nor found.

    It is the F1 of GLUE for MRPC and QQP, whose choices are ``("no", "yes")``.

    >>> binary_f1([0, 1, 1, 0], [0, 1, 0, 0])  # doctest: +ELLIPSIS
    0.666...

    Raises:
        RefusedError: if there is a third choice.
    """
    if (position := max(*truth, *found, 1)) > 1:
        raise RefusedError(f"F1 is of the second of two choices, but there is an answer {position}; use macro-F1")
    return float(f1_score(truth, found, pos_label=1, zero_division=0.0))


def matthews(truth: Sequence[int], found: Sequence[int]) -> float:
    """Matthews' correlation of the right choices and those found, −1 to 1; 0 where one of them never varies."""
    if len({*truth, *found}) < 2:  # scikit-learn gives 0 as well, with a warning
        return 0.0
    return float(matthews_corrcoef(truth, found))


METRICS: Mapping[str, Callable[[Sequence[int], Sequence[int]], float]] = {
    "accuracy": lambda truth, found: float(accuracy_score(truth, found)),
    "F1": binary_f1,
    "macro-F1": lambda truth, found: float(f1_score(truth, found, average="macro", zero_division=0.0)),
    "Matthews": matthews,
}
