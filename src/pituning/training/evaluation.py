"""Score an expert, a mixture or the bare backbone on a split."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor

from pituning.backbones.base import IMAGE_BATCH_SIZE, Backbone, Batch, common_choices
from pituning.errors import RefusedError
from pituning.example import Box, Example
from pituning.experts.expert import Expert
from pituning.methods.attach import attached
from pituning.metrics.registry import Answers, Metric, metric_named, metric_names
from pituning.tasks.task import Task
from pituning.training.module import MixtureModel

BATCH_SIZE = 64

Answer: TypeAlias = "int | str | Box | None"
"""Position of a choice, a free-form text, or a box (``None``: no box was found)."""


@dataclass(frozen=True)
class Evaluation:
    """Result on one split.

    Attributes:
        metrics: ``log-loss`` (mean −log p(right answer) per example, nats) and the task's metric.
        metric: name of the task's own metric.
        predictions: the answer to each example: the position of the chosen one; for open-ended tasks a text or a box.
    """

    task: str
    split: str
    expert: str
    metric: str
    metrics: Mapping[str, float]
    predictions: tuple[Answer, ...]

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
    """Evaluate an expert, or the bare backbone (``expert=None``), on a task.

    Closed choices are scored, free-form answers generated, and boxes located.

    Args:
        limit: at most so many examples, a fixed sample of the split.

    Raises:
        DataError: if the split is empty.
        ExpertError: if the expert does not fit the backbone.
        RefusedError: if the task's metric does not fit its answers, or the backbone cannot give such answers.
        UnknownNameError: if there is no metric of that name.
    """
    examples = task.split(split, limit)
    metric = metric_named(task.metric)
    truth = _truth(metric, task, examples)
    if expert is not None:
        expert.require_backbone(backbone)
    with attached(backbone, expert.config, expert.tensors) if expert else nullcontext():
        log_p = log_probabilities(backbone, examples)
        found = log_p.argmax(1).tolist() if metric.answers == "choice" else _open_answers(backbone, examples, metric)
    metrics = {metric.name: metric.compute(truth, found), "log-loss": log_loss(log_p, examples)}
    name = expert.name if expert else f"{backbone.name} (zero-shot)"
    return Evaluation(task.name, split, name, metric.name, metrics, tuple(found))


def _truth(metric: Metric, task: Task, examples: Sequence[Example]) -> Sequence[Answer]:
    """The right answers, as the metric compares them."""
    kind: Answers
    truth: Sequence[Answer]
    boxes = [e.box for e in examples if e.box is not None]
    if common_choices(examples):
        kind, truth = "choice", [e.label for e in examples]
    elif not boxes:
        kind, truth = "text", [e.target for e in examples]
    elif len(boxes) == len(examples):
        kind, truth = "box", boxes
    else:
        raise RefusedError(
            f"task {task.name!r}: only {len(boxes)} of {len(examples)} examples have a box; give all one"
        )
    if kind != metric.answers:
        raise RefusedError(
            f"task {task.name!r}: metric {metric.name!r} compares answers of the kind {metric.answers!r}, but the task's "
            f"are of the kind {kind!r}; its metric may be {' or '.join(metric_names(kind))}"
        )
    return truth


@torch.no_grad()
def _open_answers(backbone: Backbone, examples: Sequence[Example], metric: Metric) -> list[Any]:
    return _by_batch(backbone, examples, backbone.locate if metric.answers == "box" else backbone.generate)


@torch.no_grad()
def log_probabilities(
    backbone: Backbone, examples: Sequence[Example], model: MixtureModel | None = None, batch_size: int | None = None
) -> Tensor:
    """log p(choice | input), shape ``[examples, choices]``, of whatever the backbone carries, or of a mixture on it.

    Open-ended examples have one column, log p(target | input), summed over the target's tokens: shape ``[examples, 1]``.
    """
    choices = common_choices(examples)
    runner = model if model is not None else backbone

    def rows(batch: Batch) -> Tensor:
        if choices:
            return F.log_softmax(runner.score(batch, choices).float(), dim=1).cpu()
        return -runner.loss(batch).float().cpu().unsqueeze(1)

    return torch.stack(_by_batch(backbone, examples, rows, batch_size))


def _by_batch(
    backbone: Backbone,
    examples: Sequence[Example],
    compute: Callable[[Batch], Iterable[Any]],
    batch_size: int | None = None,
) -> list[Any]:
    """What ``compute`` gives for every example, in their order."""
    size = batch_size or (IMAGE_BATCH_SIZE if any(e.image is not None for e in examples) else BATCH_SIZE)
    rows: list[Any] = [None] * len(examples)
    # batches of similar length waste less padding; example n's scores do not depend on its neighbours
    order = sorted(range(len(examples)), key=lambda i: sum(len(t) for t in examples[i].texts))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        computed = compute(backbone.collate([examples[i] for i in chosen]))
        for index, row in zip(chosen, computed, strict=True):
            rows[index] = row
    return rows


def mean_log_loss(backbone: Backbone, examples: Sequence[Example], model: MixtureModel | None = None) -> float:
    """Mean −log p(right answer), in nats per example."""
    return log_loss(log_probabilities(backbone, examples, model), examples)


def log_loss(log_p: Tensor, examples: Sequence[Example]) -> float:
    """Mean −log p(right answer) of rows ``[examples, choices]``, in nats per example."""
    return float(-log_p[torch.arange(len(examples)), _columns(examples)].mean())


def calibrated_losses(log_p: Tensor, examples: Sequence[Example]) -> Tensor:
    """Per-example log-loss ``[examples]`` after the one temperature T that minimises their mean −log softmax(log p / T).

    A few shots drive the log-loss up by overconfidence long before they hurt the ranking of the answers; one temperature
    for all examples removes that part. Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.

    Open-ended examples have no other answers to compare with: their loss is −log p(target) as it is.
    """
    truth = _columns(examples)
    if not common_choices(examples):
        return -log_p[:, 0].double()

    def losses(log_temperature: float) -> Tensor:
        return F.cross_entropy(log_p.double() * math.exp(-log_temperature), truth, reduction="none")

    found = minimize_scalar(lambda t: float(losses(t).mean()), bounds=(-2.0, 4.0), method="bounded")
    return losses(float(found.x))


def _columns(examples: Sequence[Example]) -> Tensor:
    """Where in its row of log-probabilities each example's right answer stands."""
    return torch.tensor([e.label if e.choices else 0 for e in examples])
