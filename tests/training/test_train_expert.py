"""Training a single expert: from the common start, with full data or a few shots."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pituning.backbones.base import Backbone
from pituning.errors import DataError, PituningError, RefusedError, UnknownNameError
from pituning.experts import Expert
from pituning.experts.expert import tensor_hash
from pituning.methods import attached, initial_tensors
from pituning.tasks import Task
from pituning.training.crossfit import Search, fold_examples
from pituning.training.train_expert import fold_experts, train_expert
from pituning.training.trainer import TrainSettings

SHORT = TrainSettings(learning_rate=1e-2, steps=3, batch_size=4)
SEARCH = Search(learning_rates=(1e-3, 1e-2), steps=4, eval_every=2, folds=2)
METHODS = ("lora", "bottleneck")


@pytest.mark.parametrize("method", METHODS)
def test_the_start_does_not_depend_on_the_seed(bert: Backbone, make_task: Any, method: str) -> None:
    task = make_task()
    untrained = [train_expert(bert, task, method, settings=SHORT.with_(steps=0), seed=s, r=3) for s in (0, 1)]
    initial = initial_tensors(bert, untrained[0].config)
    for expert in untrained:
        assert all(torch.equal(expert.tensors[k], t) for k, t in initial.items())
    trained = [train_expert(bert, task, method, settings=SHORT, seed=s, r=3) for s in (0, 0, 1)]
    assert {e.card.init_hash for e in (*untrained, *trained)} == {tensor_hash(initial)}
    assert all(torch.equal(t, trained[1].tensors[k]) for k, t in trained[0].tensors.items()), "same seed, same bits"
    assert any(not torch.equal(t, trained[2].tensors[k]) for k, t in trained[0].tensors.items())


@pytest.mark.parametrize("family", ["encoder", "seq2seq"])
@pytest.mark.parametrize("method", METHODS)
def test_the_result_is_an_expert_for_its_task(
    backbone_of: Any, make_task: Any, tmp_path: Path, family: str, method: str
) -> None:
    backbone = backbone_of(family)
    task = replace(make_task("mine"), kind="sentiment")
    expert = train_expert(backbone, task, method, settings=SHORT, name="first", r=3)
    expert.verify(backbone)
    card = expert.card
    assert (card.name, card.task, card.method, card.shots) == ("first", "mine", method, 4)
    assert (card.fingerprint, card.backbone) == (backbone.fingerprint, backbone.name)
    assert card.parameters == sum(t.numel() for t in expert.tensors.values())
    assert card.choices == make_task().choices
    assert (card.training["steps_taken"], card.training["task_kind"]) == (3, "sentiment")
    assert card.training["learning_rate"] == 1e-2
    assert Expert.load(expert.save(tmp_path / "first")).card == card


def test_few_shots_search_rate_and_steps(bert: Backbone, make_task: Any) -> None:
    expert = train_expert(bert, make_task(shots=4), "bottleneck", search=SEARCH, r=3)
    assert expert.card.training["learning_rate"] in SEARCH.learning_rates
    assert expert.card.training["steps"] in (0, 2, 4)
    assert 0 < expert.card.metrics["cross-fitted log-loss"] < 10


def test_full_data_keeps_the_best_on_dev(bert: Backbone, make_task: Any, random_examples: Any) -> None:
    full = make_task(shots=None)
    dev = tuple(random_examples(6, 77, prefix="dev"))
    task = replace(full, splits={**full.splits, "dev": dev})
    settings = SHORT.with_(learning_rate=3.0, steps=4, eval_every=1, keep_best=True, schedule="constant", warmup=0.0)
    expert = train_expert(bert, task, "bottleneck", settings=settings, r=3)
    with torch.no_grad(), attached(bert, expert.config, expert.tensors):
        slow = float(torch.cat([bert.loss(bert.collate([e])) for e in dev]).mean())
    assert expert.card.metrics["dev log-loss"] == pytest.approx(slow, rel=1e-5)
    assert expert.card.shots is None


def test_a_killed_run_goes_on(bert: Backbone, make_task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pituning.training.trainer import MixtureTrainer

    task, settings = make_task(), SHORT.with_(steps=10)
    whole = train_expert(bert, task, "lora", settings=settings, r=3)
    compute, count = MixtureTrainer.compute_loss, [0]

    def dies(self: Any, *arguments: Any, **options: Any) -> Any:
        count[0] += 1
        if count[0] == 6:
            raise KeyboardInterrupt
        return compute(self, *arguments, **options)

    monkeypatch.setattr(MixtureTrainer, "compute_loss", dies)
    with pytest.raises(KeyboardInterrupt):
        train_expert(bert, task, "lora", settings=settings, folder=tmp_path, r=3)
    bert.require_free()
    resumed = train_expert(bert, task, "lora", settings=settings, folder=tmp_path, resume=True, r=3)
    assert count[0] < 6 + 10
    assert all(torch.equal(resumed.tensors[k], t) for k, t in whole.tensors.items())


def test_another_task_does_not_go_on_from_a_run(bert: Backbone, make_task: Any, tmp_path: Path) -> None:
    train_expert(bert, make_task("first"), "lora", settings=SHORT, folder=tmp_path, r=3)
    other = SHORT.with_(learning_rate=3e-3)
    with pytest.raises(RefusedError) as caught:
        train_expert(bert, make_task("other"), "lora", settings=other, seed=5, folder=tmp_path, resume=True, r=3)
    for part in ("training examples: hash was", "learning_rate was 0.01, and is 0.003", "seed was 0, and is 5"):
        assert part in str(caught.value)


def test_what_would_be_ignored_is_refused_before_the_search(
    bert: Backbone, make_task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pituning.training.train_expert.cross_fit", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(PituningError, match="resume=True needs the folder"):
        train_expert(bert, make_task(), "lora", resume=True)
    with pytest.raises(PituningError, match="task 'target' has full data, for which nothing is searched"):
        train_expert(bert, make_task(shots=None), "lora", search=SEARCH)


def test_mistakes_are_explained(bert: Backbone, make_task: Any) -> None:
    with pytest.raises(UnknownNameError, match="unknown method 'bottelneck': did you mean 'bottleneck'"):
        train_expert(bert, make_task(), "bottelneck")
    with pytest.raises(PituningError, match="'lora' has no setting rank"):
        train_expert(bert, make_task(), "lora", rank=4)
    with pytest.raises(DataError, match="no examples in split 'train'"):
        train_expert(bert, Task("empty", ("a", "b"), {}), "lora")


class TestFoldExperts:
    def test_an_experts_fold_is_never_in_its_training(
        self, bert: Backbone, make_task: Any, random_examples: Any
    ) -> None:
        """Rewriting the held-out examples of a fold must leave that fold's expert alone, bit by bit, and move the other."""
        task = make_task()
        own = train_expert(bert, task, "bottleneck", settings=SHORT, r=3)
        before = fold_experts(bert, task, own, SEARCH)
        assert before[None] is own
        inside = {e.id for e in fold_examples(task.split("train"), SEARCH, 0)}
        changed = tuple(
            e if e.id in inside else replace(e, texts=("so so so",), prompt="so so so") for e in task.split("train")
        )
        assert changed != task.split("train")
        after = fold_experts(bert, replace(task, splits={"train": changed}), own, SEARCH)
        assert all(torch.equal(after[0].tensors[k], t) for k, t in before[0].tensors.items())
        assert any(not torch.equal(after[1].tensors[k], t) for k, t in before[1].tensors.items())

    def test_they_train_as_the_own_expert_did(self, bert: Backbone, make_task: Any) -> None:
        task = make_task()
        own = train_expert(bert, task, "lora", settings=SHORT, r=3)
        inside = tuple(fold_examples(task.split("train"), SEARCH, 1))
        alone = train_expert(bert, replace(task, splits={"train": inside}), "lora", settings=SHORT, r=3)
        found = fold_experts(bert, task, own, SEARCH)[1]
        assert all(torch.equal(found.tensors[k], t) for k, t in alone.tensors.items())

    def test_an_expert_trained_on_epochs(self, bert: Backbone, make_task: Any) -> None:
        """Full-data experts record epochs, not steps."""
        task = make_task()
        own = train_expert(bert, task, "bottleneck", settings=SHORT.with_(steps=None, epochs=1.0), r=3)
        assert len(fold_experts(bert, task, own, SEARCH)) == 3

    def test_an_expert_of_unknown_training(self, bert: Backbone, make_task: Any, random_expert: Any) -> None:
        with pytest.raises(PituningError, match="'stranger' does not say how it was trained"):
            fold_experts(bert, make_task(), random_expert(bert, "lora", 1, name="stranger"), SEARCH)
