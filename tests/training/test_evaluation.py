"""Accuracy and log-loss against counting by hand, one example at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from pituning.backbones.base import Backbone
from pituning.errors import BackboneMismatchError, DataError, ExpertError, PituningError, UnknownNameError
from pituning.example import Example
from pituning.experts import Expert
from pituning.methods import attached
from pituning.training.evaluation import (
    BIAS_PENALTY,
    bias_calibrated_losses,
    calibrated_losses,
    evaluate,
    log_loss,
    log_probabilities,
    predict,
)
from pituning.training.module import running
from pituning.training.starts import calibrated_loss


def by_hand(backbone: Backbone, examples: Any) -> np.ndarray:
    """log p(choice | input) from the loss of every choice as the target, one example at a time."""
    rows = []
    for example in examples:
        losses = [backbone.loss(backbone.collate([replace(example, target=c)]))[0] for c in example.choices]
        scores = -torch.stack(losses).detach().double().numpy()
        rows.append(scores - np.log(np.exp(scores).sum()))
    return np.array(rows)


@pytest.mark.parametrize("family", ["encoder", "seq2seq"])
@pytest.mark.parametrize("method", ["lora", "bottleneck", None])
def test_metrics_are_those_counted_by_hand(
    backbone_of: Any, random_expert: Any, make_task: Any, family: str, method: str | None
) -> None:
    backbone, task = backbone_of(family), make_task(tests=11)
    expert = random_expert(backbone, method, 1, name="mine") if method else None
    examples = task.split("test")
    if expert is None:
        rows = by_hand(backbone, examples)
    else:
        with attached(backbone, expert.config, expert.tensors):
            rows = by_hand(backbone, examples)
    truth = np.array([task.choices.index(e.target) for e in examples])
    found = evaluate(backbone, expert, task)
    assert found.predictions == tuple(rows.argmax(1))
    assert found.value == found.metrics["accuracy"] == pytest.approx((rows.argmax(1) == truth).mean())
    assert 0 < found.value < 1, "the example must not be trivial"
    assert found.metrics["log-loss"] == pytest.approx(-rows[np.arange(11), truth].mean(), rel=1e-5)
    name = "mine" if expert else f"{backbone.name} (zero-shot)"
    assert str(found).startswith(f"{name} on target/test (11 examples): accuracy {found.value:.4f}, log-loss ")


def test_other_metrics(bert: Backbone, random_expert: Any, make_task: Any) -> None:
    expert = random_expert(bert, "bottleneck", 2, scale=0.4)
    task = make_task(tests=25)
    found = evaluate(bert, expert, replace(task, metric="macro-F1"))
    truth = np.array([e.label for e in task.split("test")])
    predictions = np.array(found.predictions)
    scores = []
    for c in range(3):
        hit = ((predictions == c) & (truth == c)).sum()
        scores.append(2 * hit / max(1, (predictions == c).sum() + (truth == c).sum()))
    assert found.value == pytest.approx(np.mean(scores))
    with pytest.raises(UnknownNameError, match="unknown metric 'acuracy': did you mean 'accuracy'"):
        evaluate(bert, expert, replace(task, metric="acuracy"))


def test_batches_and_lengths_do_not_matter(bert: Backbone, random_examples: Any) -> None:
    examples = random_examples(13, 3)
    rows = log_probabilities(bert, examples)
    torch.testing.assert_close(rows, torch.tensor(by_hand(bert, examples)).float(), rtol=1e-4, atol=1e-5)
    for size in (1, 4):
        torch.testing.assert_close(log_probabilities(bert, examples, batch_size=size), rows, rtol=1e-5, atol=1e-5)
    turned = log_probabilities(bert, examples[::-1])
    torch.testing.assert_close(turned.flip(0), rows, rtol=1e-5, atol=1e-5)


def test_a_mixture_is_scored_as_its_expert(
    bert: Backbone, random_expert: Any, random_examples: Any, make_task: Any
) -> None:
    from pituning.interpolation import build_mixture

    expert, examples = random_expert(bert, "lora", 4), random_examples(7, 4)
    with attached(bert, expert.config, expert.tensors):
        expected = log_probabilities(bert, examples)
    mixture, config = build_mixture([expert], train="none")
    with running(bert, mixture, config) as model:
        assert torch.equal(log_probabilities(bert, examples, model), expected)


def test_a_limit_and_a_split(bert: Backbone, random_expert: Any, make_task: Any) -> None:
    task, expert = make_task(tests=20), random_expert(bert, "lora", 5)
    assert len(evaluate(bert, expert, task, limit=6).predictions) == 6
    assert len(evaluate(bert, expert, task, "train").predictions) == 12
    with pytest.raises(DataError, match="no examples in split 'dev'; it has train \\(12\\), test \\(20\\)"):
        evaluate(bert, expert, task, "dev")


def test_experts_that_do_not_fit(bert: Backbone, t5: Backbone, random_expert: Any, make_task: Any) -> None:
    with pytest.raises(BackboneMismatchError):
        evaluate(bert, random_expert(t5), make_task())
    broken = Expert({}, random_expert(bert).config, random_expert(bert).card)
    with pytest.raises(ExpertError, match="missing tensor"):
        evaluate(bert, broken, make_task())


class TestNoNumbers:
    """NaN in a log-loss means that no right answer may be given: a model's own NaN must not be taken for that."""

    def broken(
        self, backbone: Backbone, monkeypatch: pytest.MonkeyPatch, texts: Any, value: float, method: str
    ) -> None:
        """The scores (or the loss) of one example have a value in them."""
        compute, collate = getattr(backbone, method), backbone.collate

        def collated(examples: Any) -> Any:
            return {**collate(examples), "broken": [e.texts == texts for e in examples]}

        def changed(batch: Any, *options: Any) -> torch.Tensor:
            found: torch.Tensor = compute({k: v for k, v in batch.items() if k != "broken"}, *options).clone()
            rows = torch.tensor(batch["broken"])
            found[(rows, 1) if method == "score" else rows] = value
            return found

        monkeypatch.setattr(backbone, "collate", collated)
        monkeypatch.setattr(backbone, method, changed)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_scores(
        self, bert: Backbone, make_task: Any, random_expert: Any, monkeypatch: pytest.MonkeyPatch, value: float
    ) -> None:
        task = make_task(tests=5)
        self.broken(bert, monkeypatch, task.split("test")[3].texts, value, "score")
        wanted = "scores of example 'target/test/3' are NaN or infinite"
        for call in (evaluate, predict):
            with pytest.raises(PituningError, match=f"task 'target': the model's {wanted}.*float32"):
                call(bert, None, task)
        with pytest.raises(PituningError, match=wanted):
            log_probabilities(bert, task.split("test"))
        expert = random_expert(bert, "lora", 1, name="mine")
        with pytest.raises(PituningError, match=f"expert 'mine': the model's {wanted}"):
            calibrated_loss(bert, expert, task.split("test"))
        rows = log_probabilities(bert, task.split("test"), finite=False)
        assert rows.isnan().any(1).tolist() == [False, False, False, True, False]

    @pytest.mark.parametrize("value", [np.nan, -np.inf])
    def test_losses(
        self, t5: Backbone, make_task: Any, random_examples: Any, monkeypatch: pytest.MonkeyPatch, value: float
    ) -> None:
        free = random_examples(5, 3, choices=())
        task = replace(make_task(), choices=(), splits={"test": free}, metric="exact-match")
        self.broken(t5, monkeypatch, free[2].texts, value, "loss")
        with pytest.raises(PituningError, match="task 'target': the model's scores of example 'e/2'"):
            evaluate(t5, None, task)
        with pytest.raises(PituningError, match="scores of example 'e/2'"):
            log_probabilities(t5, free)

    def test_an_impossible_answer_is_one(self, bert: Backbone, make_task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        task = make_task(tests=5)
        assert [e.label for e in task.split("test")] == [0, 1, 2, 0, 1]
        self.broken(bert, monkeypatch, task.split("test")[3].texts, -np.inf, "score")
        assert np.isfinite(evaluate(bert, None, task).metrics["log-loss"])
        assert log_probabilities(bert, task.split("test"))[3, 1] == -torch.inf


class TestCalibration:
    def examples(self, truth: list[int]) -> list[Example]:
        return [Example(str(i), ("x",), "x", "abc"[t], ("a", "b", "c")) for i, t in enumerate(truth)]

    def test_one_temperature_is_the_best_of_a_fine_grid(self) -> None:
        generator = torch.Generator().manual_seed(0)
        log_p = torch.log_softmax(4 * torch.randn(30, 3, generator=generator, dtype=torch.float64), 1)
        truth = [int(row.argmax()) if i % 4 else (i // 4) % 3 for i, row in enumerate(log_p)]
        found = calibrated_losses(log_p, self.examples(truth))
        grid = np.exp(np.linspace(-2, 4, 6001))
        rows = log_p.numpy()[None] / grid[:, None, None]
        rows = rows - np.log(np.exp(rows).sum(2, keepdims=True))
        slow = -rows[:, np.arange(30), truth]
        best = slow.mean(1).argmin()
        assert 0 < best < 6000, "the optimum must lie inside"
        assert float(found.mean()) == pytest.approx(slow.mean(1)[best], rel=1e-5)
        np.testing.assert_allclose(found.numpy(), slow[best], rtol=0.01, atol=1e-3)

    def test_overconfidence_alone_costs_nothing(self) -> None:
        log_p = torch.log_softmax(torch.randn(20, 3, generator=torch.Generator().manual_seed(1)).double(), 1)
        truth = torch.multinomial(log_p.exp(), 1, generator=torch.Generator().manual_seed(2)).flatten().tolist()
        examples = self.examples(truth)
        sharp = torch.log_softmax(5 * log_p, 1)
        assert log_loss(sharp, examples) > 1.1 * log_loss(log_p, examples)
        torch.testing.assert_close(
            calibrated_losses(sharp, examples), calibrated_losses(log_p, examples), rtol=1e-3, atol=1e-3
        )

    def test_a_bias_per_answer_is_the_best_that_a_search_without_gradients_finds(self) -> None:
        generator = torch.Generator().manual_seed(3)
        log_p = torch.log_softmax(2 * torch.randn(25, 3, generator=generator, dtype=torch.float64), 1)
        truth = [int(row.argmax()) if i % 3 else (i // 3) % 3 for i, row in enumerate(log_p)]
        shifted = torch.log_softmax(log_p + torch.tensor([3.0, 0.0, -1.0], dtype=torch.float64), 1)
        found = bias_calibrated_losses(shifted, self.examples(truth))

        def objective(values: np.ndarray) -> float:
            rows = shifted.numpy() * values[0] + values[1:]
            rows = rows - np.log(np.exp(rows).sum(1, keepdims=True))
            return float(-rows[np.arange(25), truth].sum() + BIAS_PENALTY * (values[1:] ** 2).sum())

        options = {"xatol": 1e-9, "fatol": 1e-12, "maxiter": 20_000}
        slow = minimize(objective, np.array([1.0, 0.0, 0.0, 0.0]), method="Nelder-Mead", options=options)
        penalty = BIAS_PENALTY * float((slow.x[1:] ** 2).sum())
        assert float(found.sum()) == pytest.approx(slow.fun - penalty, rel=1e-4)

    def test_a_preferred_answer_costs_little(self) -> None:
        log_p = torch.log_softmax(3 * torch.randn(60, 3, generator=torch.Generator().manual_seed(4)).double(), 1)
        truth = torch.multinomial(log_p.exp(), 1, generator=torch.Generator().manual_seed(5)).flatten().tolist()
        examples = self.examples(truth)
        leaning = torch.log_softmax(log_p + torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64), 1)
        lost = {
            f: float((f(leaning, examples) - f(log_p, examples)).mean())
            for f in (calibrated_losses, bias_calibrated_losses)
        }
        assert lost[bias_calibrated_losses] < 0.2 * lost[calibrated_losses]

    def test_impossible_answers_and_single_examples_stay_finite(self) -> None:
        log_p = torch.tensor([[0.0, -torch.inf, -torch.inf]])
        found = bias_calibrated_losses(log_p, self.examples([0]))
        assert found.shape == (1,)
        assert 0 <= float(found) < 1e-3
        assert torch.isfinite(bias_calibrated_losses(log_p, self.examples([1]))).all()
