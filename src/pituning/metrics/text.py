"""Metrics of free-form answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence


def exact_match(truth: Sequence[str], found: Sequence[str]) -> float:
    """Share of answers that are the right one letter by letter, but for spaces around them.

    >>> exact_match(["a dog", "two"], [" a dog", "2"])
    0.5
    """
    return sum(f.strip() == t.strip() for t, f in zip(truth, found, strict=True)) / len(truth)


METRICS: Mapping[str, Callable[[Sequence[str], Sequence[str]], float]] = {"exact-match": exact_match}
