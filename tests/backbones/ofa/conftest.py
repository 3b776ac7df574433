"""Tiny random OFA models. Nothing here touches the network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pituning.backbones.ofa.configuration import OFAConfig
from pituning.backbones.ofa.modeling import OFAForConditionalGeneration

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
