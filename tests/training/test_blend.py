"""One interpolation with given settings: no candidates, no cross-fitting, the own expert an equal member."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pituning import blend
from pituning.backbones.base import Backbone
from pituning.errors import PituningError, RefusedError
from pituning.training.evaluation import evaluate, mean_log_loss
from pituning.training.train_expert import train_expert
from pituning.training.trainer import TrainSettings
from pituning.version import __version__

NOTHING = TrainSettings(steps=0)
SOME = TrainSettings(
    learning_rate=1e-2, alpha_learning_rate=5e-2, steps=6, batch_size=4, schedule="constant", warmup=0.0
)


def test_untrained_it_is_the_mean_of_all_members(bert: Backbone, random_experts: Any, make_task: Any) -> None:
    *experts, own = random_experts(bert, "bottleneck", 3, 3)
    found = blend(bert, make_task(), experts, own, settings=NOTHING)
    for key, tensor in found.expert.tensors.items():
        mean = sum(e.tensors[key].double() for e in (*experts, own)) / 3
        torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-8)
    assert found.mean_weights() == pytest.approx({e.name: 1 / 3 for e in (*experts, own)})
    assert found.candidates == ()


def test_given_weights_leave_the_own_expert_an_equal_share(bert: Backbone, random_experts: Any, make_task: Any) -> None:
    *experts, own = random_experts(bert, "bottleneck", 3, 3)
    found = blend(bert, make_task(), experts, own, settings=NOTHING, init=[0.75, 0.25], granularity="model")
    assert list(found.mean_weights().values()) == pytest.approx([0.5, 1 / 6, 1 / 3])


def test_weights_and_experts_learn_and_the_card_says_how(bert: Backbone, random_experts: Any, make_task: Any) -> None:
    task = make_task(shots=None)
    *experts, own = random_experts(bert, "lora", 3, 3)
    found = blend(bert, task, experts, own, settings=SOME, seed=3, name="mine")
    before = blend(bert, task, experts, own, settings=NOTHING).expert
    assert mean_loss(bert, found.expert, task) < mean_loss(bert, before, task)
    assert any(w != pytest.approx(1 / 3) for row in found.weights.values() for w in row)
    card = found.expert.card
    assert (card.name, card.task, card.training["steps"], card.training["seed"]) == ("mine", task.name, 6, 3)
    assert [parent["name"] for parent in card.lineage] == [e.name for e in (*experts, own)]


def test_it_ends_with_the_best_state_on_dev(bert: Backbone, random_experts: Any, make_task: Any) -> None:
    """A rate that ruins the experts: the state before the first step is the best."""
    task = make_task(shots=None)
    task = replace(task, splits={**task.splits, "dev": task.split("test")})
    experts = random_experts(bert, "bottleneck", 2, 5)
    wild = SOME.with_(learning_rate=10.0, alpha_learning_rate=0.0, eval_every=1, keep_best=True, steps=2)
    found = blend(bert, task, experts, settings=wild)
    start = blend(bert, task, experts, settings=NOTHING)
    assert found.expert.card.metrics["dev log-loss"] == pytest.approx(
        evaluate(bert, found.expert, task, "dev").metrics["log-loss"], rel=1e-5
    )
    assert (
        found.expert.card.metrics["dev log-loss"]
        <= evaluate(bert, start.expert, task, "dev").metrics["log-loss"] + 1e-6
    )


def test_the_card_has_the_log_loss_of_the_state_that_is_kept(
    bert: Backbone, random_experts: Any, make_task: Any
) -> None:
    """A rate that ruins the experts, and the last state is asked for."""
    task = make_task(shots=None)
    task = replace(task, splits={**task.splits, "dev": task.split("test")})
    wild = SOME.with_(learning_rate=1.0, alpha_learning_rate=0.0, eval_every=1, keep_best=False, steps=2)
    blended = blend(bert, task, random_experts(bert, "bottleneck", 2, 5), settings=wild).expert
    alone = train_expert(bert, task, "bottleneck", settings=wild)
    for expert in (blended, alone):
        found = evaluate(bert, expert, task, "dev").metrics["log-loss"]
        assert expert.card.metrics["dev log-loss"] == pytest.approx(found, rel=1e-5)


def test_a_lora_blend_has_factors_of_its_own_and_claims_no_start(
    bert: Backbone, random_experts: Any, make_task: Any
) -> None:
    experts = [e.with_card(init_hash="known") for e in random_experts(bert, "lora", 2, 5)]
    for options in ({}, {"rank": 2}, {"max_error": 0.5}):
        assert blend(bert, make_task(), experts, settings=NOTHING, **options).expert.card.init_hash == ""
    assert blend(bert, make_task(), experts[:1], settings=NOTHING).expert.card.init_hash == "known"
    assert blend(bert, make_task(), experts[:1], settings=NOTHING, rank=1).expert.card.init_hash == ""


@pytest.mark.parametrize(
    ("first", "second", "both"), [("mit", "mit", "mit"), ("mit", "", ""), ("mit", "apache-2.0", "")]
)
def test_the_card_has_the_licence_that_all_members_have_and_the_version_that_blended(
    bert: Backbone, random_experts: Any, make_task: Any, first: str, second: str, both: str
) -> None:
    licences = (first, second)
    experts = random_experts(bert, "bottleneck", 2, 5)
    experts = [e.with_card(licence=x, version="0.0.1") for e, x in zip(experts, licences, strict=True)]
    card = blend(bert, make_task(), experts, settings=NOTHING).expert.card
    assert (card.licence, card.version) == (both, __version__)


def test_a_used_folder_is_refused_before_anything_is_computed(
    bert: Backbone, random_experts: Any, make_task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = random_experts(bert, "bottleneck", 2, 5)
    first = blend(bert, make_task(), experts, settings=SOME, folder=tmp_path)
    again = blend(bert, make_task(), experts, settings=SOME, folder=tmp_path, resume=True)
    assert all(torch.equal(again.expert.tensors[k], t) for k, t in first.expert.tensors.items())
    monkeypatch.setattr("pituning.training.blend.calibrated_loss", lambda *_: pytest.fail("too late"))
    with pytest.raises(RefusedError, match="holds checkpoint-6: go on from it with resume"):
        blend(bert, make_task(), experts, settings=SOME, folder=tmp_path, init="score")


def test_what_does_not_fit_is_refused(bert: Backbone, random_experts: Any, make_task: Any) -> None:
    experts = random_experts(bert, "bottleneck", 2, 1)
    with pytest.raises(RefusedError, match="applies to LoRA experts only"):
        blend(bert, make_task(), experts, settings=NOTHING, rank=2)
    with pytest.raises(PituningError, match="3 weights for 2 experts"):
        blend(bert, make_task(), experts, settings=NOTHING, init=[1.0, 0.0, 0.0])
    with pytest.raises(RefusedError, match="at least one expert"):
        blend(bert, make_task(), [], settings=NOTHING)


def mean_loss(backbone: Backbone, expert: Any, task: Any) -> float:
    from pituning.methods import attached

    with attached(backbone, expert.config, expert.tensors):
        return mean_log_loss(backbone, task.split("train"))
