"""Metrics by name, with the kind of answer that each of them compares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pituning.errors import MissingDependencyError, unknown_name
from pituning.metrics import boxes, captions, classification, scenes, summaries, text, vqa

Answers = Literal["choice", "box", "text", "references", "soft"]
FITTING: Mapping[Answers, tuple[Answers, ...]] = {
    "choice": ("choice", "soft"),
    "text": ("text", "references", "soft"),
    "box": ("box",),
}
"""Which metrics compare the answers that a task gives."""


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        answers: what it compares: positions among closed choices; boxes (or ``None``); texts; texts with several
            *references* each; or texts with the confidence of every answer (*soft*).
        compute: from the right answers and those found, in the same order, to a value; larger = better.
        require: raises :class:`pituning.errors.MissingDependencyError` where a package or program that it needs is not there.
    """

    name: str
    answers: Answers
    compute: Callable[[Sequence[Any], Sequence[Any]], float]
    require: Callable[[], None] = lambda: None


_METRICS = {
    **{name: Metric(name, "choice", compute) for name, compute in classification.METRICS.items()},
    **{name: Metric(name, "box", compute) for name, compute in boxes.METRICS.items()},
    **{name: Metric(name, "text", compute) for name, compute in text.METRICS.items()},
    **{name: Metric(name, "references", compute, captions.NEEDS[name]) for name, compute in captions.METRICS.items()},
    **{name: Metric(name, "references", compute) for name, compute in scenes.METRICS.items()},
    **{n: Metric(n, "references", compute, summaries.require_package) for n, compute in summaries.METRICS.items()},
    **{name: Metric(name, "soft", compute) for name, compute in vqa.METRICS.items()},
}


def metric_named(name: str) -> Metric:
    """A metric by its name.

    >>> metric_named("accuracy").compute([0, 1, 1], [0, 1, 0])  # doctest: +ELLIPSIS
    0.666...

    Raises:
        UnknownNameError: for another name.
    """
    if name not in _METRICS:
        raise unknown_name("metric", name, _METRICS)
    return _METRICS[name]


def answers_of(metric: str, choices: Sequence[str]) -> Answers:
    """What a task's examples are answered by, from its metric and its closed choices: a box, a choice or a text.

    >>> answers_of("accuracy", ("yes", "no"))
    'choice'
    """
    if metric_named(metric).answers == "box":
        return "box"
    return "choice" if choices else "text"


def lacking(names: Iterable[str]) -> list[str]:
    """What metrics of these names need that is not there, as messages; each name counts once."""
    found = []
    for name in dict.fromkeys(names):
        try:
            metric_named(name).require()
        except MissingDependencyError as error:
            found.append(str(error))
    return found


def metric_names(answers: Answers) -> list[str]:
    """Names of the metrics that compare answers of one kind."""
    return [name for name, metric in _METRICS.items() if metric.answers == answers]


def all_metric_names() -> list[str]:
    """Names of all metrics."""
    return sorted(_METRICS)
