"""The source experts: the rows they may learn from, their training, and the audit of what leaks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.transfer.cells import claimed, digest, digest_examples
from benchmarks.transfer.suites import EMOJI, Suite
from pituning.backbones.base import Backbone
from pituning.data.overlap import Overlap, find_overlaps
from pituning.example import Example
from pituning.experiments.cells import write_json
from pituning.experts.expert import tensor_hash
from pituning.experts.pool import ExpertPool
from pituning.similarity.embedding import embed_task
from pituning.tasks.emoji import SIZES, emoji_task
from pituning.tasks.task import Task
from pituning.training.train_expert import train_expert

AUDITED = ("train", "test")
SPARE = 1.25  # of the rows wanted, so that what leaks can be left out

Tasks = Mapping[str, Task]


@dataclass(frozen=True)
class SourceRows:
    """What one source expert is trained on.

    Attributes:
        rows: training examples of its task, none of them a near-duplicate of a target's.
        dropped: the near-duplicates that were left out; ``left`` is the target's example, ``right`` the source's.
    """

    rows: tuple[Example, ...]
    dropped: tuple[Overlap, ...]


def source_rows(suite: Suite, tasks: Tasks, folder: Path) -> dict[str, SourceRows]:
    """The rows of every source; what was found to leak is kept in the folder."""
    data = {name: _task_digest(tasks[name]) for name in dict.fromkeys((*suite.sources, *suite.targets))}
    record = folder / f"rows.{digest([suite.settings(), sorted(suite.targets), data])}.json"
    with claimed(folder / "locks" / "rows.lock", wait=True):
        if not record.is_file():
            found = {name: [asdict(o) for o in _leaks(suite, tasks, name)] for name in suite.sources}
            write_json(record, found)
    leaks = {n: [Overlap(**o) for o in found] for n, found in json.loads(record.read_text(encoding="utf-8")).items()}
    return {name: _without(suite, tasks[name], leaks[name]) for name in suite.sources}


def _task_digest(task: Task) -> str:
    return digest([digest_examples(task.splits.get(split, ())) for split in AUDITED])


def _candidates(suite: Suite, task: Task) -> Sequence[Example]:
    wanted = round(SPARE * suite.source_rows) if suite.texts_tell else suite.source_rows
    if task.name in EMOJI:  # made on demand, as many as are wanted
        name = task.name.removesuffix("-small")
        task = emoji_task(name, vocabulary="small", sizes={"train": max(wanted, SIZES["train"])})
    return task.split("train", wanted)


def _leaks(suite: Suite, tasks: Tasks, source: str) -> list[Overlap]:
    """Near-duplicates between a source's candidate rows and the training and test splits of all other tasks' targets."""
    if not suite.texts_tell:
        return []
    others = [tasks[t].splits.get(split, ()) for t in suite.targets if t != source for split in AUDITED]
    return find_overlaps(chain.from_iterable(others), _candidates(suite, tasks[source]))


def _without(suite: Suite, task: Task, leaks: Sequence[Overlap]) -> SourceRows:
    bad = {o.right for o in leaks}
    rows = [e for e in _candidates(suite, task) if e.id not in bad][: suite.source_rows]
    return SourceRows(tuple(rows), tuple(leaks))


def train_sources(
    suite: Suite,
    backbone: Backbone,
    tasks: Tasks,
    rows: Mapping[str, SourceRows],
    folder: Path,
    *,
    out_of_time: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = print,
) -> ExpertPool | None:
    """The pool of source experts with their own embeddings, as far as there is time; ``None`` where that ran out.

    A source that another process trains is waited for.
    """
    settings = {k: v for k, v in suite.settings().items() if k in ("method", "source_training")}
    data = {name: digest_examples(r.rows) for name, r in rows.items()}
    pool = ExpertPool(folder / digest([backbone.fingerprint, settings, data]))
    for name in suite.sources:
        with claimed(pool.folder / ".locks" / f"{name}.lock", wait=True):
            own = replace(tasks[name], splits={"train": rows[name].rows})
            if name not in pool.names():
                if out_of_time():
                    return None
                say(f"source expert {name}: {len(rows[name].rows)} rows")
                pool.add(train_expert(backbone, own, suite.method, settings=suite.source_training, name=name))
            if not (pool.folder / name / "task_embedding.safetensors").is_file():
                if out_of_time():
                    return None
                embed_task(backbone, pool.load(name), own).save(pool.folder / name)
    return pool


def pool_digest(pool: ExpertPool) -> str:
    """Digest of all tensors of a pool."""
    return digest({expert.name: tensor_hash(expert.tensors) for expert in pool})


def audit(suite: Suite, tasks: Tasks, rows: Mapping[str, SourceRows]) -> list[dict[str, Any]]:
    """One row for each pair of a target and a source that shared or share a sentence, and a last one that sums up.

    ``left`` is counted anew on the very rows that the experts are trained on, split by split.
    """
    found: list[dict[str, Any]] = []
    for target in suite.targets:
        for source in suite.sources:
            if source == target or not suite.texts_tell:
                continue
            row: dict[str, Any] = {"target": target, "source": source}
            for split in AUDITED:
                prefix = f"{target}/{split}/"
                row[f"dropped, {split}"] = _sources_of(o for o in rows[source].dropped if o.left.startswith(prefix))
                row[f"left, {split}"] = _sources_of(
                    find_overlaps(tasks[target].splits.get(split, ()), rows[source].rows)
                )
            if any(row[f"{what}, {split}"] for what in ("dropped", "left") for split in AUDITED):
                found.append(row)
    return found


def _sources_of(overlaps: Iterable[Overlap]) -> int:
    """How many of the source's rows are in some pairs."""
    return len({o.right for o in overlaps})
