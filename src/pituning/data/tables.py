"""Labelled rows from TSV, CSV and JSONL files; a broken row is reported with its file and line."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pituning.errors import DataError

SUFFIXES = (".tsv", ".csv", ".jsonl")
JOINT = "&&"
"""Stands between the parts of a text that a data set keeps as a list, as in OFA's files."""

SHOWN = 40  # characters of a cell that is too long for a message

Row = tuple[str, dict[str, str]]
"""Where the row comes from (``file:line``) and its columns."""


def read_table(path: Path, columns: Sequence[str]) -> list[Row]:
    """Read the named columns of a file.

    TSV files have a header and no quoting; CSV files have a header and standard quoting; JSONL files hold one object a
    line, and a list of texts in it is joined by :data:`JOINT`. Encoding is UTF-8, with or without a byte order mark.

    Raises:
        DataError: names the file and the line of a row with the wrong number of columns, a missing column, a value that is no
            text, or bad JSON.
    """
    rows = []
    for line, values in read_rows(path):
        missing = [c for c in columns if c not in values]
        if missing:
            raise DataError(f"{path}:{line}: no column {missing[0]!r}; the row has {listed_columns(values) or 'none'}")
        rows.append((f"{path}:{line}", {c: joined_text(values[c], f"{path}:{line} ({c})") for c in columns}))
    return rows


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """All rows of a file with their lines, each with those columns that it has; in JSONL their values may be anything.

    Raises:
        DataError: names the file and the line of a row with the wrong number of columns, or bad JSON.
    """
    if not path.is_file():
        raise DataError(f"no such file: {path}")
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}")
    try:
        yield from _jsonl(path) if path.suffix == ".jsonl" else _delimited(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error})") from error
    except csv.Error as error:
        raise DataError(f"{path}: not a readable CSV file ({error})") from error


def first_columns(path: Path) -> tuple[str, ...]:
    """Names of the columns that a file begins with: its header, or the keys of the first object of JSONL; empty without."""
    if not path.is_file() or path.suffix not in SUFFIXES:
        return ()
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        if path.suffix == ".csv":
            csv.field_size_limit(2**31 - 1)
            return tuple(next(csv.reader(file), ()))
        first = next((line for line in file if line.strip()), "")
    if path.suffix == ".tsv":
        return tuple(first.rstrip("\r\n").split("\t"))
    try:
        values = json.loads(first)
    except json.JSONDecodeError:
        return ()
    return tuple(values) if isinstance(values, dict) else ()


def shortened(cell: str) -> str:
    """A cell as a message shows it: it may be a picture.

    >>> shortened("x" * 40_000)
    'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx… (40,000 characters)'
    """
    return cell if len(cell) <= 2 * SHOWN else f"{cell[:SHOWN]}… ({len(cell):,} characters)"


def listed_columns(names: Iterable[str]) -> str:
    """Names of columns as a message lists them."""
    return ", ".join(map(shortened, names))


def joined_text(value: Any, place: str) -> str:
    """A value as a text; a list of texts is joined by :data:`JOINT`.

    Raises:
        DataError: names the place of a value that is none.
    """
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else [value]
    # VQAv2 keeps an annotator's answer with how sure they were
    parts = [p["answer"] if isinstance(p, dict) and "answer" in p else p for p in parts]
    for part in parts:
        if part is None:
            raise DataError(f"{place} is empty in part")
        if isinstance(part, dict | list | bytes):
            raise DataError(f"{place}: expected a text, found {type(part).__name__}")
    return JOINT.join(str(p) for p in parts)


def _delimited(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    # only \n ends a TSV line: a stray carriage return or form feed is part of a sentence
    with path.open(encoding="utf-8-sig", newline="\n" if path.suffix == ".tsv" else "") as file:
        if path.suffix == ".tsv":
            cells: Iterator[list[str]] = (line.rstrip("\r\n").split("\t") for line in file)
        else:
            csv.field_size_limit(2**31 - 1)  # documents are longer than the default of 128 kB
            reader = cells = csv.reader(file)
        header = next(cells, None)
        if header is None:
            raise DataError(f"{path}:1: the file is empty; expected a header line")
        for number, row in enumerate(cells, start=2):
            if path.suffix == ".csv":
                number = reader.line_num  # a quoted cell may span lines
            if len(row) != len(header):
                raise DataError(
                    f"{path}:{number}: expected {len(header)} columns ({listed_columns(header)}), found {len(row)}"
                )
            yield number, dict(zip(header, row, strict=True))


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{number}: not a JSON object ({error.msg})") from error
            if not isinstance(values, dict):
                raise DataError(f"{path}:{number}: expected a JSON object, found {type(values).__name__}")
            yield number, {k: v for k, v in values.items() if v is not None}
