"""The exact Fisher diagonal against plain forward+backward over the same batches, and against the one-example loop.

Run: python benchmarks/speed/fisher.py [--examples 128] [--batch 32] [--tokens 32] [--hidden 384] [--layers 6] [--repeats 10]
[--threads 2] [--device cpu]

The backbone has MiniLM-L6's shape with random weights (6 layers, hidden 384, heads of 32, FFN 1536) unless told otherwise;
experts are LoRA r = 8 on query and value, and bottleneck r = 64. In every repeat the three cases run once, in a shuffled order,
on the same examples; the table shows the median of the ratios of the same repeat and its 95 % bootstrap interval. Memory is
the peak of a process of its own, above what it held when the model was built, sampled every millisecond.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from pituning.backbones.encoder import EncoderBackbone
from pituning.example import Example
from pituning.experts import Expert, ExpertCard
from pituning.methods import attached, config_dict, initial_tensors, make_config
from pituning.similarity.fisher import fisher_diagonal

CASES = ("fisher", "plain", "loop")


class Backbone(EncoderBackbone):
    """Examples are random token ids, so that no tokenizer takes part."""

    def __init__(self, tokens: int, hidden: int, layers: int, device: str) -> None:
        torch.manual_seed(0)
        config = BertConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
            intermediate_size=4 * hidden,
            vocab_size=30522,
        )
        super().__init__("MiniLM-shaped", BertModel(config), tokenizer=None, device=device)
        self.tokens = tokens
        self.labels = torch.nn.functional.normalize(torch.randn(2, hidden), dim=1).to(device)

    def collate(self, examples: Any) -> dict[str, Any]:
        rows = [torch.randint(1000, 30000, (self.tokens,), generator=_seeded(e.id)) for e in examples]
        return {
            "input_ids": torch.stack(rows).to(self.device),
            "attention_mask": torch.ones(len(rows), self.tokens, dtype=torch.long, device=self.device),
            "label_embeddings": self.labels,
            "target": torch.tensor([e.label for e in examples], device=self.device),
        }


def _seeded(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(int(name))


def build(method: str, arguments: argparse.Namespace) -> tuple[Backbone, Expert, list[Example]]:
    backbone = Backbone(arguments.tokens, arguments.hidden, arguments.layers, arguments.device)
    config = config_dict(make_config(method, backbone))
    initial = initial_tensors(backbone, config)
    tensors = {k: t.cpu() + 0.01 * torch.randn(t.shape, generator=_seeded("1")) for k, t in initial.items()}
    made = [Example(str(n), (), "", "ab"[n % 2], ("a", "b")) for n in range(arguments.examples)]
    return backbone, Expert(tensors, config, ExpertCard(method)), made


def run(case: str, backbone: Backbone, expert: Expert, examples: list[Example], batch: int) -> dict[str, Tensor]:
    """One pass over the examples; the two that are Fisher diagonals give the same."""
    if case == "fisher":
        return fisher_diagonal(backbone, expert, examples, batch_size=batch).mean()
    found: dict[str, Tensor] = {}
    with attached(backbone, expert.config, expert.tensors) as site:
        step = batch if case == "plain" else 1
        for start in range(0, len(examples), step):
            losses = backbone.loss(backbone.collate(examples[start : start + step]))
            losses.sum().backward()
            for key, parameter in site.parameters.items():
                if case == "loop":
                    square = parameter.grad.double() ** 2 / len(examples)
                    found[key] = found[key] + square if key in found else square
                parameter.grad = None
    return found


def measure(method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    backbone, expert, examples = build(method, arguments)
    fisher = run("fisher", backbone, expert, examples, arguments.batch)
    loop = run("loop", backbone, expert, examples, arguments.batch)
    error = max(float((fisher[k] - loop[k]).norm() / loop[k].norm()) for k in loop)
    times: dict[str, list[float]] = {case: [] for case in CASES}
    order = list(CASES)
    for repeat in range(-1, arguments.repeats):
        random.Random(repeat).shuffle(order)
        for case in order:
            start = time.perf_counter()
            run(case, backbone, expert, examples, arguments.batch)
            if arguments.device != "cpu":
                torch.cuda.synchronize()
            if repeat >= 0:
                times[case].append(time.perf_counter() - start)
    memory = {case: _peak(method, case, arguments) for case in ("plain", "fisher")}
    return {
        "seconds": {case: statistics.median(t) for case, t in times.items()},
        "fisher / plain": _ratio(times["fisher"], times["plain"]),
        "loop / fisher": _ratio(times["loop"], times["fisher"]),
        "largest relative error against the loop": error,
        "memory, MB": memory,
        "memory, fisher / plain": memory["fisher"] / memory["plain"],
    }


def _peak(method: str, case: str, arguments: argparse.Namespace) -> float:
    command = [sys.executable, __file__, "--only", f"{method}:{case}"]
    for name in ("examples", "batch", "tokens", "hidden", "layers", "threads"):
        command += [f"--{name}", str(getattr(arguments, name))]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def _peak_above_now(work: Callable[[], Any]) -> float:
    """Megabytes by which the process grows at most."""
    process, done, peak = psutil.Process(), threading.Event(), 0
    before = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return (peak - before) / 2**20


def _ratio(left: list[float], right: list[float]) -> tuple[float, float, float]:
    ratios = np.array(left) / np.array(right)
    drawn = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return float(np.median(ratios)), float(low), float(high)


def main() -> None:
    """Measure and print a table on standard error and JSON on standard output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"examples": 128, "batch": 32, "tokens": 32, "hidden": 384, "layers": 6, "repeats": 10, "threads": 2}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu", help="memory is that of a process on the CPU in any case")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.only:
        method, case = arguments.only.split(":")
        built = build(method, arguments)
        print(_peak_above_now(lambda: run(case, *built, arguments.batch)))
        return
    results = {method: measure(method, arguments) for method in ("lora", "bottleneck")}
    for method, found in results.items():
        for name in ("fisher / plain", "loop / fisher"):
            median, low, high = found[name]
            print(f"{method:<11}{name:<16}{median:6.2f}x  [{low:.2f}, {high:.2f}]", file=sys.stderr)
        print(f"{method:<11}{'memory':<16}{found['memory, fisher / plain']:6.2f}x", file=sys.stderr)
    print(json.dumps({"shapes": vars(arguments), "torch": torch.__version__, "results": results}, indent=1))


if __name__ == "__main__":
    main()
