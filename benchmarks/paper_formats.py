"""From files in OFA's layout to figures, with a tiny OFA on the CPU: does the loss fall, and does the metric beat chance?

    python scripts/build_paper_formats.py ../shared/data /tmp/formats
    python benchmarks/paper_formats.py --data /tmp/formats --work /tmp/formats-run

A model of 1.6 million parameters is trained from nothing on the rows in ``pretrain-first/`` and ``pretrain/`` (all of its
parameters; kept in the work folder), so that it can see; it is then frozen. Everything after that goes through the command
line: an expert for each task on the rows in ``target/``, and the evaluation of the bare model and of the expert on rows that
neither has seen.

*Chance* is the most frequent answer, one half, or the better of the best training box and the mean box of each expression.
*Blind* is the best that the text alone gives away: the usual answer to each question, the usual box of each expression.
What a model scores above that, it has from the picture (with the premise: or from its words). ± is half of a 95 % interval.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from pituning.backbones.ofa import OFABackbone, OFAConfig, OFAForConditionalGeneration, OFAProcessor
from pituning.example import Box, Example
from pituning.experiments.pretraining import bpe_vocabulary, positions_like_contents
from pituning.metrics.boxes import intersection_over_union
from pituning.tasks import Task, load_task

TASKS = ("refcoco", "vqa", "snli_ve", "snli_ve-premise")
SIDE, BINS, PIECES = 64, 40, 600
PEAK = 4e-4  # learning rate; at 1e-3 a model this narrow learns the pictures more slowly
SIZES: dict[str, Any] = {
    "d_model": 128, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 512, "decoder_ffn_dim": 512, "resnet_layers": [1, 1, 1], "resnet_stem_width": 32,
    "resnet_widths": [16, 32, 64], "max_source_positions": 256, "max_target_positions": 256, "token_bucket_size": 128,
    "image_bucket_size": 12, "code_image_size": 32, "dropout": 0.0, "init_std": 0.06,
    "entangle_position_embedding": True,  # positions in the contents too, not in the attention scores alone
}  # fmt: skip
FIRST = {
    "snli_ve": 36,
    "snli_ve-premise": 12,
}  # examples of a step, from pretrain-first/: the first steps hold no others
FIRST_STEPS = 900
LATER = {"snli_ve": 10, "snli_ve-premise": 4}  # the same, in all other steps
SHARES = {"refcoco": 16, "vqa": 8, "snli_ve": 30, "snli_ve-premise": 10}  # from pretrain/
TESTS = {"refcoco": ("testA", "testB"), "vqa": ("test",), "snli_ve": ("test",), "snli_ve-premise": ("test",)}
SETTINGS = ["--method", "bottleneck", "--learning-rate", "1e-3"]
EPOCHS = {"refcoco": 3, "vqa": 3, "snli_ve": 6, "snli_ve-premise": 6}


def build_model(texts: Sequence[str]) -> tuple[OFAForConditionalGeneration, OFAProcessor]:
    """A tiny OFA whose BPE pieces come from the texts."""
    symbols, merges = bpe_vocabulary(texts, PIECES, BINS)
    processor = OFAProcessor.from_symbols(symbols, merges, image_size=SIDE, max_image_size=SIDE)
    torch.manual_seed(0)
    return OFAForConditionalGeneration(OFAConfig(vocab_size=len(symbols), **SIZES)), processor


def pretrain(data: Path, folder: Path, steps: int, names: Sequence[str]) -> None:
    """Train all parameters on the pretraining rows of every task, and write a folder that ``load_backbone`` reads.

    It begins with sentences that say no more than that there is a thing of some kind: of longer ones alone, a model that
    cannot see yet learns nothing in this time.
    """
    first = {name: load_task(name, data=data / "pretrain-first") for name in FIRST if name in names}
    tasks = {name: load_task(name, data=data / "pretrain") for name in names}
    model, processor = build_model(
        [t for task in tasks.values() for e in task.split("train") for t in (e.prompt, f" {e.target}")]
    )
    backbone = OFABackbone("tiny", model, processor)
    model.requires_grad_(True)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=PEAK, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    print(
        f"{sum(p.numel() for p in weights) / 1e6:.2f}M parameters, {len(processor.tokenizer.bpe.get_vocab())} symbols",
        flush=True,
    )
    simple = {f"{name}, first": _shuffled(task) for name, task in first.items()}
    full = {name: _shuffled(task) for name, task in tasks.items()}
    begin = _shares({f"{name}, first": FIRST[name] for name in first})
    later = _shares({**{f"{name}, first": LATER[name] for name in first}, **{name: SHARES[name] for name in names}})
    seen: dict[str, list[float]] = defaultdict(list)
    start = time.perf_counter()
    stem = model.get_encoder().embed_images
    with torch.no_grad():
        # statistics over all kinds of pictures: later batches hold one kind each, and must not move them
        for _ in range(40):
            examples = [next(stream) for stream in full.values() for _ in range(32 // len(full))]
            stem.train()(backbone.collate(examples)["patch_images"])
        positions_like_contents(model, backbone.collate(examples)["patch_images"])
    for step in range(1, steps + 1):
        model.train()
        stem.eval()
        optimizer.zero_grad()
        shares = begin if begin and step <= FIRST_STEPS else later
        for name, share in shares.items():  # one task at a time: texts of similar length need less padding
            examples = [next((simple | full)[name]) for _ in range(share)]
            losses = backbone.loss(backbone.collate(examples))
            (losses.sum() / sum(shares.values())).backward()
            seen[name] += losses.tolist()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            shown = "  ".join(f"{name} {sum(ls) / len(ls):.3f}" for name, ls in seen.items())
            print(f"step {step}/{steps}  {time.perf_counter() - start:.0f} s  {shown}", flush=True)
            seen.clear()
    model.eval().save_pretrained(folder.with_suffix(".partial"))
    processor.save_pretrained(folder.with_suffix(".partial"))
    folder.with_suffix(".partial").rename(folder)


def _shares(shares: dict[str, int]) -> dict[str, int]:
    """Examples of a step by stream, at least 48 in all."""
    factor = max(1.0, 48 / max(1, sum(shares.values())))
    return {name: round(factor * share) for name, share in shares.items()}


def _shuffled(task: Task) -> Iterator[Example]:
    examples, rng = task.split("train"), random.Random(task.name)
    while True:
        order = list(range(len(examples)))
        rng.shuffle(order)
        yield from (examples[i] for i in order)


def pituning(*arguments: object) -> Any:
    """Run a command and return its document."""
    command = [sys.executable, "-c", "from pituning.cli import main; main()", *map(str, arguments), "--json", "--quiet"]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **threads})
    if done.returncode:
        raise SystemExit(f"pituning {' '.join(map(str, arguments))}: {done.stderr}")
    return json.loads(done.stdout)


def chance(task: Task, split: str) -> float:
    """The most frequent answer of the training rows, or the better of their best box and the mean box of each expression."""
    train, test = task.split("train"), task.split(split)
    if task.name != "refcoco":
        answer = Counter(e.target for e in train).most_common(1)[0][0]
        return max(_right([answer] * len(test), test), 0.5 if task.name.startswith("snli") else 0.0)
    boxes = _boxes(train)
    mean = {text: tuple(sum(c) / len(c) for c in zip(*found, strict=True)) for text, found in boxes.items()}
    best = _best_box([box for found in boxes.values() for box in found][:1000])
    return max(_right([best] * len(test), test), _right([mean.get(e.texts[0], best) for e in test], test))


def blind(task: Task, split: str) -> float:
    """What the text alone gives away: the best answer, or box, of the training rows to each question or expression.

    Each of NLVR's sentences is in one file only, with as many pictures that it is true of as others: it gives nothing away.
    """
    train, test = task.split("train"), task.split(split)
    if task.name.startswith("snli"):
        return 0.5
    if task.name == "refcoco":
        boxes = _boxes(train)
        best: dict[str, Any] = {text: _best_box(found) for text, found in boxes.items()}
    else:
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for example in train:
            counts[example.texts[0]][example.target] += 1
        best = {text: found.most_common(1)[0][0] for text, found in counts.items()}
    return _right([best.get(e.texts[0]) for e in test], test)


def _boxes(examples: Sequence[Example]) -> dict[str, list[Box]]:
    boxes: dict[str, list[Box]] = defaultdict(list)
    for example in examples:
        if example.box is not None:
            boxes[example.texts[0]].append(example.box)
    return boxes


def _best_box(boxes: Sequence[Box]) -> Box:
    """The one that is right for most of the others, by Acc@0.5."""
    return max(boxes[:200], key=lambda b: sum(intersection_over_union(b, other) >= 0.5 for other in boxes))


def _right(answers: Sequence[Any], examples: Sequence[Example]) -> float:
    """Share of right answers."""
    right = [
        a == e.target if e.box is None else a is not None and intersection_over_union(a, e.box) >= 0.5
        for a, e in zip(answers, examples, strict=True)
    ]
    return sum(right) / len(right)


def interval(value: float, count: int) -> float:
    """Half of a 95 % interval of a share of so many."""
    return 1.96 * math.sqrt(value * (1 - value) / count)


def measure(data: Path, work: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    where = ["--backbone", work / "tiny-ofa", "--pool", work / "experts", "--data", data]
    for name in names:
        start = time.perf_counter()
        logs = work / "logs" / name
        trained = pituning("train", name, *where, *SETTINGS, "--epochs", EPOCHS[name], "--log-dir", logs)
        seconds = time.perf_counter() - start
        task = load_task(name, data=data)
        state = json.loads(
            sorted(logs.glob("checkpoint-*/trainer_state.json"), key=lambda p: int(p.parent.name[11:]))[-1].read_text()
        )
        curve = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
        for split in TESTS[name]:
            found = pituning("eval", name, trained["name"], *where, "--split", split)
            bare = pituning("eval", name, *where, "--split", split)
            metric = found["metric"]
            row = {
                "task": name, "split": split, "metric": metric, "examples": found["examples"],
                "training rows": len(task.split("train")), "steps": trained["training"]["steps_taken"],
                "training loss, first": curve[0], "training loss, last": curve[-1],
                "log-loss, bare": bare["metrics"]["log-loss"], "log-loss, expert": found["metrics"]["log-loss"],
                "chance": chance(task, split), "blind": blind(task, split),
                "bare": bare["metrics"][metric], "expert": found["metrics"][metric],
                "±": interval(found["metrics"][metric], found["examples"]), "seconds to train": round(seconds),
            }  # fmt: skip
            if name == "vqa":
                beam = pituning("eval", name, trained["name"], *where, "--split", split, "--by", "beam")
                row["expert, by beam"] = beam["metrics"][metric]
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="what scripts/build_paper_formats.py has written")
    parser.add_argument("--work", type=Path, required=True, help="for the model, the experts and the logs")
    parser.add_argument("--steps", type=int, default=5000, help="of pretraining (default 5000)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="what the model is trained for")
    parser.add_argument("--threads", type=int, default=2, help="of every process (default 2)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    if not (arguments.work / "tiny-ofa").is_dir():
        pretrain(arguments.data, arguments.work / "tiny-ofa", arguments.steps, arguments.tasks)
    rows = measure(arguments.data / "target", arguments.work, arguments.tasks)
    (arguments.work / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    heads = "".join(f"{head:>7}" for head in ("chance", "blind", "bare", "expert"))
    print(f"\n{'task':<17}{'split':<7}{'n':>5} {'metric':<13}{heads}{'±':>6}  beyond it?")
    for r in rows:
        figures = (
            "".join(f"{100 * r[k]:>7.1f}" for k in ("chance", "blind", "bare", "expert")) + f"{100 * r['±']:>6.1f}"
        )
        beyond = "yes" if r["expert"] - r["±"] > max(r["chance"], r["blind"]) else "no"
        print(f"{r['task']:<17}{r['split']:<7}{r['examples']:>5} {r['metric']:<13}{figures}  {beyond}")
        print(
            f"{'':<17}training loss {r['training loss, first']:.3f} → {r['training loss, last']:.3f}, "
            f"log-loss on the test rows, bare → expert: {r['log-loss, bare']:.3f} → {r['log-loss, expert']:.3f}"
        )


if __name__ == "__main__":
    main()
