"""Run a table's recipe stage by stage; whatever is there already is not computed again."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pituning.backbones import Backbone, load_backbone
from pituning.errors import PituningError, RecipeError, unknown_name
from pituning.experiments.cells import write_json
from pituning.experiments.table_recipe import BARE, PI, STAGES, Stage, TableRecipe
from pituning.experts.expert import Expert
from pituning.experts.pool import ExpertPool
from pituning.problems import listed
from pituning.similarity.embedding import pool_embedding
from pituning.similarity.select import rank_experts
from pituning.similarity.zero_shot import most_similar
from pituning.tasks.task import Task, load_task
from pituning.training.blend import blend
from pituning.training.evaluation import evaluate
from pituning.training.interpolate import interpolate
from pituning.training.precision import precision
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

    Args:
        output: instead of the recipe's own.
        stages: which of ``experts``, ``fisher`` and ``interpolation``.
        tasks: only these of the recipe's tasks; all by default.

    Returns:
        the results as written: for every row (method, ``pi``, ``zero-shot``) and column the measured and the published
        figure, as far as they are known.

    Raises:
        RecipeError: if an input of these tasks is missing; all of them are listed.
        UnknownNameError: for a task that the recipe does not have.
    """
    if wrong := [t for t in tasks if t not in recipe.tasks]:
        raise unknown_name("task of the recipe", wrong[0], recipe.tasks)
    if missing := recipe.missing_inputs(tasks):
        raise RecipeError(f"{recipe.title}: {len(missing)} input(s) are missing, nothing was run:{listed(missing)}")
    run = _Run(recipe, Path(output or recipe.output), tasks or tuple(recipe.tasks), progress)
    start = time.perf_counter()
    with precision(run.backbone, recipe.precision):
        for stage in STAGES:
            if stage in stages:
                getattr(run, stage)()
    results = run.results() | {"command": command, "seconds": round(time.perf_counter() - start, 1)}
    write_json(run.folder / "results.json", results)
    return results


class _Run:
    def __init__(self, recipe: TableRecipe, folder: Path, tasks: Sequence[str], progress: bool) -> None:
        self.recipe, self.folder, self.names, self.progress = recipe, folder, tasks, progress
        self.backbone: Backbone = load_backbone(recipe.backbone)
        self.pool, self.own = ExpertPool(recipe.pool), ExpertPool(recipe.own_folder)
        self.cells = folder / "cells"
        self.cells.mkdir(parents=True, exist_ok=True)

    def task(self, name: str) -> Task:
        recipe = self.recipe
        return load_task(name, shots=recipe.shots, seed=recipe.seed, data=recipe.data)

    def experts(self) -> None:
        """Stage 1: an expert for every task and method, and its figures."""
        for name in self.names:
            task = self.task(name)
            for method, section in self.recipe.methods.items():
                expert = self._kept(
                    self.recipe.expert_name(name, method),
                    lambda task=task, method=method, section=section: train_expert(
                        self.backbone, task, method,
                        settings=self.recipe.settings(method, task.name), seed=self.recipe.seed,
                        folder=self._log(task.name, method), resume=True, progress=self.progress, **section.options,
                    ),
                )  # fmt: skip
                self._measure(name, method, expert)

    def fisher(self) -> None:
        """Stage 2: the embedding of every expert that stage 3 may choose."""
        blend_section = self.recipe.interpolation
        if blend_section is None:
            return
        for name in self.pool.names():
            expert = self.pool.load(name)
            if expert.card.method == blend_section.method and expert.card.task in self.recipe.tasks:
                pool_embedding(self.backbone, self.pool, name, blend_section.reference, data=self.recipe.data)

    def interpolation(self) -> None:
        """Stage 3: choose and blend, and the figures of the blends (and of zero-shot transfer)."""
        for name in self.names:
            if self.recipe.zero_shot:
                self._zero_shot(name)
            if self.recipe.interpolation is not None:
                blended = self._kept(self.recipe.blend_name(name), lambda name=name: self._blended(name))
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
        named = [recipe.expert_name(e, section.method) for e in recipe.tasks[name].experts]
        ranking = rank_experts(
            self.backbone, task, self.pool, own, kind=section.kind, reference=section.reference, data=recipe.data,
            exclude=[e for e in self.pool.names() if e not in named] if named else [],
        )  # fmt: skip
        chosen = ranking.top(len(named) or section.top)
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
            return interpolate(self.backbone, task, chosen, own, include_own=include, **common).expert
        return blend(
            self.backbone, task, chosen, own if section.include_own else None, settings=settings,
            folder=self._log(name, PI), resume=True, progress=self.progress, **common,
        ).expert  # fmt: skip

    def _zero_shot(self, name: str) -> None:
        section = self.recipe.interpolation
        self._measure(name, BARE, None)
        if section is None and not self._cell(name, PI).is_file():
            ranking = most_similar(
                self.backbone, self.task(name), self.pool, method=next(iter(self.recipe.methods)), data=self.recipe.data
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

    def _kept(self, name: str, make: Any) -> Expert:
        """The expert of that name, made and stored where it is not there yet."""
        try:
            return self._expert(name)
        except PituningError:
            if name in self.own.names() or name in self.pool.names():
                raise  # it is there, and broken or of another backbone
        self.own.add(make().with_card(name=name), name)
        return self.own.load(name)

    def _measure(self, name: str, row: str, expert: Expert | None) -> None:
        """Keep the figures of an expert, or of the bare backbone, unless they are there."""
        path = self._cell(name, row)
        if path.is_file():
            return
        values: dict[str, float] = {}
        task = self.task(name)
        columns = _columns(self.recipe.tasks[name].evaluate)
        for split in dict.fromkeys(split for split, _, _ in columns):
            wanted = [(metric, column) for s, metric, column in columns if s == split]
            extra = [metric for metric, _ in wanted if metric]
            found = evaluate(self.backbone, expert, task, split, self.recipe.test_limit, metrics=extra)
            values |= {column: found.metrics[metric or found.metric] for metric, column in wanted}
        card = expert.card if expert is not None else None
        write_json(
            path, {"values": values, "expert": card and card.name, "lineage": list(card.lineage) if card else []}
        )

    def _cell(self, task: str, row: str) -> Path:
        """The file of a row's figures for a task; changed settings have another one."""
        section = self.recipe.tasks[task]
        values = self.recipe.model_dump(mode="json", include={"backbone", "shots", "seed", "test_limit", "training"})
        values |= {"task": section.model_dump(mode="json", exclude={"published"}), "row": row}
        if row in self.recipe.methods:
            values["method"] = self.recipe.methods[row].model_dump(mode="json")
        elif self.recipe.interpolation is not None:
            values["interpolation"] = self.recipe.interpolation.model_dump(mode="json")
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]
        return self.cells / f"{task}.{row}.{digest}.json"

    def _log(self, task: str, row: str) -> Path | None:
        return None if self.recipe.shots is not None else self.folder / "runs" / f"{task}-{row}"


def _columns(columns: Sequence[str]) -> list[tuple[str, str, str]]:
    """(split, metric or empty, column) of ``split`` and ``split:metric``."""
    parts = [(column.partition(":"), column) for column in columns]
    return [(split, metric, column) for (split, _, metric), column in parts]
