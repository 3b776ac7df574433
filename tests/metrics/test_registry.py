"""Metrics by name."""

from __future__ import annotations

import pytest

from pituning.errors import UnknownNameError
from pituning.metrics.registry import metric_named, metric_names


def test_every_metric_says_what_it_compares() -> None:
    assert {kind: metric_names(kind) for kind in ("choice", "box", "text")} == {  # type: ignore[arg-type]
        "choice": ["accuracy", "macro-F1", "Matthews"],
        "box": ["acc@0.5"],
        "text": ["exact-match"],
    }
    answers = {"choice": [0, 1, 1, 0], "box": [(0, 0, 2, 2), (1, 1, 3, 4)], "text": ["a", "b c"]}
    for kind, right in answers.items():
        for name in metric_names(kind):  # type: ignore[arg-type]
            assert metric_named(name).answers == kind
            assert metric_named(name).compute(right, right) == 1


def test_unknown_names_come_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown metric 'acc@0.50': did you mean 'acc@0.5'"):
        metric_named("acc@0.50")


def test_exact_match_ignores_spaces_at_the_ends_alone() -> None:
    truth = ["a dog", "a dog", "a dog", "a dog"]
    assert metric_named("exact-match").compute(truth, [" a dog ", "a  dog", "A dog", "a dog."]) == 0.25
