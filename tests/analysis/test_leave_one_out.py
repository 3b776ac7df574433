"""What each expert of a blend is worth, against blends that are made and scored by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pituning.analysis import leave_one_out, lineage_weights
from pituning.backbones.base import Backbone
from pituning.errors import BackboneMismatchError, RefusedError
from pituning.interpolation import group_names
from pituning.interpolation.build import group_name
from tests.analysis.test_connectivity import merged_losses

WEIGHTS = [0.5, 0.3, 0.2]


def blended(deltas: list[dict[str, torch.Tensor]], weights: list[float]) -> dict[str, torch.Tensor]:
    zero = torch.zeros((), dtype=torch.float64)
    return {m: sum(w * d.get(m, zero) for w, d in zip(weights, deltas, strict=True)) for d in deltas for m in d}


@pytest.mark.parametrize("weights", [None, WEIGHTS, [1.4, -0.6, 0.2]])
def test_losses_differences_and_errors_are_those_of_dense_blends(
    bert: Backbone, random_experts: Any, make_task: Any, lora_deltas: Any, with_deltas: Any, weights: Any
) -> None:
    task, experts = make_task(tests=6), random_experts(bert, "lora", 3, 2)
    found = leave_one_out(bert, task, experts, weights, split="test")
    given = weights or [1 / 3] * 3
    dense = [lora_deltas(e) for e in experts]
    full = merged_losses(bert, task, blended(dense, given), with_deltas)
    assert found.log_loss == pytest.approx(full.mean(), rel=1e-5)
    for k, member in enumerate(found.without):
        rest = sum(w for i, w in enumerate(given) if i != k)
        others = [0.0 if i == k else w / rest for i, w in enumerate(given)]
        losses = merged_losses(bert, task, blended(dense, others), with_deltas)
        assert (member.name, member.weight) == (experts[k].name, pytest.approx(given[k]))
        assert member.log_loss == pytest.approx(losses.mean(), rel=1e-5)
        assert member.difference == pytest.approx((losses - full).mean(), abs=1e-5)
        assert member.error == pytest.approx((losses - full).std(ddof=1) / 6**0.5, abs=1e-5)


def test_weights_of_groups_are_scaled_group_by_group(
    bert: Backbone, random_experts: Any, make_task: Any, lora_deltas: Any, with_deltas: Any
) -> None:
    task, experts = make_task(tests=4), random_experts(bert, "lora", 3, 2)
    groups = group_names(experts, "layer")
    rows = np.random.default_rng(0).dirichlet([1, 1, 1], len(groups))
    found = leave_one_out(bert, task, experts, torch.tensor(rows), split="test", granularity="layer")
    dense = [lora_deltas(e) for e in experts]
    modules = {m for d in dense for m in d}
    row_of = {m: rows[groups.index(group_name(f"base_model.model.{m}.lora_A.weight", "layer"))] for m in modules}
    for k, member in enumerate(found.without):
        deltas: dict[str, torch.Tensor] = {}
        for m in modules:
            weights = row_of[m].copy()
            weights[k] = 0
            weights /= weights.sum()
            deltas[m] = sum(float(w) * d[m] for w, d in zip(weights, dense, strict=True) if m in d)
        assert member.log_loss == pytest.approx(merged_losses(bert, task, deltas, with_deltas).mean(), rel=1e-5)
        assert member.weight == pytest.approx(rows[:, k].mean())


def test_weights_of_groups_stay_with_their_groups_where_the_experts_adapt_different_modules(
    bert: Backbone, random_expert: Any, make_task: Any, lora_deltas: Any, with_deltas: Any
) -> None:
    """Without the first expert the groups come in another order, and without the last there are fewer."""
    adapted = (["value"], ["query", "value"], ["query", "output.dense"])
    experts = [random_expert(bert, "lora", s, target_modules=t, name=f"e{s}") for s, t in enumerate(adapted)]
    task, groups = make_task(tests=4), group_names(experts, "module")
    assert group_names(experts[1:], "module") != [g for g in groups if g in group_names(experts[1:], "module")]
    rows = np.random.default_rng(1).dirichlet([1, 1, 1], len(groups))
    rows[[n for n, g in enumerate(groups) if g.endswith("output.dense")]] = [0.0, 0.0, 1.0]
    found = leave_one_out(bert, task, experts, torch.tensor(rows), split="test", granularity="module")
    dense = [lora_deltas(e) for e in experts]
    for k, member in enumerate(found.without):
        deltas: dict[str, torch.Tensor] = {}
        for m, row in zip(groups, rows, strict=True):
            others = [i for i in range(3) if i != k]
            if any(m in dense[i] for i in others):
                scale = row.sum() / row[others].sum()
                deltas[m] = sum(float(scale * row[i]) * dense[i][m] for i in others if m in dense[i])
        assert member.log_loss == pytest.approx(merged_losses(bert, task, deltas, with_deltas).mean(), rel=1e-5)


def test_of_two_experts_the_other_one_remains(bert: Backbone, random_experts: Any, make_task: Any) -> None:
    from pituning import evaluate

    task, (a, b) = make_task(), random_experts(bert, "bottleneck", 2, 1)
    found = leave_one_out(bert, task, [a, b], [0.3, 0.7], split="test")
    for member, other in zip(found.without, (b, a), strict=True):
        alone = evaluate(bert, other, task)
        assert (member.log_loss, member.value) == (alone.metrics["log-loss"], alone.value)


def test_an_expert_of_no_weight_makes_no_difference(bert: Backbone, random_experts: Any, make_task: Any) -> None:
    found = leave_one_out(bert, make_task(), random_experts(bert, "lora", 3, 1), [0.5, 0.5, 0.0], split="test")
    assert found.without[2].difference == pytest.approx(0, abs=1e-6)
    assert abs(found.without[0].difference) > 1e-4


def test_lineage_gives_names_and_weights(bert: Backbone, random_expert: Any, message: Any) -> None:
    expert = random_expert(bert, "lora", 1, name="pi")
    lineage = ({"name": "a", "weight": 0.25}, {"name": "b", "weight": 0.75})
    assert lineage_weights(expert.with_card(lineage=lineage)) == {"a": 0.25, "b": 0.75}
    assert "'pi' was not blended from others" in message(lineage_weights, expert)


def test_what_does_not_fit_is_refused(
    bert: Backbone, t5: Backbone, random_experts: Any, make_task: Any, message: Any
) -> None:
    task, experts = make_task(), random_experts(bert, "lora", 3, 1)
    with pytest.raises(RefusedError, match="at least two experts, not 1"):
        leave_one_out(bert, task, experts[:1], split="test")
    assert "expected [3] or [1, 3]" in message(leave_one_out, bert, task, experts, [0.5, 0.5], "test")
    assert "expected [3] or [1, 3]" in message(leave_one_out, bert, task, experts, [0.5, float("nan"), 0.5], "test")
    text = message(leave_one_out, bert, task, experts, [1.0, 0.0, 0.0], "test")
    assert f"without '{experts[0].name}' the weights of the others sum to 0" in text
    with pytest.raises(BackboneMismatchError):
        leave_one_out(t5, task, experts, split="test")
