"""The slope of a target's loss on the way from the common start to each expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pituning.backbones.base import IMAGE_BATCH_SIZE, Backbone, require_targets
from pituning.errors import DataError
from pituning.example import Example
from pituning.experts.expert import Expert
from pituning.interpolation.build import build_mixture
from pituning.training.module import running

BATCH_SIZE = 32


def loss_slopes(
    backbone: Backbone,
    experts: Sequence[Expert],
    examples: Sequence[Example],
    initial: Mapping[str, Tensor] | None = None,
    *,
    batch_size: int = BATCH_SIZE,
) -> list[float]:
    """d/dt L(φ_0 + t (φ_k − φ_0)) at t = 0 of each expert: nats by which the examples' mean loss rises per unit of t.

    For LoRA the space is that of ΔW, so that the slope is Σ_modules ⟨∂L/∂W, ΔW_k⟩ at the bare backbone. The slopes are the
    derivatives by the weights of φ_0 + Σ w_k (φ_k − φ_0) at w = 0: one backward pass over the examples for all experts
    together, in which the gradient of no W is ever formed.

    Args:
        experts: K of one method and one start.
        initial: φ_0, for methods other than LoRA, BitFit and IA3.
        batch_size: for memory and time only; at most :data:`IMAGE_BATCH_SIZE` where an example has an image.

    Raises:
        DataError: if there are no examples, or one has no target.
        RefusedError: if the experts have no common start, or a LoRA expert no exact product form.
    """
    if not examples:
        raise DataError("there are no examples to take the gradient of the loss on")
    require_targets(examples)
    if any(e.image is not None for e in examples):
        batch_size = min(batch_size, IMAGE_BATCH_SIZE)
    slopes = torch.zeros(len(experts), dtype=torch.float64)
    mixture, config = build_mixture(
        experts, [0.0] * len(experts), granularity="model", train="weights", coefficients="linear", initial=initial
    )
    with torch.autocast(backbone.device.type, enabled=False), running(backbone, mixture, config) as model:
        for first in range(0, len(examples), batch_size):
            losses = model(**backbone.collate(list(examples[first : first + batch_size])))
            (slope,) = torch.autograd.grad(losses.sum(), mixture.alpha)
            slopes += slope[0].double().cpu()
    return [float(slope) / len(examples) for slope in slopes]
