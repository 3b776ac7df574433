"""How training may change a picture: OFA's recipe for image classification; its other tasks train on pictures as they are.

Source: the transforms of OFA's image-classification data set (https://github.com/OFA-Sys/OFA), stated there in terms of
timm and of a second RandAugment. Each operation of RandAugment is one call of Pillow, in which its definition is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from pituning.data.images import open_image
from pituning.errors import RefusedError, unknown_name
from pituning.example import Example

Augmenter: TypeAlias = Callable[[Example], Example]
"""Gives the example with a changed picture, another one at every call."""

Operation: TypeAlias = Callable[[Image.Image, float], Image.Image]
"""(RGB picture, severity in [−1, 1]) → RGB picture of that size; the sign is the direction, where there are two."""

AUGMENTATIONS: Mapping[str, str] = {
    "none": "Pictures stay as they are.",
    "image-classification": "Random crop and flip, RandAugment twice, random erasing: OFA's recipe for ImageNet.",
}
"""Names that `Example.augmentation` may hold, and what they do."""

LARGEST_SIDE = 480
"""Side of OFA's square input for image classification; larger crops are brought down to it before anything else."""

GREY = (128, 128, 128)
"""What shows where a picture was moved away."""


def augmenter(name: str, seed: int) -> Augmenter | None:
    """The augmentation of that name, or None where pictures stay as they are (``""`` and ``"none"``).

    The same seed and the same order of calls give the same pictures; pickling keeps the place in that order.

    Raises:
        UnknownNameError: if there is no such augmentation.
    """
    if name in ("", "none"):
        return None
    if name not in AUGMENTATIONS:
        raise unknown_name("augmentation", name, AUGMENTATIONS)
    return ImageClassificationAugmenter(seed)


class ImageClassificationAugmenter:
    """Crop, flip, RandAugment of 15 operations at 9 ± 0.5, RandAugment of 10 operations at 7, and erasing, in this order.

    The picture is a square of at most `LARGEST_SIDE` pixels afterwards; a backbone brings it to its own input size.
    """

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def __call__(self, example: Example) -> Example:
        """The example with a new picture; as it is if it has none.

        Raises:
            DataError: if the picture cannot be read.
            RefusedError: if the example has a box.
        """
        if example.image is None:
            return example
        if example.box is not None:
            raise RefusedError(
                f"{example.id}: augmentation 'image-classification' crops and turns the picture, which would move the "
                f"box {example.box}; leave Example.augmentation empty for a task with boxes"
            )
        image = open_image(example.image, example.id)
        image = random_crop(image, self._random)
        image = random_flip(image, self._random)
        image = rand_augment(image, self._random, INCREASING_OPERATIONS, magnitude=9, std=0.5)
        image = rand_augment(image, self._random, MILD_OPERATIONS, magnitude=7, std=0)
        return replace(example, image=random_erase(image, self._random))


def random_crop(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """A part of 8 to 100 % of the area and of aspect ratio 3/4 to 4/3, stretched to a square (bicubic).

    Ten draws that do not fit into the picture give the largest central part whose aspect ratio is allowed. The side is
    the part's longer one, at most `LARGEST_SIDE`. Source: Szegedy et al. (2015), "Going deeper with convolutions", §6.
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1.0)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(random.integers(width - w + 1)), int(random.integers(height - h + 1))
            break
    else:
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - w) // 2, (height - h) // 2
    side = min(max(w, h), LARGEST_SIDE)
    return image.crop((left, top, left + w, top + h)).resize((side, side), Image.Resampling.BICUBIC)


def random_flip(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Left and right swapped, half of the time."""
    return ImageOps.mirror(image) if random.random() < 0.5 else image


def rand_augment(
    image: Image.Image,
    random: np.random.Generator,
    operations: Mapping[str, Operation],
    magnitude: float,
    std: float,
) -> Image.Image:
    """Two operations drawn with replacement, each carried out half of the time.

    Args:
        magnitude: mean severity of an operation, on RandAugment's scale from 0 to 10.
        std: standard deviation of the severity on that scale.

    Source: Cubuk et al. (2020), "RandAugment"; the chance of one half and the deviation are timm's additions.
    """
    choices = tuple(operations.values())
    for index in random.integers(len(choices), size=2):
        if random.random() < 0.5:
            severity = float(np.clip(random.normal(magnitude, std), 0, 10)) / 10
            image = choices[index](image, severity if random.random() < 0.5 else -severity)
    return image


def random_erase(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """A rectangle of noise over 2 to 33 % of the area and of aspect ratio 0.3 to 1/0.3, a quarter of the time.

    The recipe puts unit normal noise z into the picture after normalising it with mean 0.5 and standard deviation 0.5;
    before that step the same noise is 0.5 + 0.5 z, here cut to [0, 1] to be a picture. Source: Zhong et al. (2020),
    "Random Erasing Data Augmentation", algorithm 1.
    """
    if random.random() >= 0.25:
        return image
    width, height = image.size
    for _ in range(10):
        area = width * height * random.uniform(0.02, 1 / 3)
        ratio = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
        w, h = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if w < width and h < height:
            left, top = int(random.integers(width - w + 1)), int(random.integers(height - h + 1))
            pixels = np.array(image)
            noise = 0.5 + 0.5 * random.standard_normal((h, w, 3))
            pixels[top : top + h, left : left + w] = np.rint(255 * np.clip(noise, 0, 1))
            return Image.fromarray(pixels)
    return image


def _two_sided(severity: float) -> float:
    """Factor of an enhancement from 0.1 to 1.9; 1, which leaves the picture alone, lies at severity 0."""
    return max(0.1, 1 + 0.9 * severity)


def _one_sided(severity: float) -> float:
    """Factor of an enhancement from 0.1 to 1.9; 1, which leaves the picture alone, lies at severity 0.5."""
    return 0.1 + 1.8 * abs(severity)


def _posterize(image: Image.Image, severity: float) -> Image.Image:
    # At full severity the recipe keeps no bit, which is a black picture and refused by Pillow 13.
    return ImageOps.posterize(image, max(1, 4 - int(4 * abs(severity))))


def _solarize(image: Image.Image, severity: float) -> Image.Image:
    return ImageOps.solarize(image, 256 - int(256 * abs(severity)))


def _solarize_add(image: Image.Image, severity: float) -> Image.Image:
    added = int(110 * abs(severity))
    return image.point([value + added if value < 128 else value for value in range(256)] * 3)


def _geometry(resampling: Image.Resampling, shift: float) -> dict[str, Operation]:
    """Shear to 0.3, translation to ``shift`` of the side, rotation to 30°."""

    def affine(image: Image.Image, *matrix: float) -> Image.Image:
        return image.transform(image.size, Image.Transform.AFFINE, matrix, resampling, fillcolor=GREY)

    return {
        "shear-x": lambda image, severity: affine(image, 1, 0.3 * severity, 0, 0, 1, 0),
        "shear-y": lambda image, severity: affine(image, 1, 0, 0, 0.3 * severity, 1, 0),
        "translate-x": lambda image, severity: affine(image, 1, 0, shift * severity * image.width, 0, 1, 0),
        "translate-y": lambda image, severity: affine(image, 1, 0, 0, 0, 1, shift * severity * image.height),
        "rotate": lambda image, severity: image.rotate(30 * severity, resampling, fillcolor=GREY),
    }


INCREASING_OPERATIONS: Mapping[str, Operation] = {
    "autocontrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
    "invert": lambda image, _: ImageOps.invert(image),
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize-add": _solarize_add,
    "color": lambda image, severity: ImageEnhance.Color(image).enhance(_two_sided(severity)),
    "contrast": lambda image, severity: ImageEnhance.Contrast(image).enhance(_two_sided(severity)),
    "brightness": lambda image, severity: ImageEnhance.Brightness(image).enhance(_two_sided(severity)),
    "sharpness": lambda image, severity: ImageEnhance.Sharpness(image).enhance(_two_sided(severity)),
    **_geometry(Image.Resampling.BICUBIC, shift=0.45),
}
"""The first RandAugment, timm's ``rand-m9-mstd0.5-inc1``: a larger severity always means a larger change."""

MILD_OPERATIONS: Mapping[str, Operation] = {
    "identity": lambda image, _: image,
    "autocontrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
    "brightness": lambda image, severity: ImageEnhance.Brightness(image).enhance(_one_sided(severity)),
    "sharpness": lambda image, severity: ImageEnhance.Sharpness(image).enhance(_one_sided(severity)),
    **_geometry(Image.Resampling.BILINEAR, shift=10 / LARGEST_SIDE),
}
"""The second RandAugment, OFA's own; it translates by up to 10 pixels of its input, here the same share of the side."""
