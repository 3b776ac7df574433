"""Tokens against what OFA's own code made: shared/fixtures/tokenization and prompts (recorded from TencentARC/pi-Tuning)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pituning.backbones.ofa.processing import IGNORED, OFAProcessor
from pituning.data.cleaning import clean_caption, clean_question
from pituning.errors import DataError

FIXTURES = Path(__file__).parents[3] / "shared" / "fixtures"
pytestmark = pytest.mark.skipif(
    not FIXTURES.is_dir(), reason=f"the reference's recorded numbers are not here: no folder {FIXTURES}"
)
PROMPT_TYPES = {"none": "none", "src": "source", "prev_output": "source_without_end"}


def read(name: str) -> Any:
    return json.loads((FIXTURES / name).read_text(encoding="utf-8"))


def write_bart(folder: Path) -> Path:
    """BART's vocab.json and merges.txt, made of fairseq's files independently of the code under test."""
    pieces = {n: piece for piece, n in read("bpe/encoder.json").items()}
    lines = (FIXTURES / "bpe/dict.txt").read_text(encoding="utf-8").split("\n")[:-1]
    words = [line.split(" ")[0] for line in lines]
    symbols = ["<s>", "<pad>", "</s>", "<unk>", *(pieces[int(w)] if w.isdigit() else w for w in words), "<mask>"]
    ids = json.dumps({s: i for i, s in enumerate(symbols)})
    (folder / "vocab.json").write_text(ids, encoding="utf-8")
    (folder / "merges.txt").write_bytes((FIXTURES / "bpe/vocab.bpe").read_bytes())
    return folder


@pytest.fixture(scope="module")
def fairseq() -> OFAProcessor:
    return OFAProcessor.from_fairseq(FIXTURES / "bpe")


@pytest.fixture(scope="module", params=["fairseq", "hugging face", "saved and loaded"])
def processor(
    request: pytest.FixtureRequest, fairseq: OFAProcessor, tmp_path_factory: pytest.TempPathFactory
) -> OFAProcessor:
    """The real vocabulary from either kind of files, and from our own."""
    if request.param == "fairseq":
        return fairseq
    folder = tmp_path_factory.mktemp("vocabulary")
    if request.param == "hugging face":
        return OFAProcessor.from_pretrained(write_bart(folder))
    fairseq.save_pretrained(folder)
    return OFAProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> OFAProcessor:
    """The vocabulary of the tiny model cases: 60 lines of dict.txt, 8 codes, 20 bins."""
    folder = tmp_path_factory.mktemp("tiny")
    lines = (FIXTURES / "bpe/dict.txt").read_text(encoding="utf-8").split("\n")[:60]
    (folder / "dict.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    files = {name: FIXTURES / "bpe" / name for name in ("encoder.json", "vocab.bpe")}
    return OFAProcessor.from_fairseq({**files, "dict.txt": folder / "dict.txt"}, num_codes=8, num_bins=20)


def test_special_ids(processor: OFAProcessor) -> None:
    golden = read("tokenization/golden.json")
    found = {
        "vocab_size": processor.vocab_size, "bos": processor.bos_id, "pad": processor.pad_id, "eos": processor.eos_id,
        "unk": processor.unk_id, "mask": processor.mask_id,
        "code_0": processor.code_range[0], "code_8191": processor.code_range[1] - 1,
        "bin_0": processor.bin_range[0], "bin_999": processor.bin_range[1] - 1,
    }  # fmt: skip
    assert found == {name: golden[name] for name in found}
    assert processor.num_bins == 1000


def test_every_symbol_has_the_reference_s_id(processor: OFAProcessor) -> None:
    golden = read("tokenization/golden.json")
    names = processor.tokenizer._dictionary
    for first, key in ((0, "symbols_first12"), (50255, "symbols_at_50255..50266")):
        assert {symbol: names[symbol] for symbol in golden[key]} == {s: first + i for i, s in enumerate(golden[key])}


def test_every_recorded_text(processor: OFAProcessor) -> None:
    rows = read("tokenization/golden.json")["rows"]
    assert len(rows) == 63
    for row in rows:
        found = processor.encode(row["text"]) if row["use_bpe"] else processor.encode_locations(row["text"])
        assert found == row["ids"], row["text"]
        if row["use_bpe"]:
            assert processor.decode(found) == row["decoded"]


def test_cleaning() -> None:
    golden = read("tokenization/golden.json")
    for text, expected in golden["pre_caption_80"]:
        assert clean_caption(text, 80) == expected
    for text, expected in golden["pre_question_80"]:
        assert clean_question(text, 80) == expected


def test_every_recorded_prompt(processor: OFAProcessor) -> None:
    rows = read("prompts/golden.json")["rows"]
    assert len(rows) == 36
    for row in rows:
        for call in row["encode_text_calls"]:
            assert processor.encode(call["text"], max_length=call["kwargs"].get("length")) == call["ids"]
        # the calls that the source is made of: the last ones whose ids it ends with
        prompt = _source_text(row)
        assert processor.source(prompt) == row["source"]
        answer = row["encode_text_calls"][1]["text"]
        ended = row["target"][-1] == processor.eos_id
        kind: Any = PROMPT_TYPES[row["kwargs"].get("prompt_type", "none")]
        batch = processor([prompt], targets=[answer], decoder_prompt=kind, end=ended)
        assert batch["decoder_input_ids"][0].tolist() == row["prev_output_tokens"]
        assert batch["labels"].eq(IGNORED).sum() == row["target"].count(processor.pad_id)
        assert batch["labels"].masked_fill(batch["labels"] == IGNORED, 1)[0].tolist() == row["target"]
        assert batch["input_ids"][0].tolist() == row["source"]
        if row["decoder_prompt"]:
            assert processor.decoder_prompt(row["source"], kind) == row["decoder_prompt"]


def _source_text(row: dict[str, Any]) -> str:
    """The text of a recorded source: first call; objects are a call of their own behind it; a caption's prompt replaces it."""
    first, _, *more = (call["text"] for call in row["encode_text_calls"])
    if not more:
        return str(first)
    return str(first + more[0] if more[0].startswith(" object:") else more[0])


def test_tiny_vocabulary(tiny: OFAProcessor, tmp_path: Path) -> None:
    symbols = read("tokenization/golden.json")["tiny_dict"]["symbols"]
    tiny.save_pretrained(tmp_path)
    for processor in (tiny, OFAProcessor.from_pretrained(tmp_path)):
        assert processor.vocab_size == len(symbols) == 93
        assert processor.encode_locations(" ".join(symbols)) == list(range(93))
        assert (processor.bin_range, processor.code_range, processor.mask_id) == ((73, 93), (65, 73), 64)


def test_tiny_vocabulary_makes_the_real_pieces_and_drops_those_it_lacks(
    tiny: OFAProcessor, fairseq: OFAProcessor, tmp_path: Path
) -> None:
    tiny.save_pretrained(tmp_path)
    loaded = OFAProcessor.from_pretrained(tmp_path)
    known = {fairseq.encode_locations(s)[0] for s in read("tokenization/golden.json")["tiny_dict"]["symbols"][4:64]}
    for row in read("tokenization/golden.json")["rows"]:
        if row["use_bpe"]:
            # the first 60 words of dict.txt have the same ids in both
            expected = [i if i in known else tiny.unk_id for i in row["ids"]]
            assert tiny.encode(row["text"]) == loaded.encode(row["text"]) == expected


def test_refused_files(tmp_path: Path, message: Any) -> None:
    (tmp_path / "dict.txt").write_text("13 5\nnothing\n")
    files = {name: FIXTURES / "bpe" / name for name in ("encoder.json", "vocab.bpe")}
    assert f"{tmp_path / 'dict.txt'}:2" in message(
        OFAProcessor.from_fairseq, {**files, "dict.txt": tmp_path / "dict.txt"}
    )
    (tmp_path / "dict.txt").write_text("13 5\n13 4\n")
    assert "twice" in message(OFAProcessor.from_fairseq, {**files, "dict.txt": tmp_path / "dict.txt"})
    (tmp_path / "encoder.json").write_text('{"a": 0}')
    swapped = {**files, "encoder.json": tmp_path / "encoder.json", "dict.txt": FIXTURES / "bpe" / "dict.txt"}
    with pytest.raises(DataError, match="do not belong together"):
        OFAProcessor.from_fairseq(swapped)
