"""Rows of a data set by logical column, whatever it is stored in; nothing is read before it is asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pituning.data.tables import Row, joined_text, listed_columns
from pituning.errors import DataError
from pituning.example import ImageSource, LazyImage

if TYPE_CHECKING:
    from pituning.data.tsv import TsvFile


class Records(ABC):
    """Rows by number and column by name."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Logical names of the columns that are there."""

    @abstractmethod
    def text(self, row: int, column: str) -> str:
        """A text; a list of texts is joined by :data:`~pituning.data.tables.JOINT`.

        Raises:
            DataError: if there is no such column, or the cell is no text; with its place.
        """

    @abstractmethod
    def image(self, row: int, column: str) -> ImageSource:
        """A picture, which is read when it is opened."""

    @abstractmethod
    def place(self, row: int, column: str | None = None) -> str:
        """Where a row or cell is, for messages."""

    def require(self, column: str) -> None:
        """Raise unless the column is there."""
        if column not in self.columns():
            raise DataError(
                f"{self.place(0)}: there is no column {column!r}; there are {listed_columns(self.columns())}"
            )


@dataclass(frozen=True)
class TsvRecords(Records):
    """Rows of a TSV file.

    Attributes:
        positions: logical column → its place in the file.
        first: the first row that counts; 1 where the file has a header.
    """

    file: TsvFile
    positions: Mapping[str, int]
    first: int = 0

    def __len__(self) -> int:
        return len(self.file) - self.first

    def columns(self) -> tuple[str, ...]:
        """See :meth:`Records.columns`."""
        return tuple(self.positions)

    def text(self, row: int, column: str) -> str:
        """See :meth:`Records.text`."""
        return self.file.cell(self._row(row), self._position(column))

    def image(self, row: int, column: str) -> ImageSource:
        """See :meth:`Records.image`: the bytes that the base64 cell stands for."""
        position = self._position(column)
        return LazyImage(self.place(row, column), partial(self.file.image, self._row(row), position))

    def place(self, row: int, column: str | None = None) -> str:
        """See :meth:`Records.place`."""
        if column is None:
            return self.file.place(row + self.first)
        return f"{self.file.place(row + self.first, self._position(column))} ({column})"

    def _row(self, row: int) -> int:
        """Row of the file; the header is none."""
        if not 0 <= row < len(self):
            raise IndexError(f"{self.file.path} has {len(self)} rows, no number {row}")
        return row + self.first

    def _position(self, column: str) -> int:
        self.require(column)
        return self.positions[column]


@dataclass(frozen=True)
class TableRecords(Records):
    """Rows that are in memory; pictures are paths relative to a folder."""

    rows: Sequence[Row]
    folder: Path

    def __len__(self) -> int:
        return len(self.rows)

    def columns(self) -> tuple[str, ...]:
        """See :meth:`Records.columns`."""
        return self._columns

    @cached_property
    def _columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(column for _, values in self.rows for column in values))

    def text(self, row: int, column: str) -> str:
        """See :meth:`Records.text`."""
        values = self.rows[row][1]
        if column not in values:
            raise DataError(f"{self.place(row)}: no column {column!r}; the row has {listed_columns(values) or 'none'}")
        return values[column]

    def image(self, row: int, column: str) -> ImageSource:
        """See :meth:`Records.image`."""
        path = self.text(row, column)
        if not path.strip():
            raise DataError(f"{self.place(row, column)} is empty")
        return self.folder / path

    def place(self, row: int, column: str | None = None) -> str:
        """See :meth:`Records.place`."""
        return self.rows[row][0] if column is None else f"{self.rows[row][0]} ({column})"


@dataclass(frozen=True)
class DatasetRecords(Records):
    """Rows of a ``datasets.Dataset``.

    A class label is given by its *name*: its number means different things in different copies of a data set. A label of −1,
    which stands for none, is an empty text. Pictures are an ``Image`` feature, and reading a text decodes none of them.

    Args:
        names: logical column → the dataset's.
        where: what a message calls the data set.

    Raises:
        DataError: if a column is missing.
    """

    dataset: Any
    names: Mapping[str, str]
    where: str
    _plain: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        import datasets

        missing = [name for name in self.names.values() if name not in self.dataset.column_names]
        if missing:
            raise DataError(f"{self.where}: no column {missing[0]!r}; there are {', '.join(self.dataset.column_names)}")
        plain = self.dataset.select_columns(list(dict.fromkeys(self.names.values())))
        for name, feature in plain.features.items():
            if isinstance(feature, datasets.Image):
                plain = plain.cast_column(name, datasets.Image(decode=False))
        object.__setattr__(self, "_plain", plain)

    def __len__(self) -> int:
        return len(self.dataset)

    def columns(self) -> tuple[str, ...]:
        """See :meth:`Records.columns`."""
        return tuple(self.names)

    def text(self, row: int, column: str) -> str:
        """See :meth:`Records.text`."""
        import datasets

        value, feature = self._value(row, column), self._plain.features[self.names[column]]
        if isinstance(feature, datasets.ClassLabel):
            return "" if value == -1 else str(feature.int2str(value))
        return joined_text(value, self.place(row, column))

    def image(self, row: int, column: str) -> ImageSource:
        """See :meth:`Records.image`."""
        self.require(column)
        return LazyImage(self.place(row, column), partial(self._picture, row, column))

    def place(self, row: int, column: str | None = None) -> str:
        """See :meth:`Records.place`."""
        return f"{self.where}[{row}]" if column is None else f"{self.where}[{row}] ({column})"

    def _picture(self, row: int, column: str) -> bytes | str:
        value = self._value(row, column)
        stored = (value.get("bytes") or value.get("path")) if isinstance(value, dict) else value
        if not isinstance(stored, bytes | str):
            raise DataError(
                f"{self.place(row, column)}: expected a picture (an Image feature), found {type(value).__name__}"
            )
        return stored

    def _value(self, row: int, column: str) -> Any:
        self.require(column)
        value = self._by_column[self.names[column]][row][self.names[column]]
        if value is None:
            raise DataError(f"{self.place(row, column)} is empty")
        return value

    @cached_property
    def _by_column(self) -> Mapping[str, Any]:
        """One view for each column, so that reading a text does not touch a picture."""
        return {name: self._plain.select_columns([name]) for name in self._plain.column_names}
