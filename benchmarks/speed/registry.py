"""What is measured: names, units, bars, and the function behind each. Nothing heavy is imported here."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from benchmarks.speed.reference import PROBE_OF_REFERENCE, SHOWN, Case, case_name, recorded
from pituning.errors import unknown_name

Sign = Literal["≤", "<", "≥", ">"]
_HOLDS: Mapping[Sign, Callable[[float, float], bool]] = {
    "≤": operator.le,
    "<": operator.lt,
    "≥": operator.ge,
    ">": operator.gt,
}
BOTH, CPU, GPU = ("cpu", "cuda"), ("cpu",), ("cuda",)


@dataclass(frozen=True)
class Bar:
    """What a figure must hold.

    >>> Bar("≤", 1.3).met(1.3), Bar("<", 1.0).met(1.0)
    (True, False)
    """

    sign: Sign
    limit: float

    def met(self, value: float) -> bool:
        """Whether the value, unrounded, is on the right side; NaN never is."""
        return _HOLDS[self.sign](value, self.limit)


@dataclass(frozen=True)
class Figure:
    """One number of a measurement.

    Attributes:
        unit: empty for shares and errors; ``×`` for ratios.
        recorded: what the repository says of it from before, or of the reference implementation.
    """

    name: str
    unit: str
    bar: Bar | None = None
    recorded: str = ""


@dataclass(frozen=True)
class Measurement:
    """A function that returns a sample for each figure.

    Attributes:
        about: what it measures, with its shapes.
        function: ``"module:name"`` in this package, :class:`benchmarks.speed.measuring.Setting` → samples by figure.
        devices: what it can be measured on; what does not use a GPU is measured on the CPU alone.
        source: where the recorded figures are from, in Markdown.
    """

    name: str
    about: str
    function: str
    figures: tuple[Figure, ...]
    devices: tuple[str, ...] = CPU
    source: str = ""

    def figure(self, name: str) -> Figure | None:
        """The figure of a name."""
        return next((f for f in self.figures if f.name == name), None)


def measurement(name: str) -> Measurement:
    """The measurement of a name.

    Raises:
        UnknownNameError: with the nearest names that there are.
    """
    for found in MEASUREMENTS:
        if found.name == name:
            return found
    raise unknown_name("measurement", name, [m.name for m in MEASUREMENTS])


def _diagonal(rows: Mapping[str, tuple[str, str, str, str]]) -> tuple[Figure, ...]:
    """Time, memory, speed-up over the loop and error, by method; with what was recorded."""
    return tuple(
        figure
        for method, (time, memory, loop, error) in rows.items()
        for figure in (
            Figure(f"{method}, time / plain passes", "×", Bar("≤", 1.3), time),
            Figure(f"{method}, memory / plain passes", "×", Bar("≤", 1.5), memory),
            Figure(f"{method}, loop / Fisher", "×", Bar("≥", 5), loop),
            Figure(f"{method}, relative error", "", Bar("≤", 1e-5), error),
        )
    )


def _bar_against_reference(case: Case) -> Bar | None:
    """Training one expert at the reference's speed, searching at one and a half times it."""
    mode, _, experts, _ = case
    if mode == "beam":
        return Bar("≤", 0.667)
    return Bar("≤", 1) if mode == "train" and experts == 1 else None


def _reference() -> tuple[Figure, ...]:
    figures = []
    for size in ("tiny", "base"):
        for case in SHOWN:
            name, (seconds, peak) = case_name(size, case), recorded(size, case)
            recorded_time = f"{seconds:.3f} s, probe {PROBE_OF_REFERENCE} s"
            figures += [
                Figure(f"{name}, time / reference", "×", _bar_against_reference(case), recorded_time),
                Figure(f"{name}, peak", "MB", recorded=f"{peak} MB"),
            ]
    return tuple(figures)


def _more_of_ofa(size: str, method: str) -> Iterator[Figure]:
    """Eight experts of OFA against one; recorded is the reference's."""
    (one, peak), (many, higher) = (recorded(size, ("train", method, experts, 2)) for experts in (1, 8))
    yield Figure(f"{size} {method}, K=8 / K=1", "×", Bar("≤", 1.25), f"{many / one:.2f}")
    yield Figure(f"{size} {method}, K=8, growth", "MB", recorded=f"{higher - peak:,}")
    yield Figure(f"{size} {method}, K=8, growth / parameters and gradients", "×", Bar("≤", 1.2))


def _many(method: str) -> Iterator[Figure]:
    """Eight and sixteen experts against one."""
    before = {"LoRA": ("1.15", "1.11"), "bottleneck": ("1.07", "1.09")}[method]
    both_ways = "forward and backward / one expert"
    yield Figure(f"{method}, K=8, shared, {both_ways}", "×", Bar("≤", 1.25))
    yield Figure(f"{method}, K=8, shared, whole step / one expert", "×", Bar("≤", 1.15))
    yield Figure(f"{method}, K=8, π, whole step / one expert", "×")
    for kind, median in zip(("shared", "weights"), before, strict=True):
        yield Figure(f"{method}, K=16, {kind}, {both_ways}", "×", Bar("≤", 1.25), median)
    for kind in ("shared", "weights"):
        yield Figure(f"{method}, K=16, {kind}, held / K + 4 experts", "×", Bar("≤", 1.1))


_BENCHMARKS = "[benchmarks.md](benchmarks.md)"

MEASUREMENTS: tuple[Measurement, ...] = (
    Measurement(
        "step",
        "Training step: forward, backward and AdamW. MiniLM's shape with random weights, 16 × 32 tokens, LoRA r = 8 on query "
        "and value, bottleneck r = 64. *PEFT LoRA* is PEFT alone with the loss written out; *π* is k = 3 with weights and "
        "experts trained (the paper's way), *shared* k = 3 frozen with one trained change",
        "steps:steps",
        (
            Figure("PEFT LoRA, seconds", "s"),
            Figure("LoRA, seconds", "s"),
            Figure("bottleneck, seconds", "s"),
            Figure("LoRA / PEFT LoRA", "×"),
            Figure("LoRA, π / one expert", "×", recorded="1.16 [1.14, 1.17]"),
            Figure("LoRA, shared / one expert", "×", recorded="1.15 [1.11, 1.17]"),
            Figure("bottleneck, π / one expert", "×", recorded="1.33 [1.27, 1.37]"),
            Figure("bottleneck, shared / one expert", "×", recorded="1.07 [1.05, 1.08]"),
        ),
        BOTH,
        f"K = 16, one thread, the other core busy: {_BENCHMARKS}",
    ),
    Measurement(
        "many-experts",
        "The same of eight and of sixteen experts against one. *Shared* is K frozen experts with one trained change, *weights* "
        "K frozen experts with trained weights, *π* all trained. *Held* is what belongs to the experts after a step, gradients "
        "and AdamW's state included, over K + 4 experts: K frozen, and one that is trained with its gradient and two moments",
        "steps:many",
        tuple(figure for method in ("LoRA", "bottleneck") for figure in _many(method)),
        BOTH,
        f"K = 16, forward and backward, one thread, the other core busy: {_BENCHMARKS}",
    ),
    Measurement(
        "step-memory",
        "Peak memory of a process that takes three such steps, libraries included; on a GPU that of the tensors",
        "steps:memory",
        (
            *(Figure(f"{name}, peak", "MB") for name in ("PEFT LoRA", "LoRA", "bottleneck")),
            *(Figure(f"{m}, {kind}, peak", "MB") for m in ("LoRA", "bottleneck") for kind in ("π", "shared")),
            *(Figure(f"{m}, {kind} / one expert", "×") for m in ("LoRA", "bottleneck") for kind in ("π", "shared")),
        ),
        BOTH,
    ),
    Measurement(
        "lengths",
        "Forward and backward of 16 texts of 1 to 128 tokens (log-normal, median 20, σ 0.7; other texts in every repetition), "
        "padded to the longest, and in parts of similar length as training on a CPU computes them. MiniLM's shape, LoRA; "
        "*padding* is its share of all rows",
        "steps:lengths",
        (
            Figure("padded to the longest, seconds", "s"),
            Figure("in parts, seconds", "s"),
            Figure("padded to the longest / in parts", "×"),
            Figure("padding, to the longest", ""),
            Figure("padding, in parts", ""),
        ),
    ),
    Measurement(
        "fisher",
        "The exact Fisher diagonal of 128 examples against plain forward and backward passes over the same batches of "
        "32 × 32 tokens, and against the one-example loop. MiniLM's shape; memory is what a process grows by",
        "diagonals:usual",
        _diagonal(
            {
                "LoRA": ("1.15 [1.00, 1.49]", "1.03", "1.99 [1.82, 2.04]", "1.3e-7"),
                "bottleneck": ("1.14 [1.13, 1.60]", "1.20", "2.06 [1.56, 2.23]", "6.1e-8"),
            }
        ),
        BOTH,
        f"64 examples, one thread, a busy machine: {_BENCHMARKS}",
    ),
    Measurement(
        "fisher-short",
        "The same in batches of 32 × 12 tokens, about as many as the sentences of cola (11 on average) and the questions of "
        "trec6 (14) have",
        "diagonals:short",
        _diagonal({"LoRA": ("",) * 4, "bottleneck": ("",) * 4}),
        BOTH,
    ),
    Measurement(
        "fisher-small",
        "The same of 64 examples on four layers of width 128, batches of 32 × 16 tokens: here what a pass costs besides its "
        "arithmetic counts",
        "diagonals:small",
        _diagonal(
            {
                "LoRA": ("1.24 [1.19, 1.42]", "0.93", "5.07 [4.73, 5.64]", ""),
                "bottleneck": ("1.50 [1.44, 1.55]", "1.66", "4.73 [4.55, 4.97]", ""),
            }
        ),
        BOTH,
        f"One thread: {_BENCHMARKS}",
    ),
    Measurement(
        "generation",
        "Tokens per second of the bare backbone, of one expert on it, and of three experts collapsed into one of the same "
        "shape. OFA-tiny: beam 5, 2 pictures of 256 pixels, 17 tokens each, bottleneck r = 128, this project's search. "
        "T5-small's and an eight-layer Llama's shape (width 512): greedy, 4 × 32 tokens, LoRA r = 8, transformers' `generate`. "
        "Random weights",
        "generation:generation",
        tuple(
            figure
            for name in ("OFA", "T5", "Llama")
            for figure in (
                *(Figure(f"{name}, {case}", "tokens/s") for case in ("bare", "one expert", "collapsed")),
                Figure(f"{name}, collapsed / one expert", "×"),
            )
        ),
        BOTH,
    ),
    Measurement(
        "collapse",
        "Four LoRA experts of rank 16 on 28 modules of 2048 × 2048, folded into one: exactly (rank 64), and to rank 16. "
        "Errors are relative, of one dense ΔW",
        "merging:collapsing",
        (
            Figure("exactly, seconds", "s"),
            Figure("exactly, relative error", "", Bar("≤", 1e-5)),
            Figure("to one expert's rank, seconds", "s", Bar("<", 2), "0.15 s"),
            Figure("to one expert's rank, |reported − true error|", ""),
        ),
        source=f"One thread: {_BENCHMARKS}",
    ),
    Measurement(
        "merge-against-peft",
        "The same merges on 2 of these modules by `collapse` and by PEFT's `add_weighted_adapter`: `cat`, which is exact, and "
        "`svd`, which does not say how far off it is",
        "merging:against_peft",
        tuple(
            figure
            for name, ratio in (("exactly", ""), ("to one expert's rank", "47 s / 0.15 s = 313"))
            for figure in (
                Figure(f"{name}, ours, seconds", "s"),
                Figure(f"{name}, PEFT, seconds", "s"),
                Figure(f"{name}, PEFT / ours", "×", recorded=ratio),
            )
        ),
        source=f"All 28 modules, one thread: {_BENCHMARKS}",
    ),
    Measurement(
        "search",
        "`pool search` among 10,000 synthetic experts with cards and embeddings of 24 tensors × 256 values; the whole search "
        "compares the best 100 exactly",
        "stores:search",
        (
            Figure("experts", ""),
            Figure("index, from nothing", "s", recorded="73 s"),
            Figure("index, loaded", "s", recorded="1.9 s"),
            Figure("index, after ten changes", "s", recorded="4.4 s"),
            Figure("cards and compact embeddings", "ms", Bar("<", 100), "30 ms"),
            Figure("whole search", "ms", Bar("<", 100), "76 ms"),
            Figure("whole search, 95th percentile", "ms", recorded="105 ms"),
            Figure("of the ten nearest, found", "", recorded="1"),
        ),
        source="One thread: [graph.md](graph.md)",
    ),
    Measurement(
        "tsv",
        "A TSV like RefCOCO's, 40 kB of base64 a row: indexed, opened in a fresh process, and read by row. How fast depends on "
        "whether it fits into memory: see its size, and `--tsv-gigabytes`",
        "stores:tsv",
        (
            Figure("size", "GB", recorded="20 GB"),
            Figure("plain reading", "MB/s", recorded="751 MB/s"),
            Figure("indexing", "MB/s", Bar("≥", 300), "479 MB/s"),
            Figure("opening", "s", Bar("<", 1), "0.005 s"),
            Figure("opening, peak", "MB", Bar("<", 300), "31 MB"),
            Figure("1,000 rows read, peak", "MB", recorded="50 MB"),
            Figure("text of random rows, not cached", "rows/s", Bar("≥", 2000), "5,258 rows/s"),
            Figure("text of random rows, after one reading", "rows/s", Bar("≥", 2000), "9,830 rows/s"),
            Figure("text and picture of random rows, not cached", "rows/s", recorded="1,555 rows/s"),
            Figure("text and picture of random rows, after one reading", "rows/s", recorded="3,600 rows/s"),
        ),
        source=f"{_BENCHMARKS}",
    ),
    Measurement(
        "scenes",
        "Emoji scenes of the full vocabulary, composed and rendered at 96 pixels by one process on one core",
        "stores:scenes",
        (Figure("scenes per second", "scenes/s", Bar("≥", 300)),),
    ),
    Measurement(
        "startup",
        "Wall time of a whole process, from its start to its end",
        "startup:startup",
        (
            Figure("bare Python", "s"),
            Figure("import pituning", "s", Bar("<", 0.3)),
            Figure("import torch", "s"),
            Figure("pituning --help", "s"),
        ),
    ),
    Measurement(
        "demo",
        "`pituning demo` in an empty folder, once; only with `--demo`",
        "startup:demo",
        (
            Figure("pituning demo --fast", "s", Bar("<", 120)),
            Figure("pituning demo", "s", Bar("<", 480)),
        ),
    ),
    Measurement(
        "ofa-reference",
        "OFA against the original code, recorded on another machine: pictures of 256 pixels, float32, 2 threads whatever "
        "`--threads` says, forward and backward with dropout, no optimizer. Times compare in units of a fixed probe that ran "
        "beside both; below 1 is faster than the original",
        "ofa:against_reference",
        _reference(),
        source=f"The original's, and all cases: {_BENCHMARKS}",
    ),
    Measurement(
        "ofa-experts",
        "Eight experts of OFA against one at the shapes of `ofa-reference`, all trained: forward and backward in turn in one "
        "process, and by how much the peak of a process grows, also over parameters and gradients of the seven more",
        "ofa:more_experts",
        tuple(f for size in ("tiny", "base") for method in ("adapter", "lora") for f in _more_of_ofa(size, method)),
        source=f"The original's, on its machine: {_BENCHMARKS}",
    ),
    Measurement(
        "matmul",
        "What the processor gives at best: square float32 matrix products, 2048 wide (8192 on a GPU)",
        "gpu:matmul",
        (Figure("float32", "TFLOP/s"),),
        BOTH,
    ),
    Measurement(
        "bf16",
        "Whole training steps under bfloat16 autocast against float32: BERT-base's shape, 64 × 128 tokens, LoRA, one expert "
        "and π with k = 3",
        "gpu:bf16",
        (
            Figure("one expert, bf16, seconds", "s"),
            Figure("π, bf16, seconds", "s"),
            Figure("one expert, float32 / bf16", "×"),
            Figure("π, float32 / bf16", "×"),
        ),
        GPU,
    ),
    Measurement(
        "compile",
        "The same step of one expert in bfloat16, with `torch.compile` and without",
        "gpu:compiled",
        (
            Figure("eager, seconds", "s"),
            Figure("compiled, seconds", "s"),
            Figure("eager / compiled", "×"),
            Figure("first two steps, with compiling", "s"),
        ),
        GPU,
    ),
    Measurement(
        "ofa-large",
        "OFA-large's shape at 480 pixels, bfloat16, 16 pictures, bottleneck r = 128: forward and backward of one expert and of "
        "π with k = 3. Operations are those of matrix products, convolutions and attention as PyTorch counts them; the "
        "ceiling is a bfloat16 matrix product of 8192 × 8192 in the same process",
        "gpu:ofa_large",
        (
            Figure("ceiling", "TFLOP/s"),
            *(
                figure
                for case in ("one expert", "π")
                for figure in (
                    Figure(f"{case}, pictures", "pictures/s"),
                    Figure(f"{case}, achieved", "TFLOP/s"),
                    Figure(f"{case}, achieved / ceiling", ""),
                    Figure(f"{case}, peak", "MB"),
                )
            ),
            Figure("beam search, collapsed", "pictures/s"),
        ),
        GPU,
    ),
)
