"""Compute a suite's cells: unattended, resumable, by any number of processes on one work folder."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import pituning
from benchmarks.transfer.arms import ARMS
from benchmarks.transfer.cells import REVISION, Cells, digest, digest_examples
from benchmarks.transfer.drawings import DRAWINGS, load_drawings
from benchmarks.transfer.setting import Setting, recipe_of
from benchmarks.transfer.sharing import Shared
from benchmarks.transfer.sources import AUDITED, SourceRows, Tasks, pool_digest, source_rows, train_sources
from benchmarks.transfer.suites import ABLATIONS, FIRST, Suite
from pituning.backbones.base import Backbone
from pituning.errors import unknown_name
from pituning.experts.pool import ExpertPool
from pituning.tasks.task import Task, load_task
from pituning.training.evaluation import evaluate

DETAILS = ("learning_rate", "steps", "experts", "weights", "chosen")


@dataclass(frozen=True)
class Part:
    """What of a suite to compute; ``None`` is all of it."""

    tasks: tuple[str, ...] | None = None
    arms: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None

    def wanted(self, suite: Suite) -> list[tuple[str, str, int, int]]:
        """(arm, task, shots, seed) in the order of computing, so that a run that is broken off has whole pairs.

        Ablations are last. Of the others, one seed comes after the other, and of each seed the arms in :data:`FIRST` first.
        What the suite does not plan is computed where arm, task and seed are all named.

        Raises:
            UnknownNameError: for an arm, a task or a seed that the suite does not have.
        """
        for name in self.arms or ():
            if name not in suite.arms:
                raise unknown_name("arm", name, suite.arms)
        for seed in self.seeds or ():
            if seed not in suite.seeds:
                raise unknown_name("seed", str(seed), [str(s) for s in suite.seeds])
        tasks = suite.targets if self.tasks is None else suite.chosen_targets(self.tasks)
        arms = [a for a in suite.arms if self.arms is None or a in self.arms]
        seeds = suite.seeds if self.seeds is None else self.seeds
        named = None not in (self.tasks, self.arms, self.seeds)
        planned = set(suite.plan())
        return [
            (arm, task, shots, seed)
            for late in (False, True)
            for seed in seeds
            for first in (True, False)
            for shots in suite.shots
            for task in tasks
            for arm in arms
            if (arm in ABLATIONS) is late and (arm in FIRST) is first
            if named or (arm, task, shots, seed) in planned
        ]


@dataclass
class Tally:
    """What a run came to."""

    computed: int = 0
    known: int = 0
    elsewhere: int = 0
    failed: list[str] = field(default_factory=list)
    out_of_time: bool = False

    def __str__(self) -> str:
        text = f"{self.computed} cells computed, {self.known} were there"
        text += f", {self.elsewhere} are being computed by another process" if self.elsewhere else ""
        text += f", {len(self.failed)} FAILED: {', '.join(self.failed)}" if self.failed else ""
        return text + ("; stopped because the time was up" if self.out_of_time else "")


@dataclass
class Bench:
    """A suite with its backbone, data and trained sources.

    Attributes:
        common: what all its cells have in common and their figures depend on. The experts are in it by what they are trained
            from and how: trained again, on another machine, they are the same experts up to rounding, and ``state`` is others.
        state: digest of the experts' very tensors, for the record in each cell.
        kept: Parquet file of cells that were measured in other work folders.
    """

    suite: Suite
    backbone: Backbone
    tasks: Tasks
    work: Path
    pool: ExpertPool
    rows: Mapping[str, SourceRows]
    common: Mapping[str, Any]
    state: str
    kept: Path | None = None

    def draw(self, task: str, shots: int, seed: int) -> Task:
        """The target with its shots."""
        target = self.tasks[task]
        if self.suite.examples_in_all:
            return drawn_in_all(target, shots, seed)
        return target.few_shot(shots if _has_classes(target) else shots * self.suite.without_classes, seed)

    def identity(self, arm: str, task: Task, shots: int) -> dict[str, Any]:
        """Everything that changes the value of a cell."""
        data = [digest_examples(task.split("train")), digest_examples(task.split("test", self.suite.test_limit))]
        cell = {"task": task.name, "shots": shots, "seed": task.seed, "data": data}
        return {"common": dict(self.common), "cell": {"arm": ARMS[arm].identity(shots), **cell}}

    def setting(self, task: Task, shots: int) -> Setting:
        """What the arms share on one draw."""
        identity = self.identity("own", task, shots)
        del identity["cell"]["arm"]
        identity["state"] = self.state
        place = self.work / "shared" / f"{task.name}.{shots}.{task.seed}.{digest(identity)}"
        recipe = recipe_of(self.suite, task.name, task.seed)
        rows = {name: found.rows for name, found in self.rows.items()}
        return Setting(
            recipe, self.backbone, task, self.pool, self.pool, Shared(place),
            self.work / "shared" / f"sets.{digest([self.common, self.state])}", rows, self.suite.source_training,
        )  # fmt: skip


def drawn_in_all(task: Task, count: int, seed: int) -> Task:
    """So many examples in all: of a task with classes as many of each as fit, and at least one."""
    classes = len({e.target for e in task.split("train") if e.target}) if _has_classes(task) else 1
    return task.few_shot(max(1, count // classes), seed)


def _has_classes(task: Task) -> bool:
    first = task.split("train")[0]
    return bool(first.choices) and not first.answers


def load_tasks(suite: Suite, data: Path | None) -> dict[str, Task]:
    """Targets and sources, all of them read before anything is trained; rows that are made on demand are made once."""
    return {name: _kept(_loaded(name, data)) for name in dict.fromkeys((*suite.targets, *suite.sources))}


def _loaded(name: str, data: Path | None) -> Task:
    return load_drawings(name, data) if name in DRAWINGS else load_task(name, data=data)


def _kept(task: Task) -> Task:
    """The task with its examples in memory; pictures are still drawn when they are opened."""
    return replace(task, splits={n: tuple(rows) if n in AUDITED else rows for n, rows in task.splits.items()})


def prepared(
    suite: Suite,
    backbone: Backbone,
    tasks: Tasks,
    work: Path,
    *,
    out_of_time: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = print,
    kept: Path | None = None,
) -> Bench | None:
    """Train what is missing of the sources; ``None`` where the time ran out on it."""
    rows = source_rows(suite, tasks, work / "sources")
    pool = train_sources(suite, backbone, tasks, rows, work / "experts", out_of_time=out_of_time, say=say)
    if pool is None:
        return None
    kind = backbone.device.type
    common = {
        "revision": REVISION,
        "settings": suite.settings(),
        "backbone": backbone.fingerprint,
        "pool": pool.folder.name,
        "device": kind,
        "precision": _precision(backbone),
        "versions": {"pituning": pituning.__version__, **{n: version(n) for n in ("torch", "transformers", "peft")}},
    }
    return Bench(suite, backbone, tasks, work, pool, rows, json.loads(json.dumps(common)), pool_digest(pool), kept)


def _precision(backbone: Backbone) -> str:
    if torch.is_autocast_enabled(backbone.device.type):
        return "bf16"
    return "fp32" if next(backbone.model.parameters()).dtype == torch.float32 else "bf16-weights"


def run(
    bench: Bench,
    part: Part = Part(),
    *,
    out_of_time: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = print,
) -> Tally:
    """Compute the cells of a part that are not there yet; a failed one is reported and does not stop the others."""
    cells, tally = Cells(bench.work / "cells", bench.kept), Tally()
    record = {"code": code_digest(), "pool": bench.state}
    for (task_name, shots, seed), arms in _by_draw(part.wanted(bench.suite)):
        task = bench.draw(task_name, shots, seed)
        setting: Setting | None = None
        for arm in arms:
            identity = bench.identity(arm, task, shots)
            path = cells.path(identity)
            name = f"{arm}/{task_name}/{shots}/{seed}"
            if cells.read(path) is not None:
                tally.known += 1
                continue
            if out_of_time():
                tally.out_of_time = True
                return tally
            with cells.claimed(path) as mine:
                if not mine:
                    tally.elsewhere += 1
                    continue
                if cells.read(path) is not None:  # finished by another process between the look and the claim
                    tally.known += 1
                    continue
                setting = setting or bench.setting(task, shots)
                try:
                    values = compute(bench, setting, arm)
                except Exception as error:  # an unattended run goes on, and says so at its end
                    traceback.print_exc()
                    say(f"{name}: FAILED, {error}")
                    tally.failed.append(name)
                    continue
                cells.write(path, {"identity": identity, "shots": shots, **values, **record})
                tally.computed += 1
                say(f"{name}: {values['metric']} {values['value']:.3f}, {values['seconds']:.1f} s")
    return tally


def compute(bench: Bench, setting: Setting, arm: str) -> dict[str, Any]:
    """One cell."""
    outcome, alone, needs = setting.shared.measured(lambda: ARMS[arm].compute(setting))
    begin = time.perf_counter()
    found = evaluate(outcome.backbone or bench.backbone, outcome.expert, setting.task, "test", bench.suite.test_limit)
    details = dict(outcome.details)
    return {
        "arm": arm,
        "task": setting.task.name,
        "seed": setting.seed,
        "metric": found.metric,
        "value": found.value,
        "log_loss": found.metrics["log-loss"],
        "examples": len(found.predictions),
        "seconds": alone + setting.shared.seconds(needs),
        "seconds_alone": alone,
        "seconds_of_test": time.perf_counter() - begin,
        "needs": needs,
        **{key: details.pop(key, None) for key in DETAILS},
        "details": details,
        "finished": time.strftime("%Y-%m-%d"),
    }


def code_digest() -> str:
    """Digest of the sources of the package and of this benchmark."""
    total = hashlib.sha256()
    for folder in (Path(pituning.__file__).parent, Path(__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            total.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]


def _by_draw(wanted: Sequence[tuple[str, str, int, int]]) -> Iterator[tuple[tuple[str, int, int], list[str]]]:
    """Runs of cells of one draw: they find its shared pieces in memory."""
    for draw, cells in itertools.groupby(wanted, key=lambda cell: cell[1:]):
        yield draw, [cell[0] for cell in cells]
