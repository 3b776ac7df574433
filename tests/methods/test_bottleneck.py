"""The bottleneck adapter against its formula, and as a PEFT method like any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from pituning.backbones.base import Backbone
from pituning.methods import BottleneckConfig, attached, initial_tensors


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


def test_sits_where_the_paper_puts_it(bert: Backbone, t5: Backbone, random_expert: Any) -> None:
    for backbone, places in (
        (bert, ("attention.output.dense", "output.dense")),
        (t5, ("SelfAttention.o", "DenseReluDense.wo")),
    ):
        modules = {k.split(".bottleneck_")[0] for k in random_expert(backbone, "bottleneck").tensors}
        assert all(m.endswith(places) for m in modules)
        assert all(any(m.endswith(p) for m in modules) for p in places)


def test_other_modules_than_linear_are_refused(fresh_bert_of: Callable[..., Backbone]) -> None:
    backbone = fresh_bert_of(torch.float32)
    with (
        pytest.raises(Exception, match=r"LayerNorm is a LayerNorm"),
        attached(backbone, BottleneckConfig(r=2, target_modules=["LayerNorm"])),
    ):
        pass
