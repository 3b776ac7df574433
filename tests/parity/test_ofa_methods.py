"""The paper's four methods on OFA, and the interpolation of two experts, against the reference's recorded numbers.

Shapes and places are those of its code: LoRA on every projection of every attention, adapters behind self-attention and FFN,
prefixes in self-attention, BitFit on the biases whose names the reference's substrings find.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

from pituning.backbones.loss import label_smoothed_nll
from pituning.backbones.ofa.configuration import OFAConfig
from pituning.backbones.ofa.generation import beam_search
from pituning.backbones.ofa.modeling import OFAForConditionalGeneration
from pituning.experts import Expert, ExpertCard
from pituning.interpolation import Mixture, build_mixture, group_names
from pituning.methods import BitFitConfig, BottleneckConfig, PrefixConfig, config_dict
from pituning.methods.attach import _file_key
from tests.parity.reference import (
    BATCHES,
    DOUBLE,
    FIXTURES,
    REAL,
    TINY,
    assert_near,
    assert_same_gradient,
    check_hypotheses,
    filled,
    inputs_of,
    needs_fixtures,
    recipe,
    recorded,
    settings_of,
    targets_of,
    tiny_config,
)

pytestmark = needs_fixtures
PREFIX = "base_model.model."
LORA = LoraConfig(r=4, lora_alpha=1, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"])
BOTTLENECK = BottleneckConfig(r=8, target_modules=["self_attn_output", "ffn_output"])
PREFIXES = PrefixConfig(length=5, decoder_length=3, target_modules=["self_attn"])
BITFIT = BitFitConfig(subset="reference")


def lora(tensors: Mapping[str, Tensor], key: str, expert: str = "") -> Tensor:
    """``….cross_attn.q_proj.lora_A.weight`` is ``….encoder_attn.q_proj.lora_A``, or ``….q_proj.0.lora_A``."""
    module, factor = re.fullmatch(r"(.*)\.(lora_[AB])\.weight", key).groups()  # type: ignore[union-attr]
    return tensors[f"{named(module + '.').rstrip('.')}{expert}.{factor}"]


def bottleneck(tensors: Mapping[str, Tensor], key: str, expert: str = "") -> Tensor:
    """The sites are ``adapter1`` and ``adapter2``; with two experts ``adapters1.0`` and so on."""
    layer, site, half, kind = re.fullmatch(r"(.*)\.(\w+)_output\.bottleneck_(\w+)\.(\w+)", key).groups()  # type: ignore[union-attr]
    number = {"self_attn": 1, "ffn": 2}[site]
    adapter = f"adapters{number}{expert}" if expert else f"adapter{number}"
    return tensors[f"{layer.removeprefix('model.')}.{adapter}.{half}_proj.{kind}"]


def prefix(tensors: Mapping[str, Tensor], key: str, expert: str = "", layers: int = 2, width: int = 32) -> Tensor:
    """One table per stack: of its columns, layer i has the i-th pair of key and value."""
    stack, layer, part = re.fullmatch(r"model\.(\w+)\.layers\.(\d+)\.self_attn\.prefix_(\w+)", key).groups()  # type: ignore[union-attr]
    table = tensors[f"{stack}.{stack}_prompt_encoder{expert}.embedding.weight"]
    return table.unflatten(1, (layers, 2, width))[:, int(layer), ["key", "value"].index(part)]


def bitfit(tensors: Mapping[str, Tensor], key: str, expert: str = "") -> Tensor:
    """What is added to a bias has the bias's gradient; its own value is 0."""
    return tensors[f"{named(key.removesuffix('bitfit_bias'))}bias"]


@dataclass(frozen=True)
class Case:
    """A recorded case: our configuration, and where its tensors are in the reference's files."""

    config: PeftConfig
    read: Callable[..., Tensor]
    smoothing: tuple[float, ...] = (0.1, 0.0)


SINGLE = {
    "lora_single": Case(LORA, lora),
    "adapter_single": Case(BOTTLENECK, bottleneck),
    "prefix_single": Case(PREFIXES, prefix),
    "bitfit": Case(BITFIT, bitfit, (0.1,)),
}


def adapted(case: str, **settings: Any) -> tuple[Any, dict[str, nn.Parameter]]:
    """The tiny model with the recorded expert, and the expert's parameters without PEFT's prefix."""
    torch.manual_seed(0)
    known = FIXTURES / case / "weights.safetensors"
    tensors = load_file(known if known.is_file() else FIXTURES / "plain" / "weights.safetensors")
    base = filled(tiny_config(**settings), lambda name, _: tensors[name])
    model = get_peft_model(base, SINGLE[case].config).eval()
    live = {_file_key(n).removeprefix(PREFIX): p for n, p in model.named_parameters() if p.requires_grad}
    if case != "bitfit":
        with torch.no_grad():
            for key, parameter in live.items():
                parameter.copy_(SINGLE[case].read(tensors, key))
    return model, live


def arguments(batch: str, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], Tensor]:
    """The model's arguments and the labels."""
    values = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs_of(batch).items()}
    read, labels = targets_of(batch)
    return {**values, "decoder_input_ids": read}, labels


def named(name: str) -> str:
    """The reference's name of one of our modules, or of a tensor's beginning."""
    for own, reference in (
        ("model.", ""),
        ("cross_attn_layer_norm", "encoder_attn_layer_norm"),
        ("cross_attn.", "encoder_attn."),
    ):
        name = name.replace(own, reference, 1)
    return name


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("case", SINGLE)
def test_outputs_of_one_expert(case: str, batch: str) -> None:
    model, _ = adapted(case)
    outputs, meta = recorded(case)
    values, labels = arguments(batch)
    with torch.no_grad():
        found = model(**values)
    mask = outputs[f"{batch}.encoder_padding_mask"].bool()
    assert_near(found.encoder_last_hidden_state.masked_fill(mask[..., None], 0),
         outputs[f"{batch}.encoder_out"].transpose(0, 1).masked_fill(mask[..., None], 0))  # fmt: skip
    assert_near(found.logits, outputs[f"{batch}.logits"])
    for epsilon in (0.1, 0.0):
        loss = float(label_smoothed_nll(found.logits, labels, epsilon).sum())
        assert loss == pytest.approx(meta["loss"][f"{batch}.ls{epsilon}"]["loss_sum"], rel=TINY)


@pytest.mark.parametrize("case", SINGLE)
def test_outputs_in_double_precision(case: str) -> None:
    model, _ = adapted(case, reference_rounding=True)
    if case == "lora_single":  # in eval mode the reference adds B A to its weights, here in float32
        model = model.merge_and_unload()
    model.double()
    values, labels = arguments("A", torch.float64)
    with torch.no_grad():
        logits = model(**values).logits
    expected = recorded(case)[1]["loss"]["A.ls0.1"]
    assert float(label_smoothed_nll(logits, labels, 0.1).sum()) == pytest.approx(expected["loss_sum_f64"], rel=DOUBLE)
    assert float(logits.abs().sum()) == pytest.approx(expected["logits_f64_sum_abs"], rel=DOUBLE)


@pytest.mark.parametrize(("case", "epsilon"), [(c, e) for c, case in SINGLE.items() for e in case.smoothing])
def test_gradients_of_one_expert(case: str, epsilon: float) -> None:
    """In eval mode, LoRA's among them."""
    model, live = adapted(case)
    outputs, meta = recorded(case)
    values, labels = arguments("A")
    label_smoothed_nll(model(**values).logits, labels, epsilon).sum().backward()
    ending = f"A.ls{epsilon}.grad."
    gradients = {k.removeprefix(ending): v for k, v in outputs.items() if k.startswith(ending)}
    for key, parameter in live.items():
        assert_same_gradient(parameter.grad, SINGLE[case].read(gradients, key), key)
    assert sum(g.numel() for g in gradients.values()) == sum(p.numel() for p in live.values())
    assert set(meta["trainable"]) == set(gradients), "the reference trains nothing else"


def test_bitfit_of_the_reference_is_the_recorded_twenty() -> None:
    _, live = adapted("bitfit")
    found = {f"{named(k.removesuffix('bitfit_bias'))}bias" for k in live}
    assert found == set(recorded("bitfit")[1]["trainable"])
    assert len(found) == 20


PAIRS = {
    "lora_k2_shared_base": (Case(LORA, lora), "attention"),
    "adapter_k2_learnable": (Case(BOTTLENECK, bottleneck), "module"),
    "prefix_k2": (Case(PREFIXES, prefix), "module"),
}


def logits_of(tensors: Mapping[str, Tensor], group: str, case: str) -> Tensor:
    """A group's logits as the reference keeps them."""
    if case == "prefix_k2":
        stack, layer = re.fullmatch(r"model\.(\w+)\.layers\.(\d+)\.self_attn", group).groups()  # type: ignore[union-attr]
        return tensors[f"{stack}.prompt_weight_scale"][int(layer)]
    if case == "adapter_k2_learnable":
        layer, site = re.fullmatch(r"model\.(.*)\.(self_attn|ffn)_output", group).groups()  # type: ignore[union-attr]
        return tensors[f"{layer}.adapter_interpolation_weight{['self_attn', 'ffn'].index(site) + 1}"]
    return tensors[f"{named(group + '.')}lora_interpolation_weight"]


def mixed(case: str) -> tuple[OFAForConditionalGeneration | nn.Module, Mixture, dict[str, str], list[str]]:
    """The tiny model, the mixture of the two recorded experts at the recorded weights, and its groups."""
    spec, granularity = PAIRS[case]
    tensors = load_file(FIXTURES / case / "weights.safetensors")

    def base(name: str, _: Any) -> Tensor:
        return tensors[name] if name in tensors else tensors[re.sub(r"\.(weight|bias)$", r".0.\1", name)]

    model = get_peft_model(filled(tiny_config(), base), spec.config).eval()
    live = {_file_key(n): n for n, p in model.named_parameters() if p.requires_grad}
    config = config_dict(spec.config)
    experts = [
        Expert(
            {k: spec.read(tensors, k.removeprefix(PREFIX), f".{i}").contiguous() for k in live},
            config,
            ExpertCard(f"expert-{i}"),
        )
        for i in range(2)
    ]
    groups = group_names(experts, granularity)
    rows = torch.stack([torch.softmax(logits_of(tensors, g, case), 0) for g in groups])
    mixture, carried = build_mixture(experts, rows, granularity=granularity, train="experts")
    if case.startswith("lora"):  # the two rank 4 pairs run as one of rank 8
        model = get_peft_model(filled(tiny_config(), base), LoraConfig(**{
            k: carried[k] for k in ("r", "lora_alpha", "target_modules")
        })).eval()  # fmt: skip
        live = {_file_key(n): n for n, p in model.named_parameters() if p.requires_grad}
    return model, mixture, live, groups


def run(model: nn.Module, mixture: Mixture, live: Mapping[str, str], values: Mapping[str, Tensor]) -> Any:
    return functional_call(model, {live[k]: t for k, t in mixture().items()}, kwargs=dict(values))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("case", PAIRS)
def test_outputs_of_two_experts(case: str, batch: str) -> None:
    model, mixture, live, _ = mixed(case)
    outputs, meta = recorded(case)
    values, labels = arguments(batch)
    with torch.no_grad():
        logits = run(model, mixture, live, values).logits
    assert_near(logits, outputs[f"{batch}.logits"])
    loss = float(label_smoothed_nll(logits, labels, 0.1).sum())
    assert loss == pytest.approx(meta["loss"][f"{batch}.ls0.1"]["loss_sum"], rel=TINY)


@pytest.mark.parametrize("case", PAIRS)
def test_gradients_of_two_experts(case: str) -> None:
    """Of every weight, and of both experts; prefixes, too, which the reference leaves frozen by a slip of the pen."""
    model, mixture, live, groups = mixed(case)
    outputs, _ = recorded(case)
    batch = next(b for b in ("B", "A") if any(k.startswith(f"{b}.ls0.1.grad.") for k in outputs))
    values, labels = arguments(batch)
    label_smoothed_nll(run(model, mixture, live, values).logits, labels, 0.1).sum().backward()
    start = f"{batch}.ls0.1.grad."
    gradients = {k.removeprefix(start): v for k, v in outputs.items() if k.startswith(start)}
    assert mixture.alpha.grad is not None
    for row, group in zip(mixture.alpha.grad, groups, strict=True):
        assert_same_gradient(row, logits_of(gradients, group, case), group)
    experts = [p for n, p in mixture.named_parameters() if n != "alpha"]
    assert all(p.grad is not None and p.grad.any() for p in experts)
    if case == "adapter_k2_learnable":
        for members, stack in zip(mixture._members, mixture.experts, strict=True):  # type: ignore[attr-defined]
            for i in range(2):
                expected = [bottleneck(gradients, k.removeprefix(PREFIX), f".{i}").flatten() for k in members]
                assert_same_gradient(stack.grad[i], torch.cat(expected), members[0])
    if case == "lora_k2_shared_base":
        for module, a in zip(mixture.modules_mixed, mixture.a, strict=True):  # type: ignore[attr-defined]
            for i, half in enumerate(a.grad.chunk(2)):
                key = f"{module.removeprefix(PREFIX)}.lora_A.weight"
                assert_same_gradient(half, lora(gradients, key, f".{i}"), key)


def searched(model: Any, case: str) -> None:
    """Compare every recorded beam search of a case."""
    _, meta = recorded(case)
    assert set(meta["generate"]) == {"A", "B"}
    for batch, settings in meta["generate"].items():
        for setting in settings.values():
            check_hypotheses(beam_search(model, inputs_of(batch), settings_of(setting["args"])), setting["hypos"])


@pytest.mark.parametrize("case", SINGLE)
def test_beam_search_with_one_expert(case: str) -> None:
    model, _ = adapted(case)
    searched(model.get_base_model(), case)


@pytest.mark.parametrize("case", PAIRS)
def test_beam_search_with_two_experts(case: str) -> None:
    """φ̄ is written into one expert's place; the reference runs both at every step."""
    model, mixture, live, _ = mixed(case)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, tensor in mixture().items():
            parameters[live[key]].copy_(tensor)
    searched(model.get_base_model(), case)  # type: ignore[operator]


REAL_SIZE = {
    "adapter": (BottleneckConfig(r=128, target_modules=["self_attn_output", "ffn_output"]), bottleneck),
    "lora": (LoraConfig(r=16, lora_alpha=1, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"]), lora),
    "prefix": (PrefixConfig(length=100, target_modules=["self_attn"]), prefix),
}


class ByRecipe(dict[str, Tensor]):
    """Tensors that are made from their names when they are asked for."""

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        super().__init__()
        self.shapes = shapes

    def __missing__(self, name: str) -> Tensor:
        return recipe(name, self.shapes[name])


@pytest.mark.slow
@pytest.mark.parametrize("method", REAL_SIZE)
def test_real_size(method: str) -> None:
    config, read = REAL_SIZE[method]
    case = f"real_tiny_{method}_k1"
    outputs, meta = recorded(case)
    expected = meta["cases"]["64x64"]
    model = get_peft_model(filled(OFAConfig.of_size("tiny"), recipe), config).eval()
    live = {_file_key(n).removeprefix(PREFIX): p for n, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in live.values()) == meta["n_trainable"]
    shapes = {} if method == "prefix" else {name_there(k, method): p.shape for k, p in live.items()}
    for stack in ("encoder", "decoder"):
        shapes[f"{stack}.{stack}_prompt_encoder.embedding.weight"] = torch.Size((100, 4 * 2 * 256))
    tensors = ByRecipe(shapes)
    with torch.no_grad():
        for key, parameter in live.items():
            parameter.copy_(prefix(tensors, key, layers=4, width=256) if method == "prefix" else read(tensors, key))
    values = {
        "input_ids": outputs["64x64.src_tokens"],
        "patch_images": load_file(FIXTURES / "inputs" / "real_patch_images_64x64.safetensors")["patch_images"],
    }
    labels = outputs["64x64.target"].masked_fill(outputs["64x64.target"] == 1, -100)
    logits = model(**values, decoder_input_ids=outputs["64x64.prev_output_tokens"]).logits
    assert_near(logits.detach()[..., ::211], outputs["64x64.logits_slice"], REAL)
    assert logits.argmax(-1).tolist() == expected["argmax"]
    loss = label_smoothed_nll(logits, labels, 0.1).sum()
    assert_near(loss.detach(), expected["loss_sum_ls0.1"], REAL)
    loss.backward()
    norms: dict[str, float] = {}
    for key, parameter in live.items():
        name = f"{key.split('.')[1]}_prompt" if method == "prefix" else name_there(key, method)
        norms[name] = norms.get(name, 0.0) + float(parameter.grad.double().square().sum())
    for name, norm in expected["grad_l2"].items():
        name = f"{name.split('.')[0]}_prompt" if method == "prefix" else name
        assert norms[name] ** 0.5 == pytest.approx(norm, rel=1e-3, abs=1e-4), name
    settings = settings_of({"beam": 5, "min_len": 4, "max_len_a": 0, "max_len_b": 4})
    check_hypotheses(beam_search(model.get_base_model(), values, settings), expected["beam5"])


def name_there(key: str, method: str) -> str:
    """The reference's name of one of our expert tensors."""

    class Asked(dict[str, str]):
        def __missing__(self, name: str) -> str:
            return name

    return str({"adapter": bottleneck, "lora": lora}[method](Asked(), key))  # type: ignore[arg-type]


METHOD_OF = {"adapter_single": "adapter", "adapter_single_frozenbn": "adapter", "lora_single": "lora"}


@pytest.mark.parametrize("case", [*METHOD_OF, "prefix_single"])
def test_the_references_own_estimate_of_the_task_embedding(case: str) -> None:
    """Squares of summed batch gradients in training mode: not what the product computes, but it can be reproduced."""
    model, live = adapted(case.removesuffix("_frozenbn"), dropout=0.0)
    model.train()
    frozen = case.endswith("_frozenbn")
    model.get_base_model().model.encoder.embed_images.requires_grad_(
        not frozen
    )  # trained norms use the batch's statistics
    read = SINGLE[case.removesuffix("_frozenbn")].read
    tensors = load_file(FIXTURES / "fim" / "fim.safetensors")
    total = {k: torch.zeros_like(p) for k, p in live.items()}
    for batch, recorded_as in (("A", "A"), ("B", "sumAB")):
        model.zero_grad()
        values, labels = arguments(batch)
        label_smoothed_nll(model(**values).logits, labels, 0.1).sum().backward()
        there = {k.removeprefix(f"{case}.{recorded_as}."): t for k, t in tensors.items()}
        for key, parameter in live.items():
            total[key] += parameter.grad.square()
            if batch == "B" or case == "prefix_single" or name_there(key, METHOD_OF[case]) in there:
                assert_same_gradient(total[key], read(there, key), key)
