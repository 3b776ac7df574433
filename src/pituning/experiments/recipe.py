"""A recipe: everything that defines an experiment, in one YAML file that is validated as a whole before anything runs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pituning.data.fewshot import stratified_folds
from pituning.errors import PituningError, RecipeError, UnknownNameError, unknown_name
from pituning.experiments.pretrain_recipe import PretrainRecipe
from pituning.experiments.table_recipe import TableRecipe, missing_backbone
from pituning.metrics.registry import lacking
from pituning.tasks.task import Task, load_task

ARMS = {
    "zero-shot": ("backbone alone", "no expert at all"),
    "own": ("own expert", "trained on the shots alone"),
    "own-extra": ("own + extra steps", "the own expert, tuned again with the same grid and folds as every arm below"),
    "nearest": ("nearest expert as it is", "the most similar expert of the pool, untouched"),
    "nearest-tuned": ("nearest, fine-tuned", "plain warm start: the rival to beat"),
    "soup": ("uniform soup", "mean of the selected experts, untouched"),
    "soup-tuned": ("uniform soup, then tuned", "equal and fixed weights, then tuned"),
    "random-tuned": ("random experts, then tuned", "a soup of as many experts drawn at random, then tuned"),
    "noise-tuned": ("random parameters, then tuned", "experts of the same norms with random directions, then tuned"),
    "pi": ("π (this tool)", "experts selected, weighted, tuned and compared by cross-fitted log-loss"),
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PoolSection(_Strict):
    """Where the pool lies and what it is made of; missing experts are trained.

    Attributes:
        examples: training examples of each expert at most, a fixed sample; without it all of its task's.
    """

    folder: str
    tasks: tuple[str, ...] = Field(min_length=1)
    examples: int | None = Field(default=None, ge=1)
    epochs: float = Field(default=3, gt=0)
    learning_rate: float = Field(default=1e-3, gt=0)


class SearchSection(_Strict):
    """The grid that every arm is tuned on."""

    learning_rates: tuple[float, ...] = Field(default=(3e-4, 1e-3), min_length=1)
    steps: int = Field(default=40, ge=1)
    eval_every: int = Field(default=20, ge=1)
    folds: int = Field(default=2, ge=2)
    batch_size: int = Field(default=16, ge=1)


class InterpolationSection(_Strict):
    """How π selects and blends."""

    kind: str = "calibrated-score"  # as DEFAULT_KIND of pituning.similarity.select, which imports torch
    reference: Literal["shared", "own"] = "shared"
    top: int | None = Field(default=None, ge=1)  # None: as `Ranking.top` has it
    train: Literal["experts", "shared", "weights", "none", "merge-then-tune"] = "merge-then-tune"
    granularity: Literal["model", "encoder-decoder", "layer", "attention", "module", "tensor"] = "module"
    init: Literal["score", "uniform"] = "score"
    include_own: Literal["auto", True, False] = "auto"
    scale: Literal["auto"] | Annotated[float, Field(gt=0)] = "auto"
    alternatives: bool = True
    alpha_learning_rate: float = Field(default=1e-2, ge=0)


class Recipe(_Strict):
    """One experiment: a target, a pool, the arms and the seeds.

    Attributes:
        backbone: a short name, a hub id, or a folder; a relative one lies in the working directory.
        gallery: test pictures of the target that the report shows with the answers of the bare backbone and of π.
        gallery_tasks: tasks of the pool of which it shows as many, with the answers of the bare backbone and their expert.
    """

    title: str
    target: str
    pool: PoolSection
    backbone: str = "minilm"
    method: str = "lora"
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    shots: int = Field(default=16, ge=1)
    draws: tuple[int, ...] = Field(default=(0, 1, 2, 3, 4), min_length=1)
    training_seeds: tuple[int, ...] = Field(default=(0, 1), min_length=1)
    test_limit: int | None = Field(default=1000, ge=1)
    arms: tuple[str, ...] = Field(default=tuple(ARMS), min_length=1)
    search: SearchSection = SearchSection()
    interpolation: InterpolationSection = InterpolationSection()
    ceiling: bool = True
    gallery: int = Field(default=0, ge=0)
    gallery_tasks: tuple[str, ...] = ()
    output: str

    @field_validator("draws", "training_seeds", "arms")
    @classmethod
    def _each_once(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if twice := [value for value in values if values.count(value) > 1]:
            raise ValueError(f"{twice[0]!r} is there more than once; what is repeated is no further evidence")
        return values

    @model_validator(mode="after")
    def _names_exist(self) -> Recipe:
        from pituning.methods.presets import method_names
        from pituning.similarity.measures import KINDS
        from pituning.tasks import task_names

        known = {
            "task": (task_names(), (self.target, *self.pool.tasks)),
            "method": (method_names(), (self.method,)),
            "arm": (list(ARMS), self.arms),
            "similarity": (list(KINDS), (self.interpolation.kind,)),
        }
        problems = [
            str(unknown_name(k, n, names)) for k, (names, used) in known.items() for n in used if n not in names
        ]
        if self.target in self.pool.tasks:
            problems.append(f"the target {self.target!r} is among the pool's tasks")
        if "pi" in self.arms and "own" not in self.arms:
            problems.append("arm 'pi' needs arm 'own'")
        if self.gallery and "pi" not in self.arms:
            problems.append("gallery needs arm 'pi': it shows what π answers")
        if self.gallery_tasks and not self.gallery:
            problems.append("gallery_tasks needs gallery, the number of pictures of each task")
        problems += [
            f"gallery_tasks: {name!r} is none of the pool's tasks: {', '.join(self.pool.tasks)}"
            for name in self.gallery_tasks
            if name not in self.pool.tasks
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def missing_inputs(self) -> list[str]:
        """What has to be there before the recipe can run, and is not: the backbone's folder, the tasks' files, and whatever
        :meth:`lacking` finds.
        """
        missing = missing_backbone(self.backbone)
        tasks: dict[str, Task] = {}
        for name in (self.target, *self.pool.tasks):
            try:
                tasks[name] = load_task(name)
            except PituningError as error:
                missing.append(str(error))
        return missing + self.lacking(tasks)

    def lacking(self, tasks: Mapping[str, Task], drawn: Task | None = None) -> list[str]:
        """What those of the recipe's tasks lack that could be loaded: splits, shots, pictures, and what metrics need.

        Args:
            drawn: the target with the shots of a draw, where they have been drawn.
        """
        found: list[str] = []
        for name, task in tasks.items():
            # an expert that is in the pool already is not scored
            scored = name == self.target or not (Path(self.pool.folder) / name).is_dir()
            shown = bool(self.gallery) and name in (self.target, *self.gallery_tasks)
            wanted = ("train", "test") if scored or shown else ("train",)
            found += [f"task {name!r}: no split {split!r}" for split in wanted if not task.splits.get(split)]
            found += [f"task {name!r}: {what}" for what in lacking((task.metric, *task.more_metrics))] if scored else []
            if shown and task.splits.get("test") and task.split("test")[0].image is None:
                found.append(f"gallery: task {name!r} has no pictures")
        target = tasks.get(self.target)
        if target is not None and target.splits.get("train"):
            try:
                drawn = drawn or target.few_shot(self.shots, self.draws[0])
                stratified_folds(drawn.split("train"), self.search.folds, seed=0)
            except PituningError as error:
                found.append(f"target {self.target!r}: {error}")
        return found

    def digest(self, *found: str) -> str:
        """Hash of whatever changes an arm's value: cached cells are reused only under the same digest.

        Args:
            found: what the file does not say: the backbone's fingerprint, the state of the pool's experts.
        """
        shown = {"title", "draws", "training_seeds", "arms", "ceiling", "gallery", "gallery_tasks", "output"}
        values = self.model_dump(mode="json", exclude=shown)
        return hashlib.sha256(repr((sorted(values.items()), *found)).encode()).hexdigest()[:10]


def load_recipe(path: str | Path) -> Recipe | TableRecipe | PretrainRecipe:
    """Read and validate a recipe: a comparison of arms, one of the paper's tables (the file has the entry ``table``), or a
    pretraining (``pretrain``).

    Raises:
        RecipeError: lists every problem of the file at once.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"no such recipe: {path}")
    try:
        values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: expected a mapping of settings, found {type(values).__name__}")
    try:
        kind: Any = TableRecipe if "table" in values else PretrainRecipe if "pretrain" in values else Recipe
        loaded: Recipe | TableRecipe | PretrainRecipe = kind(**values)
        return loaded
    except ValidationError as error:
        lines = [line for problem in error.errors() for line in _lines(problem)]
        raise RecipeError(f"{path} has {len(lines)} problem(s):\n" + "\n".join(lines)) from error
    except (UnknownNameError, PituningError) as error:
        raise RecipeError(f"{path}: {error}") from error


def _lines(problem: Any) -> list[str]:
    """One line for each thing that is wrong; a check of the whole recipe finds several at once."""
    place, message = ".".join(map(str, problem["loc"])), problem["msg"]
    if place:
        return [f"  {place}: {message}"]
    return [f"  {part}" for part in message.removeprefix("Value error, ").splitlines()]
