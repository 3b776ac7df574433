"""IA3 presets: what is rescaled in each family, and that it is what rescaled weights do."""

from __future__ import annotations

import copy
import re

import pytest
import torch

from pituning.errors import PituningError
from pituning.methods import attached, make_config
from pituning.methods.attach import peft_config
from tests.conftest import build_bert
from tests.methods.tiny import backbone, examples, expert

# where keys and values come from, and the second projection of the feed-forward block: written down anew for each family
OUTPUTS = {
    "t5": r"(SelfAttention|EncDecAttention)\.[kv]$",
    "flan": r"(SelfAttention|EncDecAttention)\.[kv]$",
    "bart": r"(self_attn|encoder_attn)\.[kv]_proj$",
    "bert": r"attention\.self\.(key|value)$",
    "llama": r"self_attn\.[kv]_proj$",
    "qwen2": r"self_attn\.[kv]_proj$",
    "gpt_neox": r"attention\.query_key_value$",  # one projection, queries included
    "gpt2": r"attn\.c_attn$",
}
INPUTS = {
    "t5": r"DenseReluDense\.wo$",
    "flan": r"DenseReluDense\.wo$",
    "bart": r"fc2$",
    "bert": r"layer\.\d+\.output\.dense$",
    "llama": r"down_proj$",
    "qwen2": r"down_proj$",
    "gpt_neox": r"dense_4h_to_h$",
    "gpt2": r"mlp\.c_proj$",
}


@pytest.mark.parametrize("kind", OUTPUTS)
@torch.no_grad()
def test_is_rescaled_weights(kind: str) -> None:
    model = build_bert(torch.float32) if kind == "bert" else backbone(kind)
    own = expert(model, "ia3")
    tokens = torch.randint(4, 90, (2, 5), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": tokens}
    if model.family == "seq2seq":
        inputs["decoder_input_ids"] = tokens[:, :4]
    rescaled = copy.deepcopy(model.model)
    found = {}
    for name, module in rescaled.named_modules():
        factor = own.tensors.get(f"base_model.model.{name}.ia3_l")
        rows, columns = re.search(OUTPUTS[kind], name), re.search(INPUTS[kind], name)
        assert (factor is not None) == bool(rows or columns), name
        if factor is None:
            continue
        found[name] = factor
        weight = module.weight.T if kind == "gpt2" else module.weight  # Conv1D's is [in, out]
        weight.mul_(factor.flatten()[:, None] if rows else factor.flatten()[None])
        if rows and module.bias is not None:
            module.bias.mul_(factor.flatten())
    assert len(found) == len(own.tensors)
    expected = rescaled(**inputs)[0]
    with attached(model, own.config, own.tensors):
        torch.testing.assert_close(model.model(**inputs)[0], expected, rtol=1e-4, atol=1e-4)
    assert (expected - model.model(**inputs)[0]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["t5", "llama", "gpt2"])
def test_starts_at_the_backbone(kind: str) -> None:
    model = backbone(kind)
    batch = model.collate(examples(2))
    with attached(model, make_config("ia3", model)):
        started = model.loss(batch)
    assert torch.equal(started, model.loss(batch))


def test_merges_into_the_base() -> None:
    model = backbone("t5")
    own = expert(model, "ia3")
    batch = model.collate(examples(3))
    from peft import get_peft_model

    tuned = get_peft_model(copy.deepcopy(model.model), peft_config(own.config)).eval()
    inputs = {"input_ids": batch["input_ids"], "decoder_input_ids": batch["input_ids"][:, :3]}
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(own.tensors[name.removesuffix(".default")])
        expected = tuned(**inputs).logits
        torch.testing.assert_close(tuned.merge_and_unload()(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


def test_feedforward_modules_may_be_given() -> None:
    model = backbone("t5")
    config = make_config("ia3", model, target_modules=["k", "wo"], feedforward_modules=[])
    assert config.feedforward_modules == set()
    assert make_config("ia3", model, target_modules=["k", "wo"]).feedforward_modules == {"wo"}
    with pytest.raises(PituningError, match="as a regular expression, give feedforward_modules"):
        make_config("ia3", model, target_modules=r".*\.k")
