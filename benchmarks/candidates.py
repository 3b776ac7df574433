"""How much evidence should another candidate need before the blend is left: what every candidate of `interpolate` comes to.

    python benchmarks/candidates.py --pool WORK/experts/DIGEST --data ../shared/data/text --targets cr subj --draws 0 1

The pool is the one that `python -m benchmarks.transfer run --suite core` trains in its work folder. For every target and draw,
with 16 shots per class: of each candidate the cross-fitted log-loss, by which `interpolate` chooses, and the accuracy on 500
test examples after the refit, whichever is chosen. At the end, for several numbers of standard errors, the mean accuracy of
"the first candidate whose loss is within so many of the lowest": the mean over the targets of the means over their draws.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import mean

if not __package__:  # run by its path
    sys.path.insert(0, str(Path(__file__).parents[1]))

import pituning as pt
from benchmarks.draws import LIMIT, draw_options, drawn, opened
from pituning.similarity.select import rank_experts
from pituning.training.crossfit import Search
from pituning.training.evaluation import evaluate
from pituning.training.interpolate import ALPHA_LEARNING_RATE, choose

ERRORS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)


def main() -> None:
    """One line for each target and draw, and a table of the rules."""
    options = draw_options(__doc__).parse_args()
    backbone, pool = opened(options)
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for target, draw, task in drawn(options):
        search = Search(fold_seed=draw)
        own = pt.train_expert(backbone, task, "lora", name="own", search=search, seed=draw)
        with_alpha = replace(search, alpha_learning_rate=ALPHA_LEARNING_RATE)
        choice = choose(backbone, task, rank_experts(backbone, task, pool).top(), own, search=with_alpha)
        values = []
        for plan, cell in zip(choice.plans, choice.found, strict=True):
            refitted = replace(choice, plans=(plan,), found=(cell,)).refit(draw)
            values.append(100 * evaluate(backbone, refitted.expert, task, limit=LIMIT).value)
        shown = [f"{c.name} {c.loss:.3f} {v:.1f}" for c, v in zip(choice.candidates(), values, strict=True)]
        print(f"{target} {draw} | " + " | ".join(shown), flush=True)
        for at, name in enumerate(("blend", "blend with own", "warm start", "own")):
            found[name][target].append(values[at])
        for errors in ERRORS:
            found[f"{errors:g} standard errors"][target].append(values[choice.first_within(errors)])
    for name, by_target in found.items():
        print(f"{name}: {mean(mean(v) for v in by_target.values()):.2f}")


if __name__ == "__main__":
    main()
