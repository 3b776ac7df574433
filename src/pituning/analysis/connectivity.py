"""Linear mode connectivity: the loss along the straight path between two experts, and the barrier on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pituning.analysis.affine import affine_expert, double, measured, paired, require_common
from pituning.backbones.base import Backbone
from pituning.errors import PituningError
from pituning.experts.expert import Expert
from pituning.tasks.task import Task
from pituning.training.evaluation import Evaluation


@dataclass(frozen=True)
class Connectivity:
    """The path from expert a (t = 0) to expert b (t = 1), point by point.

    Attributes:
        metric: name of the task's own metric.
        t: the points, from 0 to 1.
        log_loss: mean log-loss at each point, nats per example.
        values: the metric at each point.
        barrier: max over t of loss(t) − ((1 − t) loss(0) + t loss(1)), nats; never below 0, which the ends have.
        barrier_at: the t of that maximum.
        barrier_error: its standard error over examples at that t, paired; it does not count the choice of t.
        examples: how many examples were measured.
    """

    task: str
    split: str
    experts: tuple[str, str]
    metric: str
    t: tuple[float, ...]
    log_loss: tuple[float, ...]
    values: tuple[float, ...]
    barrier: float
    barrier_at: float
    barrier_error: float
    examples: int

    @property
    def best(self) -> int:
        """Index of the point of the lowest log-loss."""
        return min(range(len(self.t)), key=self.log_loss.__getitem__)


def connectivity(
    backbone: Backbone,
    task: Task,
    a: Expert,
    b: Expert,
    points: int = 11,
    split: str = "dev",
    limit: int | None = None,
) -> Connectivity:
    """Log-loss and metric along φ(t) = (1 − t) φ_a + t φ_b; for LoRA, ΔW(t) = (1 − t) ΔW_a + t ΔW_b at rank r_a + r_b.

    The ends are the experts themselves, not mixtures at weight one.

    Args:
        points: equally spaced t, both ends included; at least 3.
        limit: at most so many examples, a fixed sample of the split.

    Raises:
        PituningError: for fewer than 3 points, or if the loss of an example that can be answered is not finite at one of them.
        DataError: if the split is empty, or has fewer than two examples that can be answered.
        RefusedError: if the experts have no exact interpolation.
        BackboneMismatchError: if an expert belongs to another backbone.

    Source: Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis", ICML 2020; the barrier as in
    Entezari et al., "The Role of Permutation Invariance in Linear Mode Connectivity of Neural Networks", ICLR 2022.
    """
    if points < 3:
        raise PituningError(f"a path needs at least 3 points, its ends and one between them, not {points}")
    require_common(backbone, [a, b])
    t = torch.linspace(0, 1, points, dtype=torch.float64)
    path = [a, *(affine_expert([a, b], [1 - x, x], f"t={x:.3f}") for x in t[1:-1].tolist()), b]
    places = [f"at t = {x:.3g} between {a.name!r} and {b.name!r}" for x in t.tolist()]
    found = [measured(backbone, e, where, task, split, limit) for e, where in zip(path, places, strict=True)]
    losses = torch.stack([double(f.losses) for f in found])
    excess = losses - ((1 - t[:, None]) * losses[0] + t[:, None] * losses[-1])
    highest = int(excess[1:-1].nanmean(1).argmax()) + 1
    barrier, error = paired(excess[highest])
    if barrier < 0:  # below the chord everywhere inside: the maximum is at the ends
        highest, barrier, error = 0, 0.0, 0.0
    return Connectivity(
        task.name,
        split,
        (a.name, b.name),
        task.metric,
        tuple(t.tolist()),
        tuple(map(_log_loss, found)),
        tuple(f.value for f in found),
        barrier,
        float(t[highest]),
        error,
        losses.shape[1],
    )


def _log_loss(found: Evaluation) -> float:
    return found.metrics["log-loss"]
