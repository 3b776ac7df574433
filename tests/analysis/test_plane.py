"""The plane through three experts, against vectors that are orthonormalised and evaluated by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pituning.analysis import plane
from pituning.analysis.plane import gram
from pituning.backbones.base import Backbone
from pituning.errors import BackboneMismatchError, RefusedError
from pituning.experts import Expert
from pituning.training.evaluation import evaluate
from tests.analysis.test_connectivity import merged_losses


def vectors(experts: list[Expert], lora_deltas: Any) -> np.ndarray:
    """What the experts change as one long vector each, ΔW dense, in float64."""
    if experts[0].card.method != "lora":
        return np.stack([torch.cat([e.tensors[k].double().flatten() for k in experts[0].tensors]) for e in experts])
    deltas = [lora_deltas(e) for e in experts]
    shapes = {m: t.shape for d in deltas for m, t in d.items()}
    rows = [torch.cat([d.get(m, torch.zeros(s)).double().flatten() for m, s in shapes.items()]) for d in deltas]
    return np.stack([row.numpy() for row in rows])


@pytest.mark.parametrize("method", ["lora", "bottleneck", "bitfit"])
@pytest.mark.parametrize("seed", [0, 1])
def test_inner_products_are_those_of_the_dense_vectors(
    bert: Backbone, random_experts: Any, lora_deltas: Any, method: str, seed: int
) -> None:
    experts = random_experts(bert, method, 3, seed)
    long = vectors(experts, lora_deltas)
    np.testing.assert_allclose(gram(experts).numpy(), long @ long.T, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["lora", "bottleneck"])
def test_coordinates_are_those_of_gram_schmidt(
    bert: Backbone, random_experts: Any, make_task: Any, lora_deltas: Any, method: str
) -> None:
    """Every grid point is its origin plus x and y times the two orthonormal directions, and equals its signed weights."""
    experts = random_experts(bert, method, 3, 2)
    long = vectors(experts, lora_deltas)
    found = plane(bert, make_task(tests=3), *experts, resolution=3, split="test")
    first = long[1] - long[0]
    first /= np.linalg.norm(first)
    second = long[2] - long[0]
    second -= (second @ first) * first
    second /= np.linalg.norm(second)
    corners = np.stack([(long - long[0]) @ first, (long - long[0]) @ second], axis=1)
    np.testing.assert_allclose(found.corners, corners, atol=1e-6)
    for i, y in enumerate(found.y):
        for j, x in enumerate(found.x):
            weights = np.array(found.weights[i][j])
            assert weights.sum() == pytest.approx(1, abs=1e-12)
            np.testing.assert_allclose(weights @ long, long[0] + x * first + y * second, atol=1e-5)
    assert np.array(found.weights).min() < 0
    low, high = corners.min(0), corners.max(0)
    room = 0.3 * (high - low)
    for axis, values in enumerate((found.x, found.y)):
        np.testing.assert_allclose(values, np.linspace(low[axis] - room[axis], high[axis] + room[axis], 3), atol=1e-6)


def test_lora_losses_are_those_of_merged_dense_weights(
    bert: Backbone, random_experts: Any, make_task: Any, lora_deltas: Any, with_deltas: Any
) -> None:
    task, experts = make_task(tests=4), random_experts(bert, "lora", 3, 1)
    found = plane(bert, task, *experts, resolution=3, split="test")
    dense = [lora_deltas(e) for e in experts]
    zero = torch.zeros((), dtype=torch.float64)
    for i, row in enumerate(found.weights):
        for j, weights in enumerate(row):
            deltas = {m: sum(w * d.get(m, zero) for w, d in zip(weights, dense, strict=True)) for d in dense for m in d}
            expected = merged_losses(bert, task, deltas, with_deltas).mean()
            assert found.log_loss[i][j] == pytest.approx(expected, rel=1e-5)
    assert found.log_loss[found.best[0]][found.best[1]] == min(map(min, found.log_loss))


def test_parameter_losses_are_those_of_the_tensors(bert: Backbone, random_experts: Any, make_task: Any) -> None:
    task, experts = make_task(tests=4), random_experts(bert, "bottleneck", 3, 1)
    found = plane(bert, task, *experts, resolution=3, split="test")
    for i, row in enumerate(found.weights):
        for j, weights in enumerate(row):
            tensors = {
                k: sum(w * e.tensors[k].double() for w, e in zip(weights, experts, strict=True)).float()
                for k in experts[0].tensors
            }
            alone = evaluate(bert, Expert(tensors, experts[0].config, experts[0].card), task)
            assert found.log_loss[i][j] == pytest.approx(alone.metrics["log-loss"], rel=1e-5)


@pytest.mark.parametrize("method", ["lora", "bottleneck"])
def test_the_corners_are_the_experts(bert: Backbone, random_experts: Any, make_task: Any, method: str) -> None:
    task, experts = make_task(), random_experts(bert, method, 3, 3)
    found = plane(bert, task, *experts, resolution=2, split="test", margin=0)
    alone = [evaluate(bert, e, task).metrics["log-loss"] for e in experts]
    np.testing.assert_allclose(found.corner_log_loss, alone, rtol=1e-6)


def test_experts_on_one_line_span_no_plane(bert: Backbone, random_experts: Any, make_task: Any, message: Any) -> None:
    task, (a, b) = make_task(), random_experts(bert, "bottleneck", 2, 3)
    middle = Expert({k: 0.3 * t + 0.7 * b.tensors[k] for k, t in a.tensors.items()}, a.config, a.card)
    for third in (middle.with_card(name="middle"), a, b):
        text = message(plane, bert, task, a, b, third, 3, "test")
        assert "lie on one line" in text
        assert repr(third.name) in text
    assert "lie on one line" in message(plane, bert, task, a, a, b, 3, "test")


def test_what_does_not_fit_is_refused(
    bert: Backbone, t5: Backbone, random_expert: Any, make_task: Any, message: Any
) -> None:
    task = make_task()
    experts = [random_expert(bert, "lora", k) for k in range(3)]
    assert "not 1 and 0.3" in message(plane, bert, task, *experts, 1, "test")
    assert "no examples in split 'dev'" in message(plane, bert, task, *experts)
    with pytest.raises(RefusedError, match="different methods"):
        plane(bert, task, *experts[:2], random_expert(bert, "bottleneck", 3), split="test")
    with pytest.raises(BackboneMismatchError):
        plane(t5, task, *experts, split="test")
