"""Relative position buckets against formulas applied one pair at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pituning.backbones.ofa.positions import (
    image_bucket_count,
    image_bucket_matrix,
    patch_positions,
    token_bucket_matrix,
)
from pituning.errors import DataError

CPU = torch.device("cpu")


def slow_token_bucket(relative: int, bucket_size: int) -> int:
    middle = bucket_size // 2
    if abs(relative) <= middle:
        return relative + bucket_size - 1
    share = np.float32(math.log(np.float32(abs(relative) / middle))) / np.float32(math.log(1023 / middle))
    logarithmic = math.ceil(np.float32(share * np.float32(middle - 1))) + middle
    return int(math.copysign(logarithmic, relative)) + bucket_size - 1


@pytest.mark.parametrize("bucket_size", [16, 256])
def test_token_buckets(bucket_size: int) -> None:
    found = token_bucket_matrix(300, bucket_size, CPU)
    for i in range(0, 300, 7):
        for j in range(0, 300, 3):
            # float32 rounding may put a distance that lies on a border into the neighbouring bucket
            assert abs(int(found[i, j]) - slow_token_bucket(i - j, bucket_size)) <= (abs(i - j) > bucket_size // 2)
    assert found.min() >= 0
    assert found.max() <= 2 * bucket_size - 2
    assert torch.equal(token_bucket_matrix(5, bucket_size, CPU), found[:5, :5])


def test_buckets_do_not_depend_on_the_default_dtype() -> None:
    expected = token_bucket_matrix(1024, 256, CPU)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert torch.equal(token_bucket_matrix(1024, 256, CPU), expected)
    finally:
        torch.set_default_dtype(before)


def test_texts_beyond_the_buckets_are_refused() -> None:
    with pytest.raises(DataError, match="1025 tokens"):
        token_bucket_matrix(1025, 16, CPU)


def test_image_buckets_tell_every_offset_apart() -> None:
    height, width, size = 3, 5, 6
    found = image_bucket_matrix(height, width, size, CPU)
    offsets: dict[int, tuple[int, int]] = {}
    for a in range(height * width):
        for b in range(height * width):
            offset = (a // width - b // width, a % width - b % width)
            assert offsets.setdefault(int(found[a, b]), offset) == offset
    assert len(offsets) == (2 * height - 1) * (2 * width - 1)
    assert max(offsets) < image_bucket_count(size) - 3


def test_patches_of_a_narrow_image_do_not_wrap() -> None:
    assert patch_positions(2, 3, 8, CPU).tolist() == [1, 2, 3, 9, 10, 11]
    with pytest.raises(DataError, match=r"144 × 16 pixels.*at most 128"):
        patch_positions(9, 1, 8, CPU)
