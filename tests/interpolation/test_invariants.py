"""The invariants of every interpolation, over methods × granularities × kinds of weights × training modes.

Random widths, depths, ranks, scalings and dtypes. ``make prove`` runs the same properties over many more cases: it sets
PITUNING_CASES, the number of them.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from pituning.backbones.base import Backbone
from pituning.backbones.causal import CausalBackbone
from pituning.backbones.encoder import EncoderBackbone
from pituning.backbones.seq2seq import Seq2SeqBackbone
from pituning.experts import Expert, ExpertCard
from pituning.experts.expert import tensor_hash
from pituning.interpolation import GRANULARITIES, TRAIN_MODES, Mixture, build_mixture, collapse, group_names
from pituning.interpolation.build import group_name
from pituning.methods import attached, config_dict, initial_tensors, make_config
from pituning.training.module import running
from tests.conftest import VOCABULARY, build_ofa, build_tokenizer

CASES = int(os.environ.get("PITUNING_CASES", "120"))
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
PREFIX = "base_model.model."
METHODS = {
    "encoder": ("lora", "bottleneck", "bitfit", "ia3", "prefix"),
    "seq2seq": ("lora", "bottleneck", "ia3", "prefix", "prompt"),
    "causal": ("lora", "bottleneck", "ia3", "prefix", "prompt"),
    "ofa": ("lora", "bottleneck", "bitfit", "prefix"),
}
TARGETS = {
    "encoder": ("query", "key", "value", "output.dense"),
    "seq2seq": ("q", "k", "v", "wo"),
    "causal": ("q_proj", "k_proj", "v_proj", "down_proj"),
    "ofa": ("q_proj", "k_proj", "v_proj", "fc2"),
}
KINDS = ("softmax", "linear", "sigmoid")
OWN_ZERO = {"bitfit": 0.0, "ia3": 1.0}


@dataclass(frozen=True)
class Case:
    family: str
    method: str
    width: int
    layers: int
    dtype: torch.dtype
    count: int
    granularity: str
    kind: str
    train: str
    seed: int


def _cases() -> st.SearchStrategy[Case]:
    pairs = [(family, method) for family, methods in METHODS.items() for method in methods]
    return st.builds(
        lambda pair, *rest: Case(*pair, *rest),
        st.sampled_from(pairs), st.sampled_from((8, 12, 16, 20)), st.integers(1, 3),
        st.sampled_from((torch.float32, torch.float64)), st.integers(1, 5), st.sampled_from(GRANULARITIES),
        st.sampled_from(KINDS), st.sampled_from(TRAIN_MODES), st.integers(0, 10**6),
    )  # fmt: skip


@cache
def backbone_of(family: str, width: int, layers: int, dtype: torch.dtype) -> Backbone:
    torch.manual_seed(width * layers)
    words, heads = len(VOCABULARY), 2
    if family == "ofa":
        return build_ofa(dtype)
    if family == "encoder":
        bert = BertConfig(
            vocab_size=words, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=2 * width, max_position_embeddings=64, initializer_range=0.3,
        )  # fmt: skip
        tokenizer = build_tokenizer("[CLS] $A [SEP]", "[SEP]")
        return EncoderBackbone(f"bert-{width}-{layers}", BertModel(bert).to(dtype), tokenizer)
    if family == "seq2seq":
        t5 = T5Config(
            vocab_size=words, d_model=width, d_kv=width // heads, d_ff=2 * width, num_layers=layers, num_heads=heads,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=3,
        )  # fmt: skip
        return Seq2SeqBackbone(
            f"t5-{width}-{layers}", T5ForConditionalGeneration(t5).to(dtype), build_tokenizer("$A [SEP]", "[SEP]")
        )
    llama = LlamaConfig(
        vocab_size=words, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=1, max_position_embeddings=128, initializer_range=0.3,
        bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    return CausalBackbone(f"llama-{width}-{layers}", LlamaForCausalLM(llama).to(dtype), build_tokenizer("$A", "[SEP]"))


def experts_of(case: Case, backbone: Backbone) -> list[Expert]:
    """LoRA experts differ in rank, scaling, patterns, biases, adapted modules and stored dtype; others share their shape."""
    rng = random.Random(case.seed)
    common = {
        "bottleneck": {"r": rng.randint(1, 6)}, "prefix": {"length": rng.randint(1, 5)},
        "prompt": {"length": rng.randint(1, 5)}, "bitfit": {}, "ia3": {},
    }.get(case.method, {})  # fmt: skip
    found = []
    for k in range(case.count):
        options: dict[str, Any] = dict(common)
        dtype = case.dtype
        if case.method == "lora":
            targets = sorted(rng.sample(TARGETS[case.family], rng.randint(1, 3)))
            options = {
                "r": rng.randint(1, 6), "lora_alpha": rng.choice((1, 4, 9)), "use_rslora": rng.random() < 0.5,
                "target_modules": targets, "lora_bias": case.family in ("encoder", "ofa") and rng.random() < 0.25,
            }  # fmt: skip
            if rng.random() < 0.4:
                options |= {"rank_pattern": {targets[0]: rng.randint(1, 6)}, "alpha_pattern": {targets[0]: 2}}
            if case.dtype == torch.float32 and rng.random() < 0.3:
                dtype = rng.choice((torch.bfloat16, torch.float16))
        config = config_dict(make_config(case.method, backbone, **options))
        initial = initial_of(backbone, repr(sorted(config.items())), config)
        generator = torch.Generator().manual_seed(case.seed + k)
        tensors = {
            key: (t + 0.2 * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)).to(dtype)
            for key, t in initial.items()
        }
        card = ExpertCard(
            f"e{k}", backbone=backbone.name, fingerprint=backbone.fingerprint, method=case.method,
            init_hash=tensor_hash(initial), training={"family": backbone.family},
        )  # fmt: skip
        found.append(Expert(tensors, config, card))
    return found


_INITIAL: dict[tuple[str, str], dict[str, Tensor]] = {}


def initial_of(backbone: Backbone, text: str, config: Any) -> dict[str, Tensor]:
    key = (backbone.fingerprint, text)
    if key not in _INITIAL:
        _INITIAL[key] = initial_tensors(backbone, config)
    return _INITIAL[key]


def start_for(case: Case, backbone: Backbone, experts: Sequence[Expert]) -> dict[str, Tensor] | None:
    """What ``initial=`` has to be."""
    if case.method == "lora":
        if case.train != "shared":
            return None
        modules = sorted({k.removeprefix(PREFIX).split(".lora_")[0] for e in experts for k in e.tensors})
        return initial_tensors(backbone, make_config("lora", backbone, r=2, target_modules=modules))
    return initial_of(backbone, repr(sorted(experts[0].config.items())), experts[0].config)


def random_rows(case: Case, groups: int, one_hot: int | None = None) -> Tensor:
    if one_hot is not None:
        return torch.eye(case.count, dtype=torch.float64)[one_hot].expand(groups, -1)
    generator = torch.Generator().manual_seed(case.seed)
    values = torch.randn(groups, case.count, generator=generator, dtype=torch.float64)
    return {"softmax": torch.softmax(values, 1), "linear": values, "sigmoid": torch.sigmoid(values)}[case.kind]


def loss_of(backbone: Backbone, expert: Expert, batch: Any) -> Tensor:
    with attached(backbone, expert.config, expert.tensors), torch.no_grad():
        loss: Tensor = backbone.loss(batch)
    return loss


def run_mixture(backbone: Backbone, mixture: Mixture, config: Any, batch: Any) -> Tensor:
    with running(backbone, mixture, config) as model, torch.no_grad():
        loss: Tensor = model.eval().loss(batch)
    return loss


def far(found: Tensor, expected: Tensor, scale: float = 0.0) -> float:
    """Relative distance; of a sum whose terms cancel, relative to the size of the terms."""
    scale = max(scale, float(expected.double().norm()))
    return float((found.double() - expected.double()).norm()) / (scale or 1.0)


def effect(expert: Expert) -> dict[str, Tensor]:
    """What an expert means, in float64: ΔW (and its bias) by module for LoRA, its tensors for other methods."""
    if expert.config["peft_type"] != "LORA":
        return {k: t.double() for k, t in expert.tensors.items()}
    config, found = expert.config, {}
    for key, a in expert.tensors.items():
        if not key.endswith("lora_A.weight"):
            continue
        module = key.removesuffix(".lora_A.weight")
        alpha = config["lora_alpha"]
        for pattern, value in (config["alpha_pattern"] or {}).items():
            if module.endswith(f".{pattern}"):
                alpha = value
        scaling = alpha / (len(a) ** 0.5 if config["use_rslora"] else len(a))
        b = expert.tensors[f"{module}.lora_B.weight"]
        found[module] = scaling * b.double() @ a.double()
        bias = expert.tensors.get(f"{module}.lora_B.bias")
        found[f"{module} bias"] = scaling * bias.double() if bias is not None else a.new_zeros(len(b)).double()
    return found


def summed(
    case: Case, experts: Sequence[Expert], rows: Tensor, start: dict[str, Tensor] | None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """φ_0 + Σ_k w_k (φ_k − φ_0), one term after the other, and the sum of the terms' norms."""
    names = group_names(experts, case.granularity)
    total: dict[str, Tensor] = {}
    sizes: dict[str, float] = {}
    for k, expert in enumerate(experts):
        for key, value in effect(expert).items():
            unit = f"{key.removesuffix(' bias')}.lora_A" if case.method == "lora" else key
            name = group_name(unit, case.granularity)
            if case.method == "lora":
                origin = torch.zeros_like(value)
            elif case.method in OWN_ZERO:
                origin = torch.full_like(value, OWN_ZERO[case.method])
            else:
                assert start is not None
                origin = start[key].double()
            before = total.get(key, origin)
            weight = rows[names.index(name), k]
            total[key] = before + weight * (value - origin)
            sizes[key] = sizes.get(key, float(origin.norm())) + float(weight.abs() * (value.norm() + origin.norm()))
    return total, sizes


def moved(mixture: Mixture, seed: int) -> None:
    """Whatever is trained, as after some steps."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in mixture.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
                parameter.add_((0.3 if name == "alpha" else 0.05) * noise)


@pytest.mark.slow
@pytest.mark.timeout(0 if CASES > 1000 else 600)
@given(case=_cases())
@settings(max_examples=CASES)
def test_invariants(random_examples: Any, case: Case) -> None:
    backbone = backbone_of(case.family, case.width, case.layers, case.dtype)
    experts = experts_of(case, backbone)
    batch = backbone.collate(random_examples(3, case.seed))
    tolerance = TOLERANCE[case.dtype]
    start = start_for(case, backbone, experts)
    how = {
        "granularity": case.granularity, "train": case.train, "coefficients": case.kind, "initial": start,
    }  # fmt: skip
    groups = len(group_names(experts, case.granularity))
    own = [loss_of(backbone, e, batch) for e in experts]

    # K = 1 runs the expert's own tensors, bit by bit; what a CPU's kernels make of equal tensors may depend on their addresses
    alone, config = build_mixture(experts[:1], train="none", granularity=case.granularity)
    assert all(torch.equal(t, experts[0].tensors[k]) for k, t in alone().items())
    rounding = 16 * torch.finfo(case.dtype).eps
    torch.testing.assert_close(run_mixture(backbone, alone, config, batch), own[0], rtol=rounding, atol=0)

    # one-hot weights run that expert
    chosen = case.seed % case.count
    mixture, config = build_mixture(experts, random_rows(case, groups, chosen), **how)
    assert far(run_mixture(backbone, mixture, config, batch), own[chosen]) <= 5 * tolerance

    # any weights are the sum written out; collapsed, it is the same expert; and so in another order
    rows = random_rows(case, groups)
    mixture, config = build_mixture(experts, rows, **how)
    folded = collapse(mixture, config, experts[0].card).expert
    expected, sizes = summed(case, experts, rows, start)
    found = effect(folded)
    if case.method == "lora":
        expected = {k: v for k, v in expected.items() if k in found}
    assert found.keys() == expected.keys()
    assert all(far(found[k], expected[k], sizes[k]) <= tolerance for k in expected)
    order = random.Random(case.seed).sample(range(case.count), case.count)
    turned = [experts[k] for k in order]
    names, turned_names = (group_names(e, case.granularity) for e in (experts, turned))
    turned_rows = torch.stack([rows[names.index(name)][order] for name in turned_names])
    again = collapse(*build_mixture(turned, turned_rows, **how), experts[0].card).expert
    assert all(far(t, found[k], sizes[k]) <= tolerance for k, t in effect(again).items())

    # after training it still collapses into what it computes, fits the backbone, and is saved bit by bit
    moved(mixture, case.seed)
    folded = collapse(mixture, config, replace(experts[0].card, init_hash="")).expert
    assert far(loss_of(backbone, folded, batch), run_mixture(backbone, mixture, config, batch)) <= 5 * tolerance
    folded.verify(backbone)
    with tempfile.TemporaryDirectory() as folder:
        loaded = Expert.load(folded.save(Path(folder) / "blend"))
    assert loaded.tensors.keys() == folded.tensors.keys()
    assert all(
        torch.equal(loaded.tensors[k], t) and loaded.tensors[k].dtype == t.dtype for k, t in folded.tensors.items()
    )
    assert (loaded.config, loaded.card) == (folded.config, folded.card)
