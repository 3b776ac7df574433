"""π: blend experts into one for a target task, starting from weights that their few-shot log-loss suggests.

Every way to blend is a *candidate*: the interpolation of the given experts, the same with the target's own expert, the
most helpful expert alone (a plain warm start), and the own expert as it is. They are compared by cross-fitted log-loss
on the shots; the best is refitted on all of them and collapsed into one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pituning.backbones.base import Backbone
from pituning.errors import PituningError
from pituning.example import Example
from pituning.experts.expert import Expert
from pituning.interpolation.build import Granularity, is_lora
from pituning.tasks.task import Task
from pituning.training.blend import Candidate, Interpolation, blended_card, collapsed, require_rank
from pituning.training.crossfit import CrossFit, Search, Start, cross_fit, within_standard_errors
from pituning.training.starts import (
    ALPHA_LEARNING_RATE,
    ENOUGH_TO_SCALE,
    blend_start,
    calibrated_loss,
    expected_scale,
    held_out_calibrated_loss,
    initial_weights,
    kept_start,
    require_consistent,
    require_something_to_train,
    require_weights_to_regularise,
)
from pituning.training.train_expert import fold_experts
from pituning.training.trainer import fit

EVIDENCE = 2.0
"""Standard errors by which the blend's held-out loss must be behind for another candidate to be taken."""


def interpolate(
    backbone: Backbone,
    task: Task,
    experts: Sequence[Expert],
    own: Expert | None = None,
    *,
    seed: int = 0,
    rank: int | None = None,
    max_error: float | None = None,
    name: str | None = None,
    **options: Any,
) -> Interpolation:
    """Blend experts into one for a target task: :func:`choose` a candidate, then :meth:`Choice.refit` it.

    Args:
        task: its ``train`` split is what the blend is fitted on.
        experts: usually ``rank_experts(...).top()``; none of them may have seen the target's examples.
        own: the target's own expert from :func:`train_expert`.
        seed: training seed of the final fit.
        rank: for LoRA, the rank of the result; ``None`` keeps the exact one, the sum of the experts' ranks.
        max_error: for LoRA, the smallest rank of each module that keeps the relative error of its ΔW at or below this.
        name: of the resulting expert.
        options: see :func:`choose`.

    Raises:
        RefusedError: if the experts have no exact interpolation.
        PituningError: for inconsistent arguments.
        BackboneMismatchError: if an expert belongs to another backbone.
    """
    require_rank(experts, rank, max_error)
    return choose(backbone, task, experts, own, **options).refit(seed, rank=rank, max_error=max_error, name=name)


def choose(
    backbone: Backbone,
    task: Task,
    experts: Sequence[Expert],
    own: Expert | None = None,
    *,
    train: str = "merge-then-tune",
    granularity: Granularity = "module",
    init: str | Sequence[float] = "score",
    similarities: Sequence[float] | None = None,
    include_own: bool | str = "auto",
    alternatives: bool = True,
    coefficients: str = "softmax",
    temperature: float = 1.0,
    scale: float | str = "auto",
    search: Search | None = None,
    own_folds: Mapping[int | None, Expert] | None = None,
    shared: Callable[[str, Callable[[], CrossFit]], CrossFit] | None = None,
) -> Choice:
    """Compare the candidates by cross-fitted log-loss on the shots.

    Args:
        train: ``"merge-then-tune"`` (one expert that starts at the blend; the weights stay), ``"experts"`` (the paper: α and
            all φ_k), ``"shared"`` (frozen experts, α and one trainable δ; for LoRA, δ starts at zero and wants a learning
            rate about three times higher), ``"weights"`` (α only) or ``"none"`` (a soup).
        granularity: who shares weights: ``model``, ``encoder-decoder``, ``layer``, ``attention`` (the paper's LoRA),
            ``module`` (its adapters), ``tensor`` or a function; see :func:`pituning.interpolation.build.group_name`.
        init: starting weights: ``"uniform"``, ``"similarity"`` (softmax of ``similarities``), ``"score"`` (from each
            expert's log-loss on the shots, after a temperature and a bias per answer) or K numbers.
        include_own: whether the own expert is one of the blended; ``"auto"`` lets cross-fitting decide. Where it is,
            α is not trained: it would be fitted on the shots that the own expert has seen.
        alternatives: also compare a warm start from the expert of the lowest such log-loss, which is the first of a ranking
            by ``calibrated-score``, and the own expert as it is.
        coefficients, temperature: from α to the weights; see :class:`pituning.interpolation.Coefficients`.
        scale: what softmax weights sum to, for the interpolations; ``"auto"`` takes for LoRA the mean of
            :data:`pituning.training.starts.SCALES` by how well the untrained blend explains the shots at each
            (:func:`pituning.training.starts.expected_scale`), where there are
            :data:`pituning.training.starts.ENOUGH_TO_SCALE` of them, and else 1 (the paper): twice the change of a
            bottleneck's two matrices is four times its effect.
        search: learning rates, steps and folds, the same for every candidate; its ``alpha_learning_rate`` is zero unless it
            is given, and then α stays where it starts. With ``optimizer="cma"`` and
            ``train="weights"`` the weights of the interpolation are learned without gradients.
        own_folds: the own expert without each fold of ``search``, from :func:`fold_experts`, where several choices for one
            target share them; trained here where they are not given.
        shared: called for each of the ``alternatives`` with its name and a function that cross-fits it, where several choices
            on the same shots and grid share these, too: gives the outcome of the first such call.

    Raises:
        as :func:`interpolate`.
    """
    search = search or Search(alpha_learning_rate=ALPHA_LEARNING_RATE)
    require_consistent(experts, own, init, include_own, similarities, scale)
    require_weights_to_regularise(train, search.weights_to_start, search.weights_spread)
    require_something_to_train(train, search.optimizer, search.alpha_learning_rate, "search")
    for expert in (*experts, *([own] if own else [])):
        expert.require_backbone(backbone)
    examples = task.split("train")
    losses = [calibrated_loss(backbone, e, examples) for e in experts]
    compared = own_is_compared(include_own, alternatives)
    folds = _own_folds(backbone, task, own, search, own_folds) if own is not None and compared else {}
    plans: list[_Plan] = []
    scaled = coefficients == "softmax" and is_lora(experts[0]) and len(examples) >= ENOUGH_TO_SCALE
    how: dict[str, Any] = {
        "train": train, "granularity": granularity, "coefficients": coefficients, "temperature": temperature,
    }  # fmt: skip

    def interpolation(name: str, members: Sequence[Expert], weights: Sequence[float], with_own: bool) -> _Plan:
        begin = partial(blend_start, backbone, experts, weights, folds if with_own else None)
        found = scale
        if isinstance(found, str) and scaled:
            untrained = {**how, "train": "none"}
            found = expected_scale(
                backbone, lambda s: begin(**untrained, scale=s), examples, search if with_own else None
            )
        found = 1.0 if isinstance(found, str) else found
        return _Plan(name, tuple(members), weights, begin(**how, scale=found), search, granularity, found)

    plain = replace(search, optimizer="adamw", weights_to_start=0.0, weights_spread=0.0)  # for one expert alone
    if include_own is not True or own is None:
        weights = initial_weights(init, losses, similarities, len(examples))
        plans.append(interpolation("interpolation of the experts", experts, weights, with_own=False))
    if own is not None and include_own is not False:
        own_loss = held_out_calibrated_loss(backbone, folds, examples, search)
        weights = initial_weights(init, [*losses, own_loss], similarities, len(examples), own=True)
        plans.append(interpolation("interpolation with the own expert", (*experts, own), weights, with_own=True))
    others: list[_Plan] = []
    if alternatives:
        best = experts[losses.index(min(losses))]  # the first by the default similarity
        start = blend_start(backbone, [best], [1.0], train="experts", granularity="model")
        others.append(_Plan(f"warm start from {best.name}", (best,), [1.0], start, plain, "model"))
        if own is not None:
            others.append(_Plan("keep the own expert", (own,), [1.0], kept_start(folds), plain, "model"))
    found = [_compared(backbone, p, examples) for p in plans]
    for plan in others:
        compute = partial(_compared, backbone, plan, examples)
        found.append(shared(plan.name, compute) if shared else compute())
    return Choice(backbone, task, (*plans, *others), tuple(found))


def _compared(backbone: Backbone, plan: _Plan, examples: Sequence[Example]) -> CrossFit:
    try:
        return cross_fit(backbone, plan.start, examples, plan.search)
    except PituningError as error:
        if type(error) is not PituningError:  # a refusal names its experts by itself
            raise
        raise PituningError(f"{plan.name}: {error}") from error


def own_is_compared(include_own: bool | str, alternatives: bool) -> bool:
    """Whether the own expert takes part in a candidate of :func:`choose`, or is one, so that its folds are needed."""
    return include_own is not False or alternatives


def _own_folds(
    backbone: Backbone, task: Task, own: Expert, search: Search, given: Mapping[int | None, Expert] | None
) -> Mapping[int | None, Expert]:
    if given is None:
        return fold_experts(backbone, task, own, search)
    if missing := [fold for fold in range(search.folds) if fold not in given]:
        raise PituningError(f"own_folds has no expert without fold {missing[0]}; the search has {search.folds} folds")
    return {**given, None: own}


@dataclass(frozen=True)
class Choice:
    """The compared candidates, before the best is fitted on all shots."""

    backbone: Backbone
    task: Task
    plans: tuple[_Plan, ...]
    found: tuple[CrossFit, ...]

    @property
    def best(self) -> int:
        """Index of the chosen candidate: the first whose cross-fitted loss is within :data:`EVIDENCE` standard errors of the
        lowest.

        The order is that of our prior: a blend varies less from draw to draw than any single expert, so it takes evidence
        beyond the noise of the held-out shots to prefer a warm start from one of them, or the own expert. The lowest of
        four noisy losses is often one standard error ahead by chance alone.
        """
        return self.first_within(EVIDENCE)

    def first_within(self, errors: float) -> int:
        """Index of the first candidate whose cross-fitted loss is within so many standard errors of the lowest."""
        lowest = min(self.found, key=lambda f: f.loss)
        return next(i for i, f in enumerate(self.found) if within_standard_errors(f.losses, lowest.losses, errors))

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
                p.scale,
            )
            for i, (p, f) in enumerate(zip(self.plans, self.found, strict=True))
        )

    def refit(
        self, seed: int = 0, *, rank: int | None = None, max_error: float | None = None, name: str | None = None
    ) -> Interpolation:
        """Fit the best candidate on all shots and collapse it into one expert."""
        plan, cell = self.plans[self.best], self.found[self.best]
        mixture, config = plan.start(None)
        settings = plan.search.settings(cell.learning_rate, cell.steps, seed)
        run = fit(self.backbone, mixture, config, self.task.split("train"), settings)
        card = blended_card(self.backbone, self.task, plan.members, mixture, settings, name)
        card = replace(
            card,
            metrics={"cross-fitted log-loss": cell.loss},
            training={**card.training, "candidate": plan.name},
        )
        found = collapsed(mixture, config, card, plan.members, plan.granularity, rank, max_error)
        return replace(found, candidates=self.candidates(), trajectory=run.weights)


@dataclass(frozen=True)
class _Plan:
    name: str
    members: tuple[Expert, ...]
    weights: Sequence[float]
    start: Start
    search: Search
    granularity: Granularity
    scale: float = 1.0
