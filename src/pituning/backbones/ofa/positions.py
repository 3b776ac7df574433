"""Where tokens and patches stand: relative position buckets, position ids of patches, and score biases from them.

OFA adds two things to the attention scores: one learned number per relative position, head and layer, and a query-key
product of absolute position embeddings, which is the same in all layers. Neither depends on the example.

Source: Wang et al., "OFA", ICML 2022, §3.1; Ke et al., "Rethinking Positional Encoding", ICLR 2021 (the product);
Dai et al., "CoAtNet", NeurIPS 2021 (the image buckets).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pituning.backbones.ofa.configuration import MAX_RELATIVE_POSITION, STEM_STRIDE
from pituning.errors import DataError


def token_buckets(bucket_size: int) -> Tensor:
    """Bucket of every relative text position, shape ``[2 · 1024 − 1]``; position i − j is at index i − j + 1023.

    Within half a ``bucket_size`` every distance has its own bucket, beyond it buckets grow logarithmically.
    """
    longest = MAX_RELATIVE_POSITION
    relative = torch.arange(1 - longest, longest, device="cpu")  # elsewhere a logarithm may round differently
    middle = bucket_size // 2
    distance = torch.where(relative.abs() < middle, middle - 1, relative.abs()).to(torch.float32)
    logarithmic = torch.ceil(torch.log(distance / middle) / math.log((longest - 1) / middle) * (middle - 1)) + middle
    buckets = torch.where(distance <= middle, relative, logarithmic.int() * relative.sign())
    return buckets.long() + bucket_size - 1


def token_bucket_matrix(length: int, bucket_size: int, device: torch.device) -> Tensor:
    """Bucket of each pair of text positions, shape ``[length, length]``.

    Raises:
        DataError: for texts longer than the buckets reach.
    """
    if length > MAX_RELATIVE_POSITION:
        raise DataError(f"a text of {length} tokens is longer than the {MAX_RELATIVE_POSITION} that OFA can place")
    position = torch.arange(length, device=device)
    relative = position[:, None] - position[None, :]
    return token_buckets(bucket_size).to(device)[relative + MAX_RELATIVE_POSITION - 1]


def image_bucket_matrix(height: int, width: int, bucket_size: int, device: torch.device) -> Tensor:
    """Bucket of each pair of patches of an image, row by row, shape ``[height · width, height · width]``."""
    row = torch.arange(height, device=device).repeat_interleave(width)
    column = torch.arange(width, device=device).repeat(height)
    down = row[:, None] - row[None, :] + bucket_size - 1
    right = column[:, None] - column[None, :] + bucket_size - 1
    return down * (2 * bucket_size - 1) + right


def image_bucket_count(bucket_size: int) -> int:
    """Rows of an image position table: one per offset, and three for the start token of code sequences."""
    return (2 * bucket_size - 1) ** 2 + 3


def patch_positions(height: int, width: int, bucket_size: int, device: torch.device) -> Tensor:
    """Row of each patch in the absolute position table, shape ``[height · width]``; row 0 is no patch.

    Raises:
        DataError: for images with more patches per side than the table has.
    """
    if max(height, width) > bucket_size:
        raise DataError(
            f"an image of {height} × {width} patches ({height * STEM_STRIDE} × {width * STEM_STRIDE} pixels) does not fit "
            f"this model's position table of {bucket_size} × {bucket_size} patches: resize it to at most "
            f"{bucket_size * STEM_STRIDE} pixels per side"
        )
    row = torch.arange(height, device=device) * bucket_size
    return (row[:, None] + torch.arange(width, device=device)[None, :] + 1).flatten()


def look_up(table: nn.Module, buckets: Tensor) -> Tensor:
    """One learned number per head for each pair of positions: buckets ``[n, m]`` to ``[heads, n, m]``."""
    assert isinstance(table, nn.Embedding)
    return table.weight.t()[:, buckets]


def with_relative(bias: Tensor, parts: Sequence[tuple[int, nn.Module, Tensor]]) -> Tensor:
    """A copy of score biases ``[…, heads, n, n]`` with a layer's learned numbers added within parts of the sequence.

    Args:
        parts: the first position of each part, its table, and the buckets ``[length, length]`` of its pairs.
    """
    bias = bias.clone()
    for start, table, buckets in parts:
        end = start + len(buckets)
        bias[..., start:end, start:end] += look_up(table, buckets)
    return bias


def absolute_scores(query: Tensor, key: Tensor, heads: int, scale: float) -> Tensor:
    """Scaled product of projected positions: ``[1, n, d]`` and ``[1, m, d]`` to ``[1, heads, n, m]``."""
    query = query.view(*query.shape[:2], heads, -1).transpose(1, 2) * scale
    key = key.view(*key.shape[:2], heads, -1).transpose(1, 2)
    return query @ key.transpose(2, 3)
