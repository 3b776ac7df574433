"""The straight path between two experts, against ΔW that is interpolated and merged by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pituning.analysis import connectivity, leave_one_out
from pituning.analysis.affine import affine_expert, measured
from pituning.backbones.base import Backbone
from pituning.errors import BackboneMismatchError, DataError, PituningError, RefusedError
from pituning.experts import Expert
from pituning.tasks import Task
from pituning.training.evaluation import Evaluation, evaluate


def merged_losses(backbone: Backbone, task: Task, deltas: dict[str, torch.Tensor], with_deltas: Any) -> np.ndarray:
    """Log-loss of each test example, one at a time, on a backbone whose dense weights hold ΔW."""
    losses = []
    with torch.no_grad(), with_deltas(backbone, deltas):
        for example in task.split("test"):
            scores = backbone.score(backbone.collate([example]), task.choices)[0].double()
            losses.append(float(scores.logsumexp(0) - scores[example.label]))
    return np.array(losses)


def between(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], t: float) -> dict[str, torch.Tensor]:
    """(1 − t) ΔW_a + t ΔW_b, dense; a module may be missing in one of them."""
    zero = torch.zeros((), dtype=torch.float64)
    return {m: (1 - t) * left.get(m, zero) + t * right.get(m, zero) for m in {**left, **right}}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_lora_path_is_that_of_dense_delta_w(
    bert: Backbone, random_experts: Any, make_task: Any, lora_deltas: Any, with_deltas: Any, seed: int
) -> None:
    """Ranks, scalings and adapted modules differ between the two experts."""
    task, (a, b) = make_task(tests=7), random_experts(bert, "lora", 2, seed)
    found = connectivity(bert, task, a, b, points=5, split="test")
    assert found.t == (0, 0.25, 0.5, 0.75, 1)
    dense = [between(lora_deltas(a), lora_deltas(b), t) for t in found.t]
    losses = np.stack([merged_losses(bert, task, deltas, with_deltas) for deltas in dense])
    np.testing.assert_allclose(found.log_loss, losses.mean(1), rtol=1e-5)
    chord = np.outer(1 - np.array(found.t), losses[0]) + np.outer(found.t, losses[-1])
    excess = losses - chord
    highest = int(excess.mean(1).argmax())
    assert found.barrier == pytest.approx(max(excess.mean(1)), abs=1e-5)
    if found.barrier > 1e-5:
        assert found.barrier_at == found.t[highest]
        assert found.barrier_error == pytest.approx(excess[highest].std(ddof=1) / 7**0.5, rel=1e-3)
    assert found.log_loss[found.best] == min(found.log_loss)


@pytest.mark.parametrize("method", ["bottleneck", "bitfit"])
def test_parameter_path_is_that_of_the_tensors(
    bert: Backbone, random_experts: Any, make_task: Any, method: str
) -> None:
    task, (a, b) = make_task(), random_experts(bert, method, 2, 4)
    found = connectivity(bert, task, a, b, points=4, split="test")
    for t, loss, value in zip(found.t, found.log_loss, found.values, strict=True):
        tensors = {k: ((1 - t) * x.double() + t * b.tensors[k].double()).float() for k, x in a.tensors.items()}
        expected = evaluate(bert, Expert(tensors, a.config, a.card), task)
        assert loss == pytest.approx(expected.metrics["log-loss"], rel=1e-5)
        assert value == expected.value


@pytest.mark.parametrize("method", ["lora", "bottleneck"])
@pytest.mark.parametrize("family", ["encoder", "seq2seq"])
def test_the_ends_are_the_experts_bit_by_bit(
    backbone_of: Any, random_experts: Any, make_task: Any, method: str, family: str
) -> None:
    backbone, task = backbone_of(family), make_task()
    a, b = random_experts(backbone, method, 2, 5)
    found = connectivity(backbone, task, a, b, points=3, split="test")
    for index, expert in ((0, a), (-1, b)):
        alone = evaluate(backbone, expert, task)
        assert (found.log_loss[index], found.values[index]) == (alone.metrics["log-loss"], alone.value)


def test_exact_rank_is_the_sum(bert: Backbone, random_expert: Any) -> None:
    a, b = random_expert(bert, "lora", 1, r=2), random_expert(bert, "lora", 2, r=3)
    middle = affine_expert([a, b], [0.5, 0.5], "middle")
    assert {t.shape[0] for k, t in middle.tensors.items() if "lora_A" in k} == {5}


def test_an_expert_and_itself_have_no_barrier(bert: Backbone, random_expert: Any, make_task: Any) -> None:
    a = random_expert(bert, "bottleneck", 1)
    found = connectivity(bert, make_task(), a, a, points=5, split="test")
    assert found.barrier == pytest.approx(0, abs=1e-6)
    assert max(found.log_loss) == pytest.approx(min(found.log_loss), rel=1e-5)


def test_opposite_experts_meet_at_the_bare_backbone(bert: Backbone, random_expert: Any, make_task: Any) -> None:
    """Examples whose answers the bare backbone never gives: between ΔW and −ΔW lies a barrier, and its top is known."""
    plus = random_expert(bert, "lora", 1, scale=1.0)
    minus = Expert({k: -t if "lora_B" in k else t for k, t in plus.tensors.items()}, plus.config, plus.card)
    task = make_task()
    given = evaluate(bert, None, task).predictions
    wrong = [replace(e, target=task.choices[int(p) - 1]) for e, p in zip(task.split("test"), given, strict=True)]
    task = replace(task, splits={"test": tuple(wrong)})
    found = connectivity(bert, task, plus, minus, points=3, split="test")
    bare, ends = evaluate(bert, None, task), [evaluate(bert, e, task).metrics["log-loss"] for e in (plus, minus)]
    assert found.values[1] == bare.value == 0
    assert found.barrier_at == 0.5
    assert found.barrier == pytest.approx(bare.metrics["log-loss"] - sum(ends) / 2, rel=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_an_error(
    bert: Backbone, random_expert: Any, make_task: Any, message: Any, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    task, experts = make_task(tests=6), [random_expert(bert, "lora", s, name=f"e{s}") for s in range(2)]

    def spoilt(backbone: Backbone, expert: Expert, *arguments: Any) -> Any:
        found = evaluate(backbone, expert, *arguments)
        bad = (value,) * 4 + found.losses[4:] if expert.name in ("t=0.500", "without e0") else found.losses
        return replace(found, losses=bad)

    monkeypatch.setattr("pituning.analysis.affine.evaluate", spoilt)
    text = "is not a finite number for 4 of 6 examples of target/test, such as 'target/test/0'"
    found = message(connectivity, bert, task, *experts, 3, "test")
    assert f"the log-loss at t = 0.5 between 'e0' and 'e1' {text}" in found
    found = message(leave_one_out, bert, task, experts, split="test")
    assert f"the log-loss of the blend 'without e0' {text}" in found


def test_scores_that_are_no_numbers_are_an_error_that_says_where(
    bert: Backbone, random_expert: Any, make_task: Any, message: Any
) -> None:
    plus = random_expert(bert, "lora", 1, scale=1e30, name="plus")  # it overflows
    fine = random_expert(bert, "lora", 2, name="fine")
    assert "the log-loss at t = 0.5 between 'fine' and 'plus' cannot be measured" in message(
        connectivity, bert, make_task(), fine, plus, 3, "test"
    )


def test_examples_without_an_answer_have_no_loss_anywhere(
    bert: Backbone, random_expert: Any, make_task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, expert = make_task(tests=3), random_expert(bert, "lora", 1)
    first, *others = task.split("test")
    task = replace(task, splits={"test": (replace(first, target=""), *others)})
    found = Evaluation("target", "test", "e", "accuracy", {}, (), (float("nan"), 0.5, 0.25))
    monkeypatch.setattr("pituning.analysis.affine.evaluate", lambda *_: found)
    assert measured(bert, expert, "here", task, "test", None) is found
    found = replace(found, losses=(0.5, 0.25, float("nan")))
    with pytest.raises(PituningError, match="the log-loss here is not a finite number for 1 of 2"):
        measured(bert, expert, "here", task, "test", None)


def test_what_does_not_fit_is_refused(
    bert: Backbone, t5: Backbone, random_expert: Any, make_task: Any, message: Any
) -> None:
    task, lora, adapter = make_task(), random_expert(bert, "lora", 1), random_expert(bert, "bottleneck", 2)
    assert "at least 3 points" in message(connectivity, bert, task, lora, lora, 2)
    assert "no examples in split 'dev'; it has train (12), test (9)" in message(connectivity, bert, task, lora, lora)
    with pytest.raises(RefusedError, match="different methods"):
        connectivity(bert, task, lora, adapter, split="test")
    with pytest.raises(BackboneMismatchError):
        connectivity(t5, task, lora, lora, split="test")
    with pytest.raises(DataError, match="at least two answerable examples, found 1"):
        connectivity(bert, task, lora, lora, split="test", limit=1)
