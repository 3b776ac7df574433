"""Attaching an expert: every tensor is proven to fit, and nothing of it stays behind."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from pituning.backbones.base import Backbone
from pituning.errors import ExpertError, PituningError, UnknownNameError
from pituning.methods import (
    BitFitConfig,
    BottleneckConfig,
    PrefixConfig,
    attached,
    config_dict,
    initial_tensors,
    make_config,
    method_names,
)

METHODS = ("lora", "bottleneck")
COMBINATIONS = (
    *((family, method) for family in ("encoder", "seq2seq", "ofa") for method in METHODS),
    ("encoder", "bitfit"),
    ("ofa", "bitfit"),
    ("ofa", "prefix"),
)
QUERY = "base_model.model.encoder.layer.0.attention.self.query"


def names(backbone: Backbone) -> list[str]:
    return [f"{n} {type(m).__name__}" for n, m in backbone.model.named_modules()]


@pytest.mark.parametrize(("family", "method"), COMBINATIONS)
def test_the_bare_backbone_comes_back(
    backbone_of: Any, random_expert: Any, random_examples: Any, family: str, method: str
) -> None:
    backbone = backbone_of(family)
    batch = backbone.collate(random_examples())
    modules, bare = names(backbone), backbone.loss(batch)
    state = {k: v.clone() for k, v in backbone.model.state_dict().items()}
    expert = random_expert(backbone, method, 1)
    with attached(backbone, expert.config, expert.tensors) as site:
        assert (backbone.loss(batch) - bare).abs().max() > 1e-3, "the expert must matter"
        assert all(torch.equal(p, expert.tensors[k]) for k, p in site.parameters.items())
        live = dict(backbone.model.named_parameters())
        assert all(live[site.live_names[k]] is p for k, p in site.parameters.items())
        free = [n for n, p in backbone.model.named_parameters() if p.requires_grad]
        assert sorted(free) == sorted(site.live_names.values()), "only the expert is trainable"
        with torch.no_grad(), backbone.bare():
            assert torch.equal(backbone.loss(batch), bare)
    assert names(backbone) == modules
    assert torch.equal(backbone.loss(batch), bare)
    assert all(torch.equal(v, state[k]) for k, v in backbone.model.state_dict().items())
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert not any(m.training for m in backbone.model.modules())


@pytest.mark.parametrize("method", METHODS)
def test_it_comes_back_after_an_error_inside_the_block(bert: Backbone, random_expert: Any, method: str) -> None:
    expert, modules = random_expert(bert, method, 1), names(bert)
    with pytest.raises(KeyError), attached(bert, expert.config, expert.tensors):
        raise KeyError
    assert names(bert) == modules
    bert.require_free()


def test_it_comes_back_where_a_tensor_does_not_fit(bert: Backbone, random_expert: Any) -> None:
    expert, modules = random_expert(bert, "lora", 1), names(bert)
    with pytest.raises(ExpertError), attached(bert, expert.config, {}):
        pass
    assert names(bert) == modules


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (BottleneckConfig(r=2, target_modules=["query", "intermediate"]), "layer.0.intermediate is a BertIntermediate"),
        (LoraConfig(r=2, target_modules=["query", "LayerNorm"]), "LayerNorm"),
        (BitFitConfig(target_modules=["query", "intermediate"]), "layer.0.intermediate is a BertIntermediate"),
        (PrefixConfig(target_modules=["attention.self", "intermediate"]), "layer.0.intermediate is a BertIntermediate"),
    ],
    ids=["bottleneck", "lora", "bitfit", "prefix"],
)
def test_it_comes_back_where_a_module_cannot_be_adapted(
    fresh_bert_of: Callable[..., Backbone], random_examples: Any, config: Any, named: str
) -> None:
    """PEFT replaces module after module and raises at the first that it cannot adapt."""
    backbone = fresh_bert_of(torch.float32)
    modules, bare = names(backbone), backbone.loss(backbone.collate(random_examples()))
    with pytest.raises(PituningError, match=named), attached(backbone, config):
        pass
    assert names(backbone) == modules
    assert torch.equal(backbone.loss(backbone.collate(random_examples())), bare)
    assert not any(p.requires_grad for p in backbone.model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_modules_that_do_not_exist_are_named(bert: Backbone, method: str, message: Any) -> None:
    config = make_config(method, bert, r=2, target_modules=["qeury"])
    assert "qeury" in message(initial_tensors, bert, config)


def test_an_attached_expert_is_in_eval_mode(bert: Backbone, random_expert: Any, random_examples: Any) -> None:
    expert = random_expert(bert, "lora", 2, lora_dropout=0.5)
    batch = bert.collate(random_examples())
    with attached(bert, expert.config, expert.tensors):
        assert [n for n, m in bert.model.named_modules() if m.training] == []
        assert torch.equal(bert.loss(batch), bert.loss(batch)), "dropout must not run"


def test_a_second_expert_is_refused(bert: Backbone, random_expert: Any) -> None:
    expert = random_expert(bert, "lora", 1)
    with attached(bert, expert.config, expert.tensors):
        with pytest.raises(PituningError, match="already carries an expert"), attached(bert, expert.config):
            pass
        bert.bare()
    bert.require_free()


class TestInitialTensors:
    @pytest.mark.parametrize("method", METHODS)
    def test_depend_on_backbone_and_configuration_only(self, bert: Backbone, method: str) -> None:
        config = make_config(method, bert, r=3)
        torch.manual_seed(1)
        first = initial_tensors(bert, config)
        torch.manual_seed(2)
        state = torch.random.get_rng_state()
        second = initial_tensors(bert, config_dict(config))
        assert all(torch.equal(first[k], t) for k, t in second.items())
        assert torch.equal(state, torch.random.get_rng_state()), "the caller's random state stays"
        wider = initial_tensors(bert, make_config(method, bert, r=4))
        assert {k.rpartition(".")[0] for k in wider} == {k.rpartition(".")[0] for k in first}

    @pytest.mark.parametrize("method", METHODS)
    def test_differ_between_backbones(
        self, bert: Backbone, fresh_bert_of: Callable[..., Backbone], method: str
    ) -> None:
        other = fresh_bert_of(torch.float32, share_layers=True)
        key = QUERY + ".lora_A.weight"
        if method == "bottleneck":
            key = "base_model.model.encoder.layer.0.output.dense.bottleneck_down.weight"
        mine = initial_tensors(bert, make_config(method, bert, r=3))[key]
        assert not torch.equal(mine, initial_tensors(other, make_config(method, other, r=3))[key])

    def test_do_not_depend_on_the_release_of_peft(self, bert: Backbone) -> None:
        """Experts trained before and after an upgrade of PEFT must share their coordinates."""
        config = config_dict(make_config("lora", bert, r=3))
        first = initial_tensors(bert, config)
        second = initial_tensors(bert, {**config, "peft_version": "0.21.99"})
        assert all(torch.equal(first[k], t) for k, t in second.items())

    def test_stay_where_they_were_before_fields_were_added(self, bert: Backbone) -> None:
        """The seed is a hash of the fields that a bottleneck had in the first release, and of them alone."""
        config = make_config("bottleneck", bert, r=3, dropout=0.3, activation="tanh", scaling=0.5)
        known = {
            "auto_mapping": None, "base_model_name_or_path": None, "inference_mode": False, "init_std": 0.001,
            "peft_type": "BOTTLENECK", "r": 3, "revision": None, "target_modules": ["output.dense"], "task_type": None,
        }  # fmt: skip
        digest = hashlib.sha256((bert.fingerprint + json.dumps(known, sort_keys=True)).encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:7], "big"))
        torch.nn.Linear(16, 3), torch.nn.Linear(3, 16)  # both are drawn before the first is drawn anew
        expected = 0.02 * torch.randn(3, 16)
        key = "base_model.model.encoder.layer.0.attention.output.dense.bottleneck_down.weight"
        found = initial_tensors(bert, config)
        torch.testing.assert_close(found[key], expected)
        older = initial_tensors(bert, known)
        assert all(torch.equal(older[k], t) for k, t in found.items())

    def test_lora_starts_at_the_backbone(self, bert: Backbone, random_examples: Any) -> None:
        batch = bert.collate(random_examples())
        bare = bert.loss(batch)
        with attached(bert, make_config("lora", bert)):
            assert torch.equal(bert.loss(batch), bare)
        with attached(bert, make_config("bottleneck", bert)):
            moved = (bert.loss(batch) - bare).abs().max()
        assert 0 < moved < 1e-2, "a bottleneck starts close to the backbone"


class TestTensorsThatDoNotFit:
    """Each message names the tensor and the shapes."""

    def said(self, backbone: Backbone, expert: Any, changes: dict[str, Tensor | None], message: Any) -> str:
        tensors = {k: t for k, t in {**expert.tensors, **changes}.items() if t is not None}
        text: str = message(replace(expert, tensors=tensors).verify, backbone)
        return text

    def test_missing(self, bert: Backbone, random_expert: Any, message: Any) -> None:
        text = self.said(bert, random_expert(bert), {f"{QUERY}.lora_A.weight": None}, message)
        assert f"missing tensor {QUERY}.lora_A.weight [3, 16]" in text

    def test_extra(self, bert: Backbone, random_expert: Any, message: Any) -> None:
        text = self.said(
            bert, random_expert(bert), {"base_model.model.other.lora_A.weight": torch.zeros(3, 7)}, message
        )
        assert "extra tensor base_model.model.other.lora_A.weight [3, 7]" in text

    def test_misshaped(self, bert: Backbone, random_expert: Any, message: Any) -> None:
        text = self.said(bert, random_expert(bert), {f"{QUERY}.lora_B.weight": torch.zeros(16, 9)}, message)
        assert f"tensor {QUERY}.lora_B.weight has shape [16, 9], expected [16, 3]" in text

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_not_finite(self, bert: Backbone, random_expert: Any, message: Any, value: float) -> None:
        expert = random_expert(bert)
        spoilt = expert.tensors[f"{QUERY}.lora_A.weight"].clone()
        spoilt[0, :2] = value
        text = self.said(bert, expert, {f"{QUERY}.lora_A.weight": spoilt}, message)
        assert f"{QUERY}.lora_A.weight [3, 16] holds 2 values that are NaN or infinite" in text

    def test_several_at_once(self, bert: Backbone, random_expert: Any, message: Any) -> None:
        changes = {f"{QUERY}.lora_A.weight": None, "base_model.model.x": torch.zeros(1)}
        text = self.said(bert, random_expert(bert), changes, message)
        assert text.count("\n") == 2
        assert "missing tensor" in text
        assert "extra tensor" in text

    def test_too_many_to_list(self, bert: Backbone, random_expert: Any, message: Any) -> None:
        text = self.said(
            bert, random_expert(bert), {f"base_model.model.x{i}": torch.zeros(1) for i in range(11)}, message
        )
        assert "… and 3 more" in text

    @pytest.mark.parametrize("method", METHODS)
    def test_of_the_other_family(self, bert: Backbone, t5: Backbone, random_expert: Any, method: str) -> None:
        expert = random_expert(t5, method, 1).with_card(fingerprint="")
        with pytest.raises(PituningError):
            expert.verify(bert)
        bert.require_free()
        assert not any("lora" in n or "bottleneck" in n for n, _ in bert.model.named_modules())


class TestMakeConfig:
    def test_knows_its_methods(self, bert: Backbone) -> None:
        assert set(METHODS) <= set(method_names())
        for method in METHODS:
            assert make_config(method, bert).target_modules
        assert make_config("lora", bert, r=5).r == 5

    def test_unknown_method(self, bert: Backbone) -> None:
        with pytest.raises(UnknownNameError, match="unknown method 'loar': did you mean 'lora'"):
            make_config("loar", bert)

    def test_unknown_setting(self, bert: Backbone) -> None:
        with pytest.raises(PituningError, match="method 'bottleneck' has no setting lora_alpha"):
            make_config("bottleneck", bert, lora_alpha=4)

    def test_nothing_to_adapt(self, bert: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bert, "adaptable", lambda method: [])
        with pytest.raises(
            PituningError, match="finds no module to adapt in backbone 'tiny-bert'; give target_modules"
        ):
            make_config("lora", bert)

    @pytest.mark.parametrize("method", METHODS)
    def test_a_rank_below_one(self, bert: Backbone, method: str, message: Any) -> None:
        assert "0" in message(lambda: initial_tensors(bert, make_config(method, bert, r=0)))
        bert.require_free()

    def test_a_configuration_without_a_type(self, bert: Backbone, random_expert: Any, message: Any) -> None:
        expert = random_expert(bert)
        for broken in (
            {**expert.config, "peft_type": "LROA"},
            {k: v for k, v in expert.config.items() if k != "peft_type"},
        ):
            assert "peft_type" in message(replace(expert, config=broken).verify, bert)
