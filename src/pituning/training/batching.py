"""Batches without much padding: the examples of a step in parts of similar length."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pituning.example import Example

OVERHEAD = 200
"""What one more pass costs, in characters of text: small matrices are slower by the row, and layers have fixed costs."""


def text_length(example: Example) -> int:
    """Characters of all texts of an example: what it costs, up to a factor."""
    return sum(len(text) for text in example.texts)


def parts_of_similar_length(lengths: Sequence[int], overhead: float = OVERHEAD) -> list[list[int]]:
    """The partition that costs least, where a part costs its size times its greatest length, plus an overhead.

    On a CPU a row of padding costs as much as any other, and short texts of one batch differ by factors: three to
    seven rows in ten are padding.

    Args:
        lengths: of each example.
        overhead: of a part, in the unit of the lengths.

    Returns:
        positions, the shorter examples first; a best partition consists of runs in the order of length, so that the search
        over those, by dynamic programming, is exact.
    """
    order = sorted(range(len(lengths)), key=lambda n: lengths[n])
    costs, begins = [0.0], [0]  # of the first n in that order: the least cost, and where its last part begins
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        costs.append(math.inf)
        begins.append(0)
        for begin in range(end):
            cost = costs[begin] + (end - begin) * longest + overhead
            if cost < costs[end]:
                costs[end], begins[end] = cost, begin
    parts: list[list[int]] = []
    end = len(order)
    while end:
        parts.append(order[begins[end] : end])
        end = begins[end]
    return parts[::-1]
