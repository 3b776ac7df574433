"""The paper's tasks by name, and where their files lie: as OFA's, CoOp's and GLUE's users have them on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pituning.data.hub import fetch_hub_split
from pituning.data.records import Records
from pituning.data.tables import SUFFIXES as TABLES
from pituning.errors import DataError, RefusedError, unknown_name
from pituning.tasks.captioning import Captioning
from pituning.tasks.entailment import VisualEntailment
from pituning.tasks.files import (
    PARQUET,
    aircraft_split,
    classes_of,
    coop_split,
    image_folder,
    read_answer_set,
    records_from_dataset,
    records_from_file,
)
from pituning.tasks.glue import MNLI, MRPC, QNLI, QQP, RTE, SST2, CoLA
from pituning.tasks.grounding import Grounding
from pituning.tasks.image_classification import ImageClassification, class_name
from pituning.tasks.kind import Kind
from pituning.tasks.summarisation import Summarisation
from pituning.tasks.task import Task
from pituning.tasks.vqa import VQA

VQA_ANSWERS = ("trainval_ans2label.pkl", "answers.txt")
SUFFIXES = (*TABLES, PARQUET)

KINDS: Mapping[str, Callable[..., Kind]] = {
    "grounding": Grounding,
    "vqa": VQA,
    "visual-entailment": VisualEntailment,
    "captioning": Captioning,
    "image-classification": ImageClassification,
    "summarisation": Summarisation,
    "cola": CoLA,
    "mnli": MNLI,
    "mrpc": MRPC,
    "qnli": QNLI,
    "qqp": QQP,
    "rte": RTE,
    "sst2": SST2,
}
"""Kinds of tasks whose files have OFA's layout, by the name that ``--task-kind`` has for them."""


@dataclass(frozen=True)
class PaperTask:
    """A named task of the paper.

    Attributes:
        kind: how a row becomes an example.
        folders: where its files may lie in a folder of data sets.
        stems: split → beginnings of file names that no other task has; the first that is there counts.
        plain: split → beginnings that count only in a folder of the task's own, beside the split's name.
        answers: files that hold the closed answer set; where there is none, it is what occurs in the training rows.
        hub: path and configuration in the `datasets` hub, with the splits' names there.
    """

    name: str
    kind: Kind
    folders: tuple[str, ...]
    stems: Mapping[str, tuple[str, ...]]
    plain: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    answers: tuple[str, ...] = ()
    hub: tuple[str, str | None] | None = None
    hub_splits: Mapping[str, str] = field(default_factory=dict)

    def load(self, folder: Path | None) -> Task:
        """Open the splits in a folder, or in the hub where ``folder`` is ``None``.

        Raises:
            DataError: if there is no file, or one cannot be used.
        """
        if folder is None:
            return self.kind.task(self.name, self._from_hub())
        splits = self._records(folder)
        if not splits:
            wanted = ", ".join(f"{stems[0]}.tsv" for stems in self.stems.values())
            raise DataError(f"task {self.name!r}: {folder} holds none of {wanted}, nor train.tsv, dev.tsv, test.tsv")
        return self._with_answers(folder, splits).task(self.name, splits)

    def is_in(self, folder: Path) -> bool:
        """Whether a folder holds files of this task by their own names."""
        return any(
            (folder / f"{stem}{suffix}").is_file()
            for stems in self.stems.values()
            for stem in stems
            for suffix in SUFFIXES
        ) or (isinstance(self.kind, ImageClassification) and folder.resolve().name in self.folders)

    def _records(self, folder: Path) -> dict[str, Records]:
        found: dict[str, Records] = {}
        for split, stems in self.stems.items():
            paths = [
                folder / f"{stem}{suffix}"
                for stem in (*stems, *self.plain.get(split, ()), split)
                for suffix in SUFFIXES
            ]
            if path := next((p for p in paths if p.is_file()), None):
                found[split] = records_from_file(path, self.kind)
        if found or not isinstance(self.kind, ImageClassification):
            return found
        if split_file := _coop_file(folder):
            return coop_split(split_file)
        return aircraft_split(folder) or image_folder(folder)

    def _with_answers(self, folder: Path, splits: Mapping[str, Records]) -> Kind:
        path = next((folder / name for name in self.answers if (folder / name).is_file()), None)
        return with_answers(self.kind, splits, None if path is None else read_answer_set(path))

    def _from_hub(self) -> dict[str, Records]:
        assert self.hub is not None
        fetched = {split: fetch_hub_split(*self.hub, remote) for split, remote in self.hub_splits.items()}
        return {split: records_from_dataset(dataset, self.kind, where) for split, (dataset, where) in fetched.items()}


def with_answers(kind: Kind, splits: Mapping[str, Records], answers: Sequence[str] | None = None) -> Kind:
    """The kind with its closed answer set, where it has one: the given one, or what occurs in the rows.

    A question's answers are those of the training rows; class names are those of all rows.

    Raises:
        DataError: if the answers are to be taken from training rows and there are none, or a class is given twice.
        RefusedError: if answers are given to a kind that has them already, or has none to be given.
    """
    if isinstance(kind, ImageClassification) and not kind.classes:
        given = tuple(map(class_name, answers or ()))
        if len(set(given)) < len(given):
            twice = next(name for i, name in enumerate(given) if name in given[:i])
            raise DataError(f"the class {twice!r} is there twice, spaces standing for underscores; leave one out")
        return replace(kind, classes=given or classes_of(splits))
    if isinstance(kind, VQA) and not kind.answer_set:
        return replace(kind, answer_set=tuple(answers) if answers is not None else _training_answers(kind, splits))
    if answers is not None:
        raise RefusedError(
            f"{type(kind).__name__} has no answer set of its own to give, or has one already: leave it out"
        )
    return kind


def task_from_records(
    name: str, kind: Kind | str, files: Mapping[str, Any], *, answers: str | Path | Sequence[str] | None = None
) -> Task:
    """A task of one of the paper's kinds from the user's own data.

    Args:
        kind: a kind with its settings, such as ``VisualEntailment(premise=True)``, or a name in :data:`KINDS`.
        files: from split name to a file (TSV in OFA's layout or with a header, CSV, JSONL, Parquet) or a
            ``datasets.Dataset``.
        answers: the closed answer set of a VQA or classification task, or a file with it.

    Raises:
        UnknownNameError: for another kind.
        DataError: if a file cannot be used.
    """
    if isinstance(kind, str):
        if kind not in KINDS:
            raise unknown_name("kind of task", kind, KINDS)
        kind = KINDS[kind]()
    splits = {
        split: records_from_file(source, kind)
        if isinstance(source, str | Path)
        else records_from_dataset(source, kind, f"{name}:{split}")
        for split, source in files.items()
    }
    given = read_answer_set(answers) if isinstance(answers, str | Path) else answers
    return with_answers(kind, splits, given).task(name, splits)


def _training_answers(kind: VQA, splits: Mapping[str, Records]) -> tuple[str, ...]:
    from pituning.tasks.vqa import confidences

    if "train" not in splits:
        raise DataError(
            "the answer set of a VQA task is unknown: give a file of answers (OFA's trainval_ans2label.pkl, or one answer a "
            "line), or training examples to take it from"
        )
    records = splits["train"]
    rows = range(len(records))
    found = {a for r in rows for a, _ in confidences(records.text(r, "answer"), records.place(r, "answer"))}
    return tuple(sorted(found))


def _coop_file(folder: Path) -> Path | None:
    return next(iter(sorted(folder.glob("split_zhou_*.json"))), None)


def _stems(name: str, *splits: str, train: str = "train", dev: str = "val") -> dict[str, tuple[str, ...]]:
    names = {"train": train, "dev": dev, **{split: split for split in splits}}
    return {split: (f"{name}_{end}",) for split, end in names.items()}


def _glue(name: str, folder: str, kind: Kind, dev: str = "dev", hub_dev: str = "validation") -> PaperTask:
    """GLUE hides the labels of its test splits: the dev split is what the paper reports, and here is called test."""
    return PaperTask(
        f"glue-{name}",
        kind,
        (f"glue-{name}", "glue_data", folder, name),
        {"train": (f"{name}_train",), "test": (f"{name}_{dev}", f"{name}_dev")},
        {"test": (dev, "dev")},
        hub=("nyu-mll/glue", name),
        hub_splits={"train": "train", "test": hub_dev},
    )


def _images(name: str, *folders: str) -> PaperTask:
    where = (name, f"{name}_data", *folders)
    return PaperTask(name, ImageClassification(), where, _stems(name, "test"), answers=("classes.txt",))


TASKS = (
    PaperTask("refcoco", Grounding(), ("refcoco", "refcoco_data"), _stems("refcoco", "testA", "testB")),
    PaperTask("refcocoplus", Grounding(), ("refcocoplus", "refcocoplus_data"), _stems("refcocoplus", "testA", "testB")),
    PaperTask("refcocog", Grounding(), ("refcocog", "refcocog_data"), _stems("refcocog", "test")),
    PaperTask("snli_ve", VisualEntailment(), ("snli_ve", "snli_ve_data"), _stems("snli_ve", "test", dev="dev")),
    PaperTask(
        "snli_ve-premise",
        VisualEntailment(premise=True),
        ("snli_ve-premise", "snli_ve", "snli_ve_data"),
        _stems("snli_ve", "test", dev="dev"),
    ),
    PaperTask("vqa", VQA(), ("vqa", "vqa_data"), _stems("vqa", "test"), answers=VQA_ANSWERS),
    PaperTask(
        "vqa-objects",
        VQA(objects=True),
        ("vqa-objects", "vqa", "vqa_data"),
        _stems("vqa", "test"),
        answers=VQA_ANSWERS,
    ),
    PaperTask(
        "caption",
        Captioning(),
        ("caption", "caption_data"),
        _stems("caption", "test", train="stage1_train"),
    ),
    PaperTask("gigaword", Summarisation(), ("gigaword", "gigaword_data"), _stems("gigaword", "test", dev="dev")),
    PaperTask(
        "imagenet",
        ImageClassification(),
        ("imagenet", "imagenet_1k_data"),
        {"train": ("imagenet_1k_train",), "test": ("imagenet_1k_val",)},
        answers=("class2label_new.pkl", "classes.txt"),
    ),
    _images("food101", "food-101"),
    _images("caltech101", "caltech-101"),
    _images("dtd"),
    _images("eurosat"),
    _images("fgvc_aircraft"),
    _images("flowers102", "oxford_flowers"),
    _images("oxfordpets", "oxford_pets"),
    _images("stanford_cars"),
    _glue("cola", "CoLA", CoLA()),
    _glue("mnli", "MNLI", MNLI(), dev="dev_matched", hub_dev="validation_matched"),
    _glue("mrpc", "MRPC", MRPC()),
    _glue("qnli", "QNLI", QNLI()),
    _glue("qqp", "QQP", QQP()),
    _glue("rte", "RTE", RTE()),
    _glue("sst2", "SST-2", SST2()),
)
