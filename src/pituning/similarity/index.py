"""The index of a pool: one file with the cards' searchable fields and, per reference point, a matrix of compact embeddings.

It is derived from the experts' folders: where it is missing, damaged or of another version it is made again.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
from numpy.typing import NDArray

from pituning.errors import ExpertError
from pituning.experts.expert import CARD_FILE, CONFIG_FILE, TENSOR_FILE, ExpertCard, file_hash, read_card
from pituning.experts.pool import ExpertPool
from pituning.similarity.compact import BYTES, Compact

if TYPE_CHECKING:
    from pituning.similarity.embedding import TaskEmbedding

INDEX_FILE = ".index.safetensors"
EMBEDDING_FILES = {"own": "task_embedding.safetensors", "shared": "task_embedding.shared.safetensors"}
_VERSION = 2
_FILES = (CARD_FILE, CONFIG_FILE, TENSOR_FILE, *EMBEDDING_FILES.values())


@dataclass(frozen=True)
class Entry:
    """What the index holds of one expert.

    Attributes:
        card: without choices and training; None where it cannot be read.
        stamps: of each of its files: size in bytes, time of the last change in nanoseconds, inode.
        digest: hash over the contents of its files.
        spaces: reference point → hash of what embeddings must share to be compared: backbone, reference, tensors.
        problem: what is wrong with its files; empty if nothing is.
    """

    name: str
    card: ExpertCard | None
    stamps: Mapping[str, list[int]]
    digest: str
    spaces: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class PoolIndex:
    """The searchable index of a pool; :func:`open_index` reads or makes it.

    Attributes:
        entries: in the order of the names.
        vectors: reference point → compact embeddings, uint8 ``[expert, 1024]``; zeros where there is none.
        spaces: reference point → the entries' spaces ``[expert]``; empty strings where there is no embedding.
        read: how many experts had to be read for it.
        saved: whether it is stored in the pool; not if the folder cannot be written.
    """

    folder: Path
    entries: tuple[Entry, ...]
    vectors: Mapping[str, Compact]
    spaces: Mapping[str, NDArray[np.str_]]
    read: int
    saved: bool

    @property
    def problems(self) -> dict[str, str]:
        """The broken experts, and what is wrong with each."""
        return {entry.name: entry.problem for entry in self.entries if entry.problem}


def open_index(pool: ExpertPool) -> PoolIndex:
    """The index of a pool, brought up to date and stored.

    Only experts with a new or changed file are read. A file whose size, time and inode are as before is taken to be as it
    was; any other is compared by its hash. A broken expert is in the index with what is wrong with it.
    """
    path = pool.folder / INDEX_FILE
    known, old = _read_index(path)
    names = pool.names()
    vectors = {reference: np.zeros((len(names), BYTES), np.uint8) for reference in EMBEDDING_FILES}
    entries: list[Entry] = []
    read = 0
    for row, name in enumerate(names):
        before, place = known.get(name, (None, -1))
        entry = _still_valid(before, pool.folder / name)
        if entry is not None:
            compact = {reference: old[reference][place] for reference in entry.spaces}
        else:
            entry, compact = _read_expert(pool.folder / name)
            read += 1
        entries.append(entry)
        for reference, vector in compact.items():
            vectors[reference][row] = vector
    spaces = {r: np.array([e.spaces.get(r, "") for e in entries], dtype=np.str_) for r in EMBEDDING_FILES}
    unchanged = path.is_file() and entries == [entry for entry, _ in known.values()]
    return PoolIndex(
        pool.folder, tuple(entries), vectors, spaces, read, saved=unchanged or _save(path, entries, vectors)
    )


def _still_valid(before: Entry | None, folder: Path) -> Entry | None:
    """The stored entry, if the files are as they were."""
    if before is None:
        return None
    stamps = _stamps(folder)
    if before.stamps == stamps:
        return before
    return replace(before, stamps=stamps) if before.digest == _digest(folder) else None


def _read_expert(folder: Path) -> tuple[Entry, dict[str, Compact]]:
    """An expert's entry and its compact embeddings, or what is wrong with it."""
    from pituning.similarity.embedding import TaskEmbedding

    entry = Entry(folder.name, None, _stamps(folder), _digest(folder))
    vectors: dict[str, Compact] = {}
    spaces: dict[str, str] = {}
    try:
        entry = replace(entry, card=replace(read_card(folder), choices=(), training={}))
        assert entry.card is not None
        for reference, file in EMBEDDING_FILES.items():
            if (folder / file).is_file():
                embedding = TaskEmbedding.load(folder, reference)
                vectors[reference] = _compact(embedding, folder / file)
                spaces[reference] = _space(embedding, entry.card)
    except ExpertError as error:
        entry = replace(entry, problem=str(error))
    return replace(entry, spaces=spaces), vectors


def _compact(embedding: TaskEmbedding, path: Path) -> Compact:
    """From the tensors themselves, whatever the file's header says."""
    if not embedding.fisher or not all(torch.isfinite(f).all() for f in embedding.fisher.values()):
        raise ExpertError(f"{path} is empty, or holds values that are NaN or infinite; embed the expert again")
    return embedding.compact()


def _space(embedding: TaskEmbedding, card: ExpertCard) -> str:
    shapes = sorted((key, tuple(f.shape)) for key, f in embedding.fisher.items())
    point = embedding.reference_hash if embedding.reference == "shared" else ""
    shared = (card.fingerprint, card.backbone, embedding.reference, point, shapes)
    return hashlib.sha256(repr(shared).encode()).hexdigest()[:16]


def _stamps(folder: Path) -> dict[str, list[int]]:
    stamps = {}
    for file in _FILES:
        try:
            status = (folder / file).stat()
        except FileNotFoundError:
            continue
        stamps[file] = [status.st_size, status.st_mtime_ns, status.st_ino]
    return stamps


def _digest(folder: Path) -> str:
    files = [file for file in _FILES if (folder / file).is_file()]
    return hashlib.sha256(repr([(file, file_hash(folder / file)) for file in files]).encode()).hexdigest()


def _read_index(path: Path) -> tuple[dict[str, tuple[Entry, int]], dict[str, Compact]]:
    """The stored entries with their rows by name, and the matrices; nothing where there is no index of this version."""
    try:
        arrays = safetensors.numpy.load_file(path)
        document = json.loads(arrays.pop("entries").tobytes())
        if document["version"] != _VERSION or any(len(a) != len(document["entries"]) for a in arrays.values()):
            return {}, {}
        entries = [_entry(values) for values in document["entries"]]
        return {entry.name: (entry, row) for row, entry in enumerate(entries)}, {r: arrays[r] for r in EMBEDDING_FILES}
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError):
        return {}, {}


def _entry(values: dict[str, Any]) -> Entry:
    card = values.pop("card")
    if card is not None:
        card = ExpertCard(**{**card, "choices": (), "lineage": tuple(card["lineage"])})
    return Entry(card=card, **values)


def _save(path: Path, entries: list[Entry], vectors: Mapping[str, Compact]) -> bool:
    """Store the index, all or nothing; False where the folder cannot be written."""
    document = json.dumps({"version": _VERSION, "entries": [asdict(entry) for entry in entries]})
    arrays = {"entries": np.frombuffer(document.encode(), np.uint8), **vectors}
    try:
        with tempfile.NamedTemporaryFile(
            prefix=f"{INDEX_FILE}.", suffix=".partial", dir=path.parent, delete=False
        ) as file:
            temporary = Path(file.name)
        try:
            safetensors.numpy.save_file(arrays, temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, safetensors.SafetensorError):
        return False
    return True
