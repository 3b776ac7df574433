"""Tiny random models of the families that methods are tested on, and their experts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from pituning.backbones.base import Backbone
from pituning.backbones.causal import CausalBackbone
from pituning.example import Example
from pituning.experts import Expert, ExpertCard
from pituning.methods import config_dict, initial_tensors, make_config
from tests.backbones.test_seq2seq import SPECIAL, WORDS, tokenizer
from tests.backbones.test_seq2seq import build as build_seq2seq

SEQ2SEQ = ("t5", "flan", "bart")
CAUSAL = ("llama", "qwen2", "gpt_neox", "gpt2")
GENERATIVE = (*SEQ2SEQ, *CAUSAL)
CHOICES = ("w1", "w2 w3 w4", "w7 w8")


def _causal(kind: str) -> Any:
    sizes = {
        "vocab_size": len(SPECIAL + WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
    }  # fmt: skip
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**sizes))
    if kind == "gpt_neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(intermediate_size=64, **sizes))
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes)) if kind == "llama" else Qwen2ForCausalLM(Qwen2Config(**sizes))


@cache
def backbone(kind: str, dtype: torch.dtype = torch.float32) -> Backbone:
    """One of :data:`GENERATIVE`, whose answers depend strongly on its input; built once."""
    if kind in SEQ2SEQ:
        return build_seq2seq(kind, dtype)
    torch.manual_seed(0)
    return CausalBackbone(kind, _causal(kind).to(dtype), tokenizer("<s> $A"))


def examples(count: int = 4, seed: int = 0, choices: Sequence[str] = ()) -> list[Example]:
    """Prompts of 1 to 8 words; targets of 1 to 5, or the choices in turn."""
    rng = random.Random(seed)

    def words(high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, high)))

    made = []
    for index in range(count):
        text = words(8)
        made.append(
            Example(str(index), (text,), text, choices[index % len(choices)] if choices else words(5), tuple(choices))
        )
    return made


def expert(backbone: Backbone, config: Any, seed: int = 1, scale: float = 0.3) -> Expert:
    """An expert of a method's name or a configuration, its initial tensors plus noise."""
    config = config_dict(make_config(config, backbone) if isinstance(config, str) else config)
    generator = torch.Generator().manual_seed(seed)
    initial = initial_tensors(backbone, config)
    tensors = {k: t + scale * torch.randn(t.shape, generator=generator).to(t) for k, t in initial.items()}
    return Expert(tensors, config, ExpertCard("tiny", backbone=backbone.name, method=config["peft_type"].lower()))
