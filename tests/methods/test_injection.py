"""Prefixes in the families of transformers against attention written out by hand: one row, one head, one query at a time.

Every layer of a padded batch is checked where it stands, on what it is given and what it gives back.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import BloomConfig, BloomModel

from pituning.errors import ExpertError, PituningError, RefusedError
from pituning.methods import PrefixConfig, attached, initial_tensors, make_config
from pituning.methods.prefix import PrefixLayer
from tests.conftest import build_bert
from tests.methods.tiny import SEQ2SEQ, backbone, examples, expert

KINDS = ("t5", "flan", "bart", "bert", "llama", "qwen2", "gpt_neox", "gpt2")


def projections(kind: str, module: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, nn.Module | None]:
    """Queries, keys and values ``[heads, tokens, head width]`` (keys' heads repeated) and the output projection."""
    if kind in ("t5", "flan"):
        parts, out, heads = (module.q(x), module.k(x), module.v(x)), module.o, module.n_heads
    elif kind == "bert":
        parts, out, heads = (module.query(x), module.key(x), module.value(x)), None, module.num_attention_heads
    elif kind == "gpt2":
        parts, out, heads = module.c_attn(x).split(32, dim=-1), module.c_proj, module.num_heads
    elif kind == "gpt_neox":
        fused = module.query_key_value(x).view(len(x), 4, 3, 8)
        parts, out, heads = tuple(fused[:, :, i].flatten(1) for i in range(3)), module.dense, 4
    else:
        out = module.out_proj if kind == "bart" else module.o_proj
        parts, heads = (module.q_proj(x), module.k_proj(x), module.v_proj(x)), 2 if kind == "bart" else 4
    q, k, v = (p.view(len(x), -1, parts[0].shape[1] // heads).transpose(0, 1) for p in parts)
    repeats = len(q) // len(k)
    return q, k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0), out


def rotated(x: Tensor, width: int) -> Tensor:
    """Rotary positions of ``[heads, tokens, head width]``: (i, i + width/2) turn by position · 10000^(−2i/width)."""
    x = x.clone()
    half = width // 2
    for position in range(x.shape[1]):
        for i in range(half):
            angle = position * 10000 ** (-2 * i / width)
            a, b = x[:, position, i].clone(), x[:, position, i + half].clone()
            x[:, position, i] = a * math.cos(angle) - b * math.sin(angle)
            x[:, position, i + half] = b * math.cos(angle) + a * math.sin(angle)
    return x


def slow(kind: str, module: Any, x: Tensor, prefix: tuple[Tensor, Tensor], bias: Tensor | None, causal: bool) -> Tensor:
    """Attention over the prefix and the text ``[tokens, width]`` of one row, without padding."""
    q, k, v, out = projections(kind, module, x)
    heads, tokens, width = q.shape
    if kind in ("llama", "qwen2", "gpt_neox"):
        q, k = (rotated(p, 2 if kind == "gpt_neox" else width) for p in (q, k))
    scale = 1.0 if kind in ("t5", "flan") else width**-0.5
    group = heads * width // prefix[0].shape[1]
    result = torch.zeros(tokens, heads, width)
    for head in range(heads):
        part = slice(head // group * width, (head // group + 1) * width)
        keys, values = torch.cat([prefix[0][:, part], k[head]]), torch.cat([prefix[1][:, part], v[head]])
        for query in range(tokens):
            scores = keys @ q[head, query] * scale
            if bias is not None:
                scores[len(prefix[0]) :] += bias[head, query]
            seen = len(prefix[0]) + (query + 1 if causal else tokens)
            weights = scores[:seen].exp() / scores[:seen].exp().sum()
            result[query, head] = weights @ values[:seen]
    return result.flatten(1) if out is None else out(result.flatten(1))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_layer_is_attention_with_more_keys_and_values(kind: str, attention: str) -> None:
    model = build_bert(torch.float32) if kind == "bert" else backbone(kind)
    own = expert(model, "prefix", scale=1.0)
    tokens = torch.randint(4, 90, (3, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    left = kind not in (*SEQ2SEQ, "bert")
    (mask[0, :2] if left else mask[0, 4:]).zero_()
    inputs = {"input_ids": tokens, "attention_mask": mask}
    if left:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    if kind in SEQ2SEQ:
        inputs["decoder_input_ids"] = torch.randint(4, 90, (3, 5), generator=torch.Generator().manual_seed(1))
    before = model.model.config._attn_implementation
    model.model.set_attn_implementation(attention)
    seen = []
    try:
        with attached(model, own.config, own.tensors):
            layers = {n: m for n, m in model.model.named_modules() if isinstance(m, PrefixLayer)}
            for name, layer in layers.items():
                layer.register_forward_hook(
                    lambda _, a, kw, out, name=name: seen.append((name, (a or (kw["hidden_states"],))[0], out[0])),
                    with_kwargs=True,
                )
            model.model(**inputs)
            first = {n.split(".")[0]: m.base_layer for n, m in reversed(layers.items())}
            for name, x, out in seen:
                decoder = "decoder" in name.split(".")
                for row in range(3):
                    real = torch.ones(x.shape[1], dtype=torch.bool) if decoder else mask[row].bool()
                    bias = None
                    if kind in ("t5", "flan"):
                        bias = first[name.split(".")[0]].compute_bias(int(real.sum()), int(real.sum()))[0]
                    expected = slow(
                        kind,
                        layers[name].base_layer,
                        x[row][real],
                        layers[name].plain("default"),
                        bias,
                        decoder or left,
                    )
                    torch.testing.assert_close(out[row][real], expected, rtol=1e-4, atol=1e-4)
    finally:
        model.model.set_attn_implementation(before)
    assert len(seen) == len(layers) == (4 if kind in SEQ2SEQ else 2)


class TestRefusals:
    def test_attention_without_a_mask(self) -> None:
        model = backbone("llama")
        config = make_config("prefix", model)
        before = model.model.config._attn_implementation
        with attached(model, config):
            model.model.config._attn_implementation_internal = "flash_attention_2"
            try:
                with pytest.raises(RefusedError, match=r"'flash_attention_2': it takes no mask.*'eager' or 'sdpa'"):
                    model.model.model.layers[0].self_attn(torch.zeros(1, 2, 32), None, None)
            finally:
                model.model.config._attn_implementation_internal = before

    def test_modules_that_are_no_self_attention(self) -> None:
        model = backbone("t5")
        with pytest.raises(ExpertError, match="DenseReluDense is a T5DenseActDense, which does neither"):
            initial_tensors(model, PrefixConfig(target_modules=["DenseReluDense"]))
        config = make_config("prefix", model, target_modules=["EncDecAttention"])
        with attached(model, config), pytest.raises(RefusedError, match="attends to other states"):
            model.loss(model.collate(examples(2)))

    def test_an_architecture_without_the_interface(self) -> None:
        sizes = {"vocab_size": 20, "hidden_size": 16, "n_layer": 1, "n_head": 2}
        config = PrefixConfig(target_modules=["self_attention"])
        with pytest.raises(TypeError, match=r"h\.0\.self_attention is a BloomAttention, which does neither"):
            get_peft_model(BloomModel(BloomConfig(**sizes)), config)

    def test_a_decoder_length_without_a_decoder(self) -> None:
        model = backbone("llama")
        with pytest.raises(PituningError, match="no module of this model is named 'decoder'"):
            initial_tensors(model, make_config("prefix", model, decoder_length=3))

    def test_values_that_are_not_as_wide_as_keys(self) -> None:
        model = backbone("llama")
        with attached(model, make_config("prefix", model)) as site:
            layer = next(m for m in model.model.modules() if isinstance(m, PrefixLayer))
            layer.prefix_value["default"] = nn.Parameter(torch.zeros(32, 8))
            assert len(site.parameters) == 4
            with pytest.raises(
                RefusedError, match=r"LlamaAttention: keys or values are 2 × 2 heads × 8, which 2 × 8 of"
            ):
                model.loss(model.collate(examples(2)))
