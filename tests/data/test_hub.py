"""Rows from in-memory `datasets.Dataset` objects; the hub itself is never asked."""

from __future__ import annotations

from typing import Any

import datasets
import pytest

from pituning.data.hub import load_hub_split, rows_from_dataset
from pituning.errors import DataError
from pituning.tasks import task_from_datasets

DATA = {"sentence": ["one", "two", "three"], "label": [0, 1, 0], "other": [0.1, 0.2, 0.3]}
LABELS = {"0": "bad", "1": "good"}


@pytest.fixture
def dataset() -> datasets.Dataset:
    """Three rows whose labels are a ``ClassLabel``."""
    made = datasets.Dataset.from_dict(DATA)
    return made.cast_column("label", datasets.ClassLabel(names=["neg", "pos"]))


def test_rows_are_the_named_columns_as_text(dataset: datasets.Dataset) -> None:
    assert rows_from_dataset(dataset, ["sentence", "label"], "mine") == [
        ("mine[0]", {"sentence": "one", "label": "0"}),
        ("mine[1]", {"sentence": "two", "label": "1"}),
        ("mine[2]", {"sentence": "three", "label": "0"}),
    ]


def test_a_missing_column_is_named(dataset: datasets.Dataset, message: Any) -> None:
    text = message(rows_from_dataset, dataset, ["text", "label"], "mine")
    assert text == "mine: no column 'text'; there are sentence, label, other"


def test_an_empty_cell_is_not_the_word_none(message: Any) -> None:
    made = datasets.Dataset.from_dict({"sentence": ["one", None], "label": [0, 1]})
    text = message(rows_from_dataset, made, ["sentence", "label"], "mine")
    assert "mine[1]" in text
    assert "'sentence'" in text


def test_a_task_from_datasets(dataset: datasets.Dataset) -> None:
    task = task_from_datasets("mine", {"train": dataset, "test": dataset.select([1])}, LABELS, texts=["sentence"])
    assert [e.target for e in task.split("train")] == ["bad", "good", "bad"]
    assert [e.texts for e in task.split("train")] == [("one",), ("two",), ("three",)]
    assert [e.prompt for e in task.split("test")] == ["two"]
    assert task.choices == ("bad", "good")
    assert len({e.id for s in task.splits.values() for e in s}) == 4


def test_a_label_outside_the_choices_is_named_by_its_row(dataset: datasets.Dataset, message: Any) -> None:
    text = message(task_from_datasets, "mine", {"train": dataset}, {"0": "bad"}, texts=["sentence"])
    assert text == "mine:train[1]: label '1' is not one of task 'mine': 0"


def test_integer_labels_may_be_given_as_integers(dataset: datasets.Dataset) -> None:
    task = task_from_datasets("mine", {"train": dataset}, {0: "bad", 1: "good"}, texts=["sentence"])  # type: ignore[dict-item]
    assert [e.target for e in task.split("train")] == ["bad", "good", "bad"]


def test_what_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*arguments: Any, **options: Any) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"org/set/part:train could not be fetched .*ConnectionError: no network"):
        load_hub_split("org/set", "part", "train", ["text"])


def test_a_fetched_split_gives_its_rows(monkeypatch: pytest.MonkeyPatch, dataset: datasets.Dataset) -> None:
    asked: list[Any] = []

    def fetch(path: str, name: str | None, split: str) -> Any:
        asked.append((path, name, split))
        return dataset

    monkeypatch.setattr(datasets, "load_dataset", fetch)
    rows = load_hub_split("org/set", None, "validation", ["sentence"])
    assert asked == [("org/set", None, "validation")]
    assert rows[2] == ("org/set:validation[2]", {"sentence": "three"})
