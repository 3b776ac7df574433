"""Intersection over union against counting unit squares one by one, in exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pituning.example import Box
from pituning.metrics.boxes import box_accuracy, intersection_over_union

Corners = tuple[int, int, int, int]


def squares(box: Corners) -> set[tuple[int, int]]:
    """The unit squares inside a box with whole corners; none if it is empty or turned inside out."""
    x0, y0, x1, y1 = box
    return {(x, y) for x in range(x0, x1) for y in range(y0, y1)}


def by_counting(a: Corners, b: Corners) -> Fraction:
    one, other = squares(a), squares(b)
    return Fraction(len(one & other), max(1, len(one | other)))


corners = st.tuples(*[st.integers(0, 12)] * 4)
proper = corners.map(lambda c: (min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]) + 1, max(c[1], c[3]) + 1))


@given(a=corners, b=proper)
def test_iou_is_that_of_counted_squares(a: Corners, b: Corners) -> None:
    """Answers may be empty or turned inside out; the right box never is."""
    found = intersection_over_union(a, b)
    assert found == pytest.approx(float(by_counting(a, b)), rel=1e-12)
    assert found == intersection_over_union(b, a)
    assert 0 <= found <= 1


@given(a=proper, b=proper, scale=st.floats(1e-3, 1e3), x=st.floats(-50, 50), y=st.floats(-50, 50))
def test_iou_does_not_depend_on_the_unit_or_the_place(a: Corners, b: Corners, scale: float, x: float, y: float) -> None:
    def moved(box: Corners) -> Box:
        return scale * (box[0] + x), scale * (box[1] + y), scale * (box[2] + x), scale * (box[3] + y)

    assert intersection_over_union(moved(a), moved(b)) == pytest.approx(float(by_counting(a, b)), rel=1e-6, abs=1e-9)


@given(pairs=st.lists(st.tuples(proper, st.none() | corners), min_size=1, max_size=12))
def test_accuracy_is_the_share_of_hits_counted_by_hand(pairs: list[tuple[Corners, Corners | None]]) -> None:
    hits = sum(1 for truth, found in pairs if found is not None and 2 * by_counting(found, truth) >= 1)
    assert box_accuracy([t for t, _ in pairs], [f for _, f in pairs]) == hits / len(pairs)


def test_exactly_half_is_a_hit_and_a_little_less_is_not() -> None:
    for side in (2.0**-10, 1.0, 640.0):  # with the reference's epsilon the smallest would be a miss
        truth = (0.0, 0.0, side, side)
        assert box_accuracy([truth], [(0.0, 0.0, side, side / 2)]) == 1
        assert box_accuracy([truth], [(0.0, 0.0, side, math.nextafter(side / 2, 0) * (1 - 1e-9))]) == 0


def test_no_box_is_a_miss() -> None:
    box = (1.0, 2.0, 3.0, 4.0)
    assert box_accuracy([box] * 4, [box, None, (3.0, 4.0, 1.0, 2.0), (1.0, 2.0, 1.0, 4.0)]) == 0.25


def test_as_many_answers_as_boxes_are_expected() -> None:
    with pytest.raises(ValueError, match="shorter"):
        box_accuracy([(0.0, 0.0, 1.0, 1.0)] * 2, [None])
