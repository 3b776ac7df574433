"""A task: data splits, prompt, answers and metric. It knows nothing of models."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pituning.data.fewshot import draw_shots
from pituning.data.hub import load_hub_split, rows_from_dataset
from pituning.data.tables import SUFFIXES, Row, read_table, shortened
from pituning.errors import DataError, unknown_name
from pituning.example import Example

DATA_VARIABLE = "PITUNING_DATA"
SPLITS = ("train", "dev", "test")


@runtime_checkable
class Identified(Protocol):
    """Examples that know all their ids without being made."""

    def ids(self) -> list[str]:
        """The ids, in the examples' order."""
        ...


@dataclass(frozen=True)
class Task:
    """Examples by split, with the choices and the metric that belong to them.

    Attributes:
        name: registry name or a name of the user's own.
        choices: label texts in label order; empty for open-ended tasks.
        splits: ``train``, ``dev`` and ``test``; a few-shot task has no ``dev``: its shots include validation.
        metric: name of the metric that :func:`pituning.evaluate` reports first.
        shots: examples per class in ``train`` (for open-ended tasks, examples); ``None`` for full data.
        seed: seed of the few-shot draw.
        more_metrics: names of further metrics to report.
        generation: how free-form answers are searched, in transformers' words (``num_beams``, ``max_new_tokens`` …).
        submission: what an evaluation server calls an item and its answer.
        kind: what sort of task it is, in words that similar tasks share ("sentiment", "grounding"); the task graph is coloured
            by it.
    """

    name: str
    choices: tuple[str, ...]
    splits: Mapping[str, Sequence[Example]]
    metric: str = "accuracy"
    shots: int | None = None
    seed: int = 0
    more_metrics: tuple[str, ...] = ()
    generation: Mapping[str, Any] = field(default_factory=dict)
    submission: tuple[str, str] = ("id", "answer")
    kind: str = ""

    def split(self, name: str, limit: int | None = None) -> Sequence[Example]:
        """Examples of one split; ``limit`` takes a seeded, fixed sample of it.

        Raises:
            DataError: if there is no such split or it is empty.
        """
        if not self.splits.get(name):
            present = ", ".join(f"{k} ({len(v)})" for k, v in self.splits.items() if v) or "none"
            raise DataError(f"task {self.name!r} has no examples in split {name!r}; it has {present}")
        examples = self.splits[name]
        if limit is None or limit >= len(examples):
            return examples
        ids = examples.ids() if isinstance(examples, Identified) else [e.id for e in examples]
        order = sorted(range(len(ids)), key=lambda i: hashlib.sha256(ids[i].encode()).digest())
        return tuple(examples[i] for i in order[:limit])

    def few_shot(self, shots: int, seed: int = 0) -> Task:
        """The same task with ``shots`` labelled examples per class (or in all, where there are none) of the training split.

        The dev split is left out: shots include validation. Other splits stay.
        """
        drawn = draw_shots(self.split("train"), shots, seed)
        kept = {name: examples for name, examples in self.splits.items() if name not in ("train", "dev")}
        splits = {"train": drawn, "test": (), **kept}
        return replace(self, splits=splits, shots=shots, seed=seed)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{k} {len(v)}" for k, v in self.splits.items())
        answers = f"{len(self.choices)} choices" if self.choices else "open-ended"
        return f"Task({self.name!r}, {answers}, {sizes})"


@dataclass(frozen=True)
class TaskDefinition:
    """How a named task's files become examples.

    Attributes:
        labels: from the file's label value to the label text; the texts differ between tasks, so that transfer is not
            an artefact of shared label words.
        texts: the input columns, one or two.
        prompt: template over the input columns for generative backbones.
        hub: (path, name) in the `datasets` hub, used where no file is found; its columns and label values must agree.
        kind: see :attr:`Task.kind`.
    """

    name: str
    labels: Mapping[str, str]
    texts: tuple[str, ...] = ("text",)
    label: str = "label"
    prompt: str = "{text}"
    metric: str = "accuracy"
    hub: tuple[str, str | None] | None = None
    hub_splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train", "test": "test"})
    kind: str = "text classification"

    def __post_init__(self) -> None:
        if not 1 <= len(self.texts) <= 2:
            raise DataError(
                f"task {self.name!r}: expected one or two text columns, found {len(self.texts)} ({', '.join(self.texts)}): an "
                "encoder reads no more; join the texts in the file"
            )
        twice = [text for text in self.labels.values() if list(self.labels.values()).count(text) > 1]
        if twice:
            raise DataError(
                f"task {self.name!r}: two labels have the same text {twice[0]!r}; they could not be told apart"
            )

    @property
    def folders(self) -> tuple[str, ...]:
        """Where its files lie in a folder of data sets."""
        return (self.name,)

    def is_in(self, folder: Path) -> bool:
        """Whether a folder holds its files by names of their own; these files are called train, dev and test."""
        return False

    def examples(self, rows: Sequence[Row], split: str) -> tuple[Example, ...]:
        """Turn rows into examples.

        Raises:
            DataError: for a label outside the task's labels, with the row's place.
        """
        choices = tuple(self.labels.values())
        examples = []
        for number, (where, row) in enumerate(rows):
            if row[self.label] not in self.labels:
                known = ", ".join(self.labels)
                raise DataError(
                    f"{where}: label {shortened(row[self.label])!r} is not one of task {self.name!r}: {known}"
                )
            texts = tuple(row[c] for c in self.texts)
            prompt = self.prompt.format(**{c: row[c] for c in self.texts})
            target = self.labels[row[self.label]]
            examples.append(Example(f"{self.name}/{split}/{number}", texts, prompt, target, choices))
        return tuple(examples)

    def load(self, folder: Path | None) -> Task:
        """Read the splits from a folder, or from the hub where ``folder`` is ``None``."""
        columns = [*self.texts, self.label]
        splits: dict[str, tuple[Example, ...]] = {}
        if folder is not None:
            for split in SPLITS:
                files = [folder / f"{split}{s}" for s in SUFFIXES if (folder / f"{split}{s}").is_file()]
                if files:
                    splits[split] = self.examples(read_table(files[0], columns), split)
            if not splits:
                raise DataError(f"{folder} holds no train, dev or test file ({', '.join(SUFFIXES)})")
        elif self.hub is not None:
            for split, remote in self.hub_splits.items():
                splits[split] = self.examples(load_hub_split(*self.hub, remote, columns), split)
        return Task(self.name, tuple(self.labels.values()), splits, self.metric, kind=self.kind)


class Definition(Protocol):
    """A task known by name: where its files lie, and how they become a task."""

    @property
    def name(self) -> str:
        """What :func:`load_task` knows it by."""
        ...

    @property
    def folders(self) -> tuple[str, ...]:
        """Where its files lie in a folder of data sets; empty if it needs none."""
        ...

    @property
    def hub(self) -> tuple[str, str | None] | None:
        """Path and configuration in the `datasets` hub, if it is there."""
        ...

    def is_in(self, folder: Path) -> bool:
        """Whether a folder holds its files by names of their own."""
        ...

    def load(self, folder: Path | None) -> Task:
        """Read the splits from a folder, or from the hub where ``folder`` is ``None``."""
        ...


_REGISTRY: dict[str, Definition] = {}


def register_task(definition: Definition) -> Definition:
    """Make a task available by name."""
    _REGISTRY[definition.name] = definition
    return definition


def task_names() -> list[str]:
    """Names that :func:`load_task` knows."""
    _register_built_in()
    return sorted(_REGISTRY)


def load_task(name: str, *, shots: int | None = None, seed: int = 0, data: str | Path | None = None) -> Task:
    """Load a task by name.

    The files are looked for in ``data`` alone where it is given; otherwise in the folder that the environment variable
    PITUNING_DATA names, in ``../shared/data/text``, among the samples packaged for the demo, and by name through
    `datasets`. Each of these places holds one folder per task with ``train.tsv``, ``dev.tsv``, ``test.tsv`` (or .csv, .jsonl).

    Args:
        shots: labelled examples per class, validation included; ``None`` keeps the full data.
        seed: seed of the few-shot draw.

    Raises:
        UnknownNameError: if no task of that name is registered.
        DataError: if its data cannot be found or read.
    """
    _register_built_in()
    if name not in _REGISTRY:
        raise unknown_name("task", name, _REGISTRY, "Own data: pituning.task_from_files(...) or --train-file.")
    task = _REGISTRY[name].load(_find_folder(_REGISTRY[name], data))
    return task if shots is None else task.few_shot(shots, seed)


def task_from_files(
    name: str,
    files: Mapping[str, str | Path],
    labels: Mapping[str, str],
    *,
    texts: Sequence[str] = ("text",),
    label: str = "label",
    prompt: str | None = None,
) -> Task:
    """A task from the user's own files.

    Args:
        files: from split name (``train``, ``dev``, ``test``) to a TSV, CSV or JSONL file.
        labels: from the file's label value to a natural label text ("a positive review").
        texts: one or two input columns.
        prompt: template for generative backbones; the inputs one below the other by default.
    """
    template = prompt or "\n".join("{" + c + "}" for c in texts)
    definition = TaskDefinition(name, {str(k): v for k, v in labels.items()}, tuple(texts), label, template)
    columns = [*texts, label]
    splits = {split: definition.examples(read_table(Path(path), columns), split) for split, path in files.items()}
    return Task(name, tuple(definition.labels.values()), splits, kind=definition.kind)


def task_from_datasets(
    name: str,
    datasets: Mapping[str, Any],
    labels: Mapping[str, str],
    *,
    texts: Sequence[str] = ("text",),
    label: str = "label",
    prompt: str | None = None,
) -> Task:
    """A task from `datasets.Dataset` objects, one per split; arguments as in :func:`task_from_files`."""
    template = prompt or "\n".join("{" + c + "}" for c in texts)
    definition = TaskDefinition(name, {str(k): v for k, v in labels.items()}, tuple(texts), label, template)
    splits = {
        split: definition.examples(rows_from_dataset(data, [*texts, label], f"{name}:{split}"), split)
        for split, data in datasets.items()
    }
    return Task(name, tuple(definition.labels.values()), splits, kind=definition.kind)


def packaged_data() -> Path:
    """Folder of the samples that ship with the package."""
    return Path(__file__).parent.parent / "data" / "demo"


def _find_folder(definition: Definition, data: str | Path | None) -> Path | None:
    name = definition.name
    if not definition.folders:
        return None
    if data is not None:
        if found := _folder_in(definition, Path(data)):
            return found
        tried = " or ".join(str(Path(data) / folder) for folder in definition.folders)
        raise DataError(f"task {name!r}: there is no folder {tried}")
    places = [Path("../shared/data/text"), packaged_data()]
    if os.environ.get(DATA_VARIABLE):
        places.insert(0, Path(os.environ[DATA_VARIABLE]))
    for place in places:
        if found := _folder_in(definition, place):
            return found
    if definition.hub is None:
        looked = ", ".join(str(p / name) for p in places)
        raise DataError(
            f"task {name!r}: no data found (looked in {looked}); give --data FOLDER, or set {DATA_VARIABLE} to a folder "
            f"that holds {name}/train.tsv and {name}/test.tsv"
        )
    return None


def _folder_in(definition: Definition, place: Path) -> Path | None:
    """The folder with a task's files: one of its own names in a folder of data sets, or that folder itself."""
    named = [place / folder for folder in definition.folders if (place / folder).is_dir()]
    return named[0] if named else place if definition.is_in(place) else None


def _register_built_in() -> None:
    from pituning.tasks import demo, emoji, paper, sentence_pairs, text_classification

    definitions: tuple[Definition, ...] = (
        *text_classification.TASKS,
        *sentence_pairs.TASKS,
        *demo.TASKS,
        *paper.TASKS,
        *emoji.TASKS,
    )
    for definition in definitions:
        _REGISTRY.setdefault(definition.name, definition)
