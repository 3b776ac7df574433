"""Kinds of weights, their regularisers, and what they do to a mixture, against sums written out here."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pituning.backbones.base import Backbone
from pituning.errors import RefusedError
from pituning.experts.expert import tensor_hash
from pituning.interpolation import Coefficients, build_mixture, collapse, group_names
from pituning.methods import initial_tensors
from tests.interpolation.test_mixture import COMBINATIONS

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
KINDS = ("softmax", "linear", "sigmoid")
NATURAL = {"bitfit": 0.0}


def weights_of(kind: str, count: int, seed: int) -> Tensor:
    """Random weights such as the kind can have, in float64."""
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {"softmax": torch.softmax(values, 0), "linear": values, "sigmoid": torch.sigmoid(values)}[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_alpha_gives_back_the_weights(kind: str, temperature: float) -> None:
    rows = torch.stack([weights_of(kind, 4, seed) for seed in range(3)])
    coefficients = Coefficients(kind, temperature)
    torch.testing.assert_close(coefficients.weights(coefficients.alpha(rows)), rows, rtol=1e-12, atol=1e-14)


def test_scaled_shares() -> None:
    coefficients = Coefficients("softmax", 0.5, scale=3)
    shares = torch.stack([weights_of("softmax", 4, seed) for seed in range(3)])
    torch.testing.assert_close(coefficients.weights(coefficients.alpha(3 * shares)), 3 * shares, rtol=1e-12, atol=1e-14)
    assert not coefficients.sums_to_one
    with pytest.raises(RefusedError, match="must sum to 3"):
        coefficients.alpha(shares)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_a_scale_is_a_positive_number(scale: float) -> None:
    with pytest.raises(RefusedError, match="scale must be a positive number"):
        Coefficients("softmax", scale=scale)


@pytest.mark.parametrize("kind", ["linear", "sigmoid"])
def test_other_weights_have_no_scale(kind: str) -> None:
    with pytest.raises(RefusedError, match=f"{kind} weights may have any sum"):
        Coefficients(kind, scale=2.0)


def test_the_formulas() -> None:
    alpha = torch.tensor([[0.4, -1.0, 2.0]], dtype=torch.float64)
    total = sum(math.exp(a / 2) for a in alpha[0].tolist())
    softmax = [math.exp(a / 2) / total for a in alpha[0].tolist()]
    sigmoid = [1 / (1 + math.exp(-a / 2)) for a in alpha[0].tolist()]
    assert Coefficients("softmax", 2).weights(alpha)[0].tolist() == pytest.approx(softmax, rel=1e-14)
    assert Coefficients("softmax", 2, 3).weights(alpha)[0].tolist() == pytest.approx(
        [3 * w for w in softmax], rel=1e-14
    )
    assert Coefficients("sigmoid", 2).weights(alpha)[0].tolist() == pytest.approx(sigmoid, rel=1e-14)
    assert Coefficients("linear", 2).weights(alpha)[0].tolist() == alpha[0].tolist()


@given(
    combination=st.sampled_from(COMBINATIONS), dtype=st.sampled_from((torch.float32, torch.float64)),
    kind=st.sampled_from(KINDS), scale=st.sampled_from((1.0, 2.5)), count=st.integers(1, 4),
    train=st.sampled_from(("experts", "none", "merge-then-tune")),
    seed=st.integers(0, 10_000),
)  # fmt: skip
def test_any_weights_reach_out_from_the_common_start(
    backbone_of: Any, random_experts: Any, random_examples: Any, attached_loss: Any, mixture_loss: Any, distance: Any,
    lora_deltas: Any, with_deltas: Any,
    combination: tuple[str, str], dtype: torch.dtype, kind: str, scale: float, count: int, train: str, seed: int,
) -> None:  # fmt: skip
    """φ̄ = φ_0 + Σ_k w_k (φ_k − φ_0), for LoRA with ΔW = 0 at φ_0."""
    family, method = combination
    backbone = backbone_of(family, dtype)
    experts = random_experts(backbone, method, count, seed)
    scale = scale if kind == "softmax" else 1.0
    weights = weights_of(kind, count, seed)
    initial = initial_tensors(backbone, experts[0].config) if method in ("bottleneck", "prefix") else None
    mixture, config = build_mixture(
        experts, weights, granularity="model", train=train, coefficients=kind, scale=scale, initial=initial
    )
    weights = scale * weights
    examples = random_examples(4, seed)
    found = mixture_loss(backbone, mixture, config, examples)
    folded = collapse(mixture, config, experts[0].card).expert
    assert distance(attached_loss(backbone, folded, examples), found) <= TOLERANCE[dtype]
    if method == "lora":
        dense: dict[str, Tensor] = {}
        for weight, expert in zip(weights, experts, strict=True):
            for module, delta in lora_deltas(expert).items():
                dense[module] = dense.get(module, torch.zeros_like(delta)) + weight * delta
        with torch.no_grad(), with_deltas(backbone, dense):
            expected = backbone.loss(backbone.collate(examples))
    else:
        start = initial or {k: torch.full_like(t, NATURAL[method]) for k, t in experts[0].tensors.items()}
        summed = {}
        for key, origin in start.items():
            away = sum(w * (e.tensors[key].double() - origin.double()) for w, e in zip(weights, experts, strict=True))
            summed[key] = (origin.double() + away).to(dtype)
        expected = attached_loss(backbone, replace(experts[0], tensors=summed), examples)
    # weights of several units cancel digits
    assert distance(found, expected) <= 10 * TOLERANCE[dtype]


@pytest.mark.parametrize(("kind", "scale"), [("linear", 1.0), ("sigmoid", 1.0), ("softmax", 2.0)])
def test_the_gradient_is_the_finite_difference(
    backbone_of: Any, random_experts: Any, random_examples: Any, mixture_loss: Any, kind: str, scale: float
) -> None:
    backbone = backbone_of("encoder", torch.float64)
    experts, examples = random_experts(backbone, "lora", 3, 3), random_examples(4, 3)
    coefficients = Coefficients(kind, 0.7, scale)
    alpha = torch.tensor([[0.3, -0.2, 0.5]], dtype=torch.float64)

    def loss_at(values: Tensor) -> float:
        weights = coefficients.weights(values)
        shares = weights / scale
        mixture, config = build_mixture(
            experts, shares, granularity="model", train="none", coefficients=kind, scale=scale
        )
        return float(mixture_loss(backbone, mixture, config, examples).mean())

    step = 1e-5
    slow = [(loss_at(alpha + step * e) - loss_at(alpha - step * e)) / (2 * step) for e in torch.eye(3).double()]
    mixture, config = build_mixture(
        experts,
        coefficients.weights(alpha) / scale,
        granularity="model",
        train="weights",
        coefficients=kind,
        temperature=0.7,
        scale=scale,
    )
    from pituning.training.module import running

    with running(backbone, mixture, config) as model:
        model(**backbone.collate(examples)).mean().backward()
    torch.testing.assert_close(mixture.alpha.grad[0], torch.tensor(slow).double(), rtol=1e-6, atol=1e-9)


class TestPenalty:
    def test_by_hand(self, bert: Backbone, random_experts: Any) -> None:
        experts = random_experts(bert, "bottleneck", 2, 1)
        mixture, _ = build_mixture(experts, [0.25, 0.75], granularity="layer", train="weights")
        assert float(mixture.penalty(3.0).detach()) == 0.0
        with torch.no_grad():
            mixture.alpha[0] = torch.tensor([0.5, 0.5]).log()
        moved = 2 * 0.25**2 / 2  # the first of two groups
        assert float(mixture.penalty(3.0).detach()) == pytest.approx(3 * moved, rel=1e-5)
        spread = (math.log(2) - 0.25 * math.log(0.25) - 0.75 * math.log(0.75)) / 2
        assert float(mixture.penalty(0.0, 0.7).detach()) == pytest.approx(-0.7 * spread, rel=1e-5)
        assert float(mixture.penalty().detach()) == 0.0

    def test_weights_of_zero_have_no_entropy(self, bert: Backbone, random_experts: Any) -> None:
        experts = random_experts(bert, "bottleneck", 2, 1)
        mixture, _ = build_mixture(experts, [0.0, 1.0], granularity="model", train="weights")
        penalty = mixture.penalty(1.0, 1.0)
        penalty.backward()
        assert float(penalty.detach()) == 0.0
        assert not torch.isnan(mixture.alpha.grad).any()

    def test_linear_weights_are_no_distribution(self, bert: Backbone, random_experts: Any) -> None:
        mixture, _ = build_mixture(
            random_experts(bert, "lora", 2, 1), [1.0, -0.5], train="weights", coefficients="linear"
        )
        with pytest.raises(RefusedError, match="linear weights are no distribution"):
            mixture.penalty(0.0, 1.0)


class TestRefusals:
    def test_an_unknown_kind(self, bert: Backbone, random_experts: Any) -> None:
        with pytest.raises(RefusedError, match="one of softmax, linear, sigmoid, not 'entmax'"):
            build_mixture(random_experts(bert, "lora", 2), train="none", coefficients="entmax")

    def test_a_sigmoid_weight_above_one(self, bert: Backbone, random_experts: Any) -> None:
        with pytest.raises(RefusedError, match="sigmoid weights must be between 0 and 1"):
            build_mixture(random_experts(bert, "lora", 2), [0.2, 1.2], train="none", coefficients="sigmoid")

    def test_no_common_start(self, bert: Backbone, random_experts: Any) -> None:
        experts = random_experts(bert, "bottleneck", 2)
        with pytest.raises(RefusedError, match=r"need the experts' common start φ_0.*'bottleneck' has none by itself"):
            build_mixture(experts, [0.4, 0.4], train="none", coefficients="linear")

    def test_another_start(self, bert: Backbone, random_experts: Any) -> None:
        experts = random_experts(bert, "bottleneck", 2)
        initial = {k: t + 1 for k, t in initial_tensors(bert, experts[0].config).items()}
        with pytest.raises(RefusedError, match=f"'bottleneck-0' started from {experts[0].card.init_hash}, not from"):
            build_mixture(experts, [0.4, 0.4], train="none", coefficients="linear", initial=initial)
        assert tensor_hash(initial) != experts[0].card.init_hash


def test_a_function_says_the_groups(bert: Backbone, random_experts: Any) -> None:
    experts = random_experts(bert, "bottleneck", 2, 1)

    def by_part(module: str) -> str:
        return "attention" if "attention" in module else "feed-forward"

    assert group_names(experts, by_part) == ["attention", "feed-forward"]
    mixture, _ = build_mixture(experts, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), granularity=by_part, train="none")
    for key, tensor in mixture().items():
        assert torch.equal(tensor, experts[0 if "attention" in key else 1].tensors[key])
