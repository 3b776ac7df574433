"""Boxes in pixels to location bins and back.

A coordinate is scaled to the resized image, divided by the largest image side (512 pixels, whatever the side of the
resized image), and rounded to one of ``num_bins`` positions. All arithmetic is in float32 and rounding is half to even,
as in the code that the released checkpoints were trained with.

Source: Wang et al., "OFA", ICML 2022, §3.1 (location tokens as in Pix2Seq, Chen et al., ICLR 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from pituning.errors import DataError

Numbers: TypeAlias = Tensor | Sequence[float] | Sequence[Sequence[float]]


def resize_ratios(sizes: Numbers, side: int) -> Tensor:
    """Resized over original size, ``[..., 2]`` (width, height) to float32 ``[..., 2]``.

    Args:
        sizes: width and height of the original images in pixels.
        side: both sides of the resized images in pixels.

    Raises:
        DataError: for sizes that are not positive.
    """
    pixels = torch.as_tensor(sizes, dtype=torch.float64)
    if pixels.dim() == 0 or pixels.shape[-1] != 2 or not bool((pixels > 0).all()):
        raise DataError(f"expected the width and height of images in pixels, both above 0; found {_brief(sizes)}")
    return (side / pixels).float()


def boxes_to_bins(boxes: Numbers, sizes: Numbers, *, side: int, num_bins: int, max_image_size: int) -> Tensor:
    """Bins of boxes, int64 ``[..., 4]``.

    Args:
        boxes: ``[..., 4]``: x0, y0, x1, y1 in pixels of the original images.
        sizes: ``[..., 2]``: width and height of the original images in pixels.
        side: both sides of the resized images in pixels.
        num_bins: number of positions.
        max_image_size: pixels of the resized image that the bins span.

    Raises:
        DataError: if a coordinate is not finite or lies where no bin is.
    """
    corners = _four(torch.as_tensor(boxes, dtype=torch.float32), "boxes", "x0, y0, x1, y1 in pixels")
    ratios = resize_ratios(sizes, side)
    bins = (corners * torch.cat([ratios, ratios], dim=-1) / max_image_size * (num_bins - 1)).round()
    inside = (bins >= 0) & (bins <= num_bins - 1)  # false for NaN too
    if not bool(inside.all()):
        raise DataError(
            f"no bin for {_brief(boxes)} on an image of {_brief(sizes)} pixels: coordinates are x0, y0, x1, y1 in pixels of "
            f"the original image, and those of the image resized to {side} × {side} must lie within 0 to {max_image_size}"
        )
    return bins.long()


def bins_to_boxes(bins: Numbers, sizes: Numbers, *, side: int, num_bins: int, max_image_size: int) -> Tensor:
    """Boxes in pixels of the original images, float32 ``[..., 4]``; arguments as in :func:`boxes_to_bins`.

    Raises:
        DataError: if a bin is not one of ``0 … num_bins − 1``.
    """
    positions = _four(torch.as_tensor(bins), "bins", "whole numbers")
    whole = not positions.is_floating_point() and positions.dtype != torch.bool
    if not whole or not bool(((positions >= 0) & (positions < num_bins)).all()):
        raise DataError(f"expected bins of 0 to {num_bins - 1} as whole numbers, found {_brief(bins)}")
    ratios = resize_ratios(sizes, side)
    return positions / (num_bins - 1) * max_image_size / torch.cat([ratios, ratios], dim=-1)


def _four(values: Tensor, name: str, meaning: str) -> Tensor:
    if values.dim() == 0 or values.shape[-1] != 4:
        raise DataError(f"expected {name} of shape [..., 4] ({meaning}), found shape {list(values.shape)}")
    return values


def _brief(values: Numbers) -> str:
    shown = values.tolist() if isinstance(values, Tensor) else values
    text = repr(shown)
    return text if len(text) <= 100 else f"{text[:97]}..."
