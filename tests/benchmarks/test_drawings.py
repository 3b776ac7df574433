"""NLVR and easy-VQA as targets: the right picture, answer and split, read independently of the code."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.transfer.drawings import load_drawings
from benchmarks.transfer.setting import recipe_of
from benchmarks.transfer.suites import SUITES
from pituning.data.images import open_image
from pituning.errors import DataError
from pituning.experiments.recipe import Recipe

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(
    not (DATA / "nlvr").is_dir(), reason=f"the drawings are not here: no folder {DATA / 'nlvr'}"
)


@needs_data
def test_nlvr() -> None:
    task = load_drawings("nlvr", DATA)
    with gzip.open(DATA / "nlvr" / "examples.json.gz", "rt") as file:
        rows = {f"{row['id']}-{row['perm']}": row for row in json.load(file)}
    with np.load(DATA / "nlvr" / "data.npz") as arrays:
        pictures = arrays["images"]
    assert {n: len(s) for n, s in task.splits.items()} == {"train": 1978 + 1970, "test": 1980}
    for split, parts in (("train", {"dev", "hidden"}), ("test", {"test"})):
        assert len({e.id for e in task.split(split)}) == len(task.split(split))
        for example in task.split(split, 40):
            row = rows[example.id.rsplit("/", 1)[1]]
            assert row["split"] in parts
            assert example.texts == (row["sentence"],)
            assert example.target == {"true": "yes", "false": "no"}[row["label"]]
            assert example.image is not None
            assert np.array_equal(np.asarray(open_image(example.image, example.id)), pictures[row["i"]])


@needs_data
def test_easy_vqa_also_from_the_folder_beside_that_of_the_texts() -> None:
    task = load_drawings("easy_vqa", DATA / "text")
    with gzip.open(DATA / "easy_vqa" / "test_questions.json.gz", "rt") as file:
        rows = json.load(file)
    with np.load(DATA / "easy_vqa" / "data.npz") as arrays:
        pictures = arrays["test_images"]
    assert (len(task.split("train")), len(task.split("test")), len(task.choices)) == (38575, 9673, 13)
    for number in range(0, 9673, 500):
        question, answer, picture = rows[number]
        example = task.split("test")[number]
        assert (example.texts, example.target, example.prompt) == ((question,), answer, f" {question}")
        assert example.image is not None
        assert np.array_equal(np.asarray(open_image(example.image, example.id)), pictures[picture])


def test_where_they_are_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data found \(.*text/nlvr, .*/nlvr\); give --data"):
        load_drawings("nlvr", tmp_path / "text")
    with pytest.raises(DataError, match="no folder was given"):
        load_drawings("easy_vqa", None)
    folder = tmp_path / "nlvr"
    folder.mkdir()
    np.savez(folder / "data.npz", images=np.full((2, 5, 20, 3), 7, np.uint8))
    row = {"i": 1, "split": "test", "id": "3-1", "perm": 4, "sentence": "There is a box", "label": "false", "rep": []}
    with gzip.open(folder / "examples.json.gz", "wt") as file:
        json.dump([row], file)
    (example,) = load_drawings("nlvr", tmp_path).split("test")
    assert (example.id, example.target, example.label) == ("nlvr/test/3-1-4", "no", 0)
    assert example.prompt == ' does the image describe " there is a box "?'
    assert isinstance(open_image(example.image, example.id), Image.Image)  # type: ignore[arg-type]


def test_neither_is_its_own_source_or_a_development_target() -> None:
    suite = SUITES["drawings"]
    assert set(suite.report) == {"nlvr", "easy_vqa"} <= set(suite.sources)
    assert suite.development == ()


def test_their_arms_have_settings() -> None:
    """Recipes know neither of them, and the settings of all other suites' targets are valid recipes."""
    for suite in SUITES.values():
        for target in suite.targets:
            recipe = recipe_of(suite, target, 1)
            assert target not in recipe.pool.tasks
            if suite.name != "drawings":
                assert Recipe.model_validate(recipe.model_dump()) == recipe
