"""What is there to transfer on the emoji scenes? Tables for a pool of experts of ofa-nano.

    python benchmarks/emoji_matrix.py --pool runs/transfer/experts/DIGEST
    python benchmarks/emoji_matrix.py --pool runs/transfer/experts/DIGEST --warm emoji-group-small emoji-count-small

*Headroom*: what the bare backbone gets right of single things, by the style that they are drawn in and by whether pretraining
knew their names (twemoji and 25 of the names are new). *Matrix*: the bare backbone and every expert, as it is, on every task of
miniature Table 1, by the task's own metric. *Warm*, instead of these: the metric and the log-loss of the bare backbone, the own
expert and a warm start from every expert, after as many steps on 64 examples in all, at one rate. A pool that was trained on
weights rounded to bfloat16 is evaluated on such.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import torch

if not __package__:  # run by its path
    sys.path.insert(0, str(Path(__file__).parents[1]))

import pituning as pt
from benchmarks.transfer.running import drawn_in_all
from benchmarks.transfer.suites import TABLE1
from benchmarks.warm import warm_started
from pituning.backbones import Backbone
from pituning.data.emoji import SMALL
from pituning.errors import BackboneMismatchError
from pituning.tasks.emoji_rows import ROWS, Source
from pituning.training.trainer import TrainSettings

SHOTS, RATE = 64, 1e-3


def headroom(backbone: Backbone, rows: str, limit: int) -> dict[tuple[str, str], list[bool]]:
    """(style, ``known`` or ``new``) → whether each answer of the bare backbone is right."""
    source, found = Source("test", vocabulary="small"), defaultdict(list)
    for example, answer in pt.predict(backbone, None, pt.load_task(f"emoji-{rows}-small"), limit=limit):
        (thing,) = ROWS[rows](source, int(example.id.rpartition("/")[2])).scene.things
        found[thing.style, "known" if thing.name in SMALL else "new"].append(answer == example.target)
    return found


def warm(
    backbone: Backbone, pool: pt.ExpertPool, name: str, limit: int, seed: int, steps: int
) -> dict[str, tuple[float, float]]:
    """``bare``, ``own`` and every source → metric times 100 and log-loss on the target's test examples."""
    task = drawn_in_all(pt.load_task(name), SHOTS, seed)
    run = TrainSettings(learning_rate=RATE, steps=steps, batch_size=16, schedule="constant_with_warmup", seed=seed)
    experts: dict[str, pt.Expert | None] = {
        "bare": None,
        "own": pt.train_expert(backbone, task, method=next(iter(pool)).card.method, settings=run),
    }
    for source in pool:
        if source.card.task != name:
            experts[source.name] = warm_started(backbone, source, task.split("train"), run)
    found = {key: pt.evaluate(backbone, expert, task, limit=limit) for key, expert in experts.items()}
    return {key: (100 * e.value, e.metrics["log-loss"]) for key, e in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=500, help="test examples of each task (default 500)")
    parser.add_argument("--warm", nargs="+", metavar="TASK", help="targets of warm starts")
    parser.add_argument("--seed", type=int, default=0, help="of the warm starts' draw (default 0)")
    parser.add_argument("--steps", type=int, default=40, help="of 16 examples of every warm start (default 40)")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pool = pt.ExpertPool(arguments.pool)
    backbone = _backbone(pool)
    for name in arguments.warm or ():
        rows = warm(backbone, pool, name, arguments.limit, arguments.seed, arguments.steps)
        print(name)
        for key, (value, loss) in sorted(rows.items(), key=lambda row: -row[1][0]):
            print(f"  {key:<26}{value:6.1f}{loss:8.3f}", flush=True)
    if arguments.warm:
        return
    for rows in ("object", "group"):
        print(f"{rows}: bare accuracy of {arguments.limit}", flush=True)
        for (style, news), right in sorted(headroom(backbone, rows, arguments.limit).items()):
            print(f"  {style:<10}{news:<7}{100 * fmean(right):6.1f} of {len(right)}", flush=True)
    tasks = [pt.load_task(name) for name in TABLE1]
    print(f"{'':<26}" + "".join(f"{t.name.removeprefix('emoji-').removesuffix('-small'):>12}" for t in tasks))
    for expert in (None, *pool):
        values = [100 * pt.evaluate(backbone, expert, task, limit=arguments.limit).value for task in tasks]
        print(f"{expert.name if expert else 'bare':<26}" + "".join(f"{v:>12.1f}" for v in values), flush=True)


def _backbone(pool: pt.ExpertPool) -> Backbone:
    """As the pool was trained on: in float32, else rounded."""
    backbone = pt.load_backbone("ofa-nano")
    try:
        pool.load_all(backbone)
    except BackboneMismatchError:
        backbone = pt.load_backbone("ofa-nano", dtype=torch.bfloat16)
        pool.load_all(backbone)
    return backbone


if __name__ == "__main__":
    main()
