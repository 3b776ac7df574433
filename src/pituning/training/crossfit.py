"""Few-shot decisions by cross-fitting: learning rate and number of steps come from the log-loss on held-out folds.

Accuracy on eight examples is a lottery; the log-loss of the same eight is not. The held-out predictions of all folds are
pooled, and their log-loss is read after one temperature, so that mere overconfidence does not stop a run too early. For
open-ended tasks it is −log p of the whole target, per example, as it is. Every arm of a comparison uses the same grid and
the same folds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor

from pituning.backbones.base import Backbone
from pituning.data.fewshot import stratified_folds
from pituning.errors import PituningError
from pituning.example import Example
from pituning.interpolation.mixture import Mixture
from pituning.training.evaluation import calibrated_losses, log_probabilities
from pituning.training.module import running
from pituning.training.trainer import TrainSettings, fit

Start = Callable[[int | None], tuple[Mixture, Mapping[str, Any]]]
"""Gives a fresh mixture and its configuration for a fold, or (``None``) for all examples."""


@dataclass(frozen=True)
class Search:
    """The grid of a few-shot run.

    Attributes:
        learning_rates: tried one after the other.
        steps: the longest run; the held-out log-loss is read every ``eval_every`` steps and before the first.
        folds: cross-fitting folds.
        fold_seed: seed of the split into folds.
        optimizer, weights_to_start, weights_spread: see :class:`TrainSettings`.
    """

    learning_rates: tuple[float, ...] = (3e-4, 1e-3)
    steps: int = 40
    eval_every: int = 20
    folds: int = 2
    fold_seed: int = 0
    batch_size: int = 16
    alpha_learning_rate: float = 0.0
    optimizer: str = "adamw"
    weights_to_start: float = 0.0
    weights_spread: float = 0.0

    def settings(self, learning_rate: float, steps: int, seed: int = 0) -> TrainSettings:
        """The run of one cell of the grid: constant rate, so that fewer steps are, but for the warm-up, a prefix of more."""
        return TrainSettings(
            learning_rate=learning_rate,
            alpha_learning_rate=self.alpha_learning_rate,
            optimizer=self.optimizer,
            weights_to_start=self.weights_to_start,
            weights_spread=self.weights_spread,
            steps=steps,
            batch_size=self.batch_size,
            schedule="constant_with_warmup",
            eval_every=self.eval_every,
            seed=seed,
        )


@dataclass(frozen=True)
class CrossFit:
    """The outcome: the best cell, its held-out calibrated log-loss, and the whole grid.

    Attributes:
        curves: learning rate → step → calibrated log-loss over the held-out examples of all folds.
        losses: the best cell's loss per held-out example; the order is the same for every start.
    """

    learning_rate: float
    steps: int
    loss: float
    curves: Mapping[float, Mapping[int, float]] = field(default_factory=dict)
    losses: Tensor = field(default_factory=lambda: torch.zeros(0), compare=False, repr=False)


def cross_fit(
    backbone: Backbone, start: Start, examples: Sequence[Example], search: Search, seed: int = 0, *, warm: bool = True
) -> CrossFit:
    """Find learning rate and steps for a start.

    Args:
        start: called once per fold and learning rate; for a start that contains the own expert it returns the one
            trained without that fold.
        seed: training seed.
        warm: whether the start carries what experts of other tasks know; see :func:`choose_cell`.
    """
    folds = stratified_folds(examples, search.folds, search.fold_seed)
    held = [example for _, part in folds for example in part]
    losses: dict[tuple[float, int], Tensor] = {}
    for rate in sorted(search.learning_rates):
        begun = [start(i) for i in range(len(folds))]
        curves = [_fold_curve(backbone, b, parts, search, rate, seed) for b, parts in zip(begun, folds, strict=True)]
        for step in curves[0]:
            log_p = torch.cat([curve[step] for curve in curves])
            losses[rate, step] = calibrated_losses(log_p, held)
        if not any(p.requires_grad for n, p in begun[0][0].named_parameters() if n != "alpha"):
            break  # nothing is trained to which the rate applies
    rate, step = choose_cell(losses, warm)
    means: dict[float, dict[int, float]] = {}
    for (r, s), values in losses.items():
        means.setdefault(r, {})[s] = float(values.mean())
    return CrossFit(rate, step, means[rate][step], means, losses[rate, step])


def choose_cell(losses: Mapping[tuple[float, int], Tensor], warm: bool) -> tuple[float, int]:
    """Learning rate and steps, given that a few dozen held-out examples seldom tell the cells of the grid apart.

    All cells whose loss is within one (paired) standard error of the best are as good as the best. A *warm* start, from
    experts of other tasks, takes the lowest rate among them: a hot one erases what they know faster than a few shots can
    show. A start from scratch has nothing to lose and takes the best rate. Either takes the most steps that remain, since
    the refit has more examples than a fold had. A warm start that can be trained is trained: its experts and weights were
    chosen on all shots, the held-out ones among them, so that before the first step it looks better than it is.

    Args:
        losses: (learning rate, steps) → per-example held-out loss, all over the same examples. A cell with one that is not
            finite has diverged, and is not taken.

    Raises:
        PituningError: if every cell has diverged; it names them.
    """
    if warm and any(steps for _, steps in losses):
        losses = {cell: values for cell, values in losses.items() if cell[1]}
    losses = {cell: values for cell, values in losses.items() if bool(values.isfinite().all())} or _diverged(losses)
    best = min(losses, key=lambda cell: (float(losses[cell].mean()), cell))

    cells = [cell for cell in losses if within_standard_errors(losses[cell], losses[best])]
    if warm:
        return min(cells, key=lambda cell: (cell[0], -cell[1]))
    return min(cells, key=lambda cell: (-cell[1], float(losses[cell].mean()), cell[0]))


def _diverged(losses: Mapping[tuple[float, int], Tensor]) -> NoReturn:
    cells = ", ".join(f"{steps} steps at {rate:g}" for rate, steps in losses)
    raise PituningError(f"the held-out loss is not a finite number after any of {cells}: lower the learning rates")


def within_standard_errors(losses: Tensor, best: Tensor, count: float = 1) -> bool:
    """Whether the paired difference of two per-example losses, all of them finite, is no larger than so many of its standard
    errors.
    """
    difference = losses - best
    return float(difference.mean()) <= count * float(difference.std()) / math.sqrt(len(difference))


def _fold_curve(
    backbone: Backbone,
    begun: tuple[Mixture, Mapping[str, Any]],
    parts: tuple[Sequence[Example], Sequence[Example]],
    search: Search,
    rate: float,
    seed: int,
) -> Mapping[int, Tensor]:
    """Held-out log p by step, of one fold at one learning rate; NaN where it has diverged: `choose_cell` sees to it."""
    (mixture, config), (train, held_out) = begun, parts
    if any(p.requires_grad for p in mixture.parameters()):
        settings = search.settings(rate, search.steps, seed)
        run = fit(backbone, mixture, config, train, settings, held_out=held_out, may_diverge=True)
        return run.held_out_log_p
    with running(backbone, mixture, config) as model:
        return {0: log_probabilities(backbone, held_out, model, finite=False)}


def fold_examples(examples: Sequence[Example], search: Search, fold: int | None) -> Sequence[Example]:
    """The training part of a fold, or all examples."""
    return examples if fold is None else stratified_folds(examples, search.folds, search.fold_seed)[fold][0]
