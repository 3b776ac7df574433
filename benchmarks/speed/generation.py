"""Generation: the bare backbone, one expert, and three experts collapsed into one of the same shape."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from benchmarks.speed.measuring import Sample, Setting, interleaved, seconds
from benchmarks.speed.models import SMALL_OFA, random_experts
from benchmarks.speed.ofa import FixedBatch
from pituning.backbones.base import Backbone, Batch
from pituning.backbones.ofa.configuration import OFAConfig
from pituning.backbones.ofa.generation import BeamSettings, beam_search
from pituning.backbones.ofa.modeling import OFAForConditionalGeneration
from pituning.example import Example
from pituning.experts import Expert, ExpertCard
from pituning.interpolation import build_mixture, collapse
from pituning.methods import attached, config_dict, make_config

EXPERTS = 3


@dataclass(frozen=True)
class Writer:
    """A backbone, the configuration of its experts, and a search that writes a fixed number of tokens."""

    backbone: Backbone
    config: dict[str, Any]
    write: Callable[[], object]
    tokens: int


class Bare(Backbone):
    """A model of transformers to put experts on; nothing else is asked of it."""

    def adaptable(self, method: str) -> list[str]:
        """The configuration names its modules."""
        raise NotImplementedError

    def collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Not measured."""
        raise NotImplementedError

    def loss(self, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        """Not measured."""
        raise NotImplementedError

    def score(self, batch: Batch, choices: Sequence[str]) -> Tensor:
        """Not measured."""
        raise NotImplementedError


def generation(setting: Setting) -> dict[str, Sample]:
    """Tokens per second, and what a collapsed expert costs beside a single one."""
    samples: dict[str, Sample] = {}
    for name, build in (("OFA", _ofa), ("T5", _t5), ("Llama", _llama)):
        torch.manual_seed(0)
        writer = build(setting)
        pool = random_experts(writer.backbone, writer.config, EXPERTS)
        experts: dict[str, Expert | None] = {"bare": None, "one expert": pool[0], "collapsed": collapsed(pool)}
        cases = {case: partial(_written, writer, expert, setting.device) for case, expert in experts.items()}
        times = interleaved(cases, setting.pick(20, 2))
        samples |= {f"{name}, {case}": Sample.rate(writer.tokens, times[case]) for case in experts}
        samples[f"{name}, collapsed / one expert"] = Sample.ratio(times["collapsed"], times["one expert"])
    return samples


def collapsed(pool: list[Expert]) -> Expert:
    """The uniform mixture as one expert of the same shape."""
    mixture, config = build_mixture(pool, train="none")
    rank = pool[0].config["r"] if config["peft_type"] == "LORA" else None
    return collapse(mixture, config, ExpertCard("collapsed"), rank=rank).expert


def _written(writer: Writer, expert: Expert | None, device: str) -> float:
    """Seconds of one search; attaching is not timed."""
    if expert is None:
        return seconds(writer.write, device)
    with attached(writer.backbone, expert.config, expert.tensors):
        return seconds(writer.write, device)


def _ofa(setting: Setting) -> Writer:
    config = setting.pick(OFAConfig.of_size("tiny"), OFAConfig(**SMALL_OFA))
    side, words = setting.pick((256, 50000), (32, 500))
    batch, length = 2, setting.pick(16, 4)
    backbone = FixedBatch(OFAForConditionalGeneration(config), batch, side, setting.device, words)
    settings = BeamSettings(beam=5, min_len=length, max_len_b=length)
    adapter = config_dict(make_config("bottleneck", backbone, r=setting.pick(128, 4)))
    return Writer(
        backbone, adapter, lambda: beam_search(backbone.model, backbone.inputs, settings), batch * (length + 1)
    )


def _t5(setting: Setting) -> Writer:
    wide, layers = setting.pick((512, 6), (32, 1))
    config = T5Config(
        d_model=wide, d_kv=wide // 8, d_ff=4 * wide, num_layers=layers, num_heads=8, decoder_start_token_id=0
    )
    return _by_transformers(T5ForConditionalGeneration(config), ["q", "v"], setting)


def _llama(setting: Setting) -> Writer:
    wide, layers = setting.pick((512, 8), (32, 1))
    config = LlamaConfig(hidden_size=wide, intermediate_size=4 * wide, num_hidden_layers=layers, num_attention_heads=8)
    return _by_transformers(LlamaForCausalLM(config), ["q_proj", "v_proj"], setting)


def _by_transformers(model: nn.Module, modules: list[str], setting: Setting) -> Writer:
    """Greedy, four prompts of 32 tokens, 32 new ones."""
    batch, new = 4, setting.pick(32, 3)
    backbone = Bare("random", model, tokenizer=None, device=setting.device)
    ids = torch.randint(10, 30000, (batch, 32), generator=torch.Generator().manual_seed(0)).to(setting.device)
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "min_new_tokens": new, "max_new_tokens": new}

    def write() -> None:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            backbone.model.generate(input_ids=ids, **options)

    return Writer(backbone, config_dict(LoraConfig(r=8, target_modules=modules)), write, batch * new)
