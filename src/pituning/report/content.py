"""A results mapping read once into typed values, so that the page and the pictures show the same numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pituning.errors import PituningError

Numbers = NDArray[np.float64]
_PERCENT = ("accuracy", "macro-F1", "F1", "f1", "exact-match", "acc@0.5", "vqa-accuracy", "objects-named")


@dataclass(frozen=True)
class Metric:
    """How values of a metric are written: accuracy-like ones as percent and points, others as they are."""

    name: str

    @property
    def scale(self) -> float:
        return 100.0 if self.name in _PERCENT else 1.0

    @property
    def unit(self) -> str:
        return "%" if self.name in _PERCENT else ""

    @property
    def difference_unit(self) -> str:
        return "points" if self.name in _PERCENT else self.name

    def plain(self, value: float) -> str:
        """
        >>> Metric("accuracy").plain(0.7712), Metric("Matthews").plain(0.7712)
        ('77.1', '0.771')
        """
        return f"{value * self.scale:.{self._decimals}f}"

    def signed(self, value: float) -> str:
        """
        >>> Metric("accuracy").signed(-0.0512), Metric("accuracy").signed(0.00001)
        ('−5.1', '0.0')
        """
        text = f"{value * self.scale:+.{self._decimals}f}"
        return text.lstrip("+-") if float(text) == 0 else text.replace("-", "−")

    @property
    def _decimals(self) -> int:
        return 1 if self.name in _PERCENT else 3


@dataclass(frozen=True)
class Arm:
    """One way to answer the target task, with its value per seed."""

    name: str
    label: str
    description: str
    values: tuple[float, ...]
    log_loss: float | None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over seeds; None with one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Difference:
    """A paired difference between two arms; ``interval`` is None where one seed allows none."""

    name: str
    mean: float
    interval: tuple[float, float] | None
    values: tuple[float, ...]


@dataclass(frozen=True)
class RankedExpert:
    """An expert of the pool: its similarity of every kind and, where it was measured, what it gained."""

    name: str
    values: Mapping[str, float | None]
    gain: float | None


@dataclass(frozen=True)
class Ranking:
    """Experts, the most similar by ``default`` first."""

    kinds: tuple[str, ...]
    default: str
    experts: tuple[RankedExpert, ...]

    def agreement(self, kind: str) -> float | None:
        """Spearman correlation of a similarity with the measured gain; None for under three experts or no spread."""
        pairs = [(e.values.get(kind), e.gain) for e in self.experts]
        measured = [(v, g) for v, g in pairs if v is not None and g is not None]
        if len(measured) < 3 or any(len(set(column)) < 2 for column in zip(*measured, strict=True)):
            return None
        from scipy.stats import spearmanr

        return float(spearmanr(*zip(*measured, strict=True)).statistic)


@dataclass(frozen=True)
class Graph:
    """Tasks and the similarity of every pair, ``[task, task]``."""

    kind: str
    names: tuple[str, ...]
    matrix: Numbers
    target: str


@dataclass(frozen=True)
class Weights:
    """Weight of every expert in every group of the interpolation, ``[group, expert]``."""

    experts: tuple[str, ...]
    groups: tuple[str, ...]
    values: Numbers
    note: str

    @property
    def total(self) -> float | None:
        """What the weights sum to, where that is the same in every group."""
        sums = self.values.sum(axis=1)
        return float(sums[0]) if np.allclose(sums, sums[0], atol=1e-3) else None


@dataclass(frozen=True)
class Content:
    """Everything that the charts need; a part that the results do not hold is None or empty."""

    title: str
    target: str
    metric: Metric
    arms: tuple[Arm, ...]
    differences: tuple[Difference, ...]
    ceiling: tuple[str, float] | None
    ranking: Ranking | None
    graph: Graph | None
    weights: Weights | None

    @property
    def seeds(self) -> int:
        return max(len(arm.values) for arm in self.arms)

    @property
    def pi(self) -> Arm | None:
        return next((arm for arm in self.arms if arm.name == "pi"), None)

    @property
    def best_own(self) -> Arm | None:
        """The best arm that used no expert but the target's own (its name starts with "own")."""
        return max((arm for arm in self.arms if arm.name.startswith("own")), key=lambda arm: arm.mean, default=None)


def read_content(results: Mapping[str, Any]) -> Content:
    """Read a results mapping.

    Raises:
        PituningError: where title, target or arms are missing, or a part has a number that is not finite or a table
            whose shape does not fit its names; the message names the part.
    """
    missing = [key for key in ("title", "target", "arms") if not results.get(key)]
    if missing:
        raise PituningError(
            f"the results have no {', '.join(missing)}: a report needs at least title, target and arms."
        )
    ceiling = results.get("ceiling")
    return Content(
        title=str(results["title"]),
        target=str(results["target"]),
        metric=Metric(str(results.get("metric", "accuracy"))),
        arms=tuple(_arm(arm) for arm in results["arms"]),
        differences=tuple(_difference(d) for d in results.get("differences") or ()),
        ceiling=(str(ceiling["label"]), _finite([ceiling["value"]], "ceiling")[0]) if ceiling else None,
        ranking=_ranking(results.get("ranking")),
        graph=_graph(results.get("graph"), str(results["target"])),
        weights=_weights(results.get("weights")),
    )


def finite_or_none(value: object) -> float | None:
    """The number, or None for an absent, infinite or undefined one."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _arm(arm: Mapping[str, Any]) -> Arm:
    values = _finite(arm["values"], f"arm {arm['name']!r}")
    if not values:
        raise PituningError(f"arm {arm['name']!r} has no values: give one per seed, or leave the arm out.")
    losses = arm.get("log_loss") or ()
    return Arm(
        name=str(arm["name"]),
        label=str(arm.get("label") or arm["name"]),
        description=str(arm.get("description") or ""),
        values=values,
        log_loss=statistics.fmean(losses) if losses and None not in losses else None,
    )


def _difference(difference: Mapping[str, Any]) -> Difference:
    low, high = finite_or_none(difference.get("low")), finite_or_none(difference.get("high"))
    name = str(difference["name"])
    values = _finite(difference.get("values") or (), f"difference {name!r}")
    mean = _finite([difference["mean"]], f"difference {name!r}")[0]
    interval = None if low is None or high is None or len(values) == 1 else (low, high)
    return Difference(name, mean, interval, values)


def _ranking(ranking: Mapping[str, Any] | None) -> Ranking | None:
    if not ranking or not ranking.get("experts"):
        return None
    kinds = [str(kind) for kind in ranking["kinds"]]
    default = str(ranking.get("default") or kinds[0])
    experts = [
        RankedExpert(
            str(expert["name"]),
            {kind: finite_or_none(value) for kind, value in expert["values"].items()},
            finite_or_none(expert.get("gain")),
        )
        for expert in ranking["experts"]
    ]
    experts.sort(key=lambda expert: _descending(expert.values.get(default)))
    return Ranking((default, *(kind for kind in kinds if kind != default)), default, tuple(experts))


def _descending(value: float | None) -> float:
    return math.inf if value is None else -value


def _graph(graph: Mapping[str, Any] | None, target: str) -> Graph | None:
    if not graph or len(graph["names"]) < 2:
        return None
    names = tuple(str(name) for name in graph["names"])
    matrix = _matrix(graph["matrix"], (len(names), len(names)), "graph")
    return Graph(str(graph.get("kind", "similarity")), names, matrix, str(graph.get("target", target)))


def _weights(weights: Mapping[str, Any] | None) -> Weights | None:
    if not weights or not weights["groups"]:
        return None
    experts = tuple(str(name) for name in weights["experts"])
    groups = tuple(str(name) for name in weights["groups"])
    values = _matrix(weights["values"], (len(groups), len(experts)), "weights")
    if not np.isfinite(values).all():
        raise PituningError("weights holds a number that is not finite: the interpolation diverged.")
    return Weights(experts, groups, values, str(weights.get("note") or ""))


def _matrix(rows: Sequence[Sequence[float | None]], shape: tuple[int, int], where: str) -> Numbers:
    try:
        matrix = np.array([[math.nan if x is None else float(x) for x in row] for row in rows], dtype=np.float64)
    except ValueError as error:
        raise PituningError(f"{where}: expected a table of {shape[0]} × {shape[1]} numbers: {error}.") from error
    if matrix.shape != shape:
        raise PituningError(f"{where}: expected a table of {shape[0]} × {shape[1]} numbers, found {matrix.shape}.")
    return matrix


def _finite(values: Sequence[float], where: str) -> tuple[float, ...]:
    numbers = tuple(float(value) for value in values)
    wrong = [value for value in numbers if not math.isfinite(value)]
    if wrong:
        raise PituningError(f"{where} holds {wrong[0]}: a report shows measured, finite numbers only.")
    return numbers
