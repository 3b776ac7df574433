"""What several measurements are made on: a model of MiniLM's shape, and experts with random tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from pituning.backbones.base import Backbone
from pituning.experts import Expert, ExpertCard
from pituning.methods import initial_tensors

SMALL_OFA: dict[str, Any] = {
    "vocab_size": 500,
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "resnet_layers": [1, 1, 1],
    "resnet_stem_width": 4,
    "resnet_widths": [2, 2, 4],
    "image_bucket_size": 8,
    "code_image_size": 32,
    "token_bucket_size": 16,
    "max_source_positions": 64,
    "max_target_positions": 32,
}
"""An OFA that is tiny in every way, for quick runs."""


def minilm_shaped(hidden: int, layers: int) -> BertModel:
    """Random weights, the same every time; MiniLM-L6 has a width of 384 and six layers."""
    torch.manual_seed(0)
    return BertModel(
        BertConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
            intermediate_size=4 * hidden,
            vocab_size=30522,
        )
    )


def random_expert(initial: Mapping[str, Tensor], config: Mapping[str, Any], seed: int) -> Expert:
    """The initial tensors plus noise, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {k: t.cpu() + 0.01 * torch.randn(t.shape, generator=generator) for k, t in initial.items()}
    return Expert(tensors, config, ExpertCard(f"random {seed}"))


def random_experts(backbone: Backbone, config: Mapping[str, Any], count: int) -> list[Expert]:
    """Experts of a configuration, with the seeds 0, 1, …"""
    initial = initial_tensors(backbone, config)
    return [random_expert(initial, config, seed) for seed in range(count)]
