"""BitFit against the same model with other biases, and as a PEFT method like any other."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration

from pituning.backbones.base import Backbone, normed_and_linear
from pituning.errors import PituningError, RefusedError
from pituning.methods import BitFitConfig, attached, config_dict, initial_tensors, make_config
from pituning.methods.bitfit import REFERENCE_NAMES, BitFitLayer
from tests.conftest import build_ofa

PREFIX = "base_model.model."


class Tiny(nn.Module):
    """Everything that BitFit looks at, and what it leaves alone."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(5)
        self.first = nn.Linear(5, 7)
        self.norm = nn.LayerNorm(7)
        self.group_norm = nn.GroupNorm(7, 7)
        self.bare = nn.Linear(7, 7, bias=False)
        self.rms = nn.RMSNorm(7)
        self.attention = nn.MultiheadAttention(7, 1, batch_first=True)
        self.second = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.first(self.batch_norm(x))))
        x = self.rms(self.bare(self.group_norm(x)))
        x = x + self.attention(x[:, None], x[:, None], x[:, None])[0][:, 0]
        out: Tensor = self.second(x)
        return out


def adapted(config: BitFitConfig | None = None, seed: int = 0) -> tuple[Tiny, PeftModel, Tensor]:
    """A model, a copy of it with random vectors, and an input."""
    torch.manual_seed(seed)
    base = Tiny().double().eval()
    model = get_peft_model(copy.deepcopy(base), config or BitFitConfig(), autocast_adapter_dtype=False).eval()
    randomise(model)
    return base, model, torch.randn(4, 5, dtype=torch.float64)


def randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()


def adapted_names(model: nn.Module) -> set[str]:
    return {n for n, m in model.named_modules() if isinstance(m, BitFitLayer)}


def test_adds_to_every_bias_and_to_nothing_else() -> None:
    base, model, x = adapted()
    assert adapted_names(model.base_model.model) == {"first", "norm", "second"}
    vectors = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert set(vectors) == {f"{PREFIX}{n}.bitfit_bias.default" for n in ("first", "norm", "second")}
    for name in ("first", "norm", "second"):
        bias = base.get_submodule(name).bias
        bias.data = bias + vectors[f"{PREFIX}{name}.bitfit_bias.default"]
    torch.testing.assert_close(model(x), base(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["attention.out_proj", "batch_norm", "group_norm", "attention"])
def test_what_it_cannot_adapt_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} is a "):
        get_peft_model(Tiny(), BitFitConfig(target_modules=[name]))


class TestWhichBiases:
    def test_all_of_ofa(self) -> None:
        model = build_ofa(torch.float32).model
        expected = {
            n for n, m in model.named_modules()
            if isinstance(m, nn.Linear | nn.LayerNorm) and m.bias is not None
        }  # fmt: skip
        layers = {n for n in expected if ".layers." in n}
        # 10 in each layer of the encoder and 16 in each of the decoder: 52 for the reference's two pairs of layers
        assert len(layers) == 2 * 10 + 3 * 16
        assert adapted_names(get_peft_model(model, BitFitConfig()).base_model.model) == expected

    def test_the_references_choice(self) -> None:
        model = build_ofa(torch.float32).model
        found = adapted_names(get_peft_model(model, BitFitConfig(subset="reference")).base_model.model)
        assert len(found) == 2 * 4 + 3 * 5 + 2
        assert {n.rpartition(".")[2] for n in found} == set(REFERENCE_NAMES)
        assert {n for n in found if ".layers." not in n} == {"model.encoder.layer_norm", "model.decoder.layer_norm"}
        assert not any("mid" in n or "ffn" in n or "embedding" in n or "proj" in n for n in found)

    @pytest.mark.parametrize("targets", [None, "all"])
    def test_the_image_stem_is_left_alone(self, targets: str | None) -> None:
        model = build_ofa(torch.float32).model
        stem = model.model.encoder.embed_images
        before = {k: v.clone() for k, v in stem.state_dict().items()}
        adapted_model = get_peft_model(model, BitFitConfig(target_modules=targets)).train()
        assert not adapted_names(stem)
        adapted_model(
            input_ids=torch.full((2, 3), 7), patch_images=torch.randn(2, 3, 32, 32), labels=torch.full((2, 2), 9)
        ).loss.backward()
        assert not any(p.requires_grad for p in stem.parameters())
        assert all(torch.equal(v, before[k]) for k, v in stem.state_dict().items())

    def test_of_a_text_encoder(self, bert: Backbone) -> None:
        names = make_config("bitfit", bert).target_modules
        assert set(names) == {"LayerNorm", "query", "key", "value", "output.dense", "intermediate.dense"}
        keys = initial_tensors(bert, make_config("bitfit", bert))
        assert len(keys) == 1 + 2 * 8, "embeddings' norm; per layer six Linear and two LayerNorm"
        assert not any("pooler" in k for k in keys)

    def test_of_bart(self) -> None:
        config = BartConfig(
            vocab_size=9, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=1,
            decoder_attention_heads=1, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=8,
        )  # fmt: skip
        model = BartForConditionalGeneration(config)
        found = adapted_names(get_peft_model(model, BitFitConfig()).base_model.model)
        assert len(found) == 2 + (4 + 2 + 2) + (8 + 2 + 3)
        assert "lm_head" not in found

    def test_a_model_without_biases_is_refused(self, t5: Backbone) -> None:
        with pytest.raises(RefusedError, match=r"'tiny-t5' \(T5ForConditionalGeneration\) has no bias"):
            make_config("bitfit", t5)
        with pytest.raises(PituningError, match="no Linear or norm module with a bias"):
            initial_tensors(t5, BitFitConfig())
        t5.require_free()

    def test_the_references_names_are_ofas(self, bert: Backbone) -> None:
        with pytest.raises(
            PituningError, match=r"subset='reference' in this model \('reference' knows the names of OFA"
        ):
            initial_tensors(bert, make_config("bitfit", bert, subset="reference"))
        with pytest.raises(ValueError, match="'all' or 'reference', not 'some'"):
            BitFitConfig(subset="some")

    def test_names_are_the_shortest_that_select_no_others(self) -> None:
        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.dense = nn.Linear(2, 2)
                self.other = nn.ModuleDict({"dense": nn.Linear(2, 2, bias=False), "norm": nn.LayerNorm(2)})

        model = nn.ModuleDict({"a": Block(), "b": Block()})
        assert normed_and_linear(model) == ["a.dense", "norm", "b.dense"]
        assert normed_and_linear(model, skip=["b.other.norm"]) == ["a.dense", "a.other.norm", "b.dense"]
        with pytest.raises(PituningError, match="'dense' has no suffix that selects it alone"):
            normed_and_linear(Block())


class TestAsAPeftMethod:
    def test_starts_at_the_base_bit_for_bit(self, bert: Backbone, random_examples: Any) -> None:
        batch = bert.collate(random_examples())
        bare = bert.loss(batch)
        with attached(bert, make_config("bitfit", bert)) as site:
            assert torch.equal(bert.loss(batch), bare)
            assert all(not p.any() for p in site.parameters.values())
            assert {k.rpartition(".")[2] for k in site.parameters} == {"bitfit_bias"}

    @pytest.mark.parametrize("targets", [None, ["first", "rms", "bare"]])
    def test_saves_and_loads(self, tmp_path: Path, targets: list[str] | None) -> None:
        base, model, x = adapted(BitFitConfig(target_modules=targets))
        model.save_pretrained(tmp_path)
        bare = base(x)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, autocast_adapter_dtype=False).eval()
        assert torch.equal(loaded(x), model(x))
        low = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=True).eval()
        assert torch.equal(low(x), model(x))
        assert not torch.allclose(loaded(x), bare)
        with loaded.disable_adapter():
            assert torch.equal(loaded(x), bare)
        unloaded = loaded.unload()
        assert torch.equal(unloaded(x), bare)
        assert unloaded.state_dict().keys() == base.state_dict().keys()

    def test_the_references_choice_saves_and_loads(self, tmp_path: Path) -> None:
        """More than twenty modules: PEFT rewrites the list of names, and the choice must survive it."""
        base = build_ofa(torch.float32).model
        model = get_peft_model(copy.deepcopy(base), BitFitConfig(subset="reference")).eval()
        randomise(model)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(base, tmp_path).eval()
        assert adapted_names(loaded) == adapted_names(model)
        inputs = {"input_ids": torch.full((2, 3), 7), "decoder_input_ids": torch.full((2, 2), 9)}
        with torch.no_grad():
            assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)

    def test_two_adapters_live_side_by_side(self) -> None:
        _, model, x = adapted()
        first = model(x)
        model.add_adapter("other", BitFitConfig())
        assert adapted_names(model.base_model.model) == {"first", "norm", "second"}
        assert torch.equal(model(x), first)
        model.set_adapter("other")
        randomise(model)
        second = model(x)
        assert not torch.allclose(second, first)
        model.set_adapter("default")
        assert torch.equal(model(x), first)
        model.delete_adapter("other")
        assert torch.equal(model(x), first)

    def test_merges_into_the_base(self) -> None:
        base, model, x = adapted()
        expected = model(x)
        merged = model.merge_and_unload()
        assert merged.state_dict().keys() == base.state_dict().keys()
        assert not adapted_names(merged)
        torch.testing.assert_close(merged(x), expected, rtol=1e-12, atol=1e-12)

    def test_merged_and_unmerged_not_a_bit_has_changed(self) -> None:
        base, model, x = adapted()
        expected, bare = model(x), base(x)
        model.merge_adapter()
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
        model.unmerge_adapter()
        assert torch.equal(model(x), expected)
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(model(x), bare)
        assert torch.equal(model(x), expected)

    def test_vectors_on_modules_without_bias_are_not_merged(self) -> None:
        _, model, x = adapted(BitFitConfig(target_modules=["first", "rms"]))
        expected = model(x)
        with pytest.raises(ValueError, match=r"rms is a RMSNorm without bias: its adapter \[7\] cannot be merged"):
            model.merge_and_unload()
        assert torch.equal(model(x), expected), "a refused merge leaves nothing half merged"

    def test_a_merge_that_is_not_finite_is_refused(self) -> None:
        _, model, _ = adapted()
        with torch.no_grad():
            model.base_model.model.norm.bitfit_bias["default"][2] = float("nan")
        with pytest.raises(ValueError, match="merged bias of norm"):
            model.merge_and_unload(safe_merge=True)

    def test_biases_for_a_model_that_has_none(self, t5: Backbone, random_examples: Any) -> None:
        config = make_config("bitfit", t5, target_modules=["wo", "layer_norm"])
        batch = t5.collate(random_examples(3))
        bare = t5.loss(batch)
        with attached(t5, config_dict(config)) as site:
            assert torch.equal(t5.loss(batch), bare)
            randomise(site.peft_model)
            assert (t5.loss(batch) - bare).abs().max() > 0.1
