"""Importing the reference's expert checkpoints: complete or refused, exact, and never merged twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from pituning.backbones.ofa.checkpoint import model_from, split_fairseq, state_from_fairseq
from pituning.backbones.ofa.fairseq_experts import FairseqExpert, FairseqExperts, experts_from_fairseq
from pituning.backbones.ofa.modeling import OFAForConditionalGeneration
from pituning.backbones.ofa.names import our_name
from pituning.backbones.ofa.selfcheck import UnreadOFA, checked_logits
from pituning.errors import RefusedError
from pituning.methods import attached, config_dict, peft_config
from tests.backbones.ofa.checkpoints import (
    LAYERS,
    WIDTH,
    drifted,
    fairseq_state,
    interpolated_lora,
    merged,
    projections,
    random_adapters,
    random_lora,
    random_prefixes,
)

Message = Callable[..., str]
PEFT = "base_model.model.model"
KEYS = {"adapter1": "self_attn_output", "adapter2": "ffn_output"}


@pytest.fixture
def state(ofa: OFAForConditionalGeneration) -> dict[str, Tensor]:
    return fairseq_state(ofa)


@pytest.fixture
def load(ofa: OFAForConditionalGeneration) -> Callable[..., FairseqExperts]:
    def call(state: Mapping[str, Tensor], **options: Any) -> FairseqExperts:
        return experts_from_fairseq(split_fairseq(state), ofa.config, **options)

    return call


def logits(model: OFAForConditionalGeneration, expert: FairseqExpert | None = None) -> Tensor:
    if expert is None:
        return checked_logits(model, model.config)
    backbone = UnreadOFA("tiny", model)
    with attached(backbone, config_dict(peft_config(expert.config)), expert.tensors):
        return checked_logits(model, model.config)


def half(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: t.to(dtype) if t.is_floating_point() else t for k, t in state.items()}


class TestCompleteness:
    """Faults 8 and 9 of the reference: what is missing in a file stays random there, without a word."""

    def test_a_base_checkpoint_is_no_expert(self, load: Any, state: dict[str, Tensor], message: Message) -> None:
        assert "holds no expert" in message(load, state)

    @pytest.mark.parametrize(
        "name", ["encoder.layers.1.adapter2.up_proj.weight", "decoder.layers.0.adapter1.down_proj.bias"]
    )
    def test_a_missing_tensor_is_named(self, load: Any, state: dict[str, Tensor], message: Message, name: str) -> None:
        expert = random_adapters()
        del expert[name]
        assert f"missing tensor {name}" in message(load, {**state, **expert})

    def test_fewer_experts_than_the_logits_weigh(self, load: Any, state: dict[str, Tensor], message: Message) -> None:
        expert = {k: t for k, t in random_adapters(3).items() if "adapters1.2." not in k and "adapters2.2." not in k}
        text = message(load, {**state, **expert})
        assert "adapter_interpolation_weight1 has shape [3], expected [2]" in text

    def test_one_expert_lacks_one_layer(self, load: Any, state: dict[str, Tensor], message: Message) -> None:
        expert = {k: t for k, t in random_adapters(3).items() if not k.startswith("decoder.layers.1.adapters2.1.")}
        text = message(load, {**state, **expert})
        assert "missing tensor decoder.layers.1.adapters2.1.down_proj.bias [8]" in text
        assert len(text.splitlines()) == 5

    def test_fewer_experts_than_the_training_was_told_to_combine(
        self, load: Any, state: dict[str, Tensor], message: Message
    ) -> None:
        text = message(lambda: load({**state, **random_adapters(2)}, args={"adapter_num": 3}))
        assert "adapter_num = 3, but the file holds 2 experts" in text
        text = message(lambda: load({**state, **random_adapters()}, args={"adapter_num": 2}))
        assert "adapter_num = 2, but the file holds 1 expert" in text
        assert len(load({**state, **random_adapters(2)}, args={"adapter_num": 2}).parts) == 2
        assert load({**state, **random_adapters()}, args={"adapter_num": None}).logits == {}
        for wrong in ("two", [2], float("nan"), float("inf")):
            text = message(lambda wrong=wrong: load({**state, **random_adapters()}, args={"adapter_num": wrong}))
            assert text == f"the training's arguments say adapter_num = {wrong!r}, which is not a number"

    def test_shapes_and_numbers(self, load: Any, state: dict[str, Tensor], message: Message) -> None:
        expert = random_adapters()
        expert["encoder.layers.1.adapter1.down_proj.weight"] = torch.ones(5, WIDTH)
        expert["decoder.layers.1.adapter1.up_proj.bias"] = torch.full((WIDTH,), torch.inf)
        expert["decoder.layers.1.adapter1.gate.weight"] = torch.ones(2)
        expert["decoder.layers.7.adapter1.up_proj.bias"] = torch.ones(WIDTH)
        text = message(load, {**state, **expert})
        assert "encoder.layers.1.adapter1.down_proj.weight has shape [5, 32], expected [8, 32]" in text
        assert "decoder.layers.1.adapter1.up_proj.bias holds values that are NaN or infinite" in text
        assert "extra tensor decoder.layers.1.adapter1.gate.weight [2]" in text
        assert "extra tensor decoder.layers.7.adapter1.up_proj.bias [32]" in text

    def test_two_methods_in_one_file(self, load: Any, state: dict[str, Tensor], message: Message) -> None:
        text = message(load, {**state, **random_adapters(), **random_prefixes({"encoder": 3})})
        assert "mixes bottleneck and prefix" in text

    def test_lora_without_its_decoder(self, load: Any, state: dict[str, Tensor], message: Message) -> None:
        lora = {k: t for k, t in random_lora().items() if "encoder_attn.v_proj" not in k}
        text = message(lambda: load({**state, **lora}, lora_weights="unmerged"))
        assert "missing tensor decoder.layers.0.encoder_attn.v_proj.lora_A [4, 32]" in text

    def test_interpolated_lora_without_a_copy_of_a_weight(
        self, load: Any, state: dict[str, Tensor], message: Message
    ) -> None:
        together = interpolated_lora(state)
        del together["encoder.layers.0.self_attn.k_proj.1.weight"]
        text = message(lambda: load(together, lora_weights="unmerged"))
        assert "missing tensor encoder.layers.0.self_attn.k_proj.1.weight [32, 32]" in text


class TestAdapters:
    def test_tensors_and_names(self, load: Any, state: dict[str, Tensor]) -> None:
        expert = random_adapters()
        found = load({**state, **expert})
        assert (found.blended, found.logits, found.mean_weights()) == (found.parts[0], {}, [1.0])
        assert found.blended.config["target_modules"] == ["self_attn_output", "ffn_output"]
        assert len(found.blended.tensors) == len(expert)
        for name, tensor in expert.items():
            side, _, layer, site, half, part = name.split(".")
            key = f"{PEFT}.{side}.layers.{layer}.{KEYS[site]}.bottleneck_{half.removesuffix('_proj')}.{part}"
            assert torch.equal(found.blended.tensors[key], tensor)

    def test_the_interpolation_is_the_weighted_sum_of_each_site(self, load: Any, state: dict[str, Tensor]) -> None:
        expert = random_adapters(3)
        found = load({**state, **expert})
        for side, layer in LAYERS:
            for site in (1, 2):
                stem = f"{side}.layers.{layer}"
                weights = torch.softmax(expert[f"{stem}.adapter_interpolation_weight{site}"].double(), 0)
                for part in ("down_proj.weight", "up_proj.weight", "down_proj.bias", "up_proj.bias"):
                    parts = [expert[f"{stem}.adapters{site}.{k}.{part}"].double() for k in range(3)]
                    expected = sum(w * p for w, p in zip(weights, parts, strict=True))
                    key = f"{PEFT}.{stem}.{KEYS[f'adapter{site}']}.bottleneck_{part.replace('_proj', '')}"
                    assert torch.allclose(
                        found.blended.tensors[key].double(), cast(Tensor, expected), rtol=1e-6, atol=1e-8
                    )

    def test_half_precision_is_widened_exactly(self, load: Any, state: dict[str, Tensor]) -> None:
        half = {k: t.half() if t.is_floating_point() else t for k, t in {**state, **random_adapters()}.items()}
        found = load(half, base=state_from_fairseq(state))
        assert found.changes == (), "the base was only rounded"
        assert all(t.dtype == torch.float32 for t in found.blended.tensors.values())
        name = "encoder.layers.0.adapter1.up_proj.bias"
        assert torch.equal(
            found.blended.tensors[f"{PEFT}.encoder.layers.0.self_attn_output.bottleneck_up.bias"], half[name].float()
        )


class TestPrefixes:
    @pytest.mark.parametrize("lengths", [{"encoder": 5, "decoder": 3}, {"encoder": 4}, {"decoder": 2}])
    def test_rows_hold_a_key_and_a_value_per_layer(
        self, load: Any, ofa: OFAForConditionalGeneration, state: dict[str, Tensor], lengths: dict[str, int]
    ) -> None:
        expert = random_prefixes(lengths)
        found = load({**state, **expert}).blended
        assert len(found.tensors) == 4 * len(lengths)
        for side, length in lengths.items():
            rows = expert[f"{side}.{side}_prompt_encoder.embedding.weight"]
            # one sequence: [length, layers · 2, heads, width of a head], then a pair for each layer
            pairs = rows.view(length, 4, 4, WIDTH // 4).permute(1, 2, 0, 3).split(2)
            for layer, pair in enumerate(pairs):
                for part, tensor in zip(("key", "value"), pair, strict=True):
                    stored = found.tensors[f"{PEFT}.{side}.layers.{layer}.self_attn.prefix_{part}"]
                    assert torch.equal(stored.view(length, 4, WIDTH // 4).transpose(0, 1), tensor)
        assert not torch.equal(logits(ofa, found), logits(ofa)), "it can be attached, and it matters"

    def test_a_projection_is_evaluated(self, load: Any, state: dict[str, Tensor]) -> None:
        torch.manual_seed(0)
        embedding = nn.Embedding(5, WIDTH)
        network = nn.Sequential(nn.Linear(WIDTH, 12), nn.ReLU(), nn.Linear(12, 4 * WIDTH))
        stem = "encoder.encoder_prompt_encoder"
        expert = {f"{stem}.embedding.weight": embedding.weight.detach()}
        expert |= {f"{stem}.trans.{k}": t for k, t in network.state_dict().items()}
        found = load({**state, **expert}).blended
        with torch.no_grad():
            rows = network(embedding(torch.arange(5)))
        made = [
            found.tensors[f"{PEFT}.encoder.layers.{i}.self_attn.prefix_{h}"] for i in (0, 1) for h in ("key", "value")
        ]
        assert torch.equal(torch.cat(made, dim=1), rows)
        assert (found.config["length"], found.config["decoder_length"]) == (5, 0)

    def test_a_broken_projection(self, load: Any, state: dict[str, Tensor], message: Message) -> None:
        stem = "encoder.encoder_prompt_encoder"
        expert = {f"{stem}.embedding.weight": torch.ones(5, WIDTH), f"{stem}.trans.0.weight": torch.ones(12, WIDTH)}
        assert "lacks encoder.encoder_prompt_encoder.trans.0.bias" in message(load, {**state, **expert})
        expert |= {f"{stem}.trans.0.bias": torch.ones(12), f"{stem}.trans.2.weight": torch.ones(128, 13)}
        expert |= {f"{stem}.trans.2.bias": torch.ones(128)}
        assert "do not fit together" in message(load, {**state, **expert})
        wrong = {f"{stem}.embedding.weight": torch.ones(5, 100)}
        assert "expected [128]: a key and a value of 32 for each of 2 layers" in message(load, {**state, **wrong})

    def test_an_interpolation_and_its_scale(self, load: Any, state: dict[str, Tensor]) -> None:
        """The reference gives both stacks' scales as many rows as the encoder has layers."""
        expert = {}
        for k in range(2):
            for name, tensor in random_prefixes({"encoder": 5, "decoder": 3}, seed=k).items():
                expert[name.replace("encoder.embedding", f"encoder.{k}.embedding")] = tensor
        scale = torch.randn(6, 2, generator=torch.Generator().manual_seed(9))
        expert |= {"encoder.prompt_weight_scale": scale[:2], "decoder.prompt_weight_scale": scale}
        found = load({**state, **expert})
        assert len(found.parts) == 2
        weights = torch.softmax(scale.double(), dim=1)
        for layer in (0, 1):
            key = f"{PEFT}.decoder.layers.{layer}.self_attn.prefix_value"
            expected = sum(weights[layer, k] * found.parts[k].tensors[key].double() for k in (0, 1))
            assert torch.allclose(found.blended.tensors[key].double(), cast(Tensor, expected), rtol=1e-6, atol=1e-8)

    def test_a_scale_with_too_few_rows(self, load: Any, state: dict[str, Tensor], message: Message) -> None:
        expert = {
            name.replace("encoder.embedding", f"encoder.{k}.embedding"): t
            for k in range(2)
            for name, t in random_prefixes({"decoder": 3}, seed=k).items()
        }
        text = message(load, {**state, **expert, "decoder.prompt_weight_scale": torch.ones(1, 2)})
        assert "decoder.prompt_weight_scale has shape [1, 2], expected a row for each of 2 layers" in text


class TestLora:
    """Fault 6 of the reference: experts are saved with the product merged in, and merged again when they are loaded."""

    @pytest.mark.parametrize("saved", ["merged", "unmerged"])
    def test_the_base_tells_how_it_was_saved(
        self, load: Any, ofa: OFAForConditionalGeneration, state: dict[str, Tensor], saved: str
    ) -> None:
        lora, base = random_lora(), state_from_fairseq(state)
        file = merged(state, lora) if saved == "merged" else state
        found = load({**file, **lora}, base=base)
        assert len(found.merged) == (24 if saved == "merged" else 0)
        assert found.changes == ()
        assert all(torch.equal(found.backbone[k], t) for k, t in base.items())
        expected = logits(model_from(ofa.config, state_from_fairseq(merged(state, lora))))  # W + B A / r, once
        assert torch.allclose(logits(ofa, found.blended), expected, atol=1e-5)
        assert (found.blended.config["r"], found.blended.config["lora_alpha"]) == (4, 1)

    def test_without_a_base_it_must_be_said(
        self, load: Any, ofa: OFAForConditionalGeneration, state: dict[str, Tensor]
    ) -> None:
        lora = random_lora()
        file = {**merged(state, lora), **lora}
        with pytest.raises(RefusedError, match="merged in or not"):
            load(file)
        found = load(file, lora_weights="merged")
        truth = logits(model_from(ofa.config, state_from_fairseq(merged(state, lora))))
        assert torch.allclose(logits(model_from(ofa.config, found.backbone), found.blended), truth, atol=1e-5)
        wrong = load(file, lora_weights="unmerged")  # the user has said so
        assert not torch.allclose(logits(model_from(ofa.config, wrong.backbone), wrong.blended), truth, atol=1e-2)

    def test_what_is_said_wrongly_is_refused(self, load: Any, state: dict[str, Tensor], message: Message) -> None:
        lora = random_lora()
        base = state_from_fairseq(state)
        text = message(lambda: load({**merged(state, lora), **lora}, base=base, lora_weights="unmerged"))
        assert "decoder.layers.0.self_attn.k_proj.weight: is merged, as the base shows, not unmerged" in text

    def test_another_base_is_refused_by_name(self, load: Any, state: dict[str, Tensor], message: Message) -> None:
        lora, name = random_lora(), "decoder.layers.1.encoder_attn.v_proj.weight"
        base = state_from_fairseq(state)
        ours = "model.decoder.layers.1.cross_attn.v_proj.weight"
        base[ours] = base[ours] + 0.01
        for file in (merged(state, lora), state):
            text = message(lambda file=file: load({**file, **lora}, base=base))
            assert name in text
            assert "not the base that it was trained on" in text
            assert len(text.splitlines()) == 2

    def test_twice_merged_is_neither(self, load: Any, state: dict[str, Tensor], message: Message) -> None:
        lora = random_lora()
        text = message(lambda: load({**merged(merged(state, lora), lora), **lora}, base=state_from_fairseq(state)))
        assert "and 16 more" in text

    def test_merging_and_unmerging_a_hundred_times_leaves_roundings_only(
        self, load: Any, state: dict[str, Tensor]
    ) -> None:
        lora, file = random_lora(), dict(state)
        for _ in range(100):
            file = merged(file, lora)
            for name in projections():
                a, b = lora[f"{name}.lora_A"], lora[f"{name}.lora_B"]
                file[f"{name}.weight"] = file[f"{name}.weight"] - b @ a / len(a)
        assert load({**file, **lora}, base=state_from_fairseq(state)).merged == ()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("scale", [0.1, 0.3, 1.0])
    @pytest.mark.parametrize("saved", ["unmerged", "merged", "rounded when saved", "unmerged again"])
    def test_half_precision_leaves_roundings(
        self, load: Any, state: dict[str, Tensor], dtype: torch.dtype, scale: float, saved: str
    ) -> None:
        lora = random_lora(scale=scale)
        if saved == "rounded when saved":
            file = half({**merged(state, lora), **lora}, dtype)
        else:
            file = half({**state, **lora}, dtype)
            for _ in range({"unmerged": 0, "merged": 1}.get(saved, 100)):
                for name in projections():
                    product = (file[f"{name}.lora_B"].float() @ file[f"{name}.lora_A"].float() / 4).to(dtype)
                    file[f"{name}.weight"] = file[f"{name}.weight"] + product
                    if saved == "unmerged again":
                        file[f"{name}.weight"] -= product
        found = load(file, base=state_from_fairseq(state))
        assert found.changes == ()
        assert len(found.merged) == (0 if saved.startswith("unmerged") else 24)

    def test_a_product_that_rounding_swallows_in_part(self, load: Any, state: dict[str, Tensor]) -> None:
        """The nearer of the two is not the right one: of small entries the product is there to the last digit."""
        lora = random_lora(scale=0.003)
        file = half({**state, **lora}, torch.float16)
        for name in projections():
            product = file[f"{name}.lora_B"].float() @ file[f"{name}.lora_A"].float() / 4
            file[f"{name}.weight"] += product.to(torch.float16)
        assert load(file, base=state_from_fairseq(state)).changes == ()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("scale", [0.03, 0.3])
    def test_half_precision_hides_no_other_experts_product(
        self, load: Any, state: dict[str, Tensor], message: Message, dtype: torch.dtype, scale: float
    ) -> None:
        """As the reference leaves it that merges again; 1 % of the weight is below 16 roundings of its norm."""
        old, lora, file = random_lora(seed=1), random_lora(seed=2, scale=scale), dict(state)
        for name in projections():
            product, weight = old[f"{name}.lora_B"] @ old[f"{name}.lora_A"], state[f"{name}.weight"]
            file[f"{name}.weight"] = weight + product * (0.01 * weight.norm() / product.norm())
        for full in (file, merged(file, lora)):
            text = message(lambda full=full: load(half({**full, **lora}, dtype), base=state_from_fairseq(state)))
            assert "not the base that it was trained on" in text
            assert "and 16 more" in text

    @pytest.mark.parametrize("part", [0.1, 0.9])
    def test_a_part_of_the_product_is_no_rounding(
        self, load: Any, state: dict[str, Tensor], message: Message, part: float
    ) -> None:
        """Small enough for each entry's rounding, but in the direction of the product."""
        lora, file, base = random_lora(), dict(state), state_from_fairseq(state)
        for name in projections():
            product = lora[f"{name}.lora_B"] @ lora[f"{name}.lora_A"] / 4
            weight = product.sign() + product  # no entry is near 0
            ours = our_name(f"{name}.weight")
            size = 0.02 * weight.norm() / product.norm()
            lora[f"{name}.lora_B"] *= size
            base[ours], file[f"{name}.weight"] = weight, weight + part * size * product
        text = message(lambda: load(half({**file, **lora}, torch.bfloat16), base=base))
        assert "times the product, which no rounding does" in text

    def test_copies_in_half_precision(self, load: Any, state: dict[str, Tensor], message: Message) -> None:
        file, name = interpolated_lora(state), "decoder.layers.0.self_attn.q_proj.1.weight"
        for stem in {k.removesuffix(".lora_A") for k in file if k.endswith(".lora_A")}:
            file[f"{stem}.weight"] = file[f"{stem}.weight"] + file[f"{stem}.lora_B"] @ file[f"{stem}.lora_A"] / 4
        assert len(load(half(file, torch.float16), lora_weights="merged").merged) == 48
        file[name] = file[name] + 0.01 * file[name].norm() / WIDTH
        text = message(lambda: load(half(file, torch.float16), lora_weights="merged"))
        assert f"{name}: its weight is not that of expert 0" in text

    def test_an_interpolation_sums_products(self, load: Any, state: dict[str, Tensor]) -> None:
        file = interpolated_lora(state, 3)
        base = state_from_fairseq(state)
        found = load(file, base=base)
        assert (len(found.parts), found.changes) == (3, ())
        assert found.blended.config["r"] == 12
        for name in projections():
            attention = name.rpartition(".")[0]
            weights = torch.softmax(file[f"{attention}.lora_interpolation_weight"].double(), 0)
            pairs = [(file[f"{name}.{k}.lora_B"].double(), file[f"{name}.{k}.lora_A"].double()) for k in range(3)]
            expected = sum(w * b @ a / 4 for w, (b, a) in zip(weights, pairs, strict=True))
            key = f"{PEFT}.{name.replace('encoder_attn', 'cross_attn')}"
            a, b = (found.blended.tensors[f"{key}.lora_{h}.weight"].double() for h in "AB")
            assert torch.allclose(b @ a / 12, cast(Tensor, expected), rtol=1e-5, atol=1e-7)

    def test_copies_of_other_backbones_are_refused(self, load: Any, state: dict[str, Tensor], message: Message) -> None:
        """`--lora-num K` without paths leaves the copies random in the reference."""
        file, name = interpolated_lora(state), "decoder.layers.0.self_attn.q_proj.1.weight"
        file[name] = torch.randn(WIDTH, WIDTH)
        text = message(lambda: load(file, base=state_from_fairseq(state)))
        assert name in text
        text = message(lambda: load(file, lora_weights="unmerged"))
        assert f"{name}: its weight is not that of expert 0" in text

    def test_a_bias_that_is_not_the_first_experts(self, load: Any, state: dict[str, Tensor], message: Message) -> None:
        file = interpolated_lora(state)
        file["decoder.layers.0.self_attn.q_proj.1.bias"] += 1
        text = message(lambda: load(file, base=state_from_fairseq(state)))
        assert "decoder.layers.0.self_attn.q_proj.1.weight: its bias is not that of expert 0" in text


class TestBitFit:
    @pytest.fixture
    def tuned(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The biases whose names the reference trains."""
        generator = torch.Generator().manual_seed(3)
        trained = [k for k in state if k.endswith(".bias") and ("layer_norm" in k or ".fc" in k)]
        assert len(trained) == 20
        return {**state, **{k: state[k] + 0.1 * torch.randn(state[k].shape, generator=generator) for k in trained}}

    def test_changed_biases_are_an_expert(
        self, load: Any, ofa: OFAForConditionalGeneration, state: dict[str, Tensor], tuned: dict[str, Tensor]
    ) -> None:
        found = load(drifted(tuned), base=state_from_fairseq(state))
        assert (found.blended.method, len(found.blended.tensors)) == ("bitfit", 20)
        assert len(found.changes) == 32
        truth = logits(model_from(ofa.config, state_from_fairseq(drifted(tuned))))
        assert torch.allclose(logits(model_from(ofa.config, found.backbone), found.blended), truth, atol=1e-5)

    def test_a_fine_tuned_model_is_not(
        self, load: Any, state: dict[str, Tensor], tuned: dict[str, Tensor], message: Message
    ) -> None:
        base = state_from_fairseq(state)
        tuned["decoder.layers.0.fc1.weight"] = 1.5 * tuned["decoder.layers.0.fc1.weight"]
        text = message(lambda: load(tuned, base=base))
        assert "Training changed 21 weights" in text
        assert "model.decoder.layers.0.fc1.weight" in text
        assert "its weights are the base's" in message(lambda: load(state, base=base))


class TestChanges:
    def test_statistics_that_moved_are_listed(self, load: Any, state: dict[str, Tensor]) -> None:
        found = load({**drifted(state), **random_adapters()}, base=state_from_fairseq(state))
        expected = {f"model.{k}" for k in state if k.endswith(("running_mean", "running_var"))}
        assert {c.name for c in found.changes} == expected
        assert all(c.is_statistic for c in found.changes)
        change = next(c for c in found.changes if c.name.endswith("embed_images.bn1.running_mean"))
        old = state["encoder.embed_images.bn1.running_mean"]
        assert change.largest == pytest.approx(float((0.25 * old.abs() + 0.1).max()))

    def test_counters_have_no_effect(self, load: Any, state: dict[str, Tensor]) -> None:
        moved = {k: t + 3 if k.endswith("num_batches_tracked") else t for k, t in state.items()}
        assert load({**moved, **random_adapters()}, base=state_from_fairseq(state)).changes == ()

    def test_trained_weights_are_told_from_statistics(self, load: Any, state: dict[str, Tensor]) -> None:
        base = state_from_fairseq(state)
        state["encoder.layers.0.fc1.bias"] = state["encoder.layers.0.fc1.bias"] + 1
        changes = load({**state, **random_adapters()}, base=base).changes
        assert [(c.name, c.is_statistic) for c in changes] == [("model.encoder.layers.0.fc1.bias", False)]

    def test_a_base_of_another_size(self, load: Any, state: dict[str, Tensor], message: Message) -> None:
        base = state_from_fairseq(state)
        base["model.encoder.pos_ln.bias"] = torch.ones(16)
        del base["model.decoder.pos_ln.bias"]
        text = message(lambda: load({**state, **random_adapters()}, base=base))
        assert "model.encoder.pos_ln.bias is [32], in the base [16]" in text
        assert "the base lacks model.decoder.pos_ln.bias" in text
