"""Cells of big TSV files against reading the whole file; indexes that are cut short, outdated, or made twice at once."""

from __future__ import annotations

import base64
import multiprocessing
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader, Dataset

from pituning.data import tsv
from pituning.data.tsv import TsvFile, decode_base64
from pituning.errors import DataError

OPEN = "import sys; from pituning.data.tsv import TsvFile; print(len(TsvFile(sys.argv[1])))"
SLOW = (
    "import sys, time; from pituning.data import tsv; tsv.CHUNK = 64; "
    "tsv.TsvFile(sys.argv[1], progress=lambda done, size: time.sleep(0.002))"
)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def random_table(seed: int, rows: int = 40) -> list[list[str]]:
    rng = random.Random(seed)
    columns = rng.randint(1, 5)
    letters = "abc é€😀 .-\r\x0b"
    table = [["".join(rng.choices(letters, k=rng.randint(0, 12))) for _ in range(columns)] for _ in range(rows)]
    for row in table:  # a carriage return at the end of a row belongs to the line's end
        row[-1] = row[-1].rstrip("\r") or "x"
        row[0] = row[0] or "y"
    return table


def index_folders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if ".index" in p.name)


@pytest.mark.parametrize("chunk", [*range(1, 8), 1 << 20])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_every_cell_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, end: str, last: bool
) -> None:
    monkeypatch.setattr(tsv, "CHUNK", chunk)
    for seed in range(4):
        table = random_table(seed)
        text = end.join("\t".join(row) for row in table) + (end if last else "")
        file = TsvFile(write(tmp_path / f"{seed}.tsv", text))
        assert (len(file), file.column_count) == (40, len(table[0]))
        cells = [(r, c) for r in range(40) for c in range(len(table[0]))]
        random.Random(seed).shuffle(cells)
        for row, column in cells:
            assert file.cell(row, column) == table[row][column]
        columns = random.Random(seed).sample(range(file.column_count), file.column_count)
        assert file.cells(3, columns) == tuple(table[3][c] for c in columns)


def test_what_is_not_there(tmp_path: Path) -> None:
    file = TsvFile(write(tmp_path / "a.tsv", "a\tb\nc\td\n"))
    for row in (-1, 2):
        with pytest.raises(IndexError, match="has 2 rows"):
            file.cell(row, 0)
    for column in (-1, 2):
        with pytest.raises(DataError, match=f"2 columns, counted from 0: there is no column {column}"):
            file.cell(0, column)
    with pytest.raises(DataError, match="no such file"):
        TsvFile(tmp_path / "b.tsv")
    with pytest.raises(DataError, match=r"a\.tsv:1: expected 3 columns, found 2"):
        TsvFile(tmp_path / "a.tsv", columns=3)
    with pytest.raises(DataError, match="the file is empty"):
        TsvFile(write(tmp_path / "c.tsv", ""))
    assert index_folders(tmp_path) == ["a.tsv.index"], "a file that cannot be used leaves nothing"


@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["a\tb", "c\td", "e"], r"a\.tsv:3: expected 2 columns as in the first line, found 1"),
        (["a\tb", "c\td\te", "f\tg"], r"a\.tsv:2: expected 2 columns as in the first line, found 3"),
        (["a\tb", "c\td", "", "e\tf"], r"a\.tsv:3: the line is blank"),
        (["a\tb", "\r", "e\tf"], r"a\.tsv:2: the line is blank"),
        (["a\tb", "c\td\te"], r"a\.tsv:2: expected 2 columns as in the first line, found 3"),
        (["a\tb", "   c"], r"a\.tsv:2: expected 2 columns as in the first line, found 1"),
        (["", "a\tb"], r"a\.tsv:1: the line is blank; line 2 has 2 columns"),
        (["   a", "a\tb"], r"a\.tsv:2: expected 1 columns as in the first line, found 2"),
    ],
)
@pytest.mark.parametrize("last", ["\n", ""])
def test_a_row_of_another_length_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, rows: list[str], said: str, last: str
) -> None:
    monkeypatch.setattr(tsv, "CHUNK", chunk)
    with pytest.raises(DataError, match=said):
        TsvFile(write(tmp_path / "a.tsv", "\n".join(rows) + last))
    assert index_folders(tmp_path) == []


def test_bad_text_and_bad_pictures_name_their_place(tmp_path: Path) -> None:
    file = TsvFile(write(tmp_path / "a.tsv", b"ok\tok\n\xff\t!!!!\nok\tabcde\n"))
    with pytest.raises(DataError, match=r"a\.tsv:2, column 0: not UTF-8"):
        file.cell(1, 0)
    with pytest.raises(DataError, match=r"a\.tsv:2, column 1: not a base64 picture: it has the character b'!' at 0"):
        file.image(1, 1)
    with pytest.raises(DataError, match=r"a\.tsv:3, column 1: not a base64 picture of 5 characters"):
        file.image(2, 1)


@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
@pytest.mark.parametrize("padding", [True, False])
def test_pictures_in_either_alphabet(tmp_path: Path, encode: Callable[[bytes], bytes], padding: bool) -> None:
    for length in range(1, 9):
        picture = bytes([255, 254, 251] * 3)[:length]
        cell = encode(picture) if padding else encode(picture).rstrip(b"=")
        file = TsvFile(write(tmp_path / f"{length}.tsv", b"x\t" + cell))
        assert file.image(0, 1) == picture == decode_base64(cell, lambda: "here")


class TestIndex:
    def test_it_is_made_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write(tmp_path / "a.tsv", "a\tb\nc\td\n")
        TsvFile(path)
        monkeypatch.setattr(tsv, "_write_ends", lambda *_: pytest.fail("indexed again"))
        assert TsvFile(path).cell(1, 1) == "d"

    def test_a_changed_file_has_a_new_one(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.tsv", "a\tb\nc\td\n")
        TsvFile(path)
        stamp = path.stat()
        write(path, "a\tb\nc\td\ne\tf\n")
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        assert len(TsvFile(path)) == 3, "another size, the same time"
        write(path, "ab\t\nc\td\ne\tf\n")
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
        assert TsvFile(path).cell(0, 0) == "ab", "the same size, another time"
        assert index_folders(tmp_path) == ["a.tsv.index"]

    @pytest.mark.parametrize("damage", ["ends", "zeros", "about", "no about", "other format"])
    def test_a_damaged_one_is_made_again(self, tmp_path: Path, damage: str) -> None:
        path = write(tmp_path / "a.tsv", "a\tb\nc\td\n")
        TsvFile(path)
        folder = tmp_path / "a.tsv.index"
        if damage == "ends":
            write(folder / "ends.int64", (folder / "ends.int64").read_bytes()[:-8])
        elif damage == "zeros":
            write(folder / "ends.int64", bytes(4 * 8))
        elif damage == "no about":
            (folder / "about.json").unlink()
        else:
            text = (folder / "about.json").read_text()
            (folder / "about.json").write_text("{" if damage == "about" else text.replace('"format": 1', '"format": 0'))
        assert TsvFile(path).cells(1, (0, 1)) == ("c", "d")

    def test_a_killed_run_leaves_nothing_that_counts(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.tsv", "".join(f"{n}\tb\n" for n in range(20_000)))
        process = subprocess.Popen([sys.executable, "-c", SLOW, str(path)])
        deadline = time.monotonic() + 60
        while not any(p.stat().st_size for p in tmp_path.glob("*.partial/*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        (left,) = index_folders(tmp_path)
        assert left.endswith(".partial")
        file = TsvFile(path)
        assert (len(file), file.cell(19_999, 0)) == (20_000, "19999")
        assert index_folders(tmp_path) == ["a.tsv.index"]

    def test_two_processes_at_once(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.tsv", "".join(f"{n}\tb\n" for n in range(50_000)))
        both = [subprocess.Popen([sys.executable, "-c", OPEN, str(path)], stdout=subprocess.PIPE) for _ in range(2)]
        assert [process.communicate()[0].strip() for process in both] == [b"50000"] * 2
        assert [process.returncode for process in both] == [0, 0]
        assert index_folders(tmp_path) == ["a.tsv.index"]

    @pytest.mark.parametrize("other", ["process", "thread"])
    def test_another_one_is_faster(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str) -> None:
        monkeypatch.setattr(tsv, "CHUNK", 1000)
        monkeypatch.setenv(tsv.CACHE_VARIABLE, str(tmp_path / "cache"))
        path = write(tmp_path / "a.tsv", "".join(f"{n}\tb{n}\n" for n in range(200)))
        faster: list[int] = []

        def meanwhile(done: int, size: int) -> None:
            if faster:
                return
            assert [name.endswith(".partial") for name in index_folders(tmp_path)] == [True]
            faster.append(0)
            if other == "thread":
                faster.append(len(TsvFile(path)))
            else:
                faster.append(
                    int(subprocess.run([sys.executable, "-c", OPEN, str(path)], stdout=-1, check=True).stdout)
                )

        file = TsvFile(path, progress=meanwhile)
        assert faster == [0, 200]
        assert [file.cells(n, (0, 1)) for n in range(200)] == [(str(n), f"b{n}") for n in range(200)]
        assert index_folders(tmp_path) == ["a.tsv.index"]
        assert not (tmp_path / "cache").exists()

    @pytest.mark.parametrize(
        ("mark", "seconds", "stays"),
        [
            (f"{socket.gethostname()}-{os.getpid()}-00000000", 0, False),  # had our number, as in a restarted container
            (f"{socket.gethostname()}-{os.getppid()}-00000000", 7200, True),
            (f"{socket.gethostname()}-999999999-00000000", 0, False),
            ("another-host-12-00000000", 0, True),
            ("another-host-12-00000000", 7200, False),
            ("odd", 7200, False),
        ],
        ids=["our number", "a live one", "a dead one", "elsewhere, new", "elsewhere, old", "odd"],
    )
    def test_only_what_is_abandoned_is_taken_away(self, tmp_path: Path, mark: str, seconds: int, stays: bool) -> None:
        path = write(tmp_path / "a[1].tsv", "a\tb\n")
        left = tmp_path / f"a[1].tsv.index.{mark}.partial"
        left.mkdir()
        write(left / "ends.int64", "x")
        for one in (left / "ends.int64", left):
            os.utime(one, (time.time() - seconds,) * 2)
        TsvFile(path)
        assert left.exists() == stays

    def test_a_long_run_elsewhere_shows_signs_of_life(self, tmp_path: Path) -> None:
        left = tmp_path / "a.tsv.index.another-12-00000000.partial"
        left.mkdir()
        write(left / "ends.int64", "x")
        os.utime(left, (0, 0))
        TsvFile(write(tmp_path / "a.tsv", "a\tb\n"))
        assert left.exists(), "the folder is old, but its file was just written to"

    def test_a_file_that_changes_while_it_is_indexed(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.tsv", "a\tb\n")
        with pytest.raises(DataError, match="was changed while it was being indexed"):
            TsvFile(path, progress=lambda *_: os.utime(path, (0, 0)))
        assert index_folders(tmp_path) == []

    @pytest.mark.parametrize("read_before", [True, False])
    def test_a_file_that_changes_afterwards_gives_no_wrong_cells(self, tmp_path: Path, read_before: bool) -> None:
        path = write(tmp_path / "a.tsv", "abcdef\tghi\n")
        file = TsvFile(path)
        if read_before:
            assert file.cell(0, 0) == "abcdef"
            os.truncate(path, 2)
        else:
            write(path, "abc\tdefghi\n")
            os.utime(path, (0, 0))
        with pytest.raises(DataError, match=r"a\.tsv was changed after it was opened"):
            file.cell(0, 0)

    def test_a_full_disk_says_so(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        path = write(tmp_path / "a.tsv", "a\tb\n")
        monkeypatch.setenv(tsv.CACHE_VARIABLE, str(tmp_path / "cache"))
        monkeypatch.setattr(tsv, "_write_ends", full)
        with pytest.raises(DataError, match="No space left on device"):
            TsvFile(path)
        assert list(tmp_path.rglob("*.index*")) == []

    def test_a_user_without_a_home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def homeless() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv(tsv.CACHE_VARIABLE, raising=False)
        monkeypatch.setattr(Path, "home", homeless)
        assert TsvFile(write(tmp_path / "a.tsv", "a\tb\n")).cell(0, 1) == "b"

    def test_a_folder_that_cannot_be_written_to(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write(tmp_path / "data.tsv", "a\tb\nc\td\n")
        make = Path.mkdir

        def refused(self: Path, *arguments: Any, **options: Any) -> None:
            if "cache" not in str(self):
                raise PermissionError(13, "read-only", str(self))
            make(self, *arguments, **options)

        monkeypatch.setenv(tsv.CACHE_VARIABLE, str(tmp_path / "cache"))
        monkeypatch.setattr(Path, "mkdir", refused)
        assert TsvFile(path).cell(1, 0) == "c"
        assert index_folders(tmp_path) == []
        monkeypatch.setattr(tsv, "_write_ends", lambda *_: pytest.fail("indexed again"))
        assert TsvFile(path).cell(0, 1) == "b", "the one in the cache is found"
        monkeypatch.setenv(tsv.CACHE_VARIABLE, str(tmp_path / "nowhere"))
        with pytest.raises(DataError, match="set PITUNING_CACHE to a folder"):
            TsvFile(path)

    def test_a_system_that_cannot_read_ahead(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(os, "posix_fadvise")
        assert TsvFile(write(tmp_path / "a.tsv", "a\tb\n")).cell(0, 1) == "b"

    def test_progress_is_told(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tsv, "CHUNK", 4)
        told: list[tuple[int, int]] = []
        TsvFile(write(tmp_path / "a.tsv", "a\tb\nc\td\ne\tf\n"), progress=lambda done, size: told.append((done, size)))
        assert told == [(4, 12), (8, 12), (12, 12)]


class Rows(Dataset[tuple[str, ...]]):
    def __init__(self, file: TsvFile) -> None:
        self.file = file

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, index: int) -> tuple[str, ...]:
        return self.file.cells(index, range(self.file.column_count))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_read_the_same_rows(tmp_path: Path, start: str) -> None:
    path = write(tmp_path / "a.tsv", "".join(f"{n}\tb{n}\n" for n in range(30)))
    file = TsvFile(path)
    assert file.cell(0, 0) == "0", "open before the workers start"
    loader = DataLoader(
        Rows(file),
        batch_size=4,
        num_workers=2,
        collate_fn=list,
        multiprocessing_context=multiprocessing.get_context(start),
    )
    assert [row for batch in loader for row in batch] == [(str(n), f"b{n}") for n in range(30)]


def test_it_goes_to_other_processes_by_its_path(tmp_path: Path) -> None:
    file = TsvFile(write(tmp_path / "a.tsv", "a\tb\nc\td\n"))
    state = pickle.dumps(file)
    assert len(state) < 500
    assert pickle.loads(state).cell(1, 1) == "d"
    assert repr(file).endswith("a.tsv', 2 rows, 2 columns)")


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    import gc

    before = len(os.listdir("/proc/self/fd"))
    for number in range(5):
        assert TsvFile(write(tmp_path / f"{number}.tsv", "a\tb\n")).cell(0, 0) == "a"
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before
