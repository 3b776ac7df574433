"""What every kind of similarity costs, and what every way to select chooses and costs.

Run: python benchmarks/selection.py --pool experts --targets cr noun_field --shots 16

The pool's own expert of the target is its own expert, for the kinds that need one; embeddings are those that are stored.
Seconds are CPU seconds of one process. Selection starts from the ranking by `score`, three experts at most.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:  # run by its path
    sys.path.insert(0, str(Path(__file__).parents[1]))

import pituning as pt
from benchmarks.draws import positive, run
from pituning.similarity.measures import KINDS
from pituning.similarity.selection import WAYS, select


def main() -> None:
    """Print one JSON line per target and kind or way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", required=True)
    parser.add_argument("--targets", nargs="+", required=True)
    parser.add_argument("--shots", type=positive, default=16)
    parser.add_argument("--ways", nargs="+", default=[w for w in WAYS if w != "threshold"])
    arguments = parser.parse_args()
    backbone, pool = pt.load_backbone("minilm"), pt.ExpertPool(arguments.pool)
    for target in arguments.targets:
        task, own = pt.load_task(target, shots=arguments.shots), pool.load(target)
        row = {"target": target, "examples": len(task.split("train"))}
        for kind in KINDS:
            ranking, seconds = _timed(lambda k=kind: pt.rank_experts(backbone, task, pool, own, kind=k))  # noqa: B023
            print(json.dumps({**row, "kind": kind, "seconds": seconds, "first": [e.name for e in ranking.top(4)]}))
        ranking = pt.rank_experts(backbone, task, pool, own, kind="score")
        for how in arguments.ways:
            found, seconds = _timed(lambda h=how: select(ranking, h, k=3, backbone=backbone, task=task))  # noqa: B023
            chosen = {"chosen": [e.name for e in found.experts], "reason": found.reason}
            print(json.dumps({**row, "how": how, "seconds": seconds, "soups": len(found.soups), **chosen}), flush=True)


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    begin = time.process_time()
    result = call()
    return result, round(time.process_time() - begin, 2)


if __name__ == "__main__":
    run(main)
