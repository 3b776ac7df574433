"""How much evidence should another candidate need before the blend is left: what every candidate of `interpolate` comes to.

    python benchmarks/candidates.py --pool WORK/experts/DIGEST --data ../shared/data/text --targets cr subj --draws 0 1

The pool is the one that `python -m benchmarks.transfer run --suite core` trains in its work folder. For every target, draw
and scale of the blends (`--scales auto 1`): of each candidate the scale, the cross-fitted log-loss, by which `interpolate`
chooses, and the accuracy and log-loss on 500 test examples after the refit, whichever is chosen. At the end, for each scale and
for several numbers of standard errors, the same of "the first candidate whose loss is within so many of the lowest": the mean
over the targets of the means over their draws.

With `--trained-own` another candidate is measured, which `interpolate` does not have: the own expert trained for longer, by the
same grid. At the end then also of "that one, where the loss of what `interpolate` takes is so many standard errors higher".
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

if not __package__:  # run by its path
    sys.path.insert(0, str(Path(__file__).parents[1]))

import pituning as pt
from benchmarks.draws import LIMIT, draw_options, drawn, opened, run
from pituning.interpolation.mixture import Mixture
from pituning.similarity.select import rank_experts
from pituning.training.crossfit import CrossFit, Search, cross_fit
from pituning.training.evaluation import evaluate
from pituning.training.interpolate import Choice, _Plan, choose
from pituning.training.starts import ALPHA_LEARNING_RATE
from pituning.training.train_expert import fold_experts, start_from

ERRORS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
KINDS = ("blend", "blend with own", "warm start", "own", "trained own")

Tested = tuple[float, float]  # accuracy in %, log-loss


def main() -> None:
    """One line for each target, draw and scale, and a table of the rules for each scale."""
    parser = draw_options(__doc__)
    parser.add_argument("--scales", nargs="+", type=_scale, default=["auto"], help="as `interpolate` takes one")
    parser.add_argument("--trained-own", action="store_true", help="also measure the own expert trained for longer")
    options = parser.parse_args()
    backbone, pool = opened(options)
    found: dict[str, dict[str, list[Tested]]] = defaultdict(lambda: defaultdict(list))
    for target, draw, task in drawn(options):
        search = Search(fold_seed=draw)
        own = pt.train_expert(backbone, task, "lora", name="own", search=search, seed=draw)
        search = replace(search, alpha_learning_rate=ALPHA_LEARNING_RATE)
        folds, fits, tests = fold_experts(backbone, task, own, search), dict[str, CrossFit](), dict[str, Tested]()
        experts = rank_experts(backbone, task, pool).top()
        for scale in options.scales:
            choice = choose(
                backbone, task, experts, own, scale=scale, search=search, own_folds=folds, shared=partial(_once, fits)
            )
            shipped = choice.best
            if options.trained_own:
                choice = _with_trained_own(choice, own, folds, search, partial(_once, fits))
            values = []
            for candidate, plan, fit in zip(choice.candidates(), choice.plans, choice.found, strict=True):
                if candidate.name not in tests:
                    result = evaluate(
                        backbone, replace(choice, plans=(plan,), found=(fit,)).refit(draw).expert, task, limit=LIMIT
                    )
                    tests[candidate.name] = 100 * result.value, result.metrics["log-loss"]
                values.append(tests[candidate.name])
                if candidate.name not in fits:  # a blend, and another one at the next scale
                    del tests[candidate.name]
            shown = [
                f"{c.name} {c.scale:.3g} {c.loss:.3f} {right:.1f} {loss:.3f}"
                for c, (right, loss) in zip(choice.candidates(), values, strict=True)
            ]
            if options.trained_own:
                behind = choice.found[shipped].losses - choice.found[-1].losses
                errors_ahead = float(behind.mean() / behind.std() * len(behind) ** 0.5)
                shown.append(
                    f"{choice.plans[shipped].name} is taken, {errors_ahead:.2f} standard errors behind the last"
                )
            print(f"{target} {draw} {scale} | " + " | ".join(shown), flush=True)
            for name, value in zip(KINDS[: len(values)], values, strict=True):  # the last with --trained-own alone
                found[f"{scale} | {name}"][target].append(value)
            for errors in ERRORS:
                if not options.trained_own:
                    found[f"{scale} | {errors:g} standard errors"][target].append(values[choice.first_within(errors)])
                    continue
                taken = values[-1 if errors_ahead > errors else shipped]
                found[f"{scale} | trained own by {errors:g} standard errors"][target].append(taken)
    for name, by_target in found.items():
        right, loss = (mean(mean(v[at] for v in values) for values in by_target.values()) for at in (0, 1))
        print(f"{name}: {right:.2f} {loss:.3f}")


def _with_trained_own(
    choice: Choice,
    own: pt.Expert,
    folds: Mapping[int | None, pt.Expert],
    search: Search,
    shared: Callable[[str, Callable[[], CrossFit]], CrossFit],
) -> Choice:
    """The choice with another candidate behind its own."""

    def start(fold: int | None) -> tuple[Mixture, Mapping[str, Any]]:
        return start_from(folds[fold].tensors, folds[fold].config)

    plan = _Plan("own, trained for longer", (own,), [1.0], start, replace(search, alpha_learning_rate=0.0), "model")
    examples = choice.task.split("train")
    fit = shared(plan.name, lambda: cross_fit(choice.backbone, start, examples, plan.search, warm=False))
    return replace(choice, plans=(*choice.plans, plan), found=(*choice.found, fit))


def _scale(text: str) -> float | str:
    return text if text == "auto" else float(text)


def _once(found: dict[str, CrossFit], name: str, compute: Callable[[], CrossFit]) -> CrossFit:
    if name not in found:
        found[name] = compute()
    return found[name]


if __name__ == "__main__":
    run(main)
