"""Where an interpolation begins: its experts, their starting weights, and what of them is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pituning.backbones.base import Backbone
from pituning.data.fewshot import stratified_folds
from pituning.errors import PituningError, RefusedError
from pituning.example import Example
from pituning.experts.expert import Expert, initial_of
from pituning.interpolation.build import Granularity, build_mixture, is_lora
from pituning.interpolation.mixture import Mixture
from pituning.methods.attach import attached, config_dict, initial_tensors
from pituning.methods.presets import make_config
from pituning.training.crossfit import Search, Start
from pituning.training.evaluation import bias_calibrated_loss, log_loss, log_probabilities
from pituning.training.module import running

INITS = ("uniform", "similarity", "score")
INCLUDE_OWN = ("auto", True, False)
ALPHA_LEARNING_RATE = 1e-2
"""Of α in the search that is made where none is given."""
SMALLEST_WEIGHT = 2.0**-149
"""The smallest positive number of float32."""
SCALES = (1.0, 1.5, 2.0, 3.0, 4.5, 7.0)
"""What the sum of a blend's weights is a mean of."""
ENOUGH_TO_SCALE = 32
"""Labelled examples below which that sum is one: fewer hardly tell one scale from another, and a middling one makes the blend
surer of what is wrong (docs/transfer.md)."""


def blend_start(
    backbone: Backbone,
    experts: Sequence[Expert],
    weights: Sequence[float],
    own: Mapping[int | None, Expert] | None = None,
    *,
    train: str = "shared",
    granularity: Granularity = "module",
    coefficients: str = "softmax",
    temperature: float = 1.0,
    scale: float = 1.0,
) -> Start:
    """A start for :func:`cross_fit`: the experts, and the own one trained without the fold, at the given weights."""
    initial: Mapping[str, Tensor] | None = None
    if is_lora(experts[0]):
        initial = _delta_factors(backbone, experts) if train == "shared" else None
    elif coefficients != "softmax" or scale != 1:
        initial = initial_of(backbone, experts[0])

    def begin(fold: int | None) -> tuple[Mixture, Mapping[str, Any]]:
        return build_mixture(
            [*experts, own[fold]] if own else experts,
            list(weights),
            granularity=granularity,
            train=train,
            coefficients=coefficients,
            temperature=temperature,
            scale=scale,
            train_weights=own is None,
            initial=initial,
        )

    return begin


def expected_scale(
    backbone: Backbone,
    start: Callable[[float], Start],
    examples: Sequence[Example],
    search: Search | None = None,
) -> float:
    """The mean of :data:`SCALES`, each weighed by how well the untrained blend explains the shots at it.

    Experts of different tasks change different things, so that their mean changes each of them less than its expert does,
    and more of all of them is better, up to a point. A few dozen shots seldom tell where that is: what weighs is the
    tempered evidence by which :func:`score_weights` weighs experts, so that losses which hardly differ give a middling scale,
    and not whichever is ahead by chance. The log-loss is as it is, not after a temperature, which would forgive a blend that
    reaches too far what it costs most: to be sure of what is wrong.

    Args:
        start: scale → a start that trains nothing.
        search: given, the start contains the own expert, and each fold is read without the expert that has seen it.

    Returns:
        one where the experts have no product form, or no common starting point, to reach out from.

    Raises:
        PituningError: if the blend's log-loss is finite at none of the scales.
    """
    parts: list[tuple[int | None, Sequence[Example]]] = [(None, examples)]
    if search is not None:
        folds = stratified_folds(examples, search.folds, search.fold_seed)
        parts = [(fold, held) for fold, (_, held) in enumerate(folds)]
    pooled = [example for _, part in parts for example in part]
    losses: dict[float, float] = {}
    for scale in SCALES:
        rows = []
        for fold, part in parts:
            try:
                mixture, config = start(scale)(fold)
            except RefusedError:
                if scale == 1:
                    raise
                return 1.0
            with running(backbone, mixture, config) as model:
                rows.append(log_probabilities(backbone, part, model, finite=False))
        losses[scale] = log_loss(torch.cat(rows), pooled)
    finite = {scale: loss for scale, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        raise PituningError(f"the untrained blend has no finite log-loss at any scale of {', '.join(map(str, SCALES))}")
    return mean_scale(finite, len(pooled))


def mean_scale(losses: Mapping[float, float], examples: int) -> float:
    """The mean of scales, each weighed by :func:`score_weights` of its log-loss on so many examples."""
    shares = score_weights(list(losses.values()), examples)
    return sum(scale * share for scale, share in zip(losses, shares, strict=True))


def kept_start(own: Mapping[int | None, Expert]) -> Start:
    """A start for :func:`cross_fit` that trains nothing: the own expert as it is."""
    return lambda fold: build_mixture([own[fold]], train="none", granularity="model")


def _delta_factors(backbone: Backbone, experts: Sequence[Expert]) -> dict[str, Tensor]:
    """Fresh factors for δ, at the rank of the method's preset, on all modules that any of the experts adapts."""
    modules = {k.split(".lora_")[0].removeprefix("base_model.model.") for e in experts for k in e.tensors}
    return initial_tensors(backbone, config_dict(make_config("lora", backbone, target_modules=sorted(modules))))


def require_consistent(
    experts: Sequence[Expert],
    own: Expert | None,
    init: str | Sequence[float],
    include_own: bool | str,
    similarities: Sequence[float] | None,
    scale: float | str = 1.0,
) -> None:
    """Raise unless the arguments of an interpolation fit together.

    Raises:
        RefusedError: if there are no experts.
        PituningError: for arguments that contradict each other.
    """
    if not experts:
        raise RefusedError("an interpolation needs at least one expert besides the target's own")
    if include_own not in INCLUDE_OWN:
        raise PituningError(f"include_own must be True, False or 'auto', not {include_own!r}")
    if include_own is True and own is None:
        raise PituningError("include_own=True needs the target's own expert: pass own=…")
    if isinstance(scale, str) and scale != "auto":
        raise PituningError(f"scale must be 'auto' or a number, not {scale!r}")
    if isinstance(init, str):
        if init not in INITS:
            raise PituningError(f"init must be one of {', '.join(INITS)} or {len(experts)} numbers, not {init!r}")
        if init == "similarity" and (similarities is None or len(similarities) != len(experts)):
            raise PituningError(
                f"init='similarity' needs similarities=…, one number for each of the {len(experts)} experts"
            )
    elif len(init) != len(experts):
        raise PituningError(f"init has {len(init)} weights for {len(experts)} experts")


def require_something_to_train(train: str, optimizer: str, alpha_learning_rate: float, given: str) -> None:
    """Weights alone, by gradients, want a rate for α.

    Args:
        given: what the rate is a setting of, for the message.

    Raises:
        PituningError: if it is zero.
    """
    if train == "weights" and optimizer == "adamw" and not alpha_learning_rate:
        raise PituningError(
            "train='weights' with alpha_learning_rate=0 would train nothing: "
            f"give the {given} a rate for α, such as {ALPHA_LEARNING_RATE:g}"
        )


def require_weights_to_regularise(train: str, weights_to_start: float, weights_spread: float) -> None:
    """Regularisers of the weights want weights that are trained.

    Raises:
        PituningError: if ``train`` holds them.
    """
    if (weights_to_start or weights_spread) and train in ("none", "merge-then-tune"):
        raise PituningError(
            f"train={train!r} holds the weights, so that nothing is there to regularise: train them "
            "(train='weights', 'shared' or 'experts'), or leave weights_to_start and weights_spread out"
        )


def initial_weights(
    init: str | Sequence[float],
    losses: Sequence[float],
    similarities: Sequence[float] | None,
    examples: int,
    own: bool = False,
) -> list[float]:
    """Starting weights; where own takes part beside given or similarity weights, it gets an equal share."""
    if init == "score":
        return score_weights(losses, examples)
    if init == "uniform":
        return [1 / len(losses)] * len(losses)
    if isinstance(init, str):
        others: list[float] = torch.softmax(torch.tensor(similarities, dtype=torch.float64), 0).tolist()
    else:
        others = [float(w) for w in init]
    share = 1 / len(losses) if own else 0.0
    return [w * (1 - share) for w in others] + ([share] if own else [])


def score_weights(losses: Sequence[float], examples: int, sharpness: float = 0.25) -> list[float]:
    """w_k ∝ exp(−sharpness · N · loss_k): how well each expert explains the N shots, tempered.

    With sharpness 1 this is the posterior of K equally likely models given N independent examples; experts are correlated
    and their log-losses noisy, so less than the full evidence is counted. A weight that float32 cannot tell from 0 becomes the
    smallest that it can, for that of 0 has α = −∞; training will hardly bring it back.

    Args:
        losses: mean log-loss of each, after calibration (:func:`calibrated_loss`): experts of other tasks differ by nats in
            how sure of themselves they are, and one would take all the weight for being in doubt.
    """
    evidence = -sharpness * examples * torch.tensor(losses, dtype=torch.float64)
    weights = torch.softmax(evidence, 0)
    vanished = (weights.float() == 0) & evidence.isfinite()
    found: list[float] = weights.masked_fill(vanished, SMALLEST_WEIGHT).tolist()
    return found


def expert_log_probabilities(backbone: Backbone, expert: Expert, examples: Sequence[Example]) -> Tensor:
    """:func:`log_probabilities` of an expert, as it is."""
    try:
        with attached(backbone, expert.config, expert.tensors):
            return log_probabilities(backbone, examples)
    except PituningError as error:
        raise type(error)(f"expert {expert.name!r}: {error}") from error


def calibrated_loss(backbone: Backbone, expert: Expert, examples: Sequence[Example]) -> float:
    """:func:`bias_calibrated_loss` of an expert, as it is: minus its similarity by ``calibrated-score``."""
    return bias_calibrated_loss(expert_log_probabilities(backbone, expert, examples), examples)


def held_out_calibrated_loss(
    backbone: Backbone, own: Mapping[int | None, Expert], examples: Sequence[Example], search: Search
) -> float:
    """The same of the own expert, each fold by the one that was trained without it."""
    held = [part for _, part in stratified_folds(examples, search.folds, search.fold_seed)]
    log_p = torch.cat([expert_log_probabilities(backbone, own[fold], part) for fold, part in enumerate(held)])
    return bias_calibrated_loss(log_p, [example for part in held for example in part])
