"""Paired differences and their interval: a bootstrap over targets, and over seeds within each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

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

    @property
    def students(self) -> tuple[float, float]:
        """The 95 % interval of Student's t over the targets' means, to which single draws are nothing; NaN for one target."""
        return _student(list(self.by_target.values()), 0.975)


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
    """left − right over the (target, seed) that both have; ``None`` where there is none.

    Of one target the interval is Student's t over its seeds: a bootstrap of three to five numbers is much too narrow. Of a
    single pair there is none (NaN).
    """
    pairs = _pairs(left, right, targets)
    if not pairs:
        return None
    # without the last bits, in which equal values may differ
    by_target = {t: round(float(np.mean(found)), 9) for t, found in pairs.items()}
    mean = float(np.mean(list(by_target.values())))
    if len(pairs) == 1:
        low, high = _student(next(iter(pairs.values())), 0.975)
    else:
        low, high = map(float, np.quantile(resampled_means(list(pairs.values())), [0.025, 0.975]))
    return Difference(mean, low, high, by_target, sum(map(len, pairs.values())))


def upper_bounds(left: Values, right: Values, targets: Sequence[str]) -> dict[str, float]:
    """Target → what the mean over its seeds of left − right does not exceed, one-sided at 95 % by Student's t.

    Targets with fewer than two pairs have no bound.
    """
    pairs = _pairs(left, right, targets)
    return {t: _student(found, 0.95)[1] for t, found in pairs.items() if len(found) > 1}


def _student(values: Sequence[float], level: float) -> tuple[float, float]:
    """Mean ± the quantile at the level of Student's t, times the standard error; NaN for a single value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return math.nan, math.nan
    half = float(student.ppf(level, len(values) - 1)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean - half, mean + half


def _pairs(left: Values, right: Values, targets: Sequence[str]) -> dict[str, list[float]]:
    """Target → left − right by seed, of the targets that have a pair."""
    pairs = {
        t: [left[t][s] - right[t][s] for s in sorted(left[t].keys() & right[t].keys())]
        for t in targets
        if t in left and t in right
    }
    return {t: found for t, found in pairs.items() if found}
