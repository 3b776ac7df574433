"""Which similarity predicts transfer? Every kind against the measured gain of a warm start, by Spearman's ρ.

Run: python benchmarks/similarity.py --pool runs/sst2-pool --targets sst2 cr --draws 0 1 2

For every target and draw of 16 shots per class, each expert of the pool (but the target's own) is fine-tuned on the shots
with one fixed recipe (rate 3e-4, 20 steps); its gain is test accuracy minus the own expert's after as many steps at rate
1e-3. The own expert is also what the kinds `weights` and `fisher … (own)` start from.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from scipy.stats import spearmanr

if not __package__:  # run by its path
    sys.path.insert(0, str(Path(__file__).parents[1]))

import pituning as pt
from benchmarks.warm import warm_started
from pituning.backbones import Backbone
from pituning.similarity.select import rank_experts
from pituning.tasks import Task
from pituning.training.precision import precision
from pituning.training.trainer import TrainSettings

KINDS = [("score", "shared"), ("gradient", "shared"), ("average", "shared"), ("weights", "shared")]
KINDS += [(kind, reference) for reference in ("shared", "own") for kind in ("fisher-cosine", "fisher", "fisher-paper")]


def main() -> None:
    """Print ρ per kind, averaged over targets and draws, and every single figure as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", required=True)
    parser.add_argument("--targets", nargs="+", required=True)
    parser.add_argument("--draws", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--limit", type=int, default=500)
    arguments = parser.parse_args()
    backbone, pool = pt.load_backbone("minilm"), pt.ExpertPool(arguments.pool)
    rows = []
    for target in arguments.targets:
        full = pt.load_task(target)
        for draw in arguments.draws:
            rows.append(_measure(backbone, pool, full.few_shot(16, draw), arguments.limit))
            print(json.dumps(rows[-1]), flush=True)
    print(f"{'similarity':<24}{'Spearman':>9}  top-1 is among the 2 best", file=sys.stderr)
    for name in rows[0]["rho"]:
        mean = statistics.fmean(row["rho"][name] for row in rows)
        hits = sum(row["hit"][name] for row in rows)
        print(f"{name:<24}{mean:>+9.2f}  {hits} of {len(rows)}", file=sys.stderr)


def _measure(backbone: Backbone, pool: pt.ExpertPool, task: Task, limit: int) -> dict[str, object]:
    warm = TrainSettings(learning_rate=3e-4, steps=20, schedule="constant_with_warmup")
    with precision(backbone, "bf16"):
        own = pt.train_expert(backbone, task, settings=warm.with_(learning_rate=1e-3))
        base = pt.evaluate(backbone, own, task, limit=limit).value
        gains = {}
        for expert in pool:
            if expert.card.task == task.name:
                continue
            tuned = warm_started(backbone, expert, task.split("train"), warm)
            gains[expert.name] = pt.evaluate(backbone, tuned, task, limit=limit).value - base
    names = sorted(gains)
    best = sorted(names, key=lambda n: -gains[n])[:2]
    rho, hit = {}, {}
    for kind, reference in KINDS:
        label = f"{kind} ({reference})" if kind.startswith("fisher") else kind
        ranking = rank_experts(backbone, task, pool, own, kind=kind, reference=reference)
        similarity = {e.name: s for e, s in zip(ranking.experts, ranking.similarities, strict=True)}
        rho[label] = float(spearmanr([similarity[n] for n in names], [gains[n] for n in names]).statistic)
        hit[label] = ranking.experts[0].name in best
    return {"target": task.name, "draw": task.seed, "own": base, "gains": gains, "rho": rho, "hit": hit}


if __name__ == "__main__":
    main()
