"""Boxes to bins and back, against plain float64 arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pituning.backbones.ofa.boxes import bins_to_boxes, boxes_to_bins, resize_ratios

GRID = {"side": 480, "num_bins": 1000, "max_image_size": 512}
pixels = st.integers(1, 3000)
fractions = st.tuples(*[st.floats(0, 1)] * 4)


@given(width=pixels, height=pixels, at=fractions)
def test_round_trip_within_half_a_bin(width: int, height: int, at: tuple[float, ...]) -> None:
    box = [at[0] * width, at[1] * height, at[2] * width, at[3] * height]
    bins = boxes_to_bins(box, (width, height), **GRID)
    back = bins_to_boxes(bins, (width, height), **GRID).tolist()
    for found, wanted, extent in zip(back, box, (width, height, width, height), strict=True):
        half_a_bin = 0.5 * 512 / 999 * extent / 480
        assert abs(found - wanted) <= half_a_bin * (1 + 1e-3) + 1e-6 * extent


@given(width=pixels, height=pixels, bins=st.tuples(*[st.integers(0, 937)] * 4))
def test_every_bin_of_an_image_comes_back(width: int, height: int, bins: tuple[int, ...]) -> None:
    size = (width, height)
    assert boxes_to_bins(bins_to_boxes(bins, size, **GRID), size, **GRID).tolist() == list(bins)


def test_a_batch_is_its_boxes_one_by_one() -> None:
    sizes = torch.tensor([[640, 480], [23, 97], [1, 7]])
    boxes = torch.rand(3, 4, generator=torch.Generator().manual_seed(3)) * sizes.repeat(1, 2)
    bins = boxes_to_bins(boxes, sizes, **GRID)
    assert (bins.dtype, bins.shape) == (torch.int64, (3, 4))
    for row, box, size in zip(bins, boxes, sizes, strict=True):
        assert torch.equal(row, boxes_to_bins(box, size, **GRID))
    assert bins_to_boxes(bins, sizes, **GRID).shape == (3, 4)


def test_ties_round_to_even() -> None:
    # 512 pixels over 5 positions: 64 and 192 lie exactly between two of them
    grid = {"side": 512, "num_bins": 5, "max_image_size": 512}
    assert boxes_to_bins([64, 192, 320, 448], (512, 512), **grid).tolist() == [0, 2, 2, 4]


def test_few_bins_and_other_extents() -> None:
    grid = {"side": 64, "num_bins": 20, "max_image_size": 64}
    assert boxes_to_bins([0, 0, 100, 50], (100, 50), **grid).tolist() == [0, 0, 19, 19]
    assert bins_to_boxes([0, 0, 19, 19], (100, 50), **grid).tolist() == pytest.approx([0, 0, 100, 50])


@pytest.mark.parametrize(
    "box", [[0, 0, 600, 10], [-1, 0, 5, 5], [0, 0, float("nan"), 5], [0, 0, 5, float("inf")], [float("-inf"), 0, 1, 1]]
)
def test_a_box_off_the_grid_is_refused(box: list[float], message: Callable[..., str]) -> None:
    text = message(boxes_to_bins, box, (480, 480), **GRID)
    assert str(box) in text
    assert "480 × 480" in text


@pytest.mark.parametrize("bins", [[0, 0, 0, 1000], [-1, 0, 0, 0], [0.0, 1.0, 2.0, 3.0], [True, False, True, True]])
def test_what_is_no_bin_is_refused(bins: list[float], message: Callable[..., str]) -> None:
    assert "0 to 999" in message(bins_to_boxes, bins, (64, 64), **GRID)


def test_wrong_shapes_and_sizes_are_refused(message: Callable[..., str]) -> None:
    assert "[..., 4]" in message(boxes_to_bins, [1, 2, 3], (64, 64), **GRID)
    assert "[..., 4]" in message(bins_to_boxes, [[1, 2, 3]], (64, 64), **GRID)
    for size in ((0, 5), (5, -1), (5, 5, 5), (float("nan"), 5)):
        assert "width and height" in message(resize_ratios, size, 480)
