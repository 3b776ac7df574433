"""The files that the script writes are those that the paper's tasks read; no picture or sentence is in two of them."""

from __future__ import annotations

import gzip
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pituning.data.images import open_image
from pituning.tasks import load_task

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"the data are not here: no folder {DATA}")
TASKS = {
    "refcoco": ("train", "dev", "testA", "testB"),
    "vqa": ("train", "dev", "test"),
    "snli_ve-premise": ("train", "dev", "test"),
}


def rows_of(path: Path) -> list[list[str]]:
    """The rows of a file, read plainly."""
    return [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]


def normal(sentence: str) -> str:
    return " ".join(sentence.lower().rstrip(" .").split())


@pytest.fixture(scope="module")
def script() -> Any:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import build_paper_formats
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    return build_paper_formats


@pytest.fixture(scope="module")
def statements(script: Any) -> Any:
    return sys.modules["nlvr_statements"]


@pytest.fixture(scope="module")
def built(script: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("formats")
    script.build(DATA, folder, train=24, test=30)
    return folder


def test_the_papers_tasks_read_them(built: Path) -> None:
    for name, splits in TASKS.items():
        task = load_task(name, data=built / "target")
        assert set(task.splits) == set(splits)
        for split in splits:
            for example in task.split(split):
                assert example.target
                assert open_image(example.image or "").size in ((125, 100), (64, 64), (104, 104))
        assert load_task(name, data=built / "pretrain").split("train")
    assert load_task("vqa", data=built / "target").choices == load_task("vqa", data=built / "pretrain").choices


def test_boxes_lie_on_something(built: Path) -> None:
    """Inside the picture, and at each of its sides, but for the picture's own, something stands before the background."""
    background = Image.open(DATA / "codraw" / "Pngs" / "background.png").convert("RGB").resize((125, 100))
    for split in ("testA", "testB"):
        for example in load_task("refcoco", data=built / "target").split(split):
            assert example.box is not None
            x0, y0, x1, y1 = map(int, example.box)
            assert 0 <= x0 < x1 <= 125
            assert 0 <= y0 < y1 <= 100
            picture = np.asarray(open_image(example.image or ""), dtype=float)
            drawn = (np.abs(picture - np.asarray(background, dtype=float)).max(axis=2) > 25)[y0:y1, x0:x1]
            assert drawn.mean() > 0.1, example.texts
            for side in (drawn[:3], drawn[-3:], drawn[:, :3], drawn[:, -3:]):
                assert side.any(), example.texts
            assert (example.texts[0] in ("the boy", "the girl")) == (split == "testA")


def place_of(path: Path, built: Path) -> Path:
    """The file itself, or one name for all those that pretrain, which may hold the same."""
    return path if path.parents[1].name == "target" else built / "pretrain"


def test_nothing_is_in_two_files(built: Path) -> None:
    for task, column in (("refcoco", 4), ("refcoco", 1), ("vqa", 5), ("snli_ve", 2)):
        seen: dict[str, Path] = {}
        for path in built.glob(f"*/{task}_data/*.tsv"):
            where = place_of(path, built)
            for cell in {row[column] for row in rows_of(path)}:
                assert seen.setdefault(cell, where) == where, f"{task}: column {column} of {path} and {seen[cell]}"


def test_as_many_true_as_false_of_every_sentence(built: Path) -> None:
    """So that nobody who reads the words alone can be right more often than by chance."""
    for split in (
        "target/{}/snli_ve_train",
        "target/{}/snli_ve_dev",
        "target/{}/snli_ve_test",
        "pretrain-ends/{}/snli_ve_train",
        "pretrain-ends-counted/{}/snli_ve_train",
        "pretrain-heights/{}/snli_ve_train",
        "pretrain-numbers/{}/snli_ve_train",
        "pretrain/{}/snli_ve_train",
    ):
        labels: dict[str, list[str]] = {}
        for row in rows_of(built / f"{split.format('snli_ve_data')}.tsv"):
            labels.setdefault(normal(row[3]), []).append(row[5])
        assert sum(map(len, labels.values())) > 3
        for sentence, given in labels.items():
            assert given.count("entailment") == given.count("contradiction") == len(given) / 2, sentence


def test_no_sentence_is_in_two_files(built: Path) -> None:
    """Of those in target; the ones that are made may be as people's, since words give nothing away."""
    seen: dict[str, Path] = {}
    for path in built.glob("target/snli_ve_data/*.tsv"):
        for sentence in {normal(row[3]) for row in rows_of(path)}:
            assert seen.setdefault(sentence, path) == path, sentence


def test_captions_say_what_towers_are_made_of(built: Path) -> None:
    captions = load_task("caption", data=built / "pretrain-things").split("train")
    assert all(set(c.target.split()) <= {"tower", "yellow", "blue", "black"} for c in captions)
    for caption in captions:
        towers = caption.target.split("tower")[1:]
        assert len(towers) == 3
        assert all(1 <= len(tower.split()) <= 4 for tower in towers)


def test_no_two_files_have_the_same_things_in_three_boxes(built: Path) -> None:
    """In whatever order the boxes stand."""
    seen: dict[tuple[str, ...], Path] = {}
    for path in built.glob("target/snli_ve_data/*.tsv"):
        for premise in {row[4] for row in rows_of(path)}:
            boxes = tuple(sorted(premise.split(" . ")))
            if "tower" in premise:  # a tower's words are all there is to it; scattered things also have places
                assert seen.setdefault(boxes, path) == path, premise


COLOURS = {"yellow": "Yellow", "blue": "#0099ff", "black": "Black"}
NUMBERS = {"a": 1, "one": 1, "two": 2, "three": 3}
SIMPLE = re.compile(
    r"there (?:is|are) (?P<how>exactly |at least |)(?P<n>a|one|two|three|\d) (?P<colour>yellow|blue|black) "
    r"(?P<shape>block|square|circle|triangle|item|object)s?"
    r"(?: (?P<edge>not |)(?:closely |)touching (?:the|a) (?P<place>\w+)(?: of a box)?)?"
)
ENDED = re.compile(
    r"there (?:is|are) (?P<how>exactly |at least |)(?P<n>a|one|two|three|\d) (?:tower|box)(?:e?s)? "
    r"with a (?P<colour>yellow|blue|black) (?:block|item) at the (?P<end>top|base)"
)


def touching(x0: int, y0: int, x1: int, y1: int, place: str) -> bool:
    """Whether something touches the edges of a box of side 100 that a word stands for."""
    if place in ("bottom", "base"):
        return y1 >= 100
    if place == "top":
        return y0 <= 0
    if place == "corner":
        return (x0 <= 0 or x1 >= 100) and (y0 <= 0 or y1 >= 100)
    assert place in ("edge", "wall", "side")
    return min(x0, y0) <= 0 or max(x1, y1) >= 100


def claimed(text: str, boxes: Any) -> bool | None:
    """What the plainest statements say, counted in NLVR's own record; ``None`` for others."""
    if found := SIMPLE.fullmatch(text):
        shape, edge, place = found["shape"], found["edge"], found["place"]
        things = [o for box in boxes for o in box if o["color"] == COLOURS[found["colour"]]]
        if shape in ("square", "circle", "triangle"):
            things = [o for o in things if o["type"] == shape]
        if place:
            ends = [(o["x_loc"], o["y_loc"], o["x_loc"] + o["size"], o["y_loc"] + o["size"]) for o in things]
            things = [e for e in ends if touching(*e, place) == (not edge)]
        count = len(things)
    elif found := ENDED.fullmatch(text):
        end = max if found["end"] == "base" else min
        count = sum(end(box, key=lambda o: o["y_loc"])["color"] == COLOURS[found["colour"]] for box in boxes if box)
    else:
        return None
    n = NUMBERS.get(found["n"]) or int(found["n"])
    return count >= n if found["how"] == "at least " or found["n"] == "a" else count == n


def test_statements_are_what_they_claim(script: Any) -> None:
    with gzip.open(DATA / "nlvr" / "examples.json.gz", "rt") as file:
        records = json.load(file)
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    found = script.statements_about(records, 3000, rng)
    checked = []
    for record, text, truth in found:
        if (claim := claimed(text, record["rep"])) is not None:
            assert claim == truth, f"seed {seed}: {text}: {record['rep']}"
            checked.append(text)
    truths: dict[str, list[bool]] = {}
    for _, text, truth in found:
        truths.setdefault(text, []).append(truth)
    assert all(sum(given) == len(given) / 2 for given in truths.values()), f"seed {seed}: words give the truth away"
    assert len(checked) > 300
    for words in (
        " touching the edge",
        " not touching ",
        " a corner",
        " the bottom",
        " at the base",
        "exactly",
        "at least",
    ):
        assert any(words in text for text in checked)


@pytest.mark.parametrize(
    ("lesson", "said"),
    [
        ("ends", r"there is a .*\b(top|base)\b.*"),
        ("ends-counted", r"there (is|are) .*\b(top|base)\b.*"),
        ("heights", r"there is a tower with .*\bblocks?"),
        ("numbers", r"there (is|are) .*(top|base|blocks?).*"),
    ],
)
def test_lessons_speak_of_one_thing(statements: Any, lesson: str, said: str) -> None:
    """Of towers alone, and each sentence of one that it is true of and one that it is not."""
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    found = statements.statements_about(statements.invented(200, rng), 400, rng, lesson)
    for (record, text, truth), (other, same, false) in zip(found[::2], found[1::2], strict=True):
        assert re.fullmatch(said, text), f"seed {seed}"
        assert (text, truth) == (same, not false), f"seed {seed}"
        assert all(statements.are_towers(statements.contents(r)) for r in (record, other))


HIGH = re.compile(
    r"there (?:is|are) (?P<how>exactly |at least |)(?P<n>a|one|two|three|\d) "
    r"(?:tower|(?P<colour>yellow|blue|black) (?:block|item))s?(?: (?:as|at) the (?P<end>top|base) of a tower)? "
    r"with (?P<least>exactly |only |at least |)(?P<high>one|two|three|four|\d) blocks?"
    r"(?: and a (?P<colour2>yellow|blue|black) (?:block|item) at the (?P<end2>top|base)"
    r"| which has a (?P<colour3>yellow|blue|black) (?P<end3>top|base)|)"
)


def test_heights_are_those_of_the_record(statements: Any) -> None:
    """Blocks counted, and their ends looked up, in the record itself."""
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    checked = 0
    for record, text, truth in statements.statements_about(statements.invented(300, rng), 1500, rng, "numbers"):
        if not (found := HIGH.fullmatch(text)):
            continue
        high = {**NUMBERS, "four": 4}.get(found["high"]) or int(found["high"])
        towers = [
            box for box in record["rep"] if (len(box) >= high if found["least"] == "at least " else len(box) == high)
        ]
        for colour, end in (("colour", "end"), ("colour2", "end2"), ("colour3", "end3")):
            if found[colour]:
                first = max if found[end] == "base" else min
                towers = [t for t in towers if first(t, key=lambda o: o["y_loc"])["color"] == COLOURS[found[colour]]]
        n = NUMBERS.get(found["n"]) or int(found["n"])
        many = found["how"] == "at least " or found["n"] == "a"
        assert (len(towers) >= n if many else len(towers) == n) == truth, f"seed {seed}: {text}: {record['rep']}"
        checked += 1
    assert checked > 300


def test_premises_name_the_contents(script: Any) -> None:
    square = {"type": "square", "size": 20, "x_loc": 40}
    tower = [
        [{**square, "y_loc": 59, "color": "Black"}, {**square, "y_loc": 80, "color": "Yellow"}],
        [{**square, "y_loc": 80, "color": "#0099ff"}],
        [{**square, "y_loc": 80, "color": "Yellow"}],
    ]
    said = script.premise({"rep": tower, "perm": 1})  # this order has the third box in the middle
    assert said == "tower yellow black . tower yellow . tower blue"
    lying = [[{"type": "circle", "size": 10, "x_loc": 30, "y_loc": y, "color": "Black"} for y in (0, 40, 60)], [], []]
    said = script.premise({"rep": lying, "perm": 0})
    assert said == "2 black circle 1 black circle edge .  . "


def test_the_same_seed_writes_the_same_files(script: Any, built: Path, tmp_path: Path) -> None:
    script.build(DATA, tmp_path, train=24, test=30)
    for path in built.rglob("*.tsv"):
        assert path.read_bytes() == (tmp_path / path.relative_to(built)).read_bytes()


def test_the_repository_is_refused(script: Any) -> None:
    with pytest.raises(ValueError, match="is in the repository"):
        script.build(DATA, ROOT / "formats")
