"""Metrics by name."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pituning.errors import RefusedError, UnknownNameError
from pituning.metrics.registry import all_metric_names, metric_named, metric_names


def test_every_metric_says_what_it_compares() -> None:
    assert {kind: metric_names(kind) for kind in ("choice", "box", "text", "references", "soft")} == {  # type: ignore[arg-type]
        "choice": ["accuracy", "F1", "macro-F1", "Matthews"],
        "box": ["acc@0.5"],
        "text": ["exact-match"],
        "references": ["BLEU-4", "CIDEr-D", "METEOR", "SPICE", "objects-named", "ROUGE-1", "ROUGE-2", "ROUGE-L"],
        "soft": ["vqa-accuracy"],
    }
    assert all_metric_names() == sorted(
        [
            *("accuracy", "F1", "macro-F1", "Matthews", "acc@0.5", "exact-match", "vqa-accuracy"),
            *("BLEU-4", "CIDEr-D", "METEOR", "SPICE", "objects-named", "ROUGE-1", "ROUGE-2", "ROUGE-L"),
        ]
    )
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


def test_classification_metrics_by_hand() -> None:
    """Right 1 1 1 0 0 0 0 1, found 1 0 1 0 1 0 0 0: 2 true positives, 1 false one, 2 missed, 3 true negatives."""
    truth, found = [1, 1, 1, 0, 0, 0, 0, 1], [1, 0, 1, 0, 1, 0, 0, 0]
    assert metric_named("accuracy").compute(truth, found) == 5 / 8
    assert metric_named("F1").compute(truth, found) == pytest.approx(2 * 2 / (2 * 2 + 1 + 2))
    expected = (2 * 3 - 1 * 2) / (3 * 4 * 4 * 5) ** 0.5
    assert metric_named("Matthews").compute(truth, found) == pytest.approx(expected)


def test_classification_metrics_at_their_edges() -> None:
    for label in (0, 1):
        assert metric_named("Matthews").compute([label] * 3, [label] * 3) == 0
        assert metric_named("F1").compute([label] * 3, [label] * 3) == label
    with pytest.raises(RefusedError, match="there is an answer 2; use macro-F1"):
        metric_named("F1").compute([0, 1, 2], [0, 1, 1])


def test_optional_packages_are_imported_only_when_a_metric_needs_them() -> None:
    lines = "import sys, pituning.metrics.registry; print([m for m in sys.modules if m in ('pycocoevalcap', 'rouge_score')])"
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "[]\n"
