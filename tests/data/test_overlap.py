"""Near-duplicates between data sets."""

from __future__ import annotations

import random

import pytest

from pituning.data.overlap import find_overlaps
from pituning.example import Example

LONG = "the quick brown fox jumps over the lazy dog near the river bank"


def items(*texts: str | tuple[str, ...], name: str = "l") -> list[Example]:
    return [Example(f"{name}/{i}", (t,) if isinstance(t, str) else t, "", "") for i, t in enumerate(texts)]


def pairs(left: list[Example], right: list[Example], threshold: float = 0.7) -> list[tuple[str, str, float]]:
    return [(o.left, o.right, o.similarity) for o in find_overlaps(left, right, threshold)]


@pytest.mark.parametrize(
    "copy", [LONG, LONG.upper() + "!", f"  {LONG.replace(' ', '  ')} .", LONG + " and then it went on for a long while"]
)
def test_the_same_letters_or_the_same_beginning(copy: str) -> None:
    assert pairs(items("something else", LONG), items(copy, "quite different", name="r")) == [("l/1", "r/0", 1.0)]


def jaccard(left: str, right: str) -> float:
    a, b = ({tuple(t.split()[i : i + 4]) for i in range(len(t.split()) - 3)} for t in (left, right))
    return len(a & b) / len(a | b)


def test_shingles_find_what_starts_differently() -> None:
    copy = "suddenly " + LONG
    expected = jaccard(LONG, copy)
    assert 0.7 < expected < 1
    assert pairs(items(LONG), items(copy, name="r")) == [("l/0", "r/0", pytest.approx(expected))]
    assert pairs(items(LONG), items(copy, name="r"), threshold=expected + 0.01) == []


def test_agrees_with_comparing_all_pairs() -> None:
    rng = random.Random(0)
    words = ["a", "b", "c", "d"]
    left, right = ([" ".join(rng.choices(words, k=rng.randint(6, 9))) for _ in range(40)] for _ in range(2))
    left = [f"{i} {t}" for i, t in enumerate(left)]  # so that no two texts begin alike
    right = [f"x{i} {t}" for i, t in enumerate(right)]
    expected = {
        (f"l/{i}", f"r/{j}"): pytest.approx(jaccard(a, b))
        for i, a in enumerate(left) for j, b in enumerate(right) if jaccard(a, b) >= 0.1
    }  # fmt: skip
    found = pairs(items(*left), items(*right, name="r"), threshold=0.1)
    assert len(expected) > 5
    assert {(a, b): s for a, b, s in found} == expected
    assert [s for _, _, s in found] == sorted((s for _, _, s in found), reverse=True)


def test_each_field_of_a_pair_is_compared_and_the_nearest_counts() -> None:
    left = items(("suddenly " + LONG, LONG), ("no", "nothing"))
    assert pairs(left, items(("entirely new", LONG), name="r")) == [("l/0", "r/0", 1.0)]


def test_short_texts_need_the_same_letters() -> None:
    assert pairs(items("good film"), items("good film!", "good films", name="r")) == [("l/0", "r/0", 1.0)]


def test_texts_without_letters_are_no_duplicates_of_each_other() -> None:
    assert pairs(items("?!", "..."), items(":-)", "", name="r")) == []


def test_reports_the_texts() -> None:
    (found,) = find_overlaps(items("Good film"), items("good FILM", name="r"))
    assert (found.left_text, found.right_text) == ("Good film", "good FILM")
    assert find_overlaps([], items("x")) == []
