"""Score an expert, a mixture or the bare backbone on a split."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.optimize import minimize, minimize_scalar
from torch import Tensor

from pituning.backbones.base import IMAGE_BATCH_SIZE, Backbone, Batch, common_choices, require_targets
from pituning.errors import DataError, PituningError, RefusedError, unknown_name
from pituning.example import Box, Example
from pituning.experts.expert import Expert
from pituning.methods.attach import attached
from pituning.metrics.registry import FITTING, Answers, Metric, answers_of, metric_named, metric_names
from pituning.tasks.task import Task
from pituning.training.module import MixtureModel

BATCH_SIZE = 64

AnswerBy: TypeAlias = Literal["score", "beam"]
"""How one of many closed choices is found."""

Answer: TypeAlias = "int | str | Box | None"
"""Position of a choice, a free-form text, or a box (``None``: no box was found)."""


@dataclass(frozen=True)
class Evaluation:
    """Result on one split.

    Attributes:
        metrics: ``log-loss`` (mean −log p(right answer) per example, nats) and the task's metric.
        metric: name of the task's own metric.
        predictions: the answer to each example: the position of the chosen one; for open-ended tasks a text or a box.
        losses: log-loss of each example, nats; NaN where none of the answers that may be given is right.
    """

    task: str
    split: str
    expert: str
    metric: str
    metrics: Mapping[str, float]
    predictions: tuple[Answer, ...]
    losses: tuple[float, ...] = field(default=(), compare=False, repr=False)

    @property
    def value(self) -> float:
        """The task's own metric."""
        return self.metrics[self.metric]

    def __str__(self) -> str:
        figures = ", ".join(f"{name} {value:.4f}" for name, value in self.metrics.items())
        return f"{self.expert} on {self.task}/{self.split} ({len(self.predictions)} examples): {figures}"


def evaluate(
    backbone: Backbone,
    expert: Expert | None,
    task: Task,
    split: str = "test",
    limit: int | None = None,
    *,
    by: AnswerBy = "score",
    metrics: Sequence[str] = (),
) -> Evaluation:
    """Evaluate an expert, or the bare backbone (``expert=None``), on a task.

    Closed choices are scored (or searched for, see ``by``), free-form answers generated, and boxes located.

    Args:
        limit: at most so many examples, a fixed sample of the split.
        by: for closed choices, ``"score"`` compares the probabilities of all of them, ``"beam"`` searches for the best one
            (the paper's two ways to evaluate VQA; beam search is faster where there are thousands, and misses some).
        metrics: names of further metrics than the task's own, such as METEOR and SPICE of captions.

    Raises:
        DataError: if the split is empty, or an example has no answer.
        ExpertError: if the expert does not fit the backbone.
        RefusedError: if a metric does not fit the task's answers, or the backbone cannot give such answers.
        UnknownNameError: if there is no metric of that name.
        MissingDependencyError: if a metric needs a package or program that is not there.
        PituningError: if the model's scores of an example are no numbers; it names the example.
    """
    examples = tuple(task.split(split, limit))  # made once, their pictures only when they are opened
    wanted = [metric_named(name) for name in dict.fromkeys((task.metric, *task.more_metrics, *metrics))]
    for metric in wanted:
        metric.require()  # before hours of answering
    kind = _answer_kind(task, examples)
    truths = {metric.name: _truth(metric, task, kind, examples) for metric in wanted}
    with _carried(backbone, expert):
        losses, found = _answers(backbone, task, examples, kind, by, losses=True)
    known = [loss for loss in losses if not math.isnan(loss)]
    values = {
        metric.name: metric.compute(truths[metric.name], _as_text(metric, kind, examples, found)) for metric in wanted
    }
    name = expert.name if expert else f"{backbone.name} (zero-shot)"
    values["log-loss"] = statistics.fmean(known) if known else math.nan
    return Evaluation(task.name, split, name, task.metric, values, tuple(found), tuple(losses))


def predict(
    backbone: Backbone,
    expert: Expert | None,
    task: Task,
    split: str = "test",
    limit: int | None = None,
    *,
    by: AnswerBy = "score",
) -> list[tuple[Example, Answer]]:
    """The answers to the examples of a split, which need no right answers of their own.

    Args:
        by: as in :func:`evaluate`.

    Returns:
        every example with the answer: text, or a box (``None``: no box was found).

    Raises:
        as :func:`evaluate`.
    """
    examples = tuple(task.split(split, limit))
    kind = answers_of(task.metric, task.choices)
    with _carried(backbone, expert):
        _, found = _answers(backbone, task, examples, kind, by, losses=False)
    answers: list[Answer] = [task.choices[a] if kind == "choice" else a for a in found]
    return list(zip(examples, answers, strict=True))


def _carried(backbone: Backbone, expert: Expert | None) -> AbstractContextManager[object]:
    if expert is None:
        return nullcontext()
    expert.require_backbone(backbone)
    return attached(backbone, expert.config, expert.tensors)


def _answer_kind(task: Task, examples: Sequence[Example]) -> Answers:
    """What the task's examples are answered by.

    Raises:
        DataError: if an example has no right answer.
        RefusedError: if only some of them have a box.
    """
    boxes = 0
    for example in examples:
        if not example.target and not example.answers:
            raise DataError(
                f"example {example.id!r} has no right answer, so it cannot be evaluated; `pituning predict` writes the "
                "answers for an evaluation server"
            )
        boxes += example.box is not None
    if common_choices(examples):
        return "choice"
    if boxes not in (0, len(examples)):
        raise RefusedError(f"task {task.name!r}: only {boxes} of {len(examples)} examples have a box; give all one")
    return "box" if boxes else "text"


def _truth(metric: Metric, task: Task, kind: Answers, examples: Sequence[Example]) -> Sequence[Any]:
    """The right answers, as the metric compares them."""
    if metric.answers not in FITTING[kind]:
        fitting = [name for answers in FITTING[kind] for name in metric_names(answers)]
        raise RefusedError(
            f"task {task.name!r}: metric {metric.name!r} compares answers of the kind {metric.answers!r}, but the task's "
            f"are of the kind {kind!r}; its metric may be {' or '.join(fitting)}"
        )
    if metric.answers == "soft":
        return [dict(e.answers) or {e.target: 1.0} for e in examples]
    if metric.answers == "references":
        return [[answer for answer, _ in e.answers] or [e.target] for e in examples]
    if metric.answers == "box":
        return [e.box for e in examples]
    return [e.label if kind == "choice" else e.target for e in examples]


def _as_text(metric: Metric, kind: Answers, examples: Sequence[Example], found: Sequence[Any]) -> Sequence[Any]:
    """What was found, as the metric compares it."""
    if kind == "choice" and metric.answers == "soft":
        return [e.choices[position] for e, position in zip(examples, found, strict=True)]
    return found


@torch.no_grad()
def _answers(
    backbone: Backbone, task: Task, examples: Sequence[Example], kind: Answers, by: AnswerBy, *, losses: bool
) -> tuple[list[float], list[Any]]:
    """Each example's log-loss (empty unless asked for; NaN where no answer that may be given is right) and its answer."""
    choices = common_choices(examples)

    def scored(batch: Batch, part: Sequence[Example]) -> list[tuple[float, int]]:
        log_p = F.log_softmax(backbone.score(batch, choices).float(), dim=1).cpu()
        _require_numbers(log_p, part, f"task {task.name!r}: ")
        target = [-float(row[e.label]) if losses and e.target else math.nan for row, e in zip(log_p, part, strict=True)]
        return list(zip(target, log_p.argmax(1).tolist(), strict=True))

    def searched(batch: Batch, part: Sequence[Example]) -> list[tuple[float, Any]]:
        target = [math.nan] * len(part)
        if losses and (answered := [n for n, e in enumerate(part) if e.target]):
            whole = batch if len(answered) == len(part) else backbone.collate([part[n] for n in answered])
            found = backbone.loss(whole).float().cpu()
            _require_numbers(-found.unsqueeze(1), [part[n] for n in answered], f"task {task.name!r}: ")
            for n, loss in zip(answered, found.tolist(), strict=True):
                target[n] = loss
        if kind == "box":
            return list(zip(target, backbone.locate(batch), strict=True))
        only = {"choices": choices} if choices else {}
        texts = backbone.generate(batch, **{**task.generation, **only})
        return list(zip(target, [choices.index(t.strip()) for t in texts] if choices else texts, strict=True))

    if by not in ("score", "beam"):
        raise unknown_name("way to answer", by, ("score", "beam"))
    if by == "beam" and choices and not backbone.searches_choices:
        raise RefusedError(
            f"backbone {backbone.name!r} cannot search among closed choices by beam; an OFA can, and by='score' always works"
        )
    rows = _by_batch(backbone, examples, scored if kind == "choice" and by == "score" else searched)
    return ([loss for loss, _ in rows] if losses else []), [answer for _, answer in rows]


@torch.no_grad()
def log_probabilities(
    backbone: Backbone,
    examples: Sequence[Example],
    model: MixtureModel | None = None,
    batch_size: int | None = None,
    *,
    finite: bool = True,
) -> Tensor:
    """log p(choice | input), shape ``[examples, choices]``, of whatever the backbone carries, or of a mixture on it.

    Open-ended examples have one column, log p(target | input), summed over the target's tokens: shape ``[examples, 1]``.

    Args:
        finite: raise where the scores are no numbers; a search, in which such a model loses, takes them as they are.

    Raises:
        DataError: if an open-ended example has no target.
        PituningError: if the model's scores of an example are NaN or +∞; it names the example.
    """
    choices = common_choices(examples)
    if not choices:
        require_targets(examples)
    runner = model if model is not None else backbone

    def rows(batch: Batch, part: Sequence[Example]) -> Tensor:
        if choices:
            log_p = F.log_softmax(runner.score(batch, choices).float(), dim=1).cpu()
        else:
            log_p = -runner.loss(batch).float().cpu().unsqueeze(1)
        if finite:
            _require_numbers(log_p, part)
        return log_p

    return torch.stack(_by_batch(backbone, examples, rows, batch_size))


def _require_numbers(log_p: Tensor, examples: Sequence[Example], place: str = "") -> None:
    """Raise where a row ``[examples, choices]`` has NaN (of +∞, too, softmax makes NaN); −∞ is an impossible answer."""
    for example, wrong in zip(examples, (log_p.isnan() | (log_p == math.inf)).any(1).tolist(), strict=True):
        if wrong:
            raise PituningError(
                f"{place}the model's scores of example {example.id!r} are NaN or infinite, so that they give no answer: its "
                "training has diverged, or half precision has overflowed; load the backbone in float32, or train the expert "
                "with a lower learning rate"
            )


def _by_batch(
    backbone: Backbone,
    examples: Sequence[Example],
    compute: Callable[[Batch, Sequence[Example]], Iterable[Any]],
    batch_size: int | None = None,
) -> list[Any]:
    """What ``compute`` gives for every example, in their order."""
    lengths = [(sum(len(t) for t in e.texts), e.image is not None) for e in examples]
    size = batch_size or (IMAGE_BATCH_SIZE if any(pictured for _, pictured in lengths) else BATCH_SIZE)
    rows: list[Any] = [None] * len(examples)
    # batches of similar length waste less padding; example n's scores do not depend on its neighbours
    order = sorted(range(len(examples)), key=lambda i: lengths[i][0])
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        part = [examples[i] for i in chosen]
        for index, row in zip(chosen, compute(backbone.collate(part), part), strict=True):
            rows[index] = row
    return rows


def mean_log_loss(
    backbone: Backbone, examples: Sequence[Example], model: MixtureModel | None = None, *, finite: bool = True
) -> float:
    """Mean −log p(right answer), in nats per example; ``finite`` as in :func:`log_probabilities`."""
    return log_loss(log_probabilities(backbone, examples, model, finite=finite), examples)


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
    rows = _finite(log_p)

    def losses(log_temperature: float) -> Tensor:
        return F.cross_entropy(rows * math.exp(-log_temperature), truth, reduction="none")

    found = minimize_scalar(lambda t: float(losses(t).mean()), bounds=(-2.0, 4.0), method="bounded")
    return losses(float(found.x))


BIAS_PENALTY = 1.0
"""What a squared bias costs in :func:`bias_calibrated_losses`, in nats over all examples: a normal prior of variance ½."""


def bias_calibrated_losses(log_p: Tensor, examples: Sequence[Example]) -> Tensor:
    """Per-example log-loss ``[examples]`` after a temperature T and one bias b per answer, −log softmax(log p / T + b).

    T and b minimise the sum of the losses and of the squared biases. The expert of another task may prefer one of the answers
    whatever the example, which a few training steps mend; what counts is how well it tells the answers apart. Source:
    Alexandari et al., "Maximum Likelihood with Bias-Corrected Calibration is Hard-To-Beat at Label Shift Adaptation", ICML
    2020; the penalty is ours, for a few shots.

    Open-ended examples have no other answers to compare with: their loss is −log p(target) as it is.
    """
    truth = _columns(examples)
    if not common_choices(examples):
        return -log_p[:, 0].double()
    rows = _finite(log_p)

    def losses(found: Tensor) -> Tensor:
        return F.cross_entropy(rows * found[0] + found[1:], truth, reduction="none")

    def with_gradient(values: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        found = torch.tensor(values, requires_grad=True)
        total = losses(found).sum() + BIAS_PENALTY * found[1:].square().sum()
        (gradient,) = torch.autograd.grad(total, found)
        return float(total.detach()), gradient.numpy()

    start = np.array([1.0] + [0.0] * rows.shape[1])
    bounds = [(math.exp(-4.0), math.exp(2.0))] + [(None, None)] * rows.shape[1]  # 1 / T as in `calibrated_losses`
    with torch.enable_grad():
        best = minimize(with_gradient, start, jac=True, bounds=bounds, method="L-BFGS-B").x  # the problem is convex
    return losses(torch.from_numpy(best)).detach()


def _finite(log_p: Tensor) -> Tensor:
    """An answer of probability zero has a log-probability to calibrate, too."""
    return log_p.double().clamp_min(torch.finfo(torch.float32).min)


def bias_calibrated_loss(log_p: Tensor, examples: Sequence[Example]) -> float:
    """Mean of :func:`bias_calibrated_losses`, in nats per example."""
    return float(bias_calibrated_losses(log_p, examples).mean())


def _columns(examples: Sequence[Example]) -> Tensor:
    """Where in its row of log-probabilities each example's right answer stands."""
    require_targets(examples)
    return torch.tensor([e.label if e.choices else 0 for e in examples])
