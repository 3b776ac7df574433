"""From the learned numbers α to the weights of the experts: what a weight may be, and what α starts it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pituning.errors import RefusedError

KINDS = ("softmax", "linear", "sigmoid")


@dataclass(frozen=True)
class Coefficients:
    """How α becomes weights, row by row; a row belongs to one group of tensors and has one entry per expert.

    Attributes:
        kind: ``"softmax"``: w = softmax(α / T), positive, sums to one (the paper, with T = 1); ``"linear"``: w = α, signed, any
            sum; ``"sigmoid"``: w_k = σ(α_k / T), each between 0 and 1 on its own.
        temperature: T.
        scale: of softmax weights, w = scale · softmax(α / T): what they sum to. An average of experts that change different
            things changes less than each of them; a scale above one makes up for that.

    Raises:
        RefusedError: for another kind, a temperature or a scale that is not positive, or a scale of other weights.
    """

    kind: str = "softmax"
    temperature: float = 1.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RefusedError(f"coefficients must be one of {', '.join(KINDS)}, not {self.kind!r}")
        if not self.temperature > 0:
            raise RefusedError(f"temperature must be positive, not {self.temperature}")
        if not 0 < self.scale < math.inf:
            raise RefusedError(f"scale must be a positive number, not {self.scale}")
        if self.scale != 1 and self.kind != "softmax":
            raise RefusedError(f"only softmax weights have a scale; {self.kind} weights may have any sum by themselves")

    def alpha(self, weights: Tensor) -> Tensor:
        """The α that gives these weights. A softmax or sigmoid weight of exactly 0 or 1 has an infinite α and never moves.

        Raises:
            RefusedError: for weights that this kind cannot have.
        """
        if not torch.isfinite(weights).all():
            raise RefusedError("weights must be finite numbers")
        if self.kind == "linear":
            return weights.clone()
        weights = weights / self.scale
        if (weights < 0).any() or (weights > 1 + 1e-4).any():
            wrong = [round(w * self.scale, 6) for w in weights.flatten().tolist() if w < 0 or w > 1 + 1e-4]
            raise RefusedError(
                f"{self.kind} weights must be between 0 and {self.scale:g}, not {', '.join(f'{w:g}' for w in wrong[:5])}; "
                "signed weights need coefficients='linear'"
            )
        if self.kind == "sigmoid":
            return torch.logit(weights.clamp(max=1)) * self.temperature
        if not torch.allclose(weights.sum(1), weights.new_ones(len(weights)), atol=1e-4):
            sums = [f"{s * self.scale:g}" for s in weights.sum(1).tolist() if abs(s - 1) > 1e-4]
            raise RefusedError(
                f"softmax weights must sum to {_named(self.scale)} in every group; {len(sums)} of {len(weights)} do not: "
                f"{', '.join(sums[:5])}"
            )
        return (weights / weights.sum(1, keepdim=True)).log() * self.temperature

    def weights(self, alpha: Tensor) -> Tensor:
        """Weights of the shape of α, ``[groups, experts]``."""
        if self.kind == "linear":
            return alpha
        if self.kind == "sigmoid":
            return torch.sigmoid(alpha / self.temperature)
        return self.scale * torch.softmax(alpha / self.temperature, dim=1)

    @property
    def sums_to_one(self) -> bool:
        """Whether every row sums to one whatever α is, so that no common starting point φ_0 takes part."""
        return self.kind == "softmax" and self.scale == 1

    @property
    def sums_to_scale(self) -> bool:
        """Whether every row sums to one number whatever α is: divided by it, the weights are a distribution."""
        return self.kind == "softmax"


def _named(scale: float) -> str:
    return "one" if scale == 1 else f"{scale:g}"


def entropy(weights: Tensor) -> Tensor:
    """Mean entropy of the rows of softmax weights, in nats; 0 where each row is one-hot."""
    logs = torch.where(weights > 0, weights, torch.ones_like(weights)).log()
    return -(weights * logs).sum(1).mean()
