"""Encoder-decoders against a slow computation: one example, one choice and one target token at a time, no padding."""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.t5.modeling_t5 import T5LayerNorm

from pituning.backbones import load_backbone, seq2seq
from pituning.backbones.seq2seq import Seq2SeqBackbone
from pituning.errors import PituningError, RefusedError
from pituning.example import Example
from pituning.methods import attached, make_config

KINDS = ("t5", "flan", "bart")
METHODS = ("lora", "bottleneck")
PRECISIONS = ((torch.float32, 1e-5), (torch.float64, 1e-10))
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
WORDS = [f"w{i}" for i in range(90)]
CHOICES = ("w1", "w2 w3 w4 w5 w6", "w7 w8", "w9 w8 w7 w6")


def build(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> Seq2SeqBackbone:
    """A small random encoder-decoder whose answers depend strongly on its input."""
    torch.manual_seed(0)
    if kind == "bart":
        config = BartConfig(
            vocab_size=len(SPECIAL + WORDS),
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=64,
            init_std=0.3,
        )
        model: Any = BartForConditionalGeneration(config)
        return Seq2SeqBackbone(kind, model.to(dtype), tokenizer("<s> $A </s>"), **options)
    config = T5Config(
        vocab_size=len(SPECIAL + WORDS),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        feed_forward_proj="gated-gelu" if kind == "flan" else "relu",
        decoder_start_token_id=1,
        pad_token_id=1,
        eos_token_id=2,
    )
    if kind == "flan":  # after the constructor, which overrules both
        config.tie_word_embeddings = False
        config.scale_decoder_outputs = False
    model = T5ForConditionalGeneration(config).to(dtype)
    if dtype == torch.float64:
        make_norms_double(model)
    return Seq2SeqBackbone(kind, model, tokenizer("$A </s>"), **options)


def make_norms_double(model: torch.nn.Module) -> None:
    """T5LayerNorm takes its variance in float32 whatever the dtype; torch's RMSNorm is the same function in float64."""
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, T5LayerNorm):
                double = torch.nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon, dtype=norm.weight.dtype)
                double.load_state_dict(norm.state_dict())
                setattr(parent, name, double)


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """Whole words as tokens, offline."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        core.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 2)])
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


@pytest.fixture(scope="session")
def backbones() -> Callable[[str, torch.dtype], Seq2SeqBackbone]:
    """Backbones by kind and dtype, each built once."""
    built: dict[tuple[str, torch.dtype], Seq2SeqBackbone] = {}

    def get(kind: str, dtype: torch.dtype = torch.float32) -> Seq2SeqBackbone:
        if (kind, dtype) not in built:
            built[kind, dtype] = build(kind, dtype)
        return built[kind, dtype]

    return get


@pytest.fixture
def examples() -> list[Example]:
    """Random prompts and targets of different lengths."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    rng = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    return [Example(f"e{i}", (p := words(1, 12),), p, words(1, 7)) for i in range(6)]


def slow_log_p(backbone: Seq2SeqBackbone, prompt: str, target: str) -> Tensor:
    """log p(target | prompt) by the chain rule: the model is asked for one next token at a time."""
    inputs = torch.tensor([backbone.tokenizer(prompt)["input_ids"]])
    said = [backbone.model.config.decoder_start_token_id]
    total = torch.zeros((), dtype=next(backbone.model.parameters()).dtype)
    for token in backbone.tokenizer(target)["input_ids"]:
        logits = backbone.model(input_ids=inputs, decoder_input_ids=torch.tensor([said])).logits[0, -1]
        total = total + logits[token] - logits.exp().sum().log()
        said.append(token)
    return total


def randomise(parameters: dict[str, torch.nn.Parameter]) -> None:
    """Move an expert away from its start, where LoRA's product is zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.2)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_the_chain_rule_over_target_tokens(backbones, examples, kind, dtype, tolerance):
    backbone = backbones(kind, dtype)
    loss = backbone.loss(backbone.collate(examples))
    slow = torch.stack([-slow_log_p(backbone, e.prompt, e.target) for e in examples])
    assert loss.dtype == dtype
    torch.testing.assert_close(loss, slow, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_do_not_matter(backbones, examples, kind, dtype, tolerance):
    backbone = backbones(kind, dtype)
    long = Example("long", ("",), " ".join(WORDS[:30]), " ".join(WORDS[40:60]))
    together = backbone.collate([*examples, long])
    losses, scores = backbone.loss(together), backbone.score(together, CHOICES)
    for i, example in enumerate(examples):
        alone = backbone.collate([example])
        torch.testing.assert_close(losses[i : i + 1], backbone.loss(alone), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(scores[i : i + 1], backbone.score(alone, CHOICES), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_depend_on_the_prompt(backbones, kind):
    backbone = backbones(kind)
    batch = backbone.collate([Example("a", ("",), "w10 w11", "w1"), Example("b", ("",), "w20 w21", "w1")])
    assert (backbone.score(batch, CHOICES)[0] - backbone.score(batch, CHOICES)[1]).abs().min() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_tensors_with_padded_labels(backbones, kind):
    backbone = backbones(kind)
    batch = backbone.collate([Example("a", ("",), "w1 w2 w3", "w4"), Example("b", ("",), "w1", "w5 w6 w7")])
    assert all(isinstance(value, Tensor) for value in batch.values())
    start = [0] if kind == "bart" else []
    assert batch["labels"].tolist() == [[*start, 8, 2, -100, -100], [*start, 9, 10, 11, 2]]
    assert batch["attention_mask"].sum(1).tolist() == [4 + len(start), 2 + len(start)]
    assert batch["attention_mask"][1, 0] == 1, "prompts are padded on the right"


@pytest.mark.parametrize("passes", ["one pass", "several passes"])
@pytest.mark.parametrize("kind", KINDS)
def test_score_is_minus_the_loss_of_each_choice(backbones, examples, monkeypatch, kind, passes):
    backbone = backbones(kind)
    if passes == "several passes":
        monkeypatch.setattr(seq2seq, "PAIRS_PER_PASS", 2 * len(examples) + 1)
    runs = []
    hook = backbone.model.get_encoder().register_forward_hook(lambda *_: runs.append(1))
    scores = backbone.score(backbone.collate(examples), CHOICES)
    hook.remove()
    assert len(runs) == 1, "the encoder runs once per batch"
    slow = [[slow_log_p(backbone, e.prompt, c) for c in CHOICES] for e in examples]
    torch.testing.assert_close(scores, torch.tensor(slow), rtol=1e-5, atol=1e-5)
    for column, choice in enumerate(CHOICES):
        as_targets = backbone.collate([Example(e.id, e.texts, e.prompt, choice) for e in examples])
        torch.testing.assert_close(scores[:, column], -backbone.loss(as_targets), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_of_all_one_word_answers_sum_below_one(backbones, kind):
    backbone = backbones(kind)
    batch = backbone.collate([Example("a", ("",), "w1 w2", "w1")])
    assert 0 < backbone.score(batch, WORDS).exp().sum() < 1


@pytest.mark.parametrize("kind", KINDS)
def test_generate_is_greedy_by_default(backbones, examples, kind):
    backbone = backbones(kind)
    length = 5
    answers = backbone.generate(backbone.collate(examples), max_new_tokens=length, forced_eos_token_id=None)
    for example, answer in zip(examples, answers, strict=True):
        inputs = torch.tensor([backbone.tokenizer(example.prompt)["input_ids"]])
        said = [backbone.model.config.decoder_start_token_id]
        while len(said) <= length and (len(said) == 1 or said[-1] != backbone.tokenizer.eos_token_id):
            logits = backbone.model(input_ids=inputs, decoder_input_ids=torch.tensor([said])).logits
            said.append(int(logits[0, -1].argmax()))
        assert answer == " ".join((SPECIAL + WORDS)[t] for t in said if t >= len(SPECIAL))


def test_generate_takes_options_and_bounds_the_length(backbones, examples):
    backbone = backbones("t5")
    batch = backbone.collate(examples)
    assert len(backbone.generate(batch, num_beams=2, max_new_tokens=3)) == len(examples)
    assert all(len(a.split()) <= 2 for a in backbone.generate(batch, max_new_tokens=2))
    assert all(len(a.split()) <= seq2seq.MAX_NEW_TOKENS for a in backbone.generate(batch))


EXPECTED_TARGETS = {
    ("t5", "lora"): ["q", "v"],
    ("bart", "lora"): ["q_proj", "v_proj"],
    ("t5", "bottleneck"): ["SelfAttention.o", "DenseReluDense.wo"],
    ("bart", "bottleneck"): ["self_attn.out_proj", "fc2"],
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_adaptable_modules_exist_on_both_sides(backbones, kind, method):
    backbone = backbones(kind)
    targets = backbone.adaptable(method)
    assert targets == EXPECTED_TARGETS["bart" if kind == "bart" else "t5", method]
    with attached(backbone, make_config(method, backbone, r=4)) as site:
        for side in ("encoder.", "decoder."):
            for target in targets:
                assert any(side in n and f".{target}." in n for n in site.parameters), f"no {target} in the {side}"
        crossed = [n for n in site.parameters if "EncDecAttention" in n or "encoder_attn" in n]
        assert bool(crossed) == (method == "lora"), "the bottleneck leaves cross-attention alone"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_attaching_starts_near_the_backbone_and_leaves_no_trace(backbones, examples, kind, method):
    backbone = backbones(kind)
    batch = backbone.collate(examples)
    before = {k: v.clone() for k, v in backbone.model.state_dict().items()}
    loss, scores = backbone.loss(batch), backbone.score(batch, CHOICES)
    with attached(backbone, make_config(method, backbone, r=8)) as site:
        torch.testing.assert_close(backbone.loss(batch), loss, rtol=5e-3, atol=0)
        if method == "lora":
            torch.testing.assert_close(backbone.loss(batch), loss, rtol=0, atol=0)
        randomise(site.parameters)
        assert (backbone.loss(batch) - loss).abs().max() > 1e-2
        assert (backbone.score(batch, CHOICES) - scores).abs().max() > 1e-2
        assert len(backbone.generate(batch, max_new_tokens=3)) == len(examples)
    assert torch.equal(backbone.loss(batch), loss)
    assert torch.equal(backbone.score(batch, CHOICES), scores)
    after = backbone.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not any(p.requires_grad for p in backbone.model.parameters())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_encoder_and_decoder(backbones, examples, kind, method):
    backbone = backbones(kind, torch.float64)
    with attached(backbone, make_config(method, backbone, r=8)) as site:
        randomise(site.parameters)
        parameters = list(site.parameters.values())
        through_score = torch.autograd.grad(backbone.score(backbone.collate(examples), CHOICES).sum(), parameters)
        slow = torch.stack([slow_log_p(backbone, e.prompt, c) for e in examples for c in CHOICES])
        expected = torch.autograd.grad(slow.sum(), parameters)
        through_loss = torch.autograd.grad(backbone.loss(backbone.collate(examples)).sum(), parameters)
    for name, score_grad, slow_grad, loss_grad in zip(
        site.parameters, through_score, expected, through_loss, strict=True
    ):
        assert score_grad.abs().max() > 0, f"no gradient reaches {name} from the score"
        assert loss_grad.abs().max() > 0, f"no gradient reaches {name} from the loss"
        error = (score_grad - slow_grad).norm() / slow_grad.norm()
        assert error < 1e-10, f"{name}: gradient of the score is off by {error:.1e}"


def test_long_prompts_are_cut_at_the_end_and_targets_are_not():
    short, whole = build("t5", max_length=5), build("t5")
    example = Example("a", ("",), " ".join(WORDS[:9]), " ".join(WORDS[20:30]))
    cut = Example("a", ("",), " ".join(WORDS[:4]), example.target)
    assert torch.equal(short.loss(short.collate([example])), whole.loss(whole.collate([cut])))
    assert not torch.equal(short.loss(short.collate([example])), whole.loss(whole.collate([example])))


def test_targets_end_even_if_the_tokenizer_adds_no_end(backbones):
    reference = backbones("t5")
    backbone = Seq2SeqBackbone("t5", reference.model, tokenizer(None))
    assert backbone.collate([Example("a", ("",), "w1", "w5 w6")])["labels"].tolist() == [[9, 10, 2]]


def test_half_precision_sums_in_float32(examples):
    backbone = build("t5", torch.bfloat16)
    batch = backbone.collate(examples)
    assert backbone.loss(batch).dtype == torch.float32
    assert backbone.score(batch, CHOICES).dtype == torch.float32


def test_a_saved_model_loads_as_this_family(tmp_path, examples):
    backbone = build("flan")
    backbone.model.save_pretrained(tmp_path)
    backbone.tokenizer.save_pretrained(tmp_path)
    loaded = load_backbone(str(tmp_path), max_length=200)
    assert isinstance(loaded, Seq2SeqBackbone)
    assert loaded.max_length == 200
    assert torch.equal(loaded.loss(loaded.collate(examples)), backbone.loss(backbone.collate(examples)))


def test_a_tokenizer_without_padding_is_refused(backbones):
    lame = tokenizer(None)
    lame.pad_token = None
    with pytest.raises(PituningError, match="tokenizer has no pad_token"):
        Seq2SeqBackbone("tiny", backbones("t5").model, lame)


def test_scoring_without_choices_is_refused(backbones, examples):
    backbone = backbones("t5")
    with pytest.raises(RefusedError, match="no choices"):
        backbone.score(backbone.collate(examples), ())
