"""Reading TSV, CSV and JSONL: the rows as they are, and the place of every mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pituning.data.tables import first_columns, read_table

COLUMNS = ["text", "label"]


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


CONTENT = {
    "a.tsv": 'id\ttext\tlabel\n1\tsays "no, thanks"\t0\n2\tünïcode\t1\n',
    "a.csv": 'id,text,label\n1,"says ""no, thanks""",0\n2,ünïcode,1\n',
    "a.jsonl": '{"id": 1, "text": "says \\"no, thanks\\"", "label": 0}\n\n{"text": "ünïcode", "label": "1"}\n',
}


@pytest.mark.parametrize("name", CONTENT)
def test_the_three_formats_give_the_same_rows(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, CONTENT[name])
    last = 4 if name.endswith("jsonl") else 3
    assert read_table(path, COLUMNS) == [
        (f"{path}:{2 if last == 3 else 1}", {"text": 'says "no, thanks"', "label": "0"}),
        (f"{path}:{3}", {"text": "ünïcode", "label": "1"}),
    ]


@pytest.mark.parametrize("name", CONTENT)
def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path, name: str) -> None:
    plain, marked = write(tmp_path, name, CONTENT[name]), write(tmp_path, f"marked{name}", f"\ufeff{CONTENT[name]}")
    assert first_columns(marked) == first_columns(plain)
    assert [row for _, row in read_table(marked, ["id"][: name != "a.jsonl"])] == [
        row for _, row in read_table(plain, ["id"][: name != "a.jsonl"])
    ]


def test_tsv_knows_no_quotes_and_only_newlines_end_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.tsv", 'text\tlabel\r\n"half a quote\t0\r\nform\x0cfeed\u2028and more\t1\n')
    assert [r["text"] for _, r in read_table(path, COLUMNS)] == ['"half a quote', "form\x0cfeed\u2028and more"]


@pytest.mark.parametrize(
    ("name", "text", "line", "said"),
    [
        ("a.tsv", "text\tlabel\ngood\t1\nbad\nfine\t0\n", 3, "expected 2 columns (text, label), found 1"),
        ("a.tsv", "text\tlabel\ngood\t1\tmore\n", 2, "expected 2 columns (text, label), found 3"),
        ("a.tsv", "text\tlable\ngood\t1\n", 2, "no column 'label'; the row has text, lable"),
        ("a.tsv", "", 1, "the file is empty; expected a header line"),
        ("a.csv", "text,label\ngood,1\nbad\n", 3, "expected 2 columns (text, label), found 1"),
        ("a.csv", 'text,label\n"two\nlines",1\nbad\n', 4, "expected 2 columns (text, label), found 1"),
        ("a.csv", "text,lable\ngood,1\n", 2, "no column 'label'"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b", \n', 2, "not a JSON object"),
        ("a.jsonl", '{"text": "a", "label": 1}\n\n["b", 1]\n', 3, "expected a JSON object, found list"),
        ("a.jsonl", '{"text": "a"}\n', 1, "no column 'label'; the row has text"),
        ("a.tsv", "x" * 40_000 + "\tlabel\na\n", 2, "x… (40,000 characters), label), found 1"),
    ],
)
def test_a_broken_row_is_named_by_file_and_line(
    tmp_path: Path, message: Any, name: str, text: str, line: int, said: str
) -> None:
    path = write(tmp_path, name, text)
    found = message(read_table, path, COLUMNS)
    assert found.startswith(f"{path}:{line}: ")
    assert said in found


def test_a_row_after_a_multi_line_cell_has_its_own_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'text,label\n"two\nlines",1\nnext,0\n')
    assert [where for where, _ in read_table(path, COLUMNS)][1] == f"{path}:4"


def test_files_that_cannot_be_read(tmp_path: Path, message: Any) -> None:
    assert message(read_table, tmp_path / "no.tsv", COLUMNS) == f"no such file: {tmp_path / 'no.tsv'}"
    odd = write(tmp_path, "a.xlsx", "text,label\n")
    assert message(read_table, odd, COLUMNS) == f"{odd}: expected a file ending in .tsv, .csv, .jsonl"
    latin = tmp_path / "latin.tsv"
    latin.write_bytes("text\tlabel\ncaf\xe9\t1\n".encode("latin-1"))
    text = message(read_table, latin, COLUMNS)
    assert str(latin) in text
    assert "not UTF-8" in text
    huge = write(tmp_path, "huge.csv", "text,label\n" + "x" * 200_000 + ",1\n")
    assert read_table(huge, COLUMNS)[0][1]["text"] == "x" * 200_000


def test_lists_of_texts_are_joined_as_in_ofas_files(tmp_path: Path, message: Any) -> None:
    path = write(
        tmp_path, "a.jsonl", '{"text": ["A cat.", "Two dogs run."], "label": [{"answer": "red"}], "more": {}}\n'
    )
    assert read_table(path, COLUMNS)[0][1] == {"text": "A cat.&&Two dogs run.", "label": "red"}
    for value, said in (('{"a": 1}', "expected a text, found dict"), ('["a", null]', "is empty in part")):
        path = write(tmp_path, "a.jsonl", f'{{"text": "a", "label": 1}}\n{{"text": {value}, "label": 1}}\n')
        found = message(read_table, path, COLUMNS)
        assert found.startswith(f"{path}:2 (text)")
        assert said in found


@pytest.mark.parametrize(
    ("name", "text", "columns"),
    [
        ("a.tsv", "x0\ty\r\n1\t2\r\n", ("x0", "y")),
        ("a.csv", '"x0\nand more",y\n1,2\n', ("x0\nand more", "y")),
        ("a.jsonl", '\n{"x0": 1, "y": "x1"}\n', ("x0", "y")),
        ("a.jsonl", "[1]\n", ()),
        ("a.jsonl", "{\n", ()),
        ("a.txt", "x0\n", ()),
        ("a.csv", "", ()),
    ],
)
def test_the_columns_a_file_begins_with(tmp_path: Path, name: str, text: str, columns: tuple[str, ...]) -> None:
    assert first_columns(write(tmp_path, name, text)) == columns
