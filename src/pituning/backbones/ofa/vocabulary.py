"""OFA's vocabulary from files, as one BPE tokenizer of the `tokenizers` library whose ids are the model's.

Ids: ``<s>`` 0, ``<pad>`` 1, ``</s>`` 2, ``<unk>`` 3; the BPE pieces in the order of fairseq's ``dict.txt``; ``<mask>``;
``<code_0>`` …; ``<bin_0>`` …. BART's ``vocab.json`` agrees up to ``<mask>``. A dictionary may lack pieces that BPE makes:
these get ids behind the vocabulary's end, which :class:`~pituning.backbones.ofa.tokens.OFATokenizer` turns to ``<unk>``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pituning.errors import DataError

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
MASK = "<mask>"
END_OF_TEXT = "<|endoftext|>"
NUM_CODES, NUM_BINS = 8192, 1000  # of the released checkpoints
FAIRSEQ_FILES = ("encoder.json", "vocab.bpe", "dict.txt")
TOKENIZER_FILE = "tokenizer.json"

Merges = Sequence[tuple[str, str]]


def location_symbols(num_codes: int, num_bins: int) -> list[str]:
    """``<code_0> … <code_{num_codes−1}>``, then ``<bin_0> … <bin_{num_bins−1}>``."""
    return [*(f"<code_{i}>" for i in range(num_codes)), *(f"<bin_{i}>" for i in range(num_bins))]


def gpt2_pieces(merges: Merges) -> list[str]:
    """BPE pieces in the order of GPT-2's ``encoder.json``: 256 bytes, one per merge, the end of a text."""
    return [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges), END_OF_TEXT]


def byte_level_bpe(symbols: Sequence[str], merges: Merges) -> Tokenizer:
    """GPT-2's byte-level BPE with the given symbols as ids 0, 1, ….

    Raises:
        DataError: for symbols that occur twice, or merges of pieces that do not exist.
    """
    ids = {symbol: index for index, symbol in enumerate(symbols)}
    if len(ids) < len(symbols):
        twice = next(s for i, s in enumerate(symbols) if ids[s] != i)
        raise DataError(
            f"symbol {twice!r} occurs twice in the vocabulary, at ids {symbols.index(twice)} and {ids[twice]}"
        )
    for piece in gpt2_pieces(merges):
        ids.setdefault(piece, len(ids))
    try:
        tokenizer = Tokenizer(models.BPE(vocab=ids, merges=list(merges), unk_token="<unk>"))
    except Exception as error:  # tokenizers raises no narrower class
        raise DataError(f"the merges do not fit together: {error}") from error
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def read_fairseq(files: str | Path | Mapping[str, str | Path], num_codes: int, num_bins: int) -> tuple[Tokenizer, int]:
    """Tokenizer and vocabulary size from ``encoder.json``, ``vocab.bpe`` and ``dict.txt``.

    Args:
        files: a folder with the three files, or their paths by these names.

    Raises:
        DataError: for missing or malformed files.
    """
    if not isinstance(files, Mapping):
        files = {name: Path(files) / name for name in FAIRSEQ_FILES}
    if missing := [n for n in FAIRSEQ_FILES if n not in files]:
        raise DataError(f"fairseq's vocabulary consists of {', '.join(FAIRSEQ_FILES)}; no path was given for {missing}")
    encoder, bpe, dictionary = (Path(files[name]) for name in FAIRSEQ_FILES)
    numbers = _read_ids(encoder)
    piece_of = {str(number): piece for piece, number in numbers.items()}
    words = [piece_of.get(word, word) for word in _dictionary_words(dictionary)]
    symbols = [*SPECIAL, *words, MASK, *location_symbols(num_codes, num_bins)]
    merges = _read_merges(bpe)
    if unnumbered := next((a + b for a, b in merges if a + b not in numbers), None):
        raise DataError(
            f"{bpe} merges to {unnumbered!r}, which {encoder} does not number: the two do not belong together"
        )
    try:
        return byte_level_bpe(symbols, merges), len(symbols)
    except DataError as error:
        raise DataError(f"{dictionary}: {error}") from error


def read_pretrained(
    folder: Path, num_codes: int | None, num_bins: int | None, vocab_size: int | None
) -> tuple[Tokenizer, int]:
    """Tokenizer and vocabulary size from ``tokenizer.json``, or from ``vocab.json`` and ``merges.txt``.

    Codes and bins that the files lack are appended: as many as given, else those of the released checkpoints.

    Raises:
        DataError: for missing or malformed files.
    """
    path = folder / TOKENIZER_FILE
    if path.is_file():
        tokenizer, ids = _read_tokenizer(path)
    else:
        path = folder / "vocab.json"
        if not path.is_file():
            raise DataError(f"{folder} has no tokenizer: expected {TOKENIZER_FILE}, or vocab.json and merges.txt")
        added = folder / "added_tokens.json"
        ids = {**_read_ids(path), **(_read_ids(added) if added.is_file() else {})}
        tokenizer = None
    size = min(len(ids), vocab_size or len(ids))
    symbols = {i: symbol for symbol, i in ids.items() if i < size}
    if holes := [i for i in range(size) if i not in symbols]:
        raise DataError(f"{path}: {len(ids)} symbols, but none has the id {holes[0]}")
    ordered = [symbols[i] for i in range(size)]
    if vocab_size is None or size < vocab_size:
        codes = 0 if "<code_0>" in ids else NUM_CODES if num_codes is None else num_codes
        bins = 0 if "<bin_0>" in ids else NUM_BINS if num_bins is None else num_bins
        ordered += location_symbols(codes, bins)
    if tokenizer is None:
        try:
            return byte_level_bpe(ordered, _read_merges(folder / "merges.txt")), len(ordered)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
    return _extended(tokenizer, ordered, path), len(ordered)


def merges_of(tokenizer: Tokenizer) -> Merges:
    """The merges of a BPE tokenizer, in order."""
    pairs = json.loads(tokenizer.to_str())["model"]["merges"]
    split = (m.split(" ") if isinstance(m, str) else m for m in pairs)
    return [(left, right) for left, right in split]


def _read_tokenizer(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """A tokenizer file's content and its ids, added tokens included."""
    content = _read_json(path)
    model = content.get("model") or {}
    if model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise DataError(f"{path}: OFA wants a tokenizer of type 'BPE', found {model.get('type')!r}")
    if model.get("ignore_merges"):
        raise DataError(f"{path}: with ignore_merges a text could contain special symbols; OFA's BPE only merges")
    added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    return content, {**_checked_ids(model["vocab"], path), **_checked_ids(added, path)}


def _extended(content: dict[str, Any], symbols: Sequence[str], path: Path) -> Tokenizer:
    """The tokenizer with ``symbols`` first, and nothing that would look for them in a text."""
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    for piece in content["model"]["vocab"]:
        vocabulary.setdefault(piece, len(vocabulary))
    model = {**content["model"], "vocab": vocabulary, "unk_token": "<unk>", "dropout": None}
    plain: dict[str, Any] = {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    try:
        return Tokenizer.from_str(json.dumps({**content, **plain, "model": model}))
    except Exception as error:  # tokenizers raises no narrower class
        raise DataError(f"{path} is not a tokenizer that can be read: {error}") from error


def _dictionary_words(path: Path) -> list[str]:
    """First columns of ``dict.txt`` (``word count`` per line)."""
    words = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line:
            continue
        word, space, count = line.rpartition(" ")
        if not space or not count.strip().isdigit():
            raise DataError(f"{path}:{number}: expected a word and its count, found {line!r}")
        words.append(word)
    return words


def _read_merges(path: Path) -> Merges:
    """Pairs of ``vocab.bpe`` or ``merges.txt``, whose first line may name a version."""
    lines = _read_text(path).split("\n")
    first = 1 if lines[0].startswith("#version") else 0
    merges = []
    for number, line in enumerate(lines[first:], start=first + 1):
        if not line:
            continue
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise DataError(f"{path}:{number}: expected two pieces with a space between, found {line!r}")
        merges.append((left, right))
    return merges


def _read_ids(path: Path) -> dict[str, int]:
    return _checked_ids(_read_json(path), path)


def _checked_ids(values: Mapping[str, Any], path: Path) -> dict[str, int]:
    if wrong := next(((s, i) for s, i in values.items() if type(i) is not int or i < 0), None):
        raise DataError(f"{path}: symbol {wrong[0]!r} has the id {wrong[1]!r}, expected a whole number from 0")
    if twice := _duplicate(values.values()):
        raise DataError(f"{path}: several symbols have the id {twice[0]}")
    return dict(values)


def _duplicate(ids: Iterable[int]) -> list[int]:
    seen: set[int] = set()
    for i in ids:
        if i in seen:
            return [i]
        seen.add(i)
    return []


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(path))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
