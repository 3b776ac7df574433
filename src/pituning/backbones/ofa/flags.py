"""`OFAConfig` from the arguments of a fairseq training or a Hugging Face `config.json`, checked against the tensors.

Source of the defaults: the architectures `ofa_tiny` … `ofa_huge` of the reference implementation.
"""

from __future__ import annotations

import math
import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pituning.backbones.ofa.configuration import RESNET_LAYERS, SIZES, OFAConfig
from pituning.backbones.ofa.names import PREFIX, our_name
from pituning.errors import PituningError, unknown_name
from pituning.problems import listed

PUBLISHED_WIDTHS = (64, [64, 128, 256])  # of the stem's first convolution and of its stages, in every published size

# fairseq's argument → ours, where only the name differs
_SAME = {
    "vocab_size": "vocab_size", "encoder_embed_dim": "d_model", "encoder_layers": "encoder_layers",
    "decoder_layers": "decoder_layers", "encoder_attention_heads": "encoder_attention_heads",
    "decoder_attention_heads": "decoder_attention_heads", "encoder_ffn_embed_dim": "encoder_ffn_dim",
    "decoder_ffn_embed_dim": "decoder_ffn_dim", "dropout": "dropout", "attention_dropout": "attention_dropout",
    "encoder_drop_path_rate": "encoder_drop_path_rate", "decoder_drop_path_rate": "decoder_drop_path_rate",
    "resnet_drop_path_rate": "resnet_drop_path_rate", "max_source_positions": "max_source_positions",
    "max_target_positions": "max_target_positions", "token_bucket_size": "token_bucket_size",
    "image_bucket_size": "image_bucket_size", "code_image_size": "code_image_size",
    "attn_scale_factor": "attn_scale_factor", "layernorm_embedding": "layernorm_embedding",
    "patch_layernorm_embedding": "patch_layernorm_embedding", "code_layernorm_embedding": "code_layernorm_embedding",
    "add_type_embedding": "add_type_embedding", "entangle_position_embedding": "entangle_position_embedding",
    "scale_attn": "scale_attn", "scale_fc": "scale_fc", "scale_heads": "scale_heads", "scale_resids": "scale_resids",
    "resnet_type": "resnet_type", "freeze_resnet": "freeze_resnet", "interpolate_position": "interpolate_position",
    "orig_patch_image_size": "orig_patch_image_size",
}  # fmt: skip
_OFF_UNLESS_SAID = ("scale_attn", "scale_fc", "scale_heads", "scale_resids")
_SILENT = ("disable_entangle", "attn_scale_factor", "no_scale_embedding")
_ACTIVATIONS = {
    "gelu": "gelu", "relu": "relu", "tanh": "tanh", "linear": "linear", "gelu_accurate": "gelu_new", "gelu_fast": "gelu_new",
}  # fmt: skip
# What OFA's code can be told to do and ours does not: argument → the value it must have
_REQUIRED: dict[str, Any] = {
    "encoder_normalize_before": True, "decoder_normalize_before": True, "share_all_embeddings": True,
    "adaptive_softmax_cutoff": None, "adaptive_input": False, "encoder_layerdrop": 0, "decoder_layerdrop": 0,
    "quant_noise_pq": 0, "quant_noise_scalar": 0, "sync_bn": False, "no_cross_attention": False,
    "cross_self_attention": False, "encoder_layers_to_keep": None, "decoder_layers_to_keep": None, "base_layers": 0,
    "use_ofasys": False, "share_attn_bias": False,
}  # fmt: skip
_REQUIRED_OF_HF: dict[str, Any] = {
    "encoder_normalize_before": True, "decoder_normalize_before": True, "share_decoder_input_output_embed": True,
    "encoder_layerdrop": 0, "decoder_layerdrop": 0, "use_ofasys": False, "share_attn_bias": False,
    "use_gamma_feature": False, "use_image_feature": True, "attn_scale_factor": 2,
}  # fmt: skip

_DEFAULT = OFAConfig()
_FIELDS_OF_HF = frozenset(OFAConfig.__annotations__) - {"use_cache", "tie_word_embeddings", "is_encoder_decoder"}


def parse_fairseq_flags(flags: Sequence[str]) -> dict[str, Any]:
    """Command line flags as arguments by name; a flag without a value is True.

    >>> parse_fairseq_flags(["--scale-attn", "--encoder-layers", "2", "--dropout=0.1", "--resnet-type", "resnet50"])
    {'scale_attn': True, 'encoder_layers': 2, 'dropout': 0.1, 'resnet_type': 'resnet50'}
    """
    found: dict[str, Any] = {}
    name = ""
    for part in (p for flag in flags for p in (flag.split("=", 1) if flag.startswith("--") else [flag])):
        if part.startswith("--"):
            name = part[2:].replace("-", "_")
            found[name] = True
        elif not name or found[name] is not True:
            raise PituningError(f"flag value {part!r} follows no flag")
        else:
            found[name] = _number(part)
    return found


def config_from_fairseq(args: Mapping[str, Any] | Namespace, state: Mapping[str, Tensor] | None = None) -> OFAConfig:
    """The configuration that a fairseq training's arguments describe.

    Args:
        args: arguments by name, ``arch`` among them; what is left out has the architecture's default. Arguments that do
            not concern the backbone are ignored.
        state: the checkpoint's tensors, under fairseq's names or ours. They decide what the arguments leave out, and
            the image stem's size, for which the arguments have no more than a name.

    Raises:
        PituningError: for an argument that OFA's code knows and ours does not support, a value of the wrong kind, or
            arguments that contradict the tensors; all of them are listed.
    """
    given = vars(args) if isinstance(args, Namespace) else args
    if not given:
        raise PituningError(
            "the checkpoint has neither args nor cfg.model: what is not visible in the tensors (attn_scale_factor, "
            "disable_entangle, …) is unknown"
        )
    widths = {
        k: given.get("encoder_embed_dim") for k in ("decoder_embed_dim", "decoder_input_dim", "decoder_output_dim")
    }
    _require(given, {**_REQUIRED, **{k: w for k, w in widths.items() if w is not None}}, "the arguments")
    said = _said(given)
    found = {} if state is None else _settings_of_tensors(state)
    _require_agreement(said, found)
    defaults = _architecture(given, found)
    return OFAConfig(**_with_stem({**defaults, **said}, found))


def config_from_hf(values: Mapping[str, Any], state: Mapping[str, Tensor]) -> OFAConfig:
    """The configuration of a model in the Hugging Face format of OFA's own branch.

    Args:
        values: its ``config.json``.
        state: its tensors.

    Raises:
        PituningError: as :func:`config_from_fairseq`.
    """
    _require(values, _REQUIRED_OF_HF, "config.json")
    ours = {k: v for k, v in values.items() if k in _FIELDS_OF_HF and v is not None}
    if "normformer" in values:
        ours |= dict.fromkeys(("scale_attn", "scale_fc"), bool(values["normformer"]))
    for side in ("source", "target"):
        if "max_position_embeddings" in values:
            ours[f"max_{side}_positions"] = values["max_position_embeddings"]
    entangled = bool(values.get("entangle_position_embedding")) and not values.get("disable_entangle")
    ours["decoder_entangle_position_embedding"] = entangled
    found = _settings_of_tensors(state)
    _require_agreement(ours, found)
    return OFAConfig(**_with_stem({**found, **ours}, found))


def unsaid(args: Mapping[str, Any]) -> list[str]:
    """Arguments that change what a model computes, cannot be seen in its tensors, and are missing."""
    return [name for name in _SILENT if args.get(name) is None]


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _require(given: Mapping[str, Any], required: Mapping[str, Any], where: str) -> None:
    problems = []
    for name, wanted in required.items():
        value = given.get(name)
        if value is not None and value != wanted:
            problems.append(f"{name} = {value!r} is not supported, it must be {wanted!r}")
    if problems:
        raise PituningError(f"{where} describe an OFA that this library cannot run:" + listed(problems))


def _said(given: Mapping[str, Any]) -> dict[str, Any]:
    """Our settings as far as the arguments say them."""
    said = {ours: given[name] for name, ours in _SAME.items() if given.get(name) is not None}
    activation = given.get("activation_fn")
    if activation is not None:
        if activation not in _ACTIVATIONS:
            raise unknown_name("activation", str(activation), _ACTIVATIONS)
        said["activation_function"] = _ACTIVATIONS[activation]
    rate = given.get("activation_dropout") or given.get("relu_dropout")
    if rate is not None:
        said["activation_dropout"] = rate
    for name, ours in (
        ("no_scale_embedding", "scale_embedding"),
        ("disable_entangle", "decoder_entangle_position_embedding"),
    ):
        if given.get(name) is not None:
            said[ours] = not given[name]
    problems = []
    for name, value in said.items():
        wanted = type(getattr(_DEFAULT, name))
        fits = isinstance(value, wanted) or (wanted is float and isinstance(value, int))
        if not fits or (wanted is not bool and isinstance(value, bool)):
            problems.append(f"{name} is {value!r}, expected {wanted.__name__}")
    if problems:
        raise PituningError("the checkpoint's arguments are not valid:" + listed(problems))
    return said


def _architecture(given: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Our settings where the arguments say nothing: the architecture's, and what the tensors show."""
    arch = str(given.get("arch") or given.get("_name") or "")
    defaults: dict[str, Any] = {"dropout": 0.0, "decoder_entangle_position_embedding": True}
    defaults |= dict.fromkeys(_OFF_UNLESS_SAID, False)
    size = SIZES.get(arch.removeprefix("ofa_")) if arch.startswith("ofa_") else None
    if size is not None:
        defaults |= {"decoder_layers": size["encoder_layers"], **size, "encoder_ffn_dim": 4 * size["d_model"]}
        defaults["decoder_attention_heads"] = size["encoder_attention_heads"]
    elif not found:
        raise unknown_name("architecture", arch, [f"ofa_{s}" for s in SIZES], "The arguments need arch=….")
    return {**defaults, **{k: v for k, v in found.items() if not k.startswith("resnet_")}}


def _with_stem(settings: dict[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the image stem that the tensors show."""
    stem = {k: v for k, v in found.items() if k.startswith("resnet_")}
    if stem:
        settings = {k: v for k, v in settings.items() if k != "resnet_type"} | stem
        named = [t for t, layers in RESNET_LAYERS.items() if layers == stem.get("resnet_layers")]
        if named:
            settings["resnet_type"] = named[0]
    return settings


def _settings_of_tensors(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the tensors' names and shapes show; tensors that are missing show nothing."""
    shapes = {our_name(k).removeprefix(PREFIX): tuple(t.shape) for k, t in state.items()}
    found: dict[str, Any] = {}

    def show(setting: str, tensor: str, dimension: int) -> None:
        if tensor in shapes and dimension < len(shapes[tensor]):
            found[setting] = shapes[tensor][dimension]

    show("vocab_size", "encoder.embed_tokens.weight", 0)
    show("d_model", "encoder.embed_tokens.weight", 1)
    show("type_vocab_size", "encoder.type_embedding.weight", 0)
    show("max_source_positions", "encoder.embed_positions.weight", 0)
    show("max_target_positions", "decoder.embed_positions.weight", 0)
    show("token_bucket_size", "encoder.token_rel_pos_table_list.0.weight", 0)
    show("image_bucket_size", "encoder.embed_image_positions.weight", 0)
    show("resnet_stem_width", "encoder.embed_images.conv1.weight", 0)
    for side in ("encoder", "decoder"):
        show(f"{side}_attention_heads", f"{side}.token_rel_pos_table_list.0.weight", 1)
        show(f"{side}_ffn_dim", f"{side}.layers.0.fc1.weight", 0)
        if layers := _count(shapes, rf"{side}\.layers\.(\d+)\."):
            found[f"{side}_layers"] = layers
    rows: dict[str, Any] = {
        "max_source_positions": lambda n: n - 2,
        "max_target_positions": lambda n: n - 2,
        "token_bucket_size": lambda n: (n + 1) // 2,
        "image_bucket_size": lambda n: math.isqrt(max(n - 1, 0)),
    }
    found |= {name: size(found[name]) for name, size in rows.items() if name in found}
    blocks = [_count(shapes, rf"encoder\.embed_images\.layer{i}\.(\d+)\.") for i in (1, 2, 3)]
    widths = [shapes.get(f"encoder.embed_images.layer{i}.0.conv1.weight", (0,))[0] for i in (1, 2, 3)]
    if all(blocks) and all(widths):
        found |= {"resnet_layers": blocks, "resnet_widths": widths}
    if shapes:
        found |= {setting: any(re.search(p, k) for k in shapes) for setting, p in _PRESENT.items()}
    return found


_PRESENT = {
    "layernorm_embedding": r"^(encoder|decoder)\.layernorm_embedding\.",
    "patch_layernorm_embedding": r"^encoder\.patch_layernorm_embedding\.",
    "code_layernorm_embedding": r"^decoder\.code_layernorm_embedding\.",
    "add_type_embedding": r"^encoder\.type_embedding\.",
    "scale_attn": r"\.(self|cross)_attn_mid_layer_norm\.",
    "scale_fc": r"\.ffn_layer_norm\.",
    "scale_heads": r"\.c_attn$",
    "scale_resids": r"\.w_resid$",
}


def _count(shapes: Mapping[str, Any], pattern: str) -> int:
    return max((int(found[1]) + 1 for k in shapes if (found := re.match(pattern, k))), default=0)


def _require_agreement(said: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    problems = [
        f"{name} is {said[name]!r}, but the tensors have {found[name]!r}"
        for name in said
        if name in found and said[name] != found[name]
    ]
    stem = (found.get("resnet_stem_width"), found.get("resnet_widths"))
    kind = said.get("resnet_type")
    if kind is not None and stem == PUBLISHED_WIDTHS and RESNET_LAYERS.get(kind) != found["resnet_layers"]:
        problems.append(f"resnet_type is {kind!r}, but the tensors have {found['resnet_layers']} blocks")
    if problems:
        raise PituningError("the checkpoint's arguments contradict its tensors:" + listed(problems))
