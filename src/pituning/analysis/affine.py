"""Affine combinations of experts: Σ_k w_k φ_k with Σ w = 1, of any sign, in the space in which the experts' method mixes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pituning.backbones.base import Backbone
from pituning.errors import DataError, PituningError
from pituning.experts.expert import Expert
from pituning.interpolation.build import Granularity, build_mixture
from pituning.interpolation.collapse import collapse
from pituning.interpolation.mixture import Mixture
from pituning.tasks.task import Task
from pituning.training.evaluation import Evaluation, evaluate


def affine_mixture(
    experts: Sequence[Expert], weights: Tensor | Sequence[float], granularity: Granularity = "model"
) -> tuple[Mixture, dict[str, Any]]:
    """The untrained mixture at the given weights, ``[K]`` or ``[groups, K]``, and its configuration.

    Raises:
        RefusedError: if the experts have no exact interpolation.
    """
    return build_mixture(experts, weights, coefficients="linear", granularity=granularity, train="none")


def affine_expert(
    experts: Sequence[Expert], weights: Tensor | Sequence[float], name: str, granularity: Granularity = "model"
) -> Expert:
    """The same as one expert; LoRA keeps its exact rank Σ r_k, and a single expert its own tensors, bit by bit."""
    mixture, config = affine_mixture(experts, weights, granularity)
    return collapse(mixture, config, replace(experts[0].card, name=name)).expert


def require_common(backbone: Backbone, experts: Sequence[Expert]) -> None:
    """Raise unless the experts belong to the backbone and mix with each other.

    Raises:
        BackboneMismatchError: if an expert was trained on another backbone.
        RefusedError: if the experts have no exact interpolation.
    """
    for expert in experts:
        expert.require_backbone(backbone)
    affine_mixture(experts, [1 / len(experts)] * len(experts))


def paired(differences: Tensor) -> tuple[float, float]:
    """Mean of per-example differences ``[examples]`` and its standard error, both in nats.

    Entries that are NaN, those of examples without an answer, are left out; see :func:`measured`.

    Raises:
        DataError: if fewer than two are left.
    """
    known = differences[~differences.isnan()]
    if len(known) < 2:
        raise DataError(f"a standard error needs at least two answerable examples, found {len(known)}")
    return float(known.mean()), float(known.std()) / math.sqrt(len(known))


def measured(backbone: Backbone, expert: Expert, where: str, task: Task, split: str, limit: int | None) -> Evaluation:
    """An expert on a split, whose log-losses are finite numbers but for those of examples without an answer.

    Args:
        where: the place in an analysis, for messages. To leave an example out there alone would flatter it.

    Raises:
        PituningError: if the scores or the log-loss of an example are not finite; otherwise as
            :func:`pituning.training.evaluation.evaluate`.
    """
    try:
        found = evaluate(backbone, expert, task, split, limit)
    except PituningError as error:
        if type(error) is not PituningError:  # a task, split or expert that is none anywhere
            raise
        raise PituningError(f"the log-loss {where} cannot be measured: {error}") from error
    answered = [(n, e.id) for n, e in enumerate(task.split(split, limit)) if e.target]
    if wrong := [example for n, example in answered if not math.isfinite(found.losses[n])]:
        raise PituningError(
            f"the log-loss {where} is not a finite number for {len(wrong)} of {len(answered)} examples of {task.name}/{split}, "
            f"such as {wrong[0]!r}: its right answer is impossible there, or half precision has overflowed; load the backbone "
            "in float32"
        )
    return found


def double(losses: Sequence[float]) -> Tensor:
    """Per-example losses as a float64 tensor ``[examples]``."""
    return torch.tensor(losses, dtype=torch.float64)
