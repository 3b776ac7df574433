"""ROUGE against counting by hand and a slow longest common subsequence."""

from __future__ import annotations

import sys
from functools import cache

import pytest

from pituning.errors import DataError, MissingDependencyError
from pituning.metrics.summaries import METRICS

TRUTH = [["police kill the gunman", "the gunman was killed by police"], ["stocks rise in asia"]]
FOUND = ["gunman killed by the police", "asian stocks fall"]
STEMS = {"police": "polic", "killed": "kill", "stocks": "stock"}  # Porter's; the other words are their own


def f1(shared: int, mine: int, theirs: int) -> float:
    return 2 * shared / (mine + theirs) if shared else 0.0


def longest(a: list[str], b: list[str]) -> int:
    @cache
    def of(i: int, j: int) -> int:
        if i == len(a) or j == len(b):
            return 0
        return 1 + of(i + 1, j + 1) if a[i] == b[j] else max(of(i + 1, j), of(i, j + 1))

    return of(0, 0)


def test_rouge_1_and_2_by_hand() -> None:
    """By stems, killed is kill. First: 4 words of 5 and 4, or 5 of 5 and 6; second: stocks of 3 and 4. Pairs: kill by."""
    assert METRICS["ROUGE-1"](TRUTH, FOUND) == pytest.approx((max(f1(4, 5, 4), f1(5, 5, 6)) + f1(1, 3, 4)) / 2)
    assert METRICS["ROUGE-2"](TRUTH, FOUND) == pytest.approx((max(f1(0, 4, 3), f1(1, 4, 5)) + 0) / 2)


def test_rouge_l_is_the_longest_common_subsequence() -> None:
    expected = []
    for references, answer in zip(TRUTH, FOUND, strict=True):
        mine, *others = ([STEMS.get(w, w) for w in text.split()] for text in (answer, *references))
        expected.append(max(f1(longest(mine, r), len(mine), len(r)) for r in others))
    assert METRICS["ROUGE-L"](TRUTH, FOUND) == pytest.approx(sum(expected) / 2)


def test_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    assert METRICS["ROUGE-L"]([["a b"]], [""]) == 0
    assert METRICS["ROUGE-1"]([["Le café"]], ["le cafe"]) == pytest.approx(0.5), "é divides: le, caf against le, cafe"
    with pytest.raises(DataError, match="example 1 has no reference summary"):
        METRICS["ROUGE-2"]([["a b"], []], ["a b", "c"])
    with pytest.raises(DataError, match="at least one example"):
        METRICS["ROUGE-L"]([], [])
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'pituning\[metrics\]'"):
        METRICS["ROUGE-1"](TRUTH, FOUND)
