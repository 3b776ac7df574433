"""What each expert of a blend is worth: the blend's log-loss without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pituning.analysis.affine import affine_expert, double, measured, paired, require_common
from pituning.backbones.base import Backbone
from pituning.errors import PituningError, RefusedError
from pituning.experts.expert import Expert
from pituning.interpolation.build import Granularity, group_names
from pituning.tasks.task import Task


@dataclass(frozen=True)
class LeftOut:
    """The blend without one expert, the weights of the others scaled to the sum that they had with it.

    Attributes:
        weight: of the expert in the full blend, averaged over groups.
        log_loss: without it, nats per example.
        value: the task's own metric without it.
        difference: log-loss without it minus that of the full blend, nats: positive where the expert helps.
        error: standard error of the difference over examples, paired.
    """

    name: str
    weight: float
    log_loss: float
    value: float
    difference: float
    error: float


@dataclass(frozen=True)
class LeaveOneOut:
    """The full blend, and the blend without each of its experts in turn, in their order.

    Attributes:
        metric: name of the task's own metric.
        log_loss: of the full blend, nats per example.
        value: the metric of the full blend.
        examples: how many examples were measured.
    """

    task: str
    split: str
    metric: str
    log_loss: float
    value: float
    without: tuple[LeftOut, ...]
    examples: int


def leave_one_out(
    backbone: Backbone,
    task: Task,
    experts: Sequence[Expert],
    weights: Tensor | Sequence[float] | None = None,
    split: str = "dev",
    limit: int | None = None,
    *,
    granularity: Granularity = "model",
) -> LeaveOneOut:
    """Leave every expert out of a blend in turn.

    The blend is Σ_k w_k φ_k of the experts as they are, not trained on: of a saved interpolation whose experts were
    trained along, it is the part that the experts brought, at the learned weights (see :func:`lineage_weights`).

    Args:
        experts: at least two.
        weights: ``[K]``, or ``[groups, K]`` in the order of :func:`pituning.interpolation.group_names`; uniform by
            default. They sum to one (for methods with a natural zero they need not) and may be negative.
        limit: at most so many examples, a fixed sample of the split.

    Raises:
        PituningError: if the weights do not fit the experts, or the loss of an example that can be answered is not finite.
        DataError: if the split is empty, or has fewer than two examples that can be answered.
        RefusedError: for one expert, for experts that have no exact interpolation, or where the weights of the others
            sum to zero.
        BackboneMismatchError: if an expert belongs to another backbone.
    """
    if len(experts) < 2:
        raise RefusedError(f"leave-one-out needs at least two experts, not {len(experts)}")
    require_common(backbone, experts)
    groups = group_names(experts, granularity)
    rows = _rows(weights, len(experts), len(groups))
    blends = [affine_expert(experts, rows, "all", granularity)]
    for k, expert in enumerate(experts):
        others = [*experts[:k], *experts[k + 1 :]]
        # without an expert that adapts modules of its own, there are fewer groups, or in another order
        theirs = rows[[groups.index(group) for group in group_names(others, granularity)]]
        blends.append(affine_expert(others, _without(theirs, k, expert.name), f"without {expert.name}", granularity))
    full, *found = [measured(backbone, b, f"of the blend {b.name!r}", task, split, limit) for b in blends]
    reference = double(full.losses)
    without = []
    for k, (expert, result) in enumerate(zip(experts, found, strict=True)):
        difference, error = paired(double(result.losses) - reference)
        without.append(
            LeftOut(expert.name, float(rows[:, k].mean()), result.metrics["log-loss"], result.value, difference, error)
        )
    return LeaveOneOut(
        task.name, split, task.metric, full.metrics["log-loss"], full.value, tuple(without), len(reference)
    )


def lineage_weights(expert: Expert) -> dict[str, float]:
    """The experts that an expert was blended from, by name, with their mean weights.

    Raises:
        PituningError: if its card names none.
    """
    if not expert.card.lineage:
        raise PituningError(
            f"expert {expert.name!r} was not blended from others, so none can be left out: name an interpolation, or the "
            "experts of a blend"
        )
    return {str(parent["name"]): float(parent["weight"]) for parent in expert.card.lineage}


def _rows(weights: Tensor | Sequence[float] | None, count: int, groups: int) -> Tensor:
    """Weights ``[groups, K]`` in float64."""
    if weights is None:
        weights = [1 / count] * count
    rows = torch.as_tensor(weights, dtype=torch.float64)
    rows = rows.expand(groups, -1) if rows.dim() == 1 else rows
    if rows.shape != (groups, count) or not rows.isfinite().all():
        raise PituningError(
            f"weights {rows.tolist()} do not fit {count} experts: expected [{count}] or [{groups}, {count}] finite numbers"
        )
    return rows


def _without(rows: Tensor, k: int, name: str) -> Tensor:
    """The weights of the other experts, scaled to the sum of all."""
    others = torch.cat([rows[:, :k], rows[:, k + 1 :]], dim=1)
    rest = others.sum(1, keepdim=True)
    if (rest.abs() < 1e-6).any():
        raise RefusedError(
            f"without {name!r} the weights of the others sum to {float(rest[rest.abs().argmin()]):g} and cannot be "
            "scaled: leave it in, or give the others weight"
        )
    return others / rest * rows.sum(1, keepdim=True)
