#!/usr/bin/env python3
"""Build small data sets in exactly the files that OFA's users have on disk: RefCOCO, VQA and SNLI-VE.

Usage::

    python scripts/build_paper_formats.py ../shared/data /tmp/formats
    pituning train refcoco --data /tmp/formats/target --backbone …

It writes ``target/refcoco_data/refcoco_{train,val,testA,testB}.tsv``, ``target/vqa_data/…`` and ``target/snli_ve_data/…``, and
``pretrain/`` with other training rows of the same kinds, so that a small model can learn to see before an expert is trained
(``pretrain-things/`` and its like have simpler ones of SNLI-VE, to be learned one after another). No scene, drawing, picture
or sentence is in two files, but those that pretrain. The same seed writes the same files.

- RefCOCO: scenes of CoDraw (Kim et al., ACL 2019; CC BY-NC 4.0; clip art of Abstract Scenes, Zitnick and Parikh, CVPR
  2013), the name of a thing that is there once, and its box. testA asks for people, testB for the rest, as RefCOCO's do.
- VQA: drawings and questions of easy-VQA (MIT).
- SNLI-VE: drawings and human sentences of NLVR (Suhr et al., ACL 2017; CC BY 4.0), as many true as false; the premise says
  what is in the boxes, and the picture shows the three of them two by two. The pretraining rows hold statements that are
  made, about drawings that are made in NLVR's manner: in ``pretrain-things/``, that there is a thing of some kind, beside
  captions that say of what colours towers are; in ``pretrain-ends/``, that a tower begins or ends with a colour; in
  ``pretrain-ends-counted/``, how many do; in ``pretrain-heights/``, that one has so many blocks; in ``pretrain-numbers/``, how
  many towers there are of all these kinds; in ``pretrain/`` whatever people say of towers and of scattered things.

The data stay outside the repository.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import io
import json
import pickle
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
from build_grounding_data import BOX_STEP, REPOSITORY, SCALE
from nlvr_statements import (
    BETWEEN,
    BOX_SIDE,
    are_towers,
    contents,
    drawing,
    invented,
    premise,
    simple_statements,
    statements_about,
)

LESSON_OF = {
    "pretrain-things": None,
    "pretrain-ends": "ends",
    "pretrain-ends-counted": "ends-counted",
    "pretrain-heights": "heights",
    "pretrain-numbers": "numbers",
    "pretrain": "all",
}
"""The lesson of each part whose statements are made."""
SCENE = (125, 100)  # pixels of a stored scene, a quarter of CoDraw's canvas
SCALES = (1.0, 0.7, 0.49)  # of a sprite, by its depth
PEOPLE = {"hb0": "the boy", "hb1": "the girl"}
NAMES = {
    "s_0s": "the helicopter", "s_1s": "the hot air balloon", "s_2s": "the cloud", "s_3s": "the sun", "s_4s": "the lightning",
    "s_5s": "the rain", "s_6s": "the rocket", "s_7s": "the plane", "p_0s": "the bee", "p_1s": "the slide",
    "p_2s": "the sandbox", "p_3s": "the grill", "p_4s": "the swings", "p_5s": "the tent", "p_6s": "the table",
    "p_7s": "the pine tree",
    "p_8s": "the leafy tree", "p_9s": "the apple tree", "a_0s": "the bear", "a_1s": "the cat", "a_2s": "the dog",
    "a_3s": "the duck", "a_4s": "the owl", "a_5s": "the snake", "t_1s": "the bucket", "t_2s": "the beach ball",
    "t_14s": "the fire",
}  # fmt: skip
VISIBLE = 0.7  # share of a sprite that must be on the canvas to be asked for
GAP = 4  # pixels between the boxes of a drawing

Row = Sequence[str]
Box = tuple[float, float, float, float]


class Sprites:
    """CoDraw's clip art, each picture read once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.background = Image.open(folder / "background.png").convert("RGB").resize(SCENE)
        self._known: dict[tuple[str, int, bool], Image.Image] = {}

    def get(self, name: str, depth: int, flipped: bool) -> Image.Image:
        if (name, depth, flipped) not in self._known:
            image = Image.open(self.folder / name).convert("RGBA")
            factor = SCALES[depth] * SCENE[0] / 500
            image = image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))))
            self._known[name, depth, flipped] = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else image
        return self._known[name, depth, flipped]


def draw(scene: str, sprites: Sprites) -> tuple[Image.Image, dict[str, Box]]:
    """A scene's picture, and the box of every thing in it that has a name, is there once, and is well in sight."""
    fields = scene.strip(",").split(",")
    things_of = [fields[1 + 8 * n : 9 + 8 * n] for n in range(int(fields[0]))]
    canvas = sprites.background.copy()
    boxes: dict[str, Box] = {}
    names = Counter(map(_name, (t[0] for t in things_of)))
    for png, _, _, _, x, y, depth, flip in sorted(things_of, key=lambda t: -int(t[6])):
        sprite = sprites.get(png, int(depth), flip == "1")
        left = round(float(x) * SCENE[0] / 500 - sprite.width / 2)
        top = round(float(y) * SCENE[0] / 500 - sprite.height / 2)
        canvas.paste(sprite, (left, top), sprite)
        visible = sprite.getchannel("A").point(lambda a: 255 * (a > 40)).getbbox()
        name = _name(png)
        if visible is None or name is None or names[name] > 1:
            continue
        whole = left + visible[0], top + visible[1], left + visible[2], top + visible[3]
        box = max(whole[0], 0), max(whole[1], 0), min(whole[2], SCENE[0]), min(whole[3], SCENE[1])
        if _area(box) >= VISIBLE * _area(whole):
            boxes[name] = tuple(map(float, box))  # type: ignore[assignment]
    return canvas, boxes


def grounding_rows(folder: Path, counts: Mapping[str, int], seed: int) -> dict[str, list[Row]]:
    """Rows for each split; testA asks for people and testB for anything else. Only ``pretrain`` asks twice about a scene."""
    with gzip.open(folder / "codraw.jsonl.gz", "rt", encoding="utf-8") as file:
        scenes = [json.loads(line) for line in file]
    scenes = list({scene["scene"]: scene for scene in scenes}.values())
    random.Random(f"codraw/{seed}").shuffle(scenes)
    waiting, sprites = iter(scenes), Sprites(folder / "Pngs")
    found: dict[str, list[Row]] = {}
    for split, count in counts.items():
        rows: list[Row] = []
        while len(rows) < count:
            scene = next(waiting, None)
            if scene is None:
                raise ValueError(f"only {len(rows)} scenes are left for {count} rows of {split}: ask for fewer")
            image, boxes = draw(scene["scene"], sprites)
            names = [n for n in sorted(boxes) if split[:4] != "test" or (n in PEOPLE.values()) == (split == "testA")]
            random.Random(f"{scene['id']}/{seed}").shuffle(names)
            picture = _encoded(image, "JPEG") if names else ""
            for name in names if split == "pretrain" else names[:1]:
                box = ",".join(str(c) for c in boxes[name])
                rows.append((str(len(rows)), str(scene["id"]), name, box, picture))
        found[split] = rows[:count]
    return found


def vqa_rows(folder: Path, counts: Mapping[str, int], seed: int) -> dict[str, list[Row]]:
    """Rows for each split; the test pictures are easy-VQA's own, all others share no picture either."""
    with np.load(folder / "data.npz") as arrays:
        pixels = {part: arrays[f"{part}_images"] for part in ("train", "test")}
    found: dict[str, list[Row]] = {}
    questions = {}
    for part in ("train", "test"):
        with gzip.open(folder / f"{part}_questions.json.gz", "rt", encoding="utf-8") as file:
            by_picture = defaultdict(list)
            for text, answer, number in json.load(file):
                by_picture[number].append((text, answer))
            questions[part] = by_picture
    waiting = {part: sorted(q) for part, q in questions.items()}
    for part, numbers in waiting.items():
        random.Random(f"easy_vqa/{part}/{seed}").shuffle(numbers)
    for split, count in counts.items():
        part, rows = "test" if split == "test" else "train", list[Row]()
        while len(rows) < count:
            if not waiting[part]:
                raise ValueError(f"only {len(rows)} questions are left for {count} rows of {split}: ask for fewer")
            number = waiting[part].pop()
            picture = _encoded(Image.fromarray(pixels[part][number]))
            asked = questions[part][number]
            taken = len(asked) if split == "pretrain" else min(3, len(asked))
            for text, answer in random.Random(f"{number}/{seed}").sample(asked, taken):
                rows.append((str(len(rows)), str(number), text, f"1.0|!+{answer}", "", picture))
        found[split] = rows[:count]
    return found


def entailment_rows(folder: Path, counts: Mapping[str, int], statements: int, seed: int) -> dict[str, list[Row]]:
    """Rows for each split and for each part that pretrains: statements about invented drawings, twice as many in the last.

    A sentence has as many drawings that it is true of as others, so that its words alone give nothing away. The two orders of
    the boxes that NLVR has of a drawing are both in ``train``; ``dev`` and ``test`` have one. Drawings that differ in the order
    of their boxes only are in one split, and none of them is among the invented ones. The pictures show the boxes two by two.
    """
    records = _records(folder)
    pixels = np.load(folder / "data.npz")["images"]
    groups = defaultdict(list)
    for record in records:
        groups[_normal(record["sentence"])].append(record)
    waiting = sorted(groups)
    random.Random(f"nlvr/{seed}").shuffle(waiting)
    split_of: dict[str, str] = {}
    found: dict[str, list[Row]] = {}
    for split, count in counts.items():
        rows: list[Row] = []
        while len(rows) < count:
            if not waiting:
                raise ValueError(f"only {len(rows)} drawings are left for {count} rows of {split}: ask for fewer")
            by_label: dict[str, list[Any]] = {"true": [], "false": []}
            for record in groups[waiting.pop()]:
                if (split == "train" or record["perm"] == 0) and split_of.get(_contents(record), split) == split:
                    by_label[record["label"]].append(record)
            for record in (r for pair in zip(by_label["true"], by_label["false"], strict=False) for r in pair):
                split_of[_contents(record)] = split
                picture = _encoded(two_by_two(Image.fromarray(pixels[record["i"]])))
                rows.append(
                    _entailment(str(record["i"]), record, record["sentence"], record["label"] == "true", picture)
                )
        found[split] = rows[: count // 2 * 2]

    new = _unlike(records)
    for split, lesson in LESSON_OF.items():
        rng, things, count = random.Random(f"{split}/{seed}"), lesson is None, statements * (1 + (split == "pretrain"))
        drawn = [r for r in invented(max(60, count // 2), rng, sparse=things) if new(r)]
        said = simple_statements(drawn, count, rng) if lesson is None else statements_about(drawn, count, rng, lesson)
        found[split] = [
            _entailment(f"{split}-{n}", record, text, truth, _encoded(two_by_two(drawing(record))))
            for n, (record, text, truth) in enumerate(said)
        ]
    return {split: [(str(n), *row) for n, row in enumerate(rows)] for split, rows in found.items()}


def caption_rows(folder: Path, count: int, seed: int) -> list[Row]:
    """Invented drawings of towers with what is in them; for pretraining alone."""
    rng, new = random.Random(f"captions/{seed}"), _unlike(_records(folder))
    towers = [record for record in invented(2 * count, rng) if new(record) and are_towers(contents(record))]
    return [
        (str(n), f"towers-{n}", premise(record), "", _encoded(two_by_two(drawing(record))))
        for n, record in enumerate(towers)
    ]


def two_by_two(picture: Image.Image) -> Image.Image:
    """Its three boxes in a square, so that little is lost when it is made square: no sentence speaks of their order."""
    side, step = round(BOX_SIDE * SCALE), round(BOX_STEP * SCALE)
    found = Image.new("RGB", (2 * side + GAP, 2 * side + GAP), BETWEEN)
    for n in range(3):
        box = picture.crop((n * step, 0, n * step + side, side))
        found.paste(box, (n % 2 * (side + GAP), n // 2 * (side + GAP)))
    return found


def build(source: Path, output: Path, *, train: int = 3000, test: int = 1000, seed: int = 0) -> list[Path]:
    """Write all files and return their paths.

    Raises:
        ValueError: if there is too little data, or the output lies in the repository.
    """
    if output.resolve().is_relative_to(REPOSITORY):
        raise ValueError(
            f"{output} is in the repository, and the data may not be: choose a folder outside {REPOSITORY}"
        )
    small = max(2, test // 2)
    written = []
    tables = {
        "refcoco": grounding_rows(
            source / "codraw",
            {"train": train, "val": small, "testA": small, "testB": small, "pretrain": 8 * train},
            seed,
        ),
        "vqa": vqa_rows(source / "easy_vqa", {"train": train, "val": small, "test": test, "pretrain": 6 * train}, seed),
        "snli_ve": entailment_rows(
            source / "nlvr", {"train": train // 3, "dev": max(2, test // 5), "test": 8 * test // 5}, 4 * train, seed
        ),
    }
    for task, splits in tables.items():
        for split, rows in splits.items():
            part = split if split.startswith("pretrain") else "target"
            path = output / part / f"{task}_data" / f"{task}_{split if part == 'target' else 'train'}.tsv"
            written.append(_write(path, rows))
        if task == "vqa":
            rows = [row for part in splits.values() for row in part]
            written += [_write_answers(output / part / "vqa_data", rows) for part in ("pretrain", "target")]
    captions = caption_rows(source / "nlvr", 6 * train, seed)
    return [*written, _write(output / "pretrain-things" / "caption_data" / "caption_stage1_train.tsv", captions)]


def _records(folder: Path) -> list[dict[str, Any]]:
    with gzip.open(folder / "examples.json.gz", "rt", encoding="utf-8") as file:
        records: list[dict[str, Any]] = json.load(file)
    return records


def _unlike(records: Iterable[Mapping[str, Any]]) -> Callable[[Mapping[str, Any]], bool]:
    """Whether a drawing is none of these, in whatever order its boxes stand."""
    known = {_contents(record) for record in records}
    return lambda record: _contents(record) not in known


def _entailment(number: str, record: Mapping[str, Any], sentence: str, truth: bool, picture: str) -> Row:
    """Everything but the first column."""
    label = "entailment" if truth else "contradiction"
    return number, picture, " ".join(sentence.rstrip(" .").split()), premise(record), label


def _normal(sentence: str) -> str:
    return " ".join(sentence.lower().rstrip(" .").split())


def _contents(record: Mapping[str, Any]) -> str:
    """The same for drawings that differ in the order of their boxes only."""
    return json.dumps(sorted(sorted(json.dumps(o, sort_keys=True) for o in box) for box in record["rep"]))


def _write(path: Path, rows: Iterable[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _write_answers(folder: Path, rows: Iterable[Row]) -> Path:
    """The answers of rows of VQA, as OFA has them."""
    answers = sorted({row[3].split("|!+")[1] for row in rows})
    path = folder / "trainval_ans2label.pkl"
    path.write_bytes(pickle.dumps({answer: n for n, answer in enumerate(answers)}))
    return path


def _name(png: str) -> str | None:
    return PEOPLE.get(png.split("_")[0]) or NAMES.get(png.removesuffix(".png"))


def _area(box: Sequence[float]) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _encoded(image: Image.Image, kind: str = "PNG") -> str:
    held = io.BytesIO()
    image.save(held, kind, quality=90)
    return base64.urlsafe_b64encode(held.getvalue()).decode()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the folder with codraw, easy_vqa and nlvr")
    parser.add_argument("output", type=Path, help="where to write, outside the repository")
    parser.add_argument("--train", type=int, default=3000, help="sets the size of the training files (default 3000)")
    parser.add_argument("--test", type=int, default=1000, help="rows of the larger test files (default 1000)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        written = build(
            arguments.source, arguments.output, train=arguments.train, test=arguments.test, seed=arguments.seed
        )
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(*written, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
