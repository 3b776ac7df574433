"""A kind of task: how one row of a data set, wherever it is stored, becomes an example.

Rows come from OFA's TSV files, tables with a header, or `datasets` (:mod:`pituning.data.records`). Examples are made when
they are asked for, so that a file of 100 GB is opened in an instant and read by index.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal, overload

from pituning.data.records import Records
from pituning.data.tables import listed_columns, shortened
from pituning.errors import DataError, unknown_name
from pituning.example import DecoderPrompt, Example
from pituning.tasks.task import Task

PromptType = Literal["none", "src", "prev_output"]
"""OFA's names for what its decoder reads before the answer: nothing, the source, the source without its end symbol."""

DECODER_PROMPTS: Mapping[str, DecoderPrompt] = MappingProxyType(
    {"none": "none", "src": "source", "prev_output": "source_without_end"}
)


@dataclass(frozen=True)
class Kind(ABC):
    """A kind of task, with its settings.

    Attributes:
        columns: logical column → its place in the TSV files of OFA's own data (as in ``--selected-cols``).
        optional: columns that a source may lack.
        aliases: other names that a logical column has in tables with a header and in `datasets`.
        metrics: names of the metrics, the first of which is the task's own.
        generation: how free-form answers are searched, in transformers' words.
        submission: what an evaluation server calls an item and its answer.
        title: see :attr:`pituning.tasks.Task.kind`.
    """

    title: ClassVar[str] = ""
    columns: ClassVar[Mapping[str, int]]
    optional: ClassVar[frozenset[str]] = frozenset()
    aliases: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({})
    metrics: ClassVar[tuple[str, ...]]
    generation: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    submission: ClassVar[tuple[str, str]] = ("id", "answer")

    @property
    def choices(self) -> tuple[str, ...]:
        """The closed answer set; empty for open-ended kinds."""
        return ()

    @abstractmethod
    def example(self, records: Records, row: int, identifier: str) -> Example:
        """One row as an example.

        Raises:
            DataError: names the place of a row that cannot be used.
        """

    def missing(self, columns: Collection[str]) -> list[str]:
        """The logical columns that a source needs and lacks."""
        return [c for c in self.columns if c not in columns and c not in self.optional]

    def positions(self, row: Sequence[str]) -> Mapping[str, int]:
        """Logical column → its place in a TSV file without a header, of which this is the first row: OFA's layout."""
        return self.columns

    def task(self, name: str, splits: Mapping[str, Records]) -> Task:
        """A task whose splits are read from these rows when they are needed.

        Raises:
            DataError: if a split lacks a column.
        """
        for split, records in splits.items():
            if missing := self.missing(records.columns()):
                raise DataError(
                    f"task {name!r}, split {split!r}: no column {missing[0]!r}; there are {listed_columns(records.columns())}"
                )
        return Task(
            name,
            self.choices,
            {split: LazyExamples(self, records, f"{name}/{split}") for split, records in splits.items()},
            self.metrics[0],
            more_metrics=self.metrics[1:],
            generation=self.generation,
            submission=self.submission,
            kind=self.title,
        )


@dataclass(frozen=True)
class LazyExamples(Sequence[Example]):
    """Examples of one split, each made from its row when it is asked for; the row's number ends its id."""

    kind: Kind
    records: Records = field(repr=False)
    prefix: str

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Example, ...]: ...
    def __getitem__(self, index: int | slice) -> Example | tuple[Example, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        row = index + len(self) if index < 0 else index
        if not 0 <= row < len(self):
            raise IndexError(f"{self.prefix} has {len(self)} examples, no number {index}")
        return self.kind.example(self.records, row, f"{self.prefix}/{row}")

    def ids(self) -> list[str]:
        """The ids of all examples, without making them."""
        return [f"{self.prefix}/{row}" for row in range(len(self))]


def decoder_prompt(prompt_type: str) -> DecoderPrompt:
    """What an example calls OFA's ``--prompt-type``.

    >>> decoder_prompt("prev_output")
    'source_without_end'

    Raises:
        UnknownNameError: for a prompt type that OFA does not have.
    """
    if prompt_type not in DECODER_PROMPTS:
        raise unknown_name("prompt type", prompt_type, DECODER_PROMPTS)
    return DECODER_PROMPTS[prompt_type]


def filled(records: Records, row: int, column: str) -> str:
    """A text that must not be empty, without the spaces around it.

    Raises:
        DataError: names the place of an empty one.
    """
    text = records.text(row, column).strip()
    if not text:
        raise DataError(f"{records.place(row, column)}: the {column} is empty")
    return text


def key_of(records: Records, row: int) -> str:
    """What the data's own evaluation calls a row; empty where the source does not say."""
    return records.text(row, "key") if "key" in records.columns() else ""


def label_text(labels: Mapping[str, str], records: Records, row: int, column: str = "label") -> str:
    """The answer that a label value stands for; empty where the row has no label.

    Raises:
        DataError: names the place of a value that is no label.
    """
    value = records.text(row, column).strip()
    if value and value not in labels:
        known = ", ".join(labels)
        raise DataError(f"{records.place(row, column)}: label {shortened(value)!r} is not one of {known}")
    return labels[value] if value else ""
