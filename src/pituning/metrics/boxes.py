"""Metrics of grounding: how well found boxes cover the right ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from pituning.example import Box

THRESHOLD = 0.5


def intersection_over_union(a: Box, b: Box) -> float:
    """Area that two boxes share over the area that they cover together; 0 where either is turned inside out or empty.

    >>> intersection_over_union((0, 0, 10, 10), (0, 0, 10, 5))
    0.5
    """
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def box_accuracy(truth: Sequence[Box], found: Sequence[Box | None]) -> float:
    """Share of boxes with an intersection over union of at least 0.5 (Acc@0.5 of RefCOCO); ``None``, no box, is a miss.

    The reference code adds 1e-6 square pixels to the union; here 0.5 is a hit whatever the size of the boxes.
    """
    hits = [f is not None and intersection_over_union(f, t) >= THRESHOLD for t, f in zip(truth, found, strict=True)]
    return sum(hits) / len(hits)


METRICS: Mapping[str, Callable[[Sequence[Box], Sequence[Box | None]], float]] = {"acc@0.5": box_accuracy}
