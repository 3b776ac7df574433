"""Score an expert, a mixture or the bare backbone on a split."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor

from pituning.backbones.base import Backbone, Batch, common_choices
from pituning.example import Example
from pituning.experts.expert import Expert
from pituning.methods.attach import attached
from pituning.metrics.classification import classification_metric
from pituning.tasks.task import Task
from pituning.training.module import MixtureModel

BATCH_SIZE = 64


@dataclass(frozen=True)
class Evaluation:
    """Result on one split.

    Attributes:
        metrics: ``log-loss`` (mean −log p(right choice), nats) and the task's metric.
        metric: name of the task's own metric.
        predictions: index of the chosen answer, per example.
    """

    task: str
    split: str
    expert: str
    metric: str
    metrics: Mapping[str, float]
    predictions: tuple[int, ...]

    @property
    def value(self) -> float:
        """The task's own metric."""
        return self.metrics[self.metric]

    def __str__(self) -> str:
        figures = ", ".join(f"{name} {value:.4f}" for name, value in self.metrics.items())
        return f"{self.expert} on {self.task}/{self.split} ({len(self.predictions)} examples): {figures}"


def evaluate(
    backbone: Backbone, expert: Expert | None, task: Task, split: str = "test", limit: int | None = None
) -> Evaluation:
    """Evaluate an expert, or the bare backbone (``expert=None``), on a task with closed choices.

    Args:
        limit: at most so many examples, a fixed sample of the split.

    Raises:
        DataError: if the split is empty.
        ExpertError: if the expert does not fit the backbone.
    """
    examples = task.split(split, limit)
    if expert is not None:
        expert.require_backbone(backbone)
    with attached(backbone, expert.config, expert.tensors) if expert else nullcontext():
        log_p = log_probabilities(backbone, examples)
    truth = [e.label for e in examples]
    found = log_p.argmax(1).tolist()
    metrics = {task.metric: classification_metric(task.metric, truth, found), "log-loss": log_loss(log_p, examples)}
    name = expert.name if expert else f"{backbone.name} (zero-shot)"
    return Evaluation(task.name, split, name, task.metric, metrics, tuple(found))


@torch.no_grad()
def log_probabilities(
    backbone: Backbone, examples: Sequence[Example], model: MixtureModel | None = None, batch_size: int = BATCH_SIZE
) -> Tensor:
    """log p(choice | input), shape ``[examples, choices]``, of whatever the backbone carries, or of a mixture on it."""
    choices = common_choices(examples)
    score: Callable[[Batch, Sequence[str]], Tensor] = model.score if model is not None else backbone.score
    rows: list[Any] = [None] * len(examples)
    # batches of similar length waste less padding; example n's scores do not depend on its neighbours
    order = sorted(range(len(examples)), key=lambda i: sum(len(t) for t in examples[i].texts))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        scores = score(backbone.collate([examples[i] for i in chosen]), choices)
        for index, row in zip(chosen, F.log_softmax(scores.float(), dim=1).cpu(), strict=True):
            rows[index] = row
    return torch.stack(rows)


def mean_log_loss(backbone: Backbone, examples: Sequence[Example], model: MixtureModel | None = None) -> float:
    """Mean −log p(right choice), in nats."""
    return log_loss(log_probabilities(backbone, examples, model), examples)


def log_loss(log_p: Tensor, examples: Sequence[Example]) -> float:
    """Mean −log p(right choice) of rows ``[examples, choices]``, in nats."""
    return float(-log_p[torch.arange(len(examples)), torch.tensor([e.label for e in examples])].mean())


def calibrated_losses(log_p: Tensor, examples: Sequence[Example]) -> Tensor:
    """Per-example log-loss ``[examples]`` after the one temperature T that minimises their mean −log softmax(log p / T).

    A few shots drive the log-loss up by overconfidence long before they hurt the ranking of the answers; one temperature
    for all examples removes that part. Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    """
    truth = torch.tensor([e.label for e in examples])

    def losses(log_temperature: float) -> Tensor:
        return F.cross_entropy(log_p.double() * math.exp(-log_temperature), truth, reduction="none")

    found = minimize_scalar(lambda t: float(losses(t).mean()), bounds=(-2.0, 4.0), method="bounded")
    return losses(float(found.x))
