"""Rows by number and column by name, from TSV files, tables and `datasets`."""

from __future__ import annotations

import base64
import io
import pickle
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from pituning.data.images import image_size, open_image
from pituning.data.records import DatasetRecords, Records, TableRecords, TsvRecords
from pituning.data.tsv import TsvFile
from pituning.errors import DataError
from pituning.example import Example, LazyImage

RED = (200, 0, 0)


def png(size: tuple[int, int] = (6, 4)) -> bytes:
    held = io.BytesIO()
    Image.new("RGB", size, RED).save(held, "PNG")
    return held.getvalue()


def from_tsv(folder: Path) -> Records:
    picture = base64.urlsafe_b64encode(png()).decode()
    (folder / "a.tsv").write_text(f"label\tpicture\tx\nyes\t{picture}\t1\nno\t{picture[:60]}\t2\n")
    return TsvRecords(TsvFile(folder / "a.tsv"), {"label": 0, "image": 1}, first=1)


def from_table(folder: Path) -> Records:
    (folder / "a.png").write_bytes(png())
    (folder / "b.png").write_bytes(png()[:45])
    rows = [
        (f"t.csv:{n}", {"label": label, "image": f"{name}.png"}) for n, label, name in ((2, "yes", "a"), (3, "no", "b"))
    ]
    return TableRecords(rows, folder)


def from_dataset(folder: Path) -> Records:
    features = datasets.Features(
        {"answer": datasets.ClassLabel(names=["no", "yes"]), "picture": datasets.Image(), "x": datasets.Value("int64")}
    )
    rows = [
        {"answer": 1, "picture": {"bytes": png(), "path": None}, "x": 1},
        {"answer": 0, "picture": {"bytes": png()[:45], "path": None}, "x": 2},
    ]
    dataset = datasets.Dataset.from_list(rows, features=features)
    return DatasetRecords(dataset, {"label": "answer", "image": "picture"}, "hub:train")


@pytest.mark.parametrize("make", [from_tsv, from_table, from_dataset])
class TestEverySource:
    def test_texts_and_pictures(self, tmp_path: Path, make: Any) -> None:
        records = make(tmp_path)
        assert (len(records), records.columns()) == (2, ("label", "image"))
        assert [records.text(row, "label") for row in (1, 0)] == ["no", "yes"]
        image = records.image(0, "image")
        assert image_size(image) == (6, 4)
        assert open_image(image).getpixel((5, 3)) == RED

    def test_a_broken_picture_is_only_found_when_it_is_opened_and_names_its_place(
        self, tmp_path: Path, make: Any
    ) -> None:
        records = make(tmp_path)
        image = records.image(1, "image")
        assert records.text(1, "label") == "no"
        with pytest.raises(DataError) as caught:
            open_image(image)
        place = str(tmp_path / "b.png") if make is from_table else records.place(1, "image")
        assert str(caught.value).startswith(f"{place}: not a")

    def test_a_missing_column_is_named(self, tmp_path: Path, make: Any) -> None:
        records = make(tmp_path)
        with pytest.raises(DataError, match=r"no column 'premise'.*label"):
            records.text(0, "premise")

    def test_pictures_go_to_other_processes(self, tmp_path: Path, make: Any) -> None:
        records = make(tmp_path)
        example = Example("t/train/0", ("x",), "x", records.text(0, "label"), image=records.image(0, "image"))
        again = pickle.loads(pickle.dumps(example))
        assert again == example
        assert open_image(again.image).getpixel((5, 3)) == RED

    def test_a_row_that_is_not_there(self, tmp_path: Path, make: Any) -> None:
        with pytest.raises(IndexError):
            make(tmp_path).text(2, "label")


def test_places(tmp_path: Path) -> None:
    assert from_tsv(tmp_path).place(0).endswith("a.tsv:2")
    assert from_tsv(tmp_path).place(1, "image").endswith("a.tsv:3, column 1 (image)")
    assert from_table(tmp_path).place(1, "label") == "t.csv:3 (label)"
    assert from_dataset(tmp_path).place(1, "label") == "hub:train[1] (label)"


def test_the_header_is_no_row(tmp_path: Path) -> None:
    records = from_tsv(tmp_path)
    for row in (-1, 2):
        with pytest.raises(IndexError, match=f"has 2 rows, no number {row}"):
            records.text(row, "label")
        with pytest.raises(IndexError, match="has 2 rows"):
            records.image(row, "image")


def test_a_table_without_a_picture_in_one_row(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"t\.csv:2 \(image\) is empty"):
        TableRecords([("t.csv:2", {"image": " "})], tmp_path).image(0, "image")


class TestDatasets:
    def records(self, **columns: list[Any]) -> DatasetRecords:
        return DatasetRecords(datasets.Dataset.from_dict(columns), {name: name for name in columns}, "d")

    def test_lists_are_joined_and_numbers_are_written_out(self) -> None:
        records = self.records(captions=[["a", "b c"]], number=[3])
        assert (records.text(0, "captions"), records.text(0, "number")) == ("a&&b c", "3")

    def test_answers_of_vqav2(self) -> None:
        said = [{"answer": "red", "answer_confidence": "yes", "answer_id": n} for n in range(9)]
        records = self.records(answers=[[*said, {"answer": "pink", "answer_confidence": "no", "answer_id": 9}]])
        assert records.text(0, "answers") == "&&".join(["red"] * 9 + ["pink"])

    def test_an_empty_cell_is_named(self) -> None:
        with pytest.raises(DataError, match=r"d\[1\] \(text\) is empty"):
            self.records(text=["a", None]).text(1, "text")

    def test_no_label_is_an_empty_text(self) -> None:
        features = datasets.Features({"label": datasets.ClassLabel(names=["no", "yes"])})
        dataset = datasets.Dataset.from_dict({"label": [1, -1]}, features=features)
        records = DatasetRecords(dataset, {"label": "label"}, "d")
        assert [records.text(row, "label") for row in (0, 1)] == ["yes", ""]

    def test_a_list_with_a_gap_is_named(self) -> None:
        with pytest.raises(DataError, match=r"d\[0\] \(text\) is empty in part"):
            self.records(text=[["a", None]]).text(0, "text")

    def test_a_picture_is_no_text(self) -> None:
        with pytest.raises(DataError, match=r"d\[0\] \(image\): expected a text, found dict"):
            self.records(image=[Image.new("RGB", (6, 4))]).text(0, "image")

    def test_through_parquet(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(png((3, 2)))
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
        columns = {"image": [Image.new("RGB", (6, 4), RED), str(tmp_path / "a.png")], "label": [1, -1]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "d.parquet")
        dataset = datasets.load_dataset(
            "parquet", data_files=str(tmp_path / "d.parquet"), split="train", cache_dir=str(tmp_path / "cache")
        )
        records = DatasetRecords(dataset, {"image": "image", "label": "label"}, "d")
        assert [image_size(records.image(row, "image")) for row in (0, 1)] == [(6, 4), (3, 2)]
        assert open_image(records.image(0, "image")).getpixel((5, 3)) == RED
        assert [records.text(row, "label") for row in (0, 1)] == ["yes", ""]

    def test_what_is_no_picture_is_named(self) -> None:
        with pytest.raises(DataError, match=r"d\[0\] \(image\): expected a picture"):
            open_image(self.records(image=[7]).image(0, "image"))

    def test_pictures_from_files_and_a_column_that_is_not_there(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(png())
        dataset = datasets.Dataset.from_dict({"image": [str(tmp_path / "a.png")]}).cast_column(
            "image", datasets.Image()
        )
        image = DatasetRecords(dataset, {"image": "image"}, "d").image(0, "image")
        assert image_size(image) == (6, 4)
        (tmp_path / "a.png").unlink()
        with pytest.raises(DataError, match=r"d\[0\] \(image\): no such image file: .*a\.png"):
            image_size(image)
        with pytest.raises(DataError, match="d: no column 'label'; there are image"):
            DatasetRecords(dataset, {"label": "label"}, "d")


def test_a_lazy_picture_is_read_once_for_each_opening_and_equal_by_its_place() -> None:
    opened: list[int] = []

    def read() -> bytes:
        opened.append(1)
        return png()

    image = LazyImage("somewhere", read)
    assert not opened
    assert open_image(image).size == image_size(image) == (6, 4)
    assert len(opened) == 2
    assert image == LazyImage("somewhere", png)
    with pytest.raises(DataError, match="somewhere: not an image"):
        open_image(LazyImage("somewhere", lambda: b"text"))
