"""Affine combinations of experts: Σ_k w_k φ_k with Σ w = 1, of any sign, in the space in which the experts' method mixes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pituning.backbones.base import Backbone
from pituning.errors import DataError
from pituning.experts.expert import Expert
from pituning.interpolation.build import Granularity, build_mixture
from pituning.interpolation.collapse import collapse
from pituning.interpolation.mixture import Mixture


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
    """Mean of per-example differences ``[examples]`` and its standard error, both in nats; NaN entries are left out.

    Raises:
        DataError: if fewer than two are left.
    """
    known = differences[~differences.isnan()]
    if len(known) < 2:
        raise DataError(f"a standard error needs at least two answerable examples, found {len(known)}")
    return float(known.mean()), float(known.std()) / math.sqrt(len(known))


def double(losses: Sequence[float]) -> Tensor:
    """Per-example losses as a float64 tensor ``[examples]``."""
    return torch.tensor(losses, dtype=torch.float64)
