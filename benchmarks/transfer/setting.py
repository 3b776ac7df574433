"""One target with its shots: what every arm finds there, shared between arms and processes through the work folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.transfer.descent import multitask_expert
from benchmarks.transfer.sharing import Shared
from benchmarks.transfer.suites import Suite
from benchmarks.warm import warm_started
from pituning.data.fewshot import stratified_folds
from pituning.example import Example
from pituning.experiments.controls import ArmResult, Draw
from pituning.experiments.recipe import InterpolationSection, PoolSection, Recipe, SearchSection
from pituning.experts.expert import Expert, ExpertCard
from pituning.interpolation.collapse import collapse
from pituning.similarity.select import DEFAULT_KIND, Ranking, rank_experts
from pituning.training.crossfit import CrossFit, Start, cross_fit
from pituning.training.evaluation import evaluate
from pituning.training.starts import blend_start
from pituning.training.train_expert import fold_experts, train_expert
from pituning.training.trainer import TrainSettings, fit

PUBLISHED_KIND = "fisher-paper"


def recipe_of(suite: Suite, task: str, seed: int) -> Recipe:
    """The suite's settings for one target, in the words of recipes, interpolation as it is shipped; it names no folders."""
    search = suite.search
    return Recipe.model_construct(  # without validation, which knows no tasks but pituning's own
        title=suite.title,
        target=task,
        pool=PoolSection(folder="", tasks=tuple(s for s in suite.sources if s != task)),
        backbone=suite.backbone,
        method=suite.method,
        draws=(seed,),
        training_seeds=(seed,),
        test_limit=suite.test_limit,
        search=SearchSection(
            learning_rates=search.learning_rates,
            steps=search.steps,
            eval_every=search.eval_every,
            folds=search.folds,
            batch_size=search.batch_size,
        ),
        interpolation=InterpolationSection(kind=DEFAULT_KIND, top=suite.top),
        output="",
    )


@dataclass
class Setting(Draw):
    """A draw of shots whose shared parts are pieces on disk.

    Attributes:
        shared: the pieces of this very setting.
        sets: folder for what all settings of the pool have in common: experts of several tasks together.
        rows: what each source was trained on.
        source_training: how.
    """

    shared: Shared
    sets: Path
    rows: Mapping[str, Sequence[Example]]
    source_training: TrainSettings

    @property
    def seed(self) -> int:
        """Of draw, folds and training alike."""
        return self.task.seed

    @property
    def top(self) -> int:
        """How many experts are blended."""
        return self.recipe.interpolation.top

    @property
    def examples(self) -> Sequence[Example]:
        """The shots."""
        return self.task.split("train")

    @property
    def folds(self) -> list[tuple[list[Example], list[Example]]]:
        """(train, held out) of every fold."""
        return stratified_folds(self.examples, self.search.folds, self.search.fold_seed)

    def own(self, seed: int) -> Expert:
        """See :meth:`Draw.own`."""

        def make() -> tuple[Any, dict[str, Expert]]:
            name = f"{self.task.name} (own)"
            method, search = self.recipe.method, self.search
            return {}, {"own": train_expert(self.backbone, self.task, method, name=name, search=search, seed=seed)}

        return self.shared.get(f"own-{seed}", make).experts["own"]

    @property
    def own_folds(self) -> dict[int | None, Expert]:
        """See :attr:`Draw.own_folds`."""
        return self.own_without_folds(self.seed)

    def own_without_folds(self, seed: int) -> dict[int | None, Expert]:
        """The own expert, and the same trained without each fold, in the order of a training seed."""
        own = self.own(self.seed)

        def make() -> tuple[Any, dict[str, Expert]]:
            found = fold_experts(self.backbone, self.task, self.own(self.seed), self.search, seed)
            return {}, {str(fold): expert for fold, expert in found.items() if fold is not None}

        found = self.shared.get(f"own-folds-{seed}", make).experts
        return {None: own, **{int(fold): expert for fold, expert in found.items()}}

    @property
    def ranking(self) -> Ranking:
        """The sources by the similarity that is shipped as the default."""
        return self._ranking("ranking", lambda: rank_experts(self.backbone, self.task, self.pool, kind=DEFAULT_KIND))

    @property
    def published_ranking(self) -> Ranking:
        """The sources by the paper's similarity: each task embedded at its own expert."""

        def rank() -> Ranking:
            own = self.own(self.seed)
            return rank_experts(self.backbone, self.task, self.pool, own, kind=PUBLISHED_KIND, reference="own")

        return self._ranking("published-ranking", rank)

    @property
    def measured(self) -> Mapping[str, float]:
        """Source → value on the test examples after plain fine-tuning, at the lowest rate and the most steps of the grid."""

        def make() -> tuple[Any, dict[str, Expert]]:
            search, values = self.search, {}
            for expert in self.ranking.experts:
                settings = search.settings(min(search.learning_rates), search.steps, self.seed)
                tuned = warm_started(self.backbone, expert, self.examples, settings, self.card(expert))
                values[expert.name] = evaluate(self.backbone, tuned, self.task, limit=self.recipe.test_limit).value
            return values, {}

        values: dict[str, float] = self.shared.get("measured", make).value
        return values

    def tuned(self, start: Start, own_start: Callable[[int], Start] | None = None) -> ArmResult:
        """See :meth:`Draw.tuned`; nothing but the start asks for the own expert."""
        found = cross_fit(self.backbone, start, self.examples, self.search, self.seed, warm=own_start is None)
        mixture, config = (own_start(self.seed) if own_start else start)(None)
        settings = self.search.settings(found.learning_rate, found.steps, self.seed)
        fit(self.backbone, mixture, config, self.examples, settings)
        cell = {"cross-fitted log-loss": found.loss, "learning_rate": found.learning_rate, "steps": found.steps}
        return ArmResult((collapse(mixture, config, self.card()).expert,), cell)

    def tuned_source(self, expert: Expert) -> tuple[Expert, dict[str, Any]]:
        """A source fine-tuned by itself, with rate and steps of its own."""

        def make() -> tuple[Any, dict[str, Expert]]:
            found = self.tuned(blend_start(self.backbone, [expert], [1.0], train="experts", granularity="model"))
            tuned = found.experts[0]
            assert tuned is not None
            return dict(found.details), {"tuned": tuned}

        piece = self.shared.get(f"tuned-{expert.name}", make)
        return piece.experts["tuned"], dict(piece.value)

    def cross_fitted(self, name: str, compute: Callable[[], CrossFit]) -> CrossFit:
        """What :func:`choose` finds out about a candidate that all arms of π compare with, by its name."""

        def make() -> tuple[Any, dict[str, Expert]]:
            found = asdict(compute())
            return {**found, "losses": found["losses"].tolist()}, {}

        value = self.shared.get(f"cross-fit of {name}", make).value
        curves = {float(r): {int(s): loss for s, loss in curve.items()} for r, curve in value["curves"].items()}
        losses = torch.tensor(value["losses"], dtype=torch.float64)
        return CrossFit(value["learning_rate"], value["steps"], value["loss"], curves, losses)

    def multitask(self, names: Sequence[str]) -> Expert:
        """One expert of several sources' rows together; the same for every target that has these nearest."""

        def make() -> tuple[Any, dict[str, Expert]]:
            rows = {name: self.rows[name] for name in names}
            return {}, {"expert": multitask_expert(self.backbone, self.recipe.method, rows, self.source_training)}

        return self.shared.get("+".join(sorted(names)), make, self.sets).experts["expert"]

    def card(self, like: Expert | None = None) -> ExpertCard:
        """Of an expert for this target."""
        return ExpertCard(
            self.task.name,
            backbone=self.backbone.hub_name,
            fingerprint=self.backbone.fingerprint,
            task=self.task.name,
            method=self.recipe.method,
            init_hash=like.card.init_hash if like else "",
            shots=self.task.shots,
            seed=self.seed,
            choices=self.task.choices,
            training={**self.backbone.record, "examples": len(self.examples)},
        )

    def _ranking(self, name: str, rank: Callable[[], Ranking]) -> Ranking:
        def make() -> tuple[Any, dict[str, Expert]]:
            found = rank()
            pairs = [[e.name, s] for e, s in zip(found.experts, found.similarities, strict=True)]
            return {"kind": found.kind, "experts": pairs}, {}

        value = self.shared.get(name, make).value
        experts = tuple(self.pool.load(expert) for expert, _ in value["experts"])
        return Ranking(self.task.name, value["kind"], experts, tuple(s for _, s in value["experts"]))
