"""Two runs that no mixture and no `Trainer` here does: batches of several tasks in turn, and all of a backbone's weights."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from pituning.backbones.base import Backbone
from pituning.data.fewshot import stratified_folds
from pituning.example import Example
from pituning.experts.expert import Expert, ExpertCard, tensor_hash
from pituning.interpolation.collapse import collapse
from pituning.methods.attach import config_dict, initial_tensors
from pituning.methods.presets import make_config
from pituning.training.crossfit import Search, choose_cell
from pituning.training.evaluation import calibrated_losses, log_probabilities
from pituning.training.module import running
from pituning.training.train_expert import start_from
from pituning.training.trainer import TrainSettings

FULL_RATE = 0.1
"""Rates of full fine-tuning as a share of the grid's: whole weights bear smaller steps than an expert's."""


def multitask_expert(
    backbone: Backbone, method: str, rows: Mapping[str, Sequence[Example]], settings: TrainSettings
) -> Expert:
    """One expert of all tasks together, from the method's common start: each batch of one task, the batches in random order.

    Every task's rows are gone through as often as a source expert's are, so it takes as many steps as these together.
    """
    config = config_dict(make_config(method, backbone))
    initial = initial_tensors(backbone, config)
    rng = random.Random(f"multi-task/{settings.seed}")
    batches: list[list[Example]] = []
    for _ in range(round(settings.epochs)):
        epoch = [
            batch for _, examples in sorted(rows.items()) for batch in _shuffled(examples, settings.batch_size, rng)
        ]
        rng.shuffle(epoch)
        batches += epoch
    mixture, carried = start_from(initial, config)
    with running(backbone, mixture, carried) as model:
        model.train()
        trained = [p for p in mixture.parameters() if p.requires_grad]
        _descend(trained, batches, lambda b: model(**backbone.collate(b)), settings)
    card = ExpertCard(
        " + ".join(sorted(rows)), backbone=backbone.hub_name, fingerprint=backbone.fingerprint, method=method,
        init_hash=tensor_hash(initial), training={**backbone.record, "examples": sum(map(len, rows.values()))},
    )  # fmt: skip
    return collapse(mixture, carried, card).expert


def fully_tuned(
    backbone: Backbone, examples: Sequence[Example], search: Search, seed: int
) -> tuple[Backbone, dict[str, Any]]:
    """A copy of the backbone with all of its weights tuned on the shots; rate and steps by the same folds as every arm's."""
    folds = stratified_folds(examples, search.folds, search.fold_seed)
    held = [example for _, part in folds for example in part]
    losses: dict[tuple[float, int], Tensor] = {}
    for rate in (FULL_RATE * r for r in sorted(search.learning_rates)):
        curves: list[dict[int, Tensor]] = []
        for train, held_out in folds:
            curve: dict[int, Tensor] = {}

            def read(
                step: int, tuned: Backbone, part: Sequence[Example] = held_out, at: dict[int, Tensor] = curve
            ) -> None:
                at[step] = log_probabilities(tuned, part)

            _whole(backbone, train, search.settings(rate, search.steps, seed), read)
            curves.append(curve)
        for step in curves[0]:
            losses[rate, step] = calibrated_losses(torch.cat([c[step] for c in curves]), held)
    rate, steps = choose_cell(losses, warm=False)
    tuned = _whole(backbone, examples, search.settings(rate, steps, seed))
    found = {"learning_rate": rate, "steps": steps, "cross-fitted log-loss": float(losses[rate, steps].mean())}
    return tuned, found


def _whole(
    backbone: Backbone,
    examples: Sequence[Example],
    settings: TrainSettings,
    read: Callable[[int, Backbone], None] | None = None,
) -> Backbone:
    """A tuned copy; ``read`` sees it before the first step, every ``eval_every`` steps and at the end."""
    backbone.collate(list(examples[:1]))  # label texts are encoded by the backbone as it was, and kept
    tuned = copy.deepcopy(backbone)
    tuned.model.float()  # small steps vanish in bfloat16
    trained = [p for p in tuned.model.parameters() if p.is_floating_point()]
    for parameter in trained:
        parameter.requires_grad_(True)
    steps = settings.steps or 0
    if read is not None:
        read(0, tuned)

    def after(step: int) -> None:
        if read is not None and (step == steps or step % settings.eval_every == 0):
            read(step, tuned)

    batches = _endless(examples, settings)
    _descend(trained, [next(batches) for _ in range(steps)], lambda b: tuned.loss(tuned.collate(b)), settings, after)
    tuned.model.requires_grad_(False)
    return tuned


def _descend(
    parameters: Sequence[nn.Parameter],
    batches: Sequence[list[Example]],
    losses: Callable[[list[Example]], Tensor],
    settings: TrainSettings,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """AdamW over batches, with the settings' schedule, warm-up and clipping."""
    if not batches:
        return
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    warmup = max(1, round(settings.warmup * len(batches))) if settings.warmup and len(batches) > 1 else 0
    schedule = get_scheduler(settings.schedule, optimizer, warmup, len(batches))
    for step, batch in enumerate(batches, 1):
        torch.autograd.backward(losses(batch).mean())
        nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        after(step)


def _shuffled(examples: Sequence[Example], size: int, rng: random.Random) -> list[list[Example]]:
    order = list(range(len(examples)))
    rng.shuffle(order)
    return [[examples[i] for i in order[start : start + size]] for start in range(0, len(order), size)]


def _endless(examples: Sequence[Example], settings: TrainSettings) -> Iterator[list[Example]]:
    rng = random.Random(f"shots/{settings.seed}")
    while True:
        yield from _shuffled(examples, min(settings.batch_size, len(examples)), rng)
