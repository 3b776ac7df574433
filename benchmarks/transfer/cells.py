"""Cells: one figure each, in a file that is written whole or not at all, named by a digest of whatever changes the figure.

Processes share a folder through locks of the operating system: one that dies leaves none behind. A lock file holds the id of
the process that has it, for people to read.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pituning.example import Example
from pituning.experiments.cells import write_json


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
    """The cells of a work folder, one JSON file each.

    An *identity* is ``{"common": …, "cell": …}``: what all cells of a run share (its digest, the *environment*, names a
    sub-folder), and arm, task, shots, seed and data of one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

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
            return None
        return values if "value" in values and "identity" in values else None

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
        """Every whole cell of the folder, in the order of the files' names."""
        found = (self.read(path) for path in sorted(self.folder.glob("*/*.json")))
        return [cell for cell in found if cell is not None]
