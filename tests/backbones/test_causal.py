"""Decoder-only models against a slow computation: one example, one choice and one token at a time, without padding or cache."""

from __future__ import annotations

import copy
import math
import random
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    FalconMambaConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MptConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

import pituning as pt
from pituning.backbones import causal, load_backbone
from pituning.backbones.causal import CausalBackbone
from pituning.errors import BackboneMismatchError, PituningError, RefusedError
from pituning.example import Example
from pituning.experts import Expert, ExpertCard
from pituning.methods import attached, make_config
from pituning.similarity.fisher import fisher_diagonal
from pituning.tasks import Task
from tests.conftest import RandomExpert

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<|turn|>", "<|over|>", "user", "assistant", "system"]
WORDS = [f"w{i}" for i in range(80)]
VOCABULARY = SPECIAL + WORDS
CHOICES = ("w1", "w2 w3 w4 w5 w6", "w7 w8", "w9 w8 w7 w6")
TEMPLATE = (
    "{% for turn in messages %}<|turn|> {{ turn.role }} {{ turn.content }} <|over|> {% endfor %}"
    "{% if add_generation_prompt %}<|turn|> assistant {% endif %}"
)
SIZES = {
    "vocab_size": len(VOCABULARY), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 128,
    "initializer_range": 0.3, "bos_token_id": 0, "pad_token_id": None, "eos_token_id": 2,
}  # fmt: skip
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES),
    "gemma2": lambda: Gemma2Config(**SIZES, sliding_window=4, query_pre_attn_scalar=4),
    "gpt2": lambda: GPT2Config(
        vocab_size=len(VOCABULARY), n_embd=16, n_layer=2, n_head=2, n_positions=128, initializer_range=0.3,
        bos_token_id=0, eos_token_id=2,
    ),
    "neox": lambda: GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim")}),
    "opt": lambda: OPTConfig(
        vocab_size=len(VOCABULARY), hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=128, init_std=0.3, bos_token_id=0, pad_token_id=1, eos_token_id=2,
    ),
}  # fmt: skip
KINDS = ("llama", "qwen2", "gpt2", "gemma2")
DOUBLE = ("llama", "qwen2", "gpt2")
PRECISIONS = [
    *(pytest.param(k, torch.float32, 1e-5, id=f"{k}-float32") for k in CONFIGS),
    *(pytest.param(k, torch.float64, 1e-10, id=f"{k}-float64") for k in DOUBLE),
]


def build(kind: str, dtype: torch.dtype = torch.float32, template: str | None = None, **options: Any) -> CausalBackbone:
    """A small random decoder whose answers depend strongly on its input."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    if dtype == torch.float64:
        make_norms_double(model)
    return CausalBackbone(f"tiny-{kind}", model, tokenizer(begins=kind != "qwen2", template=template), **options)


def make_norms_double(model: torch.nn.Module) -> None:
    """RMS norms take their variance in float32 whatever the dtype; torch's is the same function in float64."""
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm).__name__ in ("LlamaRMSNorm", "Qwen2RMSNorm"):
                weight: Any = norm.weight
                double = torch.nn.RMSNorm(weight.shape, eps=float(norm.variance_epsilon), dtype=weight.dtype)
                double.load_state_dict(norm.state_dict())
                setattr(parent, name, double)


def tokenizer(*, begins: bool = True, template: str | None = None, **names: Any) -> PreTrainedTokenizerFast:
    """Whole words as tokens, offline; no padding token, as most decoders have it."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begins:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    special: dict[str, Any] = {
        "bos_token": "<s>" if begins else None,
        "eos_token": "</s>",
        "unk_token": "<unk>",
        **names,
    }
    made = PreTrainedTokenizerFast(tokenizer_object=core, extra_special_tokens=["<|turn|>", "<|over|>"], **special)
    made.chat_template = template
    return made


BackboneOf = Callable[..., CausalBackbone]


@pytest.fixture(scope="module")
def backbones() -> BackboneOf:
    """Backbones by kind and dtype, each built once."""
    built: dict[tuple[str, torch.dtype], CausalBackbone] = {}

    def get(kind: str = "llama", dtype: torch.dtype = torch.float32) -> CausalBackbone:
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


def ids_of(text: str) -> list[int]:
    return [VOCABULARY.index(word) for word in text.split()]


def slow_log_p(backbone: CausalBackbone, prompt: str, target: str) -> Tensor:
    """log p(target and end | prompt) by the chain rule: the model is asked for one next token at a time."""
    read = [*([0] if backbone.tokenizer.bos_token else []), *ids_of(prompt)]
    total = torch.zeros((), dtype=next(backbone.model.parameters()).dtype)
    for token in [*ids_of(target), 2]:
        logits = backbone.model(input_ids=torch.tensor([read])).logits[0, -1]
        total = total + logits[token] - logits.exp().sum().log()
        read.append(token)
    return total


@pytest.mark.parametrize(("kind", "dtype", "tolerance"), PRECISIONS)
def test_loss_is_the_chain_rule_over_the_answers_tokens_alone(backbones, examples, kind, dtype, tolerance):
    backbone = backbones(kind, dtype)
    loss = backbone.loss(backbone.collate(examples))
    slow = torch.stack([-slow_log_p(backbone, e.prompt, e.target) for e in examples])
    assert loss.dtype == dtype
    torch.testing.assert_close(loss, slow, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("kind", "dtype", "tolerance"), PRECISIONS)
def test_neighbours_and_their_padding_do_not_matter(backbones, examples, kind, dtype, tolerance):
    backbone = backbones(kind, dtype)
    long = Example("long", ("",), " ".join(WORDS[:30]), " ".join(WORDS[40:60]))
    together = backbone.collate([*examples, long])
    losses, scores = backbone.loss(together), backbone.score(together, CHOICES)
    for i, example in enumerate(examples):
        alone = backbone.collate([example])
        torch.testing.assert_close(losses[i : i + 1], backbone.loss(alone), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(scores[i : i + 1], backbone.score(alone, CHOICES), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bound", [None, "LOGITS_PER_PASS", "TOKENS_PER_PASS"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_score_is_the_chain_rule_of_every_choice(backbones, examples, monkeypatch, kind, bound):
    backbone = backbones(kind)
    batch = backbone.collate(examples)
    longest, prompts = 6, batch["input_ids"].shape[1]  # five tokens and an end
    of_one = {"LOGITS_PER_PASS": longest * len(VOCABULARY), "TOKENS_PER_PASS": prompts + longest}
    if bound:
        monkeypatch.setattr(causal, bound, 2 * len(examples) * of_one[bound] + 1)
    calls = []
    hook = backbone.model.register_forward_hook(lambda *_: calls.append(1))
    scores = backbone.score(batch, CHOICES)
    hook.remove()
    assert len(calls) == (4 if bound else 2), "prompts once and their continuations once per pass"
    slow = [[slow_log_p(backbone, e.prompt, c) for c in CHOICES] for e in examples]
    torch.testing.assert_close(scores, torch.tensor(slow), rtol=1e-5, atol=1e-5)
    for column, choice in enumerate(CHOICES):
        as_targets = backbone.collate([Example(e.id, e.texts, e.prompt, choice) for e in examples])
        torch.testing.assert_close(scores[:, column], -backbone.loss(as_targets), rtol=1e-5, atol=1e-5)


def test_probabilities_of_all_one_word_answers_sum_below_one(backbones):
    backbone = backbones()
    batch = backbone.collate([Example("a", ("",), "w1 w2", "w1")])
    assert 0 < backbone.score(batch, WORDS).exp().sum() < 1


def test_label_smoothing_spreads_over_the_other_tokens(backbones):
    backbone = backbones()
    example = Example("a", ("",), "w1 w2", "w3")
    read, log_p = [0, *ids_of("w1 w2")], []
    for token in (VOCABULARY.index("w3"), 2):
        log_p.append(backbone.model(input_ids=torch.tensor([read])).logits[0, -1].log_softmax(0))
        read.append(token)
    expected = sum(
        -0.9 * row[t] - 0.1 * (row.sum() - row[t]) / (len(row) - 1)
        for row, t in zip(log_p, (VOCABULARY.index("w3"), 2), strict=True)
    )
    torch.testing.assert_close(backbone.loss(backbone.collate([example]), 0.1)[0], expected)


def test_a_batch_is_padded_left_of_prompts_and_right_of_answers(backbones):
    backbone = backbones("qwen2")
    batch = backbone.collate([Example("a", ("",), "w1 w2 w3", "w4"), Example("b", ("",), "w1", "w5 w6 w7")])
    assert batch["input_ids"].tolist() == [ids_of("w1 w2 w3"), [2, 2, *ids_of("w1")]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["labels"].tolist() == [[*ids_of("w4"), 2, -100, -100], [*ids_of("w5 w6 w7"), 2]]


def test_what_fills_the_padding_does_not_matter(backbones, examples):
    backbone = backbones("gpt2")
    batch = backbone.collate(examples)
    other = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 7)}
    torch.testing.assert_close(backbone.loss(batch), backbone.loss(other), rtol=1e-6, atol=0)
    torch.testing.assert_close(backbone.score(batch, CHOICES), backbone.score(other, CHOICES), rtol=1e-6, atol=0)
    assert backbone.tokenizer.pad_token is None, "the tokenizer stays as it is"


@pytest.mark.parametrize("kind", KINDS)
def test_generate_is_greedy_and_gives_the_new_text_alone(backbones, examples, kind):
    backbone = backbones(kind)
    answers = backbone.generate(backbone.collate(examples), max_new_tokens=5)
    for example, answer in zip(examples, answers, strict=True):
        read, said = [*([0] if backbone.tokenizer.bos_token else []), *ids_of(example.prompt)], []
        while len(said) < 5 and 2 not in said:
            logits = backbone.model(input_ids=torch.tensor([read + said])).logits
            said.append(int(logits[0, -1].argmax()))
        special = set(backbone.tokenizer.all_special_ids)  # "<s>" is a word like any other where no text begins with it
        assert answer == " ".join(VOCABULARY[t] for t in said if t not in special)


def test_generate_takes_options_and_bounds_the_length(backbones, examples):
    backbone = backbones()
    batch = backbone.collate(examples)
    assert len(backbone.generate(batch, num_beams=2, max_new_tokens=3)) == len(examples)
    assert all(len(a.split()) <= 2 for a in backbone.generate(batch, max_new_tokens=2))
    assert all(len(a.split()) <= causal.MAX_NEW_TOKENS for a in backbone.generate(batch))


def test_samples_come_from_the_models_own_distribution(backbones):
    backbone = backbones()
    backbone.model.generation_config.top_k = 1  # what a model's own settings may say
    try:
        batch = backbone.collate([Example("a", ("",), "w1 w2", "w1")] * 400)
        torch.manual_seed(0)
        drawn = backbone.generate(batch, do_sample=True, max_new_tokens=1)
    finally:
        backbone.model.generation_config.top_k = None
    p = backbone.model(input_ids=torch.tensor([[0, *ids_of("w1 w2")]])).logits[0, -1].softmax(0)
    best = max(WORDS, key=lambda w: float(p[VOCABULARY.index(w)]))
    expected = float(p[VOCABULARY.index(best)])
    assert abs(drawn.count(best) / 400 - expected) < 5 * math.sqrt(expected / 400)


def test_long_prompts_lose_their_beginning_and_keep_their_first_symbol():
    short, whole = build("llama", max_length=6), build("llama")
    example = Example("a", ("",), " ".join(WORDS[:9]), " ".join(WORDS[20:30]))
    cut = Example("a", ("",), " ".join(WORDS[4:9]), example.target)
    assert torch.equal(short.loss(short.collate([example])), whole.loss(whole.collate([cut])))
    assert not torch.equal(short.loss(short.collate([example])), whole.loss(whole.collate([example])))


def test_an_empty_prompt_is_the_symbol_a_text_begins_with(backbones):
    example = Example("a", ("",), "", "w1")
    assert backbones("llama").collate([example])["input_ids"].tolist() == [[0]]
    assert backbones("qwen2").collate([example])["input_ids"].tolist() == [[2]]


def test_an_end_that_the_tokenizer_adds_to_prompts_is_taken_off(backbones):
    reference = backbones("qwen2")
    ending = tokenizer(begins=False)
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    backbone = CausalBackbone("tiny", reference.model, ending)
    example = Example("a", ("",), "w1 w2", "w3")
    batch = backbone.collate([example])
    assert batch["input_ids"].tolist() == [ids_of("w1 w2")]
    assert batch["labels"].tolist() == [[*ids_of("w3"), 2]]


def test_prompts_become_the_users_turn_of_the_chat_template():
    backbone = build("llama", template=TEMPLATE)
    assert backbone.chat
    assert "chat=False" in repr(backbone)
    batch = backbone.collate([Example("a", ("",), "w1 w2", "w3 w4")])
    assert batch["input_ids"].tolist() == [ids_of("<|turn|> user w1 w2 <|over|> <|turn|> assistant")]
    assert batch["labels"].tolist() == [ids_of("w3 w4 <|over|>")], "the answer ends as the template ends turns"
    rendered = backbone.tokenizer.apply_chat_template(
        [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4"}], return_dict=False
    )
    assert batch["input_ids"][0].tolist() + batch["labels"][0].tolist() == rendered
    plain = build("llama", template=TEMPLATE, chat=False)
    assert not plain.chat
    assert "chat" not in repr(plain)
    assert plain.collate([Example("a", ("",), "w1 w2", "w3")])["input_ids"].tolist() == [[0, *ids_of("w1 w2")]]


def test_a_long_chat_prompt_is_cut_inside_the_template():
    backbone = build("llama", template=TEMPLATE, max_length=8)
    batch = backbone.collate([Example("a", ("",), " ".join(WORDS[:9]), "w1")])
    assert batch["input_ids"].tolist() == [ids_of("<|turn|> user w6 w7 w8 <|over|> <|turn|> assistant")]


def test_a_template_without_thoughts_and_without_the_date_of_today():
    backbone = build("llama", template="{{ date_string }} {{ enable_thinking }} " + TEMPLATE)
    (first, second, third, fourth, *_) = backbone.tokenizer.convert_ids_to_tokens(
        backbone.collate([Example("a", ("",), "w1", "w1")])["input_ids"][0]
    )
    assert [first, second, third, fourth] == ["<unk>"] * 4  # 26 Jul 2024 False, the same on every day


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('no such role') }}", "chat template fails"),
        ("{% for turn in messages %}{{ turn.content }} {% endfor %}", "no special token behind"),
    ],
)
def test_a_chat_template_that_cannot_be_used_says_how_to_go_without(template, said):
    with pytest.raises(PituningError, match=rf"{said}.*chat=False"):
        build("llama", template=template)


def test_chat_without_a_template_is_refused():
    with pytest.raises(PituningError, match="has no chat template; use chat=False"):
        build("llama", chat=True)


def test_answers_are_set_off_by_a_space_unless_the_tokenizer_does_that_itself(backbones):
    model = backbones().model
    core = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1, "▁": 2, "a": 3, "▁a": 4}, merges=[("▁", "a")]))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    spaced = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    assert CausalBackbone("tiny", model, spaced).separator == ""
    assert backbones().separator == " "
    assert CausalBackbone("tiny", model, tokenizer(), separator=" w5 ").collate([Example("a", ("",), "w1", "w2")])[
        "labels"
    ].tolist() == [[*ids_of("w5 w2"), 2]]


EXPECTED_TARGETS = {
    "llama": {
        "lora": ["q_proj", "v_proj"],
        "bottleneck": ["o_proj", "down_proj"],
        "ia3": ["k_proj", "v_proj", "down_proj"],
        "prefix": ["self_attn"],
        "prompt": ["model"],
    },
    "gpt2": {
        "lora": ["c_attn"],
        "bottleneck": ["attn.c_proj", "mlp.c_proj"],
        "ia3": ["c_attn", "mlp.c_proj"],
        "prefix": ["attn"],
        "prompt": ["transformer"],
    },
    "neox": {
        "lora": ["query_key_value"],
        "bottleneck": ["attention.dense", "dense_4h_to_h"],
        "ia3": ["query_key_value", "dense_4h_to_h"],
        "prefix": ["attention"],
        "prompt": ["gpt_neox"],
    },
}


@pytest.mark.parametrize("kind", EXPECTED_TARGETS)
def test_adaptable_modules(backbones, kind):
    backbone = backbones(kind)
    assert {m: backbone.adaptable(m) for m in EXPECTED_TARGETS[kind]} == EXPECTED_TARGETS[kind]


def test_bitfit_adapts_every_bias_and_is_refused_where_there_is_none(backbones):
    with pytest.raises(RefusedError, match="no bias that BitFit could train"):
        backbones("llama").adaptable("bitfit")
    for kind, count in (("qwen2", 3 * 2), ("gpt2", 6 * 2 + 1)):
        backbone = backbones(kind)
        biases = [n for n, _ in backbone.model.named_parameters() if n.endswith("bias")]
        assert len(biases) == count
        with attached(backbone, make_config("bitfit", backbone)) as site:
            assert sorted(k.removeprefix("base_model.model.") for k in site.parameters) == sorted(
                b.removesuffix("bias") + "bitfit_bias" for b in biases
            )


def randomise(parameters: dict[str, torch.nn.Parameter]) -> None:
    """Move an expert away from its start, where LoRA's product is zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.2)


SMALL: dict[str, dict[str, Any]] = {
    "lora": {"r": 4}, "bottleneck": {"r": 8}, "ia3": {}, "bitfit": {}, "prefix": {"length": 3}, "prompt": {"length": 3},
}  # fmt: skip


@pytest.mark.parametrize("method", SMALL)
@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_every_method_attaches_scores_as_its_loss_says_and_leaves_no_trace(backbones, examples, kind, method):
    backbone = backbones(kind)
    batch = backbone.collate(examples)
    before = {k: v.clone() for k, v in backbone.model.state_dict().items()}
    loss, scores = backbone.loss(batch), backbone.score(batch, CHOICES)
    with attached(backbone, make_config(method, backbone, **SMALL[method])) as site:
        randomise(site.parameters)
        assert (backbone.loss(batch) - loss).abs().max() > 1e-2
        adapted = backbone.score(batch, CHOICES)
        for column, choice in enumerate(CHOICES):
            as_targets = backbone.collate([Example(e.id, e.texts, e.prompt, choice) for e in examples])
            torch.testing.assert_close(adapted[:, column], -backbone.loss(as_targets), rtol=1e-5, atol=2e-5)
        assert len(backbone.generate(batch, max_new_tokens=3)) == len(examples)
        torch.autograd.backward(backbone.loss(batch).sum())
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in site.parameters.values())
    assert torch.equal(backbone.loss(batch), loss)
    assert torch.equal(backbone.score(batch, CHOICES), scores)
    after = backbone.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("kind", DOUBLE)
def test_gradients_flow_through_the_cached_prompt(backbones, examples, kind):
    backbone = backbones(kind, torch.float64)
    with attached(backbone, make_config("lora", backbone, r=4)) as site:
        randomise(site.parameters)
        parameters = list(site.parameters.values())
        found = torch.autograd.grad(backbone.score(backbone.collate(examples), CHOICES).sum(), parameters)
        slow = torch.stack([slow_log_p(backbone, e.prompt, c) for e in examples for c in CHOICES])
        expected = torch.autograd.grad(slow.sum(), parameters)
    for name, one, other in zip(site.parameters, found, expected, strict=True):
        error = (one - other).norm() / other.norm()
        assert error < 1e-10, f"{name}: gradient of the score is off by {error:.1e}"


def choice_examples(examples: Sequence[Example]) -> list[Example]:
    return [Example(e.id, e.texts, e.prompt, CHOICES[i % len(CHOICES)], CHOICES) for i, e in enumerate(examples)]


@pytest.mark.parametrize("labels", ["true", "model"])
@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"), [("llama", torch.float32, 1e-5), *((k, torch.float64, 1e-10) for k in DOUBLE)]
)
def test_fisher_is_the_one_example_loop(
    backbones, random_expert: RandomExpert, examples, kind, dtype, tolerance, labels
):
    backbone, items = backbones(kind, dtype), choice_examples(examples)
    expert = random_expert(backbone, "lora", scale=0.1)
    found = fisher_diagonal(backbone, expert, items, labels=labels, batch_size=4).mean()
    assert found.keys() == expert.tensors.keys()
    with attached(backbone, expert.config, expert.tensors) as site:
        parameters = list(site.parameters.values())
        loop = {k: torch.zeros(p.shape, dtype=torch.float64) for k, p in site.parameters.items()}
        for example in items:
            log_p = torch.stack([slow_log_p(backbone, example.prompt, c) for c in CHOICES])
            if labels == "model":
                log_p = log_p.log_softmax(0)
            weights = (
                log_p.detach().exp() if labels == "model" else torch.tensor([c == example.target for c in CHOICES])
            )
            for weight, term in zip(weights, log_p, strict=True):
                gradients = torch.autograd.grad(term, parameters, retain_graph=True)
                for key, gradient in zip(loop, gradients, strict=True):
                    loop[key] += float(weight) * gradient.double() ** 2 / len(items)
    for key, expected in loop.items():
        error = (found[key] - expected).norm() / expected.norm()
        assert error < tolerance, f"{key}: Fisher is off by {error:.1e}"


def test_half_precision_sums_in_float32_and_stays_near(examples):
    exact, half = build("llama"), build("llama", torch.bfloat16)
    loss = half.loss(half.collate(examples))
    assert loss.dtype == half.score(half.collate(examples), CHOICES).dtype == torch.float32
    assert torch.isfinite(loss).all()
    torch.testing.assert_close(loss, exact.loss(exact.collate(examples)), rtol=0.03, atol=0.3)


def saved(backbone: CausalBackbone, folder: Any) -> str:
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_saved_model_loads_as_this_family(backbones, tmp_path, examples, kind):
    backbone = backbones(kind)
    loaded = load_backbone(saved(backbone, tmp_path), max_length=40)
    assert isinstance(loaded, CausalBackbone)
    assert (loaded.family, loaded.max_length) == ("causal", 40)
    assert loaded.fingerprint == backbone.fingerprint
    assert torch.equal(loaded.loss(loaded.collate(examples)), backbone.loss(backbone.collate(examples)))


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}])
def test_a_device_map_goes_through_to_transformers(backbones, tmp_path, examples, device_map):
    backbone = backbones()
    loaded = load_backbone(saved(backbone, tmp_path), device_map=device_map)
    assert {str(p.device) for p in loaded.model.parameters()} == {"cpu"}
    assert loaded.fingerprint == backbone.fingerprint
    assert torch.equal(loaded.loss(loaded.collate(examples)), backbone.loss(backbone.collate(examples)))


def test_weights_that_a_device_map_moves_to_the_disk_are_refused(backbones, tmp_path):
    folder = saved(backbones(), tmp_path / "model")
    layers = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map = {**layers, "model.layers": "disk"}
    with pytest.raises(RefusedError, match="cannot be checked"):
        load_backbone(folder, device_map=device_map)


def test_a_file_without_all_tensors_is_named(backbones, tmp_path):
    model = backbones("llama").model
    kept = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    model.save_pretrained(tmp_path, state_dict=kept)
    backbones("llama").tokenizer.save_pretrained(tmp_path)
    with pytest.raises(PituningError, match=r"missing lm_head\.weight"):
        load_backbone(str(tmp_path))


def test_quantised_models_are_refused(backbones, tmp_path):
    backbone = backbones()
    folder = saved(backbone, tmp_path)
    config = backbone.model.config.__class__.from_pretrained(folder)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config.save_pretrained(folder)
    with pytest.raises(RefusedError, match=r"is quantised \(bitsandbytes\).*bfloat16"):
        load_backbone(folder)


def test_recurrent_models_and_models_without_positions_are_refused():
    mamba = FalconMambaConfig(vocab_size=len(VOCABULARY), hidden_size=8, num_hidden_layers=1, state_size=2)
    mpt = MptConfig(vocab_size=len(VOCABULARY), d_model=8, n_heads=2, n_layers=1)
    for config, said in ((mamba, "recurrent layers"), (mpt, "takes no position_ids")):
        with pytest.raises(RefusedError, match=said):
            CausalBackbone("tiny", AutoModelForCausalLM.from_config(config), tokenizer())


def test_a_tokenizer_that_makes_no_tokens_is_refused(backbones):
    core = Tokenizer(models.BPE(vocab={"</s>": 0}, merges=[]))
    with pytest.raises(PituningError, match="makes no token of the text 'a'"):
        CausalBackbone("tiny", backbones().model, PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>"))


def test_a_tokenizer_without_an_end_is_refused(backbones):
    with pytest.raises(PituningError, match="tokenizer has no eos_token"):
        CausalBackbone("tiny", backbones().model, tokenizer(eos_token=None))


def test_more_tokens_than_positions_are_refused(backbones):
    with pytest.raises(PituningError, match="max_length=200, but the model has 128 positions"):
        CausalBackbone("tiny", backbones("gpt2").model, tokenizer(), max_length=200)
    backbone = CausalBackbone("tiny", backbones("gpt2").model, tokenizer(), max_length=128)
    with pytest.raises(PituningError, match="'long' has 133 tokens"):
        backbone.collate([Example("long", ("",), "w1 " * 200, "w1 w2 w3 w4")])


def test_images_and_scoring_without_choices_are_refused(backbones, examples):
    backbone = backbones()
    with pytest.raises(RefusedError, match="reads text alone"):
        backbone.collate([Example("a", ("",), "w1", "w2", image=b"")])
    with pytest.raises(RefusedError, match="no choices"):
        backbone.score(backbone.collate(examples), ())


def toy_task(name: str, seed: int, shots: int | None = 8) -> Task:
    """The last word of the prompt decides the answer."""
    rng = random.Random(seed)
    splits = {}
    for split, count in (("train", 16), ("test", 24)):
        items = []
        for number in range(count):
            label = number % 2
            text = " ".join([*rng.choices(WORDS[10:40], k=rng.randint(1, 5)), ("w50", "w60")[label]])
            items.append(Example(f"{name}/{split}/{number}", (text,), text, ("w1", "w2 w3")[label], ("w1", "w2 w3")))
        splits[split] = tuple(items)
    return Task(name, ("w1", "w2 w3"), splits, shots=shots)


LINEAR = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("kind", "modules"), [("llama", LINEAR), ("qwen2", LINEAR), ("gpt2", ["c_attn", "c_proj", "c_fc"])]
)
def test_the_whole_way(backbones, tmp_path, kind, modules):
    backbone, target = backbones(kind), toy_task("target", 3)
    settings = pt.TrainSettings(learning_rate=1e-2, steps=40, batch_size=16)
    lora = {"r": 8, "target_modules": modules}
    sources = [pt.train_expert(backbone, toy_task(f"source-{s}", s), settings=settings, **lora) for s in (1, 2)]
    assert pt.evaluate(backbone, sources[0], target).value > max(0.7, pt.evaluate(backbone, None, target).value)
    found = pt.embed_task(backbone, sources[0], target).fisher
    loop = fisher_diagonal(backbone, sources[0], target.split("train"), batch_size=1).mean()
    for key, expected in loop.items():
        torch.testing.assert_close(found[key].double(), expected, rtol=1e-4, atol=1e-6 * float(expected.max()))
    search = pt.Search(learning_rates=(1e-2,), steps=10, folds=2)
    blended = pt.interpolate(backbone, target, sources, search=search).expert
    result = pt.evaluate(backbone, blended, target)
    assert result.value > 0.7
    answers = [answer for _, answer in pt.predict(backbone, blended, target)]
    assert answers == [target.choices[position] for position in result.predictions]
    blended.save(tmp_path / "expert")
    assert pt.evaluate(backbone, pt.Expert.load(tmp_path / "expert"), target).metrics == result.metrics
    assert "AutoModelForCausalLM.from_pretrained" in (tmp_path / "expert" / "README.md").read_text()
    ids = torch.tensor([ids_of("w10 w11 w50")])
    with torch.no_grad(), attached(backbone, blended.config, blended.tensors):
        expected = backbone.model(input_ids=ids).logits
    by_peft = PeftModel.from_pretrained(copy.deepcopy(backbone.model), tmp_path / "expert").eval()
    torch.testing.assert_close(by_peft(input_ids=ids).logits, expected, rtol=1e-6, atol=1e-6)


def test_an_expert_is_right_under_the_prompts_that_it_was_trained_on():
    turns, plain = build("llama", template=TEMPLATE), build("llama", template=TEMPLATE, chat=False)
    assert turns.fingerprint == plain.fingerprint
    expert = Expert({}, {}, ExpertCard("one", fingerprint=turns.fingerprint, training=turns.record))
    expert.require_backbone(turns)
    with pytest.raises(BackboneMismatchError, match=r"'one' was trained on prompts made with chat=True, separator=''"):
        expert.require_backbone(plain)
    expert.with_card(training={"family": "causal"}).require_backbone(plain)  # an older card does not say
