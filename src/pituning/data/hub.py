"""Rows from the `datasets` library: hub data sets and in-memory `Dataset` objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pituning.data.tables import Row
from pituning.errors import DataError


def rows_from_dataset(dataset: Any, columns: Sequence[str], where: str) -> list[Row]:
    """The named columns of a ``datasets.Dataset``; integer class labels become their decimal text.

    Raises:
        DataError: if a column is missing.
    """
    missing = [c for c in columns if c not in dataset.column_names]
    if missing:
        raise DataError(f"{where}: no column {missing[0]!r}; there are {', '.join(dataset.column_names)}")
    rows = []
    for index, row in enumerate(dataset.select_columns(list(columns))):
        empty = [c for c in columns if row[c] is None]
        if empty:
            raise DataError(f"{where}[{index}]: column {empty[0]!r} is empty")
        rows.append((f"{where}[{index}]", {c: str(row[c]) for c in columns}))
    return rows


def fetch_hub_split(path: str, name: str | None, split: str) -> tuple[Any, str]:
    """Download (or take from the cache) one split of a hub data set; the second value is what a message calls it.

    Raises:
        DataError: if it cannot be fetched, with the reason.
    """
    import datasets

    where = f"{path}{'/' + name if name else ''}:{split}"
    try:
        return datasets.load_dataset(path, name, split=split), where
    except Exception as error:  # the library raises a dozen unrelated types for "cannot be fetched"
        raise DataError(f"{where} could not be fetched through `datasets`: {type(error).__name__}: {error}") from error


def load_hub_split(path: str, name: str | None, split: str, columns: Sequence[str]) -> list[Row]:
    """The named columns of one split of a hub data set.

    Raises:
        DataError: if it cannot be fetched, or lacks a column.
    """
    dataset, where = fetch_hub_split(path, name, split)
    return rows_from_dataset(dataset, columns, where)
