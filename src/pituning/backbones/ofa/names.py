"""Names of OFA's tensors: fairseq's, the Hugging Face format's, and ours.

Ours are those of the Hugging Face format below ``model.``; the output projection and the decoder's embeddings are tied to
``model.encoder.embed_tokens.weight`` and have no entry of their own. Tables of indices (relative position buckets, position
ids) are computed, not stored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pituning.errors import PituningError

PREFIX = "model."
EMBEDDING = "model.encoder.embed_tokens.weight"
TIED = ("model.decoder.embed_tokens.weight", "lm_head.weight")

# (stacks, part of a layer in fairseq, the same part in ours). Each is matched as a whole part of the name, right behind the
# layer's number: "attn_ln" also ends "self_attn_ln" and "cross_attn_ln".
_PARTS = (
    ("encoder", "attn_ln", "self_attn_mid_layer_norm"),
    ("decoder", "self_attn_ln", "self_attn_mid_layer_norm"),
    ("decoder", "cross_attn_ln", "cross_attn_mid_layer_norm"),
    ("decoder", "encoder_attn", "cross_attn"),
    ("decoder", "encoder_attn_layer_norm", "cross_attn_layer_norm"),
    ("encoder|decoder", "ffn_layernorm", "ffn_layer_norm"),
)
_TO_OURS = [(re.compile(rf"^((?:{s})\.layers\.\d+)\.{a}\."), rf"\1.{b}.") for s, a, b in _PARTS]
_TO_FAIRSEQ = [(re.compile(rf"^((?:{s})\.layers\.\d+)\.{b}\."), rf"\1.{a}.") for s, a, b in _PARTS]
_INDEX_TABLE = re.compile(r"^(encoder|decoder)\.(version|token_rp_bucket|image_rp_bucket|image_position_idx)$")
_FAIRSEQ_TIED = ("decoder.embed_tokens.weight", "decoder.output_projection.weight")
_EXPERT = re.compile(
    r"^(?:encoder|decoder)\.(?:"
    r"layers\.\d+\.adapters?[12]\."
    r"|layers\.\d+\.adapter_interpolation_weight[12]$"
    r"|layers\.\d+\.(?:self_attn|encoder_attn)\.(?:q|k|v|out)_proj\.(?:\d+\.|lora_[AB]$)"
    r"|layers\.\d+\.(?:self_attn|encoder_attn)\.lora_interpolation_weight$"
    r"|(?:encoder|decoder)_prompt_encoder\."
    r"|prompt_weight_scale$)"
)


@dataclass(frozen=True)
class FairseqParts:
    """A fairseq state taken apart.

    Attributes:
        backbone: the backbone's tensors under our names; what OFA does not know keeps its name here.
        expert: adapters, LoRA factors, prefix encoders and their weights under fairseq's names. For interpolated LoRA
            this includes each expert's own copy of the projections.
        tables: tables of indices, under fairseq's names.
    """

    backbone: dict[str, Tensor]
    expert: dict[str, Tensor]
    tables: dict[str, Tensor]


def our_name(name: str) -> str:
    """Our name of a tensor of fairseq's, or of the Hugging Face format's; an unknown one is returned unchanged.

    >>> our_name("encoder.layers.3.attn_ln.weight")
    'model.encoder.layers.3.self_attn_mid_layer_norm.weight'
    >>> our_name("decoder.layers.0.encoder_attn.q_proj.bias")
    'model.decoder.layers.0.cross_attn.q_proj.bias'
    """
    name = name.removeprefix(PREFIX)
    for pattern, replacement in _TO_OURS:
        name, found = pattern.subn(replacement, name)
        if found:
            break
    return PREFIX + name if name.startswith(("encoder.", "decoder.")) else name


def fairseq_name(name: str) -> str:
    """fairseq's name of one of our tensors.

    >>> fairseq_name("model.decoder.layers.0.cross_attn_mid_layer_norm.bias")
    'decoder.layers.0.cross_attn_ln.bias'
    """
    name = name.removeprefix(PREFIX)
    for pattern, replacement in _TO_FAIRSEQ:
        name, found = pattern.subn(replacement, name)
        if found:
            break
    return name


def split_fairseq(state: Mapping[str, Tensor]) -> FairseqParts:
    """Take a fairseq state apart into backbone, expert and tables of indices.

    Raises:
        PituningError: if the copies of the token embeddings differ, or two tensors have the same name in ours.
    """
    tables = {k: t for k, t in state.items() if _INDEX_TABLE.match(k)}
    expert = {k: t for k, t in state.items() if _EXPERT.match(k)}
    rest = {k: t for k, t in state.items() if k not in tables and k not in expert}
    return FairseqParts(_renamed(rest), expert, tables)


def state_from_fairseq(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a fairseq backbone under our names.

    Raises:
        PituningError: if the state holds an expert, which would be lost; or see :func:`split_fairseq`.
    """
    parts = split_fairseq(state)
    if parts.expert:
        raise PituningError(
            f"this state holds an expert ({len(parts.expert)} tensors such as {next(iter(parts.expert))}), which a "
            "backbone has no place for; split_fairseq gives both parts, experts_from_fairseq imports the expert"
        )
    return parts.backbone


def state_to_fairseq(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`state_from_fairseq`: our tensors under fairseq's names, the tied ones written out."""
    named = {fairseq_name(k): t for k, t in state.items() if k not in TIED}
    return {**named, **dict.fromkeys(_FAIRSEQ_TIED, state[EMBEDDING])}


def state_from_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model in the Hugging Face format (OFA's own branch, or one of ours) under our names.

    Raises:
        PituningError: see :func:`split_fairseq`.
    """
    plain = {k.removeprefix(PREFIX): t for k, t in state.items()}
    head = {"decoder.output_projection.weight": plain.pop("lm_head.weight")} if "lm_head.weight" in plain else {}
    return _renamed({k: t for k, t in {**plain, **head}.items() if not _INDEX_TABLE.match(k)})


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for name, tensor in state.items():
        if name in _FAIRSEQ_TIED and "encoder.embed_tokens.weight" in state:
            _require_tied(name, tensor, state["encoder.embed_tokens.weight"])
            continue
        ours = our_name(name)
        if ours in named:
            raise PituningError(f"tensors {origin[ours]} and {name} are both {ours}; one of them is not OFA's")
        named[ours], origin[ours] = tensor, name
    # FrozenBatchNorm2d has no such counter, and it has no effect on what a model computes
    for name in [n for n in named if n.endswith(".running_mean")]:
        named.setdefault(name.replace(".running_mean", ".num_batches_tracked"), torch.tensor(0))
    return named


def _require_tied(name: str, copy: Tensor, embedding: Tensor) -> None:
    if copy.shape != embedding.shape:
        difference = f"their shapes are {list(copy.shape)} and {list(embedding.shape)}"
    elif not torch.equal(copy, embedding):
        rows = (copy != embedding).any(dim=1)
        difference = f"{int(rows.sum())} of {len(rows)} rows differ, the first is row {int(rows.nonzero()[0])}"
    else:
        return
    raise PituningError(
        f"{name} must equal encoder.embed_tokens.weight, to which OFA ties it, but {difference}; untied embeddings are "
        "not supported"
    )
