"""Big TSV files by index: a file of 100 GB is opened in an instant, and any cell is read without its neighbours.

OFA keeps its data as TSV without header and quoting, one column of which is a base64 picture. The first opening writes an
index beside the file: where every cell ends. The index is memory-mapped and a cell is one read of its own bytes, so that
worker processes share what the system has cached, and none of them grows with the file.
"""

from __future__ import annotations

import base64
import binascii
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import string
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pituning.errors import DataError

CACHE_VARIABLE = "PITUNING_CACHE"
CHUNK = 1 << 22  # bytes read at a time while indexing
AHEAD = 4  # chunks that the system reads meanwhile
TAB, NEWLINE = 9, 10
_FORMAT = 1
_ENDS, _ABOUT = "ends.int64", "about.json"
_ABANDONED = 3600.0  # seconds without a sign of life, after which an unfinished index is taken away
_BASE64 = string.ascii_letters.encode() + string.digits.encode() + b"+/"
_NOT_BASE64 = re.compile(rb"[^A-Za-z0-9+/]")
_MARK = re.compile(r"(.*)-(\d+)-[0-9a-f]{8}\.partial")  # host, process, and what tells its indexes apart
_making: set[str] = set()  # names of the unfinished indexes that belong to this process

Progress = Callable[[int, int], None]
"""Told the bytes that are indexed and the bytes there are."""


class TsvFile:
    """Random access to the cells of a TSV file without header and quoting.

    The index is as large as eight bytes for every cell. It lies in ``NAME.index`` beside the file, or, where nothing can be
    written there, in the folder that the environment variable PITUNING_CACHE names (default ``~/.cache/pituning``). It
    counts only as long as the file's size and time of change are those it was made for.

    Args:
        columns: how many cells each row must have; by default as many as the first.
        progress: called now and then while an index is made.

    Attributes:
        column_count: cells of a row.

    Raises:
        DataError: if there is no such file, it is empty, or a row has another number of cells; the first such row is named.
    """

    def __init__(self, path: str | Path, columns: int | None = None, progress: Progress | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(f"no such file: {self.path}")
        self._version = _state(self.path.stat())
        self._ends = _open_index(self.path, progress)
        self._flat = self._ends.reshape(-1)
        self.column_count = int(self._ends.shape[1])
        if columns is not None and columns != self.column_count:
            raise DataError(f"{self.path}:1: expected {columns} columns, found {self.column_count}")

    def __len__(self) -> int:
        return len(self._ends)

    def raw(self, row: int, column: int) -> bytes:
        """The bytes of a cell.

        Raises:
            IndexError: for a row that is not there.
            DataError: for a column that is not there.
        """
        start, end = self._span(row, column)
        return self._read(start, end)

    def cell(self, row: int, column: int) -> str:
        """The text of a cell.

        Raises:
            DataError: if it is not UTF-8; otherwise as :meth:`raw`.
        """
        try:
            return self.raw(row, column).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.place(row, column)}: not UTF-8 text ({error})") from error

    def cells(self, row: int, columns: Sequence[int]) -> tuple[str, ...]:
        """The texts of several cells of a row."""
        return tuple(self.cell(row, column) for column in columns)

    def image(self, row: int, column: int) -> bytes:
        """The bytes that a base64 cell stands for; in either alphabet, with or without padding.

        Raises:
            DataError: if it is not base64, with the place; otherwise as :meth:`raw`.
        """
        return decode_base64(self.raw(row, column), lambda: self.place(row, column))

    def place(self, row: int, column: int | None = None) -> str:
        """Where a row or cell is, for messages: ``file:line`` from 1, columns from 0 as OFA counts them."""
        line = f"{self.path}:{row + 1}"
        return line if column is None else f"{line}, column {column}"

    def _span(self, row: int, column: int) -> tuple[int, int]:
        """First byte of a cell, and one past its last."""
        if not 0 <= row < len(self._ends):
            raise IndexError(f"{self.path} has {len(self._ends)} rows, no number {row}")
        if not 0 <= column < self.column_count:
            raise DataError(f"{self.path} has {self.column_count} columns, counted from 0: there is no column {column}")
        index = row * self.column_count + column
        start, end = int(self._flat[index - 1]) + 1 if index else 0, int(self._flat[index])
        if column == self.column_count - 1 and end > start and self._read(end - 1, end) == b"\r":
            end -= 1  # a line that ends as on Windows
        return start, end

    def _read(self, start: int, end: int) -> bytes:
        # not memory-mapped: every page that was ever touched would count as the process's own memory
        found = os.pread(self._descriptor.fileno(), end - start, start)
        if len(found) < end - start:
            raise self._changed()
        return found

    @cached_property
    def _descriptor(self) -> FileIO:
        file = FileIO(self.path)
        weakref.finalize(self, file.close)
        if _state(os.fstat(file.fileno())) != self._version:
            raise self._changed()
        return file

    def _changed(self) -> DataError:
        return DataError(f"{self.path} was changed after it was opened: open it again, its index no longer fits")

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"TsvFile({str(self.path)!r}, {len(self)} rows, {self.column_count} columns)"


def decode_base64(text: bytes, place: Callable[[], str]) -> bytes:
    """Bytes of base64 in either alphabet, with or without padding.

    >>> decode_base64(b"_-8", lambda: "here")
    b'\\xff\\xef'

    Raises:
        DataError: for a character of neither alphabet, or an impossible length.
    """
    plain = text.rstrip(b"=").translate(bytes.maketrans(b"-_", b"+/"))
    # the search alone would take as long as the decoding
    if plain.translate(None, _BASE64) and (wrong := _NOT_BASE64.search(plain)):
        raise DataError(f"{place()}: not a base64 picture: it has the character {wrong.group()!r} at {wrong.start()}")
    try:
        return base64.b64decode(plain + b"=" * (-len(plain) % 4))
    except binascii.Error as error:
        raise DataError(f"{place()}: not a base64 picture of {len(text)} characters ({error})") from error


def _open_index(path: Path, progress: Progress | None) -> NDArray[np.int64]:
    """The memory-mapped ends of all cells, ``[rows, columns]``; made first where it is not there."""
    folders = [path.with_name(f"{path.name}.index"), _cache_folder(path)]
    for folder in folders:
        if (ends := _mapped(path, folder)) is not None:
            return ends
    refused = []
    for folder in folders:
        mark = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        unfinished = folder.with_name(f"{folder.name}.{mark}.partial")
        _making.add(unfinished.name)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(folder)
            unfinished.mkdir()
            return _made(path, folder, unfinished, progress)
        except OSError as error:  # read-only, or full
            refused.append(f"{folder.parent}: {error}")
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
            _making.discard(unfinished.name)
    raise DataError(
        f"{path}: its index can be written neither beside it nor into {folders[1].parent}: set {CACHE_VARIABLE} to a folder "
        f"that can be written to ({'; '.join(refused)})"
    )


def _made(path: Path, folder: Path, unfinished: Path, progress: Progress | None) -> NDArray[np.int64]:
    """Make the index in the unfinished folder, which then takes the name of the finished one."""
    state = _state(path.stat())
    with path.open("rb") as file, (unfinished / _ENDS).open("wb") as out:
        rows, columns = _write_ends(path, file, out, state["size"], progress)
    if _state(path.stat()) != state:
        raise DataError(f"{path} was changed while it was being indexed: open it again when it is whole")
    (unfinished / _ABOUT).write_text(json.dumps({**state, "rows": rows, "columns": columns}), encoding="utf-8")
    if folder.exists() and _mapped(path, folder) is None:
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier version of the file
    with suppress(OSError):  # another process may have been faster, with the same result
        unfinished.rename(folder)
    ends = _mapped(path, folder)
    if ends is None:
        raise DataError(f"{path}: its index was written to {folder}, but is not there: is another process changing it?")
    return ends


def _write_ends(path: Path, file: BinaryIO, out: BinaryIO, size: int, progress: Progress | None) -> tuple[int, int]:
    """Write where every cell ends, as int64, row by row; returns the numbers of rows and of columns."""
    rows = columns = begin = 0
    ends, newlines = np.zeros(0, np.int64), np.zeros(0, np.bool_)  # of the row that is not complete yet
    for more_ends, more_newlines, done in _separators(file, size):
        ends, newlines = np.concatenate([ends, more_ends]), np.concatenate([newlines, more_newlines])
        breaks = np.flatnonzero(newlines)
        if not len(breaks):
            continue
        columns = columns or int(breaks[0]) + 1
        wrong = np.flatnonzero(breaks != columns * np.arange(1, len(breaks) + 1) - 1)
        if len(wrong):
            first = int(wrong[0])
            before = int(breaks[first - 1]) if first else -1
            found, start = int(breaks[first]) - before, int(ends[before]) + 1 if first else begin
            raise DataError(_wrong_row(path, file, rows + first + 1, start, columns, found))
        complete = int(breaks[-1]) + 1
        ends[:complete].tofile(out)
        rows += len(breaks)
        begin = int(ends[complete - 1]) + 1
        ends, newlines = ends[complete:], newlines[complete:]
        if progress is not None:
            progress(done, size)
    if not rows:
        raise DataError(f"{path}: the file is empty")
    return rows, columns


def _separators(file: BinaryIO, size: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.bool_], int]]:
    """Positions of the bytes that end a cell, which of them end a row, and how many bytes have been read."""
    start, last = 0, NEWLINE
    while chunk := file.read(CHUNK):
        if hasattr(os, "posix_fadvise"):  # not everywhere
            os.posix_fadvise(file.fileno(), start + len(chunk), AHEAD * CHUNK, os.POSIX_FADV_WILLNEED)
        data = np.frombuffer(chunk, np.uint8)
        found = np.flatnonzero((data == TAB) | (data == NEWLINE))
        newlines = data[found] == NEWLINE
        last = int(data[-1])
        yield found + start, newlines, start + len(chunk)
        start += len(chunk)
    if last != NEWLINE:  # the last row need not end
        yield np.array([start], np.int64), np.array([True]), start


def _wrong_row(path: Path, file: BinaryIO, line: int, start: int, expected: int, found: int) -> str:
    """What to say of the first row with another number of cells than the first row."""
    if expected == 1 and _is_blank(file, 0):
        return f"{path}:1: the line is blank; line {line} has {found} columns"
    if found == 1 and _is_blank(file, start):
        return f"{path}:{line}: the line is blank; expected {expected} columns as in the first line"
    return f"{path}:{line}: expected {expected} columns as in the first line, found {found}"


def _is_blank(file: BinaryIO, start: int) -> bool:
    file.seek(start)
    return not file.readline(1000).strip()


def _state(found: os.stat_result) -> dict[str, int]:
    """What must be unchanged for an index to count."""
    return {"format": _FORMAT, "size": found.st_size, "mtime_ns": found.st_mtime_ns}


def _mapped(path: Path, folder: Path) -> NDArray[np.int64] | None:
    """A finished index of this version of the file."""
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        shape = int(about["rows"]), int(about["columns"])
        state = _state(path.stat())
        whole = (folder / _ENDS).stat().st_size == 8 * shape[0] * shape[1]
        if not whole or any(about[key] != value for key, value in state.items()):
            return None
        ends = np.memmap(folder / _ENDS, np.int64, "r", shape=shape)
        # a crash of the machine may have left zeros
        return ends if int(ends[-1, -1]) in (state["size"] - 1, state["size"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remove_abandoned(folder: Path) -> None:
    """Take away what killed runs have left."""
    for left in folder.parent.glob(f"{glob.escape(folder.name)}.*.partial"):
        mark = _MARK.fullmatch(left.name.removeprefix(f"{folder.name}."))
        with suppress(OSError):
            if mark is None or mark[1] != socket.gethostname():
                dead = time.time() - max(p.stat().st_mtime for p in (left, *left.iterdir())) > _ABANDONED
            elif int(mark[2]) == os.getpid():
                dead = left.name not in _making  # an earlier process had our number, as when a container starts again
            else:
                dead = not is_alive(int(mark[2]))
            if dead:
                shutil.rmtree(left, ignore_errors=True)


def is_alive(process: int) -> bool:
    """Whether this machine runs a process of that number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _cache_folder(path: Path) -> Path:
    root = os.environ.get(CACHE_VARIABLE) or _default_cache()
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    return Path(root) / "tsv" / f"{path.name}.{digest}.index"


def _default_cache() -> Path:
    try:
        return Path.home() / ".cache" / "pituning"
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir()) / f"pituning-{os.getuid()}"
