"""VQA accuracy, counted by hand."""

from __future__ import annotations

import pytest

from pituning.errors import DataError
from pituning.metrics.vqa import normalise_answer, soft_answers, vqa_accuracy


@pytest.mark.parametrize(("count", "accuracy"), [(1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0), (10, 1.0)])
def test_an_answer_of_so_many_of_ten(count: int, accuracy: float) -> None:
    """With 3 of 10: seven subsets of nine hold all three (1), three hold two of them (2/3): (7 + 2) / 10 = 0.9."""
    human = ["red"] * count + [f"other {n}" for n in range(10 - count)]
    assert soft_answers(human)["red"] == pytest.approx(accuracy, abs=1e-12)


def test_against_leaving_one_out_by_hand() -> None:
    human = ["a cat", "cat", "dog", "Dog.", "the dog", "bird", "two", "2", "cat", "fish"]
    normalised = ["cat", "cat", "dog", "dog", "dog", "bird", "2", "2", "cat", "fish"]
    expected = {}
    for answer in set(normalised):
        subsets = [[a for j, a in enumerate(normalised) if j != i] for i in range(10)]
        expected[answer] = sum(min(1.0, s.count(answer) / 3) for s in subsets) / 10
    assert soft_answers(human) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Two dogs.", "2 dogs"),
        ("dont", "don't"),
        ("wouldve", "would've"),
        ("1,000", "1000"),
        ("yes, please", "yes please"),
        ("black/white", "black white"),
        ("3.5", "3.5"),
        ("U.S.", "us"),
        ("about 3.", "about 3"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("twas", "'twas"),
        ("oclock", "o'clock"),
        ("wont", "won't"),
        ("id", "id"),
        ("shed", "shed"),
        ("10:30", "10:30"),
        ("t-shirt", "t shirt"),
        ("t- shirt", "t shirt"),
        ("$5,000?", "$5000"),
        ("café a Ñ", "café ñ"),
        ("an  apple\n", "apple"),
        ("none", "0"),
        ("what?", "what"),
        ("l'eau", "l'eau"),
        ("", ""),
    ],
)
def test_answers_as_the_evaluation_compares_them(text: str, expected: str) -> None:
    assert normalise_answer(text) == expected


def test_the_metric() -> None:
    truth = [{"red": 1.0, "pink": 0.3}, {"two": 0.6}, {"no": 1.0}]
    assert vqa_accuracy(truth, [" red ", "two", "yes"]) == pytest.approx((1.0 + 0.6 + 0.0) / 3)
    assert vqa_accuracy([{"2": 0.9}, {"red": 0.3}], ["Two.", "the red"]) == pytest.approx(0.6)
    with pytest.raises(DataError, match="at least one example"):
        vqa_accuracy([], [])
    with pytest.raises(DataError, match="several annotators"):
        soft_answers(["red"])
