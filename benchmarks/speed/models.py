"""What several measurements are made on: a model of MiniLM's shape, and experts with random tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from pituning.experts import Expert, ExpertCard


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
