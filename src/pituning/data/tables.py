"""Labelled rows from TSV, CSV and JSONL files; a broken row is reported with its file and line."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from pituning.errors import DataError

SUFFIXES = (".tsv", ".csv", ".jsonl")

Row = tuple[str, dict[str, str]]
"""Where the row comes from (``file:line``) and its columns."""


def read_table(path: Path, columns: Sequence[str] | None) -> list[Row]:
    """Read the named columns of a file, or all of them (``None``).

    TSV files have a header and no quoting; CSV files have a header and standard quoting; JSONL files hold one object a
    line. Encoding is UTF-8.

    Raises:
        DataError: names the file and the line of a row with the wrong number of columns, a missing column or bad JSON.
    """
    if not path.is_file():
        raise DataError(f"no such file: {path}")
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}")
    rows = []
    try:
        for line, values in _jsonl(path) if path.suffix == ".jsonl" else _delimited(path):
            missing = [c for c in columns or () if c not in values]
            if missing:
                raise DataError(f"{path}:{line}: no column {missing[0]!r}; the row has {', '.join(values) or 'none'}")
            rows.append((f"{path}:{line}", values if columns is None else {c: values[c] for c in columns}))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error})") from error
    except csv.Error as error:
        raise DataError(f"{path}: not a readable CSV file ({error})") from error
    return rows


def _delimited(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    # only \n ends a TSV line: a stray carriage return or form feed is part of a sentence
    with path.open(encoding="utf-8", newline="\n" if path.suffix == ".tsv" else "") as file:
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
                    f"{path}:{number}: expected {len(header)} columns ({', '.join(header)}), found {len(row)}"
                )
            yield number, dict(zip(header, row, strict=True))


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{number}: not a JSON object ({error.msg})") from error
            if not isinstance(values, dict):
                raise DataError(f"{path}:{number}: expected a JSON object, found {type(values).__name__}")
            yield number, {str(k): str(v) for k, v in values.items() if v is not None}
