"""Cells: one figure each, in a file that is written whole or not at all, named by a digest of whatever changes the figure.

Processes share a folder through locks of the operating system: one that dies leaves none behind. A lock file holds the id of
the process that has it, for people to read.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pituning.errors import PituningError
from pituning.example import Example
from pituning.experiments.cells import write_json

REVISION = 3
"""To be raised with every change to the arms that changes a figure: cells of an earlier one are not used again."""


def digest(values: Any) -> str:
    """16 hexadecimal digits of SHA-256 over plain values.

    >>> digest({"a": 1, "b": (2, 3)}) == digest({"b": [2, 3], "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(values, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def digest_examples(examples: Sequence[Example]) -> str:
    """Digest of what examples ask and answer; pictures take part by the examples' ids alone."""
    return digest([(e.id, e.texts, e.prompt, e.target, e.choices, e.answers) for e in examples])


@contextmanager
def claimed(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold a lock file for the length of the block.

    Args:
        wait: until another process lets go of it; otherwise the block gets ``False`` where another one holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield True


class Cells:
    """The cells of a work folder, one JSON file each, and those that a Parquet file keeps of other folders.

    An *identity* is ``{"common": …, "cell": …}``: what all cells of a run share (its digest, the *environment*, names a
    sub-folder), and arm, task, shots, seed and data of one.

    Args:
        kept: a file of :func:`write_parquet`, read once; it may be missing. A cell of the folder goes before one of the file.
    """

    def __init__(self, folder: Path, kept: Path | None = None) -> None:
        self.folder = folder
        found = read_parquet(kept) if kept is not None and kept.is_file() else []
        self.kept = {self.path(cell["identity"]): cell for cell in found}

    def path(self, identity: Mapping[str, Any]) -> Path:
        """Where the cell of an identity is, or will be."""
        cell = identity["cell"]
        name = f"{cell['arm']['name']}.{cell['task']}.{cell['shots']}.{cell['seed']}.{digest(identity)}.json"
        return self.folder / digest(identity["common"]) / name

    def read(self, path: Path) -> dict[str, Any] | None:
        """A cell; ``None`` where there is none, or its file is broken."""
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
            return self.kept.get(path)
        return values if "value" in values and "identity" in values else self.kept.get(path)

    @contextmanager
    def claimed(self, path: Path) -> Iterator[bool]:
        """Claim a cell for the length of the block; ``False`` where another process computes it."""
        with claimed(path.parent / "locks" / f"{path.stem}.lock") as mine:
            yield mine

    def write(self, path: Path, values: Mapping[str, Any]) -> None:
        """Write a cell whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, values)

    def all(self) -> list[dict[str, Any]]:
        """Every whole cell, in the order of their names."""
        found = (self.read(path) for path in sorted({*self.folder.glob("*/*.json"), *self.kept}))
        return [cell for cell in found if cell is not None]


_TEXTS = ("arm", "task", "metric", "chosen", "code", "pool", "finished")
_COUNTS = ("shots", "seed", "examples", "steps")
_NUMBERS = ("value", "log_loss", "seconds", "seconds_alone", "seconds_of_test", "learning_rate")
_LISTS = ("experts", "needs")
_PLAIN = ("identity", "weights", "details")
"""Columns that hold JSON."""


def write_parquet(
    cells: Iterable[Mapping[str, Any]], path: Path, more: Callable[[Mapping[str, Any]], Mapping[str, str]]
) -> None:
    """One row for each cell, whole: :func:`read_parquet` gives the same cells.

    Args:
        more: texts about a cell for columns of their own, which are not read back.
    """
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    names = (*_TEXTS, *_COUNTS, *_NUMBERS, *_LISTS)
    rows = [
        {**{k: cell[k] for k in names}, **{k: json.dumps(cell[k], sort_keys=True) for k in _PLAIN}, **more(cell)}
        for cell in cells
    ]
    kinds = {
        pa.string(): (*_TEXTS, *_PLAIN),
        pa.int64(): _COUNTS,
        pa.float64(): _NUMBERS,
        pa.list_(pa.string()): _LISTS,
    }
    types = {name: kind for kind, named in kinds.items() for name in named}
    order = list(rows[0]) if rows else list(types)
    schema = pa.schema([(name, types.get(name, pa.string())) for name in order])
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    pq.write_table(pa.Table.from_pylist(rows, schema), part)
    part.replace(path)


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """The cells of a file of :func:`write_parquet`.

    Raises:
        PituningError: if it is not a whole Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = [*_TEXTS, *_COUNTS, *_NUMBERS, *_LISTS, *_PLAIN]
    try:
        rows = pq.read_table(path, columns=names).to_pylist()
    except pa.ArrowInvalid as error:
        raise PituningError(f"{path} cannot be read as the cells of a suite: {error}") from error
    return [{**row, **{k: json.loads(row[k]) for k in _PLAIN}} for row in rows]
