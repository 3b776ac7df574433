"""`OFATokenizer`: text to ids and back, and the symbols that are not text.

Text is always taken literally: ``"<bin_3>"`` or ``"</s>"`` in a user's sentence becomes ordinary BPE pieces. Location bins
and image codes have a way of their own, :meth:`OFATokenizer.encode_locations`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path

from tokenizers import Tokenizer

from pituning.backbones.ofa.vocabulary import (
    MASK,
    SPECIAL,
    Merges,
    byte_level_bpe,
    gpt2_pieces,
    location_symbols,
    merges_of,
)
from pituning.errors import DataError

Range = tuple[int, int]


class OFATokenizer:
    """A BPE tokenizer with OFA's special symbols, image codes and location bins.

    Args:
        bpe: its ids are the model's; it makes no special symbols out of text.
        vocab_size: ids of the model; BPE pieces with a higher one are unknown to the model.

    Attributes:
        bos_id, pad_id, eos_id, unk_id, mask_id: ids of ``<s>``, ``<pad>``, ``</s>``, ``<unk>`` and ``<mask>``.
        bin_range, code_range: first id of the location bins (image codes), and one past the last.

    Raises:
        DataError: if special symbols are missing, or codes or bins are not numbered without a gap.
    """

    def __init__(self, bpe: Tokenizer, vocab_size: int) -> None:
        self.bpe = bpe
        self.vocab_size = vocab_size
        ids = {symbol: i for symbol, i in bpe.get_vocab(with_added_tokens=False).items() if i < vocab_size}
        if missing := [symbol for symbol in (*SPECIAL, MASK) if symbol not in ids]:
            raise DataError(f"the vocabulary lacks {', '.join(missing)}; OFA needs {', '.join((*SPECIAL, MASK))}")
        self.bos_id, self.pad_id, self.eos_id, self.unk_id = (ids[symbol] for symbol in SPECIAL)
        self.mask_id = ids[MASK]
        self.code_range = _block("code", ids)
        self.bin_range = _block("bin", ids)
        if self.num_bins == 1:
            raise DataError("a vocabulary with one location bin cannot tell places apart: it needs at least two")

    @classmethod
    def from_symbols(cls, symbols: Sequence[str], merges: Merges) -> OFATokenizer:
        """A byte-level BPE tokenizer whose symbol i has the id i; see :func:`byte_level_bpe`."""
        return cls(byte_level_bpe(symbols, merges), len(symbols))

    @property
    def num_bins(self) -> int:
        """Number of location bins."""
        return self.bin_range[1] - self.bin_range[0]

    @property
    def num_codes(self) -> int:
        """Number of image codes."""
        return self.code_range[1] - self.code_range[0]

    def encode(self, text: str, *, max_length: int | None = None) -> list[int]:
        """Ids of a text's BPE pieces, without start and end; cut after ``max_length`` of them.

        Pieces that the vocabulary lacks become ``<unk>``. OFA's prompts and answers begin with a space, which makes a
        different first piece: none is added here.

        Raises:
            DataError: if ``text`` is not a string, or has no UTF-8 form.
        """
        try:
            ids = self.bpe.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            raise DataError(f"expected a text that can be written as UTF-8, found {text!r}") from error
        return [i if i < self.vocab_size else self.unk_id for i in ids[:max_length]]

    def encode_locations(self, locations: str | Iterable[int]) -> list[int]:
        """Ids of location bins, from their numbers or from their symbols.

        Args:
            locations: numbers of bins; or symbols with spaces between, such as ``"<bin_3> <bin_7>"``. As a dictionary of
                fairseq does, a string may name every other symbol too: ``<code_5>``, ``<mask>``, ``</s>``, and a BPE
                piece by its number in GPT-2's own order. What no symbol is called becomes ``<unk>``.

        Raises:
            DataError: for numbers that are no bins.
        """
        if isinstance(locations, str):
            return [self._dictionary.get(word, self.unk_id) for word in locations.split()]
        numbers = [operator.index(n) for n in locations]
        if wrong := [n for n in numbers if not 0 <= n < self.num_bins]:
            raise DataError(f"there is no bin {wrong[0]}: this vocabulary has {self.num_bins}, from 0")
        return [self.bin_range[0] + n for n in numbers]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids.

        Start, end and padding are left out. ``<unk>``, ``<mask>``, codes and bins stay visible by their names, apart from
        the text and each other by a space. Broken UTF-8 sequences become U+FFFD.

        Raises:
            DataError: for ids outside the vocabulary.
        """
        kept = [i for i in map(int, ids) if i not in (self.bos_id, self.eos_id, self.pad_id)]
        if wrong := [i for i in kept if not 0 <= i < self.vocab_size]:
            raise DataError(f"there is no id {wrong[0]}: this vocabulary has {self.vocab_size}, from 0")
        text = ""
        for named, group in groupby(kept, self._is_named):
            members = list(group)
            part = " ".join(self._symbol(i) for i in members) if named else self.bpe.decode(members)
            apart = not text or not part or text[-1].isspace() or part[0].isspace()
            text += part if apart else f" {part}"
        return text

    def save(self, path: str | Path) -> None:
        """Write the tokenizer as one JSON file of the `tokenizers` library."""
        self.bpe.save(str(path))

    def _is_named(self, i: int) -> bool:
        return i in (self.unk_id, self.mask_id) or any(a <= i < b for a, b in (self.code_range, self.bin_range))

    def _symbol(self, i: int) -> str:
        return str(self.bpe.id_to_token(i))

    @cached_property
    def _dictionary(self) -> dict[str, int]:
        """Ids by the names that fairseq gives them: BPE pieces have GPT-2's numbers."""
        ids = self.bpe.get_vocab(with_added_tokens=False)
        pieces = gpt2_pieces(merges_of(self.bpe))
        named = {piece: str(number) for number, piece in enumerate(pieces)}
        return {named.get(symbol, symbol): i for symbol, i in ids.items() if i < self.vocab_size}


def _block(kind: str, ids: dict[str, int]) -> Range:
    """Range of ids of ``<kind_0>``, ``<kind_1>``, …; empty at the vocabulary's end if there are none."""
    count = sum(symbol.startswith(f"<{kind}_") and symbol.endswith(">") for symbol in ids)
    first = ids.get(f"<{kind}_0>", len(ids))
    names = location_symbols(count, 0) if kind == "code" else location_symbols(0, count)
    if wrong := next((n for i, n in enumerate(names) if ids.get(n) != first + i), None):
        raise DataError(
            f"<{kind}_0> to <{kind}_{count - 1}> must have consecutive ids, but {wrong} has {ids.get(wrong, 'none')}"
        )
    return first, first + count
