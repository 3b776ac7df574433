"""Untrained merges of experts: baselines for everything that is trained, and building blocks.

A merge works on what the experts *change*: ΔW = s B A per module for LoRA (product space), φ − φ_0 per tensor for methods
whose tensors are averaged as they are (parameter space). Sums are exact in both: LoRA stacks its factors. Operators that
treat every entry of ΔW on its own (:func:`ties`, :func:`dare`) have a dense result; it is computed without approximation, in
float64, and then brought to a rank by truncated SVD, with the error reported.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pituning.errors import RefusedError, unknown_name
from pituning.experts.expert import Expert, ExpertCard, initial_of, tensor_hash
from pituning.interpolation.build import is_lora, on_cpu, prompting_of, require_compatible
from pituning.interpolation.changes import (
    Built,
    common_dtype,
    elementwise,
    factors_of,
    has_natural_start,
    linear,
    names,
    parameter_space,
)
from pituning.interpolation.collapse import require_finite
from pituning.interpolation.mixture import LowRank

if TYPE_CHECKING:
    from pituning.backbones.base import Backbone
    from pituning.similarity.embedding import TaskEmbedding

COMBINATIONS = ("linear", "ties")


@dataclass(frozen=True)
class Merged:
    """A merged expert, whose card tells operator, settings, weights and ``largest_error``.

    Attributes:
        errors: per module, ‖ΔW − B A‖ / ‖ΔW‖ of the truncation to the result's rank; 0 where nothing was cut off.
    """

    expert: Expert
    errors: Mapping[str, float]


def merge(experts: Sequence[Expert], operator: str, **settings: Any) -> Merged:
    """Merge experts by an operator of :data:`OPERATORS`.

    Args:
        settings: of the operator, see there.

    Raises:
        UnknownNameError: if there is no such operator, or it has no such setting.
        RefusedError: if a setting is missing, what is asked for has no exact meaning, or the result is not finite; the
            message names the experts.
        ExpertError: if an expert's tensors are incomplete or not finite.
    """
    if operator not in OPERATORS:
        raise unknown_name("operator", operator, OPERATORS)
    known = operator_settings(operator)
    for name in settings:
        if name not in known:
            raise unknown_name(f"setting of {operator}", name, known)
    if missing := [name for name, required in known.items() if required and name not in settings]:
        raise RefusedError(f"{operator} needs the setting {missing[0]!r}")
    return OPERATORS[operator](experts, **settings)


def repeat_merge(merged: Expert, parents: Sequence[Expert], backbone: Backbone | None = None) -> Expert | None:
    """Carry out the merge that an expert's card records once more, from the experts that it names.

    Args:
        parents: in the order of the card's lineage.
        backbone: needed where the operator asks for φ_0.

    Returns:
        the result; ``None`` where the card does not say enough: Fisher merging needs the embeddings that were used.

    Raises:
        as :func:`merge`.
    """
    record = merged.card.training
    operator = str(record["operator"])
    if operator == "fisher_merge" or operator not in OPERATORS:
        return None
    if operator == "greedy_soup":  # the card names those that were taken
        operator = "uniform_soup"
    known = operator_settings(operator)
    settings = {k: v for k, v in record.items() if k in known}
    if "weights" in known:
        settings["weights"] = [float(p["weight"]) for p in merged.card.lineage]
    if needs_initial(operator, parents[0]):
        if backbone is None:
            return None
        settings["initial"] = initial_of(backbone, parents[0])
    return merge(parents, operator, **settings).expert


def operator_settings(operator: str) -> dict[str, bool]:
    """Names of an operator's settings, each with whether it must be given.

    >>> operator_settings("greedy_soup")
    {'score': True, 'rank': False}
    """
    parameters = inspect.signature(OPERATORS[operator]).parameters.values()
    return {p.name: p.default is p.empty for p in parameters if p.kind is p.KEYWORD_ONLY}


def needs_initial(operator: str, expert: Expert) -> bool:
    """Whether the operator asks for φ_0, and the expert's method has no natural one."""
    return "initial" in operator_settings(operator) and not has_natural_start(expert)


def uniform_soup(experts: Sequence[Expert], *, rank: int | None = None) -> Merged:
    """The plain mean of the experts; of LoRA experts the mean of their ΔW.

    Args:
        rank: for LoRA, the largest rank of the result; ``None`` keeps the exact one, the sum of the experts' ranks.

    Source: Wortsman et al., "Model soups", ICML 2022, arXiv 2203.05482.
    """
    _require_mergeable(experts)
    return _soup(experts, "uniform_soup", {"rank": rank})


def greedy_soup(experts: Sequence[Expert], *, score: Callable[[Expert], float], rank: int | None = None) -> Merged:
    """The mean of those experts that lower the soup's loss, tried in the order of their own loss.

    The card's ``training`` keeps the ``log_losses`` of the experts and that of the soup, ``soup_log_loss``.

    Args:
        score: held-out log-loss of an expert, in nats; lower is better. Called once for each expert, and once for each
            soup that is tried.
        rank: as for :func:`uniform_soup`; the soups are scored at that rank.

    Raises:
        RefusedError: if a score is NaN, as no order follows from it.

    Source: Wortsman et al., "Model soups", ICML 2022, arXiv 2203.05482, recipe 1.
    """
    _require_mergeable(experts)
    losses = {e.name: _loss(score, e) for e in experts}
    first, *others = sorted(experts, key=lambda e: (losses[e.name], e.name))
    members, settings = [first], {"rank": rank, "log_losses": losses}
    best = losses[first.name] if rank is None else _loss(score, _soup(members, "greedy_soup", settings).expert)
    for expert in others:
        trial = _loss(score, _soup([*members, expert], "greedy_soup", settings).expert)
        if trial < best:
            members, best = [*members, expert], trial
    return _soup(members, "greedy_soup", {**settings, "soup_log_loss": best})


def task_arithmetic(
    experts: Sequence[Expert],
    *,
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    rank: int | None = None,
    initial: Mapping[str, Tensor] | None = None,
) -> Merged:
    """φ_0 + λ Σ_k w_k (φ_k − φ_0); of LoRA experts λ Σ_k w_k ΔW_k.

    Args:
        weights: w, of either sign, 1 each by default: a sum, which grows with the number of experts.
        scale: λ.
        rank: as for :func:`uniform_soup`.
        initial: φ_0, for methods without a natural zero; not needed where λ Σ w = 1, because it then cancels.

    Raises:
        RefusedError: if φ_0 is needed and not given, or not the one that the experts started from.

    Source: Ilharco et al., "Editing models with task arithmetic", ICLR 2023, arXiv 2212.04089.
    """
    _require_mergeable(experts)
    chosen = _signed(weights, experts)
    built = linear(experts, [_finite("scale", scale) * w for w in chosen], rank, initial)
    return _merged(experts, chosen, built, "task_arithmetic", {"scale": scale, "rank": rank})


def concatenate(experts: Sequence[Expert], *, weights: Sequence[float] | None = None) -> Merged:
    """LoRA: Σ_k w_k ΔW_k exactly, at rank Σ_k r_k, by writing the factors side by side.

    Args:
        weights: w, of either sign, 1 each by default.

    Raises:
        RefusedError: if the experts are not LoRA experts.

    Source: the same result as ``combination_type="cat"`` of PEFT's ``add_weighted_adapter``.
    """
    _require_mergeable(experts)
    if not is_lora(experts[0]):
        raise RefusedError(
            f"concatenate stacks LoRA factors, but expert {experts[0].name!r} is of method {experts[0].card.method!r}; "
            "task_arithmetic is the weighted sum for every method"
        )
    chosen = _signed(weights, experts)
    return _merged(experts, chosen, linear(experts, chosen), "concatenate", {})


def ties(
    experts: Sequence[Expert],
    *,
    density: float = 0.2,
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    rank: int | None = None,
    initial: Mapping[str, Tensor] | None = None,
) -> Merged:
    """Trim every change to its largest entries, elect a sign per entry, and average the entries that have it.

    With τ_k = φ_k − φ_0 (LoRA: ΔW_k) trimmed: φ_0 + λ Σ_{k ∈ A} w_k τ_k / Σ_{k ∈ A} w_k, where A are the experts whose
    entry has the sign of Σ_k w_k τ_k. Trimming is per tensor (LoRA: per ΔW), not over the whole expert as in the paper.

    Args:
        density: the share of entries that stays, in (0, 1], at least one; entries equal to the smallest kept one stay.
        weights: w ≥ 0, by default equal.
        scale: λ.
        rank: for LoRA, the largest rank of the result, by default the sum of the experts' ranks. The merged ΔW itself is
            dense and of any rank up to min(in, out): ``errors`` tell what the truncation cut off.
        initial: φ_0, for methods without a natural zero.

    Raises:
        RefusedError: for settings out of range; if φ_0 is needed and not given, or not the one that the experts started
            from.

    Source: Yadav et al., "TIES-Merging", NeurIPS 2023, arXiv 2306.01708, algorithm 1.
    """
    _require_mergeable(experts)
    shares, factor = _shares(weights, experts), _finite("scale", scale)
    _require_density(density)
    built = elementwise(experts, lambda _, changes: factor * _elected(changes, shares, density), rank, initial)
    return _merged(experts, shares, built, "ties", {"density": density, "scale": scale, "rank": rank})


def dare(
    experts: Sequence[Expert],
    *,
    drop: float = 0.9,
    seed: int = 0,
    combine: str = "linear",
    density: float | None = None,
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    rank: int | None = None,
    initial: Mapping[str, Tensor] | None = None,
) -> Merged:
    """Drop entries of every change at random, scale up the rest, and combine as task arithmetic or TIES does.

    Each entry of τ_k = φ_k − φ_0 (LoRA: ΔW_k) becomes 0 with probability p, otherwise τ_k / (1 − p): right on average.

    Args:
        drop: p, in [0, 1).
        seed: of the masks. An expert's mask of a tensor is a function of seed, expert's name and tensor's name, and so of
            no order.
        combine: ``"linear"`` as :func:`task_arithmetic`, ``"ties"`` as :func:`ties`.
        density: for ``"ties"``, 1 by default: what was dropped is not trimmed again.
        weights, scale, initial: of the operator that combines.
        rank: as for :func:`ties`; the dropped ΔW are dense.

    Raises:
        RefusedError: as :func:`ties`.

    Source: Yu et al., "Language Models are Super Mario", ICML 2024, arXiv 2311.03099.
    """
    _require_mergeable(experts)
    if combine not in COMBINATIONS:
        raise unknown_name("combination", combine, COMBINATIONS)
    if not 0 <= drop < 1:
        raise RefusedError(f"drop must be at least 0 and less than 1, not {drop}")
    if combine == "linear" and density is not None:
        raise RefusedError("density is a setting of combine='ties'; with 'linear' nothing is trimmed")
    _require_density(kept := 1.0 if density is None else density)
    factor = _finite("scale", scale)
    chosen = (_shares if combine == "ties" else _signed)(weights, experts)

    def merged(name: str, changes: Tensor) -> Tensor:
        thinned = torch.stack([_dropped(c, drop, seed, e.name, name) for c, e in zip(changes, experts, strict=True)])
        return factor * (_elected(thinned, chosen, kept) if combine == "ties" else _weighted_sum(thinned, chosen))

    settings = {"drop": drop, "seed": seed, "combine": combine, "density": density, "scale": scale, "rank": rank}
    return _merged(experts, chosen, elementwise(experts, merged, rank, initial), "dare", settings)


def fisher_merge(
    experts: Sequence[Expert],
    *,
    embeddings: Mapping[str, TaskEmbedding],
    weights: Sequence[float] | None = None,
    epsilon: float = 1e-6,
) -> Merged:
    """Average every entry weighted by the Fisher information that each expert's own task has in it.

    φ = Σ_k w_k F̃_k φ_k / Σ_k w_k F̃_k, with F̃_k = F_k + ε F̄ and F̄ the mean of a tensor's Fisher over entries and experts.
    So a tensor without any Fisher, or an entry of which no task knows anything, gets the weighted mean. LoRA experts are
    merged in factor space: the average of A and B is not that of ΔW, and means something only where all experts started
    from the same A and have the same shapes and scalings.

    Args:
        embeddings: by expert's name, each made at the expert itself (``reference="own"``).
        weights: w ≥ 0, by default equal.
        epsilon: ε > 0, relative.

    Raises:
        RefusedError: if an embedding is missing, was made elsewhere, lacks a tensor, or is not finite; for LoRA experts that
            do not share their start, shapes and scalings.

    Source: Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", NeurIPS 2022, arXiv 2111.09832.
    """
    _require_mergeable(experts)
    shares = _shares(weights, experts)
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise RefusedError(f"epsilon must be positive, not {epsilon}")
    if is_lora(experts[0]):
        _require_same_factors(experts)
    fishers = [_fisher(expert, embeddings) for expert in experts]
    experts = on_cpu(experts)  # where embeddings are
    dtype, tensors = common_dtype(experts), {}
    for key in experts[0].tensors:
        information = torch.stack([f[key].double().cpu() for f in fishers])
        floor = epsilon * float(information.mean()) or 1.0
        precision = _column(shares, information) * (information + floor)
        values = torch.stack([e.tensors[key].double() for e in experts])
        tensors[key] = ((precision * values).sum(0) / precision.sum(0)).to(dtype)
    built = parameter_space(experts[0], tensors)
    return _merged(experts, shares, built, "fisher_merge", {"epsilon": epsilon})


OPERATORS: Mapping[str, Callable[..., Merged]] = {
    f.__name__: f for f in (uniform_soup, greedy_soup, task_arithmetic, concatenate, ties, dare, fisher_merge)
}


def _soup(experts: Sequence[Expert], operator: str, settings: Mapping[str, Any]) -> Merged:
    shares = _shares(None, experts)
    return _merged(experts, shares, linear(experts, shares, settings["rank"]), operator, settings)


def _loss(score: Callable[[Expert], float], expert: Expert) -> float:
    loss = float(score(expert))
    if math.isnan(loss):
        raise RefusedError(f"the score of expert {expert.name!r} is NaN, so no order follows from it")
    return loss


def _column(weights: Sequence[float], stack: Tensor) -> Tensor:
    """Weights ``[K, 1, …]`` that broadcast over a stack ``[K, …]``."""
    return torch.tensor(weights, dtype=stack.dtype).view(-1, *[1] * (stack.dim() - 1))


def _weighted_sum(changes: Tensor, weights: Sequence[float]) -> Tensor:
    return (_column(weights, changes) * changes).sum(0)


def _elected(changes: Tensor, weights: Sequence[float], density: float) -> Tensor:
    """TIES: trim, elect, disjoint mean."""
    trimmed = torch.stack([_trimmed(change, density) for change in changes])
    sign = _weighted_sum(trimmed, weights).sign()
    share = _column(weights, trimmed) * (trimmed.sign() == sign)
    total = share.sum(0)
    return (share * trimmed).sum(0) / torch.where(total > 0, total, 1.0)


def _trimmed(change: Tensor, density: float) -> Tensor:
    size = change.abs()
    dropped = size.numel() - max(1, round(density * size.numel()))
    return change if dropped <= 0 else change * (size >= size.flatten().kthvalue(dropped + 1).values)


def _dropped(change: Tensor, drop: float, seed: int, expert: str, name: str) -> Tensor:
    digest = hashlib.sha256("\0".join((str(seed), expert, name)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    kept = torch.rand(change.shape, generator=generator, dtype=torch.float64) >= drop
    return change * kept / (1 - drop)


def _require_mergeable(experts: Sequence[Expert]) -> None:
    if not experts:
        raise RefusedError("a merge needs at least one expert")
    for expert in experts:
        if [e.name for e in experts].count(expert.name) > 1:
            raise RefusedError(f"two experts are called {expert.name!r}: rename one with expert.with_card(name=…)")
        expert.verify()
    require_compatible(experts)
    _require_backbone_ids(experts)


def _require_backbone_ids(experts: Sequence[Expert]) -> None:
    """Where no fingerprint tells, as in foreign PEFT folders, the backbone's id must be the same."""
    if all(e.card.fingerprint for e in experts):
        return
    named = [e for e in experts if e.card.backbone]
    for other in named[1:]:
        if other.card.backbone != named[0].card.backbone:
            raise RefusedError(
                f"experts {named[0].name!r} and {other.name!r} name different backbones ({named[0].card.backbone!r} and "
                f"{other.card.backbone!r}), and not both have a fingerprint: if they are the same model, give them one "
                "name in base_model_name_or_path or with expert.with_card(backbone=…)"
            )


def _require_density(density: float) -> None:
    if not 0 < density <= 1:
        raise RefusedError(f"density must be more than 0 and at most 1, not {density}")


def _require_same_factors(experts: Sequence[Expert]) -> None:
    """LoRA's factors have a common space only where start, shapes and scalings agree."""
    first, *others = experts
    layout, *layouts = map(_layout, experts, factors_of(experts))
    for other, theirs in zip(others, layouts, strict=True):
        reason = ""
        if not first.card.init_hash or first.card.init_hash != other.card.init_hash:
            reason = "they are not known to have started from the same A"
        elif wrong := sorted(k for k in layout.keys() | theirs.keys() if layout.get(k) != theirs.get(k)):
            reason = f"shape and scaling of {wrong[0]} are {layout.get(wrong[0])} and {theirs.get(wrong[0])}"
        if reason:
            raise RefusedError(
                f"experts {first.name!r} and {other.name!r} have no common factor space: {reason}; uniform_soup, "
                "task_arithmetic and ties work on ΔW"
            )


def _layout(expert: Expert, factors: Mapping[str, LowRank]) -> dict[str, tuple[list[int], float]]:
    scalings = {module: f.scaling for module, f in factors.items()}
    return {k: (list(t.shape), scalings[k.rpartition(".lora_")[0]]) for k, t in expert.tensors.items()}


def _fisher(expert: Expert, embeddings: Mapping[str, TaskEmbedding]) -> Mapping[str, Tensor]:
    """An expert's Fisher tensors, proven to be made at this very expert."""
    if expert.name not in embeddings:
        raise RefusedError(
            f"expert {expert.name!r} has no task embedding here: make one with embed_task, or with "
            f"`pituning embed {expert.name} --reference own`"
        )
    embedding = embeddings[expert.name]
    if embedding.reference != "own" or embedding.reference_hash != tensor_hash(expert.tensors):
        raise RefusedError(
            f"the task embedding of expert {expert.name!r} was made at other tensors (reference point "
            f"{embedding.reference!r}): embed the task at the expert itself, --reference own --refresh"
        )
    for key, tensor in expert.tensors.items():
        shape = embedding.fisher[key].shape if key in embedding.fisher else None
        if shape != tensor.shape:
            found = "no such tensor" if shape is None else list(shape)
            raise RefusedError(
                f"the task embedding of expert {expert.name!r} does not fit: {key} {list(tensor.shape)}, found {found}"
            )
        if not torch.isfinite(embedding.fisher[key]).all():
            raise RefusedError(
                f"the task embedding of expert {expert.name!r} is not finite in tensor {key} {list(tensor.shape)}: embed the "
                "task anew, --reference own --refresh"
            )
    return embedding.fisher


def _signed(weights: Sequence[float] | None, experts: Sequence[Expert]) -> list[float]:
    """Weights of either sign, 1 each by default."""
    if weights is None:
        return [1.0] * len(experts)
    if len(weights) != len(experts):
        raise RefusedError(f"{len(weights)} weights were given for the {len(experts)} experts {names(experts)}")
    return [_finite("a weight", w) for w in weights]


def _shares(weights: Sequence[float] | None, experts: Sequence[Expert]) -> list[float]:
    """Non-negative weights that sum to one, equal by default."""
    values = _signed(weights, experts)
    if min(values) < 0 or not any(values):
        raise RefusedError(f"an average needs weights of at least 0, one of them positive, not {values}")
    return [value / math.fsum(values) for value in values]


def _finite(what: str, value: float) -> float:
    if not math.isfinite(value):
        raise RefusedError(f"{what} must be a finite number, not {value}")
    return float(value)


def _merged(
    experts: Sequence[Expert], weights: Sequence[float], built: Built, operator: str, settings: Mapping[str, Any]
) -> Merged:
    first = next((e.card for e in experts if e.card.fingerprint), experts[0].card)
    require_finite(built.tensors, f"{operator} of {names(experts)}")
    model = {k: v for e in experts for k, v in e.card.training.items() if k in ("family", "architecture")}
    model |= prompting_of(experts)
    start = _common([e.card.init_hash for e in experts], "")
    card = ExpertCard(
        name=operator,
        backbone=first.backbone,
        fingerprint=first.fingerprint,
        task=_common([e.card.task for e in experts], ""),
        method=first.method,
        init_hash=start if any(built.config == e.config for e in experts) else "",
        parameters=sum(t.numel() for t in built.tensors.values()),
        choices=_common([e.card.choices for e in experts], ()),
        lineage=tuple({"name": e.name, "weight": w} for e, w in zip(experts, weights, strict=True)),
        training={**model, "operator": operator, **settings, "largest_error": max(built.errors.values())},
    )
    return Merged(Expert(built.tensors, built.config, card), built.errors)


def _common(values: Sequence[Any], otherwise: Any) -> Any:
    return values[0] if all(value == values[0] for value in values) else otherwise
