"""The arms: every way to use a pool of experts for a target with a few shots, its controls and its references.

Each trained arm finds learning rate and steps by cross-fitting on the same folds of the shots and the same grid.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.transfer.descent import fully_tuned
from benchmarks.transfer.setting import Setting
from pituning.backbones.base import Backbone
from pituning.experiments.controls import random_parameters
from pituning.experts.expert import Expert, initial_of
from pituning.interpolation.build import is_lora
from pituning.interpolation.collapse import collapse
from pituning.interpolation.operators import merge
from pituning.training.blend import Interpolation
from pituning.training.crossfit import choose_cell, cross_fit
from pituning.training.evaluation import calibrated_losses, log_loss
from pituning.training.interpolate import choose, own_is_compared
from pituning.training.starts import ALPHA_LEARNING_RATE, ENOUGH_TO_SCALE, blend_start, expert_log_probabilities
from pituning.training.train_expert import train_expert
from pituning.training.trainer import fit

SCALES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
"""s of ``own-rescaled``."""
DEFAULTS = 6
"""Of `choose` and `Ranking.top`; raised when they change, so that cells of before no longer count. 2: the weights sum to a
scale, and the blend is tuned as one expert. 3: five experts of LoRA, and scales up to 7. 4: not the best of the scales, but
their mean under the evidence of the shots. 5: two standard errors, and not one, for a candidate other than the blend. 6: the
evidence for a scale is the log-loss as it is."""
FEW_SHOTS = ENOUGH_TO_SCALE // 2
FEW_DEFAULTS = 7
"""Of draws with fewer shots per class than that, whose examples may be too few for a scale. 7: it is one then."""
WARM_DEFAULTS = 2
"""Of warm starts, π's among them, likewise. 2: they take at least the grid's fewest steps."""
WARM = ("nearest-tuned", "soup-tuned", "multitask-tuned", "ties-tuned", "lorahub", "ratatouille", "pi-published")
HUB_SHARE = 4
"""LoraHub runs a quarter of the grid's steps, each a generation of 4 + ⌊3 ln(n + 1)⌋ forward passes over all shots."""


@dataclass(frozen=True)
class Outcome:
    """What an arm comes to.

    Attributes:
        expert: to be evaluated; ``None`` for the bare backbone.
        details: plain values: rate, steps, experts, weights.
        backbone: to be evaluated in the frozen one's place.
    """

    expert: Expert | None
    details: Mapping[str, Any] = field(default_factory=dict)
    backbone: Backbone | None = None


@dataclass(frozen=True)
class Arm:
    """One way.

    Attributes:
        name: as ``--arms`` takes it.
        options: what distinguishes an arm of π; part of its identity.
    """

    name: str
    label: str
    about: str
    compute: Callable[[Setting], Outcome]
    options: Mapping[str, Any] = field(default_factory=dict)

    def identity(self, shots: int) -> dict[str, Any]:
        """Plain values that change where the arm does, as it is with so many shots."""
        dated: dict[str, Any] = {"defaults": WARM_DEFAULTS} if self.name in WARM else {}
        if _function(self.compute) is _pi:
            dated = {"defaults": [WARM_DEFAULTS, FEW_DEFAULTS if shots < FEW_SHOTS else DEFAULTS]}
        return {"name": self.name, "options": dict(self.options), **dated}


def _as_recipes_have_it(arm: str, uses: Callable[[Setting], Sequence[Expert]], setting: Setting) -> Outcome:
    """An arm that recipes have, too."""
    found = setting.run(arm)
    return Outcome(found.experts[0], {**found.details, "experts": [e.name for e in uses(setting)]})


def _none(setting: Setting) -> list[Expert]:
    return []


def _nearest(setting: Setting) -> list[Expert]:
    return setting.ranking.top(1)


def _chosen(setting: Setting) -> list[Expert]:
    return setting.ranking.top(setting.top)


def _chosen_by_default(setting: Setting) -> list[Expert]:
    return setting.ranking.top()


def _own_by(setting: Setting, method: str) -> Outcome:
    """The own expert of another method than the suite's."""
    name = f"{setting.task.name} (own, {method})"
    own = train_expert(setting.backbone, setting.task, method, name=name, search=setting.search, seed=setting.seed)
    cell = {key: own.card.training[key] for key in ("learning_rate", "steps")}
    return Outcome(own, {**own.card.metrics, **cell})


def rescaled(setting: Setting, expert: Expert, scale: float) -> Expert:
    """φ_0 + s (φ − φ_0); at s = 1 the expert itself, bit by bit."""
    start = None if is_lora(expert) else initial_of(setting.backbone, expert)
    return merge([expert], "task_arithmetic", scale=scale, initial=start).expert


def _own_rescaled(setting: Setting) -> Outcome:
    """The scale of the lowest calibrated log-loss on the folds left out; of equal ones, the nearest to 1."""
    backbone, folds = setting.backbone, setting.folds
    held = [example for _, part in folds for example in part]
    losses: dict[float, float] = {}
    for scale in SCALES:
        rows: list[Tensor] = []
        for index, (_, part) in enumerate(folds):
            expert = rescaled(setting, setting.own_folds[index], scale)
            rows.append(expert_log_probabilities(backbone, expert, part))
        losses[scale] = float(calibrated_losses(torch.cat(rows), held).mean())
    best = min(SCALES, key=lambda s: (losses[s], abs(s - 1), s))
    details = {"scale": best, "cross-fitted log-loss": losses[best], "losses": {str(s): losses[s] for s in SCALES}}
    return Outcome(rescaled(setting, setting.own(setting.seed), best), details)


def _tuned(setting: Setting, start: Expert, names: Sequence[str], **more: Any) -> Outcome:
    """One expert, fine-tuned."""
    found = setting.tuned(blend_start(setting.backbone, [start], [1.0], train="experts", granularity="model"))
    return Outcome(found.experts[0], {**found.details, "experts": list(names), **more})


def _nearest_tuned(setting: Setting) -> Outcome:
    (nearest,) = setting.ranking.top(1)
    expert, details = setting.tuned_source(nearest)
    return Outcome(expert, {**details, "experts": [nearest.name]})


def _multitask_tuned(setting: Setting) -> Outcome:
    names = [e.card.task for e in _chosen(setting)]
    return _tuned(setting, setting.multitask(names), names)


def _soup(setting: Setting) -> Outcome:
    experts = _chosen(setting)
    return Outcome(merge(experts, "uniform_soup").expert, {"experts": [e.name for e in experts]})


def _greedy_soup(setting: Setting) -> Outcome:
    def score(expert: Expert) -> float:
        return log_loss(expert_log_probabilities(setting.backbone, expert, setting.examples), setting.examples)

    merged = merge(setting.ranking.experts, "greedy_soup", score=score).expert
    weights = {str(parent["name"]): parent["weight"] for parent in merged.card.lineage}
    return Outcome(merged, {"experts": list(weights), "weights": {"model": list(weights.values())}})


def _ties_tuned(setting: Setting) -> Outcome:
    experts = _chosen(setting)
    start = None if is_lora(experts[0]) else initial_of(setting.backbone, experts[0])
    merged = merge(experts, "ties", initial=start)
    return _tuned(setting, merged.expert, [e.name for e in experts], truncation=max(merged.errors.values()))


def _lorahub(setting: Setting) -> Outcome:
    experts, backbone, search = list(setting.ranking.experts), setting.backbone, setting.search
    search = replace(
        search,
        optimizer="cma",
        steps=max(1, search.steps // HUB_SHARE),
        eval_every=max(1, search.eval_every // HUB_SHARE),
    )
    start = blend_start(
        backbone, experts, [0.0] * len(experts), train="weights", granularity="model", coefficients="linear"
    )
    found = cross_fit(backbone, start, setting.examples, search, setting.seed)
    mixture, config = start(None)
    fit(backbone, mixture, config, setting.examples, search.settings(found.learning_rate, found.steps, setting.seed))
    details = {"steps": found.steps, "cross-fitted log-loss": found.loss, "experts": [e.name for e in experts]}
    weights = {"model": mixture.weights().detach().cpu()[0].tolist()}
    return Outcome(collapse(mixture, config, setting.card(experts[0])).expert, {**details, "weights": weights})


def _ratatouille(setting: Setting) -> Outcome:
    experts = _chosen(setting)
    found = [setting.tuned_source(e) for e in experts]
    soup = merge([e.with_card(name=s.name) for (e, _), s in zip(found, experts, strict=True)], "uniform_soup").expert
    singles = {s.name: details for (_, details), s in zip(found, experts, strict=True)}
    return Outcome(soup, {"experts": [e.name for e in experts], "tuned": singles})


def _published(setting: Setting) -> Outcome:
    """As the paper has it: Fisher similarity at own experts, uniform weights, own included, one rate for α and all φ_k."""
    experts, backbone, own = setting.published_ranking.top(setting.top), setting.backbone, setting.own_folds
    granularity = "attention" if setting.recipe.method == "lora" else "module"
    weights = [1 / (len(experts) + 1)] * (len(experts) + 1)

    def start(fold: int | None) -> Any:
        members = [*experts, own[fold]]
        return blend_start(backbone, members, weights, train="experts", granularity=granularity)(fold)

    rates = sorted(setting.search.learning_rates)
    searches = {r: replace(setting.search, learning_rates=(r,), alpha_learning_rate=r) for r in rates}
    found = {r: cross_fit(backbone, start, setting.examples, s, setting.seed) for r, s in searches.items()}
    rate, steps = choose_cell({(f.learning_rate, f.steps): f.losses for f in found.values()}, warm=True)
    mixture, config = start(None)
    fit(backbone, mixture, config, setting.examples, searches[rate].settings(rate, steps, setting.seed))
    details = {
        "learning_rate": rate,
        "steps": steps,
        "cross-fitted log-loss": found[rate].loss,
        "experts": [*(e.name for e in experts), own[None].name],
        "weights": {"mean of the groups": mixture.weights().detach().cpu().mean(0).tolist()},
    }
    return Outcome(collapse(mixture, config, setting.card(experts[0])).expert, details)


def _pi(
    setting: Setting,
    experts: Callable[[Setting], Sequence[Expert]] = _chosen_by_default,
    k: int | None = None,
    with_similarities: bool = False,
    **options: Any,
) -> Outcome:
    """`choose` with its defaults, but for what an arm changes."""
    members = setting.ranking.top(k) if k else list(experts(setting))
    if with_similarities:
        options["similarities"] = setting.ranking.similarities[: len(members)]
    search = replace(setting.search, alpha_learning_rate=ALPHA_LEARNING_RATE)
    compared = own_is_compared(options.get("include_own", "auto"), options.get("alternatives", True))
    if compared:
        options["own_folds"] = setting.own_without_folds(0)  # as `choose` trains them, once for all arms
    own = setting.own(setting.seed) if compared else None
    options["shared"] = setting.cross_fitted
    choice = choose(setting.backbone, setting.task, members, own, search=search, **options)
    found = choice.refit(setting.seed)
    return Outcome(found.expert, _blend_details(found))


def _blend_details(found: Interpolation) -> dict[str, Any]:
    chosen = next(c for c in found.candidates if c.chosen)
    return {
        "chosen": chosen.name,
        "learning_rate": chosen.learning_rate,
        "steps": chosen.steps,
        "cross-fitted log-loss": chosen.loss,
        "experts": list(found.experts),
        "weights": {group: list(row) for group, row in found.weights.items()},
        "candidates": [{"name": c.name, "scale": c.scale, "loss": c.loss} for c in found.candidates],
    }


def _function(compute: Callable[..., Outcome]) -> Callable[..., Outcome]:
    return compute.func if isinstance(compute, partial) else compute


def _at_random(setting: Setting) -> list[Expert]:
    experts = sorted(setting.ranking.experts, key=lambda e: e.name)
    return random.Random(f"random experts/{setting.seed}").sample(experts, len(setting.ranking.top()))


def _dissimilar(setting: Setting) -> list[Expert]:
    return list(setting.ranking.experts[-len(setting.ranking.top()) :])


def _noise(setting: Setting) -> list[Expert]:
    return [random_parameters(setting.backbone, e, setting.seed) for e in _chosen_by_default(setting)]


def _best_measured(setting: Setting) -> list[Expert]:
    gains = setting.measured
    order = sorted(setting.ranking.experts, key=lambda e: (-gains[e.name], e.name))
    return order[: len(setting.ranking.top())]


def _full(setting: Setting) -> Outcome:
    tuned, found = fully_tuned(setting.backbone, setting.examples, setting.search, setting.seed)
    return Outcome(None, found, tuned)


def _arm(name: str, label: str, about: str, compute: Callable[..., Outcome], **options: Any) -> Arm:
    return Arm(name, label, about, partial(compute, **options) if options else compute, options)


def _pi_of(name: str, label: str, about: str, experts: Callable[[Setting], Sequence[Expert]]) -> Arm:
    return Arm(name, label, about, partial(_pi, experts=experts))


def _recipe_arm(name: str, label: str, about: str, uses: Callable[[Setting], Sequence[Expert]] = _none) -> Arm:
    return Arm(name, label, about, partial(_as_recipes_have_it, name, uses))


ARMS: Mapping[str, Arm] = {
    arm.name: arm
    for arm in (
        _recipe_arm("zero-shot", "backbone alone", "no expert at all"),
        _recipe_arm("own", "own expert", "trained on the shots alone"),
        _arm("own-lora", "own expert, LoRA", "another method, trained on the shots alone", _own_by, method="lora"),
        _arm("own-prefix", "own expert, prefix", "another method, the same grid and folds", _own_by, method="prefix"),
        _arm("own-bitfit", "own expert, BitFit", "another method, the same grid and folds", _own_by, method="bitfit"),
        _recipe_arm(
            "own-extra", "own + the same extra steps", "the own expert tuned again, with every arm's grid and folds"
        ),
        _arm("own-rescaled", "own, rescaled", "φ_0 + s (φ − φ_0), s by cross-fitting on the shots", _own_rescaled),
        _recipe_arm("nearest", "nearest as it is", "the most similar source, untouched", _nearest),
        _arm("nearest-tuned", "nearest, fine-tuned", "plain warm start: the rival to beat", _nearest_tuned),
        _arm(
            "multitask-tuned",
            "multi-task, then tuned",
            "one expert trained on all source rows of the three nearest tasks together, then tuned",
            _multitask_tuned,
        ),
        _arm("soup", "uniform soup", "mean of the three nearest, untouched", _soup),
        _recipe_arm("soup-tuned", "uniform soup, then tuned", "equal and fixed weights, then tuned", _chosen),
        _arm(
            "greedy-soup",
            "greedy soup",
            "mean of those sources that lower the soup's log-loss on the shots",
            _greedy_soup,
        ),
        _arm(
            "ties-tuned", "TIES, then tuned", "the three nearest merged by TIES at density 0.2, then tuned", _ties_tuned
        ),
        _arm("lorahub", "LoraHub", "one signed weight for each source, from zero, by CMA-ES; no gradients", _lorahub),
        _arm("ratatouille", "ratatouille", "the three nearest, each fine-tuned by itself, then averaged", _ratatouille),
        _arm(
            "pi-published",
            "π as published",
            "Fisher similarity, uniform weights, own expert included, one rate for the weights and the experts",
            _published,
        ),
        _arm(
            "pi",
            "π as shipped",
            "`choose` with its defaults on as many of the nearest as `Ranking.top` gives: five of LoRA, else three",
            _pi,
        ),
        _pi_of("pi-random", "π, random experts", "as many sources drawn at random", _at_random),
        _pi_of("pi-dissimilar", "π, dissimilar experts", "the least similar sources", _dissimilar),
        _pi_of("pi-noise", "π, random parameters", "random experts that change as much as the nearest", _noise),
        _pi_of(
            "pi-oracle",
            "π, oracle selection",
            "reference: the sources whose warm start is best on the test examples",
            _best_measured,
        ),
        _arm("full", "full fine-tuning", "reference: all of the backbone's weights, at a tenth of the rates", _full),
        _arm("pi-k1", "π, k = 1", "one expert", _pi, k=1),
        _arm("pi-k2", "π, k = 2", "two experts", _pi, k=2),
        _arm("pi-k3", "π, k = 3", "three experts", _pi, k=3),
        _arm("pi-k8", "π, k = 8", "eight experts", _pi, k=8),
        _arm(
            "pi-model", "π, one weight per expert", "granularity `model` instead of `module`", _pi, granularity="model"
        ),
        _arm("pi-layer", "π, weights per layer", "granularity `layer`", _pi, granularity="layer"),
        _arm("pi-tensor", "π, weights per tensor", "granularity `tensor`", _pi, granularity="tensor"),
        _arm("pi-experts", "π, weights and experts", "the paper's mode: both are trained", _pi, train="experts"),
        _arm("pi-shared", "π, shared δ", "frozen experts, trained weights and one trained δ", _pi, train="shared"),
        _arm("pi-weights", "π, weights alone", "frozen experts, trained weights", _pi, train="weights"),
        _arm("pi-uniform", "π, uniform start", "equal first weights", _pi, init="uniform"),
        _arm(
            "pi-similarity",
            "π, start by similarity",
            "first weights: softmax of the similarities",
            _pi,
            init="similarity",
            with_similarities=True,
        ),
        _arm("pi-mean", "π, a mean", "weights that sum to one instead of to a scale", _pi, scale=1.0),
        _arm("pi-without-own", "π, never own", "the own expert is not blended", _pi, include_own=False),
        _arm("pi-with-own", "π, always own", "the own expert is blended", _pi, include_own=True),
        _arm(
            "pi-bare",
            "π, no alternatives",
            "the blend of the nearest, whatever cross-fitting says of other candidates",
            _pi,
            include_own=False,
            alternatives=False,
        ),
    )
}
