"""From files in OFA's layout to figures, with a small OFA on the CPU: does the loss fall, and does the metric beat chance?

    python scripts/build_paper_formats.py ../shared/data /tmp/formats
    python benchmarks/paper_formats.py --data /tmp/formats --work /tmp/formats-run

For each kind of picture `ofa-nano`, which knows emoji scenes alone, is trained on (all of its parameters; kept in the work
folder) with the rows in ``pretrain*/``, and is then frozen. Everything after that goes through the command line: an expert
for each task on the rows in ``target/``, and the evaluation of the bare model and of the expert on rows that neither has seen.

*Chance* is the most frequent answer, one half, or the better of the best training box and the mean box of each expression.
*Blind* is the best that the text alone gives away: the usual answer to each question, the usual box of each expression.
What a model scores above that, it has from the picture (with the premise: or from its words). ± is half of a 95 % interval; of
SNLI-VE one over sentences.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pituning.backbones import load_backbone
from pituning.backbones.ofa import OFABackbone, OFAProcessor
from pituning.example import Box, Example
from pituning.metrics.boxes import intersection_over_union
from pituning.tasks import Task, load_task
from pituning.training.checkpoints import checkpoints
from pituning.training.precision import precision

TASKS = ("refcoco", "vqa", "snli_ve", "snli_ve-premise")
PEAK, WARM_UP = 6e-4, 30  # learning rate in each phase, after so many steps; from there it falls to 0 with the phase
SAVE_EVERY = 250  # steps
Phase = tuple[int, bool, dict[str, int]]
"""Steps; whether the decoder reads the question again; how many examples of each a step has, as FOLDER/TASK."""
CAPTIONS = "pretrain-things/caption"
PHASES: dict[str, tuple[Phase, ...]] = {
    "refcoco": ((300, False, {"pretrain/refcoco": 48}), (300, True, {"pretrain/refcoco": 48})),
    "vqa": ((200, False, {"pretrain/vqa": 48}), (200, True, {"pretrain/vqa": 48})),
    # First what towers look like, until that is told without a mistake, then one kind of statement after another: where all
    # kinds come at once, or before the model sees well, it learns none of them.
    "snli_ve": (
        (900, False, {"pretrain-things/snli_ve": 8, CAPTIONS: 40}),
        (300, True, {"pretrain-ends/snli_ve": 40, CAPTIONS: 8}),
        (250, True, {"pretrain-ends/snli_ve": 40, CAPTIONS: 8}),
        (250, True, {"pretrain-ends-counted/snli_ve": 36, "pretrain-ends/snli_ve": 8, CAPTIONS: 4}),
        (250, True, {"pretrain-heights/snli_ve": 34, "pretrain-ends-counted/snli_ve": 10, CAPTIONS: 4}),
        (300, True, {"pretrain-numbers/snli_ve": 44, CAPTIONS: 4}),
    ),
}
"""For each kind of picture, how a model learns to see it."""
SIDES = {"refcoco": 96, "vqa": 96, "snli_ve": 144}
"""The pictures' side; a token of them is 16 pixels wide, and a block of NLVR's at 96 pixels only 9."""
KINDS = {"snli_ve-premise": "snli_ve"}
"""The kind of picture of a task, if another task gives the name."""
TESTS = {"refcoco": ("testA", "testB"), "vqa": ("test",), "snli_ve": ("test",), "snli_ve-premise": ("test",)}
SETTINGS = ["--method", "bottleneck", "--learning-rate", "1e-3"]
EPOCHS = {"refcoco": 3, "vqa": 3, "snli_ve": 6, "snli_ve-premise": 6}


def pretrain(data: Path, folder: Path, phases: Sequence[Phase], side: int) -> None:
    """Train all parameters of `ofa-nano` on, phase after phase, and write a folder that ``load_backbone`` reads.

    A run that was broken off goes on from its last checkpoint, a file beside the folder.
    """
    nano = load_backbone("ofa-nano")
    sides = {"image_size": side, "max_image_size": side}
    processor = OFAProcessor(nano.processor.tokenizer, nano.processor.settings.model_copy(update=sides))
    backbone = OFABackbone("ofa-nano", nano.model, processor)
    model = backbone.model.requires_grad_(True)
    weights = [p for p in model.parameters() if p.requires_grad]
    plan = [(prompted, shares) for count, prompted, shares in phases for _ in range(count)]
    steps = len(plan)
    optimizer = torch.optim.AdamW(weights, lr=PEAK, weight_decay=0.01, betas=(0.9, 0.98))
    rates = [min((n + 1) / WARM_UP, (count - n) / count) for count, _, _ in phases for n in range(count)]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: rates[min(done, len(rates) - 1)])
    names = sorted({name for _, _, shares in phases for name in shares})
    streams = {n: _shuffled(load_task(n.partition("/")[2], data=data / n.partition("/")[0])) for n in names}
    seen: dict[str, list[float]] = defaultdict(list)
    start = time.perf_counter()
    checkpoint = folder.with_suffix(".checkpoint")
    done = 0
    if checkpoint.is_file():
        kept = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        schedule.load_state_dict(kept["schedule"])
        done = kept["step"]
        for _, shares in plan[:done]:
            for name, share in shares.items():
                for _ in range(share):
                    next(streams[name])
    for step, (prompted, shares) in enumerate(plan[done:], start=done + 1):
        model.train()
        model.get_encoder().embed_images.eval()  # its statistics stay those of emoji scenes
        optimizer.zero_grad()
        # by task: texts of similar length need less padding
        batches: dict[str, list[tuple[str, Example]]] = defaultdict(list)
        for name, share in shares.items():
            batches[name.partition("/")[2]] += [(name, next(streams[name])) for _ in range(share)]
        for rows in batches.values():
            examples = [example for _, example in rows]
            if not prompted:
                examples = [replace(example, decoder_prompt="none") for example in examples]
            with precision(backbone, "auto"):
                losses = backbone.loss(backbone.collate(examples))
            if not examples[0].choices:  # of a whole text, against those of one word
                losses = losses / torch.tensor([len(e.target.split()) for e in examples])
            (losses.sum() / sum(shares.values())).backward()
            for (name, _), loss in zip(rows, losses.tolist(), strict=True):
                seen[name].append(loss)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if step % SAVE_EVERY == 0:
            states = {"model": model, "optimizer": optimizer, "schedule": schedule}
            kept = {name: thing.state_dict() for name, thing in states.items()} | {"step": step}
            torch.save(kept, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
        if step % 50 == 0:
            shown = "  ".join(f"{name} {sum(ls) / len(ls):.3f}" for name, ls in seen.items())
            print(f"step {step}/{steps}  {time.perf_counter() - start:.0f} s  {shown}", flush=True)
            seen.clear()
    model.eval().save_pretrained(folder.with_suffix(".partial"))
    backbone.processor.save_pretrained(folder.with_suffix(".partial"))
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


def interval_by_sentence(right: Sequence[bool], sentences: Sequence[str]) -> float:
    """The same where rows of one sentence are right or wrong together: their errors are summed before they are squared."""
    value = sum(right) / len(right)
    errors: dict[str, float] = defaultdict(float)
    for hit, sentence in zip(right, sentences, strict=True):
        errors[sentence] += hit - value
    return 1.96 * math.sqrt(sum(e * e for e in errors.values())) / len(right)


def measure(data: Path, work: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for name in names:
        kind = KINDS.get(name, name)
        where = ["--backbone", work / kind, "--pool", work / "experts" / kind, "--data", data]
        start = time.perf_counter()
        logs = work / "logs" / name
        shutil.rmtree(logs, ignore_errors=True)  # of an earlier measurement
        trained = pituning("train", name, *where, *SETTINGS, "--epochs", EPOCHS[name], "--log-dir", logs)
        seconds = time.perf_counter() - start
        task = load_task(name, data=data)
        state = json.loads((checkpoints(logs)[-1] / "trainer_state.json").read_text())
        curve = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
        for split in TESTS[name]:
            found = pituning("eval", name, trained["name"], *where, "--split", split)
            bare = pituning("eval", name, *where, "--split", split)
            metric = found["metric"]
            half = interval(found["metrics"][metric], found["examples"])
            if name.startswith("snli"):
                answers = work / f"{name}-answers.json"
                pituning("predict", name, trained["name"], *where, "--split", split, "--out", answers)
                examples = task.split(split)
                given = [answer[task.submission[1]] for answer in json.loads(answers.read_text())]
                right = [a == e.target for a, e in zip(given, examples, strict=True)]
                half = interval_by_sentence(right, [e.texts[0].lower() for e in examples])
            row = {
                "task": name, "split": split, "metric": metric, "examples": found["examples"],
                "training rows": len(task.split("train")), "steps": trained["training"]["steps_taken"],
                "training loss, first": curve[0], "training loss, last": curve[-1],
                "log-loss, bare": bare["metrics"]["log-loss"], "log-loss, expert": found["metrics"]["log-loss"],
                "chance": chance(task, split), "blind": blind(task, split),
                "bare": bare["metrics"][metric], "expert": found["metrics"][metric],
                "±": half, "seconds to train": round(seconds),
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
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--threads", type=int, default=2, help="of every process (default 2)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    for kind in dict.fromkeys(KINDS.get(name, name) for name in arguments.tasks):
        if not (arguments.work / kind).is_dir():
            print(f"ofa-nano, trained on for {kind}", flush=True)
            pretrain(arguments.data, arguments.work / kind, PHASES[kind], SIDES[kind])
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
