"""How much evidence should another candidate need before the blend is left: what every candidate of `interpolate` comes to.

    python benchmarks/candidates.py --pool WORK/experts/DIGEST --data ../shared/data/text --targets cr subj --draws 0 1

The pool is the one that `python -m benchmarks.transfer run --suite core` trains in its work folder. For every target and draw,
with 16 shots per class: of each candidate the cross-fitted log-loss, by which `interpolate` chooses, and the accuracy on 500
test examples after the refit, whichever is chosen. At the end, for several numbers of standard errors, the mean accuracy of
"the first candidate whose loss is within so many of the lowest": the mean over the targets of the means over their draws.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import torch

if not __package__:  # run by its path
    sys.path.insert(0, str(Path(__file__).parents[1]))

import pituning as pt
from pituning.similarity.select import rank_experts
from pituning.training.crossfit import Search, within_standard_errors
from pituning.training.evaluation import evaluate
from pituning.training.interpolate import ALPHA_LEARNING_RATE, Choice, choose

ERRORS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
LIMIT = 500


@dataclass(frozen=True)
class Fixed(Choice):
    """A choice that is made."""

    position: int = 0

    @property
    def best(self) -> int:
        """As given."""
        return self.position


def main() -> None:
    """One line for each target and draw, and a table of the rules."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/text"))
    parser.add_argument("--targets", nargs="+", required=True)
    parser.add_argument("--draws", nargs="+", type=int, default=[0])
    parser.add_argument("--bf16-weights", action="store_true", help="round the frozen weights to bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    backbone = pt.load_backbone("minilm", dtype=torch.bfloat16 if options.bf16_weights else None)
    pool = pt.ExpertPool(options.pool)
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for target in options.targets:
        for draw in options.draws:
            task = pt.load_task(target, data=options.data).few_shot(16, draw)
            search = Search(fold_seed=draw)
            own = pt.train_expert(backbone, task, "lora", name="own", search=search, seed=draw)
            with_alpha = replace(search, alpha_learning_rate=ALPHA_LEARNING_RATE)
            choice = choose(backbone, task, rank_experts(backbone, task, pool).top(), own, search=with_alpha)
            values = []
            for i in range(len(choice.plans)):
                refitted = Fixed(choice.backbone, choice.task, choice.plans, choice.found, i).refit(draw)
                values.append(100 * evaluate(backbone, refitted.expert, task, limit=LIMIT).value)
            shown = [f"{c.name} {c.loss:.3f} {v:.1f}" for c, v in zip(choice.candidates(), values, strict=True)]
            print(f"{target} {draw} | " + " | ".join(shown), flush=True)
            for at, name in enumerate(("blend", "blend with own", "warm start", "own")):
                found[name][target].append(values[at])
            for errors in ERRORS:
                found[f"{errors:g} standard errors"][target].append(values[_first_within(choice, errors)])
    for name, by_target in found.items():
        print(f"{name}: {mean(mean(v) for v in by_target.values()):.2f}")


def _first_within(choice: Choice, errors: float) -> int:
    lowest = min(choice.found, key=lambda f: f.loss)
    return next(i for i, f in enumerate(choice.found) if within_standard_errors(f.losses, lowest.losses, errors))


if __name__ == "__main__":
    main()
