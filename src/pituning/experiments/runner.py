"""Run a recipe: train the pool, compute every arm on every draw (resumable), compare them, write the report."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from pituning.backbones import Backbone, load_backbone
from pituning.data.images import open_image
from pituning.data.overlap import Overlap, find_overlaps
from pituning.errors import PituningError, RecipeError
from pituning.example import Example
from pituning.experiments.cells import write_json
from pituning.experiments.controls import Draw, own_cache
from pituning.experiments.kept import Only, differences, state_of
from pituning.experiments.pretrain_recipe import PretrainRecipe
from pituning.experiments.recipe import ARMS, Recipe, load_recipe
from pituning.experiments.table_recipe import TableRecipe
from pituning.experts.expert import Expert
from pituning.experts.pool import ExpertPool
from pituning.problems import listed
from pituning.similarity.embedding import embed_task, pool_embedding, shared_reference
from pituning.similarity.graph import task_graph
from pituning.similarity.measures import FISHER_KINDS
from pituning.similarity.select import audit_pool, rank_experts
from pituning.tasks.task import Task, load_task
from pituning.training.evaluation import Evaluation, evaluate, predict
from pituning.training.precision import precision, resolved
from pituning.training.progress import progress_bar
from pituning.training.train_expert import FULL_DATA, train_expert

RIVALS = ("own-extra", "nearest-tuned", "soup-tuned", "own")


def run_recipe(
    recipe: str | Path | Recipe,
    output: Path | None = None,
    *,
    seeds: Sequence[int] | None = None,
    command: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Run a recipe, mostly from a file, and write ``results.json``, ``report.html`` and PNGs into its output folder.

    A run that was interrupted goes on where it stopped: every (arm, draw) is kept in ``cells/``.

    Args:
        output: instead of the recipe's own.
        seeds: draws, instead of the recipe's own.
        command: what the report says it was made by; needed where the recipe comes from no file.

    Returns:
        the results as written to ``results.json``, with ``report``, the path of the page.

    Raises:
        RecipeError: if the recipe is not valid, a task lacks what it needs (a split, pictures for a gallery, what its metrics
            need), seeds are none or repeated, or an expert in the pool was trained otherwise than the recipe says.
        DataError: if the data of a task cannot be found.
        PituningError: if matplotlib is not installed; results and page are written by then, without the PNG files.
    """
    command = command or f"pituning run {recipe}"
    recipe = recipe if isinstance(recipe, Recipe) else _comparison(recipe)
    if seeds is not None:
        if not seeds or len(set(seeds)) < len(seeds):
            raise RecipeError(f"seeds {list(seeds)}: expected one draw or more, each of them once")
        recipe = recipe.model_copy(update={"draws": tuple(seeds)})
    folder = Path(output or recipe.output)
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    backbone = load_backbone(recipe.backbone)
    # what is kept is of the precision that "auto" stood for
    recipe = recipe.model_copy(update={"precision": resolved(backbone, recipe.precision)})
    target = load_task(recipe.target)
    # every task's data are read before the first training step: a missing file must not cost an hour
    tasks = {name: _capped(load_task(name), recipe.pool.examples) for name in recipe.pool.tasks}
    draws = [target.few_shot(recipe.shots, seed) for seed in recipe.draws]
    if missing := recipe.lacking({recipe.target: target, **tasks}, draws[0]):
        raise RecipeError(f"{recipe.title}: {len(missing)} input(s) are missing, nothing was run:{listed(missing)}")
    with _steps(progress) as step, precision(backbone, recipe.precision):
        pool = _train_pool(recipe, backbone, tasks, step)
        digest = recipe.digest(backbone.fingerprint, *(state_of(pool.folder / name) for name in pool.names()))
        cells = _cells(recipe, backbone, draws, pool, folder, step, digest)
        ceiling = _ceiling(recipe, backbone, target, folder, step) if recipe.ceiling else None
        galleries = _galleries(recipe, backbone, target, tasks, pool, folder, step, digest) if recipe.gallery else []
    with _steps(progress) as step:
        step("task graph", 0, 1)
        results = _compare(recipe, draws, cells, ceiling)
        results |= _map_of_tasks(Draw(recipe, backbone, draws[0], pool, own_cache(folder)))
        step("leak audit", 0, 1)
        results["audit"] = _audit(pool, target, tasks, draws, recipe.test_limit)
    results |= {
        "command": command,
        "seconds": round(time.perf_counter() - start, 1),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {n: version(n) for n in ("pituning", "torch", "transformers", "peft")}
        | {"python": platform.python_version()},
    }
    from pituning.report import PAGE, write_report

    results["report"] = str(folder / PAGE)
    write_json(folder / "results.json", results)  # first: pictures want matplotlib, which may be missing
    write_report(results | {"gallery": galleries}, folder)
    return results


def _comparison(path: str | Path) -> Recipe:
    recipe = load_recipe(path)
    if isinstance(recipe, TableRecipe):
        raise RecipeError(f"{path} is the recipe of a table, which has stages and no arms: pituning.run_table runs it")
    if isinstance(recipe, PretrainRecipe):
        raise RecipeError(f"{path} pretrains a model and has no arms: `pituning pretrain {path}` runs it")
    return recipe


def paired_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float | None, float | None]:
    """Mean of paired differences and its Student-t interval; no interval for a single value.

    >>> paired_interval([0.25])
    (0.25, None, None)
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None, None
    half = float(student.ppf(0.5 + level / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def _capped(task: Task, examples: int | None) -> Task:
    """The task with a fixed sample of its training split."""
    return task if examples is None else replace(task, splits={**task.splits, "train": task.split("train", examples)})


def _has_pictures(task: Task) -> bool:
    return task.split("test")[0].image is not None


def _train_pool(recipe: Recipe, backbone: Backbone, tasks: Mapping[str, Task], step: Any) -> Only:
    """The recipe's experts, the missing ones trained; others in the folder are not looked at."""
    pool = ExpertPool(recipe.pool.folder)
    settings = FULL_DATA.with_(epochs=recipe.pool.epochs, learning_rate=recipe.pool.learning_rate)
    for index, (name, task) in enumerate(tasks.items()):
        step(f"expert for {name}", index, len(tasks))
        if name not in pool.names():
            expert = train_expert(backbone, task, recipe.method, settings=settings)
            pool.add(expert)  # first: nothing that the evaluation meets must cost the training
            result = evaluate(backbone, expert, task, limit=min(500, recipe.test_limit or 500))
            pool.add(expert.with_card(metrics={**expert.card.metrics, f"test {task.metric}": result.value}))
            continue
        expert = pool.load(name)
        expert.require_backbone(backbone)
        _require_as_the_recipe_says(recipe, pool, expert, len(task.split("train")))
    return Only(pool, recipe.pool.tasks)


def _require_as_the_recipe_says(recipe: Recipe, pool: ExpertPool, expert: Expert, examples: int) -> None:
    """Refuse an expert of the pool that is of another method, or was trained otherwise than the recipe's file says.

    What the file leaves out, or the expert's card, is not compared: a pool may come from elsewhere.
    """
    said = recipe.pool.model_dump(include={"epochs", "learning_rate"}, exclude_unset=True)
    found = differences(expert, said, {})
    if expert.card.method != recipe.method:
        found.insert(0, f"method {expert.card.method}, the recipe says {recipe.method}")
    had = expert.card.training.get("examples", examples)
    if "examples" in recipe.pool.model_fields_set and had != examples:
        found.append(f"examples {had}, the recipe says {examples}")
    if found:
        raise RecipeError(
            f"pool {pool.folder}: expert {expert.name!r} was trained with {'; '.join(found)}; remove the expert's folder, or "
            "name another folder for the pool"
        )


def _cells(
    recipe: Recipe,
    backbone: Backbone,
    draws: Sequence[Task],
    pool: ExpertPool,
    folder: Path,
    step: Any,
    digest: str,
) -> dict[str, list[dict[str, Any]]]:
    cells: dict[str, list[dict[str, Any]]] = {arm: [] for arm in recipe.arms}
    store = folder / "cells"
    store.mkdir(exist_ok=True)
    total = len(recipe.draws) * len(recipe.arms)
    for number, task in enumerate(draws):
        draw = Draw(recipe, backbone, task, pool, own_cache(folder))
        for index, arm in enumerate(recipe.arms):
            step(f"draw {task.seed}: {ARMS[arm][0]}", number * len(recipe.arms) + index, total)
            seeds = "-".join(map(str, recipe.training_seeds))
            path = store / f"{digest}.{arm}.{task.seed}.{seeds}.json"
            # a gallery of the first draw shows what π answers, which its cell does not hold
            kept = _pi_name(recipe, digest, task.seed)
            expert_missing = arm == "pi" and recipe.gallery and not number and kept not in draw.cache.names()
            if not path.is_file() or expert_missing:
                write_json(path, _cell(draw, arm, recipe.test_limit, kept))
            cells[arm].append(json.loads(path.read_text(encoding="utf-8")))
    return cells


def _pi_name(recipe: Recipe, digest: str, draw: int) -> str:
    """What π's expert of the first training seed is called beside the own experts."""
    return f"pi-{digest}-{draw}-{recipe.training_seeds[0]}"


def _cell(draw: Draw, arm: str, limit: int | None, pi_name: str) -> dict[str, Any]:
    start = time.perf_counter()
    result = draw.run(arm)
    evaluations = [evaluate(draw.backbone, expert, draw.task, "test", limit) for expert in result.experts]
    if arm == "pi" and draw.recipe.gallery and (expert := result.experts[0]):
        expert.save(draw.cache.folder / pi_name)
    return {
        "values": [e.value for e in evaluations],
        "log_loss": [_log_loss(e) for e in evaluations],
        "seconds": round(time.perf_counter() - start, 1),
        "details": dict(result.details),
    }


def _log_loss(found: Evaluation) -> float | None:
    """None where no example has a right answer that may be given, and so no log-loss."""
    return None if math.isnan(found.metrics["log-loss"]) else found.metrics["log-loss"]


def _ceiling(recipe: Recipe, backbone: Backbone, target: Task, folder: Path, step: Any) -> dict[str, Any]:
    path = folder / "cells" / f"{recipe.digest(backbone.fingerprint)}.ceiling.json"
    if not path.is_file():
        step("expert on the full data", 0, 1)
        settings = FULL_DATA.with_(epochs=recipe.pool.epochs, learning_rate=recipe.pool.learning_rate)
        expert = train_expert(backbone, target, recipe.method, settings=settings)
        value = evaluate(backbone, expert, target, "test", recipe.test_limit).value
        size = len(target.split("train"))
        write_json(path, {"label": f"own expert on all {size:,} training examples", "value": value})
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def _galleries(
    recipe: Recipe,
    backbone: Backbone,
    target: Task,
    tasks: Mapping[str, Task],
    pool: ExpertPool,
    folder: Path,
    step: Any,
    digest: str,
) -> list[dict[str, Any]]:
    """What the bare backbone answers beside π of the first draw, and for tasks of the pool beside their expert."""
    from pituning.report.gallery import make_gallery

    first, found = recipe.draws[0], []
    wanted = {target.name: target, **{name: tasks[name] for name in recipe.gallery_tasks}}
    for number, (name, task) in enumerate(wanted.items()):
        step(f"gallery of {name}", number, len(wanted))
        seeds = f"{first}.{recipe.training_seeds[0]}"
        path = folder / "cells" / f"{digest}.gallery.{name}.{recipe.gallery}.{seeds}.json"
        if not path.is_file():
            expert, after = pool.load(name) if name in tasks else None, f"the pool's expert for {name}"
            if expert is None:
                expert = Expert.load(own_cache(folder).folder / _pi_name(recipe, digest, first))
                after = f"π, from {recipe.shots} shots (draw {first})"
            bare, carried = (predict(backbone, e, task, "test", recipe.test_limit) for e in (None, expert))
            names = f"{backbone.name}, no expert", after
            write_json(path, make_gallery(task, bare, carried, recipe.gallery, names=names).record())
        found.append(json.loads(path.read_text(encoding="utf-8")))
    return found


def _compare(
    recipe: Recipe,
    draws: Sequence[Task],
    cells: Mapping[str, list[dict[str, Any]]],
    ceiling: Mapping[str, Any] | None,
) -> dict[str, Any]:
    target, shots = draws[0], len(draws[0].split("train"))
    means = {arm: [statistics.fmean(c["values"]) for c in found] for arm, found in cells.items()}
    results: dict[str, Any] = {
        "title": recipe.title,
        "target": recipe.target,
        "metric": target.metric,
        "backbone": recipe.backbone,
        "method": recipe.method,
        "shots": recipe.shots,
        "choices": len(target.choices),
        "shots_per_class": shots != recipe.shots,  # of VQA a shot is one question, though its answers are closed
        "precision": recipe.precision,
        "training_seeds": len(recipe.training_seeds),
        "arms": [
            {
                "name": arm,
                "label": ARMS[arm][0],
                "description": ARMS[arm][1],
                "values": means[arm],
                "log_loss": [None if None in c["log_loss"] else statistics.fmean(c["log_loss"]) for c in cells[arm]],
            }
            for arm in recipe.arms
        ],
        "recipe": recipe.model_dump(mode="json"),
    }
    if ceiling:
        results["ceiling"] = dict(ceiling)
    if "pi" in cells:
        results["differences"] = [_difference(means, rival) for rival in RIVALS if rival in means]
        results |= _pi_details(cells["pi"][0]["details"])
    results["summary"] = _summary(results)
    return results


def _difference(means: Mapping[str, list[float]], rival: str) -> dict[str, Any]:
    values = [a - b for a, b in zip(means["pi"], means[rival], strict=True)]
    mean, low, high = paired_interval(values)
    return {"name": f"π − {ARMS[rival][0]}", "rival": rival, "mean": mean, "low": low, "high": high, "values": values}


def _pi_details(details: Mapping[str, Any]) -> dict[str, Any]:
    rows: Mapping[str, list[float]] = details["weights"]
    note = (
        f"first draw; chosen: {details['chosen']}, learning rate {details['learning_rate']:g}, {details['steps']} steps"
    )
    weights = {"experts": details["experts"], "groups": list(rows), "values": list(rows.values()), "note": note}
    if len(details["experts"]) == 1:  # a single expert's weight is 1 everywhere: nothing to draw
        return {"candidates": details["candidates"]}
    return {"weights": weights, "candidates": details["candidates"]}


def _summary(results: Mapping[str, Any]) -> str:
    by_name = {arm["name"]: statistics.fmean(arm["values"]) for arm in results["arms"]}
    if "pi" not in by_name:
        return ""
    from pituning.report.content import Metric

    metric = Metric(results["metric"])
    text = f"π reaches {metric.plain(by_name['pi'])}{metric.unit} {metric.name} on {results['target']} "
    text += f"from {results['shots']} examples{' per class' * results['shots_per_class']}"
    for difference in results["differences"]:
        interval = ""
        if difference["low"] is not None:
            low, high = metric.signed(difference["low"]), metric.signed(difference["high"])
            interval = f" (95 % interval {low} to {high})"
        gain = f"{metric.signed(difference['mean'])} {metric.difference_unit}"
        text += f"; {gain} against {ARMS[difference['rival']][0]}{interval}"
    return text + "."


def _map_of_tasks(draw: Draw) -> dict[str, Any]:
    """Task graph and ranking on a draw: by the similarity that chose π's experts, and by Fisher similarities.

    Graph and Fisher similarities are of embeddings at the shared reference, in float32.
    """
    recipe, backbone, task, pool = draw.recipe, draw.backbone, draw.task, draw.pool
    embeddings = {task.name: embed_task(backbone, shared_reference(pool, recipe.method), task, reference="shared")}
    embeddings |= {name: pool_embedding(backbone, pool, name, "shared") for name in pool.names()}
    graph = task_graph(embeddings)
    decided, section = draw.ranking, recipe.interpolation
    first = section.kind + (" at own experts" if section.kind in FISHER_KINDS and section.reference == "own" else "")
    kinds = list(dict.fromkeys([first, *FISHER_KINDS[::2]]))
    rankings = {kind: rank_experts(backbone, task, pool, kind=kind) for kind in kinds if kind != first}
    rankings = {first: decided, **rankings}
    similarity = {k: {e.name: s for e, s in zip(r.experts, r.similarities, strict=True)} for k, r in rankings.items()}
    order = [e.name for e in rankings[first].experts]
    return {
        "graph": {"kind": graph.kind, "names": graph.names, "matrix": graph.matrix, "target": task.name},
        "ranking": {
            "kinds": kinds,
            "default": first,
            "experts": [{"name": n, "values": {k: similarity[k][n] for k in kinds}, "gain": None} for n in order],
        },
    }


def _audit(
    pool: ExpertPool, target: Task, tasks: Mapping[str, Task], draws: Sequence[Task], limit: int | None
) -> dict[str, Any]:
    """Near-duplicate texts; for a target with pictures, whether an expert has seen them."""
    if _has_pictures(target):
        return picture_audit(target, tasks, draws, limit)
    report = audit_pool(pool, target)
    overlaps: list[dict[str, Any]] = []
    for name, found in report.items():
        if isinstance(found, str):
            raise PituningError(f"the pool's task {name!r} cannot be audited: {found}")
        overlaps += [vars(o) for o in found if isinstance(o, Overlap)]
    return {"checked": len(report), "overlaps": overlaps}


def picture_audit(target: Task, tasks: Mapping[str, Task], draws: Sequence[Task], limit: int | None) -> dict[str, Any]:
    """The target's test pictures and shots against all training pictures of the pool, pixel by pixel.

    Tasks may share training pictures, as those on COCO do, and short texts of different pictures ("leftmost snail") may well
    be equal: a leak is the same text about the same picture, or any test picture that an expert was trained on.
    """
    from pituning.report.gallery import shows_scenes

    shots = {e.id: e for task in draws for e in task.split("train")}
    asked = {"test": target.split("test", limit), "shots": tuple(shots.values())}
    known: dict[bytes, list[tuple[str, Example]]] = defaultdict(list)
    for part, examples in asked.items():
        for example in examples:
            known[_pixels(example)].append((part, example))
    seen: dict[str, set[str]] = {part: set() for part in asked}
    training, overlaps = 0, []
    for task in tasks.values():
        for example in (e for e in task.split("train") if e.image is not None):
            training += 1
            for part, mine in known.get(_pixels(example), ()):
                seen[part].add(mine.id)
                overlaps += [vars(o) for o in _same_text(mine, example)]
    return {
        "checked": len(tasks),
        "overlaps": sorted(overlaps, key=lambda o: (-o["similarity"], o["left"], o["right"])),
        "pictures": {
            "training": training,
            **{part: len(examples) for part, examples in asked.items()},
            **{f"{part}_seen": len(ids) for part, ids in seen.items()},
        },
        "disjoint_scenes": all(map(shows_scenes, (target, *tasks.values()))),
    }


def _pixels(example: Example) -> bytes:
    assert example.image is not None
    picture = open_image(example.image, example.id)
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).digest()


def _same_text(left: Example, right: Example) -> list[Overlap]:
    """Two questions about one picture, if their texts are near-duplicates or neither has any."""
    if not any((*left.texts, *right.texts)):
        return [Overlap(left.id, right.id, left.prompt.strip(), right.prompt.strip(), 1.0)]
    return find_overlaps([left], [right])


@contextmanager
def _steps(progress: bool) -> Iterator[Any]:
    if not progress:
        yield lambda *_: None
        return
    with progress_bar() as bar:
        task = bar.add_task("starting", total=None)
        yield lambda text, done, total: bar.update(task, description=text, completed=done, total=total)
