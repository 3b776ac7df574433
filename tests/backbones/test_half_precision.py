"""A backbone in half precision on the CPU takes the attention that trains fast there, and gives the same."""

from __future__ import annotations

import pytest
import torch

import pituning as pt
from pituning.tasks import load_task
from pituning.training.precision import bf16_survives, precision


def test_the_attention_that_suits_the_weights() -> None:
    assert pt.load_backbone("ofa-nano").model.config._attn_implementation == "sdpa"
    backbone = pt.load_backbone("ofa-nano", dtype=torch.bfloat16)
    assert backbone.model.config._attn_implementation == "eager"
    with precision(backbone, "auto"):
        pass
    assert backbone.model.config._attn_implementation == "eager"


@pytest.mark.skipif(not bf16_survives(), reason="a bfloat16 product would end this process")
def test_losses_are_those_of_the_fused_attention() -> None:
    backbone = pt.load_backbone("ofa-nano", dtype=torch.bfloat16)
    batch = backbone.collate(load_task("emoji-vqa-small").split("test", 8))
    with torch.no_grad():
        eager = backbone.loss(batch)
        backbone.model.set_attn_implementation("sdpa")
        fused = backbone.loss(batch)
    assert torch.allclose(eager, fused, atol=0.1, rtol=0.05)
    wide = pt.load_backbone("ofa-nano")
    with torch.no_grad():
        assert torch.allclose(
            eager, wide.loss(wide.collate(load_task("emoji-vqa-small").split("test", 8))), atol=0.15, rtol=0.1
        )
