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
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

if not __package__:  # run by its path
    sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.speed.measuring import interleaved, ratio, synchronize
from benchmarks.speed.models import minilm_shaped, random_expert
from pituning.backbones.encoder import EncoderBackbone
from pituning.experts import Expert
from pituning.interpolation import build_mixture
from pituning.methods import attached, config_dict, initial_tensors, make_config
from pituning.training.module import running


@dataclass(frozen=True)
class Built:
    """A backbone, experts for it, and one batch."""

    backbone: EncoderBackbone
    settings: Mapping[str, Any]
    initial: Mapping[str, Tensor]
    pool: list[Expert]
    inputs: Mapping[str, Any]


def main() -> None:
    """Measure all cases and print a table on standard error and JSON on standard output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("repeats", 40), ("experts", 16), ("batch", 16), ("tokens", 32), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = {m: measure(m, **vars(arguments)) for m in ("lora", "bottleneck")}
    print(json.dumps({"shapes": vars(arguments), "torch": torch.__version__, "results": results}, indent=1))


def build(
    method: str, experts: int, batch: int, tokens: int, hidden: int = 384, layers: int = 6, device: str = "cpu"
) -> Built:
    """MiniLM's shape unless told otherwise, with random weights and experts."""
    backbone = EncoderBackbone("MiniLM-shaped", minilm_shaped(hidden, layers), tokenizer=None, device=device)
    settings = config_dict(make_config(method, backbone))
    initial = initial_tensors(backbone, settings)
    pool = [random_expert(initial, settings, seed) for seed in range(experts)]
    inputs = {
        "input_ids": torch.randint(1000, 30000, (batch, tokens)),
        "attention_mask": torch.ones(batch, tokens, dtype=torch.long),
        "label_embeddings": nn.functional.normalize(torch.randn(2, hidden), dim=1),
        "target": torch.arange(batch) % 2,
    }
    return Built(backbone, settings, initial, pool, {k: t.to(device) for k, t in inputs.items()})


def measure(method: str, repeats: int, experts: int, batch: int, tokens: int, threads: int) -> dict[str, Any]:
    """Ratios of every case to plain training of one expert, forward+backward and whole steps."""
    built = build(method, experts, batch, tokens)
    modes = {f"K={experts} {train}": train for train in ("shared", "experts", "weights")}
    cases = {name: partial(timed, built, train) for name, train in {"baseline": None, **modes}.items()}
    found = interleaved(cases, repeats, warm_up=3)
    times = {name: {part: [e[part] for e in elapsed] for part in elapsed[0]} for name, elapsed in found.items()}
    report: dict[str, Any] = {"baseline_seconds": {p: statistics.median(v) for p, v in times["baseline"].items()}}
    for name, train in modes.items():
        report[f"{name} memory, experts"] = memory = held(built, train)
        print(f"{method:<11}{name:<14}{'memory':<18}{memory:5.2f} experts", file=sys.stderr)
        report[name] = {part: ratio(times[name][part], times["baseline"][part]) for part in times[name]}
        for part, (median, low, high) in report[name].items():
            print(f"{method:<11}{name:<14}{part:<18}{median:5.2f}x  [{low:.2f}, {high:.2f}]", file=sys.stderr)
    return report


@contextmanager
def trainable(built: Built, train: str | None) -> Iterator[tuple[Callable[[], Tensor], list[nn.Parameter]]]:
    """The loss of the batch and the parameters to train: of the first expert (``None``), or of the mixture of all."""
    if train is None:
        with attached(built.backbone, built.settings, built.pool[0].tensors) as site:
            yield lambda: built.backbone.loss(built.inputs).mean(), list(site.parameters.values())
        return
    mixture, config = build_mixture(built.pool, train=train, initial=dict(built.initial))
    with running(built.backbone, mixture, config) as model:
        yield lambda: model(**built.inputs).mean(), [p for p in model.parameters() if p.requires_grad]


def timed(built: Built, train: str | None) -> dict[str, float]:
    """:func:`step_seconds` of an expert or a mixture; attaching is not timed."""
    with trainable(built, train) as (loss, parameters):
        return step_seconds(loss, parameters, built.backbone.device.type)


def step_seconds(
    loss: Callable[[], Tensor], parameters: Iterable[nn.Parameter], device: str = "cpu"
) -> dict[str, float]:
    """Seconds of one forward+backward and of one whole step (with AdamW), after a warm-up step."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    elapsed = {}
    for _ in range(2):
        synchronize(device)
        start = time.perf_counter()
        loss().backward()  # type: ignore[no-untyped-call]
        synchronize(device)
        elapsed["forward+backward"] = time.perf_counter() - start
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        elapsed["whole step"] = time.perf_counter() - start
    return elapsed


def held(built: Built, train: str) -> float:
    """What belongs to a mixture after one step, in units of one expert's tensors."""
    mixture, config = build_mixture(built.pool, train=train, initial=dict(built.initial))
    with running(built.backbone, mixture, config) as model:
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        model(**built.inputs).mean().backward()
        optimizer.step()
        state = [t for values in optimizer.state.values() for t in values.values() if isinstance(t, Tensor)]
        gradients = [p.grad for p in parameters if p.grad is not None]
        return _bytes([*mixture.parameters(), *mixture.buffers(), *gradients, *state]) / _bytes(built.initial.values())


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


if __name__ == "__main__":
    main()
