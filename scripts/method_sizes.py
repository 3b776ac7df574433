"""Trained parameters of every method with its defaults, on public configurations without their weights.

`python scripts/method_sizes.py`
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import transformers as hf
from peft import get_peft_model

from pituning.backbones.base import Backbone
from pituning.backbones.causal import CausalBackbone
from pituning.backbones.encoder import EncoderBackbone
from pituning.backbones.seq2seq import Seq2SeqBackbone
from pituning.errors import RefusedError
from pituning.methods import make_config, method_names

_QWEN = {
    "vocab_size": 151936, "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
    "intermediate_size": 4864, "tie_word_embeddings": True,
}  # fmt: skip
_T5 = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
MODELS: dict[str, tuple[type[Backbone], Any]] = {
    "bert-base-uncased": (EncoderBackbone, lambda: hf.BertModel(hf.BertConfig())),
    "t5-base": (Seq2SeqBackbone, lambda: hf.T5ForConditionalGeneration(hf.T5Config(**_T5))),
    "bart-large": (Seq2SeqBackbone, lambda: hf.BartForConditionalGeneration(hf.BartConfig())),
    "gpt2": (CausalBackbone, lambda: hf.GPT2LMHeadModel(hf.GPT2Config())),
    "Qwen2.5-0.5B": (CausalBackbone, lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_QWEN))),
}


def size(name: str, method: str | None) -> str:
    """Parameters that a method trains on a model, or that the model has."""
    kind, build = MODELS[name]
    with torch.device("meta"):
        backbone = object.__new__(kind)  # without weights there is no fingerprint
        backbone.name, backbone.model = name, build().requires_grad_(False)
        if method is None:
            return f"{sum(p.numel() for p in backbone.model.parameters()):,}"
        try:
            config = make_config(method, backbone)
        except RefusedError:
            return "refused"
        tuned = get_peft_model(backbone.model, config, autocast_adapter_dtype=False)
    return f"{sum(p.numel() for p in tuned.parameters() if p.requires_grad):,}"


def main() -> None:
    """Print the table."""
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    print(f"| | {' | '.join(MODELS)} |")
    print(f"|---|{'---:|' * len(MODELS)}")
    for method in [None, *method_names()]:
        label = "backbone" if method is None else f"`{method}`"
        print(f"| {label} | {' | '.join(size(name, method) for name in MODELS)} |")


if __name__ == "__main__":
    main()
