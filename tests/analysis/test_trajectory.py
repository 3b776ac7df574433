"""The weights over training: what is recorded, and that recording it changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pituning.analysis import Trajectory
from pituning.backbones.base import Backbone
from pituning.interpolation import build_mixture
from pituning.training.blend import blend
from pituning.training.crossfit import Search
from pituning.training.interpolate import interpolate
from pituning.training.trainer import TrainSettings, fit

SETTINGS = TrainSettings(
    learning_rate=1e-2, alpha_learning_rate=5e-2, steps=4, batch_size=4, schedule="constant", warmup=0.0
)


def test_every_recorded_step_is_where_a_run_of_that_length_ends(
    bert: Backbone, random_experts: Any, random_examples: Any
) -> None:
    experts, examples = random_experts(bert, "bottleneck", 2, 1), random_examples(8)
    mixture, config = build_mixture(experts, train="experts")
    recorded = fit(bert, mixture, config, examples, SETTINGS).weights
    assert list(recorded) == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(recorded[0], 0.5, atol=1e-7)
    assert recorded[4] == mixture.weights().tolist()
    for step in (1, 3):
        shorter, config = build_mixture(experts, train="experts")
        fit(bert, shorter, config, examples, SETTINGS.with_(steps=step))
        torch.testing.assert_close(torch.tensor(recorded[step]), shorter.weights().detach())


def test_long_runs_are_recorded_some_fifty_times_and_at_every_evaluation(
    bert: Backbone, random_experts: Any, random_examples: Any
) -> None:
    mixture, config = build_mixture(random_experts(bert, "bottleneck", 2, 1), train="weights")
    examples = random_examples(2)
    settings = SETTINGS.with_(steps=125, eval_every=41)
    recorded = fit(bert, mixture, config, examples, settings, held_out=examples).weights
    assert set(recorded) == {0, *range(2, 126, 2), 41, 82, 123, 125}


@pytest.mark.parametrize("train", ["experts", "shared", "weights"])
def test_blend_and_interpolate_return_what_was_recorded(
    bert: Backbone, random_experts: Any, make_task: Any, train: str
) -> None:
    task, experts = make_task(), random_experts(bert, "bottleneck", 2, 2)
    search = Search(learning_rates=(1e-2,), steps=2, eval_every=2, folds=2, alpha_learning_rate=5e-2)
    for found in (
        blend(bert, task, experts, settings=SETTINGS.with_(steps=3), train=train),
        interpolate(bert, task, experts, train=train, search=search, alternatives=False),
    ):
        moves = Trajectory.of(found)
        assert (moves.task, moves.experts, moves.steps[0]) == ("target", found.experts, 0)
        assert moves.groups == tuple(found.weights)
        assert moves.weights[-1] == tuple(found.weights.values())
        mean = moves.mean()
        assert mean.shape == (len(moves.steps), 2)
        np.testing.assert_allclose(mean[-1], list(found.mean_weights().values()), rtol=1e-6)
        assert moves.moved() == {n: pytest.approx(float(mean[-1, k] - mean[0, k])) for k, n in enumerate(moves.experts)}


def test_what_was_not_recorded_or_has_another_shape_is_refused(
    bert: Backbone, random_experts: Any, make_task: Any, message: Any
) -> None:
    soup = blend(bert, make_task(), random_experts(bert, "bottleneck", 2, 2), settings=SETTINGS, train="none")
    assert "nothing was trained" in message(Trajectory.of, soup)
    assert "step 5 have shape [1, 2], expected [1, 3]" in message(
        Trajectory.read, "t", ["a", "b", "c"], ["model"], {5: [[0.5, 0.5]]}
    )
