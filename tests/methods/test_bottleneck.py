"""The bottleneck adapter against its formula, and as a PEFT method like any other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from pituning.backbones.base import Backbone
from pituning.methods import BottleneckConfig, attached, initial_tensors, make_config
from tests.conftest import build_ofa


class Tiny(nn.Module):
    """Two layers, one of which is adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.second = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x)))
        return out


def adapted(seed: int = 0) -> tuple[Tiny, PeftModel]:
    torch.manual_seed(seed)
    base = Tiny().double()
    copy = Tiny().double()
    copy.load_state_dict(base.state_dict())
    model = get_peft_model(copy, BottleneckConfig(r=4, target_modules=["first"]), autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bottleneck_" in name:
                parameter.normal_()
    return base, model


def by_formula(base: Tiny, model: PeftModel, x: Tensor) -> Tensor:
    """h + W_up relu(W_down h + b_down) + b_up on the first layer's output h."""
    p = {n.removeprefix("base_model.model.first.").replace(".default", ""): v for n, v in model.named_parameters()}
    h = x @ base.first.weight.T + base.first.bias
    inner = (h @ p["bottleneck_down.weight"].T + p["bottleneck_down.bias"]).clamp(min=0)
    h = h + inner @ p["bottleneck_up.weight"].T + p["bottleneck_up.bias"]
    return torch.tanh(h) @ base.second.weight.T + base.second.bias


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5)])
def test_is_its_formula(shape: tuple[int, ...]) -> None:
    base, model = adapted()
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(model(x), by_formula(base, model, x), rtol=1e-13, atol=1e-13)
    assert not torch.allclose(model(x), base(x))
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))


def test_its_gradients_are_those_of_the_formula() -> None:
    base, model = adapted()
    x = torch.randn(6, 5, dtype=torch.float64)
    free = [p for p in model.parameters() if p.requires_grad]
    assert len(free) == 4
    found = torch.autograd.grad(model(x).square().sum(), free)
    expected = torch.autograd.grad(by_formula(base, model, x).square().sum(), free)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_saves_and_loads_as_pefts_own_methods_do(tmp_path: Path) -> None:
    base, model = adapted(1)
    model.save_pretrained(tmp_path)
    x = torch.randn(4, 5, dtype=torch.float64)
    bare = base(x)
    loaded = PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False)
    assert torch.equal(loaded(x), model(x))
    assert not torch.allclose(loaded(x), bare)


def test_two_adapters_live_side_by_side() -> None:
    _, model = adapted(2)
    x = torch.randn(4, 5, dtype=torch.float64)
    first = model(x)
    model.add_adapter("other", BottleneckConfig(r=2, target_modules=["first"], init_std=0.5))
    assert torch.equal(model(x), first)
    model.set_adapter("other")
    second = model(x)
    assert not torch.allclose(second, first)
    model.set_adapter("default")
    assert torch.equal(model(x), first)
    model.delete_adapter("other")
    assert torch.equal(model(x), first)


def test_unloading_gives_the_base_back_and_merging_is_refused() -> None:
    base, model = adapted(3)
    x = torch.randn(4, 5, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="nonlinearity"):
        model.merge_and_unload()
    bare = model.unload()
    assert torch.equal(bare(x), base(x))
    assert bare.state_dict().keys() == base.state_dict().keys()


def test_starts_close_to_the_identity(bert: Backbone) -> None:
    initial = initial_tensors(bert, BottleneckConfig(r=64, target_modules=["output.dense"]))
    assert len(initial) == 4 * 4  # four modules of four tensors
    for name, tensor in initial.items():
        if name.endswith("bias"):
            assert not tensor.any()
        else:
            assert float(tensor.std()) == pytest.approx(0.02 if "down" in name else 1e-3, rel=0.15)


class Site(nn.Module):
    """A module without parameters that says its width, as the ends of OFA's residual branches are."""

    out_features = 7
    drop_path_rate = 0.25

    def forward(self, x: Tensor) -> Tensor:
        return x


def with_site(config: BottleneckConfig, dtype: torch.dtype = torch.float64) -> tuple[PeftModel, Tensor, Tensor]:
    """A model whose middle is a site with a random adapter, an input, and the site's own input."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(5, 7), Site(), nn.LayerNorm(7))
    model = get_peft_model(nn.Sequential(Half(base)).to(dtype), config, autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bottleneck_" in name:
                parameter.normal_()
    x = torch.randn(6, 5, dtype=dtype)
    return model, x, base[0](x)


class Half(nn.Module):
    """Names for the parts of a sequence."""

    def __init__(self, parts: nn.Sequential) -> None:
        super().__init__()
        self.first, self.site, self.norm = parts

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.site(self.first(x)))
        return out


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "tanh": lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
    "identity": lambda x: x,
}


@pytest.mark.parametrize("scaling", [1.0, 0.5])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("place", ["site", "norm"])
def test_activation_and_scaling(activation: str, scaling: float, place: str) -> None:
    """x + s · (W_up f(W_down x + b_down) + b_up), behind a site without parameters and behind a LayerNorm."""
    config = BottleneckConfig(r=4, target_modules=[place], activation=activation, scaling=scaling)
    model, x, h = with_site(config)
    parts = model.base_model.model[0]
    layer = getattr(parts, place)
    h = layer.base_layer(h)
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    expected = h + scaling * (ACTIVATIONS[activation](h @ down.weight.T + down.bias) @ up.weight.T + up.bias)
    expected = expected if place == "norm" else parts.norm(expected)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert down.weight.dtype == torch.float64, "a site without parameters takes its parent's dtype"


class TestDropout:
    def run(self, **options: Any) -> tuple[Tensor, Tensor, nn.Module]:
        """Hidden units as the up-projection sees them in training, and without dropout."""
        config = BottleneckConfig(r=4000, target_modules=["site"], activation="identity", **options)
        model, x, h = with_site(config)
        layer = model.base_model.model[0].site.train()
        seen = []
        layer.bottleneck_up["default"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        with torch.no_grad():
            model(x)
            return seen[0], layer.bottleneck_down["default"](h), layer

    def test_is_none_by_default(self) -> None:
        found, hidden, _ = self.run()
        assert torch.equal(found, hidden)

    @pytest.mark.parametrize(("dropout", "rate"), [(0.5, 0.5), ("drop-path", 0.25)])
    def test_is_on_the_hidden_units_in_training(self, dropout: float | str, rate: float) -> None:
        found, hidden, layer = self.run(dropout=dropout)
        kept = found != 0
        assert float(kept.double().mean()) == pytest.approx(1 - rate, abs=0.02)
        torch.testing.assert_close(found[kept], hidden[kept] / (1 - rate))
        x = torch.randn(2, 7, dtype=torch.float64)
        layer.eval()
        assert torch.equal(layer(x), layer(x))

    def test_drop_path_is_that_of_ofas_layer(self, ofa: Backbone) -> None:
        config = make_config("bottleneck", ofa, dropout="drop-path")
        with attached(ofa, config) as site:
            layers = site.backbone.model.model.encoder.layers
            found = [layer.ffn_output.bottleneck_dropout["default"].p for layer in layers]
        assert found == pytest.approx([0.0, 0.2]), "stochastic depth grows over the layers"

    def test_drop_path_is_refused_elsewhere(self, bert: Backbone, message: Any) -> None:
        text = message(initial_tensors, bert, make_config("bottleneck", bert, dropout="drop-path"))
        assert "a Linear has no drop_path_rate; give a number" in text
        bert.require_free()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dropout": "droppath"}, "a probability or 'drop-path', not 'droppath'"),
        ({"dropout": 1.0}, "less than 1, not 1.0"),
        ({"dropout": -0.1}, "at least 0"),
        ({"activation": "rleu"}, "unknown activation 'rleu': did you mean 'relu"),
        ({"activation": "prelu"}, "'prelu' has parameters of its own"),
    ],
)
def test_values_without_a_meaning(bert: Backbone, message: Any, options: dict[str, Any], said: str) -> None:
    assert said in message(make_config, "bottleneck", bert, **options)


def test_runs_in_its_own_precision() -> None:
    """PEFT keeps adapters in float32 on a backbone in half precision; here float64 on float32."""
    model, x, _ = with_site(BottleneckConfig(r=4, target_modules=["site"]), torch.float32)
    expected = model(x)
    site = model.base_model.model[0].site
    site.bottleneck_down.double()
    site.bottleneck_up.double()
    found = model(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_ofas_sites_as_a_peft_method(tmp_path: Path) -> None:
    base = build_ofa(torch.float32).model
    config = BottleneckConfig(r=4, target_modules=["self_attn_output", "ffn_output"], init_std=0.5, scaling=0.7)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    inputs = {"input_ids": torch.full((2, 3), 7), "decoder_input_ids": torch.full((2, 2), 9)}
    with torch.no_grad():
        bare, expected = base(**inputs).logits, model(**inputs).logits
        assert not torch.allclose(bare, expected)
        model.save_pretrained(tmp_path)
        for low in (False, True):
            loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low).eval()
            assert torch.equal(loaded(**inputs).logits, expected)
        with loaded.disable_adapter():
            assert torch.equal(loaded(**inputs).logits, bare)
        unloaded = loaded.unload()
        assert torch.equal(unloaded(**inputs).logits, bare)
    assert [n for n, _ in unloaded.named_modules()] == [n for n, _ in base.named_modules()]


def test_sits_where_the_paper_puts_it(bert: Backbone, t5: Backbone, ofa: Backbone, random_expert: Any) -> None:
    keys = random_expert(ofa, "bottleneck").tensors
    assert {k.split(".bottleneck_")[0].removeprefix("base_model.model.model.") for k in keys} == {
        f"{stack}.layers.{i}.{site}_output"
        for stack, layers in (("encoder", 2), ("decoder", 3))
        for i in range(layers)
        for site in ("self_attn", "ffn")
    }
    for backbone, places in (
        (bert, ("attention.output.dense", "output.dense")),
        (t5, ("SelfAttention.o", "DenseReluDense.wo")),
    ):
        modules = {k.split(".bottleneck_")[0] for k in random_expert(backbone, "bottleneck").tensors}
        assert all(m.endswith(places) for m in modules)
        assert all(any(m.endswith(p) for m in modules) for p in places)


def test_modules_that_do_not_say_their_width_are_refused(bert: Backbone, message: Any) -> None:
    config = BottleneckConfig(r=2, target_modules=["word_embeddings"])
    assert "embeddings.word_embeddings is a Embedding" in message(initial_tensors, bert, config)
