"""NLVR and easy-VQA as tasks on the drawings of the data sets themselves: shapes in boxes, with people's sentences about them
(is it true?), and single shapes, with questions of thirteen answers. The pictures are nothing like emoji scenes.

Source: Suhr et al., "A Corpus of Natural Language for Visual Reasoning", ACL 2017; easy-vqa 1.0 on PyPI.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pituning.errors import DataError
from pituning.example import Example, LazyImage
from pituning.tasks.entailment import entailment_prompt
from pituning.tasks.kind import decoder_prompt
from pituning.tasks.task import Task
from pituning.tasks.vqa import vqa_prompt

DRAWINGS = ("easy_vqa", "nlvr")
TRUTH = {"false": "no", "true": "yes"}
NLVR_SPLITS = {"train": ("dev", "hidden"), "test": ("test",)}
"""The sentences of NLVR's own training split are not among the data; the hidden split's have been published since."""


def load_drawings(name: str, data: Path | None) -> Task:
    """One of :data:`DRAWINGS`.

    Args:
        data: the folder that holds the task's, with ``data.npz`` and the sentences or questions, or one beside that folder.

    Raises:
        DataError: if there is none.
    """
    places = [data / name, data.parent / name] if data is not None else []
    for folder in places:
        if (folder / "data.npz").is_file():
            return _nlvr(folder) if name == "nlvr" else _easy_vqa(folder)
    looked = ", ".join(map(str, places)) or "no folder was given"
    raise DataError(f"task {name!r}: no data found ({looked}); give --data the folder that holds {name}/data.npz")


def _nlvr(folder: Path) -> Task:
    with np.load(folder / "data.npz") as arrays:
        pictures = arrays["images"]
    rows = _read(folder / "examples.json.gz")
    splits: dict[str, tuple[Example, ...]] = {}
    for split, parts in NLVR_SPLITS.items():
        wanted = [row for row in rows if row["split"] in parts]
        splits[split] = tuple(
            _example(f"nlvr/{split}/{row['id']}-{row['perm']}", entailment_prompt(row["sentence"]), row["sentence"],
                     TRUTH[row["label"]], tuple(TRUTH.values()), pictures, row["i"], folder)
            for row in wanted
        )  # fmt: skip
    return Task("nlvr", tuple(TRUTH.values()), splits, kind="visual entailment")


def _easy_vqa(folder: Path) -> Task:
    with np.load(folder / "data.npz") as arrays:
        pictures = {split: arrays[f"{split}_images"] for split in ("train", "test")}
    rows = {split: _read(folder / f"{split}_questions.json.gz") for split in pictures}
    answers = tuple(sorted({answer for _, answer, _ in rows["train"]}))
    splits = {
        split: tuple(
            _example(
                f"easy_vqa/{split}/{n}", vqa_prompt(question), question, answer, answers, pictures[split], i, folder
            )
            for n, (question, answer, i) in enumerate(questions)
        )
        for split, questions in rows.items()
    }
    return Task("easy_vqa", answers, splits, kind="visual question answering")


def _example(
    identifier: str, prompt: str, text: str, answer: str, answers: tuple[str, ...], pictures: NDArray[np.uint8],
    number: int, folder: Path,
) -> Example:  # fmt: skip
    image = LazyImage(f"{folder / 'data.npz'}, picture {number}", partial(Image.fromarray, pictures[number]))
    prompted = decoder_prompt("prev_output")
    return Example(identifier, (text,), prompt, answer, answers, image=image, decoder_prompt=prompted)


def _read(path: Path) -> Sequence[Any]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        found: Sequence[Any] = json.load(file)
    return found
