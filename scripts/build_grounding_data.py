#!/usr/bin/env python3
"""Build small grounding tasks from the drawings of NLVR: pictures, referring expressions and boxes.

Usage::

    python scripts/build_grounding_data.py ../shared/data/nlvr /tmp/grounding
    pituning train nlvr_colour_box --task-kind grounding --train-file /tmp/grounding/nlvr_colour_box/train.jsonl …

It writes ``<task>/train.jsonl``, ``<task>/test.jsonl`` and the pictures they name for five related tasks. Four make a pool
(colour, size, box, order); the fifth, ``nlvr_colour_box``, is a target that asks for two of their skills at once. Every
expression is true of exactly one object of its picture. Drawings that were made for one sentence resemble each other, so
all of them go to one split of one task; no picture is used twice. The same seed writes the same files.

NLVR (Suhr et al., ACL 2017; CC BY 4.0): a drawing shows three grey boxes side by side with triangles, circles and squares.
The data stay outside the repository.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent
COLOURS = {"Yellow": "yellow", "#0099ff": "blue", "Black": "black"}
SIZES = {10: "small", 20: "medium", 30: "large"}
SIDES = ("left", "middle", "right")
PLACES = {0: (0, 1, 2), 1: (0, 2, 1)}  # permutation number of a drawing → which box of the record stands where
BOX_STEP = 150  # from one box's left edge to the next one's, in the record's units; a box is 100 wide
SCALE = 0.5  # stored pixels per unit
MARGIN = 8  # units by which the highest object must be higher than the next


@dataclass(frozen=True)
class Thing:
    """One object of a drawing; ``box`` is x0, y0, x1, y1 in pixels."""

    colour: str
    shape: str
    size: str
    side: str
    box: tuple[float, float, float, float]

    @property
    def centre(self) -> tuple[float, float]:
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2


@dataclass(frozen=True)
class Drawing:
    """A picture with its objects; drawings of one ``group`` were made for one sentence and resemble each other."""

    name: str
    group: str
    pixels: NDArray[np.uint8]
    things: tuple[Thing, ...]


Reference = tuple[str, Thing]
"""An expression and the one object of its drawing that it is true of."""


def read_drawings(folder: Path) -> list[Drawing]:
    """All drawings of the NLVR folder: one of the two permutations of each, and none with the contents of another."""
    with gzip.open(folder / "examples.json.gz", "rt", encoding="utf-8") as file:
        records = json.load(file)
    pixels = np.load(folder / "data.npz")["images"]
    drawings, seen = [], set()
    for record in records:
        contents = json.dumps(sorted(sorted(json.dumps(o, sort_keys=True) for o in box) for box in record["rep"]))
        if record["perm"] == random.Random(record["id"]).randrange(2) and contents not in seen:
            seen.add(contents)
            group = f"{record['split']}-{record['id'].split('-')[0]}"
            name = f"{record['split']}-{record['id']}-{record['perm']}"
            drawings.append(Drawing(name, group, pixels[record["i"]], things(record["rep"], record["perm"])))
    return drawings


def things(boxes: Sequence[Sequence[Mapping[str, object]]], permutation: int) -> tuple[Thing, ...]:
    """The objects of a record as they stand in the picture."""
    found = []
    for place, index in enumerate(PLACES[permutation]):
        for o in boxes[index]:
            x, y, size = (int(str(o[key])) for key in ("x_loc", "y_loc", "size"))
            x += place * BOX_STEP
            box = (x * SCALE, y * SCALE, (x + size) * SCALE, (y + size) * SCALE)
            found.append(Thing(COLOURS[str(o["color"])], str(o["type"]), SIZES[size], SIDES[place], box))
    return tuple(found)


def by_attributes(template: str) -> Callable[[Drawing], Iterator[Reference]]:
    """Expressions from a template over colour, size, shape and side, where they fit one object only."""

    def references(drawing: Drawing) -> Iterator[Reference]:
        texts = [template.format(**vars(t)) for t in drawing.things]
        count = Counter(texts)
        return ((text, t) for text, t in zip(texts, drawing.things, strict=True) if count[text] == 1)

    return references


def by_order(drawing: Drawing) -> Iterator[Reference]:
    """The outermost object of a shape in a box, where it is so by a clear margin."""
    alike: dict[Hashable, list[Thing]] = defaultdict(list)
    for thing in drawing.things:
        alike[thing.shape, thing.side].append(thing)
    for members in alike.values():
        for word, axis, sign in (("leftmost", 0, 1), ("rightmost", 0, -1), ("highest", 1, 1), ("lowest", 1, -1)):
            ordered = sorted(members, key=lambda t: sign * t.centre[axis])
            gap = abs(ordered[1].centre[axis] - ordered[0].centre[axis]) if len(ordered) > 1 else 0.0
            if gap >= MARGIN * SCALE:
                yield f"the {word} {ordered[0].shape} in the {ordered[0].side} box", ordered[0]


TASKS: dict[str, Callable[[Drawing], Iterator[Reference]]] = {  # the hardest to find pictures for come first
    "nlvr_size": by_attributes("the {size} {shape}"),
    "nlvr_colour": by_attributes("the {colour} {shape}"),
    "nlvr_box": by_attributes("the {shape} in the {side} box"),
    "nlvr_order": by_order,
    "nlvr_colour_box": by_attributes("the {colour} {shape} in the {side} box"),
}
COUNTS = {"train": 200, "test": 100}


def build(
    drawings: Sequence[Drawing], output: Path, *, counts: Mapping[str, int] = COUNTS, seed: int = 0
) -> dict[str, dict[str, Path]]:
    """Write all tasks.

    Args:
        counts: examples per split of every task.

    Returns:
        task → split → the JSONL file.

    Raises:
        ValueError: if there are too few drawings, or the output lies in the repository.
    """
    if output.resolve().is_relative_to(REPOSITORY):
        raise ValueError(
            f"{output} is in the repository, and the data may not be: choose a folder outside {REPOSITORY}"
        )
    groups: dict[str, list[Drawing]] = defaultdict(list)
    for drawing in drawings:
        groups[drawing.group].append(drawing)
    free = sorted(groups)
    random.Random(f"groups/{seed}").shuffle(free)
    files: dict[str, dict[str, Path]] = {}
    for task, references in TASKS.items():
        for split, count in counts.items():
            rows: list[tuple[Drawing, Reference]] = []
            used = set()
            for group in free:
                if len(rows) >= count:
                    break
                fitting = [(d, r) for d in groups[group] if (r := _one_of(d, list(references(d)), seed)) is not None]
                rows += fitting
                used |= {group} if fitting else set()
            if len(rows) < count:
                raise ValueError(
                    f"only {len(rows)} drawings are left for {count} examples of {task}/{split}: ask for fewer"
                )
            free = [group for group in free if group not in used]
            files.setdefault(task, {})[split] = _write(output / task, split, rows[:count])
    return files


def _one_of(drawing: Drawing, references: Sequence[Reference], seed: int) -> Reference | None:
    return random.Random(f"{drawing.name}/{seed}").choice(references) if references else None


def _write(folder: Path, split: str, rows: Sequence[tuple[Drawing, Reference]]) -> Path:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for drawing, (text, thing) in rows:
        image = f"images/{drawing.name}.png"
        Image.fromarray(drawing.pixels).save(folder / image)
        lines.append(
            json.dumps({"image": image, "text": text, **dict(zip(("x0", "y0", "x1", "y1"), thing.box, strict=True))})
        )
    path = folder / f"{split}.jsonl"
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the folder nlvr with data.npz and examples.json.gz")
    parser.add_argument("output", type=Path, help="where to write, outside the repository")
    parser.add_argument("--train", type=int, default=COUNTS["train"], help="training examples per task (default 200)")
    parser.add_argument("--test", type=int, default=COUNTS["test"], help="test examples per task (default 100)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        files = build(
            read_drawings(arguments.source),
            arguments.output,
            counts={"train": arguments.train, "test": arguments.test},
            seed=arguments.seed,
        )
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for splits in files.values():
        print(*splits.values())
    return 0


if __name__ == "__main__":
    sys.exit(main())
