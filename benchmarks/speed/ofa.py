"""Speed and memory of OFA against the recorded figures of the reference implementation, same shapes and modes.

Run: python benchmarks/speed/ofa.py [--sizes tiny base] [--only adapter] [--repeats 5] [--probe PATH] [--json FILE]

Every case runs in a process of its own: 2 threads, float32, image 256×256, source 20 tokens, target 5, adapter r = 128,
LoRA r = 16 on q, k, v, out, prefix 100 + 100; training mode with dropout 0.1 and drop-path 0.2, forward and backward without
an optimizer step. "beam" with several experts runs the one that they collapse into, as a user would; the reference runs them
all. "fisher" is the cost of one batch more, per example and exact; the reference squares the gradient of the batch.

The reference's seconds (official code, CPU, 2 threads) and its machine's probe time are facts recorded beside it: absolute
times compare only in units of ``speed_probe.py``, which runs before and after each case (``--probe``).
``ratio`` is (ours / our probe) / (reference / its probe); below 1 is faster than the reference.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not __package__:  # run by its path
    sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.speed.measuring import NotApplicableError, Sample, Setting, in_process, interleaved, peak_mb, seconds
from benchmarks.speed.models import SMALL_OFA, random_experts
from benchmarks.speed.reference import PROBE_OF_REFERENCE, REFERENCE, SHOWN, Case, case_name, recorded
from pituning.backbones.base import Backbone, Batch
from pituning.backbones.loss import label_smoothed_nll
from pituning.backbones.ofa.configuration import OFAConfig
from pituning.backbones.ofa.generation import BeamSettings, beam_search
from pituning.backbones.ofa.modeling import OFAForConditionalGeneration
from pituning.example import Example
from pituning.experts import Expert, ExpertCard
from pituning.interpolation import build_mixture
from pituning.interpolation.collapse import collapse
from pituning.methods import attached, config_dict, make_config
from pituning.similarity.fisher import fisher_diagonal
from pituning.training.module import running

MORE_BATCHES = 4
THREADS = 2
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "adapter": ("bottleneck", {"r": 128, "dropout": "drop-path"}),
    "lora": ("lora", {"r": 16, "lora_alpha": 1}),
    "prefix": ("prefix", {"length": 100}),
}
MANY = 8
"""Experts, against one of them."""


class FixedBatch(Backbone):
    """OFA on one random batch of fixed shape, with the reference's loss."""

    family = "seq2seq"

    def __init__(
        self, model: OFAForConditionalGeneration, batch: int, side: int = 256, device: str = "cpu", words: int = 50000
    ) -> None:
        super().__init__("ofa", model, tokenizer=None, device=device)
        generator = torch.Generator().manual_seed(0)
        inputs = {
            "input_ids": torch.randint(4, words, (batch, 20), generator=generator),
            "patch_images": torch.randn(batch, 3, side, side, generator=generator),
        }
        self.inputs = {k: v.to(device) for k, v in inputs.items()}
        self.labels = torch.randint(4, words, (batch, 5), generator=generator).to(device)

    def adaptable(self, method: str) -> list[str]:
        """The places of the paper's code."""
        places = {"lora": ["q_proj", "k_proj", "v_proj", "out_proj"], "prefix": ["self_attn"]}
        return places.get(method, ["self_attn_output", "ffn_output"])

    def collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        """The rows of the batch that the examples' ids name."""
        return {"rows": [int(e.id) for e in examples]}

    def loss(self, batch: Batch, label_smoothing: float = 0.1) -> Tensor:
        """Label smoothing 0.1 whatever is asked for, per example: the reference's figures are with it."""
        rows = batch.get("rows", slice(None))
        labels = self.labels[rows]
        shifted = self.model.prepare_decoder_input_ids_from_labels(labels)
        logits = self.model(**{k: v[rows] for k, v in self.inputs.items()}, decoder_input_ids=shifted).logits
        return label_smoothed_nll(logits, labels, 0.1)

    def score(self, batch: Batch, choices: Sequence[str]) -> Tensor:
        """Not measured."""
        raise NotImplementedError


def child(size: str, mode: str, method: str, experts: int, batch: int, repeats: int) -> dict[str, Any]:
    """Measure one case in this process."""
    backbone = sized(size, batch)
    parameters = sum(p.numel() for p in backbone.model.parameters())
    if method == "full":
        backbone.model.requires_grad_(True)
        times = _repeat(_full_step(backbone, mode), repeats)
        return _result(times, parameters, parameters)
    pool = random_pool(backbone, method, experts)
    trained = sum(t.numel() for e in pool for t in e.tensors.values())
    if mode == "fisher":
        examples = [Example(str(i), ("",), "", "the labels of FixedBatch") for i in range(batch)]
        # what one batch more costs: putting the expert in place and looking at its layers happens once for a whole task
        few, many = (
            _repeat(partial(fisher_diagonal, backbone, pool[0], examples * n, batch_size=batch), repeats)
            for n in (1, 1 + MORE_BATCHES)
        )
        return _result([(m - f) / MORE_BATCHES for f, m in zip(few, many, strict=True)], parameters, trained)
    if mode == "beam":
        expert = collapse(*build_mixture(pool, train="experts"), ExpertCard("mixed")).expert
        pool.clear()
        with attached(backbone, expert.config, expert.tensors):
            return _result(_repeat(_full_step(backbone, mode), repeats), parameters, trained)
    with mixture_step(backbone, pool) as step:
        pool.clear()  # the mixture has copies of its own
        return _result(_repeat(step, repeats), parameters, trained)


def sized(size: str, batch: int, quick: bool = False) -> FixedBatch:
    """OFA of a published size with random weights and the reference's rates of drop-path; tiny in every way if ``quick``."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    rates = {"encoder_drop_path_rate": 0.2, "decoder_drop_path_rate": 0.2}
    config = OFAConfig(**SMALL_OFA, **rates) if quick else OFAConfig.of_size(size, **rates)
    side, words = (32, 500) if quick else (256, 50000)
    return FixedBatch(OFAForConditionalGeneration(config), batch, side, words=words)


def random_pool(backbone: FixedBatch, method: str, experts: int) -> list[Expert]:
    """Random experts of a method at the reference's sizes."""
    name, options = METHODS[method]
    config = config_dict(make_config(name, backbone, **options))
    return random_experts(backbone, config, experts)


@contextmanager
def mixture_step(backbone: FixedBatch, pool: Sequence[Expert]) -> Iterator[Callable[[], None]]:
    """One forward and backward of a mixture in whose training all its experts change."""
    with running(backbone, *build_mixture(pool, train="experts")) as model:
        backbone.model.train()
        model.train()

        def step() -> None:
            model.zero_grad()
            model().sum().backward()

        yield step


def _full_step(backbone: FixedBatch, mode: str) -> Callable[[], object]:
    if mode == "beam":
        settings = BeamSettings(beam=5, min_len=4, max_len_b=4)
        return lambda: beam_search(backbone.model, backbone.inputs, settings)
    backbone.model.train()

    def step() -> None:
        backbone.model.zero_grad()
        backbone.loss({}).sum().backward()  # type: ignore[no-untyped-call]

    return step


def _repeat(step: Callable[[], object], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return times[2:]


def _result(times: list[float], parameters: int, trained: int) -> dict[str, Any]:
    peak = round(peak_mb())
    return {
        "seconds": statistics.median(times),
        "peak_mb": peak,
        "parameters": parameters,
        "trained": trained,
        "times": times,
    }


def main() -> None:
    """Run every case in its own process and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["tiny", "base"])
    parser.add_argument("--only", nargs="*", default=[], help="words that a case's name must contain")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--probe", type=Path, default=Path("../shared/tools/speed_probe.py"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        size, mode, method, experts, batch = arguments.child
        print(json.dumps(child(size, mode, method, int(experts), int(batch), arguments.repeats)))
        return
    rows = []
    for size in arguments.sizes:
        for case in REFERENCE:
            name = case_name(size, case)
            if not all(word in name.split() for word in arguments.only):
                continue
            row = compared(size, case, arguments.repeats, arguments.probe)
            del row["times"]
            rows.append(row)
            print(
                f"{name:<34}{row['seconds']:7.3f} s (probe {row['probe_seconds']:.3f}) {row['peak_mb']:5d} MB   reference "
                f"{row['reference_seconds']:.3f} s {row['reference_peak_mb']:5d} MB   ratio {row['ratio']:.2f}",
                file=sys.stderr,
            )
    report = json.dumps({"torch": torch.__version__, "rows": rows}, indent=1)
    if arguments.json:
        arguments.json.write_text(report + "\n")
    print(report)


def against_reference(setting: Setting) -> dict[str, Sample]:
    """Time in units of the probe, against the reference's; and peak megabytes. Always 2 threads, as the reference had."""
    probe = Path(setting.probe)
    if not probe.is_file():
        raise NotApplicableError("the probe that stood beside the reference is not there; --probe says where it is")
    if (os.cpu_count() or 1) < THREADS:
        raise NotApplicableError(f"the reference had {THREADS} cores")
    samples = {}
    for size in setting.pick(("tiny", "base"), ("tiny",)):
        for case in setting.pick(SHOWN, SHOWN[:1]):
            row = compared(size, case, setting.pick(7, 1), probe)
            reference = row["reference_seconds"] / PROBE_OF_REFERENCE
            samples[f"{row['case']}, time / reference"] = Sample.of(
                [t / row["probe_seconds"] / reference for t in row["times"]]
            )
            samples[f"{row['case']}, peak"] = Sample.once(row["peak_mb"])
    return samples


def more_experts(setting: Setting) -> dict[str, Sample]:
    """Eight experts against one: seconds in turn in one process, and by how much the peak of a process grows."""
    samples = {}
    for size in setting.pick(("tiny", "base"), ("tiny",)):
        for method in ("adapter", "lora"):
            name = f"{size} {method}, K={MANY}"
            arguments = (size, method, setting.pick(20, 1), setting.quick)
            times = in_process("ofa:in_turn", *arguments, threads=THREADS)
            samples[f"{name} / K=1"] = Sample.ratio(times[str(MANY)], times["1"])
            (one, alone), (many, all_of_them) = (
                in_process("ofa:peak", size, method, experts, setting.quick, threads=THREADS) for experts in (1, MANY)
            )
            own = 2 * (all_of_them - alone)  # parameters and their gradients
            samples[f"{name}, growth"] = Sample.once(many - one)
            samples[f"{name}, growth / parameters and gradients"] = Sample.once((many - one) / own)
    return samples


def in_turn(size: str, method: str, repeats: int, quick: bool = False) -> dict[str, list[float]]:
    """Seconds of forward and backward with one expert and with :data:`MANY`, each after one that is not timed."""
    backbone = sized(size, batch=2, quick=quick)
    pool = random_pool(backbone, method, MANY)

    def timed(experts: int) -> float:
        with mixture_step(backbone, pool[:experts]) as step:
            step()
            return seconds(step)

    return interleaved({str(n): partial(timed, n) for n in (1, MANY)}, repeats)


def peak(size: str, method: str, experts: int, quick: bool = False) -> tuple[float, float]:
    """Peak megabytes of this process after three times forward and backward, and those of the experts' tensors."""
    backbone = sized(size, batch=2, quick=quick)
    pool = random_pool(backbone, method, experts)
    own = sum(t.numel() * t.element_size() for e in pool for t in e.tensors.values()) / 2**20
    with mixture_step(backbone, pool) as step:
        pool.clear()
        for _ in range(3):
            step()
    return peak_mb(), own


def compared(size: str, case: Case, repeats: int, probe: Path) -> dict[str, Any]:
    """One case in a process of its own, between two runs of the probe, beside the reference."""
    before = _probe(probe)
    command = [sys.executable, __file__, "--repeats", str(repeats), "--child", size, *map(str, case)]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    row = {"case": case_name(size, case), **json.loads(output.stdout.splitlines()[-1])}
    row["probe_seconds"] = statistics.mean((before, _probe(probe)))
    row["reference_seconds"], row["reference_peak_mb"] = recorded(size, case)
    row["ratio"] = row["seconds"] / row["probe_seconds"] / (row["reference_seconds"] / PROBE_OF_REFERENCE)
    return row


def _probe(path: Path) -> float:
    output = subprocess.run([sys.executable, path, "5"], stdout=subprocess.PIPE, text=True, check=True)
    return float(output.stdout.split()[1])


if __name__ == "__main__":
    main()
