"""Tiny random OFA models. Nothing here touches the network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from pituning.backbones.ofa.backbone import OFABackbone
from pituning.backbones.ofa.configuration import OFAConfig
from pituning.backbones.ofa.modeling import OFAForConditionalGeneration
from pituning.backbones.ofa.processing import OFAProcessor
from pituning.example import Example

SIZES: dict[str, Any] = {
    "vocab_size": 93,
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "resnet_layers": [1, 2, 1],
    "resnet_stem_width": 8,
    "resnet_widths": [4, 8, 16],
    "max_source_positions": 64,
    "max_target_positions": 32,
    "token_bucket_size": 16,
    "image_bucket_size": 8,
    "code_image_size": 32,
}
LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)]
PIECES = ["Ġ", *LETTERS, *(f"Ġ{letter}" for letter in LETTERS)]
BINS = [f"<bin_{i}>" for i in range(20)]
SYMBOLS = ["<s>", "<pad>", "</s>", "<unk>", *PIECES, "<mask>", *BINS]
CHOICES = ("yes", "yet", "no")


def build_ofa(dtype: torch.dtype = torch.float32, **settings: Any) -> OFAForConditionalGeneration:
    """A tiny OFA whose random weights are large enough to make every input look different; eval mode."""
    torch.manual_seed(0)
    model = OFAForConditionalGeneration(OFAConfig(**{**SIZES, "init_std": 0.2, **settings}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.dim() == 1 and tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                tensor += 0.1 * (noise.abs() if name.endswith("running_var") else noise)
    return model.to(dtype).eval()


def build_backbone(dtype: torch.dtype = torch.float32, **settings: Any) -> OFABackbone:
    """A tiny OFA that reads letters and pictures of 32 × 32 pixels."""
    processor = OFAProcessor.from_symbols(
        SYMBOLS, [("Ġ", letter) for letter in LETTERS], image_size=32, max_image_size=32
    )
    return OFABackbone("tiny-ofa", build_ofa(dtype, vocab_size=len(SYMBOLS), **settings), processor)


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def closed(count: int = 4) -> list[Example]:
    """Examples with closed answers of one, two and three tokens in common; every second one has a picture."""
    return [
        Example(f"e{i}", ("x",), " is it" + " a" * i, CHOICES[i % 3], CHOICES, image=picture(i) if i % 2 else None)
        for i in range(count)
    ]


def boxes(count: int = 3) -> list[Example]:
    return [
        Example(f"b{i}", ("x",), " where" + " a" * i, "1,2,20,25", image=picture(i), box=(1.0 + i, 2.0, 20.0, 25.0))
        for i in range(count)
    ]


@pytest.fixture
def ofa() -> OFAForConditionalGeneration:
    """A tiny OFA in float32."""
    return build_ofa()


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    """Three examples: one padded, one whose image is to be ignored; sources of 7, 5 and 6 tokens."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(4, 93, (3, 7), generator=generator)
    tokens[1, 5:] = 1
    tokens[2, 6:] = 1
    images = torch.randn(3, 3, 64, 48, generator=generator)
    return {"input_ids": tokens, "patch_images": images, "patch_masks": torch.tensor([True, True, False])}
