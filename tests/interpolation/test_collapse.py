"""Collapsing an interpolation into one expert: exactly, or to the best smaller rank with the true error."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pituning.backbones.base import Backbone
from pituning.errors import RefusedError
from pituning.experts import Expert, ExpertCard
from pituning.interpolation import GRANULARITIES, TRAIN_MODES, build_mixture, collapse, group_names
from pituning.interpolation.collapse import truncate
from pituning.interpolation.mixture import lora_tensors
from pituning.methods import initial_tensors, make_config
from tests.interpolation.test_mixture import COMBINATIONS

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
PREFIX = "base_model.model."
CARD = ExpertCard("blend", training={"family": "encoder"})


class Away(Tensor):
    """Stands in for a tensor on a GPU."""

    def to(self, *arguments: Any, **options: Any) -> Tensor:  # type: ignore[override]
        assert arguments == ("cpu",)
        return self.as_subclass(Tensor).to(*arguments, **options)


combinations = st.sampled_from(COMBINATIONS)
dtypes = st.sampled_from((torch.float32, torch.float64))
seeds = st.integers(0, 10_000)


def trained_looking(
    backbone: Backbone, experts: list[Expert], train: str, granularity: str, seed: int
) -> tuple[Any, dict[str, Any]]:
    """A mixture whose α, and whatever else its mode trains, have moved by random steps."""
    initial = None
    if train == "shared" and experts[0].config["peft_type"] == "LORA":
        modules = sorted({k.removeprefix(PREFIX).split(".lora_")[0] for e in experts for k in e.tensors})
        initial = initial_tensors(backbone, make_config("lora", backbone, r=2, target_modules=modules))
    mixture, config = build_mixture(experts, train=train, granularity=granularity, initial=initial)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in mixture.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
                parameter.add_((0.5 if name == "alpha" else 0.05) * noise)
    return mixture, config


@given(
    combination=combinations, dtype=dtypes, count=st.integers(1, 4),
    train=st.sampled_from(TRAIN_MODES), granularity=st.sampled_from(GRANULARITIES), seed=seeds,
)  # fmt: skip
def test_the_collapsed_expert_is_the_mixture(
    backbone_of: Any, random_experts: Any, random_examples: Any, attached_loss: Any, mixture_loss: Any, distance: Any,
    combination: tuple[str, str], dtype: torch.dtype, count: int, train: str, granularity: str, seed: int,
) -> None:  # fmt: skip
    backbone = backbone_of(combination[0], dtype)
    experts = random_experts(backbone, combination[1], count, seed)
    examples = random_examples(5, seed)
    mixture, config = trained_looking(backbone, experts, train, granularity, seed)
    folded = collapse(mixture, config, CARD)
    found = attached_loss(backbone, folded.expert, examples)
    expected = mixture_loss(backbone, mixture, config, examples)
    assert distance(found, expected) <= TOLERANCE[dtype]
    if count == 1 and train == "none":
        assert torch.equal(found, attached_loss(backbone, experts[0], examples))
    assert set(folded.errors.values()) == {0.0}
    assert {f"{PREFIX}{g}" for g in group_names(experts, "module")} == set(folded.errors)
    assert folded.expert.card.parameters == sum(t.numel() for t in folded.expert.tensors.values())
    folded.expert.verify(backbone)


@given(combination=combinations, dtype=dtypes, count=st.integers(1, 3), seed=seeds)
def test_saved_and_loaded_it_is_the_same_bits(
    backbone_of: Any, random_experts: Any, random_examples: Any, attached_loss: Any, tmp_path_factory: Any,
    combination: tuple[str, str], dtype: torch.dtype, count: int, seed: int,
) -> None:  # fmt: skip
    backbone = backbone_of(combination[0], dtype)
    experts = random_experts(backbone, combination[1], count, seed)
    mixture, config = trained_looking(backbone, experts, "experts", "module", seed)
    expert = collapse(mixture, config, replace(CARD, fingerprint=backbone.fingerprint)).expert
    folder: Path = tmp_path_factory.mktemp("experts") / "blend"
    loaded = Expert.load(expert.save(folder))
    assert loaded.tensors.keys() == expert.tensors.keys()
    for key, tensor in expert.tensors.items():
        assert loaded.tensors[key].dtype == tensor.dtype == dtype
        assert torch.equal(loaded.tensors[key], tensor)
    assert (loaded.config, loaded.card) == (expert.config, expert.card)
    examples = random_examples(4, seed)
    assert torch.equal(attached_loss(backbone, loaded, examples), attached_loss(backbone, expert, examples))


@given(dtype=dtypes, count=st.integers(1, 4), rank=st.integers(1, 20), seed=seeds)
def test_truncation_is_the_dense_svds(
    backbone_of: Any, random_experts: Any, lora_deltas: Any, distance: Any,
    dtype: torch.dtype, count: int, rank: int, seed: int,
) -> None:  # fmt: skip
    """Eckart–Young: no matrix of that rank is nearer than the dense SVD's; the reported error is the dense one."""
    backbone = backbone_of("encoder", dtype)
    experts = random_experts(backbone, "lora", count, seed)
    weights = torch.softmax(torch.randn(count, generator=torch.Generator().manual_seed(seed)).double(), 0)
    mixture, config = build_mixture(experts, weights, train="none", granularity="model")
    folded = collapse(mixture, config, CARD, rank=rank)
    found = lora_deltas(folded.expert)
    dense: dict[str, Tensor] = {}
    for weight, expert in zip(weights, experts, strict=True):
        for module, delta in lora_deltas(expert).items():
            dense[module] = dense.get(module, torch.zeros_like(delta)) + weight * delta
    assert found.keys() == dense.keys()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for module, delta in dense.items():
        u, s, vt = torch.linalg.svd(delta, full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        gap = float((s[rank - 1] - s[rank]) / s[0]) if rank < len(s) and s[rank] > 1e-9 * s[0] else 1.0
        assert float((found[module] - best).norm() / delta.norm()) <= tolerance / max(gap, 1e-3)
        error = float((delta - best).norm() / delta.norm())
        assert folded.errors[f"{PREFIX}{module}"] == pytest.approx(error, abs=10 * tolerance)
        assert float((delta - found[module]).norm() / delta.norm()) == pytest.approx(error, abs=10 * tolerance)
        assert len(folded.expert.tensors[f"{PREFIX}{module}.lora_A.weight"]) <= rank
    folded.expert.verify(backbone)


def test_a_truncated_expert_runs_as_its_dense_self(
    backbone_of: Any, random_experts: Any, random_examples: Any, attached_loss: Any, with_deltas: Any, lora_deltas: Any,
    distance: Any,
) -> None:  # fmt: skip
    backbone = backbone_of("seq2seq", torch.float64)
    experts = random_experts(backbone, "lora", 3, 7)
    mixture, config = build_mixture(experts, [0.2, 0.3, 0.5], train="none")
    expert = collapse(mixture, config, CARD, rank=2).expert
    dense: dict[str, Tensor] = {}
    for weight, member in zip((0.2, 0.3, 0.5), experts, strict=True):
        for module, delta in lora_deltas(member).items():
            dense[module] = dense.get(module, torch.zeros_like(delta)) + weight * delta
    for module, delta in dense.items():
        u, s, vt = torch.linalg.svd(delta)
        dense[module] = (u[:, :2] * s[:2]) @ vt[:2]
    batch = backbone.collate(random_examples(5, 7))
    with torch.no_grad(), with_deltas(backbone, dense):
        expected = backbone.loss(batch)
    assert distance(attached_loss(backbone, expert, random_examples(5, 7)), expected) <= 1e-11


def test_truncate_of_nothing_is_nothing() -> None:
    a, b, error = truncate(torch.randn(3, 5), torch.zeros(4, 3), 2)
    assert (a.shape, b.shape, error) == ((2, 5), (4, 2), 0.0)
    assert not (b @ a).any()


def test_collapsing_changes_nothing_in_the_experts(bert: Backbone, random_experts: Any) -> None:
    experts = random_experts(bert, "bottleneck", 2, 8)
    before = [{k: t.clone() for k, t in e.tensors.items()} for e in experts]
    mixture, config = build_mixture(experts, train="none")
    expert = collapse(mixture, config, CARD).expert
    for tensor in expert.tensors.values():
        tensor.zero_()
    assert all(torch.equal(t, b[k]) for e, b in zip(experts, before, strict=True) for k, t in e.tensors.items())
    assert any(t.any() for t in mixture().values())


@pytest.mark.parametrize(("method", "options"), [("lora", {}), ("lora", {"rank": 1}), ("bottleneck", {})])
def test_values_that_are_not_finite_are_refused_by_name(
    bert: Backbone, random_expert: Any, method: str, options: dict[str, Any]
) -> None:
    expert = random_expert(bert, method, 1)
    key = next(k for k in expert.tensors if k.endswith(("lora_A.weight", "bottleneck_down.weight")))
    spoilt = {**expert.tensors, key: torch.full_like(expert.tensors[key], float("nan"))}
    mixture, config = build_mixture([expert, replace(expert, tensors=spoilt)], train="none")
    with pytest.raises(RefusedError, match=rf"the fold into expert 'blend' has no finite result[^\0]*tensor {key} \["):
        collapse(mixture, config, CARD, **options)


def test_ranks_are_refused_where_there_are_none(bert: Backbone, random_experts: Any) -> None:
    mixture, config = build_mixture(random_experts(bert, "bottleneck", 2, 9), train="none")
    with pytest.raises(RefusedError, match="rank applies to LoRA experts only"):
        collapse(mixture, config, CARD, rank=2)
    mixture, config = build_mixture(random_experts(bert, "lora", 2, 9), train="none")
    with pytest.raises(RefusedError, match="rank must be at least 1, not 0"):
        collapse(mixture, config, CARD, rank=0)


@pytest.mark.parametrize("rank", [None, 2])
def test_the_result_is_on_the_cpu(
    bert: Backbone, random_experts: Any, monkeypatch: pytest.MonkeyPatch, rank: int | None
) -> None:
    """Experts of a pool are, and go together with it."""
    mixture, config = build_mixture(random_experts(bert, "lora", 2, 3), train="none")
    expected = collapse(mixture, config, CARD, rank).expert.tensors

    def away(factors: Any) -> dict[str, Tensor]:
        return {key: tensor.as_subclass(Away) for key, tensor in lora_tensors(factors).items()}

    for module in ("mixture", "collapse"):
        monkeypatch.setattr(sys.modules[f"pituning.interpolation.{module}"], "lora_tensors", away)
    found = collapse(mixture, config, CARD, rank).expert.tensors
    assert {type(tensor) for tensor in found.values()} == {Tensor}
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
