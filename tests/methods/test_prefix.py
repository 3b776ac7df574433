"""Prefixes against attention written out head by head, and as a PEFT method like any other."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from pituning.backbones.base import Backbone
from pituning.backbones.ofa.layers import OFAAttention
from pituning.errors import ExpertError, PituningError, RefusedError
from pituning.experts import Expert
from pituning.methods import PrefixConfig, attached, config_dict, folded, initial_tensors, make_config
from pituning.methods.prefix import PrefixLayer, is_folded
from pituning.training.crossfit import Search
from pituning.training.train_expert import fold_experts, train_expert
from pituning.training.trainer import TrainSettings
from tests.conftest import build_ofa

PREFIX = "base_model.model.model."
SITES = ["self_attn"]
SIZES = {"encoder": 2, "decoder": 3}  # layers of the tiny OFA, whose model size is 16


def wrapped(config: PrefixConfig, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, PeftModel]:
    """A tiny OFA, and a copy of it with a prefix whose parameters are all random."""
    base = build_ofa(dtype).model
    model = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False).eval()
    randomise(model)
    return base, model


def randomise(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator).to(parameter))


@torch.no_grad()
def logits(model: nn.Module, rows: int = 3, seed: int = 2) -> Tensor:
    """What a model says to some padded texts with images."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, 90, (rows, 6), generator=generator)
    tokens[0, 4:] = 0  # padding
    images = torch.randn(rows, 3, 32, 48, generator=generator).to(next(model.parameters()).dtype)
    target = torch.randint(4, 90, (rows, 4), generator=generator)
    found: Tensor = model(input_ids=tokens, patch_images=images, decoder_input_ids=target).logits
    return found


def slow_attention(layer: OFAAttention, x: Tensor, bias: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One row, head and query at a time: softmax over the prefix, which has no bias, and what the bias lets through."""
    out = torch.zeros_like(x)
    width = layer.head_width
    for row in range(len(x)):
        keys = torch.cat([key, layer.k_proj(x[row])])
        values = torch.cat([value, layer.v_proj(x[row])])
        for head in range(layer.heads):
            part = slice(head * width, (head + 1) * width)
            for query in range(x.shape[1]):
                scores = keys[:, part] @ layer.q_proj(x[row, query])[part] / math.sqrt(width * 2.0)
                scores[len(key) :] += bias[row, head, query]
                weights = scores.exp() / scores.exp().sum()
                out[row, query, part] = layer.c_attn[head] * (weights @ values[:, part])
    return layer.out_proj(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_attention_with_more_keys_and_values(dtype: torch.dtype) -> None:
    base, model = wrapped(PrefixConfig(length=3, target_modules=SITES), dtype)
    attention = base.model.encoder.layers[0].self_attn
    layer = model.base_model.model.model.encoder.layers[0].self_attn
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 16, generator=generator).to(dtype)
    bias = torch.randn(2, 2, 5, 5, generator=generator).to(dtype)
    bias[1, ..., 3:] = float("-inf")
    with torch.no_grad():
        found, _ = layer(x, bias=bias)
        expected = slow_attention(attention, x, bias, layer.prefix_key["default"], layer.prefix_value["default"])
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        assert (found - attention(x, bias=bias)[0]).abs().max() > 0.1, "the prefix must matter"


def test_file_keys_and_sizes(ofa: Backbone) -> None:
    initial = initial_tensors(ofa, PrefixConfig(length=300, decoder_length=200, target_modules=SITES))
    assert set(initial) == {
        f"{PREFIX}{stack}.layers.{i}.self_attn.prefix_{part}"
        for stack, layers in SIZES.items()
        for i in range(layers)
        for part in ("key", "value")
    }
    for name, tensor in initial.items():
        assert tensor.shape == (300 if "encoder" in name else 200, 16)
        assert float(tensor.std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({"length": 4}, {"encoder": 4, "decoder": 4}),
        ({"length": 4, "decoder_length": 0}, {"encoder": 4}),
        ({"length": 0, "decoder_length": 5}, {"decoder": 5}),
    ],
)
@pytest.mark.parametrize("projection", [False, True])
def test_either_stack_may_go_without(
    ofa: Backbone, random_examples: Any, options: dict[str, int], shapes: dict[str, int], projection: bool
) -> None:
    config = make_config("prefix", ofa, projection=projection, **options)
    plain, tensors = folded(config_dict(config), initial_tensors(ofa, config))
    found = {k.split(".")[3]: len(t) for k, t in tensors.items()}
    assert found == shapes
    assert len(tensors) == 2 * sum(SIZES[stack] for stack in shapes)
    with attached(ofa, plain, tensors):
        assert torch.isfinite(ofa.loss(ofa.collate(random_examples(2)))).all()


class TestAsAPeftMethod:
    @pytest.mark.parametrize("projection", [False, True])
    def test_saves_and_loads(self, tmp_path: Path, projection: bool) -> None:
        base, model = wrapped(PrefixConfig(length=3, decoder_length=2, projection=projection, target_modules=SITES))
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        assert torch.equal(logits(loaded), logits(model))
        assert (logits(model) - logits(base)).abs().max() > 0.1
        low = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=True).eval()
        assert torch.equal(logits(low), logits(model))

    @pytest.mark.parametrize("projection", [False, True])
    def test_without_it_the_base_is_there_bit_for_bit(self, projection: bool) -> None:
        base, model = wrapped(PrefixConfig(length=3, projection=projection, target_modules=SITES))
        bare = logits(base)
        with model.disable_adapter():
            assert torch.equal(logits(model), bare)
        with pytest.raises(NotImplementedError, match="prefix adds positions"):
            model.merge_and_unload()
        unloaded = model.unload()
        assert torch.equal(logits(unloaded), bare)
        assert unloaded.state_dict().keys() == base.state_dict().keys()
        assert not any(isinstance(m, PrefixLayer) for m in unloaded.modules())

    @pytest.mark.parametrize("projection", [False, True])
    def test_two_adapters_live_side_by_side(self, projection: bool) -> None:
        _, model = wrapped(PrefixConfig(length=3, target_modules=SITES))
        first = logits(model)
        other = PrefixConfig(length=2, decoder_length=4, projection=projection, target_modules=SITES)
        model.add_adapter("other", other)
        model.eval()
        assert torch.equal(logits(model), first)
        model.set_adapter("other")
        randomise(model, 5)
        second = logits(model)
        assert not torch.allclose(second, first)
        model.set_adapter("default")
        assert torch.equal(logits(model), first)
        model.base_model.set_adapter(["default", "other"])
        assert not torch.allclose(logits(model), first)
        model.set_adapter("default")
        model.delete_adapter("other")
        assert torch.equal(logits(model), first)
        assert not any("other" in name for name in model.state_dict())

    @pytest.mark.parametrize("projection", [False, True])
    def test_a_deep_copy_is_a_model_of_its_own(self, projection: bool) -> None:
        _, model = wrapped(PrefixConfig(length=3, projection=projection, target_modules=SITES))
        before = logits(model)
        copied = copy.deepcopy(model)
        assert torch.equal(logits(copied), before)
        randomise(model, 7)
        assert torch.equal(logits(copied), before)
        assert not torch.allclose(logits(model), before)
        randomise(copied, 7)
        assert torch.equal(logits(copied), logits(model))


def test_written_step_by_step_it_is_the_same() -> None:
    """The prefix is not kept in the cache, and is there again at every step."""
    _, model = wrapped(PrefixConfig(length=3, decoder_length=2, target_modules=SITES), torch.float64)
    tokens = torch.randint(4, 90, (2, 5), generator=torch.Generator().manual_seed(0))
    said = torch.cat([torch.full((2, 1), 2), tokens[:, :4]], 1)
    with torch.no_grad():
        whole = model(input_ids=tokens, decoder_input_ids=said).logits
        cache, encoded = None, None
        for step in range(5):
            out = model(
                input_ids=tokens, encoder_outputs=encoded, decoder_input_ids=said[:, step : step + 1],
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
            cache = out.past_key_values
            torch.testing.assert_close(out.logits[:, 0], whole[:, step], rtol=1e-10, atol=1e-10)
        assert cache.get_seq_length() == 5


class TestDropout:
    def outputs(self, dropout: float) -> tuple[Tensor, Tensor, Tensor]:
        """One row, given twice to a layer in training, and to the same layer in eval mode."""
        _, model = wrapped(PrefixConfig(length=30, dropout=dropout, target_modules=SITES))
        layer = model.base_model.model.model.encoder.layers[0].self_attn
        x = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1)
        torch.manual_seed(0)
        with torch.no_grad():
            trained = layer.train()(x, bias=torch.zeros(1, 2, 4, 4))[0]
            return trained[0], trained[1], layer.eval()(x, bias=torch.zeros(1, 2, 4, 4))[0][0]

    def test_is_none_by_default(self) -> None:
        first, second, still = self.outputs(0.0)
        assert torch.equal(first, second)
        assert torch.equal(first, still)

    def test_is_drawn_for_every_row(self) -> None:
        first, second, still = self.outputs(0.5)
        assert not torch.allclose(first, second)
        assert not torch.allclose(first, still)

    def test_does_not_change_the_start(self, ofa: Backbone) -> None:
        one, other = (initial_tensors(ofa, make_config("prefix", ofa, dropout=d)) for d in (0.0, 0.2))
        assert all(torch.equal(other[k], t) for k, t in one.items())


class TestProjection:
    """A network makes keys and values in training, and is folded into them afterwards."""

    CONFIG = PrefixConfig(length=3, decoder_length=2, projection=True, projection_dim=7, target_modules=SITES)

    def test_its_parts_are_registered_once(self, ofa: Backbone) -> None:
        shapes = {k.removeprefix(PREFIX): tuple(t.shape) for k, t in initial_tensors(ofa, self.CONFIG).items()}
        expected: dict[str, tuple[int, ...]] = {}
        for stack, length in (("encoder", 3), ("decoder", 2)):
            first = f"{stack}.layers.0.self_attn.prefix_"
            expected |= {f"{first}embedding": (length, 16), f"{first}down.weight": (7, 16), f"{first}down.bias": (7,)}
            for layer in range(SIZES[stack]):
                up = f"{stack}.layers.{layer}.self_attn.prefix_up."
                expected |= {f"{up}weight": (32, 7), f"{up}bias": (32,)}
        assert shapes == expected

    def test_is_embedding_linear_relu_linear(self) -> None:
        """The formula of the reference, whose last Linear makes the keys and values of all layers at once."""
        _, model = wrapped(self.CONFIG, torch.float64)
        for stack, layers in SIZES.items():
            attentions = [b.self_attn for b in getattr(model.base_model.model.model, stack).layers]
            first = attentions[0]
            hidden = first.prefix_down["default"](first.prefix_embedding["default"]).clamp(min=0)
            weight = torch.cat([a.prefix_up["default"].weight for a in attentions])
            bias = torch.cat([a.prefix_up["default"].bias for a in attentions])
            every = (hidden @ weight.T + bias).view(len(hidden), layers, 2, 16)
            for index, attention in enumerate(attentions):
                for part, found in enumerate(attention.plain("default")):
                    torch.testing.assert_close(found, every[:, index, part], rtol=1e-12, atol=1e-12)

    def test_every_part_gets_a_gradient(self, ofa: Backbone, random_examples: Any) -> None:
        with attached(ofa, self.CONFIG) as site:
            ofa.loss(ofa.collate(random_examples(3))).sum().backward()
            assert [k for k, p in site.parameters.items() if p.grad is None or not p.grad.any()] == []

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_folded_it_is_the_same_bit_by_bit(
        self, backbone_of: Any, random_expert: Any, random_examples: Any, attached_loss: Any, dtype: torch.dtype
    ) -> None:
        backbone = backbone_of("ofa", dtype)
        expert = random_expert(backbone, "prefix", 1, scale=0.5, projection=True)
        assert not is_folded(expert.config)
        config, tensors = folded(expert.config, expert.tensors)
        plain = replace(expert, config=config, tensors=tensors)
        assert is_folded(config)
        assert {k.rpartition(".")[2] for k in tensors} == {"prefix_key", "prefix_value"}
        examples = random_examples(4)
        assert torch.equal(attached_loss(backbone, plain, examples), attached_loss(backbone, expert, examples))
        plain.verify(backbone)
        assert folded(config, tensors) == (config, tensors), "a plain prefix stays as it is"
        with torch.autocast("cpu", torch.bfloat16):
            rounded = folded(expert.config, expert.tensors)[1]
        assert all(torch.equal(rounded[key], tensor) for key, tensor in tensors.items()), "autocast rounds nothing"

    def test_a_missing_part_is_named(self, ofa: Backbone, random_expert: Any) -> None:
        expert = random_expert(ofa, "prefix", 1, projection=True)
        for part in ("decoder.layers.0.self_attn.prefix_embedding", "encoder.layers.1.self_attn.prefix_up.bias"):
            tensors = {k: t for k, t in expert.tensors.items() if not k.endswith(part)}
            with pytest.raises(ExpertError, match=part):
                folded(expert.config, tensors)

    def test_a_trained_expert_is_plain(self, ofa: Backbone, make_task: Any, tmp_path: Path) -> None:
        settings = TrainSettings(learning_rate=1e-3, steps=3, batch_size=4)
        task = make_task(shots=2)
        expert = train_expert(ofa, task, "prefix", settings=settings, projection=True, length=2)
        assert is_folded(expert.config)
        loaded = Expert.load(expert.save(tmp_path / "expert"))
        loaded.verify(ofa)
        assert loaded.card.parameters == sum(t.numel() for t in loaded.tensors.values()) == 5 * 2 * 2 * 16
        # retrained without a fold: again through the network, from the same start
        versions = fold_experts(ofa, task, loaded, Search(folds=2))
        assert [sorted(v.tensors) for v in versions.values()] == [sorted(loaded.tensors)] * 3
        start = folded(*started(ofa, expert))[1]
        moved = [float((v.tensors[k] - t).norm() / t.norm()) for v in versions.values() for k, t in start.items()]
        assert 0 < max(moved) < 0.5, "all versions are near the common start"


def started(backbone: Backbone, expert: Expert) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = {**expert.config, "projection": True}
    return config, initial_tensors(backbone, config)


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"length": 0}, "length=0, decoder_length=None: at least one stack"),
            ({"length": -1, "decoder_length": 3}, "length=-1"),
            ({"dropout": 1.0}, "less than 1, not 1.0"),
            ({"projection_dim": 4}, "projection_dim=4 needs projection=True"),
            ({"projection": True, "projection_dim": 0}, "at least 1, not 0"),
        ],
    )
    def test_values_without_a_meaning(self, ofa: Backbone, options: dict[str, Any], said: str) -> None:
        with pytest.raises(ValueError, match=said):
            PrefixConfig(**options)
        with pytest.raises(PituningError, match=f"method 'prefix': .*{said}"):
            make_config("prefix", ofa, **options)

    def test_a_decoder_length_without_a_decoder(self) -> None:
        config = PrefixConfig(decoder_length=2, target_modules=SITES)
        encoder = build_ofa(torch.float32).model.model.encoder
        with pytest.raises(ValueError, match="decoder_length=2 is set, but no module of this model is named 'decoder'"):
            get_peft_model(encoder, config)

    def test_cross_attention(self, ofa: Backbone, random_examples: Any) -> None:
        config = make_config("prefix", ofa, target_modules=["cross_attn"])
        with attached(ofa, config), pytest.raises(RefusedError, match="in front of self-attention"):
            ofa.loss(ofa.collate(random_examples(2)))
