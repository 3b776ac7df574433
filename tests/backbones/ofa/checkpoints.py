"""Tiny checkpoints as the reference implementation writes them."""

from __future__ import annotations

from argparse import Namespace
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pituning.backbones.ofa.modeling import OFAForConditionalGeneration

LAYERS = [("encoder", 0), ("encoder", 1), ("decoder", 0), ("decoder", 1)]
WIDTH = 32
ARGS: dict[str, Any] = {
    "arch": "ofa_tiny", "encoder_embed_dim": 32, "encoder_ffn_embed_dim": 64, "encoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_embed_dim": 32, "decoder_ffn_embed_dim": 64, "decoder_layers": 2,
    "decoder_attention_heads": 4, "max_source_positions": 64, "max_target_positions": 32, "token_bucket_size": 16,
    "image_bucket_size": 8, "code_image_size": 32, "attn_scale_factor": 2, "no_scale_embedding": True,
    "disable_entangle": True, "scale_attn": True, "scale_fc": True, "scale_heads": True, "scale_resids": False,
    "share_all_embeddings": True, "encoder_normalize_before": True, "decoder_normalize_before": True,
    "activation_fn": "gelu", "resnet_type": "resnet50", "dropout": 0.1, "task": "refcoco", "vocab_size": 93,
    "patch_image_size": 64, "num_bins": 20, "code_dict_size": 8, "max_image_size": 64,
}  # fmt: skip
_RENAMED = (
    ("encoder", ".self_attn_mid_layer_norm.", ".attn_ln."),
    ("decoder", ".self_attn_mid_layer_norm.", ".self_attn_ln."),
    ("decoder", ".cross_attn_mid_layer_norm.", ".cross_attn_ln."),
    ("decoder", ".cross_attn_layer_norm.", ".encoder_attn_layer_norm."),
    ("decoder", ".cross_attn.", ".encoder_attn."),
    ("", ".ffn_layer_norm.", ".ffn_layernorm."),
)


def fairseq_state(model: OFAForConditionalGeneration) -> dict[str, Tensor]:
    """A model's tensors under the reference's names, tied ones and small buffers included."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("lm_head"):
            name = "decoder.output_projection.weight"
        name = name.removeprefix("model.")
        for side, own, reference in _RENAMED:
            if name.startswith(side):
                name = name.replace(own, reference)
        state[name] = tensor.detach().clone()
    return {**state, "encoder.version": torch.tensor([3.0]), "decoder.version": torch.tensor([3.0])}


def save_checkpoint(
    path: Path, state: Mapping[str, Tensor], args: Mapping[str, Any] | None = None, **extra_state: Any
) -> Path:
    """Write a ``.pt`` file of the reference's shape; arguments are those of the tiny model with changes."""
    content = {
        "args": None,
        "cfg": {"_name": None, "model": Namespace(**{**ARGS, **(args or {})}), "task": {"_name": "refcoco"}},
        "model": OrderedDict(state),
        "optimizer_history": [{"num_updates": 3}],
        "extra_state": {"train_iterator": {"epoch": 1}, "val_loss": None, **extra_state},
    }
    torch.save(content, path)
    return path


def random_adapters(count: int | None = None, r: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Adapters of every layer, of one expert or of several with their logits."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for side, layer in LAYERS:
        for site in (1, 2):
            stem = f"{side}.layers.{layer}"
            for k in [None] if count is None else range(count):
                name = f"{stem}.adapter{site}" if k is None else f"{stem}.adapters{site}.{k}"
                for part, shape in (
                    ("down_proj.weight", (r, WIDTH)), ("down_proj.bias", (r,)), ("up_proj.weight", (WIDTH, r)),
                    ("up_proj.bias", (WIDTH,)),
                ):  # fmt: skip
                    state[f"{name}.{part}"] = 0.3 * torch.randn(shape, generator=generator)
            if count is not None:
                state[f"{stem}.adapter_interpolation_weight{site}"] = torch.randn(count, generator=generator)
    return state


def projections() -> list[str]:
    """Names of the projections under LoRA."""
    attentions = {"encoder": ["self_attn"], "decoder": ["self_attn", "encoder_attn"]}
    return [
        f"{side}.layers.{layer}.{attention}.{p}_proj"
        for side, layer in LAYERS
        for attention in attentions[side]
        for p in "qkv"
    ] + [f"{side}.layers.{layer}.{a}.out_proj" for side, layer in LAYERS for a in attentions[side]]


def random_lora(r: int = 4, seed: int = 0, scale: float = 0.3) -> dict[str, Tensor]:
    """LoRA factors of every projection."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name in projections():
        state[f"{name}.lora_A"] = scale * torch.randn(r, WIDTH, generator=generator)
        state[f"{name}.lora_B"] = scale * torch.randn(WIDTH, r, generator=generator)
    return state


def merged(state: Mapping[str, Tensor], lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state whose projections hold LoRA's products, as loralib saves it after validation."""
    changed = dict(state)
    for name in projections():
        a, b = lora[f"{name}.lora_A"], lora[f"{name}.lora_B"]
        changed[f"{name}.weight"] = state[f"{name}.weight"] + b @ a / len(a)
    return changed


def interpolated_lora(state: Mapping[str, Tensor], count: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """A state in which each of several experts has its own copy of the projections."""
    generator = torch.Generator().manual_seed(seed)
    changed = dict(state)
    for k, lora in enumerate(random_lora(seed=seed + k) for k in range(count)):
        for name in projections():
            for part in ("weight", "bias"):
                changed[f"{name}.{k}.{part}"] = state[f"{name}.{part}"].clone()
            for half in ("lora_A", "lora_B"):
                changed[f"{name}.{k}.{half}"] = lora[f"{name}.{half}"]
            changed[f"{name.rpartition('.')[0]}.lora_interpolation_weight"] = torch.randn(count, generator=generator)
    return {k: t for k, t in changed.items() if k.removesuffix(".weight").removesuffix(".bias") not in projections()}


def random_prefixes(lengths: Mapping[str, int], seed: int = 0) -> dict[str, Tensor]:
    """Plain prefix encoders of the stacks that have a length."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{side}.{side}_prompt_encoder.embedding.weight": torch.randn(length, 2 * 2 * WIDTH, generator=generator)
        for side, length in lengths.items()
    }


def drifted(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state after a training whose BatchNorm statistics moved."""
    return {k: t + 0.25 * t.abs() + 0.1 if k.endswith(("running_mean", "running_var")) else t for k, t in state.items()}
