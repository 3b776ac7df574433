"""Untrained merges against loops over single entries, written out here; what comes back from disk through plain PEFT."""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel

import pituning.methods  # noqa: F401 - enters the project's methods into PEFT
from pituning.backbones.base import Backbone
from pituning.errors import BackboneMismatchError, ExpertError, RefusedError, UnknownNameError
from pituning.experts import Expert
from pituning.experts.expert import tensor_hash
from pituning.interpolation.build import common_start
from pituning.interpolation.operators import OPERATORS, merge, needs_initial, operator_settings
from pituning.methods import initial_tensors
from pituning.similarity import TaskEmbedding

Array = np.ndarray[Any, np.dtype[np.float64]]
Arrays = dict[str, Array]

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
PREFIX = "base_model.model."
FULL = 64  # a rank that no module of the tiny backbones reaches

counts = st.sampled_from((1, 2, 5))
dtypes = st.sampled_from((torch.float32, torch.float64))
seeds = st.integers(0, 10_000)
methods = st.sampled_from(("lora", "bottleneck", "bitfit"))


class Case:
    """Random experts with what they change, as arrays by module (LoRA: ΔW) or tensor, and a start to add it to."""

    def __init__(
        self, backbone: Backbone, experts: list[Expert], deltas: Callable[[Expert], Mapping[str, torch.Tensor]]
    ):
        self.experts, self.deltas = experts, deltas
        self.lora = experts[0].card.method == "lora"
        self.initial = None if self.lora else initial_tensors(backbone, experts[0].config)
        self.start = {} if self.initial is None else {k: t.double().numpy() for k, t in self.initial.items()}

    def changes(self, expert: Expert) -> Arrays:
        if self.lora:
            return {name: delta.numpy() for name, delta in self.deltas(expert).items()}
        return {k: t.double().numpy() - self.start[k] for k, t in expert.tensors.items()}

    def stacks(self) -> dict[str, list[Array]]:
        """The experts' changes by name; zeros where an expert does not adapt a module."""
        every = [self.changes(e) for e in self.experts]
        shapes = {name: array.shape for changes in every for name, array in changes.items()}
        return {name: [c.get(name, np.zeros(shape)) for c in every] for name, shape in shapes.items()}

    def settings(self, operator: str, **settings: Any) -> dict[str, Any]:
        """With what the method needs beside them: a rank that cuts nothing off, or the start."""
        known = operator_settings(operator)
        extra = {"rank": FULL} if self.lora else {"initial": self.initial}
        return {**{k: v for k, v in extra.items() if k in known}, **settings}

    def assert_changes(self, found: Expert, expected: Arrays) -> None:
        tolerance = TOLERANCE[next(iter(found.tensors.values())).dtype]
        changes = self.changes(found)
        assert changes.keys() == expected.keys()
        for name, array in expected.items():
            scale = np.linalg.norm(array + self.start.get(name, 0.0)) or 1.0
            assert np.linalg.norm(changes[name] - array) <= tolerance * scale, name


@pytest.fixture(scope="module")
def case(backbone_of: Any, random_experts: Any, lora_deltas: Any) -> Callable[..., Case]:
    def make(method: str, count: int, seed: int, dtype: torch.dtype = torch.float64, family: str = "encoder") -> Case:
        backbone = backbone_of(family, dtype)
        return Case(backbone, random_experts(backbone, method, count, seed), lora_deltas)

    return make


def signed(count: int, seed: int) -> list[float]:
    rng = random.Random(seed)
    return [rng.choice((-1, 1)) * rng.uniform(0.2, 1.5) for _ in range(count)]


def slow_sum(stack: Sequence[Array], weights: Sequence[float]) -> Array:
    total = np.zeros_like(stack[0])
    for index in np.ndindex(*total.shape):
        for weight, array in zip(weights, stack, strict=True):
            total[index] += weight * array[index]
    return total


def slow_ties(stack: Sequence[Array], weights: Sequence[float], density: float) -> Array:
    """Algorithm 1 of the paper, entry by entry."""
    trimmed = []
    for array in stack:
        smallest = sorted((abs(x) for x in array.flat), reverse=True)[max(1, round(density * array.size)) - 1]
        trimmed.append(np.vectorize(lambda x, s=smallest: x if abs(x) >= s else 0.0)(array))
    merged = np.zeros_like(stack[0])
    for index in np.ndindex(*merged.shape):
        mass = sum(w * t[index] for w, t in zip(weights, trimmed, strict=True))
        agreeing = [(w, t[index]) for w, t in zip(weights, trimmed, strict=True) if w and t[index] * mass > 0]
        if agreeing:
            merged[index] = sum(w * x for w, x in agreeing) / sum(w for w, _ in agreeing)
    return merged


def masks(case: Case, drop: float, seed: int) -> list[Arrays]:
    """1 where DARE keeps an entry, as seen on each expert alone."""
    found = []
    for expert in case.experts:
        alone = case.changes(merge([expert], "dare", **case.settings("dare", drop=drop, seed=seed)).expert)
        kept = {}
        for name, change in case.changes(expert).items():
            kept[name] = (abs(alone[name]) > 1e-6 * abs(change).max()).astype(float)
        found.append(kept)
    return found


def dropped_stacks(case: Case, drop: float, seed: int) -> dict[str, list[Array]]:
    kept = masks(case, drop, seed)
    return {
        name: [a * m.get(name, 0.0) / (1 - drop) for a, m in zip(stack, kept, strict=True)]
        for name, stack in case.stacks().items()
    }


@given(method=methods, count=counts, dtype=dtypes, seed=seeds)
def test_sums_are_the_dense_sums(case: Any, method: str, count: int, dtype: torch.dtype, seed: int) -> None:
    found = case(method, count, seed, dtype)
    weights, scale = signed(count, seed), 0.3 + seed % 5
    stacks = found.stacks()
    soup = merge(found.experts, "uniform_soup")
    found.assert_changes(soup.expert, {n: slow_sum(s, [1 / count] * count) for n, s in stacks.items()})
    added = merge(
        found.experts,
        "task_arithmetic",
        weights=weights,
        scale=scale,
        **({} if found.lora else {"initial": found.initial}),
    )
    found.assert_changes(added.expert, {n: slow_sum(s, [scale * w for w in weights]) for n, s in stacks.items()})
    results = [soup, added]
    if found.lora:
        joined = merge(found.experts, "concatenate", weights=weights)
        found.assert_changes(joined.expert, {n: slow_sum(s, weights) for n, s in stacks.items()})
        for key in joined.expert.tensors:
            if key.endswith("lora_A.weight") and count > 1:
                ranks = [len(e.tensors[key]) for e in found.experts if key in e.tensors]
                assert len(joined.expert.tensors[key]) == sum(ranks)
        results.append(joined)
    for result in results:
        assert set(result.errors.values()) == {0.0}
        assert {t.dtype for t in result.expert.tensors.values()} == {dtype}


@given(method=methods, count=counts, dtype=dtypes, density=st.sampled_from((0.05, 0.2, 0.63, 1.0)), seed=seeds)
def test_ties_is_the_papers_algorithm(
    case: Any, method: str, count: int, dtype: torch.dtype, density: float, seed: int
) -> None:
    found = case(method, count, seed, dtype)
    weights, scale = [abs(w) for w in signed(count, seed)], 0.7
    expected = {n: scale * slow_ties(s, weights, density) for n, s in found.stacks().items()}
    settings = found.settings("ties", density=density, weights=weights, scale=scale)
    found.assert_changes(merge(found.experts, "ties", **settings).expert, expected)


@given(method=methods, count=counts, dtype=dtypes, drop=st.sampled_from((0.1, 0.5, 0.9)), seed=seeds)
def test_dare_drops_scales_up_and_combines(
    case: Any, method: str, count: int, dtype: torch.dtype, drop: float, seed: int
) -> None:
    found = case(method, count, seed, dtype)
    weights = signed(count, seed)
    stacks = dropped_stacks(found, drop, seed)
    linear = merge(found.experts, "dare", **found.settings("dare", drop=drop, seed=seed, weights=weights, scale=0.4))
    found.assert_changes(linear.expert, {n: slow_sum(s, [0.4 * w for w in weights]) for n, s in stacks.items()})
    shares = [abs(w) for w in weights]
    for density in (None, 0.3):
        settings = found.settings("dare", drop=drop, seed=seed, weights=shares, combine="ties", density=density)
        expected = {n: slow_ties(s, shares, density or 1.0) for n, s in stacks.items()}
        found.assert_changes(merge(found.experts, "dare", **settings).expert, expected)


def embedding(expert: Expert, seed: int, **changes: Any) -> TaskEmbedding:
    """Random Fisher tensors with some zeros, made at the expert."""
    generator = torch.Generator().manual_seed(seed)
    fisher = {}
    for key, tensor in expert.tensors.items():
        drawn = torch.rand(tensor.shape, generator=generator) ** 4
        fisher[key] = drawn * (drawn > 1e-3) * (key != next(iter(expert.tensors)))
    values = {
        "fisher": fisher, "task": expert.card.task, "samples": 8, "labels": "true", "reference": "own",
        "reference_hash": tensor_hash(expert.tensors), "mean_loss": 1.0, "split_half": 0.9, **changes,
    }  # fmt: skip
    return TaskEmbedding(**values)


@given(method=methods, count=counts, dtype=dtypes, seed=seeds)
def test_fisher_merge_weighs_every_entry(
    backbone_of: Any, random_expert: Any, method: str, count: int, dtype: torch.dtype, seed: int
) -> None:
    backbone = backbone_of("encoder", dtype)
    experts = [random_expert(backbone, method, 100 * seed + k) for k in range(count)]
    embeddings = {e.name: embedding(e, seed + k) for k, e in enumerate(experts)}
    weights, epsilon = [abs(w) for w in signed(count, seed)], 10.0 ** -random.Random(seed).randint(1, 8)
    found = merge(experts, "fisher_merge", embeddings=embeddings, weights=weights, epsilon=epsilon).expert
    assert found.tensors.keys() == experts[0].tensors.keys()
    for key, tensor in found.tensors.items():
        fishers = [embeddings[e.name].fisher[key].double().numpy() for e in experts]
        values = [e.tensors[key].double().numpy() for e in experts]
        floor = epsilon * sum(f.sum() for f in fishers) / (count * tensor.numel())
        expected = np.zeros(tensor.shape)
        for index in np.ndindex(*tensor.shape):
            trust = [w * (f[index] + floor if floor else 1.0) for w, f in zip(weights, fishers, strict=True)]
            expected[index] = sum(t * v[index] for t, v in zip(trust, values, strict=True)) / sum(trust)
        assert np.linalg.norm(tensor.double().numpy() - expected) <= TOLERANCE[dtype] * np.linalg.norm(expected)


def pool_loss(case: Case, seed: int) -> Callable[[Expert], float]:
    """A loss that a blend of some experts may lower: the distance to a random mixture of them."""
    rng = np.random.default_rng(seed)
    target = {name: slow_sum(s, list(rng.normal(0.4, 0.5, len(s)))) for name, s in case.stacks().items()}

    def loss(expert: Expert) -> float:
        changes = case.changes(expert)
        return sum(float(np.square(changes.get(n, 0.0) - a).sum()) for n, a in target.items())

    return loss


@given(method=methods, count=counts, seed=seeds)
def test_greedy_soup_keeps_what_lowers_the_loss(case: Any, method: str, count: int, seed: int) -> None:
    found = case(method, count, seed)
    loss = pool_loss(found, seed)
    own = {e.name: loss(e) for e in found.experts}
    members: list[Expert] = []
    best = math.inf
    for name in sorted(own, key=lambda n: own[n]):
        trial = [*members, next(e for e in found.experts if e.name == name)]
        value = loss(trial[0] if len(trial) == 1 else merge(trial, "uniform_soup").expert)
        if value < best:
            members, best = trial, value
    soup = merge(found.experts, "greedy_soup", score=loss).expert
    assert [p["name"] for p in soup.card.lineage] == [e.name for e in members]
    assert loss(soup) == pytest.approx(best, rel=1e-9)
    assert loss(soup) <= min(own.values()) * (1 + 1e-9)
    assert soup.card.training["log_losses"] == own
    assert soup.card.training["soup_log_loss"] == pytest.approx(best, rel=1e-9)


def test_greedy_soups_are_scored_at_the_rank_of_the_result(case: Any) -> None:
    found = case("lora", 5, 3)
    seen: list[Expert] = []

    def loss(expert: Expert) -> float:
        seen.append(expert)
        return pool_loss(found, 3)(expert)

    soup = merge(found.experts, "greedy_soup", score=loss, rank=2).expert
    tried = [e for e in seen if e.name == "greedy_soup"]
    assert tried
    assert all(len(t) <= 2 for e in (*tried, soup) for k, t in e.tensors.items() if "lora_A" in k)


class TestIdentities:
    @given(method=methods, dtype=dtypes, seed=seeds)
    def test_one_expert_comes_back(self, case: Any, method: str, dtype: torch.dtype, seed: int) -> None:
        found = case(method, 1, seed, dtype)
        (expert,) = found.experts
        exact = ["uniform_soup", "task_arithmetic"] + ["concatenate"] * found.lora
        for operator in exact:
            same = merge([expert], operator).expert
            assert same.config == expert.config
            assert same.tensors.keys() == expert.tensors.keys()
            assert all(torch.equal(t, expert.tensors[k]) for k, t in same.tensors.items())
        for operator, settings in (("ties", {"density": 1.0}), ("dare", {"drop": 0.0})):
            again = merge([expert], operator, **found.settings(operator, **settings))
            found.assert_changes(again.expert, found.changes(expert))
        embeddings = {expert.name: embedding(expert, seed)}
        found.assert_changes(merge([expert], "fisher_merge", embeddings=embeddings).expert, found.changes(expert))

    @given(method=methods, dtype=dtypes, count=st.integers(2, 4), seed=seeds)
    def test_all_the_weight_on_one(self, case: Any, method: str, dtype: torch.dtype, count: int, seed: int) -> None:
        found = case(method, count, seed, dtype)
        chosen = found.experts[seed % count]
        weights = [float(e is chosen) for e in found.experts]
        held = found.changes(chosen)
        expected = {n: held.get(n, np.zeros_like(s[0])) for n, s in found.stacks().items()}
        alone = merge(found.experts, "task_arithmetic", weights=weights).expert
        assert all(torch.equal(t, chosen.tensors[k]) for k, t in alone.tensors.items())
        assert alone.tensors.keys() == chosen.tensors.keys()
        for operator, settings in (("ties", {"density": 1.0}), ("dare", {"drop": 0.0})):
            result = merge(found.experts, operator, **found.settings(operator, weights=weights, **settings))
            found.assert_changes(result.expert, expected)

    @given(method=methods, dtype=dtypes, count=st.integers(2, 4), seed=seeds)
    def test_the_order_of_experts_and_tensors_is_nothing(
        self, case: Any, method: str, dtype: torch.dtype, count: int, seed: int
    ) -> None:
        found = case(method, count, seed, dtype)
        weights = [abs(w) for w in signed(count, seed)]
        order = random.Random(seed).sample(range(count), count)
        mixed = [replace(found.experts[i], tensors=dict(reversed(found.experts[i].tensors.items()))) for i in order]
        for operator, settings in (
            ("task_arithmetic", {"scale": 0.4}), ("ties", {"density": 0.3}), ("dare", {"drop": 0.4, "seed": seed}),
            ("dare", {"drop": 0.4, "combine": "ties"}), ("uniform_soup", {}),
            ("greedy_soup", {"score": pool_loss(found, seed)}),
        ):  # fmt: skip
            settings = found.settings(operator, **settings)
            ordered = dict(settings)
            if "weights" in operator_settings(operator):
                settings["weights"], ordered["weights"] = weights, [weights[i] for i in order]
            first = merge(found.experts, operator, **settings).expert
            found.assert_changes(merge(mixed, operator, **ordered).expert, found.changes(first))

    @given(dtype=dtypes, count=st.integers(2, 5), seed=seeds)
    def test_ties_of_equal_signs_is_the_mean(self, case: Any, dtype: torch.dtype, count: int, seed: int) -> None:
        found = case("bitfit", count, seed, dtype)
        signs = {k: t.sign() for k, t in found.experts[0].tensors.items()}
        found.experts = [
            replace(e, tensors={k: t.abs() * signs[k] for k, t in e.tensors.items()}) for e in found.experts
        ]
        mean = merge(found.experts, "uniform_soup").expert
        found.assert_changes(merge(found.experts, "ties", density=1.0).expert, found.changes(mean))

    @given(method=methods, count=counts, dtype=dtypes, seed=seeds)
    def test_dare_without_dropping_is_plain(
        self, case: Any, method: str, count: int, dtype: torch.dtype, seed: int
    ) -> None:
        found = case(method, count, seed, dtype)
        weights = [abs(w) for w in signed(count, seed)]
        for combine, plain, settings in (("linear", "task_arithmetic", {}), ("ties", "ties", {"density": 0.3})):
            shared = {"weights": weights, "scale": 0.6, **settings}
            dropped = merge(found.experts, "dare", **found.settings("dare", drop=0.0, combine=combine, **shared))
            expected = merge(found.experts, plain, **found.settings(plain, **shared))
            found.assert_changes(dropped.expert, found.changes(expected.expert))


def test_dares_masks_are_random_and_right_on_average(case: Any) -> None:
    found = case("bottleneck", 2, 1)
    kept = masks(found, 0.7, 5)
    share = float(np.concatenate([m.ravel() for mask in kept for m in mask.values()]).mean())
    entries = sum(m.size for mask in kept for m in mask.values())
    assert abs(share - 0.3) < 4 * math.sqrt(0.3 * 0.7 / entries)
    largest = max(kept[0], key=lambda k: kept[0][k].size)
    others = [kept[1][largest], masks(found, 0.7, 6)[0][largest]]
    others += [m for k, m in kept[0].items() if k != largest and m.shape == kept[0][largest].shape]
    assert len(others) > 2
    assert all((m != kept[0][largest]).any() for m in others), "other experts, seeds and tensors have other masks"
    renamed = found.experts[1].with_card(name=found.experts[0].name)
    alike = merge([renamed], "dare", **found.settings("dare", drop=0.7, seed=5)).expert
    assert ((found.changes(alike)[largest] != 0) == (kept[0][largest] != 0)).all(), "the expert's name says the mask"


@pytest.mark.parametrize("operator", ["uniform_soup", "task_arithmetic", "ties", "dare"])
@pytest.mark.parametrize("rank", [None, 1, 3])
def test_the_reported_error_is_that_of_the_dense_svd(case: Any, operator: str, rank: int | None) -> None:
    found = case("lora", 3, 11)
    exact = found.changes(merge(found.experts, operator, **found.settings(operator)).expert)
    result = merge(found.experts, operator, rank=rank)
    changes = found.changes(result.expert)
    assert {name.removeprefix(PREFIX) for name in result.errors} == exact.keys()
    for name, array in exact.items():
        error, kept = result.errors[PREFIX + name], len(result.expert.tensors[f"{PREFIX}{name}.lora_A.weight"])
        held = [len(e.tensors[k]) for e in found.experts if (k := f"{PREFIX}{name}.lora_A.weight") in e.tensors]
        limit = sum(held) if rank is None else rank
        assert kept <= limit
        values = np.linalg.svd(array, compute_uv=False)
        assert error == pytest.approx(np.linalg.norm(values[limit:]) / np.linalg.norm(values), abs=1e-9)
        assert np.linalg.norm(changes[name] - array) / np.linalg.norm(array) == pytest.approx(error, abs=1e-9)
    assert (max(result.errors.values()) > 0.01) == (rank is not None or operator in ("ties", "dare"))


def result_of(operator: str, case: Case) -> Expert:
    needed: dict[str, dict[str, Any]] = {
        "greedy_soup": {"score": pool_loss(case, 4)},
        "fisher_merge": {"embeddings": {e.name: embedding(e, 7) for e in case.experts}},
        "dare": {"drop": 0.5},
    }
    settings = needed.get(operator, {})
    if not case.lora and "initial" in operator_settings(operator):
        settings["initial"] = case.initial
    return merge(case.experts, operator, **settings).expert


@pytest.mark.parametrize("operator", sorted(OPERATORS))
@pytest.mark.parametrize("family", ["encoder", "seq2seq"])
def test_plain_peft_reads_a_lora_result(
    case: Any, backbone_of: Any, random_expert: Any, tmp_path: Path, family: str, operator: str
) -> None:
    """Every tensor of the file arrives, and every module adds the same ΔW."""
    found = case("lora", 3, 2, family=family)
    backbone = backbone_of(family, torch.float64)
    if operator == "fisher_merge":
        found.experts = [random_expert(backbone, "lora", k) for k in range(3)]
    result = result_of(operator, found)
    folder = result.save(tmp_path / "merged")
    model = PeftModel.from_pretrained(copy.deepcopy(backbone.model), folder, autocast_adapter_dtype=False)
    live = {n: p for n, p in model.named_parameters() if ".lora_" in n}
    assert {n.replace(".default", "") for n in live} == result.tensors.keys()
    assert all(torch.equal(p, result.tensors[n.replace(".default", "")]) for n, p in live.items())
    layers = {n.removeprefix(PREFIX): m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    expected = found.changes(result)
    assert layers.keys() == expected.keys()
    for name, layer in layers.items():
        difference = layer.get_delta_weight("default").detach().numpy() - expected[name]
        assert np.linalg.norm(difference) <= 1e-12 * np.linalg.norm(expected[name])
    assert Expert.load(folder).card == result.card


@pytest.mark.parametrize("operator", sorted(OPERATORS.keys() - {"concatenate"}))
@pytest.mark.parametrize("method", ["bottleneck", "bitfit"])
def test_peft_reads_the_results_of_other_methods(
    case: Any, backbone_of: Any, tmp_path: Path, method: str, operator: str
) -> None:
    found = case(method, 3, 2)
    result = result_of(operator, found)
    folder = result.save(tmp_path / "merged")
    bare = copy.deepcopy(backbone_of("encoder", torch.float64).model)
    model = PeftModel.from_pretrained(bare, folder, autocast_adapter_dtype=False)
    live = {n.replace(".default", ""): p for n, p in model.named_parameters() if f"{method}_" in n}
    assert live.keys() == result.tensors.keys()
    assert all(torch.equal(p, result.tensors[n]) for n, p in live.items())


def test_a_prefix_is_merged_around_its_start(case: Any) -> None:
    found = case("prefix", 2, 3, family="ofa")
    expected = {n: slow_ties(s, [1, 1], 0.4) for n, s in found.stacks().items()}
    found.assert_changes(merge(found.experts, "ties", density=0.4, initial=found.initial).expert, expected)


def test_ia3_scales_around_one(bert: Backbone, random_expert: Any) -> None:
    """IA3 multiplies, so an expert that changes nothing holds ones."""
    experts = []
    for seed in (1, 2):
        expert = random_expert(bert, "bitfit", seed)
        tensors = {k.replace("bitfit_bias", "ia3_l"): 1 + t for k, t in expert.tensors.items()}
        experts.append(replace(expert, tensors=tensors, config={"peft_type": "IA3"}))
    found = merge(experts, "task_arithmetic", scale=0.3).expert
    for key, tensor in found.tensors.items():
        first, second = (e.tensors[key] for e in experts)
        torch.testing.assert_close(tensor, 1 + 0.3 * (first - 1) + 0.3 * (second - 1))


def test_lora_biases_are_scaled_and_added(bert: Backbone, random_expert: Any, tmp_path: Path) -> None:
    plain = random_expert(bert, "lora", 3, target_modules=["query", "key"])
    biased = []
    for seed, alpha in ((1, 6), (2, 5)):
        expert = random_expert(bert, "lora", seed, r=2, lora_alpha=alpha, target_modules=["query"])
        generator = torch.Generator().manual_seed(seed)
        columns = {k: t for k, t in expert.tensors.items() if "lora_B" in k}
        biases = {k.replace("weight", "bias"): torch.randn(len(t), generator=generator) for k, t in columns.items()}
        biased.append(
            replace(expert, tensors={**expert.tensors, **biases}, config={**expert.config, "lora_bias": True})
        )
    key = next(k for k in biased[0].tensors if k.endswith("lora_B.bias"))
    first, second = (e.config["lora_alpha"] / 2 * e.tensors[key].double() for e in biased)
    for operator, settings, expected in (
        ("task_arithmetic", {"weights": [2.0, -0.5, 1.0]}, 2 * first - 0.5 * second),
        ("ties", {"density": 1.0, "weights": [1.0, 0.0, 1.0]}, first),
    ):
        result = merge([*biased, plain], operator, **settings).expert
        torch.testing.assert_close(result.tensors[key].double(), expected, rtol=1e-6, atol=1e-7)
        result.save(tmp_path / operator)
        model = PeftModel.from_pretrained(copy.deepcopy(bert.model), tmp_path / operator)
        live = {n.replace(".default", ""): p for n, p in model.named_parameters() if ".lora_" in n}
        assert live.keys() == result.tensors.keys()


def test_half_precision_experts_merge_in_single(case: Any) -> None:
    found = case("bottleneck", 3, 4, torch.float32)
    halves = [replace(e, tensors={k: t.bfloat16() for k, t in e.tensors.items()}) for e in found.experts]
    result = merge(halves, "uniform_soup").expert
    for key, tensor in result.tensors.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, torch.stack([e.tensors[key].float() for e in halves]).mean(0))


def test_the_card_tells_how_to_make_it_again(case: Any) -> None:
    found = case("lora", 2, 5)
    settings = {"density": 0.4, "weights": [0.6, 1.8], "scale": 0.5, "rank": 3}
    merged = merge(found.experts, "ties", **settings)
    result, card = merged.expert, merged.expert.card
    assert card.lineage == tuple(
        {"name": e.name, "weight": w} for e, w in zip(found.experts, (0.25, 0.75), strict=True)
    )
    made = {"operator": "ties", "density": 0.4, "scale": 0.5, "rank": 3, "largest_error": max(merged.errors.values())}
    assert card.training == {"family": "encoder", **made}
    assert (card.method, card.fingerprint) == ("lora", found.experts[0].card.fingerprint)
    assert (card.task, card.metrics, card.init_hash) == ("", {}, "")
    assert card.parameters == sum(t.numel() for t in result.tensors.values())


def test_a_start_is_taken_to_where_the_experts_are(bert: Backbone, random_expert: Any) -> None:
    """A start comes from the backbone, on whose device it is, and experts from the pool's files; here one is no real place."""
    expert = random_expert(bert, "bottleneck", 1)
    start = initial_tensors(bert, expert.config)
    elsewhere = replace(expert, tensors={k: t.to("meta") for k, t in expert.tensors.items()})
    found = common_start([elsewhere], start)
    assert {t.device.type for t in found.values()} == {"meta"}
    assert all(found[k].shape == t.shape for k, t in expert.tensors.items())


def test_only_tensors_in_the_experts_coordinates_keep_their_start(bert: Backbone, random_expert: Any) -> None:
    """Stacked factors are another space than [A, B] of the experts; averaged tensors are not."""
    low = [random_expert(bert, "lora", k) for k in (1, 2)]
    wide = [random_expert(bert, "bottleneck", k) for k in (1, 2)]
    assert low[0].card.init_hash == low[1].card.init_hash != ""
    assert merge(low, "uniform_soup").expert.card.init_hash == ""
    assert merge(low[:1], "uniform_soup").expert.card.init_hash == low[0].card.init_hash
    assert merge(wide, "uniform_soup").expert.card.init_hash == wide[0].card.init_hash


def test_nothing_in_the_experts_changes(case: Any) -> None:
    for method, operator in itertools.product(
        ("lora", "bottleneck"), OPERATORS.keys() - {"concatenate", "fisher_merge"}
    ):
        found = case(method, 2, 6)
        before = [{k: t.clone() for k, t in e.tensors.items()} for e in found.experts]
        result_of(operator, found)
        assert all(
            torch.equal(t, b[k]) for e, b in zip(found.experts, before, strict=True) for k, t in e.tensors.items()
        )


class TestRefusals:
    def test_operators_and_settings_that_do_not_exist(self, case: Any, message: Any) -> None:
        experts = case("lora", 2, 1).experts
        assert "did you mean 'ties'?" in message(merge, experts, "tie")
        text = message(merge, experts, "ties", densty=0.3)
        assert "unknown setting of ties 'densty': did you mean 'density'?" in text
        with pytest.raises(UnknownNameError, match="unknown setting of uniform_soup 'weights'"):
            merge(experts, "uniform_soup", weights=[0.5, 0.5])
        with pytest.raises(UnknownNameError, match="unknown combination 'cat'"):
            merge(experts, "dare", combine="cat")
        with pytest.raises(RefusedError, match="greedy_soup needs the setting 'score'"):
            merge(experts, "greedy_soup")

    @pytest.mark.parametrize(
        ("operator", "settings", "expected"),
        [
            ("ties", {"density": 0.0}, "density must be more than 0 and at most 1, not 0.0"),
            ("ties", {"density": 1.2}, "density must be more than 0 and at most 1"),
            ("ties", {"weights": [1.0, -1.0]}, "weights of at least 0, one of them positive"),
            ("ties", {"rank": 0}, "rank must be at least 1, not 0"),
            ("dare", {"drop": 1.0}, "drop must be at least 0 and less than 1, not 1.0"),
            ("dare", {"density": 0.5}, "density is a setting of combine='ties'"),
            (
                "task_arithmetic",
                {"weights": [1.0]},
                "1 weights were given for the 2 experts experts 'lora-100', 'lora-101'",
            ),
            ("task_arithmetic", {"weights": [1.0, math.nan]}, "a weight must be a finite number, not nan"),
            ("task_arithmetic", {"scale": math.inf}, "scale must be a finite number, not inf"),
            ("task_arithmetic", {"scale": 0.0}, "all weights of experts 'lora-100', 'lora-101' are zero"),
            ("fisher_merge", {"embeddings": {}, "epsilon": 0.0}, "epsilon must be positive, not 0"),
            ("greedy_soup", {"score": lambda expert: math.nan}, "score of expert 'lora-100' is NaN"),
        ],
    )
    def test_settings_out_of_range(
        self, case: Any, message: Any, operator: str, settings: dict[str, Any], expected: str
    ) -> None:
        assert expected in message(merge, case("lora", 2, 1).experts, operator, **settings)

    def test_no_experts_and_two_of_one_name(self, case: Any) -> None:
        with pytest.raises(RefusedError, match="at least one expert"):
            merge([], "uniform_soup")
        (expert,) = case("lora", 1, 1).experts
        with pytest.raises(RefusedError, match="two experts are called 'lora-100'"):
            merge([expert, expert], "uniform_soup")

    def test_values_that_are_not_finite(self, case: Any) -> None:
        expert, other = case("bitfit", 2, 1).experts
        key = next(iter(expert.tensors))
        broken = replace(expert, tensors={**expert.tensors, key: expert.tensors[key] * math.nan})
        with pytest.raises(ExpertError, match=r"'bitfit-100'(.|\n)*NaN"):
            merge([other, broken], "ties")

    @pytest.mark.parametrize("method", ["lora", "bottleneck"])
    def test_results_that_are_not_finite(self, case: Any, method: str, message: Any) -> None:
        found = case(method, 2, 1, torch.float32)
        settings = {} if found.lora else {"initial": found.initial}
        key = min(k for k in found.experts[0].tensors if k.endswith(("lora_B.weight", "bottleneck_down.weight")))
        for operator in ("task_arithmetic", "dare"):
            said = message(merge, found.experts, operator, weights=[1e90, 1], **settings)
            assert f"{operator} of experts" in said
            assert "has no finite result" in said
            assert f"tensor {key} [" in said
        for rank in (None, 2) if found.lora else (None,):
            more = {"rank": rank, "scale": 1e308, **settings}
            assert "has no finite result" in message(merge, found.experts, "ties", **more)

    def test_fisher_that_is_not_finite(self, bert: Backbone, random_expert: Any, message: Any) -> None:
        experts = [random_expert(bert, "lora", s) for s in range(2)]
        embeddings = {e.name: embedding(e, 3) for e in experts}
        key = next(iter(experts[1].tensors))
        embeddings[experts[1].name].fisher[key][0, 0] = math.nan
        said = message(merge, experts, "fisher_merge", embeddings=embeddings)
        assert f"the task embedding of expert '{experts[1].name}' is not finite in tensor {key} [" in said

    def test_prompts_that_were_made_differently(self, bert: Backbone, random_expert: Any, message: Any) -> None:
        plain, chat = ({"chat": c, "separator": s} for c, s in ((False, " "), (True, "")))
        experts = [random_expert(bert, "lora", s, name=f"e{s}") for s in range(4)]
        made = [
            e.with_card(training={**e.card.training, **({"prompting": p} if p else {})})
            for e, p in zip(experts, (None, plain, plain, chat), strict=True)
        ]
        said = message(merge, [made[0], made[1], made[3]], "uniform_soup")
        assert (
            "experts 'e1' and 'e3' were trained on differently made prompts (chat=False, separator=' '; chat=True"
            in said
        )
        card = merge(made[:3], "uniform_soup").expert
        assert card.card.training["prompting"] == plain
        with pytest.raises(BackboneMismatchError, match=r"trained on prompts made with chat=False, separator=' '"):
            card.require_backbone(bert)

    def test_different_methods_and_backbones(
        self, bert: Backbone, t5: Backbone, random_expert: Any, message: Any
    ) -> None:
        low = random_expert(bert, "lora", 1, name="low")
        text = message(merge, [low, random_expert(bert, "bitfit", 1, name="bias")], "task_arithmetic")
        assert "'low'" in text
        assert "'bias'" in text
        assert "different methods" in text
        assert "different backbones" in message(merge, [low, random_expert(t5, "lora", 1, name="t5")], "ties")
        foreign = low.with_card(name="foreign", fingerprint="", backbone="another/model")
        text = message(merge, [low, foreign], "ties")
        assert "'low' and 'foreign' name different backbones" in text
        assert "another/model" in text

    def test_settings_of_lora_without_product_form(self, bert: Backbone, random_expert: Any, message: Any) -> None:
        plain, dora = random_expert(bert, "lora", 1), random_expert(bert, "lora", 2, name="dora")
        dora = replace(dora, config={**dora.config, "use_dora": True})
        for operator in ("uniform_soup", "task_arithmetic", "concatenate", "ties", "dare"):
            text = message(merge, [plain, dora], operator)
            assert "'dora' uses use_dora" in text
        assert "'dora' uses use_dora" in message(merge, [dora], "ties")
        alone = merge([dora], "uniform_soup").expert
        assert all(torch.equal(t, dora.tensors[k]) for k, t in alone.tensors.items())

    def test_missing_and_misshaped_tensors(self, case: Any, message: Any) -> None:
        experts = case("lora", 2, 1).experts
        key = next(k for k in experts[0].tensors if "lora_B" in k)
        cut = replace(experts[0], tensors={k: t for k, t in experts[0].tensors.items() if k != key})
        assert f"{key.split('.lora_')[0]} has no lora_B" in message(merge, [cut, experts[1]], "ties")
        wide = replace(experts[0].with_card(name="wide"), tensors={
            k: torch.cat([t, t]) if "lora_B" in k else t for k, t in experts[0].tensors.items()
        })  # fmt: skip
        text = message(merge, [experts[0], wide], "concatenate")
        assert "'lora-100' and 'wide' cannot be merged: ΔW of" in text
        pair = case("bottleneck", 2, 1).experts
        key = next(iter(pair[1].tensors))
        short = replace(pair[1], tensors={k: t for k, t in pair[1].tensors.items() if k != key})
        assert f"tensor {key}" in message(merge, [pair[0], short], "uniform_soup")

    def test_a_start_that_is_not_known(self, case: Any, message: Any) -> None:
        found = case("bottleneck", 2, 1)
        first, second = found.experts
        for operator in ("task_arithmetic", "ties", "dare"):
            assert needs_initial(operator, first)
            assert "initial=" in message(merge, found.experts, operator)
            moved = {k: t + 1 for k, t in found.initial.items()}
            assert "'bottleneck-100'" in message(merge, found.experts, operator, initial=moved)
            foreign = second.with_card(init_hash="")
            assert "'bottleneck-101'" in message(merge, [first, foreign], operator, initial=found.initial)
            few = dict(list(found.initial.items())[1:])
            assert f"{next(iter(found.initial))}: expected" in message(merge, found.experts, operator, initial=few)
        assert not needs_initial("uniform_soup", first)
        assert not needs_initial("ties", case("lora", 1, 1).experts[0])
        assert not needs_initial("ties", case("bitfit", 1, 1).experts[0])
        merge(found.experts, "task_arithmetic", weights=[0.4, 0.6])  # φ_0 cancels

    def test_ranks_and_concatenation_without_lora(self, case: Any, message: Any) -> None:
        found = case("bottleneck", 2, 1)
        for operator in ("uniform_soup", "ties"):
            text = message(merge, found.experts, operator, **{**found.settings(operator), "rank": 2})
            assert "rank applies to LoRA experts only" in text
        assert "'bottleneck-100' is of method 'bottleneck'" in message(merge, found.experts, "concatenate")

    def test_methods_whose_tensors_cannot_be_scaled(self, case: Any, message: Any) -> None:
        (expert,) = case("bottleneck", 1, 1).experts
        product = replace(expert, config={**expert.config, "peft_type": "LOHA"})
        assert "of method 'LOHA'" in message(merge, [product], "task_arithmetic", weights=[0.5])
        assert merge([product], "uniform_soup").expert.tensors == product.tensors

    def test_fisher_without_a_common_factor_space(self, bert: Backbone, random_expert: Any, message: Any) -> None:
        first, second = (random_expert(bert, "lora", k) for k in (1, 2))
        louder = replace(second, config={**second.config, "lora_alpha": 2 * second.config["lora_alpha"]})
        for other, reason in (
            (random_expert(bert, "lora", 2, r=2), "the same A"),
            (second.with_card(init_hash=""), "the same A"),
            (louder, "shape and scaling of"),
        ):
            embeddings = {e.name: embedding(e, 1) for e in (first, other)}
            text = message(merge, [first, other], "fisher_merge", embeddings=embeddings)
            assert "'lora-1' and 'lora-2' have no common factor space" in text
            assert reason in text

    def test_fisher_embeddings_from_elsewhere(self, bert: Backbone, random_expert: Any, message: Any) -> None:
        first, second = (random_expert(bert, "bottleneck", k) for k in (1, 2))
        known = {first.name: embedding(first, 1)}
        text = message(merge, [first, second], "fisher_merge", embeddings=known)
        assert "'bottleneck-2' has no task embedding" in text
        for wrong in (
            embedding(second, 1, reference="shared"),
            embedding(second, 1, reference_hash=tensor_hash(first.tensors)),
        ):
            text = message(merge, [first, second], "fisher_merge", embeddings={**known, second.name: wrong})
            assert "'bottleneck-2' was made at other tensors" in text
        key = next(iter(second.tensors))
        lacking = {k: f for k, f in embedding(second, 1).fisher.items() if k != key}
        wrong = embedding(second, 1, fisher=lacking)
        text = message(merge, [first, second], "fisher_merge", embeddings={**known, second.name: wrong})
        assert key in text
        assert "no such tensor" in text
