"""The files that the script writes are those that the paper's tasks read; no picture or sentence is in two of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

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


@pytest.fixture(scope="module")
def script() -> Any:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import build_paper_formats
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    return build_paper_formats


@pytest.fixture(scope="module")
def built(script: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("formats")
    script.build(DATA, folder, train=24, test=12)
    return folder


def test_the_papers_tasks_read_them(built: Path) -> None:
    for name, splits in TASKS.items():
        task = load_task(name, data=built / "target")
        assert set(task.splits) == set(splits)
        for split in splits:
            for example in task.split(split):
                assert example.target
                assert open_image(example.image or "").size in ((250, 200), (64, 64), (200, 50))
        assert load_task(name, data=built / "pretrain").split("train")
    assert load_task("vqa", data=built / "target").choices == load_task("vqa", data=built / "pretrain").choices


def test_boxes_lie_on_something(built: Path) -> None:
    """Inside the picture, and more colourful inside than the plain background at the same height."""
    for split in ("testA", "testB"):
        for example in load_task("refcoco", data=built / "target").split(split):
            assert example.box is not None
            x0, y0, x1, y1 = example.box
            assert 0 <= x0 < x1 <= 250
            assert 0 <= y0 < y1 <= 200
            inside = np.asarray(open_image(example.image or "").crop((int(x0), int(y0), int(x1), int(y1))), dtype=float)
            assert inside.std(axis=1).mean() > 4, example.texts
            assert (example.texts[0] in ("the boy", "the girl")) == (split == "testA")


def test_nothing_is_in_two_files(script: Any, built: Path) -> None:
    for task, column in (("refcoco", 4), ("refcoco", 1), ("vqa", 5), ("snli_ve", 3)):
        seen: dict[str, Path] = {}
        for path in built.glob(f"*/{task}_data/*.tsv"):
            for cell in {row[column] for row in script.rows_of(path) if not row[column].startswith("there ")}:
                assert seen.setdefault(cell, path) == path, f"{task}: column {column} of {path} and {seen[cell]}"


def test_as_many_true_as_false(built: Path) -> None:
    task = load_task("snli_ve", data=built / "target")
    for split in ("train", "dev", "test"):
        labels = [e.target for e in task.split(split)]
        assert abs(labels.count("yes") - labels.count("no")) <= 1
        assert len(labels) > 3


def test_statements_are_what_they_claim(script: Any) -> None:
    import gzip
    import json
    import random

    with gzip.open(DATA / "nlvr" / "examples.json.gz", "rt") as file:
        record = json.load(file)[0]
    shown = script.things(record["rep"], record["perm"])
    rng = random.Random(0)
    for number in range(200):
        truth = bool(number % 2)
        words = script.statement(record, truth, rng).split()
        side = words[words.index("the") + 1] if "the" in words else None
        kind = [w.removesuffix("s") for w in words[3 : words.index("in") if side else None]]
        colour, shape = kind if len(kind) == 2 else ["", kind[0]]
        count = sum(
            (not colour or t.colour == colour) and (shape in (t.shape, "object")) and side in (None, t.side)
            for t in shown
        )
        said = count > 0 if words[2] == "a" else count == script.WORDS.index(words[2])
        assert said == truth, words


def test_the_same_seed_writes_the_same_files(script: Any, built: Path, tmp_path: Path) -> None:
    script.build(DATA, tmp_path, train=24, test=12)
    for path in built.rglob("*.tsv"):
        assert path.read_bytes() == (tmp_path / path.relative_to(built)).read_bytes()


def test_the_repository_is_refused(script: Any) -> None:
    with pytest.raises(ValueError, match="is in the repository"):
        script.build(DATA, ROOT / "formats")
