"""The exact Fisher diagonal against plain forward+backward over the same batches, and against the one-example loop.

Run: python benchmarks/speed/fisher.py [--examples 128] [--batch 32] [--tokens 32] [--hidden 384] [--layers 6] [--repeats 10]
[--threads 2] [--device cpu]

The backbone has MiniLM-L6's shape with random weights (6 layers, hidden 384, heads of 32, FFN 1536) unless told otherwise;
experts are LoRA r = 8 on query and value, and bottleneck r = 64. In every repeat the three cases run once, in a shuffled order,
on the same examples; the table shows the median of the ratios of the same repeat and its 95 % bootstrap interval. Memory is
the peak of a process of its own, above what it held when the model was built: on the CPU sampled every millisecond, on a GPU
that of its tensors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not __package__:  # run by its path
    sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.speed.measuring import interleaved, peak_above_now, ratio, seconds
from benchmarks.speed.models import minilm_shaped, random_expert
from pituning.backbones.encoder import EncoderBackbone
from pituning.example import Example
from pituning.experts import Expert
from pituning.methods import attached, config_dict, initial_tensors, make_config
from pituning.similarity.fisher import fisher_diagonal

CASES = ("fisher", "plain", "loop")


class Backbone(EncoderBackbone):
    """Examples are random token ids, so that no tokenizer takes part."""

    def __init__(self, tokens: int, hidden: int, layers: int, device: str) -> None:
        super().__init__("MiniLM-shaped", minilm_shaped(hidden, layers), tokenizer=None, device=device)
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
    made = [Example(str(n), (), "", "ab"[n % 2], ("a", "b")) for n in range(arguments.examples)]
    return backbone, random_expert(initial_tensors(backbone, config), config, 1), made


def run(case: str, backbone: Backbone, expert: Expert, examples: list[Example], batch: int) -> dict[str, Tensor]:
    """One pass over the examples; the two that are Fisher diagonals give the same."""
    if case == "fisher":
        return fisher_diagonal(backbone, expert, examples, batch_size=batch).mean()
    found: dict[str, Tensor] = {}
    with attached(backbone, expert.config, expert.tensors) as site:
        step = batch if case == "plain" else 1
        for start in range(0, len(examples), step):
            losses = backbone.loss(backbone.collate(examples[start : start + step]))
            losses.sum().backward()  # type: ignore[no-untyped-call]
            for key, parameter in site.parameters.items():
                if case == "loop" and parameter.grad is not None:
                    square = parameter.grad.double() ** 2 / len(examples)
                    found[key] = found[key] + square if key in found else square
                parameter.grad = None
    return found


def largest_error(backbone: Backbone, expert: Expert, examples: list[Example], batch: int) -> float:
    """The largest relative error of a tensor's diagonal against the one-example loop."""
    fisher = run("fisher", backbone, expert, examples, batch)
    loop = run("loop", backbone, expert, examples, batch)
    return max(float((fisher[k] - loop[k]).norm() / loop[k].norm()) for k in loop)


def timings(
    backbone: Backbone, expert: Expert, examples: list[Example], batch: int, repeats: int
) -> dict[str, list[float]]:
    """Seconds of every case, repeat by repeat."""
    device = backbone.device.type
    cases = {c: partial(seconds, partial(run, c, backbone, expert, examples, batch), device) for c in CASES}
    return interleaved(cases, repeats)


def measure(method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    built = build(method, arguments)
    error = largest_error(*built, arguments.batch)
    times = timings(*built, arguments.batch, arguments.repeats)
    memory = {case: peak(method, case, arguments) for case in ("plain", "fisher")}
    return {
        "seconds": {case: statistics.median(t) for case, t in times.items()},
        "fisher / plain": ratio(times["fisher"], times["plain"]),
        "loop / fisher": ratio(times["loop"], times["fisher"]),
        "largest relative error against the loop": error,
        "memory, MB": memory,
        "memory, fisher / plain": memory["fisher"] / memory["plain"],
    }


def peak(method: str, case: str, arguments: argparse.Namespace) -> float:
    """Megabytes that a case needs above the built model, in a process of its own."""
    command = [sys.executable, __file__, "--only", f"{method}:{case}"]
    for name in ("examples", "batch", "tokens", "hidden", "layers", "threads", "device"):
        command += [f"--{name}", str(getattr(arguments, name))]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])


def main() -> None:
    """Measure and print a table on standard error and JSON on standard output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"examples": 128, "batch": 32, "tokens": 32, "hidden": 384, "layers": 6, "repeats": 10, "threads": 2}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.only:
        method, case = arguments.only.split(":")
        built = build(method, arguments)
        print(peak_above_now(lambda: run(case, *built, arguments.batch), arguments.device))
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
