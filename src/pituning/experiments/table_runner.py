"""Run a table's recipe stage by stage; whatever is there already is not computed again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pituning.backbones import Backbone, load_backbone
from pituning.errors import PituningError, RecipeError, unknown_name
from pituning.experiments.cells import write_json
from pituning.experiments.kept import (
    STAGE_3,
    Only,
    blend_differences,
    differences,
    digest_of,
    state_of,
    without_blends,
)
from pituning.experiments.table_recipe import BARE, PI, STAGES, Stage, TableRecipe
from pituning.experts.expert import Expert, read_card
from pituning.experts.pool import ExpertPool
from pituning.problems import listed
from pituning.similarity.embedding import has_embedding, pool_embedding
from pituning.similarity.select import rank_experts
from pituning.similarity.zero_shot import most_similar
from pituning.tasks.task import Task, load_task
from pituning.training.blend import blend
from pituning.training.evaluation import evaluate
from pituning.training.interpolate import interpolate
from pituning.training.precision import precision, resolved
from pituning.training.train_expert import train_expert


def run_table(
    recipe: TableRecipe,
    output: Path | None = None,
    *,
    stages: Sequence[Stage] = STAGES,
    tasks: Sequence[str] = (),
    command: str = "",
    progress: bool = True,
) -> dict[str, Any]:
    """Run stages of a table's recipe and write ``results.json``.

    An expert that is there is not trained again, and a figure that is there is kept as long as whatever it depends on is
    the same: the expert, the backbone, the precision, and which and how many examples it was measured on. What the data's
    files hold is not compared.

    Args:
        output: instead of the recipe's own.
        stages: which of ``experts``, ``fisher`` and ``interpolation``.
        tasks: only these of the recipe's tasks; all by default.

    Returns:
        the results as written: for every row (method, ``pi``, ``zero-shot``) and column the measured and the published
        figure, as far as they are known.

    Raises:
        RecipeError: if an input of these tasks is missing, a blend names experts that are not there, or an expert from an
            earlier run was made otherwise than the recipe says; all of them are listed.
        UnknownNameError: for a task that the recipe does not have.
    """
    if wrong := [t for t in tasks if t not in recipe.tasks]:
        raise unknown_name("task of the recipe", wrong[0], recipe.tasks)
    if missing := recipe.missing_inputs(tasks):
        raise RecipeError(f"{recipe.title}: {len(missing)} input(s) are missing, nothing was run:{listed(missing)}")
    run = _Run(recipe, Path(output or recipe.output), tasks or tuple(recipe.tasks), progress)
    if wrong := [*run.absent_experts(stages), *run.unembedded(stages), *run.other_experts(stages)]:
        raise RecipeError(f"{recipe.title}: {len(wrong)} problem(s) with experts, nothing was run:{listed(wrong)}")
    start = time.perf_counter()
    with precision(run.backbone, run.recipe.precision):
        for stage in STAGES:
            if stage in stages:
                getattr(run, stage)()
    results = run.results() | {"command": command, "seconds": round(time.perf_counter() - start, 1)}
    write_json(run.folder / "results.json", results)
    return results


class _Run:
    def __init__(self, recipe: TableRecipe, folder: Path, tasks: Sequence[str], progress: bool) -> None:
        self.folder, self.names, self.progress = folder, tasks, progress
        self.backbone: Backbone = load_backbone(recipe.backbone)
        # what is kept is of the precision that "auto" stood for
        self.recipe = recipe.model_copy(update={"precision": resolved(self.backbone, recipe.precision)})
        self.pool, self.own = ExpertPool(recipe.pool), ExpertPool(recipe.own_folder)
        self.cells = folder / "cells"
        self.cells.mkdir(parents=True, exist_ok=True)
        self._states: dict[Path, str] = {}
        self._tasks: dict[str, Task] = {}

    def task(self, name: str) -> Task:
        if name not in self._tasks:
            recipe = self.recipe
            self._tasks[name] = load_task(name, shots=recipe.shots, seed=recipe.seed, data=recipe.data)
        return self._tasks[name]

    @property
    def candidates(self) -> Only:
        """The experts to choose from. No blend is among them: what a task gets must not depend on which came before it."""
        return without_blends(self.pool)

    def absent_experts(self, stages: Sequence[Stage]) -> list[str]:
        """Experts that a blend of this run needs, and that neither are there nor are trained before it."""
        section = self.recipe.interpolation
        if section is None or "interpolation" not in stages:
            return []
        trained = {
            self.recipe.expert_name(n, m) for n in self.names for m in self.recipe.methods if "experts" in stages
        }
        own = {n: self.recipe.expert_name(n, section.method) for n in self.names}
        absent = [
            f"tasks.{task}: there is no expert {name!r} of its own in {self.own.folder} or {self.pool.folder}; run the stage "
            "'experts' first"
            for task, name in own.items()
            if self._folder(self.recipe.blend_name(task)) is None and self._folder(name) is None and name not in trained
        ]
        return absent + [
            f"tasks.{task}.experts: there is no expert {name!r} in {self.pool.folder}; run the stage 'experts' for its task "
            "into that pool first, or name others"
            for task in self.names
            if self._folder(self.recipe.blend_name(task)) is None
            for name in self.recipe.named_experts(task)
            if name not in self.pool.names() and (name not in trained or self._trained_into.folder != self.pool.folder)
        ]

    def other_experts(self, stages: Sequence[Stage]) -> list[str]:
        """Experts of these tasks that are there, but were made otherwise than the recipe says."""
        found = []
        for task in self.names:
            for method in self.recipe.methods:
                found += self._differences(self.recipe.expert_name(task, method), self._trained_as(task, method))
            if self.recipe.interpolation is not None and "interpolation" in stages:
                found += self._differences(self.recipe.blend_name(task), self._blended_as(task))
        return found

    def experts(self) -> None:
        """Stage 1: an expert for every task and method, and its figures."""
        for name in self.names:
            task = self.task(name)
            for method, section in self.recipe.methods.items():
                log = self._log(name, method, self._trained_as(name, method))
                expert = self._kept(
                    self.recipe.expert_name(name, method),
                    partial(
                        train_expert, self.backbone, task, method,
                        settings=self.recipe.settings(method, name), seed=self.recipe.seed,
                        folder=log, resume=log is not None, progress=self.progress, **section.options,
                    ),
                    self._trained_into,
                )  # fmt: skip
                self._measure(name, method, expert)

    def fisher(self) -> None:
        """Stage 2: the embedding of every expert that stage 3 may choose."""
        section = self.recipe.interpolation
        if section is None:
            return
        candidates = self.candidates
        for name in self._to_embed():
            pool_embedding(self.backbone, candidates, name, section.reference, data=self.recipe.data)

    def _to_embed(self) -> dict[str, str]:
        """The candidates that are there, as far as the blends of this run may choose them, each with its task."""
        recipe, section, pool = self.recipe, self.recipe.interpolation, self.candidates
        assert section is not None
        cards = {name: read_card(pool.folder / name) for name in pool.names()}
        named = {e for n in self.names for e in recipe.named_experts(n)}
        if all(recipe.named_experts(n) for n in self.names):
            cards = {name: card for name, card in cards.items() if name in named}
        return {n: c.task for n, c in cards.items() if c.method == section.method and c.task in recipe.tasks}

    def unembedded(self, stages: Sequence[Stage]) -> list[str]:
        """What lacks of the data of experts that are there and have to be embedded; tasks of this run are looked at before."""
        section, found = self.recipe.interpolation, []
        if section is None or "fisher" not in stages:
            return []
        for name, task in self._to_embed().items():
            if task in self.names or has_embedding(self.pool, name, section.reference):
                continue
            try:
                load_task(task, data=self.recipe.data)
            except PituningError as error:
                found.append(f"expert {name!r} of {self.pool.folder} is to be embedded: {error}")
        return found

    def interpolation(self) -> None:
        """Stage 3: choose and blend, and the figures of the blends (and of zero-shot transfer)."""
        for name in self.names:
            if self.recipe.zero_shot:
                self._zero_shot(name)
            if self.recipe.interpolation is not None:
                blend_name = self.recipe.blend_name(name)
                # once more: stage 1 may have trained an expert again since the run began
                if wrong := self._differences(blend_name, self._blended_as(name)):
                    raise RecipeError(f"{self.recipe.title}:{listed(wrong)}")
                blended = self._kept(blend_name, partial(self._blended, name), self.own)
                self._measure(name, PI, blended)

    def results(self) -> dict[str, Any]:
        """Everything that has been measured so far, beside what the paper reports."""
        rows = [*([BARE] if self.recipe.zero_shot else []), *self.recipe.methods]
        rows += [PI] if self.recipe.interpolation is not None or self.recipe.zero_shot else []
        table = []
        for name, section in self.recipe.tasks.items():
            columns = list(dict.fromkeys([*section.evaluate, *(c for r in section.published.values() for c in r)]))
            for row in rows:
                path = self._cell(name, row)
                measured = json.loads(path.read_text(encoding="utf-8"))["values"] if path.is_file() else {}
                published = section.published.get(row, {})
                table.append(
                    {
                        "task": name,
                        "row": row,
                        "columns": [
                            {"name": c, "measured": measured.get(c), "published": published.get(c)} for c in columns
                        ],
                    }
                )
        return {"title": self.recipe.title, "table": self.recipe.table, "backbone": self.recipe.backbone, "rows": table}

    def _blended(self, name: str) -> Expert:
        recipe, section = self.recipe, self.recipe.interpolation
        assert section is not None
        task = self.task(name)
        own = self._expert(recipe.expert_name(name, section.method))
        named, candidates = recipe.named_experts(name), self.candidates
        ranking = rank_experts(
            self.backbone, task, candidates, own, kind=section.kind, reference=section.reference, data=recipe.data,
            exclude=[e for e in candidates.names() if e not in named] if named else [],
        )  # fmt: skip
        chosen = ranking.top(len(named) or section.top)
        record = {**self._section(name), "members": self._members([own.name, *(e.name for e in chosen)])}
        common: dict[str, Any] = {
            "train": section.train,
            "granularity": section.granularity,
            "init": section.init,
            "similarities": ranking.similarities[: len(chosen)],
            "seed": recipe.seed,
        }
        settings = recipe.blend_settings(name)
        if settings is None:
            include: bool | str = "auto" if section.include_own else False
            expert = interpolate(self.backbone, task, chosen, own, include_own=include, **common).expert
        else:
            expert = blend(
                self.backbone, task, chosen, own if section.include_own else None, settings=settings,
                folder=self._log(name, PI, {**recipe.said_of_blend(name), **record}), resume=True, progress=self.progress,
                **common,
            ).expert  # fmt: skip
        return expert.with_card(training={**expert.card.training, STAGE_3: record})

    def _zero_shot(self, name: str) -> None:
        section = self.recipe.interpolation
        self._measure(name, BARE, None)
        if section is None and not self._cell(name, PI).is_file():
            ranking = most_similar(
                self.backbone, self.task(name), self.candidates, method=self._method, data=self.recipe.data
            )
            self._measure(name, PI, ranking.experts[0])

    def _expert(self, name: str) -> Expert:
        for pool in (self.own, self.pool):
            if name in pool.names():
                expert = pool.load(name)
                expert.require_backbone(self.backbone)
                return expert
        raise PituningError(
            f"there is no expert {name!r} in {self.own.folder} or {self.pool.folder}: run the stage 'experts' first"
        )

    @property
    def _trained_into(self) -> ExpertPool:
        """Where stage 1 puts its experts: few-shot ones are chosen for no other task."""
        return self.pool if self.recipe.shots is None else self.own

    def _kept(self, name: str, make: Callable[[], Expert], into: ExpertPool) -> Expert:
        """The expert of that name, made and stored where it is not there yet."""
        if self._folder(name) is None:
            into.add(make().with_card(name=name), name)
        return self._expert(name)

    def _folder(self, name: str) -> Path | None:
        """Where the expert of that name lies, if it is there."""
        return next((pool.folder / name for pool in (self.own, self.pool) if name in pool.names()), None)

    @property
    def _method(self) -> str:
        """The method of the experts that zero-shot transfer chooses from."""
        return next(iter(self.recipe.methods))

    def _trained_as(self, task: str, method: str) -> dict[str, Any]:
        """What the recipe says of a stage 1 expert: settings and options."""
        options = dict(self.recipe.methods[method].options)
        return {"settings": self._said(self.recipe.said(method, task)), "options": options}

    def _blended_as(self, task: str) -> dict[str, Any]:
        """The same of a blend, and how its experts are chosen."""
        return {"settings": self._said(self.recipe.said_of_blend(task)), "section": self._section(task)}

    def _said(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        found = dict(settings)
        if "epochs" in found:
            found["steps"] = None  # they would count, and not the epochs
        if "seed" in self.recipe.model_fields_set and self.recipe.shots is None:
            found["seed"] = self.recipe.seed
        return found

    def _section(self, task: str) -> dict[str, Any]:
        """What of stage 3 shapes a task's blend besides its training: named experts are not ranked and cut off."""
        section, named = self.recipe.interpolation, self.recipe.named_experts(task)
        assert section is not None
        idle = {"training"}
        if named:
            idle |= {"top"} if section.init == "similarity" else {"top", "kind", "reference"}
        return {**section.model_dump(mode="json", exclude=idle), "experts": sorted(named)}

    def _differences(self, name: str, said: Mapping[str, Any]) -> list[str]:
        """Where an expert that is there was made otherwise than the recipe says, as one line."""
        folder = self._folder(name)
        if folder is None:
            return []
        expert = self._expert(name)
        found = differences(expert, said["settings"], said.get("options", {}))
        if "section" in said:
            members = expert.card.training.get(STAGE_3, {}).get("members", {})
            found += blend_differences(expert, said["section"], self._members(members))
        if not found:
            return []
        return [
            f"expert {name!r} was made with {'; '.join(found)}. Remove the folder {folder} to have it made anew, or name "
            "another folder"
        ]

    def _members(self, names: Iterable[str]) -> dict[str, str]:
        """State of those of the experts that are there."""
        return {name: self._state(folder) for name in names if (folder := self._folder(name))}

    def _state(self, folder: Path) -> str:
        if folder not in self._states:  # no run replaces an expert that is there
            self._states[folder] = state_of(folder)
        return self._states[folder]

    def _measure(self, name: str, row: str, expert: Expert | None) -> None:
        """Keep the figures of an expert, or of the bare backbone, unless they are there."""
        path, task = self._cell(name, row), self.task(name)
        columns = _columns(self.recipe.tasks[name].evaluate)
        sizes = {split: len(task.split(split)) for split, _, _ in columns}
        if path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("examples", sizes) == sizes:
            return
        values: dict[str, float] = {}
        for split in dict.fromkeys(split for split, _, _ in columns):
            wanted = [(metric, column) for s, metric, column in columns if s == split]
            extra = [metric for metric, _ in wanted if metric]
            found = evaluate(self.backbone, expert, task, split, self.recipe.test_limit, metrics=extra)
            values |= {column: found.metrics[metric or found.metric] for metric, column in wanted}
        card = expert.card if expert is not None else None
        lineage = list(card.lineage) if card else []
        write_json(path, {"values": values, "examples": sizes, "expert": card and card.name, "lineage": lineage})

    def _cell(self, task: str, row: str) -> Path:
        """The file of a row's figures for a task; other settings, experts or circumstances have another one."""
        section = self.recipe.tasks[task]
        values = self.recipe.model_dump(
            mode="json", include={"data", "precision", "shots", "seed", "test_limit", "training"}
        )
        values |= {"task": section.model_dump(mode="json", exclude={"published", "experts"}), "row": row}
        values |= {"backbone": self.backbone.fingerprint, "experts": self._behind(task, row)}
        if row in self.recipe.methods:
            values["method"] = self.recipe.methods[row].model_dump(mode="json")
        elif self.recipe.interpolation is not None:
            training = self.recipe.interpolation.training.model_dump(mode="json")
            values["interpolation"] = {**self._section(task), "training": training}
        return self.cells / f"{task}.{row}.{digest_of(values)}.json"

    def _behind(self, task: str, row: str) -> dict[str, str]:
        """The experts that a figure is of, with their state: of zero-shot transfer all that may be chosen."""
        if row == BARE:
            return {}
        if row in self.recipe.methods:
            return self._members([self.recipe.expert_name(task, row)])
        if self.recipe.interpolation is not None:
            return self._members([self.recipe.blend_name(task)])
        folders = [self.pool.folder / name for name in self.candidates.names()]
        return {f.name: self._state(f) for f in folders if read_card(f).method == self._method}

    def _log(self, task: str, row: str, said: Mapping[str, Any]) -> Path | None:
        """Folder of a run's checkpoints: only the same run on the same backbone goes on from them."""
        if self.recipe.shots is not None:
            return None
        values = {**said, "backbone": self.backbone.fingerprint}
        values |= {"data": self.recipe.data, "precision": self.recipe.precision}
        return self.folder / "runs" / f"{task}-{row}-{digest_of(values)}"


def _columns(columns: Sequence[str]) -> list[tuple[str, str, str]]:
    """(split, metric or empty, column) of ``split`` and ``split:metric``."""
    parts = [(column.partition(":"), column) for column in columns]
    return [(split, metric, column) for (split, _, metric), column in parts]
