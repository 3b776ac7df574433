"""Tasks on emoji scenes: RefCOCO/+/g, SNLI-VE, VQA, captioning and image classification in miniature, without any file.

Their rows are made when they are asked for (:mod:`pituning.tasks.emoji_rows`), and become examples as those of the big
data sets do, with OFA's prompts. The docs (docs/scenes.md) have an example of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pituning.data.records import Records
from pituning.errors import DataError, unknown_name
from pituning.example import Example, ImageSource, LazyImage
from pituning.tasks.captioning import Captioning
from pituning.tasks.entailment import VisualEntailment
from pituning.tasks.grounding import Grounding
from pituning.tasks.image_classification import ImageClassification
from pituning.tasks.kind import Kind
from pituning.tasks.task import Task
from pituning.tasks.vqa import VQA

if TYPE_CHECKING:
    from pituning.data.scenes import Vocabulary
    from pituning.tasks.emoji_rows import Row, Source

SIZES: Mapping[str, int] = MappingProxyType({"train": 2000, "dev": 200, "test": 500})
"""Examples in each split of a miniature task."""

UNLIMITED = 1 << 31
"""Examples of a pretraining stream; made one at a time, they never end in practice."""

SMALL_SUFFIX = "-small"
"""Ends the names of the tasks on the small vocabulary."""

_SCENES_OF = {"train": "train", "dev": "val", "test": "test"}


@dataclass(frozen=True)
class SceneRecords(Records):
    """Rows about scenes, made when they are asked for.

    Attributes:
        rows: name of the kind of row in :data:`pituning.tasks.emoji_rows.ROWS`.
        source: where the scenes come from.
        length: how many there are.
        names: the columns.
    """

    rows: str
    source: Source
    length: int
    names: tuple[str, ...]

    def __len__(self) -> int:
        return self.length

    def columns(self) -> tuple[str, ...]:
        """See :meth:`Records.columns`."""
        return (*self.names, "image")

    def text(self, row: int, column: str) -> str:
        """See :meth:`Records.text`."""
        self.require(column)
        if column == "image":
            raise DataError(f"{self.place(row, column)}: expected a column of text")
        return _row(self.rows, self.source, self._checked(row)).columns[column]

    def image(self, row: int, column: str) -> ImageSource:
        """See :meth:`Records.image`: drawn when it is opened."""
        from pituning.data.scenes import image

        scene = _row(self.rows, self.source, self._checked(row)).scene
        return LazyImage(self.place(row, column), partial(image, scene))

    def place(self, row: int, column: str | None = None) -> str:
        """See :meth:`Records.place`."""
        where = f"{self.rows} of emoji scenes, {self.source.split}[{row}] with seed {self.source.seed}"
        return where if column is None else f"{where} ({column})"

    def _checked(self, row: int) -> int:
        if not 0 <= row < self.length:
            raise IndexError(f"{self.place(row)}: there are {self.length} rows")
        return row


@lru_cache(maxsize=256)
def _row(rows: str, source: Source, index: int) -> Row:
    """One row; its columns are asked for one after the other."""
    from pituning.tasks.emoji_rows import ROWS

    return ROWS[rows](source, index)


@dataclass(frozen=True)
class SceneClassification(ImageClassification):
    """Classification of scenes: their pictures stay as they are in training, since a crop would change the count."""

    def example(self, records: Records, row: int, identifier: str) -> Example:
        """See :meth:`Kind.example`."""
        return replace(super().example(records, row, identifier), augmentation="")


@dataclass(frozen=True)
class SceneCaptioning(Captioning):
    """Captions of scenes, which may be longer than COCO's."""

    metrics = (*Captioning.metrics, "objects-named")
    generation = MappingProxyType({**Captioning.generation, "max_new_tokens": 32})


def _classes(rows: str, names: tuple[str, ...], styles: tuple[str, ...]) -> tuple[str, ...]:
    from pituning.data.emoji import GROUPS
    from pituning.tasks.emoji_language import NUMBERS
    from pituning.tasks.emoji_rows import MOST_THINGS

    return {"object": names, "group": GROUPS, "style": styles, "count": tuple(NUMBERS[1 : MOST_THINGS + 1])}[rows]


def _classification(rows: str) -> Callable[[Source], Kind]:
    def kind(source: Source) -> Kind:
        from pituning.data.scenes import styles_of

        return SceneClassification(_classes(rows, source.names, styles_of(source.split)))

    return kind


def _questions(source: Source) -> Kind:
    from pituning.tasks.emoji_rows import VQA_ANSWERS

    return VQA(VQA_ANSWERS)


class _WithoutFiles:
    """What a definition says that needs no files."""

    @property
    def folders(self) -> tuple[str, ...]:
        """None: nothing is read."""
        return ()

    @property
    def hub(self) -> None:
        """It is not in the `datasets` hub."""
        return

    def is_in(self, folder: Path) -> bool:
        """No folder holds it."""
        return False


@dataclass(frozen=True)
class EmojiTask(_WithoutFiles):
    """A named task on scenes.

    Attributes:
        rows: name of the kind of row.
        columns: what a row has besides its picture.
        kind: how rows become examples.
        vocabulary: ``small`` or ``full``.
    """

    name: str
    rows: str
    columns: tuple[str, ...]
    kind: Callable[[Source], Kind] = field(repr=False)
    vocabulary: Vocabulary = "full"

    def load(self, folder: Path | None) -> Task:
        """The task with its default sizes."""
        return self.task(SIZES)

    def task(self, sizes: Mapping[str, int], **source: Any) -> Task:
        """The task with splits of these sizes."""
        from pituning.tasks.emoji_rows import Source

        sources = {split: Source(_SCENES_OF[split], vocabulary=self.vocabulary, **source) for split in sizes}
        records = {split: SceneRecords(self.rows, sources[split], size, self.columns) for split, size in sizes.items()}
        return self.kind(sources[next(iter(sizes))]).task(self.name, records)


_TEXT_AND_BOX = ("text", "box")
_BIG = (
    EmojiTask("refemoji", "refemoji", _TEXT_AND_BOX, lambda source: Grounding()),
    EmojiTask("refemoji+", "refemoji+", _TEXT_AND_BOX, lambda source: Grounding()),
    EmojiTask("refemojig", "refemojig", _TEXT_AND_BOX, lambda source: Grounding()),
    EmojiTask("emoji-entailment", "entailment", ("key", "hypothesis", "label"), lambda source: VisualEntailment()),
    EmojiTask("emoji-vqa", "vqa", ("key", "question", "answer"), _questions),
    EmojiTask("emoji-caption", "caption", ("caption",), lambda source: SceneCaptioning()),
    *(
        EmojiTask(f"emoji-{rows}", rows, ("label",), _classification(rows))
        for rows in ("group", "style", "object", "count")
    ),
)

PRETRAINING: Mapping[str, tuple[str, tuple[str, ...], Callable[[Source], Kind]]] = {
    "grounding": ("grounding", _TEXT_AND_BOX, lambda source: Grounding()),
    "detection": ("detection", _TEXT_AND_BOX, lambda source: Grounding()),
    "caption": ("caption", ("caption",), lambda source: SceneCaptioning()),
    "vqa": ("vqa", ("key", "question", "answer"), _questions),
    "classification": ("object", ("label",), _classification("object")),
}
"""Kinds of pretraining: grounding by names, places and looks (relations are left to be learned), grounding by unique names
alone (detection), captions, questions, and names of single things."""


@dataclass(frozen=True)
class HeldOutPretraining(_WithoutFiles):
    """What pretraining learns, by name, on scenes that it has not seen: see :func:`pretraining_task`.

    Attributes:
        kind: a name in :data:`PRETRAINING`.
        vocabulary: ``small`` or ``full``.
    """

    name: str
    kind: str
    vocabulary: Vocabulary = "full"

    def load(self, folder: Path | None) -> Task:
        """The task, which has a ``test`` split alone."""
        return replace(pretraining_task(self.kind, vocabulary=self.vocabulary, split="pretrain-val"), name=self.name)


_ALL: tuple[EmojiTask | HeldOutPretraining, ...] = (
    *_BIG,
    *(HeldOutPretraining(f"emoji-pretraining-{kind}", kind) for kind in PRETRAINING),
)
TASKS = (*_ALL, *(replace(task, name=task.name + SMALL_SUFFIX, vocabulary="small") for task in _ALL))
"""Everything on scenes that has a name: the tasks in miniature, and what pretraining learns, held out."""


def emoji_task(
    name: str, *, vocabulary: Vocabulary = "full", seed: int = 0, side: int = 96, sizes: Mapping[str, int] = SIZES
) -> Task:
    """A task on scenes with other settings than :func:`load_task` gives it.

    Args:
        name: such as ``refemoji``.
        vocabulary: ``small`` (100 names that pretraining knows, and 25 new ones) or ``full``.
        seed: of all scenes and what is said of them.
        side: of the pictures, in pixels.
        sizes: from split name (``train``, ``dev``, ``test``) to its number of examples.

    Raises:
        UnknownNameError: for another task, vocabulary or split.
        DataError: if the seed or the side is out of range, when an example is made.
    """
    known = {task.name: task for task in _BIG}
    if name not in known:
        raise unknown_name("task on emoji scenes", name, known)
    if vocabulary not in ("small", "full"):
        raise unknown_name("vocabulary", vocabulary, ("small", "full"))
    for split in sizes:
        if split not in _SCENES_OF:
            raise unknown_name("split", split, _SCENES_OF)
    return replace(known[name], vocabulary=vocabulary).task(sizes, seed=seed, side=side)


def pretraining_task(
    kind: str,
    *,
    vocabulary: Vocabulary = "small",
    split: str = "pretrain",
    seed: int = 0,
    side: int = 96,
    size: int | None = None,
) -> Task:
    """A stream of scenes to pretrain on, or those to validate that on: known emoji in two of the three styles.

    Args:
        kind: a name in :data:`PRETRAINING`.
        vocabulary: ``small`` or ``full``.
        split: ``pretrain`` gives a task with a ``train`` split, ``pretrain-val`` one with a ``test`` split.
        size: number of examples, by default :data:`UNLIMITED` and 500. Take those of an unlimited split by index: a list
            of its ids has no end.

    Raises:
        UnknownNameError: for another kind, vocabulary or split.
    """
    from pituning.tasks.emoji_rows import Source

    splits = {"pretrain": ("train", UNLIMITED), "pretrain-val": ("test", SIZES["test"])}
    for what, name, names in (
        ("kind of pretraining", kind, tuple(PRETRAINING)),
        ("vocabulary", vocabulary, ("small", "full")),
        ("split of pretraining", split, tuple(splits)),
    ):
        if name not in names:
            raise unknown_name(what, name, names)
    rows, columns, kind_of = PRETRAINING[kind]
    (name, length), source = splits[split], Source(split, seed, side, vocabulary)
    records = SceneRecords(rows, source, length if size is None else size, columns)
    return kind_of(source).task(f"{split}-{kind}", {name: records})
