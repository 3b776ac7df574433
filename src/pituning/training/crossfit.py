"""Few-shot decisions by cross-fitting: learning rate and number of steps come from the log-loss on held-out folds.

Accuracy on eight examples is a lottery; the log-loss of the same eight is not. Every arm of a comparison uses the same
grid and the same folds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pituning.backbones.base import Backbone
from pituning.data.fewshot import stratified_folds
from pituning.example import Example
from pituning.interpolation.mixture import Mixture
from pituning.training.evaluation import mean_log_loss
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
    """

    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    steps: int = 40
    eval_every: int = 10
    folds: int = 2
    fold_seed: int = 0
    batch_size: int = 16
    alpha_learning_rate: float = 0.0

    def settings(self, learning_rate: float, steps: int, seed: int = 0) -> TrainSettings:
        """The run of one cell of the grid: constant rate, so that fewer steps are a prefix of more."""
        return TrainSettings(
            learning_rate=learning_rate,
            alpha_learning_rate=self.alpha_learning_rate,
            steps=steps,
            batch_size=self.batch_size,
            schedule="constant_with_warmup",
            eval_every=self.eval_every,
            seed=seed,
        )


@dataclass(frozen=True)
class CrossFit:
    """The outcome: the best cell, its mean held-out log-loss, and the whole grid.

    Attributes:
        curves: learning rate → step → mean held-out log-loss over the folds.
        fold_losses: log-loss of the best cell, fold by fold.
    """

    learning_rate: float
    steps: int
    loss: float
    curves: Mapping[float, Mapping[int, float]] = field(default_factory=dict)
    fold_losses: tuple[float, ...] = ()


def cross_fit(backbone: Backbone, start: Start, examples: Sequence[Example], search: Search, seed: int = 0) -> CrossFit:
    """Find learning rate and steps for a start.

    Args:
        start: called once per fold and learning rate; for a start that contains the own expert it returns the one
            trained without that fold.
        seed: training seed.
    """
    folds = stratified_folds(examples, search.folds, search.fold_seed)
    curves: dict[float, dict[int, list[float]]] = {}
    for rate in search.learning_rates:
        for index, (train, held_out) in enumerate(folds):
            mixture, config = start(index)
            if not any(p.requires_grad for p in mixture.parameters()):
                with running(backbone, mixture, config) as model:
                    curve: Mapping[int, float] = {0: mean_log_loss(backbone, held_out, model)}
            else:
                settings = search.settings(rate, search.steps, seed)
                curve = fit(backbone, mixture, config, train, settings, held_out=held_out).held_out
            for step, loss in curve.items():
                curves.setdefault(rate, {}).setdefault(step, []).append(loss)
    cells = [(statistics.fmean(losses), rate, step) for rate, curve in curves.items() for step, losses in curve.items()]
    loss, rate, step = min(cells, key=lambda cell: (cell[0], cell[2], cell[1]))
    means = {r: {s: statistics.fmean(v) for s, v in c.items()} for r, c in curves.items()}
    return CrossFit(rate, step, loss, means, tuple(curves[rate][step]))


def fold_examples(examples: Sequence[Example], search: Search, fold: int | None) -> Sequence[Example]:
    """The training part of a fold, or all examples."""
    return examples if fold is None else stratified_folds(examples, search.folds, search.fold_seed)[fold][0]
