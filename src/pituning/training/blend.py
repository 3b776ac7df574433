"""`blend`: one interpolation with given settings, as the paper does it; and what any interpolation ends in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pituning.backbones.base import Backbone
from pituning.errors import RefusedError
from pituning.experts.expert import Expert, ExpertCard
from pituning.interpolation.build import Granularity, group_names, is_lora
from pituning.interpolation.collapse import collapse
from pituning.interpolation.mixture import Mixture, ProductMixture
from pituning.tasks.task import Task
from pituning.training.checkpoints import require_folder
from pituning.training.starts import (
    blend_start,
    calibrated_loss,
    initial_weights,
    require_consistent,
    require_something_to_train,
    require_weights_to_regularise,
)
from pituning.training.train_expert import dev_examples
from pituning.training.trainer import TrainSettings, fit, settings_dict
from pituning.version import __version__


@dataclass(frozen=True)
class Candidate:
    """One way to use the experts, and what cross-fitting says of it.

    Attributes:
        weights: initial weight of each member, a share of one.
        scale: what these are multiplied by.
        loss: mean held-out log-loss of its best cell, in nats.
    """

    name: str
    members: tuple[str, ...]
    weights: tuple[float, ...]
    loss: float
    learning_rate: float
    steps: int
    chosen: bool = False
    scale: float = 1.0


@dataclass(frozen=True)
class Interpolation:
    """The outcome of :func:`interpolate`.

    Attributes:
        expert: the one expert to keep, an ordinary PEFT adapter.
        experts: names of the blended experts.
        weights: group → learned weight of each of them.
        candidates: every candidate that was compared; exactly one is chosen.
        errors: per module, relative error of the fold into ``expert`` (0 unless a smaller rank was asked for).
        trajectory: step → the weights then, ``[groups, experts]`` in the order of ``weights``; see
            :attr:`pituning.training.trainer.Fit.weights`. Empty where nothing was trained.
    """

    expert: Expert
    experts: tuple[str, ...]
    weights: Mapping[str, tuple[float, ...]]
    candidates: tuple[Candidate, ...]
    errors: Mapping[str, float] = field(default_factory=dict)
    trajectory: Mapping[int, list[list[float]]] = field(default_factory=dict)

    def mean_weights(self) -> dict[str, float]:
        """Weight of each expert, averaged over the groups."""
        columns = zip(*self.weights.values(), strict=True)
        return {n: sum(c) / len(c) for n, c in zip(self.experts, columns, strict=True)}

    def __str__(self) -> str:
        rows = [f"interpolation for {self.expert.card.task}"]
        rows += [
            f"  {'→' if c.chosen else ' '} {c.name}: cross-fitted log-loss {c.loss:.4f} "
            f"(scale {c.scale:g}, rate {c.learning_rate:g}, {c.steps} steps)"
            for c in self.candidates
        ]
        rows += [f"  weight of {name}: {weight:.3f}" for name, weight in self.mean_weights().items()]
        return "\n".join(rows)


def blend(
    backbone: Backbone,
    task: Task,
    experts: Sequence[Expert],
    own: Expert | None = None,
    *,
    settings: TrainSettings,
    train: str = "experts",
    granularity: Granularity = "module",
    init: str | Sequence[float] = "uniform",
    similarities: Sequence[float] | None = None,
    coefficients: str = "softmax",
    temperature: float = 1.0,
    scale: float = 1.0,
    seed: int = 0,
    rank: int | None = None,
    max_error: float | None = None,
    name: str | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
) -> Interpolation:
    """One interpolation with given settings, as the paper does it: no candidates, no cross-fitting.

    For tasks with much data. The own expert takes part where it is given, and α learns on the examples that it was trained
    on, as in the paper; of a few shots it then drifts to the own expert: use :func:`interpolate` for those.

    Args:
        settings: of the run. Its ``alpha_learning_rate`` is zero unless it is given, and then the weights stay where they
            start; the paper trains them. A run ends with the best state on the dev split, where there is one and
            ``keep_best`` is set.
        init: starting weights, as in :func:`choose`; given numbers are for ``experts``, and the own expert gets an equal
            share beside them.
        train, granularity, coefficients, temperature, scale, rank, max_error: as in :func:`interpolate` and :func:`choose`.
        folder, resume, progress: as in :func:`pituning.training.trainer.fit`.

    Raises:
        as :func:`interpolate`.
    """
    require_folder(folder, resume)
    require_consistent(experts, own, init, "auto", similarities)
    require_rank(experts, rank, max_error)
    require_weights_to_regularise(train, settings.weights_to_start, settings.weights_spread)
    require_something_to_train(train, settings.optimizer, settings.alpha_learning_rate, "settings")
    members = (*experts, *([own] if own is not None else []))
    for expert in members:
        expert.require_backbone(backbone)
    examples = task.split("train")
    losses = [calibrated_loss(backbone, e, examples) for e in members] if init == "score" else [0.0] * len(members)
    weights = initial_weights(init, losses, similarities, len(examples), own=own is not None)
    start = blend_start(
        backbone, members, weights,
        train=train, granularity=granularity, coefficients=coefficients, temperature=temperature, scale=scale,
    )  # fmt: skip
    mixture, config = start(None)
    settings = settings.with_(seed=seed)
    result = fit(
        backbone, mixture, config, examples, settings,
        held_out=dev_examples(task), folder=folder, resume=resume, progress=progress,
    )  # fmt: skip
    card = blended_card(backbone, task, members, mixture, settings, name)
    if result.held_out:
        card = replace(card, metrics={"dev log-loss": result.held_out[result.end_step]})
    found = collapsed(mixture, config, card, members, granularity, rank, max_error)
    return replace(found, trajectory=result.weights)


def require_rank(experts: Sequence[Expert], rank: int | None, max_error: float | None) -> None:
    """Raise if a smaller rank is asked for in a method that has none, before anything is trained.

    Raises:
        RefusedError: names the expert and its method.
    """
    asked = f"rank={rank}" if rank is not None else f"max_error={max_error}"
    if (rank is not None or max_error is not None) and experts and not is_lora(experts[0]):
        raise RefusedError(
            f"{asked} applies to LoRA experts only; {experts[0].name!r} is of {experts[0].card.method!r}"
        )


def blended_card(
    backbone: Backbone,
    task: Task,
    members: Sequence[Expert],
    mixture: Mixture,
    settings: TrainSettings,
    name: str | None,
) -> ExpertCard:
    """The card of a blend, without its metrics."""
    starts, licences = {e.card.init_hash for e in members}, {e.card.licence for e in members}
    weights = mixture.weights().detach().cpu().mean(0).tolist()
    return replace(
        members[0].card,
        name=name or f"{task.name}-pi",
        backbone=backbone.hub_name,
        fingerprint=backbone.fingerprint,
        task=task.name,
        init_hash=starts.pop() if len(starts) == 1 else "",
        licence=licences.pop() if len(licences) == 1 else "",
        version=__version__,
        shots=task.shots,
        seed=task.seed,
        choices=task.choices,
        metrics={},
        lineage=tuple({"name": e.name, "weight": w} for e, w in zip(members, weights, strict=True)),
        training={
            **backbone.record,
            "examples": len(task.split("train")),
            "task_kind": task.kind,
            **settings_dict(settings),
        },
    )


def collapsed(
    mixture: Mixture,
    config: Mapping[str, Any],
    card: ExpertCard,
    members: Sequence[Expert],
    granularity: Granularity,
    rank: int | None,
    max_error: float | None = None,
) -> Interpolation:
    """The trained mixture as one expert, with the weights of its members by group."""
    weights = mixture.weights().detach().cpu().tolist()
    groups = group_names(members, granularity if len(weights) > 1 else "model")
    by_group = {g: tuple(row) for g, row in zip(groups, weights, strict=True)}
    folded = collapse(mixture, config, card, rank, max_error)
    record = {
        "train": mixture.train_mode,
        "granularity": granularity if isinstance(granularity, str) else getattr(granularity, "__name__", "function"),
        "coefficients": mixture.coefficients.kind,
        "temperature": mixture.coefficients.temperature,
        "scale": mixture.coefficients.scale,
        "weights": {group: list(row) for group, row in by_group.items()},
        "rank": rank,
        "max_error": max_error,
        "errors": {module: error for module, error in folded.errors.items() if error},
    }
    stacked = isinstance(mixture, ProductMixture) and not mixture.single
    own_coordinates = stacked or rank is not None or max_error is not None  # no longer those of the members' start
    expert = folded.expert.with_card(
        training={**card.training, "interpolation": record}, init_hash="" if own_coordinates else card.init_hash
    )
    return Interpolation(expert, tuple(e.name for e in members), by_group, (), folded.errors)
