"""Soft prompts against embeddings put together by hand, one example and one token at a time."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import DynamicCache, StaticCache

from pituning.backbones.base import Backbone
from pituning.errors import ExpertError, PituningError, RefusedError
from pituning.methods import PromptConfig, attached, initial_tensors, make_config
from tests.methods.tiny import CAUSAL, GENERATIVE, SEQ2SEQ, backbone, examples, expert


def slow_loss(model: Backbone, example: Any, prompt: Tensor) -> Tensor:
    """−log p of an example's answer by the bare model, from embeddings behind the prompt, without padding."""
    batch = model.collate([example])
    answer = batch["labels"][0]
    reader = model.model.get_encoder() if model.name in SEQ2SEQ else model.model
    embed = reader.get_input_embeddings()
    text = embed(batch["input_ids"])
    total = torch.zeros(())
    said = torch.tensor([[model.model.config.decoder_start_token_id]]) if model.name in SEQ2SEQ else None
    for token in answer.tolist():
        if said is None:
            logits = model.model(inputs_embeds=torch.cat([prompt[None], text], dim=1)).logits
            text = torch.cat([text, embed(torch.tensor([[token]]))], dim=1)
        else:
            logits = model.model(inputs_embeds=torch.cat([prompt[None], text], dim=1), decoder_input_ids=said).logits
            said = torch.cat([said, torch.tensor([[token]])], dim=1)
        total = total - logits[0, -1].log_softmax(-1)[token]
    return total


@pytest.mark.parametrize("kind", GENERATIVE)
@torch.no_grad()
def test_is_embeddings_in_front(kind: str) -> None:
    model = backbone(kind)
    own = expert(model, PromptConfig(length=3, target_modules=model.adaptable("prompt")))
    (prompt,) = own.tensors.values()
    several = examples(4)
    expected = torch.stack([slow_loss(model, e, prompt) for e in several])
    with attached(model, own.config, own.tensors):
        found = model.loss(model.collate(several))
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("kind", "task"), [("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")])
@torch.no_grad()
def test_is_prompt_tuning_of_peft_where_nothing_is_padded(kind: str, task: str) -> None:
    model = backbone(kind)
    own = expert(model, PromptConfig(length=3, target_modules=model.adaptable("prompt")))
    (prompt,) = own.tensors.values()
    tokens = torch.randint(4, 90, (2, 5), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if kind == "t5":
        inputs["decoder_input_ids"] = tokens[:, :4]
    with attached(model, own.config, own.tensors):
        found = model.model(**inputs).logits
    config = PromptTuningConfig(task_type=task, num_virtual_tokens=3, num_transformer_submodules=1)
    theirs = get_peft_model(copy.deepcopy(model.model), config)
    theirs.prompt_encoder["default"].embedding.weight.copy_(prompt)
    expected = theirs.eval()(**inputs).logits
    torch.testing.assert_close(found, expected[:, -found.shape[1] :], rtol=1e-5, atol=1e-5)


def test_starts_as_tokens_of_the_vocabulary() -> None:
    for kind in ("t5", "bart", "llama"):
        model = backbone(kind)
        initial = initial_tensors(model, make_config("prompt", model, length=6))
        ((key, prompt),) = initial.items()
        assert key.endswith(".prompt_embedding")
        table = model.model.get_input_embeddings().weight
        assert all((table == row).all(1).any() for row in prompt)
        assert len(prompt.unique(dim=0)) > 1


def test_two_prompts_follow_one_another() -> None:
    model = backbone("llama")
    config = PromptConfig(length=2, target_modules=["model"])
    peft_model: Any = get_peft_model(copy.deepcopy(model.model), config)
    peft_model.add_adapter("other", PromptConfig(length=3, target_modules=["model"]))
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    layer = peft_model.base_model.model.model
    with torch.no_grad():
        peft_model.base_model.set_adapter(["default", "other"])
        both = peft_model.eval()(**inputs).logits
        text = model.model.get_input_embeddings()(inputs["input_ids"])
        prompts = [layer.prompt_embedding[a][None] for a in ("default", "other")]
        expected = model.model(inputs_embeds=torch.cat([*prompts, text], dim=1)).logits[:, 5:]
        torch.testing.assert_close(both, expected, rtol=1e-5, atol=1e-5)
        with pytest.raises(NotImplementedError, match="cannot be merged"):
            peft_model.merge_and_unload()
        assert torch.equal(peft_model.unload()(**inputs).logits, model.model(**inputs).logits)


@pytest.mark.parametrize("kind", CAUSAL)
@torch.no_grad()
def test_outputs_are_the_texts_own(kind: str) -> None:
    """Hidden states and logits have the text's positions, step by step as at once, with or without a mask."""
    model = backbone(kind)
    own = expert(model, "prompt")
    tokens = torch.randint(4, 90, (2, 5), generator=torch.Generator().manual_seed(0))
    with attached(model, own.config, own.tensors):
        whole = model.model(input_ids=tokens, output_hidden_states=True)
        assert {tuple(h.shape) for h in whole.hidden_states} == {(2, 5, 32)}
        cache = DynamicCache(config=model.model.config)
        for step in range(5):
            out = model.model(input_ids=tokens[:, step : step + 1], past_key_values=cache, use_cache=True)
            torch.testing.assert_close(out.logits[:, 0], whole.logits[:, step], rtol=1e-4, atol=1e-4)
        assert cache.get_seq_length() == 5 + 20


class TestRefusals:
    def prompted(self) -> tuple[Backbone, Any]:
        model = backbone("llama")
        return model, make_config("prompt", model, length=4)

    def test_no_positions(self) -> None:
        with pytest.raises(PituningError, match="method 'prompt': length must be at least 1, not 0"):
            make_config("prompt", backbone("t5"), length=0)

    def test_encoders(self, bert: Backbone) -> None:
        with pytest.raises(RefusedError, match="'tiny-bert': a soft prompt is not there for the 'encoder' family"):
            make_config("prompt", bert)

    @pytest.mark.parametrize(
        ("kind", "targets", "said"),
        [
            ("t5", ["encoder"], "needs one encoder and its decoder"),
            ("t5", ["decoder"], "put into an encoder and then its decoder; decoder is a T5Stack"),
            ("bart", ["self_attn"], "self_attn is a BartAttention"),
            ("llama", ["mlp"], "mlp is a LlamaMLP, whose forward has no inputs_embeds"),
        ],
    )
    def test_other_modules(self, kind: str, targets: list[str], said: str) -> None:
        model = backbone(kind)
        modules = [f"{n} {type(m)}" for n, m in model.model.named_modules()]
        with pytest.raises(ExpertError, match=said), attached(model, PromptConfig(target_modules=targets)):
            pass
        assert [f"{n} {type(m)}" for n, m in model.model.named_modules()] == modules

    def test_a_cache_that_was_filled_without_the_prompt(self) -> None:
        model, config = self.prompted()
        tokens = torch.randint(4, 90, (1, 7))
        cache = model.model(input_ids=tokens, use_cache=True).past_key_values
        mask = torch.ones(1, 8, dtype=torch.long)
        with attached(model, config), pytest.raises(RefusedError, match=r"\[1, 8\] does not cover the 4 tokens"):
            model.model(input_ids=tokens[:, :1], attention_mask=mask, past_key_values=cache)
        short = model.model(input_ids=tokens[:, :2], use_cache=True).past_key_values
        with attached(model, config), pytest.raises(RefusedError, match="holds 2 positions, too few"):
            model.model(input_ids=tokens[:, :1], past_key_values=short)

    def test_a_cache_of_fixed_size(self) -> None:
        model, config = self.prompted()
        cache = StaticCache(config=model.model.config, max_cache_len=8)
        with attached(model, config), pytest.raises(RefusedError, match="not a StaticCache"):
            model.model(input_ids=torch.tensor([[5, 6]]), past_key_values=cache)

    def test_masks_and_positions_of_more_dimensions(self) -> None:
        model, config = self.prompted()
        tokens = torch.tensor([[5, 6]])
        with attached(model, config):
            with pytest.raises(RefusedError, match=r"mask \[rows, tokens\], not \[1, 1, 2, 2\]"):
                model.model(input_ids=tokens, attention_mask=torch.ones(1, 1, 2, 2, dtype=torch.bool))
            with pytest.raises(RefusedError, match=r"position ids \[rows, tokens\], not \[3, 1, 2\]"):
                model.model(input_ids=tokens, position_ids=torch.zeros(3, 1, 2, dtype=torch.long))

    def test_an_encoding_without_the_prompt(self) -> None:
        model = backbone("t5")
        tokens = torch.tensor([[5, 6, 2]])
        mask = torch.ones_like(tokens)
        encoded = model.model.get_encoder()(input_ids=tokens, attention_mask=mask)
        with (
            attached(model, make_config("prompt", model)),
            pytest.raises(RefusedError, match="computed without the prompt"),
        ):
            model.model(encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=tokens)
