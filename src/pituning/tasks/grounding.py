"""Grounding: where in a picture is what a text describes? Answers are boxes; the metric is Acc@0.5."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from pituning.data.cleaning import clean_caption
from pituning.data.images import image_size
from pituning.data.records import Records
from pituning.data.tables import first_columns, read_table, shortened
from pituning.errors import DataError
from pituning.example import Box, Example, ImageSource
from pituning.tasks.kind import Kind, filled, key_of
from pituning.tasks.task import Task

MAX_WORDS = 80
PROMPT = ' which region does the text " {text} " describe?'  # OFA's, with its leading space
METRIC = "acc@0.5"
COLUMNS = ("image", "text", "x0", "y0", "x1", "y1")
SLACK = 0.01  # pixels; boxes kept as corner + size leave the picture by rounding errors


@dataclass(frozen=True)
class Grounding(Kind):
    """RefCOCO, RefCOCO+ and RefCOCOg in OFA's files: the box is one column, ``x0,y0,x1,y1`` in pixels of the picture.

    Pictures are not opened before they are needed: a box outside of its picture is found out when it is encoded.

    Source: Yu et al., "Modeling context in referring expressions", ECCV 2016; Mao et al., CVPR 2016 (RefCOCOg).
    """

    title = "grounding"
    columns = MappingProxyType({"key": 0, "image": 4, "text": 2, "box": 3})
    optional = frozenset({"key"})
    aliases = MappingProxyType({"box": ("bbox", "region_coord")})
    metrics = (METRIC,)
    submission = ("id", "box")

    def example(self, records: Records, row: int, identifier: str) -> Example:
        """See :meth:`Kind.example`."""
        text = filled(records, row, "text")
        box = _read_box(records.text(row, "box"), records.place(row, "box"))
        return Example(
            identifier,
            (text,),
            grounding_prompt(text),
            box_text(box),
            image=records.image(row, "image"),
            box=box,
            key=key_of(records, row),
        )


def _read_box(text: str, place: str) -> Box:
    try:
        x0, y0, x1, y1 = map(float, text.split(","))
    except ValueError as error:
        raise DataError(f"{place}: expected a box as x0,y0,x1,y1 in pixels, found {shortened(text)!r}") from error
    if min(x0, y0) > -SLACK:
        x0, y0 = max(x0, 0.0), max(y0, 0.0)
    if not (all(map(math.isfinite, (x0, y0, x1, y1))) and 0 <= x0 < x1 and 0 <= y0 < y1):
        raise DataError(
            f"{place}: box {text} is empty or outside the picture; expected 0 <= x0 < x1 and 0 <= y0 < y1, its upper left "
            "and lower right corners (not a corner and a size)"
        )
    return x0, y0, x1, y1


@dataclass(frozen=True)
class GroundingRow:
    """A text and where in an image it is.

    Attributes:
        id: different for every row of a split.
        box: x0, y0, x1, y1 in pixels of the image as it is stored.
    """

    id: str
    image: ImageSource
    text: str
    box: Box


def grounding_from_rows(name: str, splits: Mapping[str, Sequence[GroundingRow]]) -> Task:
    """A grounding task from rows in memory.

    Args:
        splits: from split name (``train``, ``dev``, ``test``) to its rows.

    Raises:
        DataError: names the row whose image cannot be read, whose box is empty or outside the image, whose text is
            empty, or whose id occurs twice.
    """
    size_of = _remembered_sizes()
    examples = {
        split: tuple(_example(name, split, row, f"{name}/{split}/{row.id}", size_of) for row in rows)
        for split, rows in splits.items()
    }
    for split, rows in splits.items():
        identifier, count = Counter(row.id for row in rows).most_common(1)[0] if rows else ("", 0)
        if count > 1:
            raise DataError(
                f"task {name!r}: {count} rows of split {split!r} have the id {identifier!r}; give each its own"
            )
    return Task(name, (), examples, METRIC)


def grounding_from_files(name: str, files: Mapping[str, str | Path]) -> Task:
    """A grounding task from the user's own files.

    Args:
        files: from split name (``train``, ``dev``, ``test``) to a TSV, CSV or JSONL file with the columns ``image`` (a
            path relative to the file's folder), ``text``, ``x0``, ``y0``, ``x1``, ``y1`` (pixels of the stored image).

    Raises:
        DataError: names file and line of a row that cannot be used.
    """
    size_of = _remembered_sizes()
    splits = {}
    for split, file in files.items():
        path = Path(file)
        splits[split] = tuple(
            _example(name, split, _read(path.parent, number, place, row), place, size_of)
            for number, (place, row) in enumerate(read_table(path, COLUMNS))
        )
    return Task(name, (), splits, METRIC)


def has_corner_columns(path: Path) -> bool:
    """Whether a file is one for :func:`grounding_from_files`: its header or first object names the corners of boxes."""
    return set(COLUMNS[2:]) <= set(first_columns(path))


def grounding_prompt(text: str) -> str:
    """The question to a generative backbone: OFA's, about the text cleaned as its captions are, at most 80 words of it.

    >>> grounding_prompt("The man in-red")
    ' which region does the text " the man in red " describe?'
    """
    return PROMPT.format(text=clean_caption(text, MAX_WORDS))


def box_text(box: Box) -> str:
    """A box as the readable target of an example.

    >>> box_text((3.5, 4.25, 30, 39.99))
    '3.5,4.25,30.0,39.99'
    """
    return ",".join(str(float(c)) for c in box)


def _read(folder: Path, number: int, place: str, row: dict[str, str]) -> GroundingRow:
    corners = []
    for column in COLUMNS[2:]:
        try:
            corners.append(float(row[column]))
        except ValueError as error:
            raise DataError(f"{place}: {column} is no number: {shortened(row[column])!r}") from error
    x0, y0, x1, y1 = corners
    return GroundingRow(str(number), folder / row["image"], row["text"], (x0, y0, x1, y1))


def _example(
    name: str, split: str, row: GroundingRow, place: str, size_of: Callable[[ImageSource, str], tuple[int, int]]
) -> Example:
    identifier, text = f"{name}/{split}/{row.id}", row.text.strip()
    if not text:
        raise DataError(f"{place}: the text is empty")
    if not clean_caption(text, MAX_WORDS):
        raise DataError(f"{place}: the text {text!r} is empty once its punctuation is cleaned away")
    try:
        width, height = size_of(row.image, identifier)
    except DataError as error:
        raise DataError(f"{place}: {error}") from error
    box = _inside(row.box, width, height, place)
    return Example(identifier, (text,), grounding_prompt(text), box_text(box), image=row.image, box=box)


def _inside(box: Box, width: int, height: int, place: str) -> Box:
    """The box, cut at the edges of the image where it is outside by no more than :data:`SLACK`."""
    x0, y0, x1, y1 = map(float, box)
    shown = f"box {box_text(box)} (x0,y0,x1,y1)"
    if not all(map(math.isfinite, box)):
        raise DataError(f"{place}: {shown} is not finite")
    if min(x0, y0, x1, y1) < -SLACK or max(x0, x1) > width + SLACK or max(y0, y1) > height + SLACK:
        raise DataError(f"{place}: {shown} is outside the image of {width} × {height} pixels")
    x0, y0, x1, y1 = max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))
    if x1 <= x0 or y1 <= y0:
        raise DataError(
            f"{place}: {shown} is empty; expected x0 < x1 and y0 < y1, its upper left and lower right corners "
            "(not a corner and a size)"
        )
    return x0, y0, x1, y1


def _remembered_sizes() -> Callable[[ImageSource, str], tuple[int, int]]:
    """Sizes of images, each file opened once: many texts are about the same picture."""
    known: dict[str, tuple[int, int]] = {}

    def size_of(image: ImageSource, name: str) -> tuple[int, int]:
        if not isinstance(image, str | Path):
            return image_size(image, name)
        if str(image) not in known:
            known[str(image)] = image_size(image)
        return known[str(image)]

    return size_of
