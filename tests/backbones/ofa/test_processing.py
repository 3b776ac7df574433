"""The processor with small vocabularies of our own; the reference's recorded numbers are in tests/parity."""

from __future__ import annotations

import io
import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pituning.backbones.ofa.images import IMAGENET_MEAN, IMAGENET_STD
from pituning.backbones.ofa.processing import OFAProcessor

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("r", "e"), ("Ġ", "a"), ("re", "d"), ("Ġ", "red"), ("d", "o"), ("do", "g"), ("Ġ", "dog"), ("a", "b")]
LOCATIONS = [*(f"<code_{i}>" for i in range(3)), *(f"<bin_{i}>" for i in range(20))]
SYMBOLS = [*SPECIAL, *BYTES, *("".join(m) for m in MERGES), "<mask>", *LOCATIONS]
LITERALS = ["<bin_3>", "</s>", "<s>", "<pad>", "<mask>", "<unk>", "<code_1>", " <bin_3> <bin_4>", "<|endoftext|>"]


def small(**settings: Any) -> OFAProcessor:
    return OFAProcessor.from_symbols(SYMBOLS, MERGES, **{"image_size": 32, **settings})


@pytest.fixture(scope="module")
def processor() -> OFAProcessor:
    return small()


def write_fairseq(folder: Path) -> None:
    """The same vocabulary as fairseq's three files, with a numbering of its own."""
    pieces = [*("".join(m) for m in MERGES), *BYTES]
    number = {piece: i for i, piece in enumerate(pieces)}
    words = SYMBOLS[4 : -len(LOCATIONS) - 1]
    (folder / "encoder.json").write_text(json.dumps(number))
    (folder / "vocab.bpe").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in MERGES) + "\n")
    (folder / "dict.txt").write_text("".join(f"{number[w]} {1000 - i}\n" for i, w in enumerate(words)))


def write_bart(folder: Path, **added: int) -> None:
    """The same vocabulary as `vocab.json` and `merges.txt`, without codes and bins but for those in `added`."""
    plain = SYMBOLS[: -len(LOCATIONS)]
    (folder / "vocab.json").write_text(json.dumps({s: i for i, s in enumerate(plain)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in MERGES) + "\n")
    if added:
        (folder / "added_tokens.json").write_text(json.dumps(added))


def bpe_by_hand(word: str) -> list[str]:
    """Pieces of one word by the definition: the earliest merge first, from the left, until none applies."""
    pieces = list(word)
    for left, right in MERGES:
        i = 0
        while i < len(pieces) - 1:
            if (pieces[i], pieces[i + 1]) == (left, right):
                pieces[i : i + 2] = [left + right]
            i += 1
    return pieces


# ------------------------------------------------------------------------------------------------------------- tokens


def test_ids_derive_from_the_symbols(processor: OFAProcessor) -> None:
    assert [processor.bos_id, processor.pad_id, processor.eos_id, processor.unk_id] == [0, 1, 2, 3]
    assert processor.vocab_size == len(SYMBOLS)
    assert processor.mask_id == SYMBOLS.index("<mask>")
    assert processor.bin_range == (SYMBOLS.index("<bin_0>"), len(SYMBOLS))
    assert processor.code_range == (SYMBOLS.index("<code_0>"), SYMBOLS.index("<bin_0>"))
    assert (processor.num_bins, processor.num_codes) == (20, 3)


def test_pieces_by_the_definition(processor: OFAProcessor) -> None:
    rng = random.Random(5)
    for _ in range(50):
        words = ["".join(rng.choices("abredog", k=rng.randint(1, 9))) for _ in range(4)]
        expected = [SYMBOLS.index(p) for w in words for p in bpe_by_hand("Ġ" + w)]
        assert processor.encode("".join(f" {w}" for w in words)) == expected


@given(text=st.text(max_size=40) | st.lists(st.sampled_from(LITERALS)).map(" ".join))
def test_any_text_comes_back(processor: OFAProcessor, text: str) -> None:
    ids = processor.encode(text)
    assert processor.decode(ids) == text
    assert processor.decode(processor.source(text)) == text


@pytest.mark.parametrize("text", LITERALS)
def test_symbols_in_a_text_are_text(processor: OFAProcessor, text: str) -> None:
    first_piece, past_pieces = 4, processor.mask_id
    ids = processor.encode(text)
    assert all(first_piece <= i < past_pieces for i in ids)
    assert len(ids) > 1


def test_locations(processor: OFAProcessor) -> None:
    first = processor.bin_range[0]
    assert (
        processor.encode_locations("<bin_3>  <bin_19>\n")
        == processor.encode_locations([3, 19])
        == [first + 3, first + 19]
    )
    assert processor.encode_locations(torch.tensor([0, 1])) == [first, first + 1]
    assert processor.encode_locations("<bin_20> <code_3> hello red") == [processor.unk_id] * 4
    assert processor.encode_locations("<code_2> <mask> </s>") == [first - 1, processor.mask_id, 2]
    assert processor.encode_locations("") == []


@pytest.mark.parametrize("number", [-1, 20])
def test_numbers_that_are_no_bins_are_refused(
    processor: OFAProcessor, number: int, message: Callable[..., str]
) -> None:
    assert f"no bin {number}" in message(processor.encode_locations, [0, number])


def test_decode_shows_locations_and_drops_start_end_and_padding(processor: OFAProcessor) -> None:
    bins = processor.encode_locations("<bin_3> <bin_7>")
    assert processor.decode([0, *bins, 2, 1, 1]) == "<bin_3> <bin_7>"
    assert (
        processor.decode([*processor.encode(" a red"), *bins, *processor.encode("dog")]) == " a red <bin_3> <bin_7> dog"
    )
    assert processor.decode([*bins, *processor.encode(" dog")]) == "<bin_3> <bin_7> dog"
    mask = processor.mask_id
    assert processor.decode([processor.unk_id, mask, *processor.encode("dog"), mask]) == "<unk> <mask> dog <mask>"
    assert processor.decode(torch.tensor([0, 2])) == processor.decode([]) == ""


def test_decode_refuses_ids_outside_the_vocabulary(processor: OFAProcessor, message: Callable[..., str]) -> None:
    for i in (-100, len(SYMBOLS)):
        assert f"no id {i}" in message(processor.decode, [i])


@pytest.mark.parametrize("text", ["\ud800", None, 3])
def test_what_is_no_text_is_refused(processor: OFAProcessor, text: Any, message: Callable[..., str]) -> None:
    assert repr(text) in message(processor.encode, text)


def test_pieces_without_an_id_are_unknown(tmp_path: Path) -> None:
    symbols = [*SPECIAL, "Ġred", "d", "<mask>"]
    processor = OFAProcessor.from_symbols(symbols, MERGES)
    processor.save_pretrained(tmp_path)
    for each in (processor, OFAProcessor.from_pretrained(tmp_path)):
        assert each.encode(" red dogd") == [4, 3, 5]
        assert each.vocab_size == 7
        assert each.num_bins == each.num_codes == 0
        assert each.bin_range == each.code_range == (7, 7)


# -------------------------------------------------------------------------------------------------- files and folders


def test_all_files_give_equal_ids(processor: OFAProcessor, tmp_path: Path) -> None:
    for name in ("fairseq", "bart", "added", "saved"):
        (tmp_path / name).mkdir()
    write_fairseq(tmp_path / "fairseq")
    write_bart(tmp_path / "bart")
    write_bart(tmp_path / "added", **{s: i for i, s in enumerate(SYMBOLS) if s in LOCATIONS})
    processor.save_pretrained(tmp_path / "saved")
    others = [
        OFAProcessor.from_fairseq(tmp_path / "fairseq", num_codes=3, num_bins=20),
        OFAProcessor.from_pretrained(tmp_path / "bart", num_codes=3, num_bins=20),
        OFAProcessor.from_pretrained(tmp_path / "added"),
        OFAProcessor.from_pretrained(tmp_path / "saved"),
    ]
    texts = [" a red dog", "red\n\tdogé 你好", "", *LITERALS]
    for other in others:
        assert [other.encode(t) for t in texts] == [processor.encode(t) for t in texts]
        assert other.encode_locations(" ".join(LOCATIONS)) == processor.encode_locations(" ".join(LOCATIONS))
        assert (other.vocab_size, other.bin_range, other.code_range) == (
            processor.vocab_size, processor.bin_range, processor.code_range,
        )  # fmt: skip


def test_plain_files_get_the_codes_and_bins_of_the_released_checkpoints(tmp_path: Path) -> None:
    write_bart(tmp_path)
    found = OFAProcessor.from_pretrained(tmp_path)
    plain = len(SYMBOLS) - len(LOCATIONS)
    assert found.code_range == (plain, plain + 8192)
    assert found.bin_range == (plain + 8192, plain + 9192)


def test_a_trained_tokenizer_file(tmp_path: Path) -> None:
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = [*SPECIAL, "<mask>", *LOCATIONS]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, initial_alphabet=BYTES, show_progress=False)
    core.train_from_iterator([" a red dog", " the dog is red", " a dog"] * 5, trainer)
    core.save(str(tmp_path / "tokenizer.json"))
    found = OFAProcessor.from_pretrained(tmp_path)
    assert found.vocab_size == core.get_vocab_size()
    assert found.encode(" the red dog") == core.encode(" the red dog").ids
    assert found.bin_range == (8, 28)
    assert len(core.encode("<bin_3>").ids) == 1
    assert found.decode(found.encode("<bin_3>")) == "<bin_3>"
    assert len(found.encode("<bin_3>")) > 1


def test_a_tokenizer_file_without_an_unknown_symbol_of_its_own(tmp_path: Path) -> None:
    vocabulary = {s: i for i, s in enumerate([*SPECIAL, "a", "b", "<mask>"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], dropout=0.5))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "preprocessor_config.json").write_text('{"num_codes": 0, "num_bins": 0, "size": 3}')
    assert OFAProcessor.from_pretrained(tmp_path).encode("abcab") == [4, 5, 3, 4, 5]


def test_saving_twice_is_equal_to_the_byte(processor: OFAProcessor, tmp_path: Path) -> None:
    original = small(image_size=48, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD, max_source_length=5)
    original.save_pretrained(tmp_path / "once")
    loaded = OFAProcessor.from_pretrained(tmp_path / "once")
    loaded.save_pretrained(tmp_path / "twice")
    assert loaded.settings == original.settings
    assert {p.name for p in (tmp_path / "once").iterdir()} == {"tokenizer.json", "preprocessor_config.json"}
    for path in (tmp_path / "once").iterdir():
        assert path.read_bytes() == (tmp_path / "twice" / path.name).read_bytes()
    assert OFAProcessor.from_pretrained(tmp_path / "once", image_size=64).settings.image_size == 64


def test_a_copy_in_another_process_is_equal(processor: OFAProcessor) -> None:
    copy = pickle.loads(pickle.dumps(processor))
    assert copy.encode(" a red dog") == processor.encode(" a red dog")
    assert copy.settings == processor.settings


def test_folders_that_cannot_be_read(tmp_path: Path, message: Callable[..., str]) -> None:
    assert "has no tokenizer" in message(OFAProcessor.from_pretrained, tmp_path)
    assert "encoder.json cannot be read" in message(OFAProcessor.from_fairseq, tmp_path)
    assert "no path was given for ['dict.txt']" in message(
        OFAProcessor.from_fairseq, {"encoder.json": tmp_path, "vocab.bpe": tmp_path}
    )
    write_bart(tmp_path)
    for name, content, expected in (
        ("merges.txt", "#version\nĠ a\nb\n", "merges.txt:3"),
        ("merges.txt", "q zz\n", "do not fit together"),
        ("vocab.json", "[]", "expected a JSON object"),
        ("vocab.json", '{"a": 0, "b": 0}', "several symbols have the id 0"),
        ("vocab.json", '{"a": -1}', "expected a whole number"),
        ("vocab.json", '{"a": 0, "b": 2}', "none has the id 1"),
        ("vocab.json", "{", "not JSON"),
        ("preprocessor_config.json", "{", "cannot be read"),
        ("preprocessor_config.json", '{"image_size": 0, "image_std": [1, 0, 1]}', "image_size"),
        ("tokenizer.json", '{"model": {"type": "WordPiece"}}', "'WordPiece'"),
    ):
        before = (tmp_path / name).read_text() if (tmp_path / name).exists() else None
        (tmp_path / name).write_text(content)
        assert expected in message(OFAProcessor.from_pretrained, tmp_path), content
        (tmp_path / name).unlink() if before is None else (tmp_path / name).write_text(before)
    OFAProcessor.from_pretrained(tmp_path)


def test_settings_that_contradict_the_vocabulary_or_do_not_exist(tmp_path: Path, message: Callable[..., str]) -> None:
    small().save_pretrained(tmp_path)
    assert "num_bins = 1000, but the vocabulary has 20" in message(
        OFAProcessor.from_pretrained, tmp_path, num_bins=1000
    )
    assert "image_sise" in message(OFAProcessor.from_pretrained, tmp_path, image_sise=3)
    for symbols, expected in (
        (SYMBOLS[1:], "lacks <s>"),
        ([*SYMBOLS, "<bin_21>"], "consecutive ids"),
        ([*SYMBOLS[:-2], SYMBOLS[-1], SYMBOLS[-2]], "consecutive ids"),
        ([*SYMBOLS, "<bin_0>"], "occurs twice"),
        ([s for s in SYMBOLS if "bin_" not in s or s == "<bin_0>"], "at least two"),
    ):
        assert expected in message(OFAProcessor.from_symbols, symbols, MERGES)
    assert "do not fit together" in message(OFAProcessor.from_symbols, SYMBOLS, [("red", "zz")])


# ------------------------------------------------------------------------------------------------------------- batches


def test_a_batch_of_text(processor: OFAProcessor) -> None:
    batch = processor(["ab", "ab ab d"])
    ab, long = processor.encode("ab"), processor.encode("ab ab d")
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert batch["input_ids"].tolist() == [[0, *ab, 2, *[1] * (len(long) - len(ab))], [0, *long, 2]]
    assert batch["attention_mask"].tolist() == [
        [1] * (len(ab) + 2) + [0] * (len(long) - len(ab)),
        [1] * (len(long) + 2),
    ]
    assert processor(["ab"], images=[None]).keys() == batch.keys()


def test_targets(processor: OFAProcessor) -> None:
    box = processor.encode_locations([1, 2, 3, 4])
    dog = processor.encode(" dog")
    batch = processor([" a", " a"], targets=[box, " dog"])
    assert batch["decoder_input_ids"].tolist() == [[0, *box], [0, *dog, *[1] * (4 - len(dog))]]
    assert batch["labels"].tolist() == [[*box, 2], [*dog, 2, *[-100] * (4 - len(dog))]]


@pytest.mark.parametrize(("kind", "cut"), [("source", None), ("source_without_end", -1)])
@pytest.mark.parametrize("end", [True, False])
def test_decoder_prompts_are_read_and_not_learned(
    processor: OFAProcessor, kind: Any, cut: int | None, end: bool
) -> None:
    batch = processor([" a red", " a"], targets=[" dog", " red"], decoder_prompt=kind, end=end)
    for n, (text, answer) in enumerate([(" a red", " dog"), (" a", " red")]):
        prompt, ids = processor.source(text)[:cut], [*processor.encode(answer), *[2] * end]
        whole = prompt + ids
        read, learned = batch["decoder_input_ids"][n].tolist(), batch["labels"][n].tolist()
        assert read[: len(whole) - 1] == whole[:-1]
        assert learned[: len(whole) - 1] == [-100] * (len(prompt) - 1) + ids
        assert set(read[len(whole) - 1 :]) <= {1}
        assert set(learned[len(whole) - 1 :]) <= {-100}


def test_images_for_some(processor: OFAProcessor) -> None:
    image = Image.new("RGB", (9, 5), (255, 0, 51))
    batch = processor([" a"] * 3, images=[None, image, None])
    assert batch["patch_masks"].tolist() == [False, True, False]
    assert batch["patch_masks"].dtype == torch.bool
    assert batch["patch_images"].shape == (3, 3, 32, 32)
    assert not batch["patch_images"][[0, 2]].any()
    assert torch.equal(batch["patch_images"][1], processor.image(image))


def test_batches_that_make_no_sense(processor: OFAProcessor, message: Callable[..., str]) -> None:
    assert "at least one text" in message(processor, [])
    assert "at least one text" in message(processor, "a string")
    assert "2 texts, but 1 images" in message(processor, ["a", "b"], [None])
    assert "1 texts, but 2 targets" in message(processor, ["a"], None, ["a", "b"])
    assert "no decoder prompt 'src'" in message(processor.decoder_prompt, [0, 2], "src")


def test_cutting(processor: OFAProcessor) -> None:
    limited = small(max_source_length=2, max_target_length=3)
    assert limited.clean_caption("A red-dog <person>") == "a red"
    assert limited.clean_question("What is it?") == "what is"
    assert limited.clean_sentence(" A  red dog ") == "a red"
    assert limited.clean_answer("A dog, on a hill.") == "A dog on"
    whole = processor.encode(" a red dog")
    assert limited.source(" a red dog") == [0, *whole, 2]
    assert limited.source(" a red dog", max_length=2) == [0, *whole[:2], 2]
    assert limited([" a red dog"], max_length=2)["input_ids"].tolist() == [[0, *whole[:2], 2]]


# ----------------------------------------------------------------------------------------------------- images and boxes


def test_pixel_values() -> None:
    image = Image.new("RGB", (3, 2), (255, 0, 51))
    plain = small().image(image)
    assert plain.shape == (3, 32, 32)
    assert plain[:, 0, 0].tolist() == pytest.approx([1, -1, -0.6])
    net = small(image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD).image(image)
    assert net[:, 5, 7].tolist() == pytest.approx([(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225])


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr"])
def test_every_kind_of_picture(processor: OFAProcessor, mode: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (7, 1, 3), dtype=np.uint8)).convert(mode)
    expected = processor.image(colours.convert("RGB"))
    assert expected.isfinite().all()
    assert torch.equal(processor.image(colours), expected)
    path = tmp_path / "picture.tif"
    colours.save(path)
    for source in (path, str(path), path.read_bytes()):
        assert processor.image(source).shape == (3, 32, 32)


@pytest.mark.parametrize("size", [(1, 7), (7, 1), (1, 1), (500, 3)])
def test_odd_sizes(processor: OFAProcessor, size: tuple[int, int]) -> None:
    patch = processor.image(Image.new("RGB", size, (10, 20, 30)))
    assert patch.shape == (3, 32, 32)
    assert patch.flatten(1).std(1).tolist() == [0, 0, 0]
    box = processor.decode_box(processor.encode_box((0, 0, *size), size), size)
    # twenty bins over 512 pixels, of which the image takes 32: only the first two are in use
    assert box == pytest.approx((0, 0, size[0] * 512 / 19 / 32, size[1] * 512 / 19 / 32))


def test_broken_files_are_named(processor: OFAProcessor, tmp_path: Path, message: Callable[..., str]) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(buffer, "png")
    whole = buffer.getvalue()
    broken = tmp_path / "broken.png"
    for content in (b"", b"no picture", whole[:200], whole[:-20] + b"\0" * 20, whole[:60] + b"\xff" * 40 + whole[100:]):
        broken.write_bytes(content)
        assert str(broken) in message(processor.image, broken)
        assert "image 1" in message(processor, [" a", " a"], [Image.new("L", (2, 2)), content])
    assert str(tmp_path / "none.png") in message(processor.image, tmp_path / "none.png")


@pytest.mark.parametrize("side", [32, 384])
def test_boxes_there_and_back(side: int) -> None:
    processor = small(image_size=side, max_image_size=side)
    size = (640, 427)
    ids = processor.encode_box((64, 42.7, 600, 427), size)
    first = processor.bin_range[0]
    assert ids == [first + 2, first + 2, first + 18, first + 19]
    found = processor.decode_box([0, *ids, 2, 1, 1], size)
    assert found == pytest.approx((2 / 19 * 640, 2 / 19 * 427, 18 / 19 * 640, 427))
    assert processor.decode_box(torch.tensor(ids), size) == found
    assert processor.bins_to_boxes(processor.boxes_to_bins([[64, 42.7, 600, 427]], [size]), [size]).tolist() == [
        pytest.approx(found)
    ]


def test_a_sequence_that_is_not_four_bins_is_no_box(processor: OFAProcessor) -> None:
    bins = processor.encode_locations([1, 2, 3, 4])
    text = processor.encode(" a")
    code = processor.encode_locations("<code_2>")  # the id right before the first bin: minus one as a coordinate
    for ids in (
        [], [0], [0, 2], [2, *bins], bins[:3], [*bins, bins[0]], [*bins[:3], *text], [*bins[:3], *code], [*bins, *text],
        [*bins[:2], 2, *bins[2:]], [0, 0, *bins], [1, *bins], [*bins[:3], len(SYMBOLS)], [-1, *bins[1:]],
    ):  # fmt: skip
        assert processor.decode_box(ids, (64, 64)) is None, ids


def test_boxes_without_bins_are_refused(message: Callable[..., str]) -> None:
    processor = OFAProcessor.from_symbols(SYMBOLS[: -len(LOCATIONS)], MERGES)
    assert "no location bins" in message(processor.encode_box, (0, 0, 1, 1), (4, 4))
    assert processor.decode_box([0, 4, 5, 6, 7, 2], (4, 4)) is None


def test_shown_by_name(processor: OFAProcessor) -> None:
    assert repr(processor) == f"OFAProcessor({len(SYMBOLS)} symbols, 20 bins, images of 32 × 32)"
