"""How far to reach out: the mean of some experts, times a scale, before and after it is tuned on the shots.

    python benchmarks/scale.py --pool WORK/experts/DIGEST --data ../shared/data/text --targets cr subj sick_para

The pool is the one that `python -m benchmarks.transfer run --suite core` trains in its work folder. For every target, draw and
scale, of the mean of the `--top` nearest by `calibrated-score` (uniform, or `--weights score` as `interpolate` has it): the
log-loss on the shots, by which `interpolate` weighs the scales; the accuracy on 500 test examples as it is; and
after 40 steps of 16 at a rate of 3e-4 on all of the shots, without any choice. With `--best` the scale of the lowest such
log-loss alone; with `--mean` also the scale that `interpolate` takes. At scale 0 the blend does nothing, and only its
directions are left. With `--noise` the three are random experts of the same ‖ΔW‖ (see `random_parameters`): what scale does by
itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

if not __package__:  # run by its path
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.draws import LIMIT, draw_options, drawn, opened, run
from benchmarks.warm import warm_started
from pituning.backbones import Backbone
from pituning.example import Example
from pituning.experiments.controls import random_parameters
from pituning.experts.expert import Expert, ExpertCard
from pituning.interpolation import build_mixture, collapse
from pituning.similarity.select import rank_experts
from pituning.training.crossfit import Search
from pituning.training.evaluation import evaluate, log_loss
from pituning.training.starts import SCALES as COMPARED
from pituning.training.starts import calibrated_loss, expert_log_probabilities, initial_weights, mean_scale

SCALES = (0.0, 1.0, 1.5, 2.0, 3.0, 4.5, 7.0)


def main() -> None:
    """One line for each target, draw and scale."""
    parser = draw_options(__doc__)
    parser.add_argument("--scales", nargs="+", type=float, default=list(SCALES))
    parser.add_argument("--top", nargs="+", type=int, default=[3])
    parser.add_argument("--weights", choices=("uniform", "score"), default="uniform")
    parser.add_argument("--best", action="store_true")
    parser.add_argument("--mean", action="store_true")
    parser.add_argument("--noise", action="store_true")
    options = parser.parse_args()
    (backbone, pool), search = opened(options), Search()
    print("target draw experts scale | log-loss on the shots, accuracy as it is, accuracy and log-loss when tuned")
    for target, draw, task in drawn(options):
        examples = task.split("train")
        ranking = rank_experts(backbone, task, pool)
        for top in options.top:
            nearest = ranking.top(top)
            experts = [random_parameters(backbone, e, draw) for e in nearest] if options.noise else nearest
            losses = [calibrated_loss(backbone, e, examples) for e in experts]
            weights = initial_weights(options.weights, losses, None, len(examples))
            mean = _mean(experts, weights)
            blends = {scale: _times(mean, scale) for scale in options.scales}
            before = {scale: _loss(backbone, blend, examples) for scale, blend in blends.items()}
            wanted = [min(before, key=before.__getitem__)] if options.best else list(options.scales)
            if options.mean:
                losses_at = {s: _loss(backbone, _times(mean, s), examples) for s in COMPARED}
                asked = mean_scale(losses_at, len(examples))
                blends[asked] = _times(mean, asked)
                before[asked] = _loss(backbone, blends[asked], examples)
                wanted.append(asked)
            names = f"{','.join(e.name for e in nearest)}{' as noise' * options.noise}"
            for scale in wanted:
                blend, settings = blends[scale], search.settings(min(search.learning_rates), search.steps, draw)
                tuned = warm_started(backbone, blend, examples, settings, blend.card)
                as_it_is = evaluate(backbone, blend, task, limit=LIMIT)
                after = evaluate(backbone, tuned, task, limit=LIMIT)
                print(
                    f"{target} {draw} {names} {scale:.3g} | {before[scale]:.3f} {100 * as_it_is.value:.1f} "
                    f"{100 * after.value:.1f} {after.metrics['log-loss']:.3f}",
                    flush=True,
                )


def _loss(backbone: Backbone, expert: Expert, examples: Sequence[Example]) -> float:
    return log_loss(expert_log_probabilities(backbone, expert, examples), examples)


def _mean(experts: list[Expert], weights: list[float]) -> Expert:
    mixture, config = build_mixture(experts, weights, train="none")
    card = ExpertCard("mean", fingerprint=experts[0].card.fingerprint, method="lora")
    return collapse(mixture, config, card).expert


def _times(expert: Expert, scale: float) -> Expert:
    """ΔW times a number, which B takes."""
    return replace(expert, tensors={k: t * scale if ".lora_B." in k else t for k, t in expert.tensors.items()})


if __name__ == "__main__":
    run(main)
