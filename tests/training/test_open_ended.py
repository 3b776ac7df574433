"""Tasks without choices, all the way: evaluation, cross-fitting, training, ranking, embedding and interpolation.

The slow computations run one example at a time: the loss of its target, a generated text, a located box.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pituning.backbones.base import Backbone
from pituning.data.fewshot import stratified_folds
from pituning.errors import RefusedError
from pituning.example import Example
from pituning.experts import Expert, ExpertPool
from pituning.interpolation import build_mixture
from pituning.methods import attached
from pituning.similarity import embed_task, rank_experts
from pituning.tasks import Task
from pituning.training.crossfit import Search, cross_fit
from pituning.training.evaluation import calibrated_losses, evaluate, log_loss, log_probabilities
from pituning.training.interpolate import interpolate
from pituning.training.module import running
from pituning.training.train_expert import train_expert
from pituning.training.trainer import TrainSettings
from tests.pointing import PointingBackbone, grounding_task, pointing

SHORT = Search(learning_rates=(1e-2,), steps=2, eval_every=1, folds=2, alpha_learning_rate=1e-2)


@torch.no_grad()
def losses_by_hand(backbone: Backbone, examples: Sequence[Example], expert: Expert | None = None) -> np.ndarray:
    """−log p(target), one example at a time."""
    if expert is not None:
        with attached(backbone, expert.config, expert.tensors):
            return losses_by_hand(backbone, examples)
    return np.array([float(backbone.loss(backbone.collate([e]))[0]) for e in examples])


@pytest.fixture
def seeing(t5: Backbone) -> PointingBackbone:
    return pointing(t5)


@pytest.fixture
def free(random_examples: Any) -> Task:
    """A task of free-form answers."""
    splits = {
        "train": tuple(random_examples(10, 1, choices=(), prefix="free/train")),
        "dev": tuple(random_examples(5, 2, choices=(), prefix="free/dev")),
        "test": tuple(random_examples(9, 3, choices=(), prefix="free/test")),
    }
    return Task("free", (), splits, "exact-match")


class TestEvaluation:
    @pytest.mark.parametrize("method", ["lora", None])
    def test_texts_are_generated(self, t5: Backbone, random_expert: Any, free: Task, method: str | None) -> None:
        expert = random_expert(t5, method, 1, scale=0.3) if method else None
        examples = list(free.split("test"))
        with torch.no_grad():
            if expert is None:
                answers = [t5.generate(t5.collate([e]))[0] for e in examples]
            else:
                with attached(t5, expert.config, expert.tensors):
                    answers = [t5.generate(t5.collate([e]))[0] for e in examples]
        assert len(set(answers)) > 1
        examples[::2] = [replace(e, target=a) for e, a in zip(examples[::2], answers[::2], strict=True)]
        found = evaluate(t5, expert, replace(free, splits={"test": tuple(examples)}))
        assert found.predictions == tuple(answers)
        assert found.value == found.metrics["exact-match"] == 5 / 9
        assert found.metrics["log-loss"] == pytest.approx(losses_by_hand(t5, examples, expert).mean(), rel=1e-5)
        assert "exact-match 0.5556, log-loss " in str(found)

    @pytest.mark.parametrize("method", ["lora", None])
    def test_boxes_are_located(self, seeing: PointingBackbone, random_expert: Any, method: str | None) -> None:
        task = grounding_task(test=40)
        expert = random_expert(seeing, method, 2, scale=0.3) if method else None
        examples = task.split("test")
        with torch.no_grad():
            if expert is None:
                boxes = [seeing.locate(seeing.collate([e]))[0] for e in examples]
            else:
                with attached(seeing, expert.config, expert.tensors):
                    boxes = [seeing.locate(seeing.collate([e]))[0] for e in examples]
        # a found quarter covers the right box (18 × 13 of its 20 × 15 pixels) or nothing of it
        hits = [
            b is not None and e.box is not None and b[:2] == (e.box[0] - 1, e.box[1] - 1)
            for b, e in zip(boxes, examples, strict=True)
        ]
        found = evaluate(seeing, expert, task)
        assert found.predictions == tuple(boxes)
        assert None in found.predictions
        assert 0 < found.value == found.metrics["acc@0.5"] == sum(hits) / 40 < 1
        assert found.metrics["log-loss"] == pytest.approx(losses_by_hand(seeing, examples, expert).mean(), rel=1e-5)

    def test_the_metric_must_fit_the_answers(self, seeing: PointingBackbone, free: Task, make_task: Any) -> None:
        boxes = grounding_task()
        for task, metric, kind in (
            (free, "accuracy", "text"), (free, "acc@0.5", "text"), (boxes, "exact-match", "box"),
            (boxes, "accuracy", "box"), (make_task(), "exact-match", "choice"), (make_task(), "acc@0.5", "choice"),
        ):  # fmt: skip
            with pytest.raises(RefusedError, match=f"task '{task.name}': metric '{metric}' .* of the kind '{kind}'"):
                evaluate(seeing, None, replace(task, metric=metric))

    def test_boxes_for_some_examples_only(self, seeing: PointingBackbone) -> None:
        task = grounding_task(test=3)
        (first, *others) = task.split("test")
        mixed = replace(task, splits={"test": (replace(first, box=None), *others)})
        with pytest.raises(RefusedError, match="only 2 of 3 examples have a box"):
            evaluate(seeing, None, mixed)

    def test_a_backbone_that_reads_text_alone_does_not_pretend_to_see(self, bert: Backbone, t5: Backbone) -> None:
        task = grounding_task()
        for backbone in (bert, t5):
            with pytest.raises(
                RefusedError, match=r"'refs/test/0' has an image, and backbone 'tiny-.*' reads text alone"
            ):
                backbone.collate(task.split("test"))
            with pytest.raises(RefusedError, match="cannot locate"):
                backbone.locate({})


class TestLogLoss:
    def test_one_column_per_target_in_any_batch(self, t5: Backbone, free: Task) -> None:
        examples = free.split("test")
        rows = log_probabilities(t5, examples)
        assert rows.shape == (9, 1)
        np.testing.assert_allclose(-rows[:, 0].numpy(), losses_by_hand(t5, examples), rtol=1e-5)
        torch.testing.assert_close(log_probabilities(t5, examples, batch_size=2), rows, rtol=1e-5, atol=1e-5)

    def test_a_mixture_has_the_loss_of_its_expert(self, t5: Backbone, random_expert: Any, free: Task) -> None:
        expert = random_expert(t5, "lora", 4)
        mixture, config = build_mixture([expert], train="none")
        with running(t5, mixture, config) as model:
            rows = log_probabilities(t5, free.split("test"), model)
        np.testing.assert_allclose(-rows[:, 0].numpy(), losses_by_hand(t5, free.split("test"), expert), rtol=1e-5)

    def test_nothing_is_calibrated(self, t5: Backbone, free: Task) -> None:
        rows = log_probabilities(t5, free.split("test"))
        losses = calibrated_losses(rows, free.split("test"))
        assert torch.equal(losses, -rows[:, 0].double())
        assert log_loss(rows, free.split("test")) == pytest.approx(float(losses.mean()), rel=1e-6)


class TestTraining:
    def test_cross_fitting_pools_the_held_out_losses(self, t5: Backbone, random_expert: Any, free: Task) -> None:
        experts = {fold: random_expert(t5, "lora", fold) for fold in range(2)}
        found = cross_fit(t5, lambda fold: build_mixture([experts[fold]], train="none"), free.split("train"), SHORT)  # type: ignore[index]
        folds = stratified_folds(free.split("train"), 2, 0)
        by_hand = np.concatenate([losses_by_hand(t5, held, experts[f]) for f, (_, held) in enumerate(folds)])
        np.testing.assert_allclose(found.losses.numpy(), by_hand, rtol=1e-5)
        assert found.loss == pytest.approx(by_hand.mean(), rel=1e-5)

    def test_an_expert_from_shots(self, seeing: PointingBackbone) -> None:
        task = grounding_task(20).few_shot(6, seed=2)
        expert = train_expert(seeing, task, search=SHORT, r=2)
        assert (expert.card.shots, expert.card.choices, expert.card.training["examples"]) == (6, (), 6)
        assert expert.card.metrics["cross-fitted log-loss"] > 0
        before, after = (losses_by_hand(seeing, task.split("train"), e).mean() for e in (None, expert))
        assert after < before

    def test_the_best_state_on_dev_is_kept(self, t5: Backbone, free: Task) -> None:
        settings = TrainSettings(learning_rate=0.02, steps=6, eval_every=2, keep_best=True)
        expert = train_expert(t5, free, settings=settings, r=2)
        by_hand = losses_by_hand(t5, free.split("dev"), expert).mean()
        assert expert.card.metrics["dev log-loss"] == pytest.approx(by_hand, rel=1e-4)

    def test_ranking_by_score(self, seeing: PointingBackbone, random_expert: Any, tmp_path: Any) -> None:
        pool, task = ExpertPool(tmp_path / "pool"), grounding_task()
        experts = [random_expert(seeing, "lora", seed, scale=0.3) for seed in range(3)]
        for expert in experts:
            pool.add(expert)
        found = rank_experts(seeing, task, pool)
        by_hand = {e.name: -losses_by_hand(seeing, task.split("train"), e).mean() for e in experts}
        assert [e.name for e in found.experts] == sorted(by_hand, key=lambda n: -by_hand[n])
        np.testing.assert_allclose(found.similarities, sorted(by_hand.values(), reverse=True), rtol=1e-5)

    def test_interpolation_down_to_one_expert(
        self, seeing: PointingBackbone, random_expert: Any, tmp_path: Any
    ) -> None:
        task = grounding_task(20).few_shot(8)
        own = train_expert(seeing, task, search=SHORT, r=2)
        experts = [random_expert(seeing, "lora", seed) for seed in range(2)]
        found = interpolate(seeing, task, experts, own, search=SHORT)
        assert [c.chosen for c in found.candidates].count(True) == 1
        assert len(found.candidates) == 4
        saved = Expert.load(found.expert.save(tmp_path / "blend"))
        again, first = (evaluate(seeing, e, task) for e in (saved, found.expert))
        assert again.predictions == first.predictions
        assert again.metrics == first.metrics
        assert set(again.metrics) == {"acc@0.5", "log-loss"}


class TestEmbedding:
    def test_boxes_by_their_right_answers_alone(self, seeing: PointingBackbone, random_expert: Any) -> None:
        task, expert = grounding_task(), random_expert(seeing, "lora", 1)
        embedding = embed_task(seeing, expert, task)
        assert embedding.samples == 12
        assert embedding.mean_loss == pytest.approx(
            losses_by_hand(seeing, task.split("train"), expert).mean(), rel=1e-5
        )
        with pytest.raises(RefusedError, match=r"'refs/train/.*' is answered by a box.* use labels='true'"):
            embed_task(seeing, expert, task, labels="model")

    def test_texts_by_answers_of_the_models_own(self, t5: Backbone, random_expert: Any, free: Task) -> None:
        embeddings = [embed_task(t5, random_expert(t5, "lora", 1), free, labels="model") for _ in range(2)]
        assert embeddings[0].mean_loss == embeddings[1].mean_loss
        assert any(f.any() for f in embeddings[0].fisher.values())
