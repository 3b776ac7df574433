"""Which experts of a ranking to use: so many, those above a threshold, different ones, those whose soup helps, or none.

A *soup* is the experts' uniform or score-weighted mean as it is, without training. Ways that look at the target's examples
are judged by cross-fitting: the choice is made once more without each fold, and its loss is that on the fold left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from pituning.backbones.base import Backbone
from pituning.data.fewshot import stratified_folds
from pituning.errors import PituningError, unknown_name
from pituning.experts.expert import Expert, initial_of
from pituning.interpolation.build import build_mixture, is_lora
from pituning.similarity.measures import SCORES, weight_similarity
from pituning.similarity.select import Ranking, default_k
from pituning.tasks.task import Task
from pituning.training.crossfit import Search, within_standard_errors
from pituning.training.evaluation import bias_calibrated_loss, calibrated_losses, log_probabilities
from pituning.training.module import running
from pituning.training.starts import score_weights
from pituning.training.train_expert import fold_experts

WAYS = ("top-k", "threshold", "greedy", "diverse", "auto")
COMPARING = ("greedy", "auto")
"""The ways that compare soups on the target's examples, and so cannot go without these."""
SOUPS = ("uniform", "score")
CANDIDATES = 10
DIVERSITY = 0.5

Rule = Callable[[Sequence[int]], tuple[int, ...]]
"""From the positions of the examples that it may look at to the positions of the experts that it chooses."""


@dataclass(frozen=True)
class Soup:
    """Some experts together, or none (the bare backbone), and their calibrated log-loss on all shots, nats per example."""

    members: tuple[str, ...]
    loss: float


@dataclass(frozen=True)
class Arm:
    """One way to predict the target, judged on examples that had no part in it.

    Attributes:
        loss: cross-fitted, calibrated log-loss, nats per example.
        losses: the same per example.
    """

    name: str
    loss: float
    losses: Tensor = field(compare=False, repr=False)


@dataclass(frozen=True)
class Selection:
    """What was chosen and why.

    Attributes:
        experts: the chosen ones, the first chosen first; empty where none helps.
        reason: in a sentence with figures.
        soups: what was compared on all shots on the way to the choice.
        arms: the choice and the nearest expert alone, with experts; then what they have to beat: the bare backbone and, where
            there is one, the own expert. Empty where nothing was checked.
        helps: whether one of the first two beats what follows by more than a standard error of the paired difference;
            ``None`` where it was not checked.
    """

    target: str
    how: str
    experts: tuple[Expert, ...]
    reason: str
    soups: tuple[Soup, ...] = ()
    arms: tuple[Arm, ...] = ()
    helps: bool | None = None

    def __str__(self) -> str:
        rows = [f"experts for {self.target} by {self.how}: {', '.join(e.name for e in self.experts) or 'none'}"]
        rows += [f"  {self.reason}"]
        rows += [f"  {arm.name}: cross-fitted log-loss {arm.loss:.4f}" for arm in self.arms]
        return "\n".join(rows)


def select(
    ranking: Ranking,
    how: str = "top-k",
    *,
    k: int | None = None,
    threshold: float | None = None,
    diversity: float | None = None,
    soup: str | None = None,
    candidates: int | None = None,
    backbone: Backbone | None = None,
    task: Task | None = None,
    own: Expert | None = None,
    search: Search | None = None,
) -> Selection:
    """Choose experts from a ranking, or none.

    With ``backbone`` and ``task`` the choice is checked: where its soup does not beat both the bare backbone and the own
    expert by more than a standard error, the nearest expert alone is chosen, and where that does not either, none.
    ``greedy`` and ``auto`` always are checked; the other ways choose unchecked without the two. A ranking by ``score`` is made
    anew without each fold; one by another kind that has looked at the examples is taken as it is, which favours the experts.

    Args:
        how: ``top-k``; ``threshold`` (at least so similar); ``greedy`` (add the expert that lowers the soup's log-loss on the
            shots most, until none does); ``diverse`` (maximal marginal relevance: each next expert has the largest
            (1 − d)·similarity − d·cosine between what it and the nearest of the chosen ones change); ``auto`` (so many of the
            highest ranked as give the soup of the lowest log-loss).
        k: how many, by default as :meth:`Ranking.top`; for ``greedy`` and ``auto`` the most, by default all candidates. Not for
            ``threshold``.
        threshold: of ``threshold`` alone.
        diversity: d of ``diverse`` alone, 0 (as ``top-k``) to 1, by default 0.5; similarities are scaled to 0…1 first.
        soup: weights of the soups of ``greedy``, ``auto`` and every choice that is checked: ``uniform``, the default, or
            ``score`` (from each expert's log-loss on the examples looked at).
        candidates: ``greedy`` and ``auto`` alone consider so many of the highest ranked, by default ten. n of them cost
            ``auto`` at most n soups in each of the folds and once more, ``greedy`` n(n + 1)/2; a soup is a forward pass over
            the shots. Uniform soups of the same experts are run once.
        own: the target's own expert from :func:`pituning.train_expert`; it is retrained without each fold.
        search: folds.

    Raises:
        UnknownNameError: for another way or soup.
        PituningError: for arguments that are missing, out of range or without effect; for similarities that are not finite;
            if neither the bare backbone nor the own expert has a finite log-loss to beat.
        RefusedError: if the experts have no exact mean.
        DataError: if there are fewer shots than folds.

    Source: greedy soups after Wortsman et al., "Model soups", ICML 2022; maximal marginal relevance after Carbonell and
    Goldstein, SIGIR 1998.
    """
    if how not in WAYS:
        raise unknown_name("selection", how, WAYS)
    checked = backbone is not None and task is not None
    _require_sensible(how, k, threshold, diversity, soup, candidates, checked)
    _require_finite(ranking)
    shots = None
    if backbone is not None and task is not None:
        shots = _Shots(backbone, task, ranking, soup or SOUPS[0], search or Search())
    elif how in COMPARING:
        raise PituningError(f"selection {how!r} compares soups on the target's examples: pass backbone=… and task=…")
    considered = CANDIDATES if candidates is None else candidates
    most = min(len(ranking.experts), considered, k or considered)
    between = _redundancy(ranking.experts, backbone) if how == "diverse" else None

    def rule(rows: Sequence[int]) -> tuple[int, ...]:
        if shots is not None and how == "greedy":
            return shots.greedy(considered, most, rows)
        if shots is not None and how == "auto":
            return shots.auto(most, rows)
        similarities = ranking.similarities if shots is None else shots.similarities(rows)
        if between is not None:
            d = DIVERSITY if diversity is None else diversity
            return _diverse(similarities, between, k or default_k(ranking.experts), d)
        if threshold is not None:
            return tuple(i for i in _falling(similarities) if similarities[i] >= threshold)
        return _falling(similarities)[: k or default_k(ranking.experts)]

    return _unchecked(ranking, how, rule([])) if shots is None else _checked(ranking, how, rule, shots, own)


class _Shots:
    """The target's examples, and what soups of the ranked experts make of them; every soup is run once."""

    def __init__(self, backbone: Backbone, task: Task, ranking: Ranking, soup: str, search: Search) -> None:
        self.backbone, self.task, self.search = backbone, task, search
        self.ranking, self.experts = ranking, ranking.experts
        self.examples = task.split("train")
        self.soup = soup
        self.score = SCORES.get(ranking.kind)  # such a ranking has seen all shots and is made anew for a part of them
        self.compared: dict[tuple[int, ...], float] = {}
        self._runs: dict[tuple[tuple[int, float], ...], Tensor] = {}
        position = {e.id: i for i, e in enumerate(self.examples)}
        parts = stratified_folds(self.examples, search.folds, search.fold_seed)
        self.folds = [([position[e.id] for e in train], [position[e.id] for e in held]) for train, held in parts]

    def log_p(self, members: Sequence[int], rows: Sequence[int]) -> Tensor:
        """log p ``[examples, choices]`` of a soup whose weights come from some rows; of no members: the bare backbone."""
        weights = self._weights(members, rows)
        key = tuple(sorted(zip(members, weights, strict=True)))
        if key not in self._runs:
            self._runs[key] = self._run([self.experts[i] for i, _ in key], [w for _, w in key])
        return self._runs[key]

    def loss(self, members: Sequence[int], rows: Sequence[int]) -> float:
        """Calibrated log-loss of a soup on the rows that its weights come from."""
        found = self._loss(members, rows)
        if len(rows) == len(self.examples):
            self.compared[tuple(members)] = found
        return found

    def is_finite(self, members: Sequence[int]) -> bool:
        """Whether a soup has a log-loss on all shots that is a finite number."""
        return math.isfinite(self._loss(members, range(len(self.examples))))

    def _loss(self, members: Sequence[int], rows: Sequence[int]) -> float:
        log_p = self.log_p(members, rows)[list(rows)]
        return float(calibrated_losses(log_p, [self.examples[r] for r in rows]).mean())

    def similarities(self, rows: Sequence[int]) -> Sequence[float]:
        """The ranking's similarities, as far as they may be known from these rows."""
        if self.score is None:
            return self.ranking.similarities
        examples = [self.examples[r] for r in rows]
        return [-self.score(self.log_p([i], rows)[list(rows)], examples) for i in range(len(self.experts))]

    def nearest(self, rows: Sequence[int]) -> tuple[int, ...]:
        """The highest ranked expert alone."""
        return _falling(self.similarities(rows))[:1]

    def auto(self, most: int, rows: Sequence[int]) -> tuple[int, ...]:
        """So many of the highest ranked as give the best soup."""
        order = _falling(self.similarities(rows))
        best = min((order[: n + 1] for n in range(most)), key=lambda members: _or_infinite(self.loss(members, rows)))
        return self._of_weight(best, rows)

    def greedy(self, candidates: int, most: int, rows: Sequence[int]) -> tuple[int, ...]:
        """The best single expert, then whichever lowers the loss of the soup most, until none does."""
        left, best = list(_falling(self.similarities(rows))[:candidates]), math.inf
        chosen: tuple[int, ...] = ()
        while left and len(chosen) < most:
            losses = {i: _or_infinite(self.loss((*chosen, i), rows)) for i in left}
            added = min(losses, key=lambda i: losses[i])
            if chosen and losses[added] >= best:
                break
            chosen, best = (*chosen, added), losses[added]
            left.remove(added)
        return self._of_weight(chosen, rows)

    def _of_weight(self, members: Sequence[int], rows: Sequence[int]) -> tuple[int, ...]:
        """Without experts of no weight, whose own loss is not finite: the soup is the same with them, and rounding chose."""
        return tuple(i for i, weight in zip(members, self._weights(members, rows), strict=True) if weight > 0)

    def arm(self, name: str, rule: Rule) -> Arm:
        """What a rule reaches on each fold when it is made without it."""
        return self._arm(name, [self.log_p(rule(train), train)[held] for train, held in self.folds])

    def own_arm(self, own: Expert) -> Arm:
        """The own expert, retrained without each fold."""
        retrained = fold_experts(self.backbone, self.task, own, self.search)
        log_p = [self._run([retrained[f]], [1.0])[held] for f, (_, held) in enumerate(self.folds)]
        return self._arm(f"own expert {own.name}", log_p)

    def _arm(self, name: str, log_p: Sequence[Tensor]) -> Arm:
        held = [self.examples[row] for _, rows in self.folds for row in rows]
        losses = calibrated_losses(torch.cat(list(log_p)), held)
        return Arm(name, float(losses.mean()), losses)

    def _weights(self, members: Sequence[int], rows: Sequence[int]) -> list[float]:
        if self.soup == "uniform" or len(members) < 2:
            return [1 / len(members) for _ in members]
        examples = [self.examples[row] for row in rows]
        losses = [_or_infinite(bias_calibrated_loss(self.log_p([i], rows)[list(rows)], examples)) for i in members]
        if all(map(math.isinf, losses)):
            return [1 / len(members) for _ in members]
        return score_weights(losses, len(rows))

    def _run(self, experts: Sequence[Expert], weights: Sequence[float]) -> Tensor:
        if not experts:
            return log_probabilities(self.backbone, self.examples, finite=False)
        mixture, config = build_mixture(experts, list(weights), train="none", granularity="model")
        with running(self.backbone, mixture, config) as model:
            return log_probabilities(self.backbone, self.examples, model, finite=False)


def _checked(ranking: Ranking, how: str, rule: Rule, shots: _Shots, own: Expert | None) -> Selection:
    """The rule's choice, or else the nearest expert alone, if it beats what needs no expert of another task."""
    rows = range(len(shots.examples))
    if not (picked := rule(rows)):
        return _unchecked(ranking, how, ())
    rules: dict[str, Rule] = {f"soup by {how}": rule, "nearest expert alone": shots.nearest}
    members = dict(zip(rules, (picked, shots.nearest(rows)), strict=True))
    helpers = [shots.arm(name, r) for name, r in rules.items()]
    rivals = [shots.arm("bare backbone", _always(()))] + ([shots.own_arm(own)] if own is not None else [])
    known = [arm for arm in rivals if math.isfinite(arm.loss)]
    if not known:
        raise PituningError(
            f"the log-loss of {' and of '.join(arm.name for arm in rivals)} on the examples of task {ranking.target!r} is not "
            "a finite number, so there is nothing that an expert could beat: load the backbone in float32"
        )
    rival = min(known, key=lambda arm: arm.loss)
    # an arm whose loss is not a number would be within no error of anything
    sound = [arm for arm in helpers if math.isfinite(arm.loss) and shots.is_finite(members[arm.name])]
    better = [arm for arm in sound if not within_standard_errors(rival.losses, arm.losses)]
    if sound:
        best = better[0] if better else min(sound, key=lambda arm: arm.loss)
        gain = rival.losses - best.losses
        reason = (
            f"{best.name} has a cross-fitted log-loss of {best.loss:.4f} and {rival.name} of {rival.loss:.4f}: "
            f"a gain of {float(gain.mean()):+.4f} nats, "
            f"with a standard error of {float(gain.std()) / math.sqrt(len(gain)):.4f}"
        )
        chosen = members[best.name]
        shots.loss(chosen, rows)
    else:
        reason, chosen = f"{rival.name} has a cross-fitted log-loss of {rival.loss:.4f}", ()
    if unsound := [arm.name for arm in helpers if arm not in sound]:
        reason += f"; the log-loss of {' and of '.join(unsound)} is not a finite number, so it is not chosen"
    return Selection(
        ranking.target,
        how,
        tuple(ranking.experts[i] for i in chosen) if better else (),
        reason if better else f"none of these helps: {reason}",
        tuple(Soup(tuple(ranking.experts[i].name for i in soup), loss) for soup, loss in shots.compared.items()),
        (*helpers, *rivals),
        bool(better),
    )


def _unchecked(ranking: Ranking, how: str, chosen: Sequence[int]) -> Selection:
    experts = tuple(ranking.experts[i] for i in chosen)
    most = f"the highest similarity by {ranking.kind} is {ranking.similarities[0]:+.4f}"
    reason = (
        f"{len(experts)} of {len(ranking.experts)} experts, unchecked" if experts else f"none is so similar: {most}"
    )
    return Selection(ranking.target, how, experts, reason)


def _or_infinite(loss: float) -> float:
    """A loss to compare: NaN, which is neither larger nor smaller than any, counts as the largest."""
    return loss if math.isfinite(loss) else math.inf


def _always(members: tuple[int, ...]) -> Rule:
    return lambda rows: members


def _falling(similarities: Sequence[float]) -> tuple[int, ...]:
    """Positions of the experts, the most similar first."""
    return tuple(sorted(range(len(similarities)), key=lambda i: -similarities[i]))


def _diverse(
    similarities: Sequence[float], between: Callable[[int, int], float], k: int, diversity: float
) -> tuple[int, ...]:
    """Maximal marginal relevance, on similarities scaled to 0…1."""
    left, low = list(_falling(similarities)), min(similarities)
    spread = max(similarities) - low
    chosen = [left.pop(0)]
    while left and len(chosen) < k:
        relevance = {i: (similarities[i] - low) / spread if spread else 1.0 for i in left}
        worth = {i: (1 - diversity) * relevance[i] - diversity * max(between(i, j) for j in chosen) for i in left}
        chosen.append(max(left, key=lambda i: worth[i]))
        left.remove(chosen[-1])
    return tuple(chosen)


def _redundancy(experts: Sequence[Expert], backbone: Backbone | None) -> Callable[[int, int], float]:
    """The cosine between what two experts change, by their positions."""
    initial = None
    if not is_lora(experts[0]):
        if backbone is None:
            raise PituningError(
                f"selection 'diverse' compares what experts change, and for {experts[0].card.method!r} experts their common "
                "start comes from the backbone: pass backbone=…"
            )
        initial = initial_of(backbone, experts[0])
    return cache(lambda i, j: weight_similarity(experts[i], experts[j], initial))


def _require_sensible(
    how: str,
    k: int | None,
    threshold: float | None,
    diversity: float | None,
    soup: str | None,
    candidates: int | None,
    checked: bool,
) -> None:
    """What is given is known, within its range and of use to the selection."""
    if soup is not None and soup not in SOUPS:
        raise unknown_name("soup", soup, SOUPS)
    if (how == "threshold") != (threshold is not None):
        raise PituningError(f"threshold=… belongs to selection 'threshold', and that needs one; this is {how!r}")
    if threshold is not None and math.isnan(threshold):
        raise PituningError("threshold must be a number, not nan")
    for name, value in (("k", k), ("candidates", candidates)):
        if value is not None and value < 1:
            raise PituningError(f"{name} must be at least 1, not {value}")
    if diversity is not None and not 0 <= diversity <= 1:
        raise PituningError(f"diversity must be between 0 and 1, not {diversity}")
    if k is not None and how == "threshold":
        raise PituningError(
            f"k={k} has no effect on selection 'threshold', which takes all that are so similar: leave it out"
        )
    if diversity is not None and how != "diverse":
        raise PituningError(f"diversity={diversity} belongs to selection 'diverse'; this is {how!r}: leave it out")
    if candidates is not None and how not in COMPARING:
        raise PituningError(
            f"candidates={candidates} belongs to selections 'greedy' and 'auto'; this is {how!r}: leave it out"
        )
    if soup is not None and not checked and how not in COMPARING:
        raise PituningError(
            f"soup={soup!r} is how soups are weighted where they are compared on the target's examples, and selection {how!r} "
            "without backbone=… and task=… compares none: leave it out"
        )


def _require_finite(ranking: Ranking) -> None:
    for expert, similarity in zip(ranking.experts, ranking.similarities, strict=True):
        if not math.isfinite(similarity):
            raise PituningError(
                f"the similarity of expert {expert.name!r} by {ranking.kind} is {similarity}, which has no place in an order: "
                "leave the expert out"
            )
