"""π: blend experts into one for a target task, starting from weights that their few-shot log-loss suggests.

Every way to blend is a *candidate*: the interpolation of the given experts, the same with the target's own expert, the
most helpful expert alone (a plain warm start), and the own expert as it is. They are compared by cross-fitted log-loss
on the shots; the best is refitted on all of them and collapsed into one expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pituning.backbones.base import Backbone
from pituning.errors import PituningError, RefusedError
from pituning.experts.expert import Expert, ExpertCard
from pituning.interpolation.build import build_mixture, group_names, is_lora
from pituning.interpolation.collapse import collapse
from pituning.interpolation.mixture import Mixture
from pituning.methods.attach import attached, config_dict, initial_tensors
from pituning.methods.presets import make_config
from pituning.tasks.task import Task
from pituning.training.crossfit import CrossFit, Search, Start, cross_fit, within_one_standard_error
from pituning.training.evaluation import mean_log_loss
from pituning.training.train_expert import DEV_LIMIT, fold_experts
from pituning.training.trainer import TrainSettings, fit, settings_dict

INITS = ("uniform", "similarity", "score")
INCLUDE_OWN = ("auto", True, False)


@dataclass(frozen=True)
class Candidate:
    """One way to use the experts, and what cross-fitting says of it.

    Attributes:
        weights: initial weight of each member.
        loss: mean held-out log-loss of its best cell, in nats.
    """

    name: str
    members: tuple[str, ...]
    weights: tuple[float, ...]
    loss: float
    learning_rate: float
    steps: int
    chosen: bool = False


@dataclass(frozen=True)
class Interpolation:
    """The outcome of :func:`interpolate`.

    Attributes:
        expert: the one expert to keep, an ordinary PEFT adapter.
        experts: names of the blended experts.
        weights: group → learned weight of each of them.
        candidates: every candidate that was compared; exactly one is chosen.
        errors: per module, relative error of the fold into ``expert`` (0 unless a smaller rank was asked for).
    """

    expert: Expert
    experts: tuple[str, ...]
    weights: Mapping[str, tuple[float, ...]]
    candidates: tuple[Candidate, ...]
    errors: Mapping[str, float] = field(default_factory=dict)

    def mean_weights(self) -> dict[str, float]:
        """Weight of each expert, averaged over the groups."""
        columns = zip(*self.weights.values(), strict=True)
        return {n: sum(c) / len(c) for n, c in zip(self.experts, columns, strict=True)}

    def __str__(self) -> str:
        rows = [f"interpolation for {self.expert.card.task}"]
        rows += [
            f"  {'→' if c.chosen else ' '} {c.name}: cross-fitted log-loss {c.loss:.4f} "
            f"(rate {c.learning_rate:g}, {c.steps} steps)"
            for c in self.candidates
        ]
        rows += [f"  weight of {name}: {weight:.3f}" for name, weight in self.mean_weights().items()]
        return "\n".join(rows)


def interpolate(
    backbone: Backbone,
    task: Task,
    experts: Sequence[Expert],
    own: Expert | None = None,
    *,
    seed: int = 0,
    rank: int | None = None,
    name: str | None = None,
    **options: Any,
) -> Interpolation:
    """Blend experts into one for a target task: :func:`choose` a candidate, then :meth:`Choice.refit` it.

    Args:
        task: its ``train`` split is what the blend is fitted on.
        experts: usually ``rank_experts(...).top(k)``; none of them may have seen the target's examples.
        own: the target's own expert from :func:`train_expert`.
        seed: training seed of the final fit.
        rank: for LoRA, the rank of the result; ``None`` keeps the exact one, the sum of the experts' ranks.
        name: of the resulting expert.
        options: see :func:`choose`.

    Raises:
        RefusedError: if the experts have no exact interpolation.
        PituningError: for inconsistent arguments.
        BackboneMismatchError: if an expert belongs to another backbone.
    """
    if rank is not None and experts and not is_lora(experts[0]):
        raise RefusedError(
            f"rank={rank} applies to LoRA experts only; {experts[0].name!r} is of {experts[0].card.method!r}"
        )
    return choose(backbone, task, experts, own, **options).refit(seed, rank=rank, name=name)


def choose(
    backbone: Backbone,
    task: Task,
    experts: Sequence[Expert],
    own: Expert | None = None,
    *,
    train: str = "experts",
    granularity: str = "module",
    init: str | Sequence[float] = "score",
    similarities: Sequence[float] | None = None,
    include_own: bool | str = "auto",
    alternatives: bool = True,
    temperature: float = 1.0,
    search: Search | None = None,
) -> Choice:
    """Compare the candidates by cross-fitted log-loss on the shots.

    Args:
        train: ``"experts"`` (the paper: α and all φ_k), ``"shared"`` (frozen experts, α and one trainable δ: less memory;
            for LoRA, δ starts at zero and wants a learning rate about three times higher), ``"weights"`` (α only) or
            ``"none"`` (a soup).
        granularity: who shares weights: ``model``, ``layer``, ``attention`` (the paper's LoRA), ``module`` (its adapters) or
            ``tensor``; see :func:`pituning.interpolation.build.group_name`.
        init: starting weights: ``"uniform"``, ``"similarity"`` (softmax of ``similarities``), ``"score"`` (from each
            expert's log-loss on the shots) or K numbers.
        include_own: whether the own expert is one of the blended; ``"auto"`` lets cross-fitting decide. Where it is,
            α is not trained: it would be fitted on the shots that the own expert has seen.
        alternatives: also compare a warm start from the best single expert, and the own expert as it is.
        temperature: of the softmax over α.
        search: learning rates, steps and folds, the same for every candidate.

    Raises:
        as :func:`interpolate`.
    """
    search = search or Search(alpha_learning_rate=1e-2)
    _check(experts, own, init, include_own, similarities)
    for expert in (*experts, *([own] if own else [])):
        expert.require_backbone(backbone)
    examples = task.split("train")
    losses = [expert_log_loss(backbone, e, task) for e in experts]
    own_folds = fold_experts(backbone, task, own, search) if own is not None else {}
    plans: list[_Plan] = []
    if include_own is not True or own is None:
        weights = _initial_weights(init, losses, similarities, len(examples))
        start = blend_start(backbone, experts, weights, train=train, granularity=granularity, temperature=temperature)
        plans.append(_Plan("interpolation of the experts", tuple(experts), weights, start))
    if own is not None and include_own is not False:
        own_loss = cross_fit(backbone, kept_start(own_folds), examples, search).plain_loss  # as the others'
        weights = _initial_weights(init, [*losses, own_loss], similarities, len(examples), own=True)
        start = blend_start(
            backbone, experts, weights, own_folds, train=train, granularity=granularity, temperature=temperature
        )
        plans.append(_Plan("interpolation with the own expert", (*experts, own), weights, start))
    if alternatives:
        best = experts[losses.index(min(losses))]
        start = blend_start(backbone, [best], [1.0], train="experts", granularity="model")
        plans.append(_Plan(f"warm start from {best.name}", (best,), [1.0], start))
        if own is not None:
            plans.append(_Plan("keep the own expert", (own,), [1.0], kept_start(own_folds)))
    found = [cross_fit(backbone, p.start, examples, search) for p in plans]
    return Choice(backbone, task, search, granularity, tuple(plans), tuple(found))


@dataclass(frozen=True)
class Choice:
    """The compared candidates, before the best is fitted on all shots."""

    backbone: Backbone
    task: Task
    search: Search
    granularity: str
    plans: tuple[_Plan, ...]
    found: tuple[CrossFit, ...]

    @property
    def best(self) -> int:
        """Index of the chosen candidate: the first whose cross-fitted loss is within one standard error of the lowest.

        The order is that of our prior: a blend varies less from draw to draw than any single expert, so it takes evidence
        beyond the noise of the held-out shots to prefer a warm start from one of them, or the own expert.
        """
        lowest = min(self.found, key=lambda f: f.loss)
        return next(i for i, f in enumerate(self.found) if within_one_standard_error(f.losses, lowest.losses))

    def candidates(self) -> tuple[Candidate, ...]:
        """What was compared, with the figures."""
        return tuple(
            Candidate(
                p.name,
                tuple(e.name for e in p.members),
                tuple(p.weights),
                f.loss,
                f.learning_rate,
                f.steps,
                i == self.best,
            )
            for i, (p, f) in enumerate(zip(self.plans, self.found, strict=True))
        )

    def refit(self, seed: int = 0, *, rank: int | None = None, name: str | None = None) -> Interpolation:
        """Fit the best candidate on all shots and collapse it into one expert."""
        plan, cell = self.plans[self.best], self.found[self.best]
        mixture, config = plan.start(None)
        settings = self.search.settings(cell.learning_rate, cell.steps, seed)
        fit(self.backbone, mixture, config, self.task.split("train"), settings)
        card = _blended_card(self.backbone, self.task, plan.members, mixture, settings, name)
        card = replace(
            card,
            metrics={"cross-fitted log-loss": cell.loss},
            training={**card.training, "candidate": plan.name},
        )
        found = _collapsed(mixture, config, card, plan.members, self.granularity, rank)
        return replace(found, candidates=self.candidates())


def blend(
    backbone: Backbone,
    task: Task,
    experts: Sequence[Expert],
    own: Expert | None = None,
    *,
    settings: TrainSettings,
    train: str = "experts",
    granularity: str = "module",
    init: str | Sequence[float] = "uniform",
    similarities: Sequence[float] | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    rank: int | None = None,
    name: str | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
) -> Interpolation:
    """One interpolation with given settings, as the paper does it: no candidates, no cross-fitting.

    For tasks with much data. The own expert takes part where it is given, and α learns on the examples that it was trained
    on, as in the paper; of a few shots it then drifts to the own expert: use :func:`interpolate` for those.

    Args:
        settings: of the run; ends with the best state on the dev split, where there is one and ``keep_best`` is set.
        init: starting weights, as in :func:`choose`; given numbers are for ``experts``, and the own expert gets an equal
            share beside them.
        folder, resume, progress: as in :func:`pituning.training.trainer.fit`.

    Raises:
        as :func:`interpolate`.
    """
    _check(experts, own, init, "auto", similarities)
    if rank is not None and not is_lora(experts[0]):
        raise RefusedError(
            f"rank={rank} applies to LoRA experts only; {experts[0].name!r} is of {experts[0].card.method!r}"
        )
    members = (*experts, *([own] if own is not None else []))
    for expert in members:
        expert.require_backbone(backbone)
    losses = [expert_log_loss(backbone, e, task) for e in members] if init == "score" else [0.0] * len(members)
    weights = _initial_weights(init, losses, similarities, len(task.split("train")), own=own is not None)
    start = blend_start(backbone, members, weights, train=train, granularity=granularity, temperature=temperature)
    mixture, config = start(None)
    settings = settings.with_(seed=seed)
    held_out = task.split("dev", DEV_LIMIT) if task.splits.get("dev") and task.shots is None else ()
    result = fit(
        backbone, mixture, config, task.split("train"), settings,
        held_out=held_out, folder=folder, resume=resume, progress=progress,
    )  # fmt: skip
    card = _blended_card(backbone, task, members, mixture, settings, name)
    if result.held_out:
        card = replace(card, metrics={"dev log-loss": result.held_out[result.best_step]})
    return _collapsed(mixture, config, card, members, granularity, rank)


def _blended_card(
    backbone: Backbone,
    task: Task,
    members: Sequence[Expert],
    mixture: Mixture,
    settings: TrainSettings,
    name: str | None,
) -> ExpertCard:
    starts = {e.card.init_hash for e in members}
    weights = mixture.weights().detach().cpu().mean(0).tolist()
    return replace(
        members[0].card,
        name=name or f"{task.name}-pi",
        backbone=backbone.hub_name,
        fingerprint=backbone.fingerprint,
        task=task.name,
        init_hash=starts.pop() if len(starts) == 1 else "",
        shots=task.shots,
        seed=task.seed,
        choices=task.choices,
        metrics={},
        lineage=tuple({"name": e.name, "weight": w} for e, w in zip(members, weights, strict=True)),
        training={
            "family": backbone.family,
            "architecture": backbone.model.config.model_type,
            "examples": len(task.split("train")),
            **settings_dict(settings),
        },
    )


def _collapsed(
    mixture: Mixture,
    config: Mapping[str, Any],
    card: ExpertCard,
    members: Sequence[Expert],
    granularity: str,
    rank: int | None,
) -> Interpolation:
    """The trained mixture as one expert, with the weights of its members by group."""
    weights = mixture.weights().detach().cpu().tolist()
    groups = group_names(members, granularity if len(weights) > 1 else "model")
    folded = collapse(mixture, config, card, rank)
    by_group = {g: tuple(row) for g, row in zip(groups, weights, strict=True)}
    return Interpolation(folded.expert, tuple(e.name for e in members), by_group, (), folded.errors)


@dataclass(frozen=True)
class _Plan:
    name: str
    members: tuple[Expert, ...]
    weights: Sequence[float]
    start: Start


def blend_start(
    backbone: Backbone,
    experts: Sequence[Expert],
    weights: Sequence[float],
    own: Mapping[int | None, Expert] | None = None,
    *,
    train: str = "shared",
    granularity: str = "module",
    temperature: float = 1.0,
) -> Start:
    """A start for :func:`cross_fit`: the experts, and the own one trained without the fold, at the given weights."""
    initial = _delta_factors(backbone, experts) if train == "shared" and is_lora(experts[0]) else None

    def begin(fold: int | None) -> tuple[Mixture, Mapping[str, Any]]:
        return build_mixture(
            [*experts, own[fold]] if own else experts,
            list(weights),
            granularity=granularity,
            train=train,
            temperature=temperature,
            train_weights=own is None,
            initial=initial,
        )

    return begin


def kept_start(own: Mapping[int | None, Expert]) -> Start:
    """A start for :func:`cross_fit` that trains nothing: the own expert as it is."""
    return lambda fold: build_mixture([own[fold]], train="none", granularity="model")


def _delta_factors(backbone: Backbone, experts: Sequence[Expert]) -> dict[str, Tensor]:
    """Fresh factors for δ, at the rank of the method's preset, on all modules that any of the experts adapts."""
    modules = {k.split(".lora_")[0].removeprefix("base_model.model.") for e in experts for k in e.tensors}
    return initial_tensors(backbone, config_dict(make_config("lora", backbone, target_modules=sorted(modules))))


def _check(
    experts: Sequence[Expert],
    own: Expert | None,
    init: str | Sequence[float],
    include_own: bool | str,
    similarities: Sequence[float] | None,
) -> None:
    if not experts:
        raise RefusedError("an interpolation needs at least one expert besides the target's own")
    if include_own not in INCLUDE_OWN:
        raise PituningError(f"include_own must be True, False or 'auto', not {include_own!r}")
    if include_own is True and own is None:
        raise PituningError("include_own=True needs the target's own expert: pass own=…")
    if isinstance(init, str):
        if init not in INITS:
            raise PituningError(f"init must be one of {', '.join(INITS)} or {len(experts)} numbers, not {init!r}")
        if init == "similarity" and (similarities is None or len(similarities) != len(experts)):
            raise PituningError(
                f"init='similarity' needs similarities=…, one number for each of the {len(experts)} experts"
            )
    elif len(init) != len(experts):
        raise PituningError(f"init has {len(init)} weights for {len(experts)} experts")


def _initial_weights(
    init: str | Sequence[float],
    losses: Sequence[float],
    similarities: Sequence[float] | None,
    examples: int,
    own: bool = False,
) -> list[float]:
    """Starting weights; where own takes part beside given or similarity weights, it gets an equal share."""
    if init == "score":
        return score_weights(losses, examples)
    if init == "uniform":
        return [1 / len(losses)] * len(losses)
    if isinstance(init, str):
        others: list[float] = torch.softmax(torch.tensor(similarities, dtype=torch.float64), 0).tolist()
    else:
        others = [float(w) for w in init]
    share = 1 / len(losses) if own else 0.0
    return [w * (1 - share) for w in others] + ([share] if own else [])


def score_weights(losses: Sequence[float], examples: int, sharpness: float = 0.25) -> list[float]:
    """w_k ∝ exp(−sharpness · N · loss_k): how well each expert explains the N shots, tempered.

    With sharpness 1 this is the posterior of K equally likely models given N independent examples; experts are correlated
    and their log-losses noisy, so less than the full evidence is counted.
    """
    evidence = -sharpness * examples * torch.tensor(losses, dtype=torch.float64)
    weights: list[float] = torch.softmax(evidence, 0).tolist()
    return weights


def expert_log_loss(backbone: Backbone, expert: Expert, task: Task) -> float:
    """Mean log-loss of an expert, as it is, on the target's training examples."""
    with attached(backbone, expert.config, expert.tensors):
        return mean_log_loss(backbone, task.split("train"))
