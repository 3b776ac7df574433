"""Step time of an interpolation of K experts against plain training of one PEFT expert on the same backbone.

Run: python benchmarks/speed/interpolation.py [--repeats 40] [--experts 16] [--batch 16] [--tokens 32] [--threads 2]

Interleaved A/B: in every repeat each case runs once, in a shuffled order, on the same batch; the table shows the median of
the ratios to the baseline of the same repeat and its 95 % bootstrap interval. The backbone has MiniLM-L6's shape with
random weights (6 layers, hidden 384, 12 heads, FFN 1536); LoRA r = 8 on query and value, bottleneck r = 64.

Memory is what is held after a step: all distinct storages of parameters, buffers, gradients and optimizer state that belong
to the mixture, in units of one expert's tensors. K frozen experts and one trainable with its gradient and AdamW's two moments
are K + 4.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from pituning.backbones.encoder import EncoderBackbone
from pituning.experts import Expert, ExpertCard
from pituning.interpolation import build_mixture
from pituning.methods import attached, config_dict, initial_tensors, make_config
from pituning.training.module import MixtureModel, running

Step = Callable[[bool], float]


def main() -> None:
    """Measure all cases and print a table on standard error and JSON on standard output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("repeats", 40), ("experts", 16), ("batch", 16), ("tokens", 32), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = {m: measure(m, **vars(arguments)) for m in ("lora", "bottleneck")}
    print(json.dumps({"shapes": vars(arguments), "torch": torch.__version__, "results": results}, indent=1))


def measure(method: str, repeats: int, experts: int, batch: int, tokens: int, threads: int) -> dict[str, Any]:
    """Ratios of every case to plain training of one expert, forward+backward and whole steps."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, vocab_size=30522
    )
    backbone = EncoderBackbone("MiniLM-shaped", BertModel(config), tokenizer=None)
    settings = config_dict(make_config(method, backbone))
    initial = initial_tensors(backbone, settings)
    pool = [_random_expert(initial, settings, seed) for seed in range(experts)]
    inputs = {
        "input_ids": torch.randint(1000, 30000, (batch, tokens)),
        "attention_mask": torch.ones(batch, tokens, dtype=torch.long),
        "label_embeddings": torch.nn.functional.normalize(torch.randn(2, 384), dim=1),
        "target": torch.arange(batch) % 2,
    }
    modes = {f"K={experts} {train}": train for train in ("shared", "experts", "weights")}
    times: dict[str, dict[str, list[float]]] = {"baseline": {}, **{name: {} for name in modes}}
    order = list(times)
    for repeat in range(-3, repeats):
        random.Random(repeat).shuffle(order)
        for name in order:
            elapsed = _time(backbone, settings, initial, pool, modes.get(name), inputs)
            if repeat >= 0:
                for part, seconds in elapsed.items():
                    times[name].setdefault(part, []).append(seconds)
    report: dict[str, Any] = {"baseline_seconds": {p: statistics.median(v) for p, v in times["baseline"].items()}}
    for name, train in modes.items():
        held = _held(backbone, initial, pool, train, inputs) / _bytes(initial.values())
        report[f"{name} memory, experts"] = held
        print(f"{method:<11}{name:<14}{'memory':<18}{held:5.2f} experts", file=sys.stderr)
        report[name] = {part: _ratio(times[name][part], times["baseline"][part]) for part in times[name]}
        for part, (median, low, high) in report[name].items():
            print(f"{method:<11}{name:<14}{part:<18}{median:5.2f}x  [{low:.2f}, {high:.2f}]", file=sys.stderr)
    return report


def _time(
    backbone: EncoderBackbone,
    settings: Mapping[str, Any],
    initial: Mapping[str, Tensor],
    pool: list[Expert],
    train: str | None,
    inputs: Mapping[str, Any],
) -> dict[str, float]:
    """One forward+backward and one whole step (with AdamW), after a warm-up step; attaching is not timed."""
    with ExitStack() as stack:
        if train is None:
            site = stack.enter_context(attached(backbone, settings, pool[0].tensors))
            parameters = list(site.parameters.values())

            def loss() -> Tensor:
                return backbone.loss(inputs).mean()
        else:
            mixture, config = build_mixture(pool, train=train, initial=dict(initial))
            site = stack.enter_context(attached(backbone, config))
            for parameter in site.parameters.values():
                parameter.requires_grad_(False)
            model = MixtureModel(site, mixture)
            parameters = [p for p in model.parameters() if p.requires_grad]

            def loss() -> Tensor:
                return model(**inputs).mean()

        optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        elapsed = {}
        for _ in range(2):
            start = time.perf_counter()
            loss().backward()
            elapsed["forward+backward"] = time.perf_counter() - start
            optimizer.step()
            optimizer.zero_grad()
            elapsed["whole step"] = time.perf_counter() - start
        return elapsed


def _held(
    backbone: EncoderBackbone, initial: Mapping[str, Tensor], pool: list[Expert], train: str, inputs: Mapping[str, Any]
) -> int:
    """Bytes that belong to a mixture after one step."""
    mixture, config = build_mixture(pool, train=train, initial=dict(initial))
    with running(backbone, mixture, config) as model:
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        model(**inputs).mean().backward()
        optimizer.step()
        state = [t for values in optimizer.state.values() for t in values.values() if isinstance(t, Tensor)]
        gradients = [p.grad for p in parameters if p.grad is not None]
        return _bytes([*mixture.parameters(), *mixture.buffers(), *gradients, *state])


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _random_expert(initial: Mapping[str, Tensor], settings: Mapping[str, Any], seed: int) -> Expert:
    generator = torch.Generator().manual_seed(seed)
    tensors = {k: t + 0.01 * torch.randn(t.shape, generator=generator) for k, t in initial.items()}
    return Expert(tensors, settings, ExpertCard(f"random {seed}"))


def _ratio(ours: list[float], baseline: list[float]) -> tuple[float, float, float]:
    ratios = np.array(ours) / np.array(baseline)
    drawn = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return float(np.median(ratios)), float(low), float(high)


if __name__ == "__main__":
    main()
