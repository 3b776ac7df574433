"""From experts to a mixture and the PEFT configuration that can carry it, or a refusal that says why not."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from pituning.errors import ExpertError, RefusedError
from pituning.experts.expert import Expert
from pituning.interpolation.mixture import TRAIN_MODES, LowRank, Mixture, ParameterMixture, ProductMixture
from pituning.methods.prefix import is_folded

GRANULARITIES = ("model", "layer", "attention", "module", "tensor")
PREFIX = "base_model.model."
_ADAPTER_PART = re.compile(
    r"\.(lora_[AB]|bottleneck_(down|up)|prefix_(key|value|embedding|down|up)|bitfit_bias)(\.(weight|bias))?$"
)
# self_attn, cross_attn, encoder_attn, attention, SelfAttention, EncDecAttention …, but not self_attn_output or a norm
_ATTENTION = re.compile(r"(.*_)?attn|.*attention", re.IGNORECASE)
_LORA_KEY = re.compile(r"^(?P<module>.+)\.lora_(?P<factor>[AB])\.weight$")
# Settings, with their defaults, that say what a method's tensors do.
_MEANING: dict[str, dict[str, Any]] = {"BOTTLENECK": {"activation": "relu", "scaling": 1.0}}
# Settings that change the base weights or the meaning of the factors have no exact product form.
_LORA_REFUSED = ("use_dora", "lora_bias", "modules_to_save", "target_parameters", "trainable_token_indices")


def group_name(key: str, granularity: str) -> str:
    """Name of the group whose weights a tensor uses.

    ``model``: one group; ``layer``: one per numbered block; ``attention``: one per attention block for all of its
    projections (what the paper's code does for LoRA), otherwise as ``module``; ``module``: one per adapted module (what
    it does for adapters); ``tensor``: one per tensor.

    >>> group_name("base_model.model.encoder.layer.3.output.dense.bottleneck_up.bias", "layer")
    'encoder.layer.3'
    >>> group_name("base_model.model.encoder.layer.3.output.dense.bottleneck_up.bias", "module")
    'encoder.layer.3.output.dense'
    >>> group_name("base_model.model.model.encoder.layers.0.self_attn.q_proj.lora_A.weight", "attention")
    'model.encoder.layers.0.self_attn'
    """
    if granularity not in GRANULARITIES:
        raise RefusedError(f"granularity must be one of {', '.join(GRANULARITIES)}, not {granularity!r}")
    name = key.removeprefix(PREFIX)
    if granularity == "model":
        return "model"
    if granularity == "tensor":
        return name
    module = _ADAPTER_PART.sub("", name)
    if granularity == "module":
        return module
    if granularity == "attention":
        return _attention_block(module) or module
    block = re.match(r"^(.*?\.\d+)(\.|$)", module)
    return block.group(1) if block else module


def _attention_block(module: str) -> str | None:
    """The outermost attention block that a module is a projection of, or is itself."""
    parts = module.split(".")
    if "norm" in parts[-1].lower():
        return None
    depth = next((i for i, part in enumerate(parts) if _ATTENTION.fullmatch(part)), None)
    return None if depth is None else ".".join(parts[: depth + 1])


def group_names(experts: Sequence[Expert], granularity: str) -> list[str]:
    """Groups of a set of experts, in the order of their tensors. LoRA's two factors always share a group."""
    return list(dict.fromkeys(group_name(key, granularity) for expert in experts for key in _units(expert)))


def is_lora(expert: Expert) -> bool:
    """Whether the expert interpolates in product space."""
    return expert.config.get("peft_type") == "LORA"


def build_mixture(
    experts: Sequence[Expert],
    weights: Tensor | Sequence[float] | None = None,
    *,
    granularity: str = "module",
    train: str = "shared",
    temperature: float = 1.0,
    train_weights: bool = True,
    initial: Mapping[str, Tensor] | None = None,
) -> tuple[Mixture, dict[str, Any]]:
    """The mixture of some experts, and the PEFT configuration to attach for it.

    Args:
        experts: K ≥ 1 experts of one method and one backbone.
        weights: ``[K]`` for every group, or ``[groups, K]`` in the order of :func:`group_names`; uniform by default.
        initial: for LoRA with ``train="shared"``, the method's initial tensors: they start the new factor pair δ.

    Raises:
        RefusedError: if the experts have no exact interpolation; the message names the experts and the reason.
    """
    if not experts:
        raise RefusedError("an interpolation needs at least one expert")
    if train not in TRAIN_MODES:
        raise RefusedError(f"train must be one of {', '.join(TRAIN_MODES)}, not {train!r}")
    if temperature <= 0:
        raise RefusedError(f"temperature must be positive, not {temperature}")
    _require_compatible(experts)
    names = group_names(experts, granularity)
    rows = _weight_rows(weights, len(names), experts)
    index = {name: i for i, name in enumerate(names)}
    if not is_lora(experts[0]):
        groups = {key: index[group_name(key, granularity)] for key in experts[0].tensors}
        tensors = [{k: e.tensors[k] for k in experts[0].tensors} for e in experts]
        mixture: Mixture = ParameterMixture(tensors, groups, rows, train, temperature, train_weights)
        return mixture, dict(experts[0].config)
    factors = [lora_factors(e) for e in experts]
    modules = {module for f in factors for module in f}
    groups = {module: index[group_name(f"{module}.lora_A", granularity)] for module in modules}
    delta = _fresh_factors(factors, initial) if train == "shared" else None
    product = ProductMixture(factors, groups, rows, train, temperature, train_weights, delta)
    if product.single:
        return product, dict(experts[0].config)
    ranks = {m: a.shape[0] for m, (a, _) in product.factors().items()}
    return product, lora_config(ranks, experts[0].config)


def lora_factors(expert: Expert) -> dict[str, LowRank]:
    """The LoRA factors of an expert by module, each with the scaling that its own configuration gives it.

    Raises:
        RefusedError: for DoRA, LoRA biases, saved modules and other settings that have no exact product form.
        ExpertError: if a module lacks one of its factors.
    """
    config = expert.config
    refused = [s for s in _LORA_REFUSED if config.get(s)]
    if config.get("bias", "none") != "none":
        refused.append(f"bias={config['bias']!r}")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian"):
        refused.append(f"init_lora_weights={config['init_lora_weights']!r}")
    if refused:
        raise RefusedError(
            f"expert {expert.name!r} uses {', '.join(refused)}: its effect is not Σ w s B A, so it cannot be "
            "interpolated exactly in product space"
        )
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in expert.tensors.items():
        match = _LORA_KEY.match(key)
        if not match:
            raise RefusedError(f"expert {expert.name!r}: tensor {key} {list(tensor.shape)} is not a LoRA factor")
        halves.setdefault(match["module"], {})[match["factor"]] = tensor
    factors = {}
    for module, half in halves.items():
        if set(half) != {"A", "B"}:
            raise ExpertError(f"expert {expert.name!r}: module {module} has only lora_{next(iter(half))}")
        factors[module] = LowRank(half["A"], half["B"], _scaling(config, module, half["A"].shape[0]))
    return factors


def lora_config(ranks: Mapping[str, int], template: Mapping[str, Any]) -> dict[str, Any]:
    """A LoRA configuration with the given rank and scaling 1 on exactly the given modules."""
    config = dict(template)
    names = {module.removeprefix(PREFIX): rank for module, rank in ranks.items()}
    common = max(set(names.values()), key=list(names.values()).count)
    pattern = {name: rank for name, rank in names.items() if rank != common}
    config.update(
        r=common,
        lora_alpha=common,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        use_rslora=False,
        target_modules=sorted(names),
        layers_to_transform=None,
        layers_pattern=None,
        exclude_modules=None,
    )
    return config


def _units(expert: Expert) -> list[str]:
    if not is_lora(expert):
        return list(expert.tensors)
    return list(dict.fromkeys(f"{m['module']}.lora_A" for k in expert.tensors if (m := _LORA_KEY.match(k))))


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    patterns = config.get("alpha_pattern") or {}
    key = get_pattern_key(patterns.keys(), module.removeprefix(PREFIX))
    alpha = float(patterns.get(key, config["lora_alpha"]))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _fresh_factors(
    experts: Sequence[Mapping[str, LowRank]], initial: Mapping[str, Tensor] | None
) -> dict[str, LowRank]:
    delta: dict[str, LowRank] = {}
    for name, like in {n: f for e in experts for n, f in e.items()}.items():
        key = f"{name}.lora_A.weight"
        if initial is None or key not in initial:
            raise RefusedError(f"train='shared' needs the method's initial tensors, and {key} is not among them")
        a = initial[key].to(like.a)
        delta[name] = LowRank(a, like.b.new_zeros(like.b.shape[0], a.shape[0]), like.scaling)
    return delta


def _weight_rows(weights: Tensor | Sequence[float] | None, groups: int, experts: Sequence[Expert]) -> Tensor:
    count = len(experts)
    if weights is None:
        weights = torch.full((count,), 1 / count)
    # float32 weights serve float32 experts; a float64 expert asks for float64 weights
    dtype = next(iter(experts[0].tensors.values())).dtype
    rows = torch.as_tensor(weights, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    if rows.dim() == 1:
        rows = rows.expand(groups, -1)
    if rows.shape != (groups, count):
        raise RefusedError(f"weights have shape {list(rows.shape)}, expected [{count}] or [{groups}, {count}]")
    if (rows < 0).any() or not torch.allclose(rows.sum(1), rows.new_ones(groups), atol=1e-4):
        raise RefusedError("softmax weights must be non-negative and sum to one in every group")
    return rows / rows.sum(1, keepdim=True)


def _require_compatible(experts: Sequence[Expert]) -> None:
    first = experts[0]
    for other in experts[1:]:
        if other.config.get("peft_type") != first.config.get("peft_type"):
            raise RefusedError(
                f"experts {first.name!r} ({first.card.method}) and {other.name!r} ({other.card.method}) are of "
                "different methods and have no common parameter space"
            )
    known = [e for e in experts if e.card.fingerprint]
    for other in known[1:]:
        if other.card.fingerprint != known[0].card.fingerprint:
            raise RefusedError(f"experts {known[0].name!r} and {other.name!r} belong to different backbones")
    if is_lora(first):
        return
    for other in experts[1:]:
        _require_same_meaning(first, other)
    shapes = {k: tuple(t.shape) for k, t in first.tensors.items()}
    for other in experts[1:]:
        found = {k: tuple(t.shape) for k, t in other.tensors.items()}
        for key in sorted(shapes.keys() | found.keys()):
            if shapes.get(key) != found.get(key):
                raise RefusedError(
                    f"experts {first.name!r} and {other.name!r} cannot be averaged: tensor {key} has shape "
                    f"{_shape(shapes.get(key))} in the first and {_shape(found.get(key))} in the second"
                )
        if first.card.init_hash and other.card.init_hash and first.card.init_hash != other.card.init_hash:
            warnings.warn(
                f"experts {first.name!r} and {other.name!r} started from different initialisations: their hidden units may "
                "be in different orders, and an average of them may mean little",
                stacklevel=3,
            )


def _require_same_meaning(first: Expert, other: Expert) -> None:
    """Refuse experts whose tensors stand for different functions: one of the two would not run as it was trained."""
    for expert in (first, other):
        if not is_folded(expert.config):
            raise RefusedError(
                f"expert {expert.name!r} is a prefix with projection: its network's parameters have no common space with "
                "another's; turn it into keys and values with pituning.methods.folded(config, tensors)"
            )
    for setting, default in _MEANING.get(str(first.config.get("peft_type")), {}).items():
        mine, theirs = (e.config.get(setting, default) for e in (first, other))
        if mine != theirs:
            raise RefusedError(
                f"experts {first.name!r} and {other.name!r} cannot be averaged: their {setting} is {mine!r} and {theirs!r}"
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "no such tensor" if shape is None else str(list(shape))
