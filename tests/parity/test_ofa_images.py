"""Images and boxes against what OFA's own code made: shared/fixtures/preprocess (recorded from TencentARC/pi-Tuning).

Only the small images are stored. `picture` is the recipe behind all eight; the stored ones prove it.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from pituning.backbones.ofa.images import resize
from pituning.backbones.ofa.processing import OFAProcessor
from pituning.data.images import open_image

FIXTURES = Path(__file__).parents[3] / "shared" / "fixtures"
FOLDER = FIXTURES / "preprocess"
pytestmark = pytest.mark.skipif(
    not FIXTURES.is_dir(), reason=f"the reference's recorded numbers are not here: no folder {FIXTURES}"
)
STORED = (0, 1, 2, 3, 4, 7)
PROMPT = ' which region does the text " {} " describe?'


@pytest.fixture(scope="module")
def golden() -> Any:
    return json.loads((FOLDER / "golden.json").read_text())


@cache
def processor_of(side: int) -> OFAProcessor:
    return OFAProcessor.from_fairseq(FIXTURES / "bpe", image_size=side)


def picture(case: int, width: int, height: int) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    red, green = (x * 255 / max(width - 1, 1)).astype(int), (y * 255 / max(height - 1, 1)).astype(int)
    noise = np.random.RandomState(case).randint(-20, 21, (height, width, 3))
    pixels = np.stack([red, green, (3 * x + 7 * y) % 256], axis=-1) + noise
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def pixels_of(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("case", STORED)
def test_the_recipe_of_the_images(case: int) -> None:
    stored = open_image(FOLDER / f"img{case}.png")
    assert np.array_equal(np.asarray(stored), np.asarray(picture(case, *stored.size)))


@pytest.mark.parametrize("case", range(8))
def test_resized_pixels(golden: Any, case: int) -> None:
    row = golden["rows"][case]
    image = picture(case, row["w"], row["h"])
    recorded = load_file(FOLDER / "patches.safetensors")
    assert torch.equal(pixels_of(resize(image, 64)), recorded[f"p64.{case}.u8"])
    large = processor_of(480).image(image)[:, ::23, ::29]
    assert torch.equal(large, recorded[f"p480.{case}.slice"])


def test_square_pixels_of_the_other_tasks() -> None:
    recorded = load_file(FOLDER / "square.safetensors")
    assert len(recorded) == 4
    for name, pixels in recorded.items():
        image = open_image(FOLDER / f"img{name.split('.')[1]}.png")
        assert torch.equal(pixels_of(resize(image, 48)), pixels)


@pytest.mark.parametrize("index", range(16))
def test_every_recorded_example(golden: Any, index: int) -> None:
    row = golden["rows"][index]
    processor = processor_of(row["patch_image_size"])
    size = (row["w"], row["h"])
    box = [float(value) for value in row["box"].split(",")]
    batch = processor(
        [PROMPT.format(processor.clean_caption(golden["text"]))],
        images=[picture(row["case"], *size)],
        targets=[processor.encode_box(box, size)],
    )
    patch = batch["patch_images"][0]
    assert list(patch.shape) == row["patch_shape"]
    assert float(patch.double().sum()) == pytest.approx(row["patch_sum"], rel=1e-5)
    assert float(patch.double().abs().sum()) == pytest.approx(row["patch_abs_sum"], rel=1e-5)
    assert batch["patch_masks"].tolist() == [True]
    assert batch["input_ids"][0].tolist() == row["source"]
    assert batch["labels"][0].tolist() == row["target"]
    assert batch["decoder_input_ids"][0].tolist() == row["prev_output_tokens"]
    assert processor.boxes_to_bins(box, size).tolist() == row["bins"]
    assert processor.resize_ratios(size).tolist() == [row["w_resize_ratio"], row["h_resize_ratio"]]
    assert processor.decode_box(row["target"], size) == pytest.approx(row["box_from_bins"], rel=1e-5)
    assert processor.bins_to_boxes([row["bins"]], [size]).tolist() == [row["box_from_bins"]]
