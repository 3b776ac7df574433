"""From experts to a mixture and the PEFT configuration that can carry it, or a refusal that says why not."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from pituning.errors import ExpertError, RefusedError
from pituning.experts.expert import Expert, tensor_hash
from pituning.interpolation.coefficients import Coefficients
from pituning.interpolation.mixture import TRAIN_MODES, LowRank, Mixture, ParameterMixture, ProductMixture, sums_to_one
from pituning.methods.prefix import is_folded
from pituning.problems import listed

GRANULARITIES = ("model", "encoder-decoder", "layer", "attention", "module", "tensor")
Granularity = str | Callable[[str], str]
"""One of :data:`GRANULARITIES`, or a function from an adapted module's name to the name of its group."""

PREFIX = "base_model.model."
_ADAPTER_PART = re.compile(
    r"\.(lora_[AB]|bottleneck_(down|up)|prefix_(key|value|embedding|down|up)|bitfit_bias|ia3_l|prompt_embedding|"
    r"ln_tuning_layers)(\.(weight|bias))?$"
)
# self_attn, cross_attn, encoder_attn, attention, SelfAttention, EncDecAttention …, but not self_attn_output or a norm
_ATTENTION = re.compile(r"(.*_)?attn|.*attention", re.IGNORECASE)
_LORA_KEY = re.compile(r"^(?P<module>.+)\.lora_(?P<factor>A\.weight|B\.weight|B\.bias)$")
# Methods whose tensors are averaged, with those settings, and their defaults, that say what the tensors do.
MEANING: dict[str, dict[str, Any]] = {
    "BOTTLENECK": {"activation": "relu", "scaling": 1.0},
    "PREFIX_KV": {},
    "SOFT_PROMPT": {},
    "BITFIT": {},
    "IA3": {"feedforward_modules": None},
    "LN_TUNING": {},
}
ZEROS = {
    "BITFIT": 0.0,
    "IA3": 1.0,
}  # methods whose experts start where they change nothing, and the value of all tensors there
# Settings that change the base weights or the meaning of the factors have no exact product form.
_LORA_REFUSED = (
    "use_dora", "modules_to_save", "target_parameters", "trainable_token_indices", "alora_invocation_tokens",
)  # fmt: skip


def group_name(key: str, granularity: Granularity) -> str:
    """Name of the group whose weights a tensor uses.

    ``model``: one group; ``encoder-decoder``: one for each of the two stacks, and ``model`` for what is in neither; ``layer``:
    one per numbered block; ``attention``: one per attention block for all of its projections (what the paper's code does
    for LoRA), otherwise as ``module``; ``module``: one per adapted module (what it does for adapters); ``tensor``: one per
    tensor. A function is given the module's name and says the group's.

    >>> group_name("base_model.model.encoder.layer.3.output.dense.bottleneck_up.bias", "layer")
    'encoder.layer.3'
    >>> group_name("base_model.model.encoder.layer.3.output.dense.bottleneck_up.bias", "module")
    'encoder.layer.3.output.dense'
    >>> group_name("base_model.model.model.encoder.layers.0.self_attn.q_proj.lora_A.weight", "attention")
    'model.encoder.layers.0.self_attn'
    >>> group_name("base_model.model.decoder.block.1.layer.0.SelfAttention.q.lora_A.weight", "encoder-decoder")
    'decoder'
    >>> group_name("base_model.model.layers.7.mlp.up_proj.lora_A.weight", lambda module: module.split(".")[-2])
    'mlp'
    """
    name = key.removeprefix(PREFIX)
    if granularity == "tensor":
        return name
    module = _ADAPTER_PART.sub("", name)
    if not isinstance(granularity, str):
        return str(granularity(module))
    if granularity == "model":
        return "model"
    if granularity == "encoder-decoder":
        return next((part for part in module.split(".") if part in ("encoder", "decoder")), "model")
    if granularity == "module":
        return module
    if granularity == "attention":
        return _attention_block(module) or module
    if granularity == "layer":
        block = re.match(r"^(.*?\.\d+)(\.|$)", module)
        return block.group(1) if block else module
    raise RefusedError(f"granularity must be a function or one of {', '.join(GRANULARITIES)}, not {granularity!r}")


def _attention_block(module: str) -> str | None:
    """The outermost attention block that a module is a projection of, or is itself."""
    parts = module.split(".")
    if "norm" in parts[-1].lower():
        return None
    depth = next((i for i, part in enumerate(parts) if _ATTENTION.fullmatch(part)), None)
    return None if depth is None else ".".join(parts[: depth + 1])


def group_names(experts: Sequence[Expert], granularity: Granularity) -> list[str]:
    """Groups of a set of experts, in the order of their tensors. LoRA's two factors always share a group."""
    return list(dict.fromkeys(group_name(key, granularity) for expert in experts for key in _units(expert).values()))


def is_lora(expert: Expert) -> bool:
    """Whether the expert interpolates in product space."""
    return expert.config.get("peft_type") == "LORA"


def _mixes_in_product_space(experts: Sequence[Expert], kind: Coefficients) -> bool:
    """Whether these experts are LoRA's and mix as ΔW; a single one without exact product form runs as it is."""
    return is_lora(experts[0]) and not (kind.sums_to_one and len(experts) == 1 and without_product_form(experts[0]))


def build_mixture(
    experts: Sequence[Expert],
    weights: Tensor | Sequence[float] | None = None,
    *,
    granularity: Granularity = "module",
    train: str = "shared",
    coefficients: str = "softmax",
    temperature: float = 1.0,
    scale: float = 1.0,
    train_weights: bool = True,
    initial: Mapping[str, Tensor] | None = None,
) -> tuple[Mixture, dict[str, Any]]:
    """The mixture of some experts, and the PEFT configuration to attach for it.

    Args:
        experts: K ≥ 1 experts of one method and one backbone.
        weights: ``[K]`` for every group, or ``[groups, K]`` in the order of :func:`group_names`; uniform by default.
        granularity, train, coefficients, temperature: see :func:`group_name`, :class:`Mixture` and :class:`Coefficients`.
        scale: what the weights, which are shares of one, are multiplied by; softmax weights alone have one.
        initial: the method's initial tensors. They start the new factor pair δ of LoRA with ``train="shared"``, and are the
            φ_0 of weights that need not sum to one for methods other than LoRA, BitFit and IA3, which change nothing there;
            linear weights that sum to one and are not trained need none.

    Raises:
        RefusedError: if the experts have no exact interpolation; the message names the experts and the reason.
    """
    if not experts:
        raise RefusedError("an interpolation needs at least one expert")
    if train not in TRAIN_MODES:
        raise RefusedError(f"train must be one of {', '.join(TRAIN_MODES)}, not {train!r}")
    kind = Coefficients(coefficients, temperature, scale)
    experts = on_cpu(experts)
    require_compatible(experts)
    names = group_names(experts, granularity)
    rows = _weight_rows(weights, len(names), experts) * scale
    kind.alpha(rows)  # the refusal, before anything is built
    index = {name: i for i, name in enumerate(names)}
    if not _mixes_in_product_space(experts, kind):
        groups = {key: index[group_name(unit, granularity)] for key, unit in _units(experts[0]).items()}
        tensors = [{k: e.tensors[k] for k in experts[0].tensors} for e in experts]
        needless = kind.sums_to_one or (train == "none" and sums_to_one(rows))
        base = None if needless else common_start(experts, initial)
        mixture: Mixture = ParameterMixture(tensors, groups, rows, train, kind, train_weights, base)
        return mixture, dict(experts[0].config)
    factors = [lora_factors(e) for e in experts]
    modules = {module for f in factors for module in f}
    groups = {module: index[group_name(f"{module}.lora_A", granularity)] for module in modules}
    delta = _fresh_factors(factors, initial) if train == "shared" else None
    product = ProductMixture(factors, groups, rows, train, kind, train_weights, delta)
    if product.single:
        return product, dict(experts[0].config)
    return product, lora_config(product.ranks(), product.has_bias, experts[0].config)


def on_cpu(experts: Sequence[Expert]) -> Sequence[Expert]:
    """The experts with their tensors on the CPU, where a pool's are, so that they can be combined with one another."""
    return [
        e
        if all(t.device.type == "cpu" for t in e.tensors.values())
        else replace(e, tensors={k: t.cpu() for k, t in e.tensors.items()})
        for e in experts
    ]


def without_product_form(expert: Expert) -> list[str]:
    """The settings of a LoRA expert whose effect is not Σ w s B A: DoRA, trained base biases, saved modules and the like."""
    config = expert.config
    found = [s for s in _LORA_REFUSED if config.get(s)]
    if config.get("bias", "none") != "none":
        found.append(f"bias={config['bias']!r}")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian"):
        found.append(f"init_lora_weights={config['init_lora_weights']!r}")
    return found


def lora_factors(expert: Expert) -> dict[str, LowRank]:
    """The LoRA factors of an expert by module, each with the scaling that its own configuration gives it.

    Raises:
        RefusedError: for DoRA, saved modules and other settings that have no exact product form.
        ExpertError: if a module lacks one of its factors.
    """
    config = expert.config
    if refused := without_product_form(expert):
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
        if missing := [f for f in ("A.weight", "B.weight") if f not in half]:
            raise ExpertError(f"expert {expert.name!r}: module {module} has no lora_{missing[0]}")
        a, b = half["A.weight"], half["B.weight"]
        if a.dim() != 2 or b.dim() != 2:
            raise RefusedError(
                f"expert {expert.name!r}: module {module} has factors {list(a.shape)} and {list(b.shape)}; only matrices "
                "are mixed"
            )
        factors[module] = LowRank(a, b, _scaling(config, module, a.shape[0]), half.get("B.bias"))
    return factors


def lora_config(ranks: Mapping[str, int], has_bias: bool, template: Mapping[str, Any]) -> dict[str, Any]:
    """A LoRA configuration of scaling 1 on exactly the modules whose ranks are given."""
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
        lora_bias=has_bias,
        target_modules=sorted(names),
        layers_to_transform=None,
        layers_pattern=None,
        exclude_modules=None,
    )
    return config


def common_start(experts: Sequence[Expert], initial: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """φ_0, from which weights that do not sum to one reach out.

    Raises:
        RefusedError: if the experts have none, or it is not given.
    """
    first = experts[0]
    kind = str(first.config.get("peft_type"))
    if kind in ZEROS:
        return {k: torch.full_like(t, ZEROS[kind]) for k, t in first.tensors.items()}
    why = "weights that do not sum to one need the experts' common start φ_0"
    if initial is None:
        raise RefusedError(
            f"{why}, and method {first.card.method!r} has none by itself: pass initial=…, or use softmax"
        )
    expected, found = ({k: list(t.shape) for k, t in m.items()} for m in (first.tensors, initial))
    if wrong := sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k)):
        none = "no such tensor"
        rows = (f"{k}: expected {expected.get(k, none)}, found {found.get(k, none)}" for k in wrong)
        raise RefusedError(f"{why}, and the given one has not the tensors of expert {first.name!r}:{listed(rows)}")
    start = tensor_hash(initial)
    for expert in experts:
        if expert.card.init_hash != start:
            raise RefusedError(
                f"{why}: expert {expert.name!r} started from {expert.card.init_hash or 'an unknown place'}, not from the "
                f"given {start}"
            )
    return {k: t.to(first.tensors[k].device) for k, t in initial.items()}


def _units(expert: Expert) -> dict[str, str]:
    """Tensor name → the name that says its group: LoRA's two factors, and what else a module of it has, share one."""
    if not is_lora(expert):
        return {key: key for key in expert.tensors}
    return {key: f"{m['module']}.lora_A" if (m := _LORA_KEY.match(key)) else key for key in expert.tensors}


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    patterns = config.get("alpha_pattern") or {}
    key = get_pattern_key(patterns.keys(), module.removeprefix(PREFIX))
    alpha = float(patterns.get(key, config.get("lora_alpha", LoraConfig.lora_alpha)))
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
    return rows


def require_compatible(experts: Sequence[Expert]) -> None:
    """Raise unless the experts have a common space in which a weighted sum of them means something.

    Raises:
        RefusedError: names two experts and what differs, or the one that mixes with none.
    """
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
    _require_same_prompting(experts)
    if is_lora(first):
        return
    if len(experts) > 1 and str(first.config.get("peft_type")) not in MEANING:
        raise RefusedError(
            f"experts of method {first.card.method!r} have no interpolation: a weighted sum of their tensors is not the "
            f"weighted sum of what they do; of this method only one expert runs, and {len(experts)} were given"
        )
    for expert in experts if len(experts) > 1 else ():
        if expert.config.get("modules_to_save"):
            raise RefusedError(
                f"expert {expert.name!r} holds whole modules of its own ({', '.join(expert.config['modules_to_save'])}), "
                "such as a head: those are not averaged; leave them out on import, or use it alone"
            )
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


def prompting_of(experts: Sequence[Expert]) -> dict[str, Any]:
    """How prompts are made, for ``training`` on the card of an expert made of others; empty where none of theirs says it."""
    found = [e.card.training["prompting"] for e in experts if "prompting" in e.card.training]
    return {"prompting": found[0]} if found else {}


def _require_same_prompting(experts: Sequence[Expert]) -> None:
    known = [e for e in experts if "prompting" in e.card.training]
    for other in known[1:]:
        mine, theirs = (e.card.training["prompting"] for e in (known[0], other))
        if mine != theirs:
            raise RefusedError(
                f"experts {known[0].name!r} and {other.name!r} were trained on differently made prompts ({_settings(mine)}; "
                f"{_settings(theirs)}), and a backbone makes them in one way only: leave one of the two out"
            )


def _settings(prompting: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in prompting.items())


def _require_same_meaning(first: Expert, other: Expert) -> None:
    """Refuse experts whose tensors stand for different functions: one of the two would not run as it was trained."""
    for expert in (first, other):
        if not is_folded(expert.config):
            raise RefusedError(
                f"expert {expert.name!r} is a prefix with projection: its network's parameters have no common space with "
                "another's; turn it into keys and values with pituning.methods.folded(config, tensors)"
            )
    for setting, default in MEANING.get(str(first.config.get("peft_type")), {}).items():
        mine, theirs = (e.config.get(setting, default) for e in (first, other))
        if _plain(mine) != _plain(theirs):
            raise RefusedError(
                f"experts {first.name!r} and {other.name!r} cannot be averaged: their {setting} is {mine!r} and {theirs!r}"
            )


def _plain(value: Any) -> Any:
    """A setting for comparison: lists of names have no order."""
    return sorted(value) if isinstance(value, list | tuple | set) else value


def _shape(shape: tuple[int, ...] | None) -> str:
    return "no such tensor" if shape is None else str(list(shape))
