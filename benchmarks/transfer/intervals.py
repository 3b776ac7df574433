"""Paired differences and their interval: a bootstrap over targets, and over seeds within each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TIMES = 10_000

Values = Mapping[str, Mapping[int, float]]
"""target → seed → value."""


@dataclass(frozen=True)
class Difference:
    """Mean over targets of the mean over seeds, with its 95 % interval.

    Attributes:
        by_target: the mean over the seeds of each target.
        pairs: how many (target, seed) there were.
    """

    mean: float
    low: float
    high: float
    by_target: Mapping[str, float]
    pairs: int

    @property
    def worst(self) -> str:
        """The target with the lowest mean."""
        return min(self.by_target, key=lambda t: (self.by_target[t], t))

    @property
    def won(self) -> float:
        """Share of targets whose mean is above zero; one of exactly zero counts half."""
        return float(np.mean([0.5 * (1 + np.sign(value)) for value in self.by_target.values()]))


def resampled_means(values: Sequence[Sequence[float]], times: int = TIMES, seed: int = 0) -> NDArray[np.float64]:
    """Means under the hierarchical bootstrap, shape ``[times]``.

    Each time as many targets as there are, are drawn with replacement; within each drawn target as many seeds as it has, anew
    for every time it is drawn. A mean is that over the drawn targets of their means over the drawn seeds.

    Args:
        values: one row for each target, one number for each of its seeds.
    """
    rng = np.random.default_rng(seed)
    counts = np.array([len(row) for row in values])
    table = np.zeros((len(values), counts.max()))
    for index, row in enumerate(values):
        table[index, : len(row)] = row
    targets = rng.integers(len(values), size=(times, len(values)))
    drawn = counts[targets][..., None]  # [times, targets, 1]
    seeds = (rng.random((times, len(values), table.shape[1])) * drawn).astype(int)
    taken = table[targets[..., None], seeds] * (np.arange(table.shape[1]) < drawn)
    means: NDArray[np.float64] = (taken.sum(2) / drawn[..., 0]).mean(1)
    return means


def paired_difference(left: Values, right: Values, targets: Sequence[str]) -> Difference | None:
    """left − right over the (target, seed) that both have; ``None`` where there is none."""
    pairs = {
        t: [left[t][s] - right[t][s] for s in sorted(left[t].keys() & right[t].keys())]
        for t in targets
        if t in left and t in right
    }
    pairs = {t: found for t, found in pairs.items() if found}
    if not pairs:
        return None
    # without the last bits, in which equal values may differ
    by_target = {t: round(float(np.mean(found)), 9) for t, found in pairs.items()}
    low, high = np.quantile(resampled_means(list(pairs.values())), [0.025, 0.975])
    return Difference(
        float(np.mean(list(by_target.values()))), float(low), float(high), by_target, sum(map(len, pairs.values()))
    )
