"""From files in OFA's layout to figures, with a tiny OFA on the CPU: does the loss fall, and does the metric beat chance?

    python scripts/build_paper_formats.py ../shared/data /tmp/formats
    python benchmarks/paper_formats.py --data /tmp/formats --work /tmp/formats-run

A model of two million parameters is trained from nothing on the rows in ``pretrain/`` (all of its parameters; kept in the
work folder), so that it can see; it is then frozen. Everything after that goes through the command line: an expert for
each task on the rows in ``target/``, and the evaluation of the bare model and of the expert on rows that neither has seen.

Chance is what can be had without looking at the picture: the best box of all training boxes and the mean box of each
expression; the most frequent answer; one half.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from pituning.backbones.ofa import OFABackbone, OFAConfig, OFAForConditionalGeneration, OFAProcessor
from pituning.example import Box, Example
from pituning.metrics.boxes import intersection_over_union
from pituning.tasks import Task, load_task

TASKS = ("refcoco", "vqa", "snli_ve", "snli_ve-premise")
SIDE, BINS, PIECES = 96, 40, 600
SIZES: dict[str, Any] = {
    "d_model": 128, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 512, "decoder_ffn_dim": 512, "resnet_layers": [1, 1, 1], "resnet_stem_width": 32,
    "resnet_widths": [16, 32, 64], "max_source_positions": 256, "max_target_positions": 256, "token_bucket_size": 128,
    "image_bucket_size": 12, "code_image_size": 32,
}  # fmt: skip
TESTS = {"refcoco": ("testA", "testB"), "vqa": ("test",), "snli_ve": ("test",), "snli_ve-premise": ("test",)}
SETTINGS = ["--method", "bottleneck", "--learning-rate", "1e-3", "--epochs", "6"]


def build_model(texts: Sequence[str]) -> tuple[OFAForConditionalGeneration, OFAProcessor]:
    """A tiny OFA whose BPE pieces come from the texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=PIECES, initial_alphabet=alphabet, show_progress=False)
    )
    content = json.loads(bpe.to_str())["model"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in content["merges"]]
    pieces = sorted(content["vocab"], key=content["vocab"].get)
    symbols = ["<s>", "<pad>", "</s>", "<unk>", *pieces, "<mask>", *(f"<bin_{n}>" for n in range(BINS))]
    processor = OFAProcessor.from_symbols(symbols, merges, image_size=SIDE, max_image_size=SIDE)
    torch.manual_seed(0)
    return OFAForConditionalGeneration(OFAConfig(vocab_size=len(symbols), **SIZES)), processor


def pretrain(data: Path, folder: Path, steps: int) -> None:
    """Train all parameters on the pretraining rows of every task, and write a folder that ``load_backbone`` reads."""
    tasks = [load_task(name, data=data) for name in TASKS]
    model, processor = build_model(
        [t for task in tasks for e in task.split("train") for t in (e.prompt, f" {e.target}")]
    )
    backbone = OFABackbone("tiny", model, processor)
    model.requires_grad_(True)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.05)
    print(
        f"{sum(p.numel() for p in weights) / 1e6:.2f}M parameters, {len(processor.tokenizer.bpe.get_vocab())} symbols",
        flush=True,
    )
    shares = {"refcoco": 24, "vqa": 8, "snli_ve": 6, "snli_ve-premise": 6}  # of a step's examples
    streams = [(shares[task.name], _shuffled(task)) for task in tasks]
    seen, start = defaultdict(list), time.perf_counter()
    for step in range(1, steps + 1):
        examples = [next(stream) for share, stream in streams for _ in range(share)]
        model.train()
        losses = backbone.loss(backbone.collate(examples))
        optimizer.zero_grad()
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        for example, loss in zip(examples, losses.tolist(), strict=True):
            seen[example.id.split("/")[0]].append(loss)
        if step % 100 == 0:
            shown = "  ".join(f"{name} {sum(ls) / len(ls):.3f}" for name, ls in seen.items())
            print(f"step {step}/{steps}  {time.perf_counter() - start:.0f} s  {shown}", flush=True)
            seen.clear()
    model.eval().save_pretrained(folder.with_suffix(".partial"))
    processor.save_pretrained(folder.with_suffix(".partial"))
    folder.with_suffix(".partial").rename(folder)


def _shuffled(task: Task) -> Iterator[Example]:
    examples, rng = task.split("train"), random.Random(task.name)
    while True:
        order = list(range(len(examples)))
        rng.shuffle(order)
        yield from (examples[i] for i in order)


def pituning(*arguments: object) -> Any:
    """Run a command and return its document."""
    command = [sys.executable, "-c", "from pituning.cli import main; main()", *map(str, arguments), "--json", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"pituning {' '.join(map(str, arguments))}: {done.stderr}")
    return json.loads(done.stdout)


def chance(task: Task, split: str) -> float:
    """What can be had without looking at the picture."""
    train, test = task.split("train"), task.split(split)
    if task.name == "refcoco":
        boxes: dict[str, list[Box]] = defaultdict(list)
        for example in train:
            if example.box is not None:
                boxes[example.texts[0]].append(example.box)
        means = {text: tuple(sum(c) / len(c) for c in zip(*found, strict=True)) for text, found in boxes.items()}
        every = [box for found in boxes.values() for box in found][:300]
        hit = [
            e.box is not None and intersection_over_union(means.get(e.texts[0], (0, 0, 0, 0)), e.box) >= 0.5
            for e in test
        ]  # type: ignore[arg-type]
        constant = max(sum(intersection_over_union(b, e.box) >= 0.5 for e in test if e.box) for b in every)
        return max(sum(hit), constant) / len(test)
    answer = Counter(e.target for e in train).most_common(1)[0][0]
    return max(sum(e.target == answer for e in test) / len(test), 0.5 if task.name.startswith("snli") else 0.0)


def interval(value: float, count: int) -> float:
    """Half of a 95 % interval of a share of so many."""
    return 1.96 * math.sqrt(value * (1 - value) / count)


def measure(data: Path, work: Path) -> list[dict[str, Any]]:
    rows = []
    where = ["--backbone", work / "tiny-ofa", "--pool", work / "experts", "--data", data]
    for name in TASKS:
        start = time.perf_counter()
        logs = work / "logs" / name
        trained = pituning("train", name, *where, *SETTINGS, "--log-dir", logs)
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
                "chance": chance(task, split), "bare": bare["metrics"][metric], "expert": found["metrics"][metric],
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
    parser.add_argument("--steps", type=int, default=2500, help="of pretraining (default 2500)")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    arguments.work.mkdir(parents=True, exist_ok=True)
    if not (arguments.work / "tiny-ofa").is_dir():
        pretrain(arguments.data / "pretrain", arguments.work / "tiny-ofa", arguments.steps)
    rows = measure(arguments.data / "target", arguments.work)
    (arguments.work / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(
        f"\n{'task':<17}{'split':<7}{'n':>5} {'metric':<13}{'chance':>7}{'bare':>7}{'expert':>7}{'±':>6}"
        "   log-loss bare → expert"
    )
    for r in rows:
        figures = "".join(f"{100 * r[k]:>7.1f}" for k in ("chance", "bare", "expert")) + f"{100 * r['±']:>6.1f}"
        losses = f"{r['log-loss, bare']:.3f} → {r['log-loss, expert']:.3f}"
        print(f"{r['task']:<17}{r['split']:<7}{r['examples']:>5} {r['metric']:<13}{figures}   {losses}")


if __name__ == "__main__":
    main()
