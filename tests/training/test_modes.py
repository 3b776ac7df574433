"""When ``train="shared"`` and ``train="experts"`` are the same training, and by how much they differ when they are not.

For a method that mixes in parameter space, with weights that are held and sum to one, each φ_k has the gradient w_k g and δ
has g. Adam divides by the gradient's size, so each φ_k moves by the same step as δ, and so does φ̄ = Σ w_k φ_k + δ. Every test
below breaks one of the conditions. All of it in float64, and all of it against the same loop written out here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pituning.backbones.base import Backbone
from pituning.errors import PituningError, RefusedError, UnknownNameError
from pituning.experts import Expert
from pituning.interpolation import Mixture, build_mixture
from pituning.methods import initial_tensors, make_config
from pituning.training.gradient_free import minimise
from pituning.training.module import running
from pituning.training.trainer import TrainSettings, fit

PREFIX = "base_model.model."
STEPS = 5


@pytest.fixture
def double(backbone_of: Any) -> Backbone:
    """The tiny encoder in float64."""
    backbone: Backbone = backbone_of("encoder", torch.float64)
    return backbone


def start_of(backbone: Backbone, experts: list[Expert]) -> dict[str, Tensor] | None:
    if experts[0].config["peft_type"] != "LORA":
        return None
    modules = sorted({k.removeprefix(PREFIX).split(".lora_")[0] for e in experts for k in e.tensors})
    return initial_tensors(backbone, make_config("lora", backbone, r=2, target_modules=modules))


def trained(
    backbone: Backbone,
    experts: list[Expert],
    weights: list[float],
    train: str,
    batches: list[Any],
    *,
    train_weights: bool = False,
    eps: float = 1e-40,
    weight_decay: float = 0.0,
    clip: float | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    coefficients: str = "softmax",
    initial: Any = None,
) -> dict[str, Tensor]:
    """φ̄ after some steps of a plain loop; for LoRA ΔW by module."""
    mixture, config = build_mixture(
        experts, weights, granularity="model", train=train, train_weights=train_weights, coefficients=coefficients,
        initial=initial or start_of(backbone, experts),
    )  # fmt: skip
    free = [p for p in mixture.parameters() if p.requires_grad]
    options = {"eps": eps} if optimizer is torch.optim.AdamW else {}
    steps = optimizer(free, lr=1e-3, weight_decay=weight_decay, **options)
    with running(backbone, mixture, config) as model:
        for batch in batches:
            steps.zero_grad()
            model(**batch).mean().backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(free, clip)
            steps.step()
        found = {k: t.detach().clone() for k, t in mixture().items()}
    if experts[0].config["peft_type"] == "LORA":
        keys = [k for k in found if k.endswith("lora_A.weight")]
        return {k: found[k.replace("lora_A", "lora_B")] @ found[k] for k in keys}
    return found


def gap(backbone: Backbone, experts: list[Expert], batches: list[Any], weights: list[float], **options: Any) -> float:
    """‖φ̄_shared − φ̄_experts‖ relative to how far training moved φ̄."""
    one, other = (trained(backbone, experts, weights, mode, batches, **options) for mode in ("shared", "experts"))
    still = trained(backbone, experts, weights, "experts", [], **options)
    moved = torch.cat([(other[k] - still[k]).flatten() for k in other]).norm()
    return float(torch.cat([(one[k] - other[k]).flatten() for k in other]).norm() / moved)


@pytest.fixture
def batches(double: Backbone, random_examples: Any) -> list[Any]:
    return [double.collate(random_examples(4, seed)) for seed in range(STEPS)]


HALVES = [0.2, 0.3, 0.5]


@pytest.mark.parametrize("method", ["bottleneck", "bitfit"])
@pytest.mark.parametrize("weights", [HALVES, [1 / 3] * 3, [0.98, 0.01, 0.01]])
def test_shared_is_experts(double: Backbone, random_experts: Any, batches: Any, method: str, weights: Any) -> None:
    """Key biases have a gradient of exactly zero but for rounding, which an eps of nothing would blow up to a full step."""
    experts = random_experts(double, method, 3, 1)
    eps, tolerance = (1e-40, 1e-12) if method == "bottleneck" else (1e-11, 1e-4)
    assert gap(double, experts, batches, weights, eps=eps) <= tolerance


@pytest.mark.parametrize("method", ["bottleneck", "bitfit"])
def test_merge_then_tune_is_shared_with_held_weights(
    double: Backbone, random_experts: Any, batches: Any, method: str
) -> None:
    """Both train one set of tensors from the same place."""
    experts = random_experts(double, method, 3, 1)
    one = trained(double, experts, HALVES, "merge-then-tune", batches, eps=1e-11)
    other = trained(double, experts, HALVES, "shared", batches, eps=1e-11)
    assert all(torch.allclose(one[k], other[k], rtol=1e-5, atol=1e-7) for k in other)


@pytest.mark.parametrize(
    ("options", "least"),
    [
        ({"train_weights": True}, 1e-8),  # α's gradient ⟨g, φ_k⟩ follows the moving experts in one mode only
        ({"eps": 1e-3}, 1e-2),  # w_k g is no longer large against eps
        ({"weight_decay": 0.5}, 1e-4),  # experts decay towards 0, δ decays towards the soup
        ({"optimizer": torch.optim.SGD}, 0.1),  # φ̄ moves by Σ w_k² g instead of g
    ],
    ids=["trained weights", "eps", "weight decay", "SGD"],
)
def test_broken_conditions(
    double: Backbone, random_experts: Any, batches: Any, options: dict[str, Any], least: float
) -> None:
    experts = random_experts(double, "bottleneck", 3, 1)
    assert gap(double, experts, batches, HALVES, **options) > least


def test_clipping_matters_where_it_is_active(double: Backbone, random_experts: Any, batches: Any) -> None:
    """Its factor varies from step to step, and differs between the modes: their gradients have different norms."""
    experts = random_experts(double, "bottleneck", 3, 1)
    assert gap(double, experts, batches, HALVES, clip=1e9) <= 1e-9
    norms = [clipped_norm(double, experts, batch) for batch in batches]
    between = (min(norms) + max(norms)) / 2
    assert gap(double, experts, batches, HALVES, clip=between) > 1e-4


def clipped_norm(backbone: Backbone, experts: list[Expert], batch: Any) -> float:
    mixture, config = build_mixture(experts, HALVES, granularity="model", train="shared", train_weights=False)
    with running(backbone, mixture, config) as model:
        model(**batch).mean().backward()
    return float(torch.cat([p.grad.flatten() for p in mixture.parameters() if p.grad is not None]).norm())


def test_an_expert_of_weight_zero_gets_no_step(double: Backbone, random_experts: Any, batches: Any) -> None:
    """The others' weights still sum to one, so φ̄ moves as before."""
    experts = random_experts(double, "bottleneck", 3, 1)
    assert gap(double, experts, batches, [0.0, 0.4, 0.6]) <= 1e-9


def test_weights_that_do_not_sum_to_one_scale_the_step(double: Backbone, random_experts: Any, batches: Any) -> None:
    experts = random_experts(double, "bitfit", 3, 1)
    assert gap(double, experts, batches, [0.2, 0.3, 0.1], coefficients="linear") > 0.1


def test_lora_differs(double: Backbone, random_experts: Any, batches: Any) -> None:
    """Its δ is a factor pair of its own."""
    experts = random_experts(double, "lora", 3, 1)
    assert gap(double, experts, batches, HALVES) > 0.1


class TestMergeThenTune:
    @pytest.mark.parametrize("method", ["lora", "bottleneck"])
    def test_starts_at_the_soup_and_keeps_the_weights(
        self, bert: Backbone, random_experts: Any, random_examples: Any, mixture_loss: Any, distance: Any, method: str
    ) -> None:
        experts, examples = random_experts(bert, method, 3, 2), random_examples(6, 2)
        soup = mixture_loss(bert, *build_mixture(experts, HALVES, train="none"), examples)
        mixture, config = build_mixture(experts, HALVES, train="merge-then-tune")
        assert distance(mixture_loss(bert, mixture, config, examples), soup) <= 1e-5
        before = {k: t.clone() for k, t in mixture().items()}
        fit(bert, mixture, config, examples, TrainSettings(learning_rate=1e-2, steps=3, batch_size=4))
        assert any(not torch.equal(before[k], t) for k, t in mixture().items())
        torch.testing.assert_close(mixture.weights(), torch.tensor(HALVES).expand(len(mixture.weights()), -1))

    def test_one_expert_is_plain_training(self, bert: Backbone, random_experts: Any, random_examples: Any) -> None:
        experts, examples = random_experts(bert, "lora", 1, 2), random_examples(6, 2)
        found = []
        for train in ("experts", "merge-then-tune"):
            mixture, config = build_mixture(experts, train=train)
            fit(bert, mixture, config, examples, TrainSettings(learning_rate=1e-2, steps=3, batch_size=4))
            found.append({k: t.detach() for k, t in mixture().items()})
        assert all(torch.equal(found[0][k], t) for k, t in found[1].items())


class TestRegularisers:
    def test_a_strong_pull_keeps_the_weights(self, bert: Backbone, random_experts: Any, random_examples: Any) -> None:
        experts, examples = random_experts(bert, "lora", 3, 3), random_examples(8, 3)
        moved = []
        for pull in (0.0, 1e4):
            mixture, config = build_mixture(experts, HALVES, granularity="model", train="weights")
            settings = TrainSettings(
                alpha_learning_rate=0.05, steps=20, batch_size=8, weights_to_start=pull, warmup=0.0
            )
            fit(bert, mixture, config, examples, settings)
            moved.append(float((mixture.weights().detach() - torch.tensor([HALVES])).abs().max()))
        assert moved[1] < 0.2 * moved[0]

    @pytest.mark.parametrize("spread", [10.0, -10.0])
    def test_entropy(self, bert: Backbone, random_experts: Any, random_examples: Any, spread: float) -> None:
        experts, examples = random_experts(bert, "lora", 2, 3), random_examples(8, 3)
        mixture, config = build_mixture(experts, [0.3, 0.7], granularity="model", train="weights")
        settings = TrainSettings(alpha_learning_rate=0.05, steps=30, batch_size=8, weights_spread=spread, warmup=0.0)
        fit(bert, mixture, config, examples, settings)
        larger = float(mixture.weights()[0, 1].detach())
        assert larger < 0.6 if spread > 0 else larger > 0.8


class TestGradientFree:
    def test_finds_the_minimum_of_a_bowl(self, bert: Backbone, random_experts: Any) -> None:
        experts = random_experts(bert, "lora", 3, 4)
        mixture, _ = build_mixture(experts, granularity="model", train="weights", coefficients="linear")
        wanted = torch.tensor([[0.9, -0.4, 0.3]])

        def bowl() -> float:
            return float((mixture.weights() - wanted).square().sum().detach())

        minimise(mixture, bowl, generations=60, sigma=0.3)
        torch.testing.assert_close(mixture.weights().detach(), wanted, rtol=0, atol=1e-3)

    @pytest.mark.parametrize("coefficients", ["softmax", "linear", "sigmoid"])
    def test_lowers_the_loss_and_nothing_else_moves(
        self, bert: Backbone, random_experts: Any, random_examples: Any, mixture_loss: Any, coefficients: str
    ) -> None:
        experts, examples = random_experts(bert, "lora", 3, 4), random_examples(8, 4)
        mixture, config = build_mixture(experts, granularity="model", train="weights", coefficients=coefficients)
        before = float(mixture_loss(bert, mixture, config, examples).mean())
        held = {n: p.clone() for n, p in mixture.named_parameters() if n != "alpha"}
        settings = TrainSettings(optimizer="cma", steps=10, batch_size=3, eval_every=5)
        found = fit(bert, mixture, config, examples, settings, held_out=examples)
        after = float(mixture_loss(bert, mixture, config, examples).mean())
        assert after < before
        assert list(found.held_out) == [0, 5, 10]
        assert found.held_out[10] < found.held_out[0]
        assert list(found.weights) == list(range(11))
        assert all(torch.equal(held[n], p) for n, p in mixture.named_parameters() if n != "alpha")

    def test_the_same_seed_is_the_same_run_and_numpys_is_left_alone(
        self, bert: Backbone, random_experts: Any, random_examples: Any
    ) -> None:
        import numpy as np

        experts, examples = random_experts(bert, "lora", 2, 4), random_examples(4, 4)
        np.random.seed(5)
        expected = np.random.rand(3).tolist()
        np.random.seed(5)
        found = []
        for seed in (0, 0, 1):
            mixture, config = build_mixture(experts, granularity="model", train="weights")
            fit(bert, mixture, config, examples, TrainSettings(optimizer="cma", steps=3, seed=seed))
            found.append(mixture.weights().detach())
        assert torch.equal(found[0], found[1])
        assert not torch.equal(found[0], found[2])
        assert np.random.rand(3).tolist() == expected

    def test_a_weight_of_zero_stays(self, bert: Backbone, random_experts: Any, random_examples: Any) -> None:
        experts = random_experts(bert, "lora", 3, 4)
        mixture, config = build_mixture(experts, [0.0, 0.5, 0.5], granularity="model", train="weights")
        fit(bert, mixture, config, random_examples(4, 4), TrainSettings(optimizer="cma", steps=3))
        assert float(mixture.weights()[0, 0].detach()) == 0.0
        assert float(mixture.weights()[0, 1].detach()) != 0.5

    def test_refusals(self, bert: Backbone, random_experts: Any, random_examples: Any, tmp_path: Any) -> None:
        experts, examples = random_experts(bert, "bottleneck", 2, 4), random_examples(4, 4)

        def run(train: str, **options: Any) -> Mixture:
            mixture, config = build_mixture(experts, train=train)
            fit(bert, mixture, config, examples, TrainSettings(steps=1, **options))
            return mixture

        with pytest.raises(PituningError, match=r"moves the weights alone, but alpha, experts\.0.* would be trained"):
            run("experts", optimizer="cma")
        with pytest.raises(UnknownNameError, match="unknown optimizer 'adam': did you mean 'adamw'"):
            run("weights", optimizer="adam")
        mixture, config = build_mixture(experts, train="weights")
        with pytest.raises(RefusedError, match="writes no checkpoints"):
            fit(bert, mixture, config, examples, TrainSettings(optimizer="cma", steps=1), folder=tmp_path)
