"""The arms of a comparison. Every tuned arm uses the same grid, the same folds and the same training seeds."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pituning.backbones.base import Backbone
from pituning.experiments.recipe import Recipe
from pituning.experts.expert import Expert, initial_of
from pituning.experts.pool import ExpertPool
from pituning.interpolation.build import build_mixture, is_lora, lora_factors
from pituning.interpolation.collapse import collapse
from pituning.similarity.select import Ranking, rank_experts
from pituning.tasks.task import Task
from pituning.training.blend import Interpolation
from pituning.training.crossfit import CrossFit, Search, Start, cross_fit
from pituning.training.interpolate import choose, own_is_compared
from pituning.training.starts import blend_start
from pituning.training.train_expert import fold_experts, train_expert
from pituning.training.trainer import fit


@dataclass(frozen=True)
class ArmResult:
    """The experts of one arm on one draw, one per training seed (a single one where nothing is random)."""

    experts: tuple[Expert | None, ...]
    details: Mapping[str, Any]


@dataclass
class Draw:
    """One draw of shots: everything its arms share is computed once."""

    recipe: Recipe
    backbone: Backbone
    task: Task
    pool: ExpertPool
    cache: ExpertPool

    def run(self, arm: str) -> ArmResult:
        """Compute one arm."""
        return _ARMS[arm](self)

    @cached_property
    def search(self) -> Search:
        """The grid of every arm; α learns only where an arm says so."""
        section = self.recipe.search
        return Search(
            learning_rates=section.learning_rates,
            steps=section.steps,
            eval_every=section.eval_every,
            folds=section.folds,
            batch_size=section.batch_size,
            fold_seed=self.task.seed,
        )

    def own(self, seed: int) -> Expert:
        """The target's own expert for a training seed; kept on disk, so that a resumed experiment finds it."""
        name = f"own-{self.recipe.digest(self.backbone.fingerprint)}-{self.task.seed}-{seed}"
        if name not in self.cache.names():
            first = self.recipe.training_seeds[0]
            settings = None
            if seed != first:  # learning rate and steps are found once per draw
                chosen = self.own(first).card.training
                settings = self.search.settings(float(chosen["learning_rate"]), int(chosen["steps"]))
            own = train_expert(
                self.backbone, self.task, self.recipe.method,
                name=f"{self.task.name} (own)", search=self.search, settings=settings, seed=seed,
            )  # fmt: skip
            own.save(self.cache.folder / name)
        return Expert.load(self.cache.folder / name)

    @cached_property
    def own_folds(self) -> dict[int | None, Expert]:
        """The own expert without each fold."""
        return fold_experts(self.backbone, self.task, self.own(self.recipe.training_seeds[0]), self.search)

    @cached_property
    def ranking(self) -> Ranking:
        """The pool's experts by the recipe's similarity."""
        section = self.recipe.interpolation
        own = self.own(self.recipe.training_seeds[0])
        return rank_experts(self.backbone, self.task, self.pool, own, kind=section.kind, reference=section.reference)

    def tuned(self, start: Start, own_start: Callable[[int], Start] | None = None) -> ArmResult:
        """Cross-fit a start and fit it on all shots, once per training seed; ``own_start`` for starts from the own expert."""
        examples = self.task.split("train")
        found = cross_fit(self.backbone, start, examples, self.search, warm=own_start is None)
        experts = []
        for seed in self.recipe.training_seeds:
            mixture, config = (own_start(seed) if own_start else start)(None)
            fit(self.backbone, mixture, config, examples, self.search.settings(found.learning_rate, found.steps, seed))
            experts.append(collapse(mixture, config, self.own(seed).card).expert)
            if found.steps == 0 and own_start is None:
                break
        return ArmResult(tuple(experts), _cell(found))

    def soup(self, experts: list[Expert], train: str) -> Start:
        """Equal and fixed weights."""
        section = self.recipe.interpolation
        weights = [1 / len(experts)] * len(experts)
        start = blend_start(self.backbone, experts, weights, train=train, granularity=section.granularity)

        def begin(fold: int | None) -> Any:
            mixture, config = start(fold)
            mixture.alpha.requires_grad_(False)
            return mixture, config

        return begin


def _cell(found: CrossFit) -> dict[str, Any]:
    return {"cross-fitted log-loss": found.loss, "learning_rate": found.learning_rate, "steps": found.steps}


def _own(draw: Draw) -> ArmResult:
    experts = tuple(draw.own(seed) for seed in draw.recipe.training_seeds)
    chosen = experts[0].card
    cell = {key: chosen.training[key] for key in ("learning_rate", "steps")}
    return ArmResult(experts, {**chosen.metrics, **cell})


def _own_extra(draw: Draw) -> ArmResult:
    def start(expert: Expert) -> Any:
        return build_mixture([expert], train="experts", granularity="model")

    return draw.tuned(lambda fold: start(draw.own_folds[fold]), lambda seed: lambda _: start(draw.own(seed)))


def _nearest_tuned(draw: Draw) -> ArmResult:
    nearest = draw.ranking.top(1)
    return draw.tuned(blend_start(draw.backbone, nearest, [1.0], train="experts", granularity="model"))


def _soup(draw: Draw) -> ArmResult:
    mixture, config = build_mixture(draw.ranking.top(draw.recipe.interpolation.top), train="none")
    return ArmResult((collapse(mixture, config, draw.own(draw.recipe.training_seeds[0]).card).expert,), {})


def _soup_tuned(draw: Draw) -> ArmResult:
    section = draw.recipe.interpolation
    return draw.tuned(draw.soup(draw.ranking.top(section.top), section.train))


def _random_tuned(draw: Draw) -> ArmResult:
    section = draw.recipe.interpolation
    experts = sorted(draw.ranking.experts, key=lambda e: e.name)
    drawn = random.Random(f"random experts/{draw.task.seed}").sample(experts, len(draw.ranking.top(section.top)))
    result = draw.tuned(draw.soup(drawn, section.train))
    return ArmResult(result.experts, {**result.details, "experts": [e.name for e in drawn]})


def _noise_tuned(draw: Draw) -> ArmResult:
    section = draw.recipe.interpolation
    noisy = [random_parameters(draw.backbone, e, draw.task.seed) for e in draw.ranking.top(section.top)]
    return draw.tuned(draw.soup(noisy, section.train))


def random_parameters(backbone: Backbone, expert: Expert, seed: int) -> Expert:
    """A random expert that changes as much as the given one does: ‖ΔW‖ of each module for LoRA, else ‖φ − φ_0‖ of each tensor.

    LoRA's A has the norm of the expert's A, and B is scaled so that the products have one norm: random directions of A and B
    seldom agree, so factors of equal norm would change less.
    """
    named = hashlib.sha256(f"{seed}/{expert.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(named[:7], "big"))

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64)

    tensors: dict[str, Tensor] = {}
    if is_lora(expert):
        for module, factor in sorted(lora_factors(expert).items()):
            a, b = noise(factor.a), noise(factor.b)
            a = a * (factor.a.double().norm() / a.norm())
            b = b * ((factor.b.double() @ factor.a.double()).norm() / (b @ a).norm())
            tensors |= {f"{module}.lora_A.weight": a.to(factor.a), f"{module}.lora_B.weight": b.to(factor.b)}
            if factor.bias is not None:
                bias = noise(factor.bias)
                tensors[f"{module}.lora_B.bias"] = (bias * factor.bias.double().norm() / bias.norm()).to(factor.bias)
    else:
        start = initial_of(backbone, expert)
        for key, tensor in sorted(expert.tensors.items()):
            direction, origin = noise(tensor), start[key].to(tensor.device).double()
            change = direction * ((tensor.double() - origin).norm() / direction.norm())
            tensors[key] = (origin + change).to(tensor)
    return Expert({key: tensors[key] for key in expert.tensors}, expert.config, expert.card).with_card(
        name=f"noise like {expert.name}", metrics={}
    )


def _pi(draw: Draw) -> ArmResult:
    interpolations = pi(draw)
    first = interpolations[0]
    chosen = next(c for c in first.candidates if c.chosen)
    details = {
        "chosen": chosen.name,
        "experts": list(first.experts),
        "weights": {group: list(row) for group, row in first.weights.items()},
        "scale": chosen.scale,
        "candidates": [
            {"name": c.name, "scale": c.scale, "loss": c.loss, "chosen": c.chosen} for c in first.candidates
        ],
        "cross-fitted log-loss": chosen.loss,
        "learning_rate": chosen.learning_rate,
        "steps": chosen.steps,
    }
    return ArmResult(tuple(i.expert for i in interpolations), details)


def pi(draw: Draw) -> list[Interpolation]:
    """π as shipped, once per training seed."""
    section = draw.recipe.interpolation
    search = Search(**{**vars(draw.search), "alpha_learning_rate": section.alpha_learning_rate})
    compared = own_is_compared(section.include_own, section.alternatives)
    choice = choose(
        draw.backbone,
        draw.task,
        draw.ranking.top(section.top),
        draw.own(draw.recipe.training_seeds[0]),
        train=section.train,
        granularity=section.granularity,
        init=section.init,
        include_own=section.include_own,
        scale=section.scale,
        alternatives=section.alternatives,
        search=search,
        own_folds=draw.own_folds if compared else None,  # `own-extra` has trained them
    )
    return [choice.refit(seed) for seed in draw.recipe.training_seeds]


_ARMS: dict[str, Callable[[Draw], ArmResult]] = {
    "zero-shot": lambda draw: ArmResult((None,), {}),
    "own": _own,
    "own-extra": _own_extra,
    "nearest": lambda draw: ArmResult((draw.ranking.top(1)[0],), {"experts": [draw.ranking.top(1)[0].name]}),
    "nearest-tuned": _nearest_tuned,
    "soup": _soup,
    "soup-tuned": _soup_tuned,
    "random-tuned": _random_tuned,
    "noise-tuned": _noise_tuned,
    "pi": _pi,
}


def own_cache(folder: Path) -> ExpertPool:
    """Where the own experts of an experiment are kept between runs."""
    return ExpertPool(folder / "own")
