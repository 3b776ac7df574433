"""Tiny random backbones, random experts and tasks that all tests share. Nothing here touches the network."""

from __future__ import annotations

import gc
import math
import os
import random
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from zlib import crc32

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
# Before anything imports torch: some virtual machines announce AMX and kill a process that multiplies bfloat16 with it.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
if "PYTEST_XDIST_WORKER" in os.environ:  # one process for each core: more threads would be in each other's way
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5LayerNorm

from pituning.backbones.base import Backbone, Batch, normed_and_linear
from pituning.backbones.encoder import EncoderBackbone
from pituning.backbones.ofa.configuration import OFAConfig
from pituning.backbones.ofa.modeling import OFAForConditionalGeneration
from pituning.backbones.seq2seq import Seq2SeqBackbone
from pituning.errors import PituningError
from pituning.example import Example
from pituning.experts import Expert, ExpertCard
from pituning.experts.expert import tensor_hash
from pituning.interpolation import Mixture
from pituning.methods import attached, config_dict, initial_tensors, make_config
from pituning.tasks import Task
from pituning.training.crossfit import Search
from pituning.training.module import running

SYLLABLES = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
# Every third syllable also as a continuation, so that texts of equal word count differ in tokens; letters for real words.
PIECES = [
    *SYLLABLES,
    *(f"##{s}" for s in SYLLABLES[::3]),
    *string.ascii_lowercase,
    *(f"##{c}" for c in string.ascii_lowercase),
]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *PIECES]
CHOICES = ("ba", "de fi", "go ku la mi")
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"r": 3},
    "bottleneck": {"r": 4},
    "prefix": {"length": 3, "decoder_length": 2},
    "bitfit": {},
}

BackboneOf = Callable[..., Backbone]
RandomExpert = Callable[..., Expert]
RandomExamples = Callable[..., list[Example]]
MakeTask = Callable[..., Task]

settings.register_profile(
    "tiny", derandomize=True, deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("quick", settings.get_profile("tiny"), max_examples=3, phases=[Phase.generate])
settings.load_profile("tiny")


def build_bert(dtype: torch.dtype, share_layers: bool = False) -> EncoderBackbone:
    """A BERT of two layers, hidden size 16, whose random weights are large enough to make every input look different."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    model = BertModel(config).to(dtype)
    if share_layers:
        model.encoder.layer[1] = model.encoder.layer[0]
    return EncoderBackbone("tiny-bert", model, build_tokenizer("[CLS] $A [SEP]", "[SEP]"))


def build_t5(dtype: torch.dtype) -> Seq2SeqBackbone:
    """A T5 of two plus two layers, model size 16; in float64 its norms, which compute in float32, are replaced."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(VOCABULARY),
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=2,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=3,
    )
    model = T5ForConditionalGeneration(config).to(dtype)
    if dtype == torch.float64:
        for parent in list(model.modules()):
            for name, norm in list(parent.named_children()):
                if isinstance(norm, T5LayerNorm):
                    double = torch.nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon, dtype=dtype)
                    double.load_state_dict(norm.state_dict())
                    setattr(parent, name, double)
    return Seq2SeqBackbone("tiny-t5", model, build_tokenizer("$A [SEP]", "[SEP]"))


class TinyOFA(Seq2SeqBackbone):
    """OFA over the tiny vocabulary, with an image made from each example's id. The decoder's rows of one example, one for
    each choice, attend to its source together."""

    def adaptable(self, method: str) -> list[str]:
        if method == "bitfit":
            return normed_and_linear(self.model, skip=["decoder.code_layernorm_embedding", "decoder.image_pos_ln"])
        return {
            "lora": ["q_proj", "k_proj", "v_proj", "out_proj"],
            "bottleneck": ["self_attn_output", "ffn_output"],
            "prefix": ["self_attn"],
        }[method]

    def collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        images = [
            torch.randn(3, 32, 48, generator=torch.Generator().manual_seed(crc32(e.id.encode()))) for e in examples
        ]
        dtype = next(self.model.parameters()).dtype
        return {**super().collate(examples), "patch_images": torch.stack(images).to(dtype)}

    def loss(self, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        return self._losses(batch["labels"], label_smoothing, **{k: batch[k] for k in batch if k != "labels"})

    def score(self, batch: Batch, choices: Sequence[str]) -> Tensor:
        encoded = self.model.get_encoder()(**{k: batch[k] for k in batch if k != "labels"})
        labels = self._labels(choices).repeat(len(batch["input_ids"]), 1)
        return -self._losses(labels, encoder_outputs=encoded).view(-1, len(choices))


def build_ofa(dtype: torch.dtype, **options: Any) -> TinyOFA:
    """An OFA of two plus three layers, model size 16, whose weights and biases are all random."""
    torch.manual_seed(0)
    config = OFAConfig(
        vocab_size=len(VOCABULARY),
        d_model=16,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=2,
        encoder_ffn_dim=32,
        encoder_drop_path_rate=0.2,
        resnet_layers=[1, 1, 1],
        resnet_stem_width=4,
        resnet_widths=[2, 2, 4],
        max_source_positions=64,
        max_target_positions=32,
        token_bucket_size=16,
        image_bucket_size=8,
        code_image_size=32,
        decoder_start_token_id=2,
        pad_token_id=0,
        eos_token_id=3,
        **options,
    )
    model = OFAForConditionalGeneration(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.3 * torch.randn(parameter.shape)).to(parameter))
    return TinyOFA("tiny-ofa", model, build_tokenizer("$A [SEP]", "[SEP]"))


def build_tokenizer(single: str, end: str) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer over made-up syllables."""
    core = Tokenizer(models.WordPiece({w: i for i, w in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single=single, pair=f"{single} $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "eos_token": end}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


@pytest.fixture(scope="session", autouse=True)
def frozen_garbage() -> None:
    """Every `Trainer` collects garbage; without the imported libraries in its way that is ten times faster."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def backbone_of() -> BackboneOf:
    """``backbone_of("encoder" | "seq2seq" | "ofa", dtype)``: tiny backbones, each built once."""
    built: dict[tuple[str, torch.dtype], Backbone] = {}

    def get(family: str = "encoder", dtype: torch.dtype = torch.float32) -> Backbone:
        if (family, dtype) not in built:
            built[family, dtype] = {"encoder": build_bert, "seq2seq": build_t5, "ofa": build_ofa}[family](dtype)
        return built[family, dtype]

    return get


@pytest.fixture
def bert(backbone_of: BackboneOf) -> Backbone:
    """The tiny encoder in float32."""
    return backbone_of("encoder")


@pytest.fixture
def t5(backbone_of: BackboneOf) -> Backbone:
    """The tiny encoder-decoder in float32."""
    return backbone_of("seq2seq")


@pytest.fixture
def ofa(backbone_of: BackboneOf) -> Backbone:
    """The tiny OFA in float32."""
    return backbone_of("ofa")


@pytest.fixture(scope="session")
def fresh_bert_of() -> Callable[..., EncoderBackbone]:
    """``fresh_bert_of(dtype, share_layers)``: a tiny encoder of the test's own, for tests that may spoil it."""
    return build_bert


@pytest.fixture(scope="session")
def random_expert() -> RandomExpert:
    """``random_expert(backbone, method, seed, **options)``: the initial tensors plus noise, so that LoRA's B is not zero."""
    known: dict[tuple[str, str], tuple[dict[str, Any], dict[str, Tensor]]] = {}

    def make(
        backbone: Backbone, method: str = "lora", seed: int = 0, *, scale: float = 0.1, name: str = "", **options: Any
    ) -> Expert:
        options = {**OPTIONS[method], **options}
        key = (backbone.fingerprint, repr((method, sorted(options.items()))))
        if key not in known:
            config = config_dict(make_config(method, backbone, **options))
            known[key] = config, initial_tensors(backbone, config)
        config, initial = known[key]
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            k: t + scale * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)
            for k, t in initial.items()
        }
        card = ExpertCard(
            name=name or f"{method}-{seed}",
            backbone=backbone.hub_name,
            fingerprint=backbone.fingerprint,
            task=f"task-{seed}",
            method=method,
            init_hash=tensor_hash(initial),
            parameters=sum(t.numel() for t in tensors.values()),
            training={"family": backbone.family},
        )
        return Expert(tensors, config, card)

    return make


@pytest.fixture(scope="session")
def random_experts(random_expert: RandomExpert) -> Callable[..., list[Expert]]:
    """``random_experts(backbone, method, count, seed)``: LoRA experts differ in rank, scaling and adapted modules."""
    modules = {
        "encoder": ("query", "key", "value", "output.dense"),
        "seq2seq": ("q", "k", "v", "wo"),
        "ofa": ("q_proj", "k_proj", "v_proj", "fc2"),
    }
    first = {"encoder": "0.attention.self.query", "seq2seq": "0.SelfAttention.q", "ofa": "0.self_attn.q_proj"}

    def make(backbone: Backbone, method: str, count: int, seed: int = 0) -> list[Expert]:
        if method != "lora":
            return [random_expert(backbone, method, 100 * seed + k) for k in range(count)]
        rng = random.Random(seed)
        experts = []
        for k in range(count):
            family = "ofa" if isinstance(backbone, TinyOFA) else backbone.family
            targets = rng.sample(modules[family], rng.randint(1, 3))
            options: dict[str, Any] = {
                "r": rng.choice((1, 2, 3, 5)), "lora_alpha": rng.choice((1, 4, 7)), "use_rslora": rng.random() < 0.5,
                "target_modules": sorted(targets),
            }  # fmt: skip
            patterned = rng.random() < 0.5 and first[family].rpartition(".")[2] in targets
            if patterned:
                options |= {"alpha_pattern": {first[family]: 3}, "rank_pattern": {first[family]: 4}}
            experts.append(random_expert(backbone, method, 100 * seed + k, **options))
        return experts

    return make


@pytest.fixture(scope="session")
def attached_loss() -> Callable[[Backbone, Expert, Sequence[Example]], Tensor]:
    """Per-example loss of an expert that PEFT itself runs, without any mixture."""

    def loss(backbone: Backbone, expert: Expert, examples: Sequence[Example]) -> Tensor:
        with torch.no_grad(), attached(backbone, expert.config, expert.tensors):
            return backbone.loss(backbone.collate(examples))

    return loss


@pytest.fixture(scope="session")
def mixture_loss() -> Callable[[Backbone, Mixture, Mapping[str, Any], Sequence[Example]], Tensor]:
    """Per-example loss of a mixture."""

    def loss(backbone: Backbone, mixture: Mixture, config: Mapping[str, Any], examples: Sequence[Example]) -> Tensor:
        with torch.no_grad(), running(backbone, mixture, config) as model:
            return model(**backbone.collate(examples))

    return loss


@pytest.fixture(scope="session")
def random_examples() -> RandomExamples:
    """``random_examples(count, seed)``: texts of 1 to 9 words over the tiny vocabulary, with or without choices."""

    def make(
        count: int = 6, seed: int = 0, *, choices: Sequence[str] = CHOICES, pairs: bool = False, prefix: str = "e"
    ) -> list[Example]:
        rng = random.Random(seed)

        def words(low: int, high: int) -> str:
            return " ".join("".join(rng.choices(SYLLABLES, k=rng.randint(1, 2))) for _ in range(rng.randint(low, high)))

        examples = []
        for index in range(count):
            texts = (words(1, 9), words(1, 5)) if pairs else (words(1, 9),)
            target = choices[index % len(choices)] if choices else words(1, 6)
            examples.append(Example(f"{prefix}/{index}", texts, " ".join(texts), target, tuple(choices)))
        return examples

    return make


@pytest.fixture(scope="session")
def make_task(random_examples: RandomExamples) -> MakeTask:
    """``make_task(name, shots, seed)``: a tiny task with shots in train, and a test split."""

    def make(name: str = "target", shots: int | None = 4, seed: int = 0, tests: int = 9) -> Task:
        count = (shots or 8) * len(CHOICES)
        splits = {
            "train": tuple(random_examples(count, seed, prefix=f"{name}/train")),
            "test": tuple(random_examples(tests, seed + 1000, prefix=f"{name}/test")),
        }
        return Task(name, CHOICES, splits, shots=shots)

    return make


@pytest.fixture(scope="session")
def lora_deltas() -> Callable[[Expert], dict[str, Tensor]]:
    """ΔW = s B A by module, dense and in float64; s from the expert's configuration as PEFT's documentation has it."""

    def dense(expert: Expert) -> dict[str, Tensor]:
        config = expert.config
        deltas = {}
        for key in expert.tensors:
            if not key.endswith(".lora_A.weight"):
                continue
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            a, b = expert.tensors[key].double(), expert.tensors[key.replace("lora_A", "lora_B")].double()
            alpha = config["lora_alpha"]
            for pattern, value in (config["alpha_pattern"] or {}).items():
                if module == pattern or module.endswith("." + pattern):
                    alpha = value
            deltas[module] = alpha / (math.sqrt(len(a)) if config["use_rslora"] else len(a)) * (b @ a)
        return deltas

    return dense


@pytest.fixture(scope="session")
def with_deltas() -> Callable[..., Any]:
    """``with with_deltas(backbone, {module: ΔW}):`` runs the bare backbone with ΔW added to its dense weights."""

    @contextmanager
    def added(backbone: Backbone, deltas: Mapping[str, Tensor]) -> Iterator[None]:
        weights = {m: backbone.model.get_submodule(m).weight for m in deltas}
        before = {m: w.detach().clone() for m, w in weights.items()}
        try:
            for module, weight in weights.items():
                weight.data = (before[module].double() + deltas[module]).to(weight.dtype)
            yield
        finally:
            for module, weight in weights.items():
                weight.data = before[module]

    return added


@pytest.fixture(scope="session")
def distance() -> Callable[[Tensor, Tensor], float]:
    """Relative distance ‖a − b‖ / ‖b‖, in float64."""

    def relative(found: Tensor, expected: Tensor) -> float:
        assert found.shape == expected.shape
        return float((found.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())

    return relative


@pytest.fixture
def message() -> Callable[..., str]:
    """``message(function, *arguments)``: text of the `PituningError` that the call must raise."""

    def text(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
        with pytest.raises(PituningError) as caught:
            call(*arguments, **options)
        return str(caught.value)

    return text


@pytest.fixture
def short_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """One learning rate, two folds, two steps, for every few-shot decision."""
    short = partial(Search, learning_rates=(1e-3,), steps=2, eval_every=1, folds=2)
    for module in ("train_expert", "interpolate", "crossfit"):
        monkeypatch.setattr(f"pituning.training.{module}.Search", short)
