"""The invariants of every mixture, as properties over random experts, against sums written out in the test."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from pituning.backbones.base import Backbone
from pituning.errors import ExpertError, RefusedError
from pituning.experts import Expert, ExpertCard
from pituning.interpolation import GRANULARITIES, TRAIN_MODES, build_mixture, group_names
from pituning.interpolation.build import group_name
from pituning.methods import attached, config_dict, initial_tensors, make_config
from pituning.training.module import running

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Case:
    family: str
    method: str
    dtype: torch.dtype
    count: int
    granularity: str
    seed: int

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.dtype]

    def weights(self, groups: int) -> Tensor:
        """Random rows that sum to one."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.softmax(torch.randn(groups, self.count, generator=generator, dtype=torch.float64), 1)


COMBINATIONS = (
    *((family, method) for family in ("encoder", "seq2seq", "ofa") for method in ("lora", "bottleneck")),
    ("encoder", "bitfit"),
    ("ofa", "bitfit"),
    ("ofa", "prefix"),
)
LINEAR = ("bottleneck", "prefix", "bitfit")  # methods that mix in parameter space
# Where the tiny backbones have the projections of an attention block, and how many parts of the name lie below the block.
PROJECTIONS = {
    "attention.self.query": 2, "attention.self.key": 2, "attention.self.value": 2, "attention.output.dense": 2,
    **{f"{block}.{p}": 1 for block in ("SelfAttention", "EncDecAttention") for p in "qkvo"},
    **{f"{block}.{p}_proj": 1 for block in ("self_attn", "cross_attn") for p in ("q", "k", "v", "out")},
}  # fmt: skip


def cases(low: int, high: int, methods: Sequence[str] = ("lora", *LINEAR)) -> st.SearchStrategy[Case]:
    """Backbones with methods, dtypes, numbers of experts, granularities and seeds."""
    return st.builds(
        lambda pair, *rest: Case(*pair, *rest),
        st.sampled_from([c for c in COMBINATIONS if c[1] in methods]),
        st.sampled_from((torch.float32, torch.float64)),
        st.integers(low, high),
        st.sampled_from(GRANULARITIES),
        st.integers(0, 10_000),
    )


def group_of(key: str, granularity: str) -> str:
    """The group of a tensor, by the words of the documentation."""
    name = key.removeprefix(PREFIX)
    for part in (".lora_A.weight", ".lora_B.weight"):
        if name.endswith(part):
            name = name.removesuffix(part)
            tensor = f"{name}.lora_A"  # both factors share their weights
            break
    else:
        tensor = name
        name = re.split(r"\.(?:bottleneck|prefix|bitfit)_", name)[0]
    parts = name.split(".")
    block = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    below = next((n for module, n in PROJECTIONS.items() if name.endswith("." + module)), 0)
    return {
        "model": "model",
        "encoder-decoder": next((p for p in parts if p in ("encoder", "decoder")), "model"),
        "layer": ".".join(parts[: block + 1]),
        "attention": ".".join(parts[: len(parts) - below]),
        "module": name,
        "tensor": tensor,
    }[granularity]


def by_group(experts: Sequence[Expert], case: Case) -> dict[str, Tensor]:
    """Weights by group name, independent of the order of the experts."""
    groups = sorted({group_of(k, case.granularity) for e in experts for k in e.tensors})
    return dict(zip(groups, case.weights(len(groups)), strict=True))


def rows(experts: Sequence[Expert], granularity: str, weights: dict[str, Tensor], order: Sequence[int]) -> Tensor:
    return torch.stack([weights[name][list(order)] for name in group_names(experts, granularity)])


@given(case=cases(1, 4))
def test_groups_are_what_the_documentation_says(backbone_of: Any, random_experts: Any, case: Case) -> None:
    experts = random_experts(backbone_of(case.family), case.method, case.count, case.seed)
    expected = {group_of(k, case.granularity) for e in experts for k in e.tensors}
    found = group_names(experts, case.granularity)
    assert len(found) == len(set(found))
    assert set(found) == expected


@given(case=cases(1, 1), train=st.sampled_from(("experts", "weights", "none")))
def test_one_expert_runs_bit_by_bit(
    backbone_of: Any, random_experts: Any, random_examples: Any, attached_loss: Any, mixture_loss: Any,
    case: Case, train: str,
) -> None:  # fmt: skip
    backbone = backbone_of(case.family, case.dtype)
    (expert,) = random_experts(backbone, case.method, 1, case.seed)
    examples = random_examples(5, case.seed)
    mixture, config = build_mixture([expert], granularity=case.granularity, train=train)
    found = mixture_loss(backbone, mixture, config, examples)
    assert torch.equal(found, attached_loss(backbone, expert, examples))
    tensors = mixture()
    assert tensors.keys() == expert.tensors.keys()
    assert all(torch.equal(tensors[k], t) and tensors[k].dtype == t.dtype for k, t in expert.tensors.items())


@given(case=cases(2, 4), data=st.data())
def test_one_hot_weights_run_that_expert(
    backbone_of: Any, random_experts: Any, random_examples: Any, attached_loss: Any, mixture_loss: Any, distance: Any,
    case: Case, data: st.DataObject,
) -> None:  # fmt: skip
    backbone = backbone_of(case.family, case.dtype)
    experts = random_experts(backbone, case.method, case.count, case.seed)
    chosen = data.draw(st.integers(0, case.count - 1))
    examples = random_examples(5, case.seed)
    weights = [float(k == chosen) for k in range(case.count)]
    mixture, config = build_mixture(experts, weights, granularity=case.granularity, train="experts")
    found = mixture_loss(backbone, mixture, config, examples)
    assert distance(found, attached_loss(backbone, experts[chosen], examples)) <= case.tolerance


@given(case=cases(2, 4), data=st.data())
def test_the_order_of_the_experts_does_not_matter(
    backbone_of: Any, random_experts: Any, random_examples: Any, mixture_loss: Any, distance: Any,
    case: Case, data: st.DataObject,
) -> None:  # fmt: skip
    backbone = backbone_of(case.family, case.dtype)
    experts = random_experts(backbone, case.method, case.count, case.seed)
    weights = by_group(experts, case)
    order = data.draw(st.permutations(range(case.count)))
    losses = []
    for turn in (range(case.count), order):
        turned = [experts[k] for k in turn]
        given_rows = rows(turned, case.granularity, weights, turn)
        mixture, config = build_mixture(turned, given_rows, granularity=case.granularity, train="none")
        losses.append(mixture_loss(backbone, mixture, config, random_examples(5, case.seed)))
    assert distance(losses[1], losses[0]) <= case.tolerance


@given(case=cases(1, 4, ["lora"]))
def test_lora_is_the_dense_weighted_sum(
    backbone_of: Any, random_experts: Any, random_examples: Any, mixture_loss: Any, distance: Any, lora_deltas: Any,
    with_deltas: Any, case: Case,
) -> None:  # fmt: skip
    """Ranks, α, rsLoRA and adapted modules differ between the experts; ΔW = Σ_k w_k s_k B_k A_k is formed in full."""
    backbone = backbone_of(case.family, case.dtype)
    experts = random_experts(backbone, "lora", case.count, case.seed)
    weights = by_group(experts, case)
    dense: dict[str, Tensor] = {}
    for k, expert in enumerate(experts):
        for module, delta in lora_deltas(expert).items():
            weight = weights[group_of(f"{PREFIX}{module}.lora_A.weight", case.granularity)][k]
            dense[module] = dense.get(module, torch.zeros_like(delta)) + weight * delta
    batch = backbone.collate(random_examples(5, case.seed))
    with torch.no_grad(), with_deltas(backbone, dense):
        expected = backbone.loss(batch)
    with torch.no_grad():
        assert distance(backbone.loss(batch), expected) > 1e-3, "the experts must matter"
    given_rows = rows(experts, case.granularity, weights, range(case.count))
    mixture, config = build_mixture(experts, given_rows, granularity=case.granularity, train="none")
    found = mixture_loss(backbone, mixture, config, random_examples(5, case.seed))
    assert distance(found, expected) <= case.tolerance


@given(case=cases(2, 4, LINEAR), train=st.sampled_from(TRAIN_MODES))
def test_other_methods_are_the_weighted_sum_of_their_tensors(
    backbone_of: Any, random_experts: Any, random_examples: Any, attached_loss: Any, mixture_loss: Any, distance: Any,
    case: Case, train: str,
) -> None:  # fmt: skip
    backbone = backbone_of(case.family, case.dtype)
    experts = random_experts(backbone, case.method, case.count, case.seed)
    weights = by_group(experts, case)
    summed = {}
    for key, first in experts[0].tensors.items():
        row = weights[group_of(key, case.granularity)]
        summed[key] = sum(w * e.tensors[key].double() for w, e in zip(row, experts, strict=True)).to(first)
    expected = replace(experts[0], tensors=summed)
    given_rows = rows(experts, case.granularity, weights, range(case.count))
    mixture, config = build_mixture(experts, given_rows, granularity=case.granularity, train=train)
    examples = random_examples(5, case.seed)
    found = mixture_loss(backbone, mixture, config, examples)
    assert distance(found, attached_loss(backbone, expected, examples)) <= case.tolerance
    assert all(distance(t, summed[k]) <= case.tolerance for k, t in mixture().items())


@given(case=cases(1, 3))
def test_delta_adds_to_the_mixture(
    backbone_of: Any, random_experts: Any, random_examples: Any, attached_loss: Any, mixture_loss: Any, distance: Any,
    lora_deltas: Any, with_deltas: Any, case: Case,
) -> None:  # fmt: skip
    """``train="shared"``: φ̄ = Σ_k w_k φ_k + δ, with a new factor pair for LoRA; at its start δ adds nothing."""
    backbone = backbone_of(case.family, case.dtype)
    experts = random_experts(backbone, case.method, case.count, case.seed)
    examples = random_examples(5, case.seed)
    initial = shared_start(backbone, experts)
    weights = by_group(experts, case)
    given_rows = rows(experts, case.granularity, weights, range(case.count))
    options = {"granularity": case.granularity, "initial": initial}
    still, still_config = build_mixture(experts, given_rows, granularity=case.granularity, train="none")
    moved, config = build_mixture(experts, given_rows, train="shared", **options)
    without = mixture_loss(backbone, still, still_config, examples)
    assert distance(mixture_loss(backbone, moved, config, examples), without) <= case.tolerance
    generator = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            if name.startswith("delta"):
                parameter.add_(
                    0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
                )
    found = mixture_loss(backbone, moved, config, examples)
    assert distance(found, without) > 1e-4, "δ must matter"
    if case.method in LINEAR:
        flat = torch.cat([p.detach().flatten() for p in moved.delta])
        keys = [k for members in moved._members for k in members]
        pieces = flat.split([experts[0].tensors[k].numel() for k in keys])
        summed = {k: still()[k] + p.view_as(still()[k]) for k, p in zip(keys, pieces, strict=True)}
        expected = attached_loss(backbone, replace(experts[0], tensors=summed), examples)
    else:
        dense: dict[str, Tensor] = {}
        for k, expert in enumerate(experts):
            for module, delta in lora_deltas(expert).items():
                weight = weights[group_of(f"{PREFIX}{module}.lora_A.weight", case.granularity)][k]
                dense[module] = dense.get(module, torch.zeros_like(delta)) + weight * delta
        for index, key in enumerate(moved.modules_mixed):
            pair = moved.delta_b[index].detach().double() @ moved.delta_a[index].detach().double()
            dense[key.removeprefix(PREFIX)] += pair
        with torch.no_grad(), with_deltas(backbone, dense):
            expected = backbone.loss(backbone.collate(examples))
    assert distance(found, expected) <= case.tolerance


def shared_start(backbone: Backbone, experts: Sequence[Expert]) -> dict[str, Tensor] | None:
    """LoRA's initial tensors on all modules that any of the experts adapts."""
    if experts[0].config["peft_type"] != "LORA":
        return None
    modules = sorted({k.removeprefix(PREFIX).split(".lora_")[0] for e in experts for k in e.tensors})
    return initial_tensors(backbone, make_config("lora", backbone, r=2, target_modules=modules))


@pytest.mark.parametrize(
    ("family", "method"),
    [("encoder", "lora"), ("encoder", "bottleneck"), ("encoder", "bitfit"), ("ofa", "prefix")],
)
@pytest.mark.parametrize(
    ("train", "free"),
    [("experts", {"alpha", "experts"}), ("shared", {"alpha", "delta"}), ("weights", {"alpha"}), ("none", set())],
)
def test_what_each_mode_trains(
    backbone_of: Any, random_experts: Any, random_examples: Any, family: str, method: str, train: str, free: set[str]
) -> None:
    backbone = backbone_of(family)
    experts = random_experts(backbone, method, 3, 1)
    mixture, config = build_mixture(experts, train=train, initial=shared_start(backbone, experts))
    names = {"a": "experts", "b": "experts", "delta_a": "delta", "delta_b": "delta"}
    kind = {n: names.get(n.split(".")[0], n.split(".")[0]) for n, _ in mixture.named_parameters()}
    assert {kind[n] for n, p in mixture.named_parameters() if p.requires_grad} == free
    size = sum(p.numel() for n, p in mixture.named_parameters() if kind[n] == "experts")
    assert size == sum(t.numel() for e in experts for t in e.tensors.values())
    if not free:
        return
    with running(backbone, mixture, config) as model:
        assert dict(model.named_parameters()).keys() == {f"mixture.{n}" for n in kind}, "only the mixture's parameters"
        model(**backbone.collate(random_examples(4))).mean().backward()
    moved = {kind[n] for n, p in mixture.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == free
    assert not any(p.grad is not None for p in backbone.model.parameters())


@pytest.mark.parametrize("method", ["lora", "bottleneck", "bitfit"])
@pytest.mark.parametrize("train", TRAIN_MODES)
@pytest.mark.parametrize("count", [1, 2])
def test_a_mixture_has_tensors_of_its_own(
    bert: Backbone, random_experts: Any, method: str, train: str, count: int
) -> None:
    experts = random_experts(bert, method, count, 3)
    initial = shared_start(bert, experts)
    mixture, _ = build_mixture(experts, train=train, initial=initial)
    others = {
        t.untyped_storage().data_ptr() for m in (initial or {}, *(e.tensors for e in experts)) for t in m.values()
    }
    assert not others & {p.untyped_storage().data_ptr() for p in mixture.parameters()}


@pytest.mark.parametrize("method", ["lora", "bottleneck"])
def test_the_initial_tensors_are_let_go(
    bert: Backbone, random_experts: Any, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Those of LoRA, whose ranks add up, are as large as all the experts together."""
    storages: list[StorageWeakRef] = []

    @contextmanager
    def watched(*arguments: Any) -> Iterator[Any]:
        with attached(*arguments) as site:
            storages.extend(StorageWeakRef(p.untyped_storage()) for p in site.parameters.values())
            yield site

    monkeypatch.setattr("pituning.training.module.attached", watched)
    with running(bert, *build_mixture(random_experts(bert, method, 2, 3), train="experts")):
        assert storages
        assert all(storage.expired() for storage in storages)


@pytest.mark.parametrize("method", ["lora", "bottleneck"])
@pytest.mark.parametrize("train", TRAIN_MODES)
def test_weights_can_be_held(bert: Backbone, random_experts: Any, method: str, train: str) -> None:
    experts = random_experts(bert, method, 2, 2)
    options = {"train": train, "initial": shared_start(bert, experts)}
    assert not build_mixture(experts, train_weights=False, **options)[0].alpha.requires_grad
    free = train not in ("none", "merge-then-tune")
    assert build_mixture(experts, **options)[0].alpha.requires_grad == free


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("method", ["lora", "bottleneck"])
def test_the_gradient_of_alpha_is_its_finite_difference(
    backbone_of: Any, random_experts: Any, random_examples: Any, mixture_loss: Any, method: str, temperature: float
) -> None:
    backbone = backbone_of("encoder", torch.float64)
    experts, examples = random_experts(backbone, method, 3, 3), random_examples(4, 3)
    alpha = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)

    def loss_at(values: Tensor) -> float:
        weights = torch.softmax(values / temperature, 0)
        mixture, config = build_mixture(experts, weights, granularity="model", train="none")
        return float(mixture_loss(backbone, mixture, config, examples).mean())

    step = 1e-5
    slow = [(loss_at(alpha + step * e) - loss_at(alpha - step * e)) / (2 * step) for e in torch.eye(3).double()]
    start = torch.softmax(alpha / temperature, 0)
    mixture, config = build_mixture(experts, start, granularity="model", train="weights", temperature=temperature)
    torch.testing.assert_close(mixture.weights()[0], start)
    with running(backbone, mixture, config) as model:
        model(**backbone.collate(examples)).mean().backward()
    torch.testing.assert_close(mixture.alpha.grad[0], torch.tensor(slow).double(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", ["lora", "bottleneck"])
def test_weights_of_zero_stay_zero_under_training(
    bert: Backbone, random_experts: Any, random_examples: Any, method: str
) -> None:
    experts = random_experts(bert, method, 3, 4)
    mixture, config = build_mixture(experts, [0.0, 0.4, 0.6], train="weights")
    optimizer = torch.optim.AdamW(mixture.parameters(), lr=0.1, weight_decay=0.0)
    with running(bert, mixture, config) as model:
        for seed in range(3):
            optimizer.zero_grad()
            model(**bert.collate(random_examples(4, seed))).mean().backward()
            optimizer.step()
    weights = mixture.weights()
    assert (weights[:, 0] == 0).all()
    held = [any(f"{g}." in key for e in experts[1:] for key in e.tensors) for g in group_names(experts, "module")]
    assert (weights[torch.tensor(held), 1] != 0.4).all(), "the others must have moved where they adapt the module"
    torch.testing.assert_close(weights.sum(1), torch.ones(len(weights)))


@pytest.mark.parametrize(("family", "method"), COMBINATIONS)
def test_one_expert_trains_as_peft_alone_does(
    backbone_of: Any, random_experts: Any, random_examples: Any, family: str, method: str
) -> None:
    """Three AdamW steps on a mixture of one, and on the attached parameters themselves: the same bits."""
    backbone = backbone_of(family)
    (expert,) = random_experts(backbone, method, 1, 5)
    batches = [backbone.collate(random_examples(4, seed)) for seed in range(3)]
    with attached(backbone, expert.config, expert.tensors) as site:
        optimizer = torch.optim.AdamW(site.parameters.values(), lr=1e-2, weight_decay=0.01)
        for batch in batches:
            optimizer.zero_grad()
            backbone.loss(batch).mean().backward()
            optimizer.step()
        expected = {k: p.detach().clone() for k, p in site.parameters.items()}
    mixture, config = build_mixture([expert], train="experts")
    free = [p for n, p in mixture.named_parameters() if n != "alpha"]
    optimizer = torch.optim.AdamW(free, lr=1e-2, weight_decay=0.01)
    with running(backbone, mixture, config) as model:
        for batch in batches:
            optimizer.zero_grad()
            model(**batch).mean().backward()
            optimizer.step()
    assert any(not torch.equal(expected[k], t) for k, t in expert.tensors.items()), "training must move something"
    for key, tensor in mixture().items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=0, msg=key)


@pytest.mark.parametrize(
    ("module", "block"),
    [
        ("model.encoder.layers.0.self_attn.q_proj", "model.encoder.layers.0.self_attn"),
        ("model.decoder.layers.0.cross_attn.out_proj", "model.decoder.layers.0.cross_attn"),
        ("model.decoder.layers.0.encoder_attn.v_proj", "model.decoder.layers.0.encoder_attn"),
        ("decoder.block.0.layer.1.EncDecAttention.o", "decoder.block.0.layer.1.EncDecAttention"),
        ("encoder.layer.2.attention.attention.query", "encoder.layer.2.attention"),
        ("h.3.attn.c_attn", "h.3.attn"),
        ("model.encoder.layers.0.fc1", None),
        ("model.encoder.layers.0.self_attn_output", None),
        ("model.encoder.layers.0.self_attn_mid_layer_norm", None),
        ("encoder.layer.0.attention.output.LayerNorm", None),
    ],
)
def test_an_attention_block_is_found_by_its_name(module: str, block: str | None) -> None:
    assert group_name(f"{PREFIX}{module}.lora_A.weight", "attention") == (block or module)


def test_the_two_sites_of_a_layer_have_weights_of_their_own(ofa: Backbone, random_experts: Any) -> None:
    """In the reference both share one tensor by accident, so that their weights never differ."""
    experts = random_experts(ofa, "bottleneck", 2, 6)
    mixture, _ = build_mixture(experts, train="weights")
    names = group_names(experts, "module")
    rows = [names.index(f"model.encoder.layers.0.{site}") for site in ("self_attn_output", "ffn_output")]
    with torch.no_grad():
        mixture.alpha[rows[0], 0] += 1.0
    assert (mixture.weights()[rows[0]] - mixture.weights()[rows[1]]).abs().min() > 0.1
    assert len(names) == 2 * (2 + 3)


class TestRefusals:
    def test_no_experts(self) -> None:
        with pytest.raises(RefusedError, match="at least one expert"):
            build_mixture([])

    def test_different_methods(self, bert: Backbone, random_expert: Any, message: Any) -> None:
        pair = [random_expert(bert, "lora", 1, name="low"), random_expert(bert, "bottleneck", 2, name="narrow")]
        for experts in (pair, pair[::-1]):
            text = message(build_mixture, experts, train="none")
            assert "'low' (lora)" in text
            assert "'narrow' (bottleneck)" in text
            assert "different methods" in text

    def test_different_backbones(self, bert: Backbone, t5: Backbone, random_expert: Any, message: Any) -> None:
        one, other = random_expert(bert, "lora", 1, name="one"), random_expert(t5, "lora", 2, name="other")
        assert message(build_mixture, [one, other]) == "experts 'one' and 'other' belong to different backbones"

    def test_different_backbones_beside_an_expert_of_unknown_backbone(
        self, bert: Backbone, t5: Backbone, random_expert: Any, message: Any
    ) -> None:
        foreign = random_expert(bert, "lora", 3, name="foreign").with_card(fingerprint="")
        one, other = random_expert(bert, "lora", 1, name="one"), random_expert(t5, "lora", 2, name="other")
        text = message(build_mixture, [foreign, one, other], train="none")
        assert "'one' and 'other' belong to different backbones" in text

    def test_different_shapes(self, bert: Backbone, random_expert: Any, message: Any) -> None:
        pair = [
            random_expert(bert, "bottleneck", 1, name="wide"),
            random_expert(bert, "bottleneck", 2, r=2, name="thin"),
        ]
        text = message(build_mixture, pair, train="none")
        assert "'wide' and 'thin'" in text
        assert "bottleneck_down.bias has shape [4] in the first and [2] in the second" in text

    def test_different_modules(self, bert: Backbone, random_expert: Any, message: Any) -> None:
        pair = [
            random_expert(bert, "bottleneck", 1, name="all"),
            random_expert(bert, "bottleneck", 2, name="some", target_modules=["attention.output.dense"]),
        ]
        text = message(build_mixture, pair, train="none")
        assert "encoder.layer.0.output.dense.bottleneck_down.bias has shape [4] in the first and no such tensor" in text

    def test_different_lengths(self, ofa: Backbone, random_expert: Any, message: Any) -> None:
        pair = [random_expert(ofa, "prefix", 1, name="short"), random_expert(ofa, "prefix", 2, name="long", length=4)]
        text = message(build_mixture, pair, train="none")
        assert "'short' and 'long' cannot be averaged" in text
        assert "encoder.layers.0.self_attn.prefix_key has shape [3, 16] in the first and [4, 16] in the second" in text

    @pytest.mark.parametrize(("setting", "value"), [("activation", "gelu"), ("scaling", 0.5)])
    def test_tensors_that_stand_for_different_functions(
        self, bert: Backbone, random_expert: Any, message: Any, setting: str, value: Any
    ) -> None:
        first = random_expert(bert, "bottleneck", 1, name="first")
        older = replace(first, config={k: v for k, v in first.config.items() if k not in ("activation", "scaling")})
        other = random_expert(bert, "bottleneck", 2, name="other", **{setting: value})
        for experts in ([first, other], [older, other]):
            text = message(build_mixture, experts, train="none")
            assert f"'first' and 'other' cannot be averaged: their {setting} is {first.config[setting]!r}" in text
            assert repr(value) in text
        build_mixture([first, older, random_expert(bert, "bottleneck", 3, dropout=0.5)], train="none")

    def test_prefixes_with_projection(self, ofa: Backbone, random_expert: Any, message: Any) -> None:
        pair = [random_expert(ofa, "prefix", k, name=f"net-{k}", projection=True) for k in range(2)]
        assert "'net-0' is a prefix with projection" in message(build_mixture, pair, train="none")
        build_mixture(pair[:1], train="experts")

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"use_dora": True}, "use_dora"),
            ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
            ({"bias": "lora_only"}, "bias='lora_only'"),
            ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ],
    )
    def test_lora_variants_without_a_product(
        self, bert: Backbone, random_expert: Any, message: Any, options: dict[str, Any], reason: str
    ) -> None:
        plain = random_expert(bert, "lora", 1, name="plain")
        odd = replace(random_expert(bert, "lora", 2, name="odd"), config={**plain.config, **options})
        for experts in ([plain, odd], [odd, odd]):
            text = message(build_mixture, experts, train="none")
            assert f"expert 'odd' uses {reason}" in text
            assert "cannot be interpolated exactly" in text
        text = message(build_mixture, [odd], [0.5], train="none", coefficients="linear")
        assert f"expert 'odd' uses {reason}" in text

    def test_real_dora_experts_run_alone_only(
        self, bert: Backbone, random_examples: Any, attached_loss: Any, mixture_loss: Any, message: Any
    ) -> None:
        config = LoraConfig(r=2, target_modules=["query"], use_dora=True)
        torch.manual_seed(0)
        tensors = {k: t + 0.1 * torch.randn_like(t) for k, t in initial_tensors(bert, config).items()}
        expert = Expert(tensors, config_dict(config), ExpertCard("dora"))
        assert "expert 'dora' uses use_dora" in message(build_mixture, [expert, expert], train="none")
        examples = random_examples(4)
        mixture, settings = build_mixture([expert], train="none")
        assert torch.equal(mixture_loss(bert, mixture, settings, examples), attached_loss(bert, expert, examples))

    def test_a_tensor_that_is_no_factor(self, bert: Backbone, random_expert: Any, message: Any) -> None:
        expert = random_expert(bert, "lora", 1)
        odd = replace(expert, tensors={**expert.tensors, f"{PREFIX}pooler.dense.weight": torch.zeros(2, 3)})
        text = message(build_mixture, [odd], train="none")
        assert f"'lora-1': tensor {PREFIX}pooler.dense.weight [2, 3] is not a LoRA factor" in text

    def test_half_a_pair(self, bert: Backbone, random_expert: Any) -> None:
        expert = random_expert(bert, "lora", 1)
        key = next(k for k in expert.tensors if "lora_B" in k)
        half = replace(expert, tensors={k: t for k, t in expert.tensors.items() if k != key})
        with pytest.raises(ExpertError, match=r"query has no lora_B\.weight"):
            build_mixture([half], train="none")

    @pytest.mark.parametrize(
        ("weights", "said"),
        [
            ([0.5, 0.4], "sum to one"),
            ([1.5, -0.5], "between 0 and 1, not 1.5, -0.5.*; signed weights need coefficients='linear'"),
            ([1.0], r"shape \[\d+, 1\], expected \[2\] or"),
            (torch.ones(3, 2) / 2, r"shape \[3, 2\], expected \[2\] or \[\d+, 2\]"),
            ([math.nan, 0.5], "finite"),
        ],
    )
    def test_weights_that_are_none(self, bert: Backbone, random_experts: Any, weights: Any, said: str) -> None:
        with pytest.raises(RefusedError, match=said):
            build_mixture(random_experts(bert, "bottleneck", 2), weights, train="none")

    def test_an_unknown_granularity(self, bert: Backbone, random_expert: Any) -> None:
        with pytest.raises(RefusedError, match="model, encoder-decoder, layer, attention, module, tensor, not 'head'"):
            build_mixture([random_expert(bert)], granularity="head", train="none")
        with pytest.raises(RefusedError, match="not 'head'"):
            group_name("x.lora_A.weight", "head")

    def test_an_unknown_train_mode(self, bert: Backbone, random_expert: Any, message: Any) -> None:
        text = message(build_mixture, [random_expert(bert)], train="alpha")
        assert "experts, shared, weights, none, merge-then-tune" in text
        assert "'alpha'" in text

    @pytest.mark.parametrize("temperature", [0.0, -1.0])
    def test_a_temperature_that_is_none(
        self, bert: Backbone, random_experts: Any, message: Any, temperature: float
    ) -> None:
        experts = random_experts(bert, "bottleneck", 2)
        assert "temperature" in message(build_mixture, experts, train="weights", temperature=temperature)

    def test_shared_lora_without_its_start(self, bert: Backbone, random_expert: Any) -> None:
        with pytest.raises(RefusedError, match=r"initial tensors, and .*query\.lora_A\.weight is not among them"):
            build_mixture([random_expert(bert)], train="shared")


def test_parameter_space_warns_where_the_coordinates_differ(bert: Backbone, random_expert: Any) -> None:
    """Experts from different starts have their hidden units in different orders; LoRA's product does not care."""
    one = random_expert(bert, "bottleneck", 1, name="one")
    other = random_expert(bert, "bottleneck", 2, name="other").with_card(init_hash="another")
    with pytest.warns(UserWarning, match=r"'one' and 'other'.*initialisation"):
        build_mixture([one, other], train="none")
    build_mixture(
        [random_expert(bert, "lora", 3), random_expert(bert, "lora", 4).with_card(init_hash="another")], train="none"
    )


class TestHalfPrecision:
    """One expert that is stored in bfloat16, as on a backbone of bfloat16: in it most of an optimizer's steps would be lost."""

    @pytest.mark.parametrize("method", ["lora", "bottleneck"])
    @pytest.mark.parametrize("train", ["experts", "merge-then-tune", "shared"])
    def test_what_is_trained_is_held_in_float32(
        self, bert: Backbone, random_expert: Any, method: str, train: str
    ) -> None:
        expert = random_expert(bert, method)
        expert = replace(expert, tensors={k: t.bfloat16() for k, t in expert.tensors.items()})
        initial = initial_tensors(bert, expert.config)
        mixture, _ = build_mixture([expert], train=train, initial=initial)
        assert {p.dtype for p in mixture.parameters() if p.requires_grad} == {torch.float32}
        if train != "shared":  # which has further factors
            assert all(torch.equal(t, expert.tensors[k].float()) for k, t in mixture().items())

    @pytest.mark.parametrize("method", ["lora", "bottleneck"])
    def test_what_is_frozen_stays_as_it_is(self, bert: Backbone, random_expert: Any, method: str) -> None:
        expert = random_expert(bert, method)
        expert = replace(expert, tensors={k: t.bfloat16() for k, t in expert.tensors.items()})
        mixture, _ = build_mixture([expert], train="none")
        assert all(torch.equal(t, expert.tensors[k]) and t.dtype == torch.bfloat16 for k, t in mixture().items())


@pytest.mark.parametrize("train", TRAIN_MODES)
def test_under_autocast_nothing_is_rounded(bert: Backbone, random_experts: Any, train: str) -> None:
    experts = random_experts(bert, "bottleneck", 3, 0)
    expected, _ = build_mixture(experts, [0.2, 0.3, 0.5], train=train)
    with torch.autocast("cpu", torch.bfloat16):
        mixture, _ = build_mixture(experts, [0.2, 0.3, 0.5], train=train)
        found = mixture()
    assert {p.dtype for p in mixture.parameters()} == {torch.float32}
    for key, tensor in expected().items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=0)
