"""Pictures to normalised tensors: bicubic resize to a square, mean and standard deviation per channel."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Channels = tuple[float, float, float]

IMAGENET_MEAN: Channels = (0.485, 0.456, 0.406)
"""Mean of ImageNet's red, green and blue."""

IMAGENET_STD: Channels = (0.229, 0.224, 0.225)
"""Standard deviation of ImageNet's red, green and blue."""


def resize(image: Image.Image, side: int) -> Image.Image:
    """Bicubic resize to ``side`` × ``side`` pixels; the aspect ratio is not kept."""
    return image.resize((side, side), Image.Resampling.BICUBIC)


def normalise(image: Image.Image, mean: Channels, std: Channels) -> Tensor:
    """(x / 255 − mean) / std of an RGB picture, float32 ``[3, height, width]``."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()
    centre, spread = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (mean, std))
    return (pixels.float() / 255 - centre) / spread
