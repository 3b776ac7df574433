"""The training step: plain PEFT, one expert, and an interpolation of three, at the same shapes; and the memory of each."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from benchmarks.speed.interpolation import Built, build, held, step_seconds, timed, trainable
from benchmarks.speed.measuring import Sample, Setting, in_process, interleaved, peak_mb
from pituning.backbones.encoder import TEMPERATURE
from pituning.interpolation import build_mixture
from pituning.methods.attach import peft_config
from pituning.training.batching import parts_of_similar_length
from pituning.training.module import running

EXPERTS = 3
CASES: Mapping[str, tuple[str, str | None]] = {
    "LoRA": ("lora", None),
    "bottleneck": ("bottleneck", None),
    "LoRA, π": ("lora", "experts"),
    "LoRA, shared": ("lora", "shared"),
    "bottleneck, π": ("bottleneck", "experts"),
    "bottleneck, shared": ("bottleneck", "shared"),
}
"""Case → method, and how the mixture is trained; ``None`` is one expert alone."""

PEFT = "PEFT LoRA"
PART = "whole step"


def shapes(setting: Setting) -> dict[str, int]:
    """MiniLM's, batch 16 × 32 tokens."""
    full = {"batch": 16, "tokens": 32, "hidden": 384, "layers": 6}
    return setting.pick(full, {"batch": 4, "tokens": 8, "hidden": 32, "layers": 2})


def steps(setting: Setting) -> dict[str, Sample]:
    """Seconds of whole steps, and their ratios."""
    built = {m: build(m, EXPERTS, **shapes(setting), device=setting.device) for m in ("lora", "bottleneck")}
    cases: dict[str, Callable[[], float]] = {
        name: partial(_whole_step, built[method], train) for name, (method, train) in CASES.items()
    }
    loss, parameters = plain_peft(build("lora", 1, **shapes(setting), device=setting.device))
    cases[PEFT] = lambda: step_seconds(loss, parameters, setting.device)[PART]
    times = interleaved(cases, setting.pick(40, 2), warm_up=setting.pick(3, 1))
    samples = {f"{name}, seconds": Sample.of(times[name]) for name in (PEFT, "LoRA", "bottleneck")}
    samples["LoRA / PEFT LoRA"] = Sample.ratio(times["LoRA"], times[PEFT])
    for method in ("LoRA", "bottleneck"):
        for kind in ("π", "shared"):
            samples[f"{method}, {kind} / one expert"] = Sample.ratio(times[f"{method}, {kind}"], times[method])
    return samples


def many(setting: Setting) -> dict[str, Sample]:
    """Eight and sixteen experts against one: seconds, and at sixteen what is held, in experts."""
    samples = {}
    for method, name in (("lora", "LoRA"), ("bottleneck", "bottleneck")):
        sixteen = build(method, 16, **shapes(setting), device=setting.device)
        eight = replace(sixteen, pool=sixteen.pool[:8])
        cases = {
            "one": partial(timed, sixteen, None),
            "K=8, shared": partial(timed, eight, "shared"),
            "K=8, π": partial(timed, eight, "experts"),
            "K=16, shared": partial(timed, sixteen, "shared"),
            "K=16, weights": partial(timed, sixteen, "weights"),
        }
        times = interleaved(cases, setting.pick(40, 2), warm_up=setting.pick(3, 1))
        for case in ("K=8, shared", "K=16, shared", "K=16, weights"):
            ratio = _ratio(times[case], times["one"], "forward+backward")
            samples[f"{name}, {case}, forward and backward / one expert"] = ratio
        for case in ("K=8, shared", "K=8, π"):
            samples[f"{name}, {case}, whole step / one expert"] = _ratio(times[case], times["one"], PART)
        for kind in ("shared", "weights"):
            experts = held(sixteen, kind) / (16 + 4)
            samples[f"{name}, K=16, {kind}, held / K + 4 experts"] = Sample.once(experts)
    return samples


def _ratio(left: Sequence[Mapping[str, float]], right: Sequence[Mapping[str, float]], part: str) -> Sample:
    return Sample.ratio([times[part] for times in left], [times[part] for times in right])


def memory(setting: Setting) -> dict[str, Sample]:
    """Peak megabytes of a process that takes three steps."""
    peaks = {
        name: float(in_process("steps:peak", name, setting.device, shapes(setting), threads=setting.threads))
        for name in (PEFT, *CASES)
    }
    samples = {f"{name}, peak": Sample.once(value) for name, value in peaks.items()}
    for method in ("LoRA", "bottleneck"):
        for kind in ("π", "shared"):
            samples[f"{method}, {kind} / one expert"] = Sample.once(peaks[f"{method}, {kind}"] / peaks[method])
    return samples


def peak(case: str, device: str, shape: dict[str, int]) -> float:
    """Peak megabytes of this process after three steps of a case."""
    if case == PEFT:
        loss, parameters = plain_peft(build("lora", 1, **shape, device=device))
        running: AbstractContextManager[Any] = nullcontext((loss, parameters))
    else:
        method, train = CASES[case]
        running = trainable(build(method, EXPERTS if train else 1, **shape, device=device), train)
    with running as (loss, parameters):
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        for _ in range(3):
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()
    return peak_mb(device)


LETTERS = 4.5
"""Letters of a token, about, with the space before it: what parts are made by is the length of the text."""


def lengths(setting: Setting) -> dict[str, Sample]:
    """Forward and backward of texts of many lengths, as one padded batch and in parts."""
    built = build("lora", 1, **shapes(setting), device=setting.device)
    size, rng = len(built.inputs["input_ids"]), random.Random(0)
    longest = setting.pick(128, 16)
    whole, parted = "padded to the longest", "in parts"
    taken: dict[str, list[float]] = {whole: [], parted: []}
    padding: dict[str, list[float]] = {whole: [], parted: []}
    mixture, config = build_mixture(built.pool, train="experts")
    with running(built.backbone, mixture, config) as model:
        for repeat in range(-3, setting.pick(40, 2)):
            tokens = [min(longest, max(1, round(rng.lognormvariate(math.log(20), 0.7)))) for _ in range(size)]
            ways = {whole: [list(range(size))], parted: parts_of_similar_length([round(LETTERS * n) for n in tokens])}
            for way in random.Random(repeat).sample((whole, parted), 2):
                batches = [_texts(built, [tokens[n] for n in part]) for part in ways[way]]
                start = time.perf_counter()
                model(parts=batches).mean().backward()
                if repeat >= 0:
                    taken[way].append(time.perf_counter() - start)
                    padding[way].append(1 - sum(tokens) / sum(batch["input_ids"].numel() for batch in batches))
    return {
        **{f"{way}, seconds": Sample.of(values) for way, values in taken.items()},
        f"{whole} / {parted}": Sample.ratio(taken[whole], taken[parted]),
        "padding, to the longest": Sample.of(padding[whole]),
        "padding, in parts": Sample.of(padding[parted]),
    }


def _texts(built: Built, tokens: Sequence[int]) -> dict[str, Any]:
    """Random texts of these lengths, padded to the longest."""
    places, ends = torch.arange(max(tokens)), torch.tensor(tokens)
    return {
        **built.inputs,
        "input_ids": torch.randint(1000, 30000, (len(tokens), len(places))),
        "attention_mask": (places < ends[:, None]).long(),
        "target": torch.arange(len(tokens)) % 2,
    }


def plain_peft(built: Built) -> tuple[Callable[[], Tensor], list[nn.Parameter]]:
    """The same loss without this project: PEFT on the model itself, the head written out. The model is PEFT's afterwards."""
    model: Any = get_peft_model(built.backbone.model, peft_config(built.settings))
    inputs = built.inputs

    def loss() -> Tensor:
        hidden = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        pooled = nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        logits = pooled @ inputs["label_embeddings"].T / TEMPERATURE
        return nn.functional.cross_entropy(logits, inputs["target"])

    return loss, [p for p in model.parameters() if p.requires_grad]


def _whole_step(built: Built, train: str | None) -> float:
    return timed(built, train)[PART]
