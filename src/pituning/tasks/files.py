"""From the files that people have on disk to the rows of a kind of task."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pituning.data.records import DatasetRecords, Records, TableRecords, TsvRecords
from pituning.data.tables import Row, joined_text, listed_columns, read_rows, shortened
from pituning.errors import DataError
from pituning.tasks.image_classification import class_name
from pituning.tasks.kind import Kind

PARQUET = ".parquet"
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"})
IMAGE_SPLITS = {"train": ("train",), "dev": ("dev", "val", "valid", "validation"), "test": ("test",)}


def records_from_file(path: str | Path, kind: Kind) -> Records:
    """The rows of a file for a kind of task.

    Args:
        path: a TSV in OFA's layout, without a header, or with a header that names the kind's columns, in either case
            read by index and never as a whole; a CSV or JSONL file whose image column holds paths relative to the
            file's folder; or a Parquet file.

    Raises:
        DataError: if the file cannot be read or lacks a column.
    """
    from pituning.data.tsv import TsvFile  # numpy is not needed to know a task's name

    path = Path(path)
    if not path.is_file():
        raise DataError(f"no such file: {path}")
    if path.suffix == PARQUET:
        return _from_parquet(path, kind)
    if path.suffix in (".csv", ".jsonl"):
        return _from_table(path, kind)
    file = TsvFile(path)
    first = [cell.removeprefix("\ufeff") for cell in file.cells(0, range(file.column_count))]
    names = _named(kind, first)
    if not (missing := kind.missing(names)):
        return TsvRecords(file, {c: first.index(n) for c, n in names.items()}, first=1)
    if names:
        raise DataError(
            f"{path}:1: a header with {listed_columns(names.values())}, but without a column for {', '.join(missing)}: "
            f"it has {listed_columns(first)}; {_names_of(kind)}. If it is a row, put a header above it"
        )
    positions = {c: p for c, p in kind.positions(first).items() if p < file.column_count}
    _require(kind, positions, path, f"{file.column_count} columns")
    return TsvRecords(file, positions)


def records_from_dataset(dataset: Any, kind: Kind, where: str) -> Records:
    """The rows of a ``datasets.Dataset`` for a kind of task; its pictures are an ``Image`` feature.

    Raises:
        DataError: if a column is missing.
    """
    names = _named(kind, tuple(dataset.column_names))
    _require(kind, names, where, f"the columns {listed_columns(dataset.column_names)}")
    return DatasetRecords(dataset, names, where)


def image_folder(folder: Path) -> dict[str, Records]:
    """Splits of pictures in class folders: ``train/apple_pie/1.jpg``, ``val/…``, ``test/…``.

    Raises:
        DataError: if there is no such picture.
    """
    splits = {}
    for split, names in IMAGE_SPLITS.items():
        for name in names:
            rows = [
                (str(path), {"image": str(path.relative_to(folder)), "label": path.parent.name})
                for path in sorted((folder / name).glob("*/*"))
                if path.suffix.lower() in IMAGE_SUFFIXES
            ]
            if rows:
                splits[split] = TableRecords(rows, folder)
                break
    if not splits:
        raise DataError(f"{folder}: found no picture such as {folder / 'train' / 'some_class' / '1.jpg'}")
    return dict(splits)


def coop_split(path: Path) -> dict[str, Records]:
    """Splits of a CoOp file (``split_zhou_Food101.json``): lists of picture, label number and class name.

    The pictures lie in the file's folder or in a folder of it, up to two levels down.

    Raises:
        DataError: if the file is not one of CoOp's, or the first picture cannot be found.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    splits: dict[str, Records] = {}
    for split, name in (("train", "train"), ("dev", "val"), ("test", "test")):
        rows: list[Row] = []
        items = content.get(name, []) if isinstance(content, dict) else None
        if not isinstance(items, list):
            raise DataError(f"{path}: expected an object with the lists train, val and test")
        for number, item in enumerate(items):
            place = f"{path}: {name}[{number}]"
            if not isinstance(item, list) or len(item) != 3:
                raise DataError(f"{place}: expected [picture, label number, class name], found {shortened(repr(item))}")
            rows.append((place, {"image": str(item[0]), "label": str(item[2])}))
        if rows:
            splits[split] = TableRecords(rows, _root_of(path.parent, rows[0][1]["image"], rows[0][0]))
    if not splits:
        raise DataError(f"{path}: expected an object with the lists train, val and test")
    return splits


def aircraft_split(folder: Path) -> dict[str, Records]:
    """Splits of FGVC-Aircraft as published: ``images_variant_train.txt`` … with a picture and its variant per line."""
    splits: dict[str, Records] = {}
    for split, name in (("train", "train"), ("dev", "val"), ("test", "test")):
        path = folder / f"images_variant_{name}.txt"
        if not path.is_file():
            continue
        rows: list[Row] = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            image, _, variant = line.partition(" ")
            if not variant.strip():
                raise DataError(f"{path}:{number}: expected a picture and its variant, found {shortened(line)!r}")
            rows.append((f"{path}:{number}", {"image": f"images/{image}.jpg", "label": variant.strip()}))
        splits[split] = TableRecords(rows, folder)
    return splits


def classes_of(splits: Mapping[str, Records], column: str = "label") -> tuple[str, ...]:
    """Names of the classes that occur in any split, in alphabetical order."""
    return tuple(sorted({class_name(r.text(row, column)) for r in splits.values() for row in range(len(r))} - {""}))


def read_answer_set(path: str | Path) -> tuple[str, ...]:
    """Answers in the order of their numbers.

    Args:
        path: OFA's ``trainval_ans2label.pkl`` or ``class2label_new.pkl`` (a dictionary of text → number; a pickle that
            asks for anything else is refused, and no code of it runs), a JSON dictionary or list, or a text file with one
            answer a line.

    Raises:
        DataError: if it is none of these, or an answer is there twice.
    """
    path = Path(path)
    try:
        if path.suffix == ".pkl":
            with path.open("rb") as file:
                content = _PlainUnpickler(file).load()
        elif path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
        else:
            content = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError, EOFError, IndexError, KeyError, AttributeError, pickle.UnpicklingError) as error:
        raise DataError(f"{path} cannot be read as an answer set: {error}") from error
    if isinstance(content, dict):
        if not all(isinstance(k, str) and isinstance(v, int) for k, v in content.items()):
            raise DataError(f"{path}: expected answers with their numbers, text → number")
        content = sorted(content, key=content.__getitem__)
    if not isinstance(content, list) or not content or not all(isinstance(a, str) and a.strip() for a in content):
        raise DataError(f"{path}: expected a list of answers, none of them empty")
    answers = tuple(a.strip() for a in content)
    if len(set(answers)) < len(answers):
        twice = next(a for i, a in enumerate(answers) if a in answers[:i])
        raise DataError(f"{path}: the answer {twice!r} is there twice")
    return answers


class _PlainUnpickler(pickle.Unpickler):
    """Reads dictionaries, lists, text and numbers; a pickle that names a class or function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only text and numbers are expected")


def _from_table(path: Path, kind: Kind) -> Records:
    rows = list(read_rows(path))
    found = tuple(dict.fromkeys(column for _, values in rows for column in values))
    names = _named(kind, found)
    _require(kind, names, path, f"the columns {listed_columns(found)}" if rows else "no rows")
    read: list[Row] = []
    for line, values in rows:
        place = f"{path}:{line}"
        texts = {c: joined_text(values[n], f"{place} ({n})") for c, n in names.items() if n in values}
        read.append((place, {**{c: "" for c in names if c in kind.optional}, **texts}))
    return TableRecords(read, path.parent)


def _from_parquet(path: Path, kind: Kind) -> Records:
    import datasets

    try:
        dataset = datasets.load_dataset("parquet", data_files=str(path), split="train")
    except Exception as error:  # the library raises a dozen unrelated types for a broken file
        raise DataError(f"{path} is not a readable Parquet file ({type(error).__name__}: {error})") from error
    return records_from_dataset(dataset, kind, str(path))


def _named(kind: Kind, names: Sequence[str]) -> dict[str, str]:
    """Logical column → the name that a source has for it."""
    return {
        column: found
        for column in kind.columns
        if (found := next((n for n in (column, *kind.aliases.get(column, ())) if n in names), None)) is not None
    }


def _require(kind: Kind, found: Mapping[str, Any], where: str | Path, there: str) -> None:
    if not (missing := kind.missing(found)):
        return
    layout = ", ".join(f"{c} ({p})" for c, p in sorted(kind.columns.items(), key=lambda item: item[1]))
    raise DataError(
        f"{where}: no column for {', '.join(missing)}: found {there}. A TSV without a header needs OFA's layout: "
        f"{layout}, counted from 0; {_names_of(kind)}"
    )


def _names_of(kind: Kind) -> str:
    names = ("/".join((c, *kind.aliases.get(c, ()))) for c in kind.columns)
    return f"a file with a header needs the names {', '.join(names)}"


def _root_of(folder: Path, image: str, place: str) -> Path:
    for pattern in (".", "*", "*/*"):
        for root in [folder] if pattern == "." else sorted(folder.glob(pattern)):
            if (root / image).is_file():
                return root
    raise DataError(f"{place}: there is no picture {image} in {folder} or in its folders")
