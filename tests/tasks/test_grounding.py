"""Grounding tasks from rows and from files; every mistake in a file names its line."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pituning.data.fewshot import stratified_folds
from pituning.errors import DataError
from pituning.example import Box
from pituning.tasks import GroundingRow, Task, grounding_from_files, grounding_from_rows
from pituning.tasks.grounding import has_corner_columns

HEADER = ("image", "text", "x0", "y0", "x1", "y1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a picture of 40 × 30 pixels in ``images``."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "a.png")
    return tmp_path


def write(folder: Path, *rows: Any, suffix: str = ".jsonl", split: str = "train") -> Path:
    """A file of rows (image, text, x0, y0, x1, y1)."""
    path = folder / f"{split}{suffix}"
    if suffix == ".jsonl":
        lines = [json.dumps(dict(zip(HEADER, row, strict=True))) for row in rows]
    else:
        gap = {".tsv": "\t", ".csv": ","}[suffix]
        lines = [gap.join(map(str, row)) for row in (HEADER, *rows)]
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return path


def rows_of(count: int, box: Box = (1, 2, 3, 4)) -> list[GroundingRow]:
    image = Image.new("RGB", (40, 30))
    return [GroundingRow(f"r{i}", image, f"thing {i}", box) for i in range(count)]


class TestFromRows:
    def test_an_example(self) -> None:
        image = Image.new("L", (50, 40))
        row = GroundingRow("17", image, " A man, in-red/shirt ", (3.5, 4.25, 30, 39.99))
        task = grounding_from_rows("refs", {"train": [row], "test": rows_of(2)})
        (example,) = task.split("train")
        assert example.id == "refs/train/17"
        assert example.texts == ("A man, in-red/shirt",)
        assert example.prompt == ' which region does the text " a man, in red shirt " describe?'
        assert example.target == "3.5,4.25,30.0,39.99"
        assert example.box == (3.5, 4.25, 30.0, 39.99)
        assert all(type(c) is float for c in example.box)
        assert example.image is image
        assert (example.choices, task.choices, task.metric) == ((), (), "acc@0.5")
        assert repr(task) == "Task('refs', open-ended, train 1, test 2)"

    def test_the_picture_may_be_an_encoded_file(self) -> None:
        file = io.BytesIO()
        Image.new("RGB", (50, 40)).save(file, "JPEG")
        (example,) = grounding_from_rows(
            "refs", {"train": [GroundingRow("0", file.getvalue(), "it", (0, 0, 50, 40))]}
        ).split("train")
        assert example.image == file.getvalue()

    def test_two_rows_with_one_id(self, message: Any) -> None:
        """Draws and folds go by id."""
        text = message(grounding_from_rows, "refs", {"train": [*rows_of(3), *rows_of(1)]})
        assert text == "task 'refs': 2 rows of split 'train' have the id 'r0'; give each its own"

    def test_a_bad_row_is_named(self, message: Any) -> None:
        bad = GroundingRow("x", b"no picture", "it", (0, 0, 1, 1))
        text = message(grounding_from_rows, "refs", {"dev": [*rows_of(3), bad]})
        assert text.startswith("refs/dev/x: ")
        assert "not an image" in text
        text = message(grounding_from_rows, "refs", {"dev": rows_of(1, (5, 5, 41, 6))})
        assert text == "refs/dev/r0: box 5.0,5.0,41.0,6.0 (x0,y0,x1,y1) is outside the image of 40 × 30 pixels"


class TestFromFiles:
    @pytest.mark.parametrize("suffix", [".jsonl", ".tsv", ".csv"])
    def test_every_format(self, folder: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write(folder, ("images/a.png", "the cat", 0, 1.5, 40, 30.0), suffix=suffix)
        (folder / "cwd").mkdir()
        monkeypatch.chdir(folder / "cwd")
        task = grounding_from_files("cats", {"train": path, "test": str(path)})
        (train,), (test,) = task.split("train"), task.split("test")
        assert (train.id, test.id) == ("cats/train/0", "cats/test/0")
        assert train.image == folder / "images" / "a.png", "relative to the file, not to the current folder"
        assert train.box == test.box == (0.0, 1.5, 40.0, 30.0)
        assert train.target == "0.0,1.5,40.0,30.0"

    def test_further_columns_do_not_matter(self, folder: Path) -> None:
        path = folder / "train.jsonl"
        row = dict(zip(HEADER, ("images/a.png", "it", 0, 0, 1, 1), strict=True))
        path.write_text(json.dumps({"id": 3, "source": "x", **row}))
        assert len(grounding_from_files("cats", {"train": path}).split("train")) == 1

    @pytest.mark.parametrize(
        ("row", "problem"),
        [
            (("images/a.png", "it", 0, 0, 41, 30), r"box 0\.0,0\.0,41\.0,30\.0 .* outside the image of 40 × 30 pixels"),
            (("images/a.png", "it", -1, 0, 4, 3), "is outside the image of 40 × 30 pixels"),
            (("images/a.png", "it", 20, 20, 10, 5), "is empty; expected x0 < x1 .*not a corner and a size"),
            (("images/a.png", "it", 3, 3, 3, 5), "is empty"),
            (("images/a.png", "it", "nan", 0, 1, 1), "is not finite"),
            (("images/a.png", "it", 0, "wide", 1, 1), "y0 is no number: 'wide'"),
            (("images/a.png", "  ", 0, 0, 1, 1), "the text is empty"),
            (("images/a.png", "...", 0, 0, 1, 1), r"the text '\.\.\.' is empty once its punctuation is cleaned away"),
            (("images/a.png", " ? ", 0, 0, 1, 1), r"the text '\?' is empty"),
            (("images/b.png", "it", 0, 0, 1, 1), r"no such image file: .*images/b\.png"),
            (("train.tsv", "it", 0, 0, 1, 1), r"train\.tsv: not an image"),
        ],
    )
    @pytest.mark.parametrize("suffix", [".jsonl", ".tsv"])
    def test_a_mistake_names_file_and_line(self, folder: Path, row: Any, problem: str, suffix: str) -> None:
        (folder / "train.tsv").touch()
        path = write(folder, ("images/a.png", "fine", 0, 0, 1, 1), row, suffix=suffix)
        line = 2 if suffix == ".jsonl" else 3
        with pytest.raises(DataError, match=rf"^{path}:{line}: .*{problem}"):
            grounding_from_files("cats", {"train": path})

    def test_a_missing_column(self, folder: Path, message: Any) -> None:
        path = folder / "train.tsv"
        path.write_text("image\ttext\nimages/a.png\tit\n")
        assert f"{path}:2: no column 'x0'" in message(grounding_from_files, "cats", {"train": path})
        path = folder / "train.jsonl"
        path.write_text('{"image": "images/a.png", "text": "it", "x0": 1, "y0": 1, "x1": 2, "y1": null}\n')
        assert f"{path}:1: no column 'y1'" in message(grounding_from_files, "cats", {"train": path})

    def test_rounding_errors_are_cut_off(self, folder: Path) -> None:
        """Boxes are often kept as corner and size; 13.3 + 26.7 is not 40."""
        path = write(folder, ("images/a.png", "it", -0.001, 0, 40.0001, 30.009))
        (example,) = grounding_from_files("cats", {"train": path}).split("train")
        assert example.box == (0.0, 0.0, 40.0, 30.0)
        path = write(folder, ("images/a.png", "it", 40.001, 0, 40.005, 30))
        with pytest.raises(DataError, match="is empty"):
            grounding_from_files("cats", {"train": path})

    def test_every_picture_is_opened_once(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        opened: list[Any] = []
        original = Image.open
        monkeypatch.setattr(Image, "open", lambda source: opened.append(source) or original(source))
        path = write(folder, *(("images/a.png", f"thing {i}", 0, 0, 1 + i, 1) for i in range(5)))
        assert len(grounding_from_files("cats", {"train": path, "test": path}).split("test")) == 5
        assert opened == [folder / "images" / "a.png"]


class TestFewShot:
    def task(self, count: int = 40) -> Task:
        return grounding_from_rows("refs", {"train": rows_of(count), "test": rows_of(3)})

    def test_a_shot_is_one_example(self) -> None:
        task = self.task().few_shot(16, seed=1)
        assert (len(task.split("train")), task.shots, len(task.split("test"))) == (16, 16, 3)
        fewer, other = self.task().few_shot(4, seed=1), self.task().few_shot(16, seed=2)
        assert set(fewer.split("train")) < set(task.split("train")), "nested"
        assert set(other.split("train")) != set(task.split("train"))
        assert (task.metric, task.choices) == ("acc@0.5", ())

    def test_too_few_examples(self, message: Any) -> None:
        assert message(self.task(7).few_shot, 8) == "8 shots asked for, but there are only 7 examples"

    def test_folds(self) -> None:
        shots = self.task().few_shot(9).split("train")
        folds = stratified_folds(shots, 2, seed=0)
        assert sorted(len(held) for _, held in folds) == [4, 5]
        assert sorted(e.id for _, held in folds for e in held) == sorted(e.id for e in shots)


def test_only_names_of_columns_make_a_file_with_corners(folder: Path) -> None:
    picture = "x0x1y0y1" * 5_000
    assert all(
        has_corner_columns(write(folder, ("a.png", "it", 0, 0, 5, 5), suffix=s)) for s in (".jsonl", ".tsv", ".csv")
    )
    (folder / "ofa.tsv").write_text(f"1\timg\tit\t0,0,5,5\t{picture}\n")
    (folder / "ofa.jsonl").write_text(json.dumps({"image": picture, "text": "it", "box": "0,0,5,5"}) + "\n")
    (folder / "ofa.csv").write_text(f"image,text,box\n{picture},it,1\n")
    assert not any(has_corner_columns(folder / f"ofa{s}") for s in (".jsonl", ".tsv", ".csv"))


def test_a_message_shows_no_picture(folder: Path) -> None:
    path = write(folder, ("a.png", "it", "x" * 40_000, 0, 5, 5))
    with pytest.raises(DataError, match=r"x0 is no number: 'x{40}… \(40,000 characters\)'"):
        grounding_from_files("refs", {"train": path})
