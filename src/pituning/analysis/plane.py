"""The log-loss over the plane through three experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

import torch
from torch import Tensor

from pituning.analysis.affine import affine_mixture, require_common
from pituning.backbones.base import Backbone
from pituning.errors import DataError, PituningError, RefusedError
from pituning.example import Example
from pituning.experts.expert import Expert
from pituning.interpolation.build import is_lora, lora_factors, on_cpu
from pituning.similarity.measures import delta_inner
from pituning.tasks.task import Task
from pituning.training.evaluation import mean_log_loss
from pituning.training.module import running
from pituning.training.progress import progress_bar

# Below this share of the longest side the three experts are taken to lie on one line.
_FLAT = 1e-4


@dataclass(frozen=True)
class Plane:
    """Mean log-loss on a grid over the plane; a, the first expert, is the origin and b lies on the x axis.

    Coordinates are distances in the space of the tensors (the Frobenius norm; for LoRA that of ΔW over all modules).

    Attributes:
        corners: ``[3][2]``, where the experts are.
        corner_log_loss: their own log-loss, nats per example.
        x, y: coordinates of the grid's columns and rows.
        log_loss: ``[rows][columns]``, nats per example.
        weights: ``[rows][columns][3]``, the barycentric weights of the experts there: they sum to one, and outside the
            triangle some are negative.
        examples: how many examples were measured.
    """

    task: str
    split: str
    experts: tuple[str, str, str]
    corners: tuple[tuple[float, float], ...]
    corner_log_loss: tuple[float, ...]
    x: tuple[float, ...]
    y: tuple[float, ...]
    log_loss: tuple[tuple[float, ...], ...]
    weights: tuple[tuple[tuple[float, ...], ...], ...]
    examples: int

    @property
    def best(self) -> tuple[int, int]:
        """Row and column of the lowest log-loss on the grid; far outside a loss may be undefined (NaN)."""
        defined = [(loss, i, j) for i, row in enumerate(self.log_loss) for j, loss in enumerate(row) if loss == loss]
        return min(defined)[1:]


def plane(
    backbone: Backbone,
    task: Task,
    a: Expert,
    b: Expert,
    c: Expert,
    resolution: int = 15,
    split: str = "dev",
    limit: int | None = None,
    *,
    margin: float = 0.3,
    progress: bool = False,
) -> Plane:
    """Measure the log-loss on ``resolution`` × ``resolution`` points of the plane through three experts.

    Args:
        resolution: points along either side; at least 2.
        limit: at most so many examples, a fixed sample of the split; those without an answer are left out.
        margin: how far the grid goes beyond the triangle, as a share of its width and height.
        progress: show a progress bar.

    Raises:
        PituningError: for a resolution below 2 or a negative margin, or if the log-loss of one of the three is not finite.
        DataError: if the split has no example with an answer.
        RefusedError: if the experts have no exact interpolation, or lie on one line.
        BackboneMismatchError: if an expert belongs to another backbone.

    Source: Garipov et al., "Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs", NeurIPS 2018, appendix.
    """
    if resolution < 2 or margin < 0:
        raise PituningError(f"a plane needs resolution ≥ 2 and margin ≥ 0, not {resolution} and {margin}")
    experts = (a, b, c)
    require_common(backbone, experts)
    examples = [e for e in task.split(split, limit) if e.target]
    if not examples:
        raise DataError(f"task {task.name!r}: no example of split {split!r} has an answer that may be given")
    corners = corner_coordinates(gram(experts), [e.name for e in experts])
    corner_loss = tuple(_loss(backbone, [e], [1.0], examples, finite=True) for e in experts)
    x, y = (_axis(corners[:, i], margin, resolution) for i in (0, 1))
    weights = barycentric(corners, torch.cartesian_prod(y, x).flip(1))
    bar = progress_bar()
    bar.disable = not progress
    with bar:
        points = bar.track(weights.tolist(), description="measuring the plane")
        losses = torch.tensor([_loss(backbone, experts, w, examples) for w in points], dtype=torch.float64)
    grid = (resolution, resolution)
    return Plane(
        task.name,
        split,
        (a.name, b.name, c.name),
        _tuples(corners),
        corner_loss,
        _tuples(x),
        _tuples(y),
        _tuples(losses.view(grid)),
        _tuples(weights.view(*grid, 3)),
        len(examples),
    )


def gram(experts: Sequence[Expert]) -> Tensor:
    """Inner products of experts ``[K, K]`` in the space in which they mix, in float64.

    For LoRA that of ΔW, from the factors: Σ_modules tr((B_iᵀ B_j)(A_j A_iᵀ)) s_i s_j, without forming any ΔW.
    """
    count, experts = len(experts), on_cpu(experts)
    products = torch.zeros(count, count, dtype=torch.float64)
    factors = [lora_factors(e) for e in experts] if is_lora(experts[0]) else []
    for i, j in combinations_with_replacement(range(count), 2):
        if factors:
            shared = [m for m in factors[i] if m in factors[j]]
            value = sum(delta_inner(factors[i][m], factors[j][m]) for m in shared)
        else:
            left, right = experts[i].tensors, experts[j].tensors
            value = sum(float((left[k].double() * right[k].double()).sum()) for k in left)
        products[i, j] = products[j, i] = value
    return products


def corner_coordinates(products: Tensor, names: Sequence[str]) -> Tensor:
    """Where three experts lie in their plane, ``[3, 2]``: the first at the origin, the second on the x axis.

    Args:
        products: their inner products ``[3, 3]``, see :func:`gram`.

    Raises:
        RefusedError: if they lie on one line.
    """
    to_first = products - products[:1] - products[:, :1] + products[0, 0]  # inner products of φ_i − φ_a
    side = math.sqrt(max(float(to_first[1, 1]), 0.0))
    along = float(to_first[1, 2]) / side if side else 0.0
    height = math.sqrt(max(float(to_first[2, 2]) - along**2, 0.0))
    longest = math.sqrt(float(to_first.diagonal().max().clamp_min(0)))
    if min(side, height) <= _FLAT * longest:
        raise RefusedError(
            f"experts {', '.join(map(repr, names))} lie on one line (sides {side:.3g} and {longest:.3g}, height "
            f"{height:.3g}), so they span no plane: choose another expert, or look at the line with connectivity()"
        )
    return torch.tensor([[0.0, 0.0], [side, 0.0], [along, height]], dtype=torch.float64)


def barycentric(corners: Tensor, points: Tensor) -> Tensor:
    """Weights ``[n, 3]`` of the three corners at points ``[n, 2]``; each row sums to one, outside the triangle with signs."""
    third = points[:, 1] / corners[2, 1]
    second = (points[:, 0] - third * corners[2, 0]) / corners[1, 0]
    return torch.stack([1 - second - third, second, third], dim=1)


def _axis(corners: Tensor, margin: float, resolution: int) -> Tensor:
    low, high = float(corners.min()), float(corners.max())
    room = margin * (high - low)
    return torch.linspace(low - room, high + room, resolution, dtype=torch.float64)


def _loss(
    backbone: Backbone,
    experts: Sequence[Expert],
    weights: Sequence[float],
    examples: Sequence[Example],
    *,
    finite: bool = False,
) -> float:
    """Mean log-loss; far outside the experts it may be NaN, unless it has to be ``finite``."""
    mixture, config = affine_mixture(experts, weights)
    with running(backbone, mixture, config) as model:
        return mean_log_loss(backbone, examples, model, finite=finite)


def _tuples(tensor: Tensor) -> Any:
    """A tensor's numbers as nested tuples."""
    return tuple(map(_tuples, tensor)) if tensor.dim() else float(tensor)
