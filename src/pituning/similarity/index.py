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
from numpy.typing import NDArray

from pituning.errors import ExpertError
from pituning.experts.expert import CARD_FILE, CONFIG_FILE, TENSOR_FILE, ExpertCard, file_hash, read_card
from pituning.experts.pool import ExpertPool
from pituning.similarity.compact import ANCHORED, BYTES, Anchor, Compact, anchor_of

if TYPE_CHECKING:
    from pituning.similarity.embedding import TaskEmbedding

INDEX_FILE = ".index.safetensors"
EMBEDDING_FILES = {"own": "task_embedding.safetensors", "shared": "task_embedding.shared.safetensors"}
_VERSION = 4
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
    before = _read_index(path)
    entries: list[Entry] = []
    for name in pool.names():
        known, _ = before.rows.get(name, (None, -1))
        entries.append(_still_valid(known, pool.folder / name) or _read_expert(pool.folder / name))
    anchors, made_anew = _anchors(pool.folder, entries, before.anchors)
    vectors = {reference: np.zeros((len(entries), BYTES), np.uint8) for reference in EMBEDDING_FILES}
    read = 0
    for row, entry in enumerate(entries):
        known, place = before.rows.get(entry.name, (None, -1))
        new = known is None or entry.digest != known.digest
        read += new
        for reference, space in entry.spaces.items():
            if new or space in made_anew:
                embedding = _embedding(pool.folder / entry.name, reference)
                vectors[reference][row] = embedding.compact(anchors[space][0])
            else:
                vectors[reference][row] = before.vectors[reference][place]
    spaces = {r: np.array([e.spaces.get(r, "") for e in entries], dtype=np.str_) for r in EMBEDDING_FILES}
    unchanged = path.is_file() and not made_anew and entries == [entry for entry, _ in before.rows.values()]
    saved = unchanged or _save(path, entries, vectors, anchors)
    return PoolIndex(pool.folder, tuple(entries), vectors, spaces, read, saved)


def _anchors(
    folder: Path, entries: list[Entry], before: Mapping[str, tuple[Anchor, int]]
) -> tuple[dict[str, tuple[Anchor, int]], set[str]]:
    """Space → its anchor and of how many embeddings it is the mean; and the spaces whose anchor is another than before."""
    members: dict[str, list[tuple[str, str]]] = {}
    for entry in entries:
        for reference, space in entry.spaces.items():
            members.setdefault(space, []).append((entry.name, reference))
    anchors, made_anew = {}, set[str]()
    for space, found in members.items():
        known = before.get(space)
        if known is not None and (known[1] >= ANCHORED or len(found) < 2 * known[1]):
            anchors[space] = known
            continue
        first = found[:ANCHORED]
        anchor = anchor_of(_embedding(folder / name, reference).fisher for name, reference in first)
        anchors[space] = anchor, len(first)
        made_anew.add(space)
    return anchors, made_anew


def _still_valid(before: Entry | None, folder: Path) -> Entry | None:
    """The stored entry, if the files are as they were."""
    if before is None:
        return None
    stamps = _stamps(folder)
    if before.stamps == stamps:
        return before
    return replace(before, stamps=stamps) if before.digest == _digest(folder) else None


def _read_expert(folder: Path) -> Entry:
    """An expert's entry, with what is wrong with it, if anything is."""
    entry = Entry(folder.name, None, _stamps(folder), _digest(folder))
    spaces: dict[str, str] = {}
    try:
        entry = replace(entry, card=replace(read_card(folder), choices=(), training={}))
        assert entry.card is not None
        for reference, file in EMBEDDING_FILES.items():
            if (folder / file).is_file():
                embedding = _embedding(folder, reference)
                if not embedding.fisher:
                    raise ExpertError(f"{folder / file} is empty; embed the expert again")
                spaces[reference] = _space(embedding, entry.card)
    except ExpertError as error:
        entry = replace(entry, problem=str(error))
    return replace(entry, spaces=spaces)


def _embedding(folder: Path, reference: str) -> TaskEmbedding:
    from pituning.similarity.embedding import TaskEmbedding

    return TaskEmbedding.load(folder, reference)


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


@dataclass(frozen=True)
class _Stored:
    """What an index file holds; nothing where there is none of this version.

    Attributes:
        rows: name → its entry and its row in the matrices.
        anchors: space → its anchor and of how many embeddings it is the mean.
    """

    rows: Mapping[str, tuple[Entry, int]] = field(default_factory=dict)
    vectors: Mapping[str, Compact] = field(default_factory=dict)
    anchors: Mapping[str, tuple[Anchor, int]] = field(default_factory=dict)


def _read_index(path: Path) -> _Stored:
    try:
        arrays = safetensors.numpy.load_file(path)
        document = json.loads(arrays.pop("entries").tobytes())
        vectors = {reference: arrays[reference] for reference in EMBEDDING_FILES}
        if document["version"] != _VERSION or any(
            a.shape != (len(document["entries"]), BYTES) for a in vectors.values()
        ):
            return _Stored()
        entries = [_entry(values) for values in document["entries"]]
        anchors = {space: (arrays[f"anchor {space}"], int(count)) for space, count in document["anchors"].items()}
        return _Stored({entry.name: (entry, row) for row, entry in enumerate(entries)}, vectors, anchors)
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError, AttributeError):
        return _Stored()


def _entry(values: dict[str, Any]) -> Entry:
    card = values.pop("card")
    if card is not None:
        card = ExpertCard(**{**card, "choices": (), "lineage": tuple(card["lineage"])})
    return Entry(card=card, **values)


def _save(
    path: Path, entries: list[Entry], vectors: Mapping[str, Compact], anchors: Mapping[str, tuple[Anchor, int]]
) -> bool:
    """Store the index, all or nothing; False where the folder cannot be written."""
    counts = {space: count for space, (_, count) in anchors.items()}
    document = json.dumps({"version": _VERSION, "anchors": counts, "entries": [asdict(entry) for entry in entries]})
    arrays: dict[str, NDArray[Any]] = {"entries": np.frombuffer(document.encode(), np.uint8), **vectors}
    arrays |= {f"anchor {space}": anchor for space, (anchor, _) in anchors.items()}
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
